"""Anything with a state_dict, as tensors and plain state, and back.

The weight of a head in a group and its optimizer state are `Sharded` by class, so any number of ranks can load what any
other number has saved. A state_dict becomes JSON, in which {"dict": [[key, value], ...]} is a dict, {"tensor": name} a
tensor, {"rows": name} this rank's rows of one, and {"float": "inf"} a number that JSON does not have.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmargin.checkpoint.store import Checkpoint
from fastmargin.checkpoint.tensors import Sharded
from fastmargin.head.class_weights import ClassWeights
from fastmargin.optim.base import ClassOptimizer


def pack(parts: Mapping[str, Any]) -> tuple[dict[str, Tensor | Sharded], dict[str, Any]]:
    """Tensors and state for `save`.

    Tied weights are written once for each of their names.

    Args:
        parts: by name, whatever has state_dict() and load_state_dict(): a MarginHead, a ClassSGD or ClassAdamW,
            modules, torch optimizers, schedules, a DoppelgangerTable, a sampler. Pass a module without its DDP wrapper:
            its names are then the same for any number of processes.

    Returns:
        Tensors by name, of any shapes [...], class weights and their optimizer state as `Sharded`; and the rest as
        JSON.

    Raises:
        ValueError: a state_dict with anything but tensors, dicts, lists, strings, numbers and None; two tensors of one
            name, as in {"a/b": t, "a": {"b": u}} and {1: t, "1": u}.
    """
    tensors: dict[str, Tensor | Sharded] = {}
    return tensors, {name: encode(sharded_state(part), name, tensors) for name, part in parts.items()}


def unpack(saved: Checkpoint, parts: Mapping[str, Any]) -> None:
    """Restores each part. Class weights and their optimizer state are read in place: only this rank's rows.

    Closes the files at the end.

    Args:
        saved: of `load` or `load_latest`.
        parts: by name, as for `pack`.

    Raises:
        ValueError: a part that the checkpoint does not have, or that does not fit; parts before it are then loaded
            already, and rows of its class weights may be overwritten.
    """
    try:
        for name, part in parts.items():
            if name not in saved.state:
                raise ValueError(f"{saved.path} has no {name!r}: it has {', '.join(saved.state)}")
            load_part(saved, name, part)
    finally:
        saved.tensors.close()


def load_part(saved: Checkpoint, name: str, part: Any) -> None:
    try:
        part.load_state_dict(decode(saved.state[name], saved, part))
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{saved.path}: {name} does not fit: {error}") from error


def sharded_state(part: Any) -> Any:
    state = part.state_dict()
    if isinstance(part, ClassWeights):
        state["weight"] = shard_of(part, state["weight"])
    elif isinstance(part, ClassOptimizer):
        kept = state["state"].get(0, {})
        rows = {name: shard_of(part.head, t) for name, t in kept.items() if isinstance(t, Tensor)}
        state["state"] = {0: kept | rows}  # a copy: `kept` belongs to the optimizer
    return state


def shard_of(head: ClassWeights, rows: Tensor) -> Sharded:  # [C_local, d]
    return Sharded(rows, head.classes.start, head.num_classes)


def encode(value: Any, name: str, tensors: dict[str, Tensor | Sharded]) -> Any:
    """A value as JSON; its tensors are added to `tensors`."""
    match value:
        case Tensor() | Sharded():
            if name in tensors:
                raise ValueError(f"{name} is the name of two tensors: want keys that differ as text, without '/'")
            tensors[name] = value
            return {"rows" if isinstance(value, Sharded) else "tensor": name}
        case Mapping():
            return {"dict": [[key, encode(inner, f"{name}/{key}", tensors)] for key, inner in value.items()]}
        case list() | tuple():
            return [encode(inner, f"{name}/{i}", tensors) for i, inner in enumerate(value)]
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | str() | bool() | int() | float():
            return value
    raise ValueError(f"{name} is a {type(value).__name__}: want tensors, dicts, lists, strings, numbers or None")


def decode(value: Any, saved: Checkpoint, part: Any) -> Any:
    match value:
        case {"tensor": name}:
            return saved.tensors[name]
        case {"rows": name}:
            return rows_of(saved, name, part)
        case {"float": text}:
            return float(text)
        case {"dict": pairs}:
            return {key: decode(inner, saved, part) for key, inner in pairs}
        case list():
            return [decode(inner, saved, part) for inner in value]
    return value


def rows_of(saved: Checkpoint, name: str, part: Any) -> Tensor:  # [C_local, d]
    """Reads this rank's rows into the head's weight, or into its optimizer's tensor, and returns that."""
    head: ClassWeights = part if isinstance(part, ClassWeights) else part.head
    found, want = saved.tensors.shape(name), (head.num_classes, head.in_features)
    if found != want:
        raise ValueError(f"{name} is {[*found]}: want {[*want]}")
    if part is head:
        head._apply_lazy_updates()  # pending ones would else be applied later, to the rows just read
        return saved.tensors.read_into(head.weight.detach(), name, head.class_range[0])
    part.apply_lazy_updates()
    return saved.tensors.read_into(part.state_tensor(name.rpartition("/")[2]), name, head.class_range[0])
