"""What a run prints: one logger for stages and packages, silent on every process but the main one.

Modules use `logging.getLogger(__name__)`; results of a tool are printed by the tool itself.
"""

import logging
import os
import re
import sys
import warnings
from typing import Any

from qlora.core.text import visible


class _Terminal(logging.Handler):
    """Plain lines on standard output; warnings and errors, named as such, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        is_problem = record.levelno >= logging.WARNING
        # Messages quote data, file names and model output.
        text = visible(record.getMessage())
        print(f"{record.levelname.lower()}: {text}" if is_problem else text, file=sys.stderr if is_problem else sys.stdout, flush=True)


class _VisibleRecord(logging.LogRecord):
    """Of any library: transformers names the weights of a file as they are called there, and sets its own words in bold."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return visible(_BOLD.sub("", super().getMessage()))


_BOLD = re.compile(r"\x1b\[[0-9;]*m")


def _visible_warning(*arguments: Any, **options: Any) -> str:
    return visible(_format_warning(*arguments, **options))


_format_warning = warnings.formatwarning


def _on_main_process(record: logging.LogRecord) -> bool:
    # torchrun's variable: the group of processes may not be joined yet, or be left already.
    return os.environ.get("RANK", "0") == "0" or record.levelno >= logging.ERROR


def configure() -> None:
    """Send what the project's modules log to the terminal, and spell out what would steer it, of libraries too; called again it changes nothing."""
    logging.setLogRecordFactory(_VisibleRecord)
    warnings.formatwarning = _visible_warning
    logger = logging.getLogger("qlora")
    if logger.handlers:
        return
    handler = _Terminal()
    handler.addFilter(_on_main_process)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
