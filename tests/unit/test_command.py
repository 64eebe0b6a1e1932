"""How a program of this project ends."""

import signal
from collections.abc import Callable
from typing import NoReturn

import pytest

from qlora import command
from qlora.errors import InputError, MachineError


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
        command.run(raising(OSError(5, "broken")))


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
    from qlora.interruption import SIGNALS, Interruption

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
