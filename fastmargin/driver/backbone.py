"""The network of a run, without its data and its head."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from fastmargin.driver import checkpoint, folder
from fastmargin.driver.config import TrainConfig
from fastmargin.models import build_model

Log = Callable[[str], None]


def build_backbone(config: TrainConfig, factory: str | None = None) -> nn.Module:
    """factory: import path of a network of the caller's own, instead of config.model.name."""
    return build_model(factory or config.model.name, config.dim, config.data.size, **config.model.arguments())


def check_factory(saved: checkpoint.Checkpoint, config: TrainConfig, factory: str | None) -> None:
    """ValueError if the checkpoint's network was made by another factory."""
    if (theirs := saved.state.get("factory")) != factory:
        usual = config.model.name
        raise ValueError(f"the run's network is {theirs or usual}; here it is {factory or usual}: see engine.train")


def load_backbone(where: Path, log: Log, factory: str | None = None) -> tuple[TrainConfig, nn.Module, int]:
    """Configuration, network in evaluation mode and step of the newest checkpoint of a run.

    ValueError if the folder holds no run, no checkpoint yet, or a network made by another factory.
    """
    config = folder.read_config(where)
    saved = checkpoint.load_latest(where / folder.CHECKPOINTS)
    if saved is None:
        raise ValueError(f"{where} has no checkpoint yet")
    for warning in saved.warnings:
        log(f"passed over a damaged checkpoint: {warning}")
    log(f"checkpoint of step {saved.step} of {config.optim.steps}")
    check_factory(saved, config, factory)
    model = build_backbone(config, factory)
    model.load_state_dict({k.removeprefix("model/"): v for k, v in saved.tensors.items() if k.startswith("model/")})
    return config, model.eval(), saved.step
