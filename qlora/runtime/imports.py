"""Libraries that a run does not use are not imported: PEFT would import bitsandbytes, which takes a second, wherever it is installed."""

import sys
from pathlib import Path

from qlora import params
from qlora.core.errors import InputError


def hide_unused_libraries(path: Path = Path("params.yaml")) -> None:
    """Make bitsandbytes unimportable, for libraries as if it were not installed, in a run with neither quantised weights nor its optimizers.

    A wrong params.yaml is left for the stage to report.
    """
    try:
        values = params.load(path)
    except InputError:
        return
    if not (values.base_model.is_quantised or "bnb" in values.train.optim or "paged" in values.train.optim):
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
