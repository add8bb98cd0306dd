"""N ranks in turn equal one head: values, gradients, lists with ties, and messages of the sizes that `plan` has."""

import pytest
import torch

from fastmargin.distributed.merge import merge_lists, pack_lists
from fastmargin.driver.commands import cli
from fastmargin.driver.sizing import simulate
from fastmargin.driver.sizing.plan import Plan, wire

F32, F64 = torch.float32, torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize(("N", "C", "b"), [(1, 50, 3), (64, 3000, 1), (64, 7, 2), (256, 1009, 1), (256, 1, 1)])
def test_ranks_in_turn_equal_one_process(N, C, b, dtype):
    p = Plan(C, 24, b, N, topk=3)
    distances, _, sent = simulate.compare(p, dtype)
    assert set(distances) == {"loss", "scores", "df", "dw"} and max(distances.values()) <= simulate.LIMITS[dtype]
    assert dtype == F64 or sent == wire(p)


def test_a_thousand_ranks():
    p = Plan(1500, 8, 1, 1024, topk=2)
    distances, _, sent = simulate.compare(p, F32)
    assert max(distances.values()) <= 3e-6 and sent == wire(p)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize(("N", "C"), [(64, 1000), (64, 40), (256, 1000)])
def test_ties_across_shards_go_to_the_smaller_class(N, C, dtype):
    """Signs in 16 dimensions: every product is exact in any order, and most of the classes tie."""
    p = Plan(C, 16, 1, N, topk=5)
    f, w = (torch.randint(0, 2, (rows, 16)).to(dtype) * 2 - 1 for rows in (N, C))
    y = torch.randint(C, (N,))
    ranks, _ = simulate.ranks_in_turn(p, f, w, y)
    cosines = (f @ w.T / 16).scatter(1, y[:, None], -torch.inf)
    order = cosines.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ranks.classes, order.indices[:, :5]) and torch.equal(ranks.scores, order.values[:, :5])
    assert (order.values[:, 4] == order.values[:, 5]).any(), "ties at the end of the lists"


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_lists_travel_whole(dtype):
    values, classes = torch.randn(3, 7, 2, dtype=dtype).sort(2, descending=True).values, torch.randint(2**40, (3, 7, 2))
    lists = torch.stack([pack_lists(v, c) for v, c in zip(values, classes, strict=True)])
    assert lists.dtype == torch.int32 and lists.shape[2] == (6 if dtype == F32 else 8)
    got, named = merge_lists(lists, 2, dtype)
    best = values.transpose(0, 1).flatten(1).topk(2)
    assert torch.equal(got, best.values)
    assert torch.equal(named, classes.transpose(0, 1).flatten(1).gather(1, best.indices))


def spoil(monkeypatch, name, change):
    original = getattr(simulate, name)
    monkeypatch.setattr(simulate, name, lambda *given: change(original(*given)))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("merge_parts", lambda out: (out[0] + 1e-9, out[1]), "apart"),
        ("shard_gradients", lambda out: (out[0], out[1] * (1 + 1e-9)), "apart"),
        ("merge_lists", lambda out: (out[0], out[1].flip(0)), "not those of one process"),
        ("merge_lists", lambda out: (out[0], out[1][:, :1].expand_as(out[1])), "not those of one process"),
        ("wire", lambda out: out | {"rows, all-gather": 1.0}, "plan counts"),
    ],
)
def test_what_is_wrong_is_seen(monkeypatch, name, change, words):
    spoil(monkeypatch, name, change)
    with pytest.raises(RuntimeError, match=words):
        simulate.report(Plan(300, 16, 1, 8, topk=3), lambda _: None)


def test_the_command(capsys):
    assert cli.main(["simulate", "--ranks", "64", "--classes", "1k", "--dim", "16", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    for words in ("64 ranks with 16 of 1,000 classes", "float64: loss", "float32: loss", "dx, reduce-scatter"):
        assert words in out
    assert f"{63 * 2 * 16 * 4:,}" in out, "the rows that a rank sends"


@pytest.mark.parametrize("option", ["ranks", "classes", "dim", "batch", "topk"])
def test_mistakes(capsys, option):
    given = {"ranks": "2", option: "0"}
    assert cli.main(["simulate", *(word for name, value in given.items() for word in (f"--{name}", value))]) == 2
    assert capsys.readouterr().err == f"fastmargin: {option} is 0; want 1 or more\n"
