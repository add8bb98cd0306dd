"""Pictures to pixels: decoded and fitted by Pillow to size x size, gray or in color.

A picture that is not square is cut to its middle square. Scaling is bicubic, over all pixels that go into one (so it
does not alias); a picture of the right size keeps its pixels. Gray is Pillow's "L", 0.299 R + 0.587 G + 0.114 B.
"""

from importlib.util import find_spec
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Color = Literal["gray", "rgb"]

# Without EPS, which would start another program. Older versions of Pillow have no AVIF.
AVIF = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", *AVIF)
MODES: dict[Color, str] = {"gray": "L", "rgb": "RGB"}
GRAY_MODES = ("1", "L", "LA", "La")


def decode(data: bytes, size: int, color: Color) -> NDArray[np.uint8]:  # [size, size] or [size, size, 3]
    """An encoded picture, turned upright. Raises what Pillow does for a damaged one; ValueError for 16 or 32 bits."""
    with opened(data) as image:
        image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
        return fit(ImageOps.exif_transpose(image), size, color)


def own_color(data: bytes) -> Color:
    """Raises as `decode`, where already the header is damaged."""
    with opened(data) as image:
        return "gray" if image.mode in GRAY_MODES else "rgb"


def opened(data: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # its message would name the BytesIO
        raise ValueError(f"its {len(data)} bytes are no picture of {', '.join(FORMATS)}") from error
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
        raise ValueError(f"pixels of mode {image.mode}; want 8 bits a channel")
    return image


def fit(image: Image.Image, size: int, color: Color) -> NDArray[np.uint8]:  # [size, size] or [size, size, 3]
    return np.asarray(ImageOps.fit(image.convert(MODES[color]), (size, size)))


def fit_all(
    images: Tensor,  # [N, H, W] or [N, H, W, 3] uint8
    size: int | None,
    color: Color | None,
) -> Tensor:  # [N, size, size] or [N, size, size, 3] uint8
    """Fits images in memory; None keeps their size or color. ValueError if they are not square and size is None."""
    height, width = images.shape[1:3]
    if size is None and height != width:
        raise ValueError(f"the images are {height} x {width}; want squares, or data.size to fit them to")
    own: Color = "gray" if images.ndim == 3 else "rgb"
    size, color = size or width, color or own
    if (size, size, color) == (height, width, own):
        return images
    return torch.from_numpy(np.stack([fit(Image.fromarray(image), size, color) for image in images.numpy()]))
