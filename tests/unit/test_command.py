"""How a program of this project ends."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from qlora import params
from qlora.core.errors import InputError, MachineError
from qlora.params import Params
from qlora.runtime import command

ROOT = Path(__file__).parents[2]


def ended(main: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as end:
        command.run(main)
    code = end.value.code
    assert isinstance(code, int)
    return code


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> NoReturn:
        raise error

    return main


@pytest.fixture(autouse=True)
def _handlers() -> object:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (InputError("data-empty", "x"), 2, "error: [data-empty] x"),
        (MachineError("no-gpu", "x"), 3, "error: [no-gpu] x"),
        (MemoryError("2 GB"), 3, "error: [out-of-memory] no memory is left (2 GB)"),
        (FileNotFoundError(2, "No such file", "a.jsonl"), 2, "error: [input-missing] a.jsonl does not exist"),
        (PermissionError(13, "Permission denied", "a.jsonl"), 3, "error: [file-access] a.jsonl: Permission denied"),
    ],
)
def test_an_error_is_one_message_and_its_exit_code(error: Exception, status: int, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(raising(error)) == status
    assert capsys.readouterr().err.strip().startswith(shown)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        command.run(raising(KeyError("a bug")))
    with pytest.raises(OSError, match="broken"):
        command.run(raising(OSError(22, "broken")))


def test_a_signal_in_the_middle_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda: signal.raise_signal(signal.SIGTERM)) == 75
    assert "stopped: [stopped] SIGTERM" in capsys.readouterr().err


def test_while_it_ends_it_is_not_interrupted_again() -> None:
    def main() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    assert ended(main) == 75


def test_nohup_holds() -> None:
    from qlora.runtime.signals import SIGNALS, Interruption

    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def main() -> None:
        signal.raise_signal(signal.SIGHUP)
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.noted is None

    command.run(main)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.SIGHUP in SIGNALS


def test_what_a_file_holds_can_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "column \x1b[2J\x1b]0;title\x07 \u202egnp.exe \ud800 \x9b31m\r over\nand on"
    assert ended(raising(InputError("data-columns", hostile))) == 2
    shown = capsys.readouterr().err
    assert r"column \x1b[2J\x1b]0;title\x07 \x202egnp.exe \xd800 \x9b31m\x0d over" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


def stage_of_a_test(values: Params, *, test: Path, adapter_folder: Path | None = None) -> None:
    """Reads two paths, one of which may be left out."""


def inputs(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Params, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["a stage", *arguments])
    return command.stage_inputs(stage_of_a_test, "what it does")


def test_the_paths_of_a_stage_are_flags_by_the_names_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    values, paths = inputs(monkeypatch, "--adapter-folder", "models/adapter", "--test", "test.jsonl")
    assert paths == {"test": Path("test.jsonl"), "adapter_folder": Path("models/adapter")}
    assert values == params.load(Path("params.yaml"))
    stage_of_a_test(values, **paths)
    assert inputs(monkeypatch, "--test", "x")[1] == {"test": Path("x"), "adapter_folder": None}


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        ([], 2, "the following arguments are required: --test"),
        (["--test", "x", "--values", "y"], 2, "unrecognized arguments: --values y"),
        (["--help"], 0, "--test TEST"),
    ],
)
def test_other_flags_than_those_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, shown: str
) -> None:
    with pytest.raises(SystemExit) as end:
        inputs(monkeypatch, *arguments)
    assert end.value.code == status
    said = capsys.readouterr()
    assert shown in said.out + said.err
    assert ("what it does" in said.out) == (status == 0)


def test_a_stage_does_not_begin_with_wrong_params_or_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="params-missing"):
        inputs(monkeypatch, "--test", "x")
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "requirements.txt").write_text("no-such-package==1.0\n", encoding="utf-8")
    with pytest.raises(MachineError, match="environment-differs"):
        inputs(monkeypatch, "--test", "x")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_a_count_is_a_whole_number_above_0(text: str) -> None:
    assert command.positive_int("12") == 12
    with pytest.raises(ValueError, match=r"is not a whole number above 0|invalid literal"):
        command.positive_int(text)


def test_want_of_memory_in_torch_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    said = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 562949953421312 bytes."
    assert ended(raising(RuntimeError(said))) == 3
    assert "error: [out-of-memory] no memory is left" in capsys.readouterr().err


class PanicException(BaseException):
    pass


def test_a_panic_of_a_library_in_rust_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(raising(PanicException("Onig: Regex search error: retry-limit-in-match over"))) == 2
    assert "error: [tokenizer-unloadable] a library in Rust gave up (Onig: Regex" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        command.run(raising(KeyboardInterrupt()))
