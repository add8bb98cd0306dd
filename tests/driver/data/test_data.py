"""Identities, their split and the images to compare; data order: a bijection, a pure function, its distribution."""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmargin.driver.data.identities import Identities, dense
from fastmargin.driver.data.order import Permutation, UniformBatches, hash64, mix64
from fastmargin.driver.data.sources.glyphs import first_code_point


def toy_identities(names: list[str], each: int = 3) -> Identities:
    """`each` images per identity; every pixel is the number of its image."""
    count = each * len(names)
    images = torch.arange(count, dtype=torch.uint8)[:, None, None].expand(count, 4, 4)
    return Identities(images.clone(), torch.arange(len(names)).repeat_interleave(each), names)


# Hash


def test_mix64_gives_the_published_splitmix64_sequence() -> None:
    state = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_hash_depends_on_every_word_and_on_their_order() -> None:
    keys = [(1, 2, 3), (1, 3, 2), (3, 2, 1), (1, 2), (1, 2, 0), (0, 1, 2), (-1, 2, 3), (2**63 - 1, 2, 3)]
    assert len({hash64(*key).item() for key in keys}) == len(keys)
    assert hash64(7, np.arange(5), 9)[3] == hash64(7, 3, 9).item()


# Split


def test_split_is_by_md5_of_seed_and_first_code_point() -> None:
    names = [chr(code) + "x" for code in range(0x100, 0x300)]
    train, test = toy_identities(names, each=1).split(0.2, 5, first_code_point)
    fraction = [int(hashlib.md5(f"5:{ord(name[0])}".encode()).hexdigest(), 16) / 2**128 for name in names]
    assert test.names == [name for name, part in zip(names, fraction, strict=True) if part < 0.2]
    assert sorted(train.names + test.names) == sorted(names)
    assert 0.13 < test.num_classes / len(names) < 0.27  # four standard deviations


def test_split_keeps_each_identitys_images_under_dense_labels() -> None:
    whole = toy_identities([chr(code) for code in range(65, 91)])
    for part in whole.split(0.5, 0):
        assert part.num_classes > 5 and part.labels.unique().tolist() == list(range(part.num_classes))
        for label, name in enumerate(part.names):
            images = whole.images[whole.labels == whole.names.index(name)]
            assert torch.equal(part.images[part.labels == label], images)


def test_split_is_stable_when_an_identity_goes() -> None:
    names = [chr(code) for code in range(65, 91)]
    _, test = toy_identities(names).split(0.4, 1)
    for gone in (names[0], test.names[0], test.names[-1]):
        _, again = toy_identities([name for name in names if name != gone]).split(0.4, 1)
        assert again.names == [name for name in test.names if name != gone]


def test_split_seed_and_share() -> None:
    whole = toy_identities([chr(code) for code in range(65, 91)])
    assert whole.split(0.4, 1)[1].names != whole.split(0.4, 2)[1].names
    assert set(whole.split(0.2, 1)[1].names) < set(whole.split(0.6, 1)[1].names)
    train, test = whole.split(0, 1)
    assert train.names == whole.names and test.num_classes == len(test.images) == 0
    for holdout in (-0.1, 1.0):
        with pytest.raises(ValueError, match=str(holdout)):
            whole.split(holdout, 0)


def test_two_identities_that_can_be_compared_are_always_held_out() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 3, 4, 4])  # the first and the fourth have one image
    images = torch.zeros(8, 4, 4, dtype=torch.uint8)
    for seed in range(50):
        data = Identities(images, labels, list("abcde"))
        train, test = data.split(1e-6, seed)
        order = sorted("bce", key=lambda name: hashlib.md5(f"{seed}:{name}".encode()).hexdigest())
        assert test.names == sorted(order[:2]) and len(train.labels) == 4
    assert data.split(0, 0)[1].names == []


class Remembered:
    """Stored images that record what was read; all pixels of image i are i."""

    def __init__(self, count: int) -> None:
        self.shape, self.read = (count, 4, 4), []

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> Tensor:
        self.read += index.tolist()
        return torch.from_numpy(index.astype(np.uint8))[:, None, None].expand(-1, 4, 4)

    def checksums(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.uint32)

    def title(self, number: int) -> str:
        return f"number {number}"


def test_stored_images_are_split_without_being_read() -> None:
    names = [chr(code) for code in range(65, 91)]
    memory, images = toy_identities(names), Remembered(78)
    stored = Identities(images, memory.labels, names)
    for part, want in zip(stored.split(0.4, 1), memory.split(0.4, 1), strict=True):
        again = part.take(np.arange(len(part.labels))[::2])
        assert part.names == want.names and torch.equal(part.labels, want.labels)
        assert part.images.shape == want.images.shape and len(again.images) == len(again.labels)
        assert images.read == []
        assert torch.equal(again.images[np.array([1, 0])], want.images[[2, 0]])
        images.read.clear()


def test_fingerprints_tell_names_labels_and_images_apart() -> None:
    base, stored = (
        toy_identities(["a", "b"]),
        Identities(Remembered(6), torch.arange(2).repeat_interleave(3), ["a", "b"]),
    )
    others = [
        Identities(base.images.flip(0), base.labels, base.names),
        Identities(base.images, base.labels.flip(0), base.names),
        Identities(base.images, base.labels, ["a", "c"]),
        stored,
        stored.take(np.array([0, 1, 2, 3, 5, 4])),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert stored.take(np.arange(6)).fingerprint == stored.fingerprint
    assert base.take(np.arange(6)).fingerprint == base.fingerprint


# What is compared


def uneven(sizes: list[int]) -> Identities:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.arange(len(labels))[:, None, None].expand(-1, 4, 4)  # wide enough for every number
    return Identities(images[order], labels[order], [f"id{label}" for label in range(len(sizes))])


def test_identities_of_one_image_are_not_compared() -> None:
    data = uneven([3, 1, 2, 1, 5])
    kept = data.comparable(1000, 0)
    assert kept.names == ["id0", "id2", "id4"] and torch.bincount(kept.labels).tolist() == [3, 2, 5]
    want = [i for i, label in enumerate(data.labels.tolist()) if label in (0, 2, 4)]
    assert torch.equal(kept.images, data.images[want])
    assert uneven([1, 1]).comparable(10, 0).names == [] and uneven([]).comparable(10, 0).names == []
    whole = uneven([4, 2])
    assert torch.equal(whole.comparable(6, 0).images, whole.images)


@pytest.mark.parametrize("sizes", [[200, 300, 7], [30] * 40, [2] * 300, [1, 500], [11, 12, 13] * 9])
def test_what_is_compared_keeps_to_its_limit(sizes: list[int]) -> None:
    limit = 100
    data = uneven(sizes)
    kept = data.comparable(limit, 3)
    counts = torch.bincount(kept.labels)
    most = max(10, limit // sum(size > 1 for size in sizes))
    before = {f"id{label}": size for label, size in enumerate(sizes)}
    assert counts.tolist() == [min(before[name], most) for name in kept.names]
    full = sum(min(size, most) for size in sizes if size > 1)
    assert limit - most < len(kept.images) <= limit or len(kept.images) == full <= limit
    assert kept.images[:, 0, 0].unique().numel() == len(kept.images)
    assert data.comparable(limit, 3).names == kept.names


def test_images_of_a_large_identity_are_evenly_spread() -> None:
    labels = torch.zeros(1000, dtype=torch.int64)
    data = Identities(torch.arange(1000)[:, None, None].expand(-1, 4, 4), labels, ["a"])
    chosen = data.comparable(40, 0).images[:, 0, 0]
    assert len(chosen) == 40 and chosen.diff().tolist() == [25] * 39


def test_the_seed_decides_who_is_compared() -> None:
    data = uneven([20] * 50)
    assert data.comparable(100, 0).names != data.comparable(100, 1).names
    assert 10 <= len(data.comparable(100, 0).names) <= 10


def test_dense_labels_keep_their_order() -> None:
    labels, values = dense(np.array([70, 3, 3, 1000, 70], np.int32))
    assert labels.tolist() == [1, 0, 0, 2, 1] and values.tolist() == [3, 70, 1000] and labels.dtype == torch.int64


# Order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 10, 17, 1009, 4096, 4097])
def test_permutation_is_a_bijection(n: int) -> None:
    for epoch in range(3):
        assert sorted(Permutation(n, 0, epoch)(np.arange(n)).tolist()) == list(range(n))


def test_permutation_is_elementwise_and_differs_by_epoch_and_seed() -> None:
    base = Permutation(1009, 3, 5)(np.arange(1009))
    assert base.dtype == np.int64
    assert [Permutation(1009, 3, 5)(i).item() for i in range(0, 1009, 50)] == base[::50].tolist()
    for other in (Permutation(1009, 3, 6), Permutation(1009, 4, 5), Permutation(1009, 5, 3)):
        assert (other(np.arange(1009)) == base).sum() < 10  # 1 expected


def test_permutation_of_a_large_set_needs_no_table() -> None:
    n = 3_000_000_000
    index = np.random.default_rng(0).integers(0, n, 10_000)
    image = Permutation(n, 0, 0)(index)
    assert image.min() >= 0 and image.max() < n and len(np.unique(image)) == len(np.unique(index))
    assert abs(image.mean() / n - 0.5) < 4 / math.sqrt(12 * 10_000)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_every_item_is_first_equally_often(n: int) -> None:
    first = [Permutation(n, 1, epoch)(0).item() for epoch in range(4000)]
    counts = np.bincount(first, minlength=n)
    chi2 = ((counts - 4000 / n) ** 2 / (4000 / n)).sum()
    assert chi2 < {2: 10.8, 3: 13.8, 7: 22.5}[n]  # one in a thousand


def test_neighbors_are_scattered() -> None:
    order = Permutation(4096, 0, 0)(np.arange(4096)).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / math.sqrt(4096)


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (10, 10), (7, 16), (1, 3), (1009, 64)])
def test_batches_visit_every_image_once_per_epoch(n: int, batch: int) -> None:
    batches = UniformBatches(n, batch, 0)
    steps = math.ceil(4 * n / batch)
    index = np.concatenate([batches.indices(step) for step in range(steps)])
    epoch = np.concatenate([batches.epochs(step) for step in range(steps)])
    assert index.dtype == epoch.dtype == np.int64 and len(index) == steps * batch
    assert epoch.tolist() == [p // n for p in range(steps * batch)]
    for e in range(4):
        assert sorted(index[epoch == e].tolist()) == list(range(n))


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    assert np.array_equal(UniformBatches(100, 16, 1).indices(9), UniformBatches(100, 16, 1).indices(9))
    assert not np.array_equal(UniformBatches(100, 16, 1).indices(9), UniformBatches(100, 16, 2).indices(9))
    assert UniformBatches(100, 16, 1).epochs(10**12).max() == (16 * 10**12 + 15) // 100


def test_empty_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="n = 0"):
        Permutation(0, 0, 0)
    for n, batch in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"got {n} and {batch}"):
            UniformBatches(n, batch, 0)
