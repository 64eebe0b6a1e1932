"""Work shared by the processes of a distributed run; one process alone has all of it."""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from qlora.errors import MachineError

Item = TypeVar("Item")


def rank_and_size() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def highest(own: int) -> int:
    """The highest number that any process gives, to each of them."""
    if rank_and_size()[1] == 1:
        return own
    found = torch.tensor([own], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def merged(own: Mapping[int, Item], count: int) -> list[Item]:
    """What all processes made, by number, to each of them.

    Args:
        own: This process's items by their numbers.
        count: How many there must be.

    Raises:
        MachineError: one is missing, or two processes made it.
    """
    shares = [dict(own)]
    size = rank_and_size()[1]
    if size > 1:
        gathered: list[dict[int, Item] | None] = [None] * size
        dist.all_gather_object(gathered, dict(own))
        shares = [share for share in gathered if share is not None]
    found: dict[int, Item] = {}
    for share in shares:
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
