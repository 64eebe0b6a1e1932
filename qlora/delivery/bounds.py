"""Limits on what a server may send, and on how slowly, below the HTTP client.

httpx limits the wait for each piece of an answer and nothing else: one byte every few seconds, an endless header, a redirect's endless body or
endless "103 Early Hints" would keep it busy for ever, or fill the memory. This module goes once httpx limits a whole answer.
"""

import time
from typing import Any


class TooSlowError(Exception):
    """An answer arrives more slowly than the least rate."""


class TooLongError(Exception):
    """An answer has more bytes than it may have."""


class BoundedStream:
    """A connection, as httpcore's NetworkStream, that counts what each answer sends and how long that takes."""

    def __init__(self, stream: Any, window_seconds: float, least_rate: float, most_bytes: int) -> None:
        self._stream = stream
        self._limits = window_seconds, least_rate, most_bytes
        self._begin()

    def _begin(self) -> None:
        """A new answer: until `allow` says how much it may send, the limit is for its headers."""
        self._waited, self._in_window, self._left = 0.0, 0, self._limits[2]

    def allow(self, num_bytes: int) -> None:
        """The headers have arrived; so much may follow them."""
        self._left = num_bytes

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        window_seconds, least_rate, _ = self._limits
        # Only the wait for the server counts: a slow disk here is not its fault.
        begun = time.monotonic()
        data: bytes = self._stream.read(max_bytes, timeout)
        self._waited += time.monotonic() - begun
        self._in_window += len(data)
        self._left -= len(data)
        if self._left < 0:
            raise TooLongError("sends an answer without end")
        if self._waited >= window_seconds:
            if self._in_window < self._waited * least_rate:
                raise TooSlowError(
                    f"sent {self._in_window:,} bytes in {self._waited:.0f} s; below {least_rate:,} bytes per second a file is given up"
                )
            self._waited, self._in_window = 0.0, 0
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._begin()
        self._stream.write(buffer, timeout)

    def start_tls(self, *arguments: Any, **options: Any) -> "BoundedStream":
        return BoundedStream(self._stream.start_tls(*arguments, **options), *self._limits)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class BoundedBackend:
    """httpcore's NetworkBackend whose connections are bounded."""

    def __init__(self, backend: Any, *limits: Any) -> None:
        self._backend, self._limits = backend, limits

    def connect_tcp(self, *arguments: Any, **options: Any) -> BoundedStream:
        return BoundedStream(self._backend.connect_tcp(*arguments, **options), *self._limits)

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)
