"""Augmentation of characters: that it is a pure function, each step against brute force, ranges and moments."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmargin.driver.data import augment_glyphs as aug
from fastmargin.driver.data.augment_glyphs import augment, to_float
from fastmargin.driver.data.order import hash64


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Blobs of gray on black, 32 x 32, different everywhere."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randint(0, 256, (64, 24, 24), dtype=torch.uint8, generator=generator)
    return torch.nn.functional.pad(inner, (4, 4, 4, 4))


INDEX, EPOCH = np.arange(64) * 7, np.arange(64) % 3


def test_to_float_keeps_black_and_white(images: Tensor) -> None:
    result = to_float(images)
    assert result.shape == (64, 1, 32, 32) and result.dtype == torch.float32
    assert torch.equal(result[:, 0].double(), (images.double() / 255).float().double())
    assert result.min() == 0 and result.max() == 1


def test_an_image_does_not_depend_on_its_batch(images: Tensor) -> None:
    together = augment(images, INDEX, EPOCH, 0)
    assert together.shape == (64, 1, 32, 32) and together.dtype == torch.float32
    for i in (0, 1, 31, 63):
        alone = augment(images[i : i + 1], INDEX[i : i + 1], EPOCH[i : i + 1], 0)
        assert torch.equal(alone[0], together[i])
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1)).numpy()
    assert torch.equal(augment(images[shuffled], INDEX[shuffled], EPOCH[shuffled], 0), together[shuffled])


def test_colored_images_are_warped_as_gray_ones(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    monkeypatch.setattr(aug, "NOISE", 0.0)
    colored = torch.stack([images, images.flip(1), images.flip(2)], dim=-1)
    assert torch.equal(to_float(colored)[:, 1], to_float(images.flip(1))[:, 0])
    result = augment(colored, INDEX, EPOCH, 0)
    assert result.shape == (64, 3, 32, 32)
    for channel in range(3):
        gray = augment(colored[..., channel], INDEX, EPOCH, 0)
        torch.testing.assert_close(result[:, channel : channel + 1], gray, rtol=0, atol=1e-6)
    monkeypatch.undo()
    noise = augment(colored, INDEX, EPOCH, 0) - result
    assert (
        noise.std() > 0.02
        and abs(np.corrcoef(noise.flatten(2).numpy()[:, 0].ravel(), noise[:, 1].flatten())[0, 1]) < 0.02
    )


def test_an_image_does_not_depend_on_threads(images: Tensor) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(augment(images, INDEX, EPOCH, 0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_seed_epoch_and_index_all_matter(images: Tensor) -> None:
    one = images[:1].expand(4, -1, -1)
    results = [
        augment(one, [0, 0, 1, 1], [0, 1, 0, 1], 0),
        augment(one, [0, 0, 1, 1], [0, 1, 0, 1], 1),
    ]
    flat = torch.cat(results).flatten(1)
    assert torch.pdist(flat).min() > 0.5  # no two of the eight are alike


def test_range_and_input_are_kept(images: Tensor) -> None:
    before = images.clone()
    result = augment(images, INDEX, EPOCH, 0)
    assert torch.equal(images, before)
    assert result.min() > -6 * aug.NOISE and result.max() < 1 + 6 * aug.NOISE
    assert abs(result.mean() - to_float(images).mean()) < 0.02


def test_noise_level_is_uniform_up_to_the_limit() -> None:
    black = torch.zeros(400, 32, 32, dtype=torch.uint8)
    sigma = augment(black, np.arange(400), np.zeros(400, int), 0).flatten(1).std(1) / aug.NOISE
    assert sigma.max() < 1.1 and sigma.min() < 0.02
    assert abs(sigma.mean() - 0.5) < 4 / math.sqrt(12 * 400)


def test_half_of_the_images_are_blurred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aug, "NOISE", 0.0)
    monkeypatch.setattr(aug, "warp", lambda images, amounts: images)
    point = torch.zeros(400, 5, 5, dtype=torch.uint8)
    point[:, 2, 2] = 255
    center = augment(point, np.arange(400), np.zeros(400, int), 0)[:, 0, 2, 2]
    assert set(center.tolist()) == {0.25, 1.0}
    assert abs((center < 1).sum().item() - 200) < 4 * 10


def test_empty_batch_and_odd_pixel_count() -> None:
    assert augment(torch.zeros(0, 32, 32, dtype=torch.uint8), [], [], 0).shape == (0, 1, 32, 32)
    assert augment(torch.zeros(2, 5, 5, dtype=torch.uint8), [0, 1], [0, 0], 0).shape == (2, 1, 5, 5)


def naive_warp(image: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """Bilinear sampling, pixel by pixel, in float64."""
    angle, scale, shear, right, down = amounts * [math.radians(8), 0.1, 0.12, 0.12, 0.12]
    turn = (1 + scale) * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[1, shear], [0, 1]])
    side = len(image)
    padded = np.pad(image, 2 * side)
    result = np.zeros_like(image)
    for row in range(side):
        for column in range(side):
            u = (2 * np.array([column, row]) + 1) / side - 1
            x, y = ((matrix @ u + [right, down] + 1) * side - 1) / 2 + 2 * side
            i, j = int(y), int(x)
            top = (1 - x + j) * padded[i, j] + (x - j) * padded[i, j + 1]
            bottom = (1 - x + j) * padded[i + 1, j] + (x - j) * padded[i + 1, j + 1]
            result[row, column] = (1 - y + i) * top + (y - i) * bottom
    return result


def test_warp_equals_brute_force() -> None:
    generator = torch.Generator().manual_seed(2)
    pictures = torch.rand(6, 1, 9, 9, generator=generator)
    amounts = 2 * torch.rand(6, 5, generator=generator) - 1
    amounts[0] = 0
    amounts[1] = torch.tensor([1.0, 1, 1, 1, 1])
    result = aug.warp(pictures, amounts)
    for picture, amount, got in zip(pictures, amounts, result, strict=True):
        want = naive_warp(picture[0].double().numpy(), amount.double().numpy())
        assert np.abs(got[0].numpy() - want).max() < 1e-5
    assert (result[0] - pictures[0]).abs().max() < 1e-6


def test_blur_is_the_binomial_filter() -> None:
    pictures = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    want = torch.nn.functional.conv2d(pictures, (line[:, None] * line)[None, None], padding=1)
    assert (aug.blur(pictures) - want).abs().max() < 1e-6


def test_uniform_and_gaussian_draws_have_their_moments() -> None:
    words = aug.stream(hash64(0, np.arange(500)), 0, 400)
    flat = aug.uniform(words >> np.uint64(32)).ravel()
    n = flat.size
    assert flat.min() > 0 and flat.max() < 1
    assert abs(flat.mean() - 0.5) < 4 / math.sqrt(12 * n)
    normal = aug.gaussian(words)
    assert normal.shape == (500, 800) and normal.dtype == np.float32
    x = normal.astype(float)
    assert abs(x.mean()) < 4 / math.sqrt(2 * n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / (2 * n))
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / (2 * n))
    assert np.abs(np.corrcoef(x[:20])[np.triu_indices(20, 1)]).max() < 5 / math.sqrt(800)  # between images
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 4 / math.sqrt(2 * n)  # between neighboring pixels
    assert abs((x[:, :400] * x[:, 400:]).mean()) < 4 / math.sqrt(n)  # between the two numbers of one word
