"""Layer-sequential unit-variance initialization (Mishkin and Matas, arXiv 1511.06422, algorithm 1).

In the order in which the layers run, each is scaled until its outputs on one batch have a standard deviation
of 1: of a convolution or fully connected layer the weights, of ARFA k (Doppelganger Mining, 4.2.2).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastmargin.models.arfa import ARFA


def lsuv(
    model: nn.Module,
    images: Tensor,  # [B, channels, H, W]
    tolerance: float = 0.1,
    tries: int = 10,
) -> None:
    """Scales the layers in place, in one forward pass. The weights should be orthonormal before. See the module.

    A layer is done once its standard deviation is within `tolerance` of 1, at the latest after `tries` scalings.

    Args:
        model: whose layers run once each, in order.
        images: [B, channels, H, W].
        tolerance: of the standard deviation.
        tries: scalings of a layer at most.

    Raises:
        ValueError: a layer whose outputs are all equal, or not finite.
    """

    def scale(layer: Any, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        for _ in range(tries):
            std = outputs.std()
            if not 0 < std < torch.inf:
                raise ValueError(f"{layer}: outputs of standard deviation {std:g}; want more than one value, finite")
            if abs(std - 1) < tolerance:
                break
            factor = layer.k if isinstance(layer, ARFA) else layer.weight
            factor /= std
            outputs = layer.forward(*inputs)
        return outputs

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear | ARFA)]
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
