"""The rows' work as tasks of Ray: on the cluster that RAY_ADDRESS names, else on a Ray of this machine that begins and ends with the stage.

Every machine of a cluster needs this repository, with the raw files, at the same path (a shared folder) and the same environment.

Tasks of Ray's core, not Ray Data: its order and its bound of memory are settings of a whole pipeline of tables, which our parts of splits are not,
and its readers would word what is wrong with a file in another way. A generator task waits until its items are taken, so both come for nothing.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.core.errors import MachineError
from qlora.data.workers import Engine, Item, available_processes, in_turn, results_of
from qlora.runtime.ray_session import begin, import_ray, restore_sigterm

if TYPE_CHECKING:
    import psutil

ITEMS_AHEAD = 2
"""Batches that a task makes before the first of them is taken."""
WAIT_SECONDS = 1.0
"""Ray is waited for in pieces of this length, so that a signal ends the work even when nothing comes."""


@contextmanager
def ray_engine(num_workers: int | None) -> Iterator[Engine]:
    """Ray while entered; nothing of it is left running. An engine whose work ended with an error, or was left half-read, has no cores for other work.

    Args:
        num_workers: Tasks at a time, at most one per core of the cluster; None: one per core.

    Raises:
        MachineError: Ray is not installed, or can't be reached or begun.
    """
    ray = import_ray("runtime.engine: ray", "runtime.engine: local")
    address = os.environ.get("RAY_ADDRESS")
    # All of Ray is called in this thread: our handlers of signals raise, which in the middle of Ray's own code blocked or crashed the process, and
    # they do so in the main thread alone. There Ray would also put a handler of its own in the place of ours.
    own = set(_children())
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(_begin, ray, address, num_workers).result()
            restore_sigterm()
            cores = max(1, int(thread.submit(ray.cluster_resources).result().get("CPU", 1)))
            # More tasks than cores: the last would wait for the first to end, and those for the last's items to be taken.
            yield _engine(ray, thread, min(num_workers or cores, cores))
        finally:
            thread.submit(_end, ray, address, own).result()


def _begin(ray: Any, address: str | None, num_workers: int | None) -> None:
    here: dict[str, Any] = {} if address else {"num_cpus": available_processes(num_workers), "include_dashboard": False}
    begin(ray, address or "local", **here)


def _children() -> "list[psutil.Process]":
    """Processes that this one has begun, and theirs."""
    import psutil  # noqa: PLC0415 - only here

    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def _end(ray: Any, address: str | None, own: "set[psutil.Process]") -> None:
    """End Ray, but no process of this program's own, which were there before."""
    import psutil  # noqa: PLC0415

    # Ended early, Ray leaves its agents behind, which notice after a minute.
    begun = [] if address else [process for process in _children() if process not in own]
    ray.shutdown()
    for process in begun:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _engine(ray: Any, thread: ThreadPoolExecutor, tasks: int) -> Engine:
    task = ray.remote(max_retries=0, _generator_backpressure_num_objects=ITEMS_AHEAD)(_work)

    def submit(make: Callable[[int, int], Iterator[Item]], shares: int) -> list[Any]:
        return [task.remote(str(Path.cwd()), make, share, shares) for share in range(shares)]

    def receive(streams: list[Any], share: int) -> Any:
        try:
            while not thread.submit(ray.wait, streams[share : share + 1], timeout=WAIT_SECONDS).result()[0]:
                pass
            return thread.submit(lambda: ray.get(next(streams[share]))).result()
        # What a task raises comes as an item. A ValueError is Ray's for an item whose owner died before it was asked for.
        except (ray.exceptions.RayError, ValueError) as error:
            raise MachineError(
                "worker-died",
                f"task {share + 1} of {len(streams)} ended in the middle of its work ({error}): no memory was left, a machine of the cluster lacks "
                "this repository, or a damaged file crashed the library that reads it. Lower runtime.num_workers, or fetch the file again.",
            ) from None

    def run(make: Callable[[int, int], Iterator[Item]], *, divisible: bool) -> Iterator[Item]:
        shares = tasks if divisible else 1
        return in_turn(partial(receive, thread.submit(submit, make, shares).result()), shares)

    return run


def _work(folder: str, make: Callable[[int, int], Iterator[Item]], share: int, shares: int) -> Iterator[tuple[str, Any]]:
    # Paths of params.yaml begin at the repository's root.
    os.chdir(folder)
    yield from results_of(make, share, shares)
