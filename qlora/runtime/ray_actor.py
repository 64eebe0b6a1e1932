"""What runs on a node of a Ray cluster for one process of a stage.

Ray sends this module's code itself, so that a node that does not see the checkout can say so: nothing but the standard library is imported here, and
Ray, which runs it.
"""

import os
import selectors
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

EXIT = 0
"""Marks the exit code among what a process printed; 1 and 2 are its two streams."""
POLL_SECONDS = 0.1
CHUNK_BYTES = 1 << 16


class Rank:
    """An actor: it has the process's GPUs, begins it, carries its output and its signals, and takes it along when it is killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []

    def look(self, paths: Sequence[str], token: str) -> tuple[str, list[str], str | None]:
        """Address of this node, the GPUs that Ray gave, and which of the paths is not here."""
        import ray  # noqa: PLC0415 - by Ray's own process

        gpus = list(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", [])))
        return ray.util.get_node_ip_address(), gpus, first_missing(paths, token)

    def run(self, command: Sequence[str], environment: Mapping[str, str], folder: str, launcher: str) -> Iterator[tuple[int, bytes | int]]:
        """Run it; yields what it prints as it comes, with the stream's number, and at last its exit code."""
        # Ray blocks SIGINT in its processes, and a process inherits that of the thread that begins it.
        blocked = signal.pthread_sigmask(signal.SIG_SETMASK, [])
        try:
            process = self._process = subprocess.Popen(
                command,
                env={**environment, launcher: str(os.getpid())},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number in self._signals:
            process.send_signal(number)
        assert process.stdout
        assert process.stderr
        with process.stdout, process.stderr, selectors.DefaultSelector() as streams:
            streams.register(process.stdout, selectors.EVENT_READ, 1)
            streams.register(process.stderr, selectors.EVENT_READ, 2)
            ended = False
            # A process of its own that outlives it may hold the streams open.
            while streams.get_map() and not ended:
                ready = streams.select(POLL_SECONDS)
                ended = not ready and process.poll() is not None
                for key, _ in ready:
                    if chunk := os.read(key.fd, CHUNK_BYTES):
                        yield key.data, chunk
                    else:
                        streams.unregister(key.fileobj)
        yield EXIT, process.wait()

    def send_signal(self, number: int) -> None:
        """To the process, also when it begins later."""
        self._signals.append(number)
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)


def first_missing(paths: Sequence[str], token: str) -> str | None:
    """The first of the paths that is not here; what the first one holds must be the token, or it is another checkout's."""
    for path in map(Path, paths):
        if not path.exists() or (str(path) == paths[0] and path.read_text(encoding="utf-8") != token):
            return str(path)
    return None
