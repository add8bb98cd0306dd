"""The newest checkpoint of a run, its network without the head, and the embeddings of images by it.

No data, head or optimizer is built: for `export`, `embed` and `verify`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastmargin import checkpoint
from fastmargin.checkpoint.store import part_of
from fastmargin.distributed.layout import Group
from fastmargin.driver.config import DataConfig, TrainConfig
from fastmargin.driver.data.augment_glyphs import to_float
from fastmargin.driver.data.identities import Identities, Stored
from fastmargin.driver.data.sources import load_all
from fastmargin.driver.data.sources.pixels import Color
from fastmargin.driver.log import Log
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.processes import pick_device
from fastmargin.models import build_model


class Backbone(NamedTuple):
    """The network of a checkpoint, in evaluation mode."""

    config: TrainConfig
    network: nn.Module
    input_shape: tuple[int, int, int]  # channels, height, width
    step: int


def build_backbone(
    config: TrainConfig,
    input_shape: Sequence[int],  # channels, height, width
    factory: str | None = None,
) -> nn.Module:
    """factory: import path of a network of the caller's own, instead of config.model.name."""
    channels, height, width = input_shape
    name = factory or config.model.name
    return build_model(name, config.dim, (height, width), channels, **config.model.arguments())


def check_factory(saved: checkpoint.Checkpoint, config: TrainConfig, factory: str | None) -> None:
    """ValueError if the checkpoint's network was made by another factory."""
    if (theirs := saved.state.get("factory")) != factory:
        usual = config.model.name
        raise ValueError(f"the run's network is {theirs or usual}; here it is {factory or usual}: see train.train")


def network_weights(
    tensors: Mapping[str, Tensor],  # of a checkpoint
) -> dict[str, Tensor]:
    """The network's weights as they are evaluated: the average (optim.ema), where the run has one."""
    return part_of(tensors, "average") or part_of(tensors, "model")


def find_newest(where: Path, log: Log, group: Group | None = None) -> checkpoint.Checkpoint | None:
    """The newest checkpoint of a run that verifies, in a group on all ranks; None if the run has none yet.

    ValueError if there are some and none verifies.
    """
    saved = checkpoint.load_latest(where / run_folder.CHECKPOINTS, group=group)
    for warning in [] if saved is None else saved.warnings:
        log(f"passed over a damaged checkpoint: {warning}")
    return saved


def newest(where: Path, log: Log, group: Group | None = None) -> checkpoint.Checkpoint:
    """As `find_newest`; ValueError if there is none yet, too."""
    saved = find_newest(where, log, group)
    if saved is None:
        raise ValueError(f"{where} has no checkpoint yet")
    return saved


def log_step(saved: checkpoint.Checkpoint, config: TrainConfig, log: Log) -> None:
    log(f"checkpoint of step {saved.step} of {config.optim.steps}")


def load_backbone(where: Path, log: Log, factory: str | None = None, device: str | None = "cpu") -> Backbone:
    """The network of the newest checkpoint of a run. device: None is a GPU where there is one.

    ValueError if the folder holds no run, no checkpoint yet, or a network made by another factory.
    """
    config = run_folder.read_config(where)
    saved = newest(where, log)
    log_step(saved, config, log)
    check_factory(saved, config, factory)
    channels, height, width = saved.state["input"]
    network = build_backbone(config, (channels, height, width), factory)
    network.load_state_dict(network_weights(saved.tensors))
    return Backbone(config, network.eval().to(pick_device(device)), (channels, height, width), saved.step)


def adapted(backbone: Backbone, source: str | None) -> DataConfig:
    """Configuration of a source, in the size and color that the network takes; None: the run's own source."""
    if source is None:
        return backbone.config.data
    channels, height, _ = backbone.input_shape
    color: Color = "gray" if channels == 1 else "rgb"
    return replace(backbone.config.data, source=source, size=height, color=color, fonts=None)


def load(backbone: Backbone, config: DataConfig, log: Log) -> Identities:
    """All identities of a source, held out or not. ValueError for images of another shape than the network takes."""
    identities = load_all(config, log)
    if identities.input_shape != backbone.input_shape:
        shapes = (" x ".join(map(str, shape)) for shape in (identities.input_shape, backbone.input_shape))
        raise ValueError("{}: images are {}; want {}, as in the run".format(config.source, *shapes))
    return identities


EMBED = 512  # images embedded at once


@torch.inference_mode()
def embed_images(
    model: nn.Module,
    images: Tensor | Stored,  # [N, H, W] or [N, H, W, 3] uint8
) -> Tensor:  # [N, d], in host memory
    """Embeddings in evaluation mode, computed on the model's device; the mode is restored afterward."""
    training, device = model.training, next((p.device for p in model.parameters()), "cpu")
    model.eval()
    blocks = np.array_split(np.arange(len(images)), range(EMBED, len(images), EMBED))
    embeddings = torch.cat([model(to_float(images[block]).to(device)).cpu() for block in blocks])
    model.train(training)
    return embeddings
