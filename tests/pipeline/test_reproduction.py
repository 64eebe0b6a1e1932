"""The same inputs give the same bytes, wherever the clone lies."""

import shutil
from pathlib import Path

from tests.pipeline.clone import Clone


def test_two_clones_at_two_paths_make_the_same_bytes(built: Clone, tmp_path: Path) -> None:
    """Empty caches, other paths, two values of PYTHONHASHSEED, everything by force."""
    outputs = []
    for name, hash_seed in (("a", "1"), ("a-longer-path/b", "77")):
        path = tmp_path / name
        built.run("git", "clone", "--quiet", str(built.path), str(path))
        clone = Clone(path)
        assert clone.repro("--force", PYTHONHASHSEED=hash_seed) == {"prepare", "baseline", "train", "evaluate"}
        clone.run("git", "diff", "--exit-code", "dvc.lock")
        outputs.append(clone.outputs())
    assert outputs[0] == outputs[1]
    assert outputs[0] == built.outputs()
    kinds = {Path(name).parts[0] for name in outputs[0]}
    assert kinds == {"data", "models", "metrics", "reports"}


def test_a_fresh_clone_really_runs_all_four_stages_then_nothing(built: Clone, tmp_path: Path) -> None:
    built.run("git", "clone", "--quiet", str(built.path), str(tmp_path / "fresh"))
    fresh = Clone(tmp_path / "fresh")
    assert fresh.repro() == {"prepare", "baseline", "train", "evaluate"}
    assert fresh.repro() == set()
    assert fresh.run("git", "status", "--porcelain") == ""


def test_checkpoints_of_a_finished_run_are_gone_and_the_adapter_loads(built: Clone) -> None:
    assert list((built.path / ".dvc/tmp/checkpoints").glob("*")) == []
    code = "from peft import AutoPeftModelForCausalLM as M; m = M.from_pretrained('models/adapter'); print(type(m).__name__)"
    assert "PeftModelForCausalLM" in built.run("python", "-W", "ignore", "-c", code)


def test_an_unfinished_training_goes_on_from_its_checkpoint(built: Clone) -> None:
    """The same bytes as if it had never stopped: the checkpoint of the first of two updates is put in its place."""
    expected = built.outputs()
    built.set(runtime__save_steps=1)
    keep = (
        "import runpy, shutil; remove = shutil.rmtree; "
        "shutil.rmtree = lambda path, **options: 'checkpoints' in str(path) or remove(path, **options); "
        "runpy.run_module('stages.train', run_name='__main__')"
    )
    command = next(line.partition("python -m stages.train")[2].strip() for line in _commands(built) if "stages.train" in line)
    built.run("sh", "-c", f'exec python -c "{keep}" {command}')
    (checkpoints,) = (built.path / ".dvc/tmp/checkpoints").iterdir()
    shutil.rmtree(checkpoints / "checkpoint-2")
    shutil.rmtree(built.path / "models/adapter")
    output = built.run("dvc", "repro", "--force", "--single-item", "train")
    assert f"going on from {checkpoints / 'checkpoint-1'}" in output
    assert built.outputs() == expected


def test_runtime_values_change_no_byte(built: Clone) -> None:
    expected = built.outputs()
    built.set(runtime__num_workers=1, runtime__save_steps=1, runtime__report_to="tensorboard", runtime__progress=False)
    assert built.repro("--force") == {"prepare", "baseline", "train", "evaluate"}
    assert built.outputs() == expected
    assert list((built.path / ".dvc/tmp/tensorboard").rglob("events.out.*")), "the live view was asked for"


def _commands(clone: Clone) -> list[str]:
    from ruamel.yaml import YAML

    return [stage["cmd"] for stage in YAML(typ="safe").load(clone.path / "dvc.yaml")["stages"].values()]
