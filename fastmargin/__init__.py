"""Margin-softmax heads that never store the batch x classes logits.

The public names, each imported from its module on first use (PEP 562).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "nontarget_lse": "fastmargin.ops.nontarget_lse",
    "pairwise_potential": "fastmargin.ops.pairwise_potential",
    "MarginHead": "fastmargin.head.margin_head",
    "HeadOutput": "fastmargin.head.margin_head",
    "Nearest": "fastmargin.head.class_weights",
    "LambdaSchedule": "fastmargin.margins.schedules",
    "MarginRamp": "fastmargin.margins.schedules",
    "DoppelgangerTable": "fastmargin.mining",
    "DoppelgangerBatchSampler": "fastmargin.mining",
    **dict.fromkeys(("CenterBank", "batch_means", "center_loss"), "fastmargin.losses.center"),
    "git_loss": "fastmargin.losses.git",
    "minimum_margin_loss": "fastmargin.losses.minimum_margin",
    **dict.fromkeys(("marginal_loss", "margin_based_loss", "range_loss"), "fastmargin.losses.pairs"),
    **dict.fromkeys(
        (
            "Margin", "Softmax", "NormFace", "L2Softmax", "SphereFace", "CosFace", "AMSoftmax", "ArcFace",
            "CombinedMargin", "AdaFace", "MagFace", "ElasticFace",
        ),
        "fastmargin.margins",
    ),
}  # fmt: skip

_MODULES = ("checkpoint", "compat", "evaluation", "models", "optim")

__all__ = sorted([*_HOME, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastmargin.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fastmargin' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
