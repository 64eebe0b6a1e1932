"""Work shared by the processes of a distributed run (qlora/launch.py begins them); one process alone has all of it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from qlora.errors import MachineError
from qlora.interruption import LAUNCHER

TURN = timedelta(hours=2)
"""The longest that one process may take while the others wait for their turn."""
LOST = 76
"""Exit code of a process that ended because another one had: the launcher tells of that one."""
Item = TypeVar("Item")


def join(device: str) -> None:
    """Meet the other processes, if this one was begun as one of several; on cuda each has the device of its number on its machine."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None
        )


def leave() -> None:
    """After the last common work."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def loss_of_others_named() -> Iterator[None]:
    """Ends in place of the communication library's own error when another process has ended.

    Raises:
        MachineError: one has, and no launcher is there to tell of it.
    """
    try:
        yield
    except RuntimeError as error:
        if rank_and_size()[1] == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if LAUNCHER in os.environ:
            os._exit(LOST)
        raise MachineError("rank-died", "another process of this run has ended, and this one with it") from error


def rank_and_size() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this is the process that writes what all share."""
    return rank_and_size()[0] == 0


def barrier() -> None:
    """Until every process is here."""
    if rank_and_size()[1] > 1:
        dist.barrier()


@contextmanager
def one_after_another() -> Iterator[None]:
    """The processes of a machine in turn, where each needs memory that is not there for all at once."""
    turn, turns = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    # Apart from the others' talk, which is to end after minutes of silence: reading a large model takes longer.
    waiting = dist.new_group(backend="gloo", timeout=TURN) if rank_and_size()[1] > 1 else None
    for place in range(turns + 1):
        if place == turn:
            yield
        if waiting and place < turns:
            dist.barrier(waiting)


def from_first(own: Item) -> Item:
    """What the first process knows, to each of them."""
    if rank_and_size()[1] == 1:
        return own
    known = [own]
    dist.broadcast_object_list(known, src=0)
    return known[0]


def gathered(own: Item) -> list[Item]:
    """What each process has, in their order, to each of them."""
    size = rank_and_size()[1]
    if size == 1:
        return [own]
    found: list[Item] = [own] * size
    dist.all_gather_object(found, own)
    return found


def highest(own: int) -> int:
    """The highest number that any process gives, to each of them."""
    if rank_and_size()[1] == 1:
        return own
    number = torch.tensor([own], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def merged(own: Mapping[int, Item], count: int) -> list[Item]:
    """What all processes made, by number, to each of them.

    Args:
        own: This process's items by their numbers.
        count: How many there must be.

    Raises:
        MachineError: one is missing, or two processes made it.
    """
    found: dict[int, Item] = {}
    for share in gathered(dict(own)):
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
