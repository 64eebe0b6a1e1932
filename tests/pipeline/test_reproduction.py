"""What is kept of a run that was finished, and what is not; test_rerun.py and `.ci/run repro` build everything again in a fresh clone."""

import shutil
from pathlib import Path

from tests.pipeline.clone import Clone


def checkpoints_of(clone: Clone) -> Path:
    """The folder of the one training that ran there."""
    (folder,) = (clone.path / ".dvc/tmp/checkpoints").iterdir()
    return folder


def test_of_a_finished_run_only_what_it_made_is_kept_and_the_adapter_loads(built: Clone) -> None:
    assert sorted(path.name for path in checkpoints_of(built).iterdir()) == ["finished", "lock"]
    code = "from peft import AutoPeftModelForCausalLM as M; m = M.from_pretrained('models/adapter'); print(type(m).__name__)"
    assert "PeftModelForCausalLM" in built.run("python", "-W", "ignore", "-c", code)


def test_what_was_finished_is_taken_over_only_while_dvc_could_not_take_it(built: Clone) -> None:
    expected = built.outputs()
    again = built.run("dvc", "repro", "--force", "--single-item", "train")
    assert "reusing" not in again, "a reproduction by force must train"
    # As if the disk had been full when dvc was about to take the adapter.
    lock = built.path / "dvc.lock"
    lock.write_text(lock.read_text(encoding="utf-8").replace(_adapter_md5(lock), "0" * 32 + ".dir"), encoding="utf-8")
    (cached,) = [path for path in (built.path / ".dvc/cache/files/md5").rglob("*.dir")]
    cached.unlink()
    shutil.rmtree(built.path / "models/adapter")
    taken = built.run("dvc", "repro", "--single-item", "--force", "train")
    assert "reusing the finished adapter" in taken
    built.repro()
    assert built.outputs() == expected
    built.run("git", "diff", "--exit-code", "dvc.lock")


def _adapter_md5(lock: Path) -> str:
    from ruamel.yaml import YAML

    outs = YAML(typ="safe").load(lock)["stages"]["train"]["outs"]
    return str(next(out["md5"] for out in outs if out["path"] == "models/adapter"))


def test_another_training_removes_what_an_earlier_one_finished(built: Clone, tried: Clone) -> None:
    assert checkpoints_of(tried).name != checkpoints_of(built).name
