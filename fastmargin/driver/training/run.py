"""What a run holds, and how it is built from its configuration: data, network, head, terms, optimizers, mining, order.

How a run is saved and restored is in state.py, how it is trained in loop.py.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fastmargin import margins
from fastmargin.distributed.layout import Layout
from fastmargin.driver.config import HeadConfig, TrainConfig, settled
from fastmargin.driver.data.augment_glyphs import to_float
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.order import UniformBatches
from fastmargin.driver.data.sources import load_data
from fastmargin.driver.log import Log
from fastmargin.driver.training.backbone import build_backbone
from fastmargin.driver.training.consistency import check_data, check_settings
from fastmargin.driver.training.loader import BatchSource, Order
from fastmargin.driver.training.optimizers import Optimizers, build_average
from fastmargin.driver.training.processes import ALONE, Processes, pick_device
from fastmargin.driver.training.stopwatch import Stopwatch
from fastmargin.driver.training.table_feed import TableFeed
from fastmargin.driver.training.terms import Terms
from fastmargin.head.margin_head import MarginHead
from fastmargin.margins.schedules import LambdaSchedule, MarginRamp, Schedule
from fastmargin.mining import DoppelgangerBatchSampler, DoppelgangerTable
from fastmargin.models import lsuv
from fastmargin.require import require

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}
RAMP = 0.3  # share of the steps over which a margin grows
LSUV = 256  # images, spread over the identities, for `lsuv` of the doppelganger network


@dataclass
class Run:
    """All that a step reads or changes."""

    config: TrainConfig
    processes: Processes
    device: torch.device
    rows: Layout  # of a step, over the processes
    part: Layout  # the rows of each part of a step (optim.accumulation), over the processes
    train: Identities
    test: Identities
    factory: str | None  # import path of the network, where it is not config.model's
    model: nn.Module
    replica: nn.Module  # the model, under DDP where there are several processes
    head: MarginHead
    terms: Terms
    average: nn.Module | None  # the network with averaged weights
    optimizers: Optimizers
    schedule: Schedule | None
    table: DoppelgangerTable
    table_feed: TableFeed  # brings what a step has mined into the table
    order: Order
    step: int = 0  # optimizer steps made
    seconds: float = 0.0  # in the training loop, those before a resume included
    watch: Stopwatch = field(default_factory=Stopwatch)  # not in the checkpoint: a resumed run has a new one
    cosines: dict[str, Tensor] = field(init=False)  # {"start", "middle", "end": [n]} of rows and their own classes

    def __post_init__(self) -> None:
        self.cosines = {stage: torch.empty(0, device=self.device) for stage in ("start", "middle", "end")}

    @property
    def network(self) -> nn.Module:
        """What is evaluated."""
        return self.model if self.average is None else self.average

    def batch_source(self) -> BatchSource:
        """What the loader reads for the steps that are left."""
        return BatchSource(
            train=self.train,
            order=self.order,
            data=self.config.data,
            seed=self.config.seed,
            parts=self.config.optim.accumulation,
            part=self.part,
            steps=range(self.step, self.config.optim.steps),
            pin_memory=self.device.type == "cuda",
        )


def build(config: TrainConfig, log: Log, factory: str | None = None, processes: Processes = ALONE) -> Run:
    """A run before its first step. ValueError for options that do not fit together, and for ranks that differ.

    factory: import path of a network of the caller's own, instead of config.model.name.
    """
    check_settings(config, factory, processes)
    device = pick_device(config.device, processes)
    train, test = read_data(config, log, processes)
    config = settled(config, len(train.labels))
    part = share_rows(config, processes)
    if config.head.topk >= train.num_classes:
        raise ValueError(f"head.topk is {config.head.topk}; want less than the {train.num_classes} classes")
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
    rows = Layout.of(part.group, (size * config.optim.accumulation for size in part.sizes))
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
        table_feed=TableFeed(table, rows, late=device.type == "cuda"),
        order=build_order(config, train, table),
    )


def read_data(config: TrainConfig, log: Log, processes: Processes) -> tuple[Identities, Identities]:
    """The images to train on and those held out, the same on all ranks. ValueError for too few identities."""
    with processes.in_turn():
        train, test = load_data(config.data, log)
    check_data(train, test, config.seed, processes)
    if min(train.num_classes, test.num_classes) < 2:
        split = f"{train.num_classes} identities to train on and {test.num_classes} held out"
        raise ValueError(f"{split}; want at least 2 of each: more data, another data.holdout or data.split_seed")
    return train, test


def share_rows(config: TrainConfig, processes: Processes) -> Layout:
    """The rows of a part, over the processes. ValueError for fewer than 2 each: batch norm needs a variance."""
    size, parts = config.optim.batch_size, config.optim.accumulation
    want = f"at least 2 for each of {processes.count} processes, {2 * processes.count * parts} in all"
    require(size // parts >= 2 * processes.count, "optim.batch_size", size, want)
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
        keep_bytes=config.head.keep_bytes,
        backend=config.head.backend,
        seed=config.seed,
    )


def build_margin(config: HeadConfig) -> margins.Margin:
    kind, arguments = getattr(margins, config.margin), config.arguments()
    for name, value in arguments.items():
        if name not in inspect.signature(kind).parameters:
            raise ValueError(f"head.{name} is {value}; want null: {config.margin} has none")
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


def trainable_parameters(model: nn.Module, head: MarginHead, terms: Terms) -> dict[str, nn.Parameter]:
    """What the optimizers update, by name."""
    named = nn.ModuleDict({"model": model, "head": head, "terms": terms}).named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def mutable_tensors(run: Run) -> Iterator[Tensor]:
    """All numbers that training changes: weights, averages, statistics of batch norm or a margin, centers.

    Of sampled classes pending lazy updates stay pending: applied here, they would be rounded at every record.
    """
    yield run.head._weight
    if run.head.bias is not None:
        yield run.head.bias
    for module in (run.model, run.head.margin, run.terms, run.average):
        if module is not None:
            yield from (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
