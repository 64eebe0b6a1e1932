"""Work shared among processes, with a result that does not depend on how many there are."""

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from qlora.core.errors import MachineError

Item = TypeVar("Item")
END = "end"


class Engine(Protocol):
    """Where the work is done."""

    def __call__(self, make: Callable[[int, int], Iterator[Item]], *, divisible: bool) -> Iterator[Item]:
        """The items of `make(0, 1)` in their order, made by as many processes as the engine has, or by one if the work can't be divided."""


def local_engine(num_workers: int | None) -> Engine:
    """Processes of this machine. What can be divided is never done in this process: a library that crashes on what it reads ends another."""
    processes = available_processes(num_workers)

    def run(make: Callable[[int, int], Iterator[Item]], *, divisible: bool) -> Iterator[Item]:
        return interleaved(make, processes if divisible else 1, isolated=divisible)

    return run


def available_processes(asked: int | None) -> int:
    """As many as asked for; None: one per core that this process may use. One where processes can't be forked safely."""
    if sys.platform != "linux":
        return 1
    return max(1, asked if asked is not None else len(os.sched_getaffinity(0)))


def interleaved(make: Callable[[int, int], Iterator[Item]], processes: int, *, isolated: bool = False) -> Iterator[Item]:
    """The items of `make(0, 1)` in their order, made by several processes.

    Args:
        make: `make(share, shares)` yields every shares-th item from item number `share` on. Items are pickled.
        isolated: One process, too, is a process of its own: a library that crashes on what it reads ends that one alone.
        processes: 1 calls `make(0, 1)` here, if it need not be isolated. Each process is at most a few items ahead of the reader,
            so memory is bounded.

    Raises:
        Exception: whatever `make` raised, when its turn comes.
        MachineError: a process was killed.
    """
    if processes == 1 and not (isolated and sys.platform == "linux"):
        yield from make(0, 1)
        return
    fork = multiprocessing.get_context("fork")
    readers: list[Connection[Any, Any]] = []
    workers: list[Any] = []
    try:
        for share in range(processes):
            reader, writer = fork.Pipe(duplex=False)
            readers.append(reader)
            workers.append(fork.Process(target=_work, args=(make, share, processes, writer, list(readers)), daemon=True))
            workers[-1].start()
            writer.close()
        yield from in_turn(lambda share: _receive(share, readers, workers), processes)
    finally:
        for worker in workers:
            # Not by a signal that it could handle: it inherited this process's handler, and may not have put it back yet.
            worker.kill()
            worker.join()
        for reader in readers:
            reader.close()


def _receive(share: int, readers: "list[Connection[Any, Any]]", workers: list[Any]) -> Any:
    try:
        return readers[share].recv()
    except EOFError:
        workers[share].join()
        raise MachineError(
            "worker-died",
            f"process {share + 1} of {len(workers)} ended with exit code {workers[share].exitcode} in the middle of its work: no memory was left, "
            "or a damaged file crashed the library that reads it. Lower runtime.num_workers, or fetch the file again.",
        ) from None


def _work(make: Callable[[int, int], Iterator[Item]], share: int, shares: int, writer: Any, readers: "list[Connection[Any, Any]]") -> None:
    # Ctrl-C reaches the reader too, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # They have nothing to tidy, and inherited what their reader does on this one.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # With no reader left, because it was killed, sending fails and this process ends.
    for reader in readers:
        reader.close()
    with suppress(BrokenPipeError):
        for result in results_of(make, share, shares):
            # Protocol 5 copies the bytes of an item once, the one that `send` takes three times.
            writer.send_bytes(pickle.dumps(result, protocol=5))


def results_of(make: Callable[[int, int], Iterator[Item]], share: int, shares: int) -> Iterator[tuple[str, Any]]:
    """What a process sends: every item of its share, then the end or the error that came in its place."""
    try:
        for item in make(share, shares):
            yield "item", item
    except Exception as error:
        error.add_note(f"in process {share + 1} of {shares}:\n{traceback.format_exc()}")
        yield "error", error
    else:
        yield END, None


def in_turn(receive: Callable[[int], tuple[str, Any]], shares: int) -> Iterator[Any]:
    """The items of all shares in their order; `receive(share)` waits for the next result of a share."""
    turn = 0
    while True:
        kind, value = receive(turn % shares)
        if kind == "error":
            raise value
        if kind == END:
            return
        yield value
        turn += 1
