"""What a run prints, where, and by which process."""

import logging
import warnings

import pytest

from qlora.core.text import visible
from qlora.runtime import log

logger = logging.getLogger("qlora.a_module_of_a_test")


def test_plain_lines_go_to_standard_output_and_problems_are_named_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    logger.debug("a detail")
    logger.info("%d rows\nand more", 3)
    logger.warning("the loss %s", "diverges")
    logger.error("no room")
    shown = capsys.readouterr()
    assert shown.out == "3 rows\nand more\n"
    assert shown.err == "warning: the loss diverges\nerror: no room\n"


@pytest.mark.parametrize("rank", ["1", "7"])
def test_of_several_processes_the_main_one_alone_speaks_but_each_may_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    logger.info("said by all")
    logger.warning("warned of by all")
    logger.error("failed alone")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: failed alone\n")
    monkeypatch.setenv("RANK", "0")
    logger.info("said by all")
    assert capsys.readouterr().out == "said by all\n"


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_what_a_message_quotes_can_not_steer_the_terminal(capsys: pytest.CaptureFixture[str], level: int) -> None:
    logger.log(level, "row %s", "\x1b[2J\x1b]0;title\x07 \u202egnp.exe \x9b31m\r over\n\tand on")
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert text.endswith("row \\x1b[2J\\x1b]0;title\\x07 \\x202egnp.exe \\x9b31m\\x0d over\n\tand on\n")
    assert all(character.isprintable() or character in "\n\t" for character in text)


def test_half_a_character_is_spelled_out() -> None:
    # Not logged: pytest can't send what a test logged to its other process.
    assert visible("a \ud800 b") == "a \\xd800 b"


def test_a_line_is_said_once_however_often_the_log_is_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    log.configure()
    logger.info("once")
    assert capsys.readouterr().out == "once\n"


def test_other_libraries_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("transformers_of_a_test").info("chatter")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert logging.getLogger("qlora").handlers != logging.getLogger().handlers


def test_what_a_library_says_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    before, factory = warnings.formatwarning, logging.getLogRecordFactory()
    try:
        log.configure()
        record = logging.getLogRecordFactory()("transformers", logging.WARNING, "x", 1, "\x1b[1mREPORT\x1b[0m %s", ("a\x1b]0;b\x07",), None)
        assert record.getMessage() == "REPORT a\\x1b]0;b\\x07"
        assert "c\\x1b[2J" in warnings.formatwarning("c\x1b[2J", UserWarning, "x.py", 1)
    finally:
        warnings.formatwarning = before
        logging.setLogRecordFactory(factory)
