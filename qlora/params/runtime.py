"""Section `runtime`: values that can't change a byte of an output. No stage lists them in dvc.yaml."""

from typing import Literal

from pydantic import Field

from qlora.params.section import Section


class RuntimeParams(Section):
    num_workers: int | None = Field(gt=0)
    """Processes among which prepare shares the rows; null: one per core. Each holds a few thousand rows at a time."""
    engine: Literal["local", "ray"]
    """Where they run: on this machine, or as tasks of Ray (requirements-ray.txt), on the cluster of RAY_ADDRESS where that is set."""
    save_steps: int | None = Field(gt=0)
    """Updates between two checkpoints under .dvc/tmp/checkpoints."""
    save_minutes: float | None = Field(gt=0)
    """Minutes between two checkpoints; with save_steps, whichever comes first. Both null: one per epoch."""
    report_to: Literal["none", "tensorboard"]
    """tensorboard: a live view under .dvc/tmp/tensorboard, tracked by nothing."""
    allow_other_versions: bool
    """Warn in place of refusing when the installed packages are not those of requirements.txt."""
    progress: bool
    """Progress bars for whatever lasts over a second."""
