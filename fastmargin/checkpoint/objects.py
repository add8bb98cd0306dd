"""What has a state_dict, as tensors and plain state, and back.

The weights of a head in a group, and all that its class optimiser keeps of them, are `Sharded` by class: any number of
ranks takes up what any other wrote. A state_dict travels as JSON in which {"dict": [[key, value], ...]} is a dict,
{"tensor": name} a tensor, {"rows": name} this rank's rows of one, and {"float": "inf"} what JSON has no number for.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmargin.checkpoint.store import Checkpoint
from fastmargin.checkpoint.tensors import Sharded
from fastmargin.head.class_weights import ClassWeights
from fastmargin.optim import ClassOptimizer


def pack(parts: Mapping[str, Any]) -> tuple[dict[str, Tensor | Sharded], dict[str, Any]]:
    """Tensors and state for `save`.

    parts: by name, whatever has state_dict() and load_state_dict(): a MarginHead, a ClassSGD or ClassAdamW, modules,
        torch optimisers, schedules, a DoppelgangerTable, a sampler. Without DDP's wrapper a module's names are the same
        for any number of processes.

    Tied weights are written, as they are listed, under each of their names. ValueError for a state_dict with anything
    but tensors, dicts, lists, strings, numbers and None, and where two tensors would have one name, as those of
    {"a/b": t, "a": {"b": u}} and {1: t, "1": u} would.
    """
    tensors: dict[str, Tensor | Sharded] = {}
    return tensors, {name: encode(sharded_state(part), name, tensors) for name, part in parts.items()}


def unpack(saved: Checkpoint, parts: Mapping[str, Any]) -> None:
    """Brings each part to where `pack` found it; the weights of classes, and what their optimiser keeps, are read in
    place, the rows held here and no others.

    Lets go of the files at the end. ValueError for a part that the checkpoint has not, or that does not fit; parts
    before it have then been loaded, and rows of classes may have been read into it.
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
        state["state"] = {0: kept | rows}  # not into `kept`, which is the optimiser's own
    return state


def shard_of(head: ClassWeights, rows: Tensor) -> Sharded:  # [C_local, d]
    return Sharded(rows, head.classes.start, head.num_classes)


def encode(value: Any, name: str, tensors: dict[str, Tensor | Sharded]) -> Any:
    """JSON; tensors go into `tensors`."""
    match value:
        case Tensor() | Sharded():
            if name in tensors:
                raise ValueError(f"{name} is the name of two tensors: want keys that differ as text, without '/'")
            tensors[name] = value
            return {"rows" if isinstance(value, Sharded) else "tensor": name}
        case Mapping():
            return {"dict": [[key, encode(inner, f"{name}/{key}", tensors)] for key, inner in value.items()]}
        case list() | tuple():
            return [encode(inner, f"{name}/{place}", tensors) for place, inner in enumerate(value)]
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
    """The rows of the classes held here: a head's weight itself, or its optimiser's own tensor, filled."""
    head: ClassWeights = part if isinstance(part, ClassWeights) else part.head
    found, wanted = saved.tensors.shape(name), (head.num_classes, head.in_features)
    if found != wanted:
        raise ValueError(f"{name} is {[*found]}: want {[*wanted]}")
    if part is head:
        head._apply_lazy_updates()  # else what an optimiser has left to do would be done to what is read
        return saved.tensors.read_into(head.weight.detach(), name, head.class_range[0])
    part.apply_lazy_updates()
    return saved.tensors.read_into(part.state_tensor(name.rpartition("/")[2]), name, head.class_range[0])
