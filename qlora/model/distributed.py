"""What the processes of a distributed run exchange (qlora/runtime/launcher.py starts them); a single process has all of it.

Not part of qlora/runtime: what is gathered here becomes the outputs.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from qlora.core.errors import LOST_PEERS, MachineError
from qlora.runtime.signals import LAUNCHER

PATIENCE = timedelta(hours=12)
"""The longest that processes wait for one another between passes: for one that reads a large model, or answers more than they do. NCCL gives up after
ten minutes."""
_waiting: dict[str, dist.ProcessGroup] = {}
"""A group over gloo, which waits that long."""
Item = TypeVar("Item")


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the group that `join` entered, once the common work is done, and report the loss of another process in plain words.

    Raises:
        MachineError: another process has ended, and no launcher is there to report it.
    """
    try:
        yield
        _leave()
    except RuntimeError as error:
        # By the variable: the group may be lost while it is being joined.
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if LAUNCHER in os.environ:
            os._exit(LOST_PEERS)
        raise MachineError("rank-died", "another process of this run has ended, and this one with it") from error


def join(device: str) -> None:
    """Meet the other processes, if this one was started as one of several; on cuda each has the device of its number on its machine."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None
        )


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        _waiting.clear()
        dist.destroy_process_group()


def _patient() -> dist.ProcessGroup:
    """The group that waits, made by all processes together at their first exchange."""
    if not _waiting:
        _waiting["group"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _waiting["group"]


def rank_and_size() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """Whether this is the process that writes the outputs."""
    return rank_and_size()[0] == 0


def barrier() -> None:
    """Until every process is here."""
    if rank_and_size()[1] > 1:
        dist.barrier(_patient())


@contextmanager
def one_process_at_a_time() -> Iterator[None]:
    """The processes of a machine in turn, where each needs memory that is not there for all at once."""
    turn, turns = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    waiting = _patient() if rank_and_size()[1] > 1 else None
    for place in range(turns + 1):
        if place == turn:
            yield
        if waiting and place < turns:
            dist.barrier(waiting)


def broadcast(own: Item) -> Item:
    """What the main process has, to each of them."""
    if rank_and_size()[1] == 1:
        return own
    known = [own]
    dist.broadcast_object_list(known, src=0, group=_patient())
    return known[0]


def all_gather(own: Item) -> list[Item]:
    """What each process has, in the order of ranks, to each of them."""
    size = rank_and_size()[1]
    if size == 1:
        return [own]
    found: list[Item] = [own] * size
    dist.all_gather_object(found, own, group=_patient())
    return found


def all_reduce_max(own: int) -> int:
    """The highest number that any process gives, to each of them."""
    if rank_and_size()[1] == 1:
        return own
    number = torch.tensor([own])
    dist.all_reduce(number, dist.ReduceOp.MAX, group=_patient())
    return int(number)


def gather_items(own: Mapping[int, Item], count: int) -> list[Item]:
    """What all processes made, by number, to each of them.

    Args:
        own: This process's items by their numbers.
        count: How many there must be.

    Raises:
        MachineError: one is missing, or two processes made it.
    """
    found: dict[int, Item] = {}
    for share in all_gather(dict(own)):
        twice = found.keys() & share.keys()
        if twice:
            raise MachineError(
                "share-incomplete", f"{len(twice)} of {count} items were made by two processes, such as number {min(twice)}: run again"
            )
        found |= share
    missing = set(range(count)) ^ found.keys()
    if missing:
        raise MachineError("share-incomplete", f"{len(missing)} of {count} items are missing or too many, such as number {min(missing)}: run again")
    return [found[number] for number in range(count)]
