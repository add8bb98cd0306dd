"""Inter- and intra-class distance, and the mirror trick."""

import itertools

import numpy as np
import pytest
import torch
from embeddings import blobs

from fastmargin.evaluation import arrays, class_distances, mirrored


@pytest.mark.parametrize("block", [1, 30, 2**22])
def test_class_distances_equal_brute_force(block, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", block)
    x, y = blobs(70, 11)
    x = x * 30
    names = np.array(list("ABCDEFGHIJK"))[y]
    centers = {name: x[names == name].mean(0) for name in names}
    intra = np.mean([np.mean([np.linalg.norm(f - c) for f in x[names == name]]) for name, c in centers.items()])
    inter = np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(centers.values(), 2)])
    assert class_distances(torch.from_numpy(x), names) == pytest.approx((inter, intra), rel=1e-12)


def test_class_distances_by_hand():
    """All classes have equal weight, whatever their size; an embedding may be zero."""
    x = [[0.0, 0], [0, 2], [6, 1], [6, 1], [6, 1], [6, 1]]
    assert class_distances(x, [0, 0, 1, 1, 1, 1]) == (6.0, 0.5)
    near = 1e8 + np.array([[0.0, 0], [0, 1e-3]])
    assert class_distances(near, [0, 1])[0] == pytest.approx(near[1, 1] - near[0, 1], rel=1e-12)


def test_class_distances_refuse():
    with pytest.raises(ValueError, match="1 classes; want at least 2"):
        class_distances(np.ones((3, 2)), [1, 1, 1])
    with pytest.raises(ValueError, match="want one for each of 3 images"):
        class_distances(np.ones((3, 2)), [1, 2])
    with pytest.raises(ValueError, match="embedding 1 of 2 is not finite"):
        class_distances([[1.0], [np.inf]], [0, 1])


def test_three_mirror_modes():
    plain, flipped = torch.tensor([[1.0, 0], [3, 4]]), torch.tensor([[0.0, 1], [3, -4]])
    assert mirrored(plain, flipped, "mean").tolist() == [[0.5, 0.5], [3, 0]]
    assert mirrored(plain, flipped, "sum").tolist() == [[1, 1], [6, 0]]
    assert mirrored(plain, flipped, "concat").tolist() == [[1, 0, 0, 1], [3, 4, 3, -4]]


def test_mirror_refuses():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="mirror is 'max'; want one of mean, sum, concat"):
        mirrored(x, x, "max")
    with pytest.raises(ValueError, match=r"shapes \[2, 3\] and \[1, 3\]"):
        mirrored(x, x[:1], "mean")
