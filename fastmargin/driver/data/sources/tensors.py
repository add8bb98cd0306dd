"""Images in a safetensors file.

    images   uint8 [N, H, W], [N, H, W, 3] or [N, 3, H, W]
    labels   int64 [N], any numbers from 0 on

The metadata may hold "names", a JSON list with the name of every label; else the name of an identity is its label.
All images are read into memory.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.identities import Identities, dense
from fastmargin.driver.data.sources.pixels import fit_all
from fastmargin.driver.log import Log


def load_tensors(config: DataConfig, log: Log) -> Identities:
    """ValueError if the tensors are missing or of another kind."""
    path = Path(config.source)
    try:
        with safe_open(path, "pt") as file:
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}; want a safetensors file with images and labels") from error
    check(path, images, labels)
    order, values = dense(labels)
    names = names_of(path, metadata, values.tolist())
    return Identities(fit_all(channels_last(images), config.size, config.color), order, names)


def check(path: Path, images: Tensor, labels: Tensor) -> None:
    colored = images.ndim == 4 and 3 in (images.shape[1], images.shape[3])
    if images.dtype != torch.uint8 or not (images.ndim == 3 or colored) or images.numel() == 0:
        raise ValueError(
            f"{path}: images are {images.dtype} {list(images.shape)}; "
            "want uint8 [N, H, W], [N, H, W, 3] or [N, 3, H, W]"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; want int64 [{len(images)}]")
    if labels.min() < 0:
        raise ValueError(f"{path}: label {labels.argmin()} is {labels.min()}; want 0 or more")


def channels_last(
    images: Tensor,  # [N, H, W], [N, H, W, 3] or [N, 3, H, W]
) -> Tensor:  # [N, H, W] or [N, H, W, 3]
    return images if images.ndim == 3 or images.shape[3] == 3 else images.permute(0, 2, 3, 1).contiguous()


def names_of(path: Path, metadata: dict[str, str], values: list[int]) -> list[str]:
    """The names of these labels. ValueError if the metadata has too few names, or one twice."""
    if "names" not in metadata:
        return [str(value) for value in values]
    try:
        names = json.loads(metadata["names"])
        given = [str(names[value]) for value in values]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: no name for each label up to {values[-1]} in the metadata: {error}") from error
    if len(set(given)) < len(given):
        raise ValueError(f"{path}: two labels have one name in the metadata; want a name of its own for each")
    return given
