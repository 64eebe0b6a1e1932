"""Every mistake ends in one message with place, value and way out; nothing is half-written and nothing is lost."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora import params
from qlora.core.errors import InputError
from stages.predict import predict
from stages.train import train
from tests.pipeline.clone import Clone

RAW = "data/raw/micro/train.jsonl"
PREPARE = "python -m stages.prepare --prepared data/prepared --report reports/prepare.json --notes metrics"
BASELINE = "python -m stages.predict --test data/prepared/test.jsonl --manifests models/base --predictions p --notes n"


def baseline() -> None:
    """The stage by hand, in this process and in the clone that it works in."""
    values = params.load(Path("params.yaml"))
    predict(values, test=Path("data/prepared/test.jsonl"), manifests=Path("models/base"), predictions=Path("p"), notes=Path("n"))


def raw(content: bytes) -> Callable[[Clone], None]:
    def change(clone: Clone) -> None:
        (clone.path / RAW).write_bytes(content)

    return change


def cut_off_parquet(clone: Clone) -> None:
    source = (clone.path / "data/raw/tiny/train-00000-of-00001.parquet").read_bytes()
    (clone.path / "data/raw/micro/cut.parquet").write_bytes(source[: len(source) // 2])
    clone.set(data__train_file="data/raw/micro/cut.parquet")


def weights(edit: Callable[[Path], None]) -> Callable[[Clone], None]:
    def change(clone: Clone) -> None:
        edit(clone.path / "models/base/tiny/model.safetensors")
        # A reason for the stage to run: DVC does not look at the weights, only at their manifest.
        clone.set(predict__max_new_tokens=2)

    return change


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def params_text(old: str, new: str) -> Callable[[Clone], None]:
    def change(clone: Clone) -> None:
        path = clone.path / "params.yaml"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return change


CASES: dict[str, tuple[str, Callable[[Clone], None], list[str]]] = {
    "empty file": ("prepare", raw(b""), ["[data-empty]", RAW]),
    "LFS pointer": ("prepare", raw(b"version https://git-lfs.github.com/spec/v1\n"), ["[data-lfs-pointer]", RAW, "git lfs pull"]),
    "cut-off parquet": ("prepare", cut_off_parquet, ["[data-damaged]", "cut.parquet"]),
    "wrong columns": ("prepare", raw(b'{"text": "a"}\n'), ["[data-columns]", "'messages'", "only text", "data.format"]),
    "wrong types": (
        "prepare",
        raw(b'{"messages": [{"role": 1, "content": "a"}]}\n'),
        ["[data-no-rows]", "wrong_type: row 1", "messages[0].role is 1"],
    ),
    "no usable row": (
        "prepare",
        raw(b"".join(b'{"messages": [{"role": "user", "content": "%d"}]}\n' % number for number in range(50))),
        ["[data-no-rows]", "no_final_answer"],
    ),
    "unknown param": (
        "prepare",
        params_text("  lora_alpha:", "  lora_alpa:"),
        ["lora.lora_alpa is not a parameter; did you mean 'lora.lora_alpha'?"],
    ),
    "changed byte": ("baseline", weights(change_a_byte), ["[base-model-changed]", "model.safetensors has sha256", "tools.pin"]),
    "missing shard": ("baseline", weights(os.unlink), ["[base-model-changed]", "model.safetensors is missing"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_message_nothing_half_written_and_what_was_built_comes_back(built: Clone, name: str) -> None:
    stage, change, expected = CASES[name]
    before = built.outputs()
    change(built)
    if name == "unknown param":
        built.run("touch", "qlora/data/splits.py")
        (built.path / "qlora/data/splits.py").write_text((built.path / "qlora/data/splits.py").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    output = built.run("dvc", "repro", stage, fails=True)
    for text in expected:
        assert text in output
    assert "Traceback" not in output
    tail = output[output.rindex("error: [") :].splitlines()
    assert any(line.startswith(f"ERROR: failed to reproduce '{stage}'") for line in tail), "our message comes last but for DVC's own"
    assert not [path for path in built.path.rglob("*.partial") if ".dvc" not in path.parts]

    built.run("git", "checkout", "--", ".")
    built.run("dvc", "checkout")
    assert built.outputs() == before
    assert built.repro() == set()


def test_a_missing_file_is_named(built: Clone) -> None:
    (built.path / RAW).unlink()
    assert "train.jsonl" in built.run("dvc", "repro", fails=True)
    output = built.run(*PREPARE.split(), fails=True)
    assert "[data-missing]" in output
    assert "Traceback" not in output


def test_an_unwritable_output_is_exit_code_3(built: Clone) -> None:
    # A folder where a file must go: root may write everywhere, so permissions alone would show nothing.
    before = (built.path / "data/prepared/train.jsonl").read_bytes()
    (built.path / "reports/prepare.json").unlink()
    (built.path / "reports/prepare.json").mkdir()
    output = built.run("sh", "-c", PREPARE + "; echo status $?")
    assert "[file-access]" in output
    assert "status 3" in output
    assert "Traceback" not in output
    assert (built.path / "data/prepared/train.jsonl").read_bytes() == before


def test_exit_codes(built: Clone) -> None:
    status = "; echo status $?"
    built.set(runtime__allow_other_versions=False)
    assert "status 0" in built.run("sh", "-c", PREPARE + status)
    (built.path / "requirements.txt").write_text("torch==0.0.1\n", encoding="utf-8")
    refused = built.run("sh", "-c", PREPARE + status)
    assert "status 3" in refused
    assert "torch: " in refused
    built.set(runtime__allow_other_versions=True)
    assert "status 0" in built.run("sh", "-c", PREPARE + status)
    assert "status 2" in built.run("sh", "-c", "python -m tools.recipes use tiny-cup" + status)


def test_a_stage_by_hand_before_its_inputs_names_what_is_missing(built: Clone) -> None:
    (built.path / "data/prepared/test.jsonl").unlink()
    output = built.run("sh", "-c", BASELINE + "; echo status $?")
    assert "[input-missing] data/prepared/test.jsonl" in output
    assert "status 2" in output


def test_rows_longer_than_the_models_context_are_refused(inside: Clone) -> None:
    inside.set(sequence__max_length=513)
    made = {name: Path("made") / name for name in ("adapter_folder", "report", "metrics", "notes")}
    with pytest.raises(InputError, match=r"\[sequence-context\] sequence.max_length = 513 exceeds the base model's context of 512 tokens"):
        train(
            params.load(Path("params.yaml")),
            train=Path("data/prepared/train.jsonl"),
            validation=Path("data/prepared/validation.jsonl"),
            manifests=Path("models/base"),
            **made,
        )
    assert not Path("made").exists()


def test_a_training_that_diverges_publishes_nothing(built: Clone) -> None:
    built.set(lora__lora_alpha=10**40, train__max_steps=3, train__eval_strategy="no")
    output = built.run("dvc", "repro", "train", fails=True)
    assert "[train-not-finite]" in output
    assert not (built.path / "models/adapter").exists()


def test_data_that_is_not_embedded_can_be_given_to_dvc(built: Clone) -> None:
    """Git ignores the rows but not DVC's pointer to them."""
    rows = (built.path / RAW).read_text(encoding="utf-8")
    (built.path / "data/raw/mine").mkdir()
    (built.path / "data/raw/mine/rows.jsonl").write_text(rows, encoding="utf-8")
    built.run("dvc", "add", "data/raw/mine/rows.jsonl")
    built.commit("my rows")
    tracked = built.run("git", "ls-files", "data/raw/mine").split()
    assert "data/raw/mine/rows.jsonl.dvc" in tracked
    assert "data/raw/mine/rows.jsonl" not in tracked


def test_no_gpu_is_exit_code_3_at_once(built: Clone) -> None:
    built.set(hardware__device="cuda")
    output = built.run("dvc", "repro", "baseline", fails=True, CUDA_VISIBLE_DEVICES="")
    assert "[no-gpu]" in output
    assert "tiny-cpu" in output


def test_a_model_without_manifest_says_how_to_pin_it(inside: Clone) -> None:
    inside.set(base_model__name="absent")
    inside.run("dvc", "repro", "baseline", fails=True)
    with pytest.raises(InputError, match=r"\[base-model-unpinned\].*tools.pin absent --path DIR"):
        baseline()


def test_a_project_without_embedded_weights_names_the_command(inside: Clone) -> None:
    shutil.rmtree("models/base/tiny")
    with pytest.raises(InputError, match=r"\[base-model-missing\].*tools.pin tiny --path DIR"):
        baseline()
