"""What a run holds: how it is built from its configuration, and how it goes into a checkpoint and comes back.

Images, their order and their augmentation are functions of (seed, step); everything else that a step reads
and changes is in the checkpoint.
"""

import hashlib
import inspect
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmargin import margins
from fastmargin.driver.augment import to_float
from fastmargin.driver.backbone import Log, build_backbone, check_factory
from fastmargin.driver.checkpoint import Checkpoint
from fastmargin.driver.config import HeadConfig, OptimConfig, TrainConfig
from fastmargin.driver.data import Identities, UniformBatches
from fastmargin.driver.glyphs import load_glyphs
from fastmargin.head import MarginHead
from fastmargin.mining import DoppelgangerBatchSampler, DoppelgangerTable
from fastmargin.models import lsuv
from fastmargin.schedules import LambdaSchedule, MarginRamp, Schedule

Order = UniformBatches | DoppelgangerBatchSampler

LSUV = 256  # images, spread over the identities, that set the scale of each layer of the doppelganger network


@dataclass
class Run:
    """All that a step reads or changes."""

    config: TrainConfig
    train: Identities
    test: Identities
    factory: str | None  # import path of the network, where it is not config.model's
    model: nn.Module
    head: MarginHead
    optimizer: torch.optim.SGD
    schedule: Schedule | None
    table: DoppelgangerTable
    order: Order
    step: int = 0  # optimiser steps made
    seconds: float = 0.0  # spent in the loop, before a stop too
    cosines: dict[str, Tensor] = field(  # [n] of rows and their own classes, in the first and the last steps
        default_factory=lambda: {"start": torch.empty(0), "end": torch.empty(0)}
    )


def build(config: TrainConfig, log: Log, factory: str | None = None) -> Run:
    """Data, network, head, optimiser, mining. ValueError for options that do not fit together.

    factory: import path of a network of the caller's own, instead of config.model.name.
    """
    train, test = load_glyphs(config.data, log).split(config.data.holdout, config.data.split_seed)
    if min(train.num_classes, test.num_classes) < 2:
        split = f"{train.num_classes} identities to train on and {test.num_classes} held out"
        raise ValueError(f"{split}; wanted at least 2 of each: more fonts, or another data.holdout")
    if config.head.topk >= train.num_classes:
        raise ValueError(f"head.topk is {config.head.topk}; wanted less than the {train.num_classes} classes")
    if config.optim.batch_size > len(train.images):
        raise ValueError(f"optim.batch_size is {config.optim.batch_size}; there are {len(train.images)} images")
    torch.manual_seed(config.seed)
    model = build_backbone(config, factory)
    if factory is None and config.model.name == "doppelganger":
        lsuv(model, to_float(train.images[torch.linspace(0, len(train.images) - 1, LSUV).long()]))
    head = build_head(config, train.num_classes)
    table = DoppelgangerTable(train.num_classes, config.head.topk)
    return Run(
        config=config,
        train=train,
        test=test,
        factory=factory,
        model=model,
        head=head,
        optimizer=build_optimizer(config.optim, model, head),
        schedule=build_schedule(config, head.margin),
        table=table,
        order=build_order(config, train, table),
    )


def build_head(config: TrainConfig, num_classes: int) -> MarginHead:
    margin = build_margin(config.head)
    return MarginHead(
        config.dim,
        num_classes,
        margin,
        bias=margin.plain,
        topk=config.head.topk,
        backend=config.head.backend,
        seed=config.seed,
    )


def build_margin(config: HeadConfig) -> margins.Margin:
    kind, arguments = getattr(margins, config.margin), config.arguments()
    for name, value in arguments.items():
        if name not in inspect.signature(kind).parameters:
            raise ValueError(f"head.{name} is {value}; wanted null: {config.margin} has none")
    return kind(**arguments)


def build_schedule(config: TrainConfig, margin: margins.Margin) -> Schedule | None:
    """The ramp of a margin `m`; SphereFace anneals lambda instead."""
    if isinstance(margin, margins.SphereFace):
        return LambdaSchedule(margin)
    steps = round(config.head.ramp * config.optim.steps)
    return MarginRamp(margin, "m", steps) if steps and hasattr(margin, "m") else None


def build_optimizer(config: OptimConfig, model: nn.Module, head: MarginHead) -> torch.optim.SGD:
    return torch.optim.SGD(
        learnt(model, head).values(),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )


def build_order(config: TrainConfig, data: Identities, table: DoppelgangerTable) -> Order:
    size, sampler = config.optim.batch_size, config.sampler
    if sampler.name == "uniform":
        return UniformBatches(len(data.images), size, config.seed)
    return DoppelgangerBatchSampler(
        data.labels,
        table,
        size,
        random_classes=sampler.random_classes,
        counts=sampler.counts,
        lag=sampler.lag,
        seed=config.seed,
    )


def learnt(model: nn.Module, head: MarginHead) -> dict[str, nn.Parameter]:
    """What the optimiser moves, by name."""
    named = nn.ModuleDict({"model": model, "head": head}).named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


# Into a checkpoint and back


def tensors(run: Run) -> dict[str, Tensor]:
    """All tensors that the next step depends on, and the cosines kept for the report."""
    moved = learnt(run.model, run.head)
    parts = {
        "model": run.model.state_dict(),
        "head": run.head.state_dict(),
        "momentum": {name: run.optimizer.state[p]["momentum_buffer"] for name, p in moved.items()},
        "table": run.table.state_dict(),
        "order": {} if isinstance(run.order, UniformBatches) else run.order.state_dict(),
        "cosines": run.cosines,
        "random": {"torch": torch.get_rng_state()},  # a margin may draw from it
    }
    return {f"{part}/{name}": tensor for part, held in parts.items() for name, tensor in held.items()}


def state(run: Run) -> dict[str, Any]:
    """What is not tensors, as JSON."""
    return {
        "config": asdict(run.config),
        "factory": run.factory,
        "data": fingerprint(run.train),
        "schedule": run.schedule.state_dict() if run.schedule else None,
        "seconds": run.seconds,
    }


def restore(run: Run, saved: Checkpoint) -> None:
    """Brings a run just built to where the checkpoint was made. ValueError if images or network are others."""
    check_factory(saved, run.config, run.factory)
    if saved.state["data"] != fingerprint(run.train):
        raise ValueError("the run was trained on other images: the fonts, or what draws them, have changed")

    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}/"): v for k, v in saved.tensors.items() if k.startswith(f"{name}/")}

    run.model.load_state_dict(part("model"))
    run.head.load_state_dict(part("head"))
    run.table.load_state_dict(part("table"))
    momentum = part("momentum")
    for name, p in learnt(run.model, run.head).items():
        run.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momentum[name])
    if isinstance(run.order, DoppelgangerBatchSampler):
        run.order.load_state_dict(part("order"))
    if run.schedule:
        run.schedule.load_state_dict(saved.state["schedule"])
    torch.set_rng_state(part("random")["torch"])
    run.cosines, run.step, run.seconds = part("cosines"), saved.step, saved.state["seconds"]


def fingerprint(data: Identities) -> str:
    digest = hashlib.sha256("\n".join(data.names).encode())
    digest.update(data.labels.numpy().tobytes())
    digest.update(data.images.numpy().tobytes())
    return digest.hexdigest()
