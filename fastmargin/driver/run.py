"""What a run holds: how it is built from its configuration, and how it goes into a checkpoint and comes back.

Images, their order, their augmentation and what a step draws are functions of (seed, step); everything else that a
step reads and changes is in the checkpoint. Of N processes each writes the rows of its classes, the first one all else:
any number of them goes on from there.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmargin import margins
from fastmargin.checkpoint import Checkpoint, Sharded, committed, load
from fastmargin.distributed import Layout
from fastmargin.driver import folder
from fastmargin.driver.augment import to_float
from fastmargin.driver.backbone import build_backbone, check_factory, network_weights
from fastmargin.driver.config import HeadConfig, TrainConfig, require, settled
from fastmargin.driver.data import Identities, Log, UniformBatches
from fastmargin.driver.datasets import load_data
from fastmargin.driver.mined import Mined
from fastmargin.driver.optimizers import Optimizers, build_average
from fastmargin.driver.processes import ALONE, Processes, pick_device
from fastmargin.driver.stopwatch import Stopwatch
from fastmargin.driver.terms import Terms
from fastmargin.head import MarginHead
from fastmargin.mining import DoppelgangerBatchSampler, DoppelgangerTable
from fastmargin.models import lsuv
from fastmargin.schedules import LambdaSchedule, MarginRamp, Schedule

Order = UniformBatches | DoppelgangerBatchSampler

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}
COUNTER = "counter._extra_state"  # in the state of a head
RAMP = 0.3  # share of the steps over which a margin grows
LSUV = 256  # images, spread over the identities, that set the scale of each layer of the doppelganger network


@dataclass
class Run:
    """All that a step reads or changes."""

    config: TrainConfig
    processes: Processes
    device: torch.device
    rows: Layout  # of a step, over the processes
    part: Layout  # the rows of each of its parts (optim.accumulation)
    train: Identities
    test: Identities
    factory: str | None  # import path of the network, where it is not config.model's
    model: nn.Module
    replica: nn.Module  # the same, or what averages its gradients over the processes
    head: MarginHead
    terms: Terms
    average: nn.Module | None  # the network with averaged weights
    optimizers: Optimizers
    schedule: Schedule | None
    table: DoppelgangerTable
    mined: Mined  # on its way into the table
    order: Order
    step: int = 0  # optimiser steps made
    seconds: float = 0.0  # spent in the loop, before a stop too
    watch: Stopwatch = field(default_factory=Stopwatch)  # not in the checkpoint: every stretch of training has its own
    cosines: dict[str, Tensor] = field(init=False)  # [n] of rows and their own classes, in some steps of the run

    def __post_init__(self) -> None:
        self.cosines = {stage: torch.empty(0, device=self.device) for stage in ("start", "middle", "end")}

    @property
    def network(self) -> nn.Module:
        """What is evaluated."""
        return self.model if self.average is None else self.average


def build(config: TrainConfig, log: Log, factory: str | None = None, processes: Processes = ALONE) -> Run:
    """Data, network, head, optimisers, mining. ValueError for options that do not fit together.

    factory: import path of a network of the caller's own, instead of config.model.name.
    """
    device = pick_device(config.device, processes)
    with processes.in_turn():
        train, test = load_data(config.data, log)
    if min(train.num_classes, test.num_classes) < 2:
        split = f"{train.num_classes} identities to train on and {test.num_classes} held out"
        raise ValueError(f"{split}; wanted at least 2 of each: more data, another data.holdout or data.split_seed")
    config = settled(config, len(train.labels))
    part = share_rows(config, processes)
    if config.head.topk >= train.num_classes:
        raise ValueError(f"head.topk is {config.head.topk}; wanted less than the {train.num_classes} classes")
    torch.manual_seed(config.seed)
    model = build_backbone(config, train.input_shape, factory)
    if factory is None and config.model.name == "doppelganger":
        lsuv(model, to_float(train.images[np.linspace(0, len(train.labels) - 1, LSUV).astype(np.int64)]))
    head = build_head(config, train.num_classes, part)
    terms = Terms(config.terms, train.num_classes, config.dim, part)
    for module in (model, head, terms):
        module.to(device)
    replica = processes.replicated(model, train.input_shape)
    table = DoppelgangerTable(train.num_classes, config.head.topk)
    rows = Layout(part.group, tuple(size * config.optim.accumulation for size in part.sizes))
    return Run(
        config=config,
        processes=processes,
        device=device,
        rows=rows,
        part=part,
        train=train,
        test=test,
        factory=factory,
        model=model,
        replica=replica,
        head=head,
        terms=terms,
        average=build_average(config.optim, model),
        optimizers=Optimizers(config.optim, head, model, terms),
        schedule=build_schedule(config, head.margin),
        table=table,
        mined=Mined(table, rows, late=device.type == "cuda"),
        order=build_order(config, train, table),
    )


def share_rows(config: TrainConfig, processes: Processes) -> Layout:
    """ValueError for fewer than two rows a process, as one alone has no variance for batch norm."""
    size, parts = config.optim.batch_size, config.optim.accumulation
    wanted = f"at least 2 for each of {processes.count} processes, {2 * processes.count * parts} in all"
    require(size // parts >= 2 * processes.count, "optim.batch_size", size, wanted)
    return processes.share(size // parts)


def build_head(config: TrainConfig, num_classes: int, rows: Layout) -> MarginHead:
    margin = build_margin(config.head)
    return MarginHead(
        config.dim,
        num_classes,
        margin,
        bias=margin.plain,
        topk=config.head.topk,
        sample_rate=config.head.sample_rate,
        group=rows.group,
        uneven=len(set(rows.sizes)) > 1,
        compute_dtype=DTYPES[config.head.compute_dtype],
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
        require(config.head.ramp is None, "head.ramp", config.head.ramp, "null: SphereFace anneals its lambda instead")
        return LambdaSchedule(margin)
    ramp, grows = config.head.ramp, hasattr(margin, "m")
    require(grows or ramp is None, "head.ramp", ramp, f"null: {config.head.margin} has no m that grows")
    steps = round((RAMP if ramp is None else ramp) * config.optim.steps)
    return MarginRamp(margin, "m", steps) if steps and grows else None


def build_order(config: TrainConfig, data: Identities, table: DoppelgangerTable) -> Order:
    size, sampler = config.optim.batch_size, config.sampler
    if sampler.name == "uniform":
        return UniformBatches(len(data.images), size, config.seed)
    try:
        return DoppelgangerBatchSampler(
            data.labels,
            table,
            size,
            random_classes=sampler.share_or_number(),
            counts=sampler.counts,
            lag=sampler.lag,
            seed=config.seed,
        )
    except ValueError as error:
        words = f"optim.batch_size {size}, sampler.counts {list(sampler.counts)} and sampler.random_classes"
        raise ValueError(f"{words} do not fit the data: {error}") from error


def learnt(model: nn.Module, head: MarginHead, terms: Terms) -> dict[str, nn.Parameter]:
    """What the optimisers move, by name."""
    named = nn.ModuleDict({"model": model, "head": head, "terms": terms}).named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def trained(run: Run) -> Iterator[Tensor]:
    """All numbers that training changes: weights, averages, statistics of batch norm or a margin, centres."""
    for module in (run.model, run.head, run.terms, run.average):
        if module is not None:
            yield from (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


# Into a checkpoint and back


def tensors(run: Run) -> dict[str, Tensor | Sharded]:
    """All tensors that the next step depends on, and the cosines kept for the report."""
    moved = learnt(run.model, run.head, run.terms)
    parts = {
        "optimizer": run.optimizers.tensors(moved),  # before the head, whose late rows it catches up
        "model": run.model.state_dict(),
        "head": run.head.state_dict(),
        "terms": run.terms.state_dict(),
        "average": {} if run.average is None else run.average.state_dict(),
        "table": run.table.state_dict(),
        "mined": run.mined.state_dict(),
        "order": {} if isinstance(run.order, UniformBatches) else run.order.state_dict(),
        "cosines": run.cosines,
    }
    parts["head"].pop(COUNTER, None)
    named = {f"{part}/{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
    start, total = run.head.classes.start, run.head.num_classes
    return {name: Sharded(t, start, total) if of_classes(name, t.shape) else t for name, t in named.items()}


def of_classes(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor has a row for each class of the head: its weight, and what their optimiser keeps of them."""
    return name == "head/weight" or (name.startswith("optimizer/head.weight.") and len(shape) > 0)


def part_of(saved: Checkpoint, part: str, head: MarginHead) -> dict[str, Tensor]:
    """The tensors of one part, by their own names; of the classes, those held here."""
    names, shape = [name for name in saved.tensors if name.startswith(f"{part}/")], saved.tensors.shape
    rows = {name: head.class_range if of_classes(name, shape(name)) else (0, None) for name in names}
    return {name.removeprefix(f"{part}/"): saved.tensors.rows(name, *of) for name, of in rows.items()}


def load_head(head: MarginHead, saved: Checkpoint, passes: int) -> None:
    """passes: made in training, which some heads count: those with sampled classes, or in a group."""
    weights = part_of(saved, "head", head)
    weights.pop(COUNTER, None)
    head.load_state_dict(weights | ({} if head.counter is None else {COUNTER: torch.tensor(passes)}))


def state(run: Run) -> dict[str, Any]:
    """What is not tensors, as JSON."""
    return {
        "config": asdict(run.config),
        "factory": run.factory,
        "input": [*run.train.input_shape],
        "data": run.train.fingerprint,
        "schedule": run.schedule.state_dict() if run.schedule else None,
        "scaler": run.optimizers.scaler.state_dict(),
        "seconds": run.seconds,
    }


def restore(run: Run, saved: Checkpoint) -> None:
    """Brings a run just built to where the checkpoint was made. ValueError if images or network are others."""
    check_factory(saved, run.config, run.factory)
    check_images(saved, run.train)
    part = partial(part_of, saved, head=run.head)
    run.model.load_state_dict(part("model"))
    load_head(run.head, saved, saved.step * run.config.optim.accumulation)
    run.terms.load_state_dict(part("terms"))
    run.table.load_state_dict(part("table"))
    run.optimizers.load_tensors(learnt(run.model, run.head, run.terms), part("optimizer"))
    run.optimizers.scaler.load_state_dict(saved.state["scaler"])
    if run.average is not None:
        run.average.load_state_dict(part("average"))
    run.mined.load_state_dict(part("mined"))
    if isinstance(run.order, DoppelgangerBatchSampler):
        run.order.load_state_dict(part("order"))
    if run.schedule:
        run.schedule.load_state_dict(saved.state["schedule"])
    run.cosines |= {stage: scores.to(run.device) for stage, scores in part("cosines").items()}
    run.step, run.seconds = saved.step, saved.state["seconds"]


def check_images(saved: Checkpoint, images: Identities) -> None:
    """ValueError unless these are the images that the checkpoint's run is trained on."""
    if saved.state["data"] != images.fingerprint:
        raise ValueError("the run was trained on other images: they, or what reads or draws them, have changed")


def start_from(run: Run, path: Path, log: Log) -> None:
    """Takes the weights alone from a checkpoint of another run, of its folder the newest: the network's, and where that
    run was trained on the same images, what its head and terms hold that this run's have too. ValueError for weights of
    other shapes.
    """
    path = newest(path) if (path / folder.CONFIG).is_file() else path
    saved = load(path, rank=run.processes.rank, ranks=run.processes.count)
    same = saved.state["data"] == run.train.fingerprint
    try:
        for network in {run.model, run.network}:
            network.load_state_dict(network_weights(saved.tensors))
        if same:
            own = run.head.state_dict()  # of another margin theirs may have less, or more
            theirs = part_of(saved, "head", run.head)
            run.head.load_state_dict(own | {k: t for k, t in theirs.items() if k in own and k != COUNTER})
            run.terms.load_state_dict(part_of(saved, "terms", run.head), strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} holds the weights of another network, head or term: {error}") from error
    others = "" if same else "; it saw other images, so head and terms start afresh"
    log(f"weights of step {saved.step} of {path}{others}")


def newest(where: Path) -> Path:
    """The last checkpoint of the run in that folder. ValueError if there is none."""
    if not (paths := committed(where / folder.CHECKPOINTS)):
        raise ValueError(f"{where} has no checkpoint yet")
    return paths[-1]
