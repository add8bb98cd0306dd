"""Distances within and between classes, and the mirror trick.

Distances, as in the tables of Git loss (section 4.1.3), of embeddings that are not normalized:

    intra = mean over the classes of the mean of ||f - c|| over the class      c: the mean of the class
    inter = mean over the pairs of classes of ||c_i - c_j||

The public code of Git loss averages these over batches and over checkpoints; here they are over all images at once.

Mirror trick: the embedding of an image and that of its mirror image are combined into one, before normalization.
"""

from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastmargin.evaluation.arrays import Array, blocks, identities, vectors
from fastmargin.evaluation.identification import prototypes

Mirror: TypeAlias = Literal["mean", "sum", "concat"]


def class_distances(
    embeddings: Array,  # [N, d]
    labels: Array,  # [N]
) -> tuple[float, float]:
    """The mean distances between and within classes; see the module. Time O(N d + classes^2 d).

    Args:
        embeddings: [N, d], not normalized here.
        labels: [N] of any kind.

    Returns:
        (inter, intra), in the units of the features.

    Raises:
        ValueError: fewer than two classes, wrong shapes, rows that are not finite.
    """
    rows = vectors(embeddings)
    identity = identities(labels, len(rows))
    centers, _ = prototypes(rows, identity)
    if len(centers) < 2:
        raise ValueError(f"{len(centers)} classes; want at least 2")
    radius = np.linalg.norm(rows - centers[identity], axis=1)
    intra = np.bincount(identity, radius) / np.bincount(identity)
    all_centers, exact = torch.from_numpy(centers), "donot_use_mm_for_euclid_dist"
    total = sum(
        torch.cdist(all_centers[block], all_centers, compute_mode=exact).sum().item()
        for block in blocks(len(centers), len(centers))
    )
    return total / (len(centers) * (len(centers) - 1)), float(intra.mean())


def mirrored(
    plain: Tensor,  # [N, d] embeddings of images
    flipped: Tensor,  # [N, d] of their mirror images
    mode: Mirror,
) -> Tensor:  # [N, d], or [N, 2 d]
    """One embedding of an image and its mirror image.

    Args:
        plain: [N, d] of the images.
        flipped: [N, d] of their mirror images.
        mode: "mean" (Doppelganger Mining 4.2.3), "sum" (AM-Softmax 4.2, InsightFace; the same cosines as the mean) or
            "concat" (Minimum Margin Loss III.A).

    Returns:
        [N, d], or [N, 2 d] with "concat".

    Raises:
        ValueError: another mode, shapes that differ.
    """
    if plain.shape != flipped.shape or plain.ndim != 2:
        raise ValueError(f"embeddings have shapes {[*plain.shape]} and {[*flipped.shape]}; want [N, d] twice")
    if mode not in ("mean", "sum", "concat"):
        raise ValueError(f"mirror is {mode!r}; want one of mean, sum, concat")
    if mode == "concat":
        return torch.cat([plain, flipped], dim=1)
    return plain + flipped if mode == "sum" else (plain + flipped) / 2
