"""Sampled classes: which are drawn, and that a head that samples is a head of those classes."""

import copy
import math

import pytest
import torch
from check import error
from emulation import wants_compiler
from torch import nn

import fastmargin as fm
from fastmargin.distributed.layout import Layout, chunk_sizes
from fastmargin.head import margin_head, sampling
from fastmargin.head.class_weights import to_global_id, to_index
from fastmargin.head.margin_head import MarginHead
from fastmargin.head.sampling import BLOCK, derive_seed, hashed, most_drawn, sampled_classes
from fastmargin.ops.common import merged_rows
from fastmargin.ops.nontarget_lse import without_padding

F64 = torch.float64
NONE = torch.empty(0, dtype=torch.int64)
FIRST = derive_seed(0, 0)  # seed 0, step 0


def drawn(C, rate, number=FIRST, required=NONE, N=1):
    layouts = [Layout(None, chunk_sizes(C, N), rank) for rank in range(N)]
    return torch.cat([sampled_classes(layout, required, rate, number) + layout.start for layout in layouts])


# ---------------------------------------------------------------------------------------------- the draw


def test_the_hash_is_splitmix64():
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)  # of the seed 0
    assert [h % 2**64 for h in hashed(torch.arange(1, 5), 0).tolist()] == list(published)


@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("C", [1, 10, BLOCK, 5 * BLOCK + 7])
def test_of_each_block_its_share_is_drawn(C, rate):
    classes = drawn(C, rate)
    assert torch.equal(classes, classes.unique()) and 0 <= classes[0] and classes[-1] < C
    sizes = [min(C - first, BLOCK) for first in range(0, C, BLOCK)]
    assert (classes // BLOCK).bincount().tolist() == [math.ceil(rate * n) for n in sizes]
    for block, n in enumerate(sizes):
        ids = range(block * BLOCK, block * BLOCK + n)
        smallest = sorted(ids, key=lambda c: hashed(torch.tensor(c), FIRST).item())[: math.ceil(rate * n)]
        assert sorted(smallest) == classes[classes // BLOCK == block].tolist()


@pytest.mark.parametrize("N", [2, 3, 7])
@pytest.mark.parametrize("C", [1, 3, 1000, 2049, 5003])
def test_ranks_draw_together_what_one_draws(monkeypatch, C, N):
    required = torch.randint(0, C, (30,))
    want = drawn(C, 0.1, required=required)
    assert torch.equal(drawn(C, 0.1, required=required, N=N), want)
    monkeypatch.setattr(sampling, "AT_ONCE", BLOCK)
    assert torch.equal(drawn(C, 0.1, required=required, N=N), want)


def test_every_class_gets_its_turn():
    C, steps = 3 * BLOCK, 400
    counts = torch.stack([torch.zeros(C).index_fill_(0, drawn(C, 0.25, derive_seed(7, t)), 1) for t in range(steps)])
    often = counts.sum(0)
    assert often.sum() == steps * C / 4
    assert (often - steps / 4).abs().max() < 5 * math.sqrt(steps * 0.25 * 0.75)
    together = counts.T @ counts[:, :9]  # pairs of classes of a block: as in draws without replacement
    together = torch.cat([together[i + 1 : BLOCK, i] for i in range(9)])
    assert abs(together.mean() / (steps * 0.25 * 255 / 1023) - 1) < 0.01
    assert not torch.equal(drawn(C, 0.25, derive_seed(7, 1)), drawn(C, 0.25, derive_seed(8, 1)))


def test_what_is_required_is_there_above_the_share():
    required = torch.randint(0, 2 * BLOCK, (900,))
    required[::7] = -1
    classes, share = drawn(2 * BLOCK, 0.01, required=required), drawn(2 * BLOCK, 0.01)
    assert torch.equal(classes, torch.cat((share, required[required >= 0])).unique()) and len(classes) > 4 * len(share)


@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.999])
@pytest.mark.parametrize("N", [1, 2, 3, 7])
@pytest.mark.parametrize("C", [1, 3, BLOCK, 2049, 5003])
def test_the_host_knows_how_many_are_drawn_at_most(C, N, rate):
    for rank in range(N):
        layout = Layout(None, chunk_sizes(C, N), rank)
        count, most = len(sampled_classes(layout, NONE, rate, FIRST)), most_drawn(layout, rate)
        assert count <= most <= layout.count
        ends_with_blocks = layout.start % BLOCK == 0 and (layout.stop % BLOCK == 0 or layout.stop == C)
        assert count == most or not ends_with_blocks


# ---------------------------------------------------------------------------------------------- no class, as on CUDA


def test_indices_of_a_subset_that_ends_in_no_class():
    ids, classes = torch.tensor([7, -1, 2, 5]), Layout(None, (9,))
    for subset in (torch.tensor([2, 5, 7]), torch.tensor([2, 5, 7, -1, -1])):
        index = to_index(ids, classes, subset)
        assert index.tolist() == [2, -1, 0, 1] and torch.equal(to_global_id(index, classes, subset), ids)


def test_sparse_gradients_add_up_without_their_number():
    ids = torch.tensor([3, 5, 9, -1, -1])
    rows = torch.randn(5, 4).masked_fill(ids[:, None] < 0, 0.0)
    one = torch.sparse_coo_tensor(without_padding(ids)[None], rows, (10, 4))
    for gradient in (one, one + torch.sparse_coo_tensor(torch.tensor([[9, 0, 3]]), torch.randn(3, 4), (10, 4))):
        want, (got, merged) = gradient.coalesce(), merged_rows(gradient._indices()[0], gradient._values())
        n = len(want.indices()[0])
        assert torch.equal(got[:n], want.indices()[0]) and torch.equal(merged[:n], want.values())
        assert (got[n:] == -1).all() and not merged[n:].any()
    assert without_padding(ids[3:]).tolist() == [0, 0]


@wants_compiler
@pytest.mark.parametrize("kind", [fm.optim.ClassSGD, fm.optim.ClassAdamW])
def test_a_head_trains_alike_where_its_classes_end_in_none(emulated, monkeypatch, kind):
    def ending_in_none(*given):
        return torch.cat((sampled_classes(*given), torch.full((40,), -1)))

    ends = []
    for sample in (sampled_classes, ending_in_none):
        monkeypatch.setattr(margin_head, "sampled_classes", sample)
        torch.manual_seed(1)
        head = MarginHead(16, 2500, fm.ArcFace(), topk=3, sample_rate=0.1, backend="emulated")
        optimizer = kind(head, 0.1, in_backward=True, weight_decay=0.1)
        seen = []
        for _ in range(4):
            x, y = (9 * torch.randn(20, 16)).requires_grad_(), torch.randint(0, 2500, (20,))
            out = head(x, y)
            out.loss.backward()
            optimizer.step()
            seen += [out.loss.detach(), out.hard_classes, x.grad]
        head._apply_lazy_updates()
        ends.append([*seen, head.weight.detach().clone()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b) if a.dtype == torch.int64 else error(a, b) < 1e-6


# ---------------------------------------------------------------------------------------------- the head


def problem(margin=None, C=2500, B=20, **options):
    margin = fm.ArcFace() if margin is None else margin
    head = MarginHead(16, C, margin, bias=margin.plain, topk=5, sample_rate=0.1, **options).double()
    head.load_full_weight(torch.randn(C, 16))
    if head.bias is not None:
        nn.init.normal_(head.bias)
    y = torch.randint(0, C, (B,))
    y[3] = -100
    return head, 9 * torch.randn(B, 16, dtype=F64), y


@pytest.mark.parametrize("margin", [fm.ArcFace(), fm.ArcFace(learn_scale=True), fm.L2Softmax()], ids=str)
def test_it_is_a_head_of_the_sampled_classes(backend, margin):
    head, f, y = problem(copy.deepcopy(margin), backend=backend)
    f.requires_grad_()
    out = head(f, y)
    out.loss.backward()
    rows = head.sampled
    assert torch.equal(rows, drawn(2500, 0.1, required=y)) and head.counter.step == 1
    small = MarginHead(16, len(rows), copy.deepcopy(margin), bias=margin.plain, topk=5).double()
    small.load_full_weight(head.weight[rows])
    if small.bias is not None:
        small.bias.data.copy_(head.bias[rows])
    g = f.detach().clone().requires_grad_()
    want = small(g, torch.where(y < 0, y, torch.searchsorted(rows, y)))
    want.loss.backward()
    assert error(out.loss, want.loss) < 1e-12 and error(f.grad, g.grad) < 1e-12
    assert torch.equal(out.target_score.isnan(), y < 0)
    index = want.hard_classes
    assert torch.equal(out.hard_classes, torch.where(index < 0, -1, rows[index]))
    assert error(out.hard_scores, want.hard_scores) < 1e-12
    assert head.weight.grad.is_sparse and torch.equal(head.weight.grad.coalesce().indices()[0], rows)
    assert error(head.weight.grad.coalesce().values(), small.weight.grad) < 1e-12
    assert error(head.grad_norm(), small.grad_norm()) < 1e-12
    if small.bias is not None:
        assert error(head.bias.grad, torch.zeros_like(head.bias).index_copy_(0, rows, small.bias.grad)) < 1e-12
    for p, q in zip(head.margin.parameters(), small.margin.parameters(), strict=True):
        assert error(p.grad, q.grad) < 1e-12


def test_each_pass_draws_anew_and_only_what_it_drew_moves():
    head, f, y = problem()
    optimizer = torch.optim.SGD([head.weight], lr=0.1)
    before, seen = head.weight.detach().clone(), []
    for _ in range(3):
        head(f, y).loss.backward()
        seen.append(head.sampled)
    optimizer.step()
    moved = (head.weight != before).any(1).nonzero()[:, 0]
    assert torch.equal(moved, torch.cat(seen).unique()) and len(moved) > 1.5 * len(seen[0])
    head.load_state_dict(head.state_dict() | {"counter._extra_state": torch.tensor(1)})
    head(f, y)
    assert torch.equal(head.sampled, seen[1]) and head.counter.step == 2


def test_hard_classes_are_sampled_whatever_is_drawn():
    head, f, y = problem()
    nearest = head.nearest(f, 6)[1]
    hard = torch.where(nearest == y[:, None], -1, nearest)
    out = head(f, y, hard_classes=hard)
    assert torch.isin(hard[hard >= 0], head.sampled).all()
    full = MarginHead(16, 2500, fm.ArcFace(), topk=5).double()
    full.load_full_weight(head.weight)
    assert torch.equal(out.hard_classes, full(f, y, hard_classes=hard).hard_classes)
    assert not torch.equal(head(f, y).hard_classes, out.hard_classes)


def test_evaluation_looks_at_all_classes():
    head, f, y = problem()
    full = MarginHead(16, 2500, fm.ArcFace(), topk=5).double()
    full.load_full_weight(head.weight)
    with torch.no_grad():
        got, want = head.eval()(f, y), full(f, y)
    assert got.loss == want.loss and torch.equal(got.hard_classes, want.hard_classes) and head.counter.step == 0
    assert "counter._extra_state" in head.state_dict() and [*full.state_dict()] == ["weight"]


def test_few_classes():
    for C in (1, 2, 3):
        head, f, y = problem(C=C)
        out = head(f, y)
        out.loss.backward()
        assert out.loss.isfinite() and (C > 1 or out.loss == 0)
        assert torch.equal(head.sampled, drawn(C, 0.1, required=y))


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, True, "0.1", math.nan])
def test_rates_out_of_range(rate):
    with pytest.raises(ValueError, match=r"sample_rate = .*: want a share of the classes, above 0 and at most 1"):
        MarginHead(3, 5, fm.ArcFace(), sample_rate=rate)


@pytest.mark.parametrize(
    ("hard", "message"),
    [
        ([[1]] * 20, "hard_classes is a list: want a tensor of 20 rows"),
        (torch.zeros(20, dtype=torch.int64), r"want int64 hard_classes \[20, k\]; got torch.int64 \[20\]"),
        (torch.zeros(19, 2, dtype=torch.int64), r"got torch.int64 \[19, 2\]"),
        (torch.zeros(20, 2), r"got torch.float32 \[20, 2\]"),
        (torch.full((20, 2), 2500), r"hard_classes has 2500: want class ids in \[0, 2500\), or -1"),
        (torch.full((20, 2), -2), "hard_classes has -2"),
        (torch.zeros(20, 2, dtype=torch.int64, device="meta"), "hard_classes are on meta"),
    ],
)
def test_hard_classes_that_will_not_do(hard, message):
    head, f, y = problem()
    with pytest.raises(ValueError, match=message):
        head(f, y, hard_classes=hard)


def test_a_way_to_travel_that_will_not_do():
    with pytest.raises(ValueError, match=r"gather_dtype = torch.int8: want None, torch.bfloat16 or torch.float16"):
        MarginHead(3, 5, fm.ArcFace(), gather_dtype=torch.int8)


def test_heads_that_count_their_steps_and_heads_that_do_not_read_each_other():
    sampled, full = (nn.Sequential(fm.MarginHead(8, 40, fm.ArcFace(), sample_rate=rate, seed=1)) for rate in (0.3, 1.0))
    sampled[0](torch.randn(4, 8), torch.arange(4))
    full.load_state_dict(sampled.state_dict())
    assert sampled[0].counter.step == 1 and full[0].counter is None
    sampled.load_state_dict(full.state_dict())
    assert sampled[0].counter.step == 0
