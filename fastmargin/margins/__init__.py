"""Margins: psi, which replaces the target's cosine, by family; what they share is in base.py and angles.py."""

from fastmargin.margins.adaptive import AdaFace, ElasticFace, MagFace
from fastmargin.margins.angular import AMSoftmax, ArcFace, CombinedMargin, CosFace, NormFace, SphereFace
from fastmargin.margins.base import Margin
from fastmargin.margins.plain import L2Softmax, Softmax
from fastmargin.margins.schedules import LambdaSchedule, MarginRamp, Schedule

__all__ = [
    "AMSoftmax",
    "AdaFace",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "ElasticFace",
    "L2Softmax",
    "LambdaSchedule",
    "MagFace",
    "Margin",
    "MarginRamp",
    "NormFace",
    "Schedule",
    "Softmax",
    "SphereFace",
]
