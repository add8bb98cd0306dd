"""How a run goes into a checkpoint and comes back.

Images, their order, their augmentation and what a step draws are functions of (seed, step); everything else that a
step reads and changes is in the checkpoint. Of N processes each writes the rows of its classes, the first one all else:
any number of them goes on from there.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin import checkpoint
from fastmargin.checkpoint import Checkpoint, Sharded, committed, load
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.order import UniformBatches
from fastmargin.driver.log import Log
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.backbone import check_factory, network_weights
from fastmargin.driver.training.run import Run, trainable_parameters
from fastmargin.head.margin_head import MarginHead
from fastmargin.mining import DoppelgangerBatchSampler


def resume(run: Run, where: Path, log: Log) -> bool:
    """Takes up the newest checkpoint of the folder; False if there is none. ValueError if it does not fit."""
    saved = checkpoint.load_latest(where / run_folder.CHECKPOINTS, group=run.processes.host)
    if saved is None:
        return False
    for warning in saved.warnings:
        log(f"passed over a damaged checkpoint: {warning}")
    restore(run, saved)
    log(f"checkpoint of step {run.step} of {run.config.optim.steps}")
    return True


COUNTER = "counter._extra_state"  # in the state of a head


# Into a checkpoint and back


def tensors(run: Run) -> dict[str, Tensor | Sharded]:
    """All tensors that the next step depends on, and the cosines kept for the report."""
    moved = trainable_parameters(run.model, run.head, run.terms)
    parts = {
        "optimizer": run.optimizers.tensors(moved),  # before the head, whose late rows it catches up
        "model": run.model.state_dict(),
        "head": run.head.state_dict(),
        "terms": run.terms.state_dict(),
        "average": {} if run.average is None else run.average.state_dict(),
        "table": run.table.state_dict(),
        "mined": run.table_feed.state_dict(),
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
    run.optimizers.load_tensors(trainable_parameters(run.model, run.head, run.terms), part("optimizer"))
    run.optimizers.scaler.load_state_dict(saved.state["scaler"])
    if run.average is not None:
        run.average.load_state_dict(part("average"))
    run.table_feed.load_state_dict(part("mined"))
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
    path = newest(path) if (path / run_folder.CONFIG).is_file() else path
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
    if not (paths := committed(where / run_folder.CHECKPOINTS)):
        raise ValueError(f"{where} has no checkpoint yet")
    return paths[-1]
