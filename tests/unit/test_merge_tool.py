"""What the merge says of itself, with the models taken out: they are in test_merge.py."""

import hashlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora import params
from qlora.core.errors import InputError, MachineError, StoppedError
from qlora.delivery import gguf
from qlora.delivery import merge as merging
from qlora.delivery.equivalence import Equivalence
from qlora.model import base
from qlora.params import Params
from tests.unit.trainings import changed
from tools import chat, merge

NEAR = Equivalence(1, 4, 1e-9, 1e-8, 1.0, 1, 1.0, 0.5, 0.5, 1.0)
MADE_OF = {"base_model": {}, "adapter": {}, "chat": {}, "lora": {}, "merged": {"dtype": "bfloat16"}}
PENDING = Path("models/merged.pending")
ROW = b'{"id":"1","category":"c","messages":[{"role":"user","content":"2+2?"},{"role":"assistant","content":"4"}]}\n'


@pytest.fixture
def merged(default_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder whose dvc.lock records a test set of one row; holds what was done that takes long."""
    done: list[str] = []
    monkeypatch.chdir(tmp_path)
    merge.TEST.parent.mkdir(parents=True)
    merge.TEST.write_bytes(ROW)
    recorded = {"path": str(merge.TEST), "md5": hashlib.md5(ROW).hexdigest()}
    Path("dvc.lock").write_text(json.dumps({"stages": {"prepare": {"outs": [recorded]}}}), encoding="utf-8")
    monkeypatch.setattr(params, "load", lambda path: default_params)
    for module, name, made in (
        (merging, "require_recorded_adapter", "0.dir"),
        (merging, "require_room", None),
        (merging, "write", None),
        (merging, "chain", MADE_OF),
        (base, "open_base_model", SimpleNamespace(folder=tmp_path, template=None)),
        (gguf, "find_converter", Path("converter.py")),
    ):
        monkeypatch.setattr(module, name, lambda *arguments, made=made: made)
    monkeypatch.setattr(merging, "merged_model", lambda *arguments: done.append("merged"))
    monkeypatch.setattr(chat, "load", lambda *arguments, **options: done.append("loaded"))
    measured(monkeypatch, NEAR)
    return done


def measured(monkeypatch: pytest.MonkeyPatch, found: Equivalence) -> None:
    monkeypatch.setattr(merge, "_measure", lambda *arguments: found)


def call(monkeypatch: pytest.MonkeyPatch, tool: Any, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    tool.main()


def report() -> Any:
    return json.loads(merge.REPORT.read_text(encoding="utf-8"))


def test_a_failed_conversion_leaves_the_accepted_model_in_place(merged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(converter: Path, model: Path, target: Path, dtype: str) -> None:
        target.write_text("half", encoding="utf-8")
        raise MachineError("gguf-failed", "this architecture is not known")

    monkeypatch.setattr(gguf, "convert", failing)
    with pytest.raises(MachineError, match=r"(?s)\[gguf-failed\].*tools.merge --compare --max-kl 0.005 --out models/merged --gguf`"):
        call(monkeypatch, merge, "--gguf")
    assert report()["accepted"] is True
    assert [path.name for path in Path("models/merged").iterdir()] == ["merge.json"]
    assert json.loads(Path("models/merged/merge.json").read_text(encoding="utf-8"))["equivalence"]["accepted"] is True

    monkeypatch.setattr(gguf, "convert", lambda converter, model, target, dtype: target.write_text(dtype, encoding="utf-8"))
    call(monkeypatch, merge, "--compare", "--gguf")
    assert Path("models/merged/model.gguf").read_text(encoding="utf-8") == "bfloat16"
    assert set(json.loads(Path("models/merged/merge.json").read_text(encoding="utf-8"))["files"]) == {"model.gguf"}
    assert merged == ["merged"], "once"


def told_of_a_param() -> MachineError:
    """As the generation of answers raises it."""
    error = MachineError("out-of-memory", "a batch of 4 prompts takes more memory than there is: set predict.batch_tokens to 2048")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), "CUDA out of memory.*What saves memory: --batch-tokens 1"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "What saves memory"),
        (told_of_a_param(), "CUDA out of memory. What saves memory"),
        (StoppedError("stopped", "SIGINT: nothing was written, run again"), "not compared: a signal came"),
    ],
)
def test_a_comparison_that_does_not_end_keeps_the_model_and_says_how_to_go_on(
    merged: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def failing(*arguments: object) -> None:
        raise error

    before = Path("params.yaml").read_bytes() if Path("params.yaml").exists() else None
    monkeypatch.setattr(merge, "_measure", failing)
    with pytest.raises(MachineError, match=rf"(?s)\[merge-not-compared\].*models/merged.pending.*{said}") as raised:
        call(monkeypatch, merge, "--max-kl", "0.25")
    assert raised.value.exit_code == 3
    assert "hardware." not in str(raised.value)
    assert "predict." not in str(raised.value)
    assert report() == {"accepted": None, "compared": False, "ran_on": MADE_OF}
    assert PENDING.is_dir()
    assert not Path("models/merged").exists()

    measured(monkeypatch, NEAR)
    (command,) = re.findall(r"`python -m tools\.merge (.*)`", str(raised.value))
    call(monkeypatch, merge, *command.split())
    assert (report()["accepted"], report()["compared"], report()["max_kl"]) == (True, True, 0.25)
    assert Path("models/merged/merge.json").is_file()
    assert not PENDING.exists()
    assert merged == ["merged"], "once"
    assert (Path("params.yaml").read_bytes() if Path("params.yaml").exists() else None) == before


def test_a_model_that_can_not_be_measured_is_kept_and_its_error_stays(merged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise InputError("predict-not-finite", "the likelihood is nan")

    monkeypatch.setattr(merge, "_measure", failing)
    with pytest.raises(InputError, match=r"\[predict-not-finite\] the likelihood is nan\. models/merged.pending keeps the merged model"):
        call(monkeypatch, merge)
    assert (report()["compared"], PENDING.is_dir(), merged) == (False, True, ["merged"])


def test_a_bug_is_no_lack_of_memory(merged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(merge, "_measure", failing)
    with pytest.raises(RuntimeError, match="shapes differ"):
        call(monkeypatch, merge)
    assert PENDING.is_dir(), "kept all the same"
    assert merged == ["merged"]


def test_compare_takes_only_what_a_merge_of_this_adapter_wrote(merged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"\[merge-missing\]"):
        call(monkeypatch, merge, "--compare")
    call(monkeypatch, merge)
    foreign = Path("models/merged/foreign.json")
    foreign.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"\[merge-changed\] models/merged/foreign.json"):
        call(monkeypatch, merge, "--compare")
    foreign.unlink()
    monkeypatch.setattr(merging, "chain", lambda *arguments: {**MADE_OF, "adapter": {"dvc_md5": "1.dir"}})
    with pytest.raises(InputError, match=r"\[merge-stale\] models/merged was merged of another adapter"):
        call(monkeypatch, merge, "--compare")
    with pytest.raises(SystemExit):
        call(monkeypatch, merge, "--compare", "--dtype", "float32")
    assert merged == ["merged"]


def test_without_a_gpu_a_flag_is_asked_for_and_no_param(merged: list[str], default_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "load", lambda path: changed(default_params, hardware__device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"\[no-gpu\] .*--device cpu"):
        call(monkeypatch, merge)
    assert merged == []
    call(monkeypatch, merge, "--device", "cpu")
    assert report()["accepted"] is True


@pytest.mark.parametrize(("kl", "said"), [(float("nan"), "nan is not finite"), (float("inf"), "inf is not finite"), (0.5, "0.5 exceeds 0.1")])
def test_a_model_too_far_from_the_adapter_is_refused_with_its_numbers(
    merged: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kl: float, said: str
) -> None:
    assert merged == []
    measured(monkeypatch, Equivalence(1, 4, kl, kl, 0.25, 1, 0.0, 0.5, kl, 1.0))
    limit = "0.1" if kl == 0.5 else "inf"
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, merge, "--max-kl", limit)
    assert ended.value.code == merge.UNLIKE
    assert f"not put in place: a mean KL of {said}" in capsys.readouterr().err
    expected = 0.5 if kl == 0.5 else None
    assert (report()["accepted"], report()["kl_mean"], report()["argmax_agreement"]) == (False, expected, 0.25)
    assert not Path("models/merged").exists()
    assert PENDING.is_dir()
    measured(monkeypatch, NEAR)
    call(monkeypatch, merge, "--compare")
    assert report()["accepted"] is True
    assert not PENDING.exists()


@pytest.mark.parametrize(("tool", "arguments"), [(merge, ()), (chat, ("--from-test", "1"))], ids=["merge", "chat"])
def test_another_test_set_or_none_is_named_before_a_model_is_loaded(
    merged: list[str], monkeypatch: pytest.MonkeyPatch, tool: Any, arguments: tuple[str, ...]
) -> None:
    merge.TEST.write_bytes(ROW + ROW)
    with pytest.raises(InputError, match=r"\[input-changed\] data/prepared/test.jsonl"):
        call(monkeypatch, tool, *arguments)
    merge.TEST.unlink()
    # Shown as [input-missing].
    with pytest.raises(FileNotFoundError):
        call(monkeypatch, tool, *arguments)
    assert merged == []


@pytest.mark.parametrize("number", ["0", "-1", "1.5"])
def test_a_number_of_examples_below_1_is_refused(merged: list[str], monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, merge, "--num-examples", number)
    assert ended.value.code == 2
    assert merged == []
