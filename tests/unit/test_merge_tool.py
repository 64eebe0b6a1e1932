"""What the merge says of itself, with the models taken out: they are in test_merge.py."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora import params
from qlora.core.errors import InputError, MachineError
from qlora.delivery import gguf
from qlora.delivery import merge as merging
from qlora.delivery.equivalence import Equivalence
from qlora.model import base
from qlora.params import Params
from tools import chat, merge

NEAR = Equivalence(1, 4, 1e-9, 1e-8, 1.0, 1, 1.0, 0.5, 0.5, 1.0)
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
        (merging, "chain", {"merged": {"dtype": "bfloat16"}}),
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


def test_accepted_is_said_of_a_model_in_place_alone(merged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise MachineError("gguf-failed", "this architecture is not known")

    monkeypatch.setattr(gguf, "convert", failing)
    with pytest.raises(MachineError):
        call(monkeypatch, merge, "--gguf")
    assert not merge.REPORT.exists()
    assert not Path("models/merged").exists()
    call(monkeypatch, merge)
    assert report()["accepted"] is True
    assert json.loads(Path("models/merged/merge.json").read_text(encoding="utf-8"))["equivalence"]["accepted"] is True
    assert merged == ["merged", "merged"]


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
