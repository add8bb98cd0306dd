"""Which forward passes keep their exponentials, and how their bytes are counted."""

import copy
import math
import pickle

import pytest
import torch

import fastmargin as fm
from fastmargin.ops.exponentials import Keep, KeptBytes, pitch_of
from fastmargin.ops.problem import Problem

BF16, F16 = torch.bfloat16, torch.float16
B, C, d = 4, 100, 8


def problem(**changes):
    given = dict(x=torch.randn(B, d), w=torch.randn(C, d), y=torch.zeros(B, dtype=torch.int64), compute_dtype=BF16)
    return Problem(**(given | changes))


def test_a_row_of_exponentials_begins_on_128_bytes():
    assert [pitch_of(n) for n in (0, 1, 64, 65, 1000)] == [0, 64, 64, 128, 1024]


@pytest.mark.parametrize(("dtype", "size"), [(BF16, 2), (None, 4)])
def test_the_limit_is_in_bytes(dtype, size):
    wanted = B * pitch_of(C) * size
    for limit, admitted in ((wanted, True), (wanted - 1, False), (0, False)):
        assert Keep(KeptBytes(limit), 64.0).admits(problem(compute_dtype=dtype)) == admitted


def test_only_problems_within_the_range_of_float32():
    kept, bound = KeptBytes(2**30), 80 - math.log(C) / 2
    assert Keep(kept, bound).admits(problem())
    assert not Keep(kept, math.nextafter(bound, 100)).admits(problem())
    assert not Keep(kept, math.inf).admits(problem())
    some = torch.arange(10)
    assert Keep(kept, 80 - math.log(10) / 2).admits(problem(class_ids=some))
    for changes in (
        dict(compute_dtype=F16),
        dict(normalize_weight=False),
        dict(x=torch.randn(0, d)),
        dict(w=torch.randn(0, d)),
        dict(class_ids=some[:0]),
    ):
        assert not Keep(kept, 1.0).admits(problem(**changes))


def test_what_a_graph_holds_counts_until_it_is_freed():
    kept = KeptBytes(1000)
    graph = {"first": torch.empty(150), "second": torch.empty(50)}
    for name in graph:
        kept.add(graph[name])
    assert kept.admit(200) and not kept.admit(201)
    view = graph["first"][:1]
    graph.clear()
    assert kept.admit(400) and not kept.admit(401)
    del view
    assert kept.admit(1000) and not kept.admit(1001)


def test_copies_hold_no_graphs():
    kept, t = KeptBytes(1000), torch.empty(200)
    kept.add(t)
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert other.admit(1000) and not other.admit(1001) and not kept.admit(201)
    copy.deepcopy(fm.MarginHead(d, C, fm.ArcFace(), keep_bytes=10))


class Longer(fm.ArcFace):
    def scale(self, norms):
        return 2 * super().scale(norms)


@pytest.mark.parametrize(
    ("margin", "largest"),
    [
        (fm.ArcFace(), 64.0),
        (fm.CosFace(s=30), 30.0),
        (fm.ArcFace(learn_scale=True), math.inf),
        (fm.ArcFace(normalize_features=False), math.inf),
        (fm.SphereFace(), math.inf),
        (Longer(), math.inf),
    ],
)
def test_only_a_fixed_scale_bounds_the_rows(margin, largest):
    head = fm.MarginHead(d, C, margin)
    assert head._max_norm == largest
    x, _, _ = head._rows(10 * torch.randn(50, d))
    assert x.norm(dim=1).max() <= largest * (1 + 1e-6)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, None])
def test_keep_bytes_is_a_number_of_bytes(wrong):
    with pytest.raises(ValueError, match=r"keep_bytes = .*: want an int of 0 or more"):
        fm.MarginHead(d, C, fm.ArcFace(), keep_bytes=wrong)
