"""Backbones: networks from images [B, channels, H, W] to embeddings [B, dim].

    cnn                        the small network of the default run
    iresnet18, 34, 50, 100     ArcFace's improved residual network (Deng et al. 2018)
    sphereface20               SphereFace's network of 20 layers (Liu et al. 2017), also AM-Softmax's
    mobilefacenet              under a million weights (Chen et al. 2018)
    doppelganger               the network of Doppelganger Mining (Smirnov et al. 2017), to be initialized by `lsuv`

Any other network is given by an import path, "package.module:factory". As that imports code, it is accepted from
Python only, never from a configuration file.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from fastmargin.models.cnn import cnn
from fastmargin.models.doppelganger import doppelganger
from fastmargin.models.iresnet import UNITS, iresnet
from fastmargin.models.lsuv import lsuv
from fastmargin.models.mobilefacenet import mobilefacenet
from fastmargin.models.sphereface import sphereface20

__all__ = ["FAMILIES", "build_model", "lsuv"]

Factory = Callable[..., nn.Module]

FAMILIES: dict[str, Factory] = {
    "cnn": cnn,
    **{f"iresnet{depth}": partial(iresnet, depth) for depth in UNITS},
    "sphereface20": sphereface20,
    "mobilefacenet": mobilefacenet,
    "doppelganger": doppelganger,
}


# InsightFace's names of networks, and the names here.
THEIRS = {"r18": "iresnet18", "r34": "iresnet34", "r50": "iresnet50", "r100": "iresnet100", "mbf": "mobilefacenet"}


def build_model(name: str, dim: int, size: int | Sequence[int], channels: int = 3, **options: Any) -> nn.Module:
    """A network for images of one size.

        build_model("iresnet50", 512, 112)(torch.rand(4, 3, 112, 112)).shape  # [4, 512]

    Weights are drawn from torch's global generator; the memory format of the package's own networks is channels_last,
    the faster one on a CPU.

    Args:
        name: one of `FAMILIES`, or the import path of a factory, "package.module:factory", which is called as
            factory(dim, (height, width), channels, **options).
        dim: the width of the embeddings.
        size: of the images: a side, or height and width, in pixels.
        channels: 1 for gray, 3 for RGB.
        options: `output` and `dropout` of the iresnets.

    Returns:
        A module from images [B, channels, H, W] to embeddings [B, dim].

    Raises:
        ValueError: an unknown name, a size that the network cannot take, an option it does not have, a dim or a number
            of channels below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(dim, height, width, channels) < 1:
        given = f"dim = {dim}, size = {size}, channels = {channels}"
        raise ValueError(f"dim, size and channels are at least 1, got {given}")
    if theirs := THEIRS.get(name.lower()):
        raise ValueError(f"unknown model {name!r}; want {theirs!r}, as InsightFace's is called here")
    factory = FAMILIES.get(name) or imported(name)
    for option, value in options.items():
        if option not in inspect.signature(factory).parameters:
            raise ValueError(f"model.{option} is {value!r}; want none: {name} has no such option")
    model = factory(dim, (height, width), channels, **options)
    return convert_conv2d_weight_memory_format(model, torch.channels_last) if name in FAMILIES else model


def imported(path: str) -> Factory:
    """The factory at "package.module:factory". ValueError for another kind of path, or if it cannot be imported."""
    module, _, factory = path.partition(":")
    if not (module and factory):
        raise ValueError(f"unknown model {path!r}; want one of {', '.join(FAMILIES)}, or 'package.module:factory'")
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {path!r} cannot be imported: {error}") from error
