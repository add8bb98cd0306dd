"""What a checkpoint of a run holds, and how a run is restored from one, or started from the weights of another run.

Images, their order, their augmentation and the random numbers of a step are functions of (seed, step); everything else
that a step reads and changes is in the checkpoint. Of N processes each writes the rows of its own classes, and rank 0
everything else; any number of processes can resume from that.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin.checkpoint import Checkpoint, Sharded, load
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.order import UniformBatches
from fastmargin.driver.log import Log
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.backbone import check_factory, find_newest, log_step, network_weights, newest
from fastmargin.driver.training.run import Run, trainable_parameters
from fastmargin.head.margin_head import MarginHead
from fastmargin.mining import DoppelgangerBatchSampler

COUNTER = "counter._extra_state"  # of a head's state_dict: the number of forward passes in training


def resume(run: Run, where: Path, log: Log) -> bool:
    """Restores the newest checkpoint of the folder; False if there is none. ValueError if it does not fit."""
    saved = find_newest(where, log, run.processes.host)
    if saved is None:
        return False
    restore(run, saved)
    log_step(saved, run.config, log)
    return True


def tensors(run: Run) -> dict[str, Tensor | Sharded]:
    """All tensors that the next step depends on, and the cosines kept for the report."""
    trained = trainable_parameters(run.model, run.head, run.terms)
    parts = {
        "optimizer": run.optimizers.tensors(trained),  # first: it applies pending lazy updates to the head's weight
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
    return {name: Sharded(t, start, total) if is_per_class(name, t.shape) else t for name, t in named.items()}


def is_per_class(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor has a row for each class: the head's weight, and its optimizer state."""
    return name == "head/weight" or (name.startswith("optimizer/head.weight.") and len(shape) > 0)


def local_part(saved: Checkpoint, part: str, head: MarginHead) -> dict[str, Tensor]:
    """As `checkpoint.store.part_of`, but of the tensors with a row per class only the rows of this rank's classes."""
    names, shape = [name for name in saved.tensors if name.startswith(f"{part}/")], saved.tensors.shape
    rows = {name: head.class_range if is_per_class(name, shape(name)) else (0, None) for name in names}
    return {name.removeprefix(f"{part}/"): saved.tensors.rows(name, *of) for name, of in rows.items()}


def load_head(head: MarginHead, saved: Checkpoint, passes: int) -> None:
    """passes: forward passes made in training. Heads with sampled classes and heads in a group count them."""
    head.load_state_dict(local_part(saved, "head", head) | {COUNTER: torch.tensor(passes)})


def state(run: Run) -> dict[str, Any]:
    """What is no tensor, as JSON."""
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
    """Restores a checkpoint into a run that has just been built. ValueError for other images or another network."""
    check_factory(saved, run.config, run.factory)
    check_images(saved, run.train)
    part = partial(local_part, saved, head=run.head)
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
    """ValueError unless these are the images that the run of the checkpoint is trained on."""
    if saved.state["data"] != images.fingerprint:
        raise ValueError("the run was trained on other images: they, or what reads or draws them, have changed")


def start_from(run: Run, path: Path, log: Log) -> None:
    """Takes over weights of another run, and nothing else: those of the network and, where that run was trained on the
    same images, those of head and terms that both runs have.

    path: a checkpoint, or a run, of which the newest is taken. ValueError for weights of other shapes.
    """
    if (path / run_folder.CONFIG).is_file():
        saved = newest(path, log, run.processes.host)
    else:
        saved = load(path, rank=run.processes.rank, ranks=run.processes.count)
    same = saved.state["data"] == run.train.fingerprint
    try:
        for network in {run.model, run.network}:
            network.load_state_dict(network_weights(saved.tensors))
        if same:
            own = run.head.state_dict()  # with another margin, theirs may lack some tensors or have others
            theirs = local_part(saved, "head", run.head)
            run.head.load_state_dict(own | {k: t for k, t in theirs.items() if k in own and k != COUNTER})
            run.terms.load_state_dict(local_part(saved, "terms", run.head), strict=False)
    except RuntimeError as error:
        raise ValueError(f"{saved.path} holds the weights of another network, head or term: {error}") from error
    others = "" if same else "; it saw other images, so head and terms start afresh"
    log(f"weights of step {saved.step} of {saved.path}{others}")
