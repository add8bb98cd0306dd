"""The sets of augmentations by name, and which of them a configuration has."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.augment_faces import augment_faces
from fastmargin.driver.data.augment_glyphs import augment, to_float
from fastmargin.driver.data.sources import KINDS, recognize

Indices = NDArray[np.int64]
Augment = Callable[
    [Tensor, Indices, Indices, int], Tensor
]  # (images, index, epoch, seed): see `augment_glyphs.augment`

AUGMENTS: dict[str, Augment] = {
    "none": lambda images, index, epoch, seed: to_float(images),
    "glyphs": augment,
    "faces": augment_faces,
}


def augmentation(config: DataConfig) -> str:
    """The name in AUGMENTS: that of the configuration, or the default for the kind of its source."""
    return config.augment or KINDS[recognize(config.source)].augment
