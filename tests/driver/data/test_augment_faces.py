"""Augmentation of photographs: that it is a pure function, each step against brute force, shares and ranges."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmargin.driver.data import augment_faces as faces
from fastmargin.driver.data.augment_faces import augment_faces
from fastmargin.driver.data.augment_glyphs import to_float

COUNT = 48
INDEX, EPOCH = np.arange(COUNT) * 7, np.arange(COUNT) % 3
STEPS = ("MIRROR", "CROP", "SHIFT", "CHANNEL", "GRAY", "ERASED")


@pytest.fixture(params=["gray", "color"])
def images(request: pytest.FixtureRequest) -> Tensor:
    shape = (COUNT, 23, 31) if request.param == "gray" else (COUNT, 23, 31, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Switches off all steps except one, and may set the limit of that."""

    def switch(*kept: str, **limits: float) -> None:
        for name in STEPS:
            if name not in kept:
                monkeypatch.setattr(faces, name, 0)
        for name, value in limits.items():
            monkeypatch.setattr(faces, name, value)

    return switch


def levels(result: Tensor) -> np.ndarray:  # [B, c, H, W] float32 -> [B, H, W] or [B, H, W, 3] uint8
    back = (result * 255).round().byte()
    return (back[:, 0] if back.shape[1] == 1 else back.permute(0, 2, 3, 1)).numpy()


def test_an_image_does_not_depend_on_its_batch_or_on_threads(images: Tensor) -> None:
    before = images.clone()
    together = augment_faces(images, INDEX, EPOCH, 0)
    assert torch.equal(images, before)
    assert together.dtype == torch.float32 and together.min() >= 0 and together.max() <= 1
    assert together.shape == (COUNT, 1 if images.ndim == 3 else 3, 23, 31)
    for i in (0, 1, 17, COUNT - 1):
        assert torch.equal(augment_faces(images[i : i + 1], INDEX[i : i + 1], EPOCH[i : i + 1], 0)[0], together[i])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(augment_faces(images, INDEX, EPOCH, 0), together)
    finally:
        torch.set_num_threads(threads)


def test_seed_epoch_and_index_all_matter(images: Tensor) -> None:
    one = images[:1].expand(4, *images.shape[1:])
    results = [augment_faces(one, [0, 0, 1, 1], [0, 1, 0, 1], seed) for seed in (0, 1)]
    assert torch.pdist(torch.cat(results).flatten(1)).min() > 0.5


def test_with_all_steps_off_nothing_changes(images: Tensor, only) -> None:
    only()
    assert torch.equal(augment_faces(images, INDEX, EPOCH, 0), to_float(images))


def test_half_are_mirrored(images: Tensor, only) -> None:
    only("MIRROR")
    result = levels(augment_faces(images, INDEX, EPOCH, 0))
    plain, mirrored = images.numpy(), images.numpy()[:, :, ::-1]
    which = [(r == p).all() + 2 * (r == m).all() for r, p, m in zip(result, plain, mirrored, strict=True)]
    assert set(which) == {1, 2} and abs(which.count(2) - COUNT / 2) < 4 * np.sqrt(COUNT / 4)


def naive_window(image: np.ndarray, mirror: bool, scale: float, right: float, down: float) -> np.ndarray:
    """Pixel by pixel, in float64."""
    height, width = image.shape[:2]
    result = np.empty_like(image)
    for row in range(height):
        for column in range(width):
            y = (((row + 0.5) / height - 0.5) * scale + down + 0.5) * height
            place = width - 1 - column if mirror else column
            x = (((place + 0.5) / width - 0.5) * scale + right + 0.5) * width
            result[row, column] = image[
                int(np.clip(np.floor(y), 0, height - 1)), int(np.clip(np.floor(x), 0, width - 1))
            ]
    return result


def test_window_equals_brute_force(images: Tensor) -> None:
    draw = {name: torch.rand(8, dtype=torch.float32) for name in ("mirror", "scale", "right", "down")}
    result = faces.window(images[:8], draw)
    for i in range(8):
        scale = 1 - faces.CROP * draw["scale"][i].item()
        right, down = (faces.SHIFT * (2 * draw[name][i].item() - 1) for name in ("right", "down"))
        want = naive_window(images[i].numpy(), bool(draw["mirror"][i] < faces.MIRROR), scale, right, down)
        assert np.array_equal(result[i].numpy(), want)


def test_window_moves_both_ways_and_crops(only) -> None:
    """In an image whose rows are a ramp, the smallest and the largest value show where the window lies."""
    only("CROP", "SHIFT")
    ramp = torch.arange(200, dtype=torch.uint8)[:, None].expand(200, 8)
    shown = levels(augment_faces(ramp.expand(300, 200, 8), np.arange(300), np.zeros(300, int), 0)).astype(int)
    top, bottom = shown[:, 0, 0], 199 - shown[:, -1, 0]
    assert top.min() == bottom.min() == 0 and 15 <= top.max() <= 20 and 15 <= bottom.max() <= 20
    assert (np.diff(shown[:, :, 0], axis=1) >= 0).all() and (shown == shown[:, :, :1]).all()


def test_channels_shift_apart_by_up_to_ten_levels(only) -> None:
    only("CHANNEL")
    middle = torch.full((600, 4, 4, 3), 128, dtype=torch.uint8)
    result = levels(augment_faces(middle, np.arange(600), np.zeros(600, int), 0)).astype(int) - 128
    assert (result == result[:, :1, :1]).all()
    shifts = result[:, 0, 0]  # [600, 3]
    assert set(shifts.ravel()) == set(range(-10, 11))
    counts = np.bincount(shifts.ravel() + 10)
    assert ((counts - 1800 / 21) ** 2 / (1800 / 21)).sum() < 45.3  # chi squared, 20 degrees, one in a thousand
    assert np.abs(np.corrcoef(shifts.T)[np.triu_indices(3, 1)]).max() < 4 / np.sqrt(600)
    for level, lowest, highest in ((0, 0, 10), (255, 245, 255)):
        edge = levels(augment_faces(torch.full_like(middle, level), np.arange(600), np.zeros(600, int), 0))
        assert edge.min() == lowest and edge.max() == highest  # saturated, not wrapped
    gray = levels(augment_faces(middle[..., 0], np.arange(600), np.zeros(600, int), 0)).astype(int) - 128
    assert np.array_equal(gray, result[..., 0])


def test_a_tenth_loses_its_color_as_pillow_would(only) -> None:
    only("GRAY")
    colored = torch.randint(0, 256, (1500, 3, 4, 3), dtype=torch.uint8)
    result = levels(augment_faces(colored, np.arange(1500), np.zeros(1500, int), 0))
    lost = (result == result[..., :1]).all((1, 2, 3))
    assert abs(lost.sum() - 150) < 4 * np.sqrt(1500 * 0.09)
    assert np.array_equal(result[~lost], colored.numpy()[~lost])
    want = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in colored.numpy()[lost]])
    assert np.array_equal(result[lost][..., 0], want)


def test_a_quarter_loses_a_rectangle(only) -> None:
    only("ERASED")
    rows, columns = 50, 40
    images = torch.randint(0, 256, (800, rows, columns, 3), dtype=torch.uint8)
    result = levels(augment_faces(images, np.arange(800), np.zeros(800, int), 0))
    changed = (result != images.numpy()).any(-1)
    hit = changed.any((1, 2))
    assert abs(hit.sum() - 200) < 4 * np.sqrt(800 * 0.25 * 0.75)
    heights, widths, tops, lefts, values = [], [], [], [], []
    for one, mask in zip(result[hit], changed[hit], strict=True):
        r, c = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        patch = one[r[0] : r[-1] + 1, c[0] : c[-1] + 1]
        assert (patch == patch[0, 0, 0]).all()  # one level everywhere
        heights.append(len(patch)), widths.append(patch.shape[1]), tops.append(r[0]), lefts.append(c[0])
        values.append(patch[0, 0, 0])
    for found, side in ((heights, rows), (widths, columns)):
        assert 0.1 * side <= min(found) < 0.15 * side and 0.35 * side < max(found) <= 0.4 * side
    assert min(tops) == min(lefts) == 0 and max(np.add(tops, heights)) == rows and max(np.add(lefts, widths)) == columns
    assert min(values) < 20 and max(values) > 235
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 4 / np.sqrt(len(heights))


@pytest.mark.parametrize("shape", [(0, 32, 32), (0, 32, 32, 3), (2, 1, 1), (3, 5, 4, 3)])
def test_empty_batches_and_tiny_images(shape: tuple[int, ...]) -> None:
    count = shape[0]
    result = augment_faces(torch.zeros(shape, dtype=torch.uint8), np.arange(count), np.zeros(count, int), 0)
    assert result.shape == (count, 1 if len(shape) == 3 else 3, *shape[1:3])
