"""Margin-softmax heads that never store the batch x classes logits.

The public names, each imported from its home on first use (PEP 562).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "nontarget_lse": "fastmargin.ops.nontarget_lse",
    "MarginHead": "fastmargin.head",
    "HeadOutput": "fastmargin.head",
    "LambdaSchedule": "fastmargin.schedules",
    "MarginRamp": "fastmargin.schedules",
    "DoppelgangerTable": "fastmargin.mining",
    "DoppelgangerBatchSampler": "fastmargin.mining",
    **dict.fromkeys(
        (
            "Margin", "Softmax", "NormFace", "L2Softmax", "SphereFace", "CosFace", "AMSoftmax", "ArcFace",
            "CombinedMargin", "AdaFace", "MagFace", "ElasticFace",
        ),
        "fastmargin.margins",
    ),
}  # fmt: skip

_MODULES = ("evaluation", "models")

__all__ = sorted([*_HOME, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastmargin.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fastmargin' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
