"""Checks that all ranks agree, and errors that all ranks raise. Exchanges small Python objects only."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastmargin.distributed.layout import Group

T = TypeVar("T")


def check_group(group: Group | None, options: Mapping[str, Any]) -> None:
    """Raises ValueError for a group that is not of all processes and, on every rank, for options that differ."""
    if group is None:
        return
    if not isinstance(group, Group):
        raise ValueError(f"group is {group!r}: want a ProcessGroup, such as torch.distributed.group.WORLD, or None")
    if group.size() != dist.get_world_size():
        raise ValueError(
            f"the group has {group.size()} of {dist.get_world_size()} processes: want a group of all, as shards "
            "have no replicas"
        )
    check_device(group)
    check_equal(options, group)


def check_equal(options: Mapping[str, Any], group: Group | None) -> None:
    """Raises ValueError, on every rank, for the first of these that is not the same on all ranks."""
    first, *others = gather_objects(dict(options), group)
    for rank, theirs in enumerate(others, 1):
        for name in first | theirs:
            if name not in first or name not in theirs or theirs[name] != first[name]:
                here, there = (repr(values[name]) if name in values else "missing" for values in (first, theirs))
                raise ValueError(f"{name} is {here} on rank 0, {there} on rank {rank}: want one value")


def check_device(group: Group) -> None:
    """Raises ValueError where NCCL would have this process on the GPU of the first one of its machine."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if dist.get_backend(group) != "nccl" or local == 0 or torch.cuda.device_count() < 2:
        return
    if torch.cuda.current_device() == 0:
        raise ValueError(f"local rank {local} is on GPU 0, as rank 0 is: call torch.cuda.set_device({local}) first")


def gather_objects(local: Any, group: Group | None) -> list[Any]:
    """The object of every rank, in the order of ranks: small and picklable ones."""
    if group is None:
        return [local]
    all_ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(all_ranks, local, group=group)
    return all_ranks


def run_on_all_ranks(action: Callable[[], T], group: Group | None) -> list[T]:
    """The results of action() on all ranks. If it fails on one, all ranks raise, with that rank's message: an OSError
    or ValueError as such, any other exception as RuntimeError."""
    if group is None:
        return [action()]
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    kind = next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError)
    all_ranks = gather_objects((result, error and (kind, f"{error}")), group)
    failures = [(rank, *failure) for rank, (_, failure) in enumerate(all_ranks) if failure]
    if failures:
        raise failures[0][1]("; ".join(f"rank {rank}: {message}" for rank, _, message in failures)) from error
    return [result for result, _ in all_ranks]


def is_replica(group: Group | None) -> bool:
    """Whether other processes may hold copies of the same head: there are some, and it is not sharded over a group."""
    return group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
