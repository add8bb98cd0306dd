"""Margin-softmax heads that never store the batch x classes logits.

The public names. Each is imported from its module on first use (PEP 562); type checkers read the imports below.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmargin import checkpoint, compat, evaluation, models, optim
    from fastmargin.head.class_weights import Nearest
    from fastmargin.head.margin_head import HeadOutput, MarginHead
    from fastmargin.losses.center import CenterBank, batch_means, center_loss
    from fastmargin.losses.git import git_loss
    from fastmargin.losses.minimum_margin import minimum_margin_loss
    from fastmargin.losses.pairs import margin_based_loss, marginal_loss, range_loss
    from fastmargin.margins.adaptive import AdaFace, ElasticFace, MagFace
    from fastmargin.margins.angular import AMSoftmax, ArcFace, CombinedMargin, CosFace, NormFace, SphereFace
    from fastmargin.margins.base import Margin
    from fastmargin.margins.plain import L2Softmax, Softmax
    from fastmargin.margins.schedules import LambdaSchedule, MarginRamp
    from fastmargin.mining import DoppelgangerBatchSampler, DoppelgangerTable
    from fastmargin.ops.nontarget_lse import nontarget_lse
    from fastmargin.ops.pairwise_potential import pairwise_potential

__version__ = "0.1.0"

__all__ = [
    "AMSoftmax", "AdaFace", "ArcFace", "CenterBank", "CombinedMargin", "CosFace", "DoppelgangerBatchSampler",
    "DoppelgangerTable", "ElasticFace", "HeadOutput", "L2Softmax", "LambdaSchedule", "MagFace", "Margin", "MarginHead",
    "MarginRamp", "Nearest", "NormFace", "Softmax", "SphereFace", "__version__", "batch_means", "center_loss",
    "checkpoint", "compat", "evaluation", "git_loss", "margin_based_loss", "marginal_loss", "minimum_margin_loss",
    "models", "nontarget_lse", "optim", "pairwise_potential", "range_loss",
]  # fmt: skip

_NAMES = {  # a public name that is not here is a module
    "fastmargin.head.class_weights": ("Nearest",),
    "fastmargin.head.margin_head": ("HeadOutput", "MarginHead"),
    "fastmargin.losses.center": ("CenterBank", "batch_means", "center_loss"),
    "fastmargin.losses.git": ("git_loss",),
    "fastmargin.losses.minimum_margin": ("minimum_margin_loss",),
    "fastmargin.losses.pairs": ("margin_based_loss", "marginal_loss", "range_loss"),
    "fastmargin.margins.adaptive": ("AdaFace", "ElasticFace", "MagFace"),
    "fastmargin.margins.angular": ("AMSoftmax", "ArcFace", "CombinedMargin", "CosFace", "NormFace", "SphereFace"),
    "fastmargin.margins.base": ("Margin",),
    "fastmargin.margins.plain": ("L2Softmax", "Softmax"),
    "fastmargin.margins.schedules": ("LambdaSchedule", "MarginRamp"),
    "fastmargin.mining": ("DoppelgangerBatchSampler", "DoppelgangerTable"),
    "fastmargin.ops.nontarget_lse": ("nontarget_lse",),
    "fastmargin.ops.pairwise_potential": ("pairwise_potential",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:  # so that a name which does not exist is an error for type checkers, too

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'fastmargin' has no attribute {name!r}")
        if name not in _HOME:
            return importlib.import_module(f"fastmargin.{name}")
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
