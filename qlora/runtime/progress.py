"""Progress of whatever lasts over a second: a bar in a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from typing import Any

logger = logging.getLogger(__name__)
LINE_SECONDS = 30
"""Between two lines about work that nobody watches in a terminal."""


def bar(description: str, *, total: int | None = None, initial: int = 0, unit: str, enabled: bool) -> Any:
    """A context manager with `update(n)` that shows how much is done and the time left, when `enabled` (runtime.progress).

    Args:
        total: How much there is to do; None: nobody knows, and no time left is shown.
        initial: How much an earlier run did. The time left is estimated from what this one does.
    """
    if enabled and not sys.stderr.isatty():
        return Lines(description, total=total, initial=initial, unit=unit)
    from tqdm import tqdm  # noqa: PLC0415 - a tenth of a second that a tool's --help need not take

    return tqdm(total=total, initial=initial, desc=description, unit=f" {unit}", delay=1, disable=not enabled)


class Lines:
    """A line every LINE_SECONDS for logs, in which a bar would leave a line per update: `answers: 3 of 12 batches, 4 min left`."""

    def __init__(self, description: str, *, total: int | None, initial: int, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._initial = self._done = initial
        self._began = self._shown_at = time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown_at < LINE_SECONDS or self._done == self._total:
            return
        self._shown_at = now
        done = f"{self._description}: {self._done:,}"
        if self._total is None:
            logger.info("%s", f"{done} {self._unit}")
            return
        seconds = (now - self._began) * (self._total - self._done) / max(1, self._done - self._initial)
        logger.info("%s", f"{done} of {self._total:,} {self._unit}, {_duration(seconds)} left")


def _duration(seconds: float) -> str:
    """
    >>> _duration(40), _duration(150), _duration(7500)
    ('40 s', '3 min', '2 h 5 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(-(-int(seconds) // 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
