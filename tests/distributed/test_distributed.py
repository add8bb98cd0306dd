"""A head whose classes and batch are sharded over N ranks equals the head of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastmargin as fm
from fastmargin.head.margin_head import MarginHead
from fastmargin.head.sampling import derive_seed

F32, F64 = torch.float32, torch.float64
D = 24
SIZES = (5, 3, 0, 4)  # rows of each rank where they differ; those of rank 3 are all ignored


def per_class(C):
    return nn.Parameter(torch.linspace(0.2, 0.6, C))


MARGINS = {  # name: C -> margin
    "ArcFace": lambda C: fm.ArcFace(),
    "ArcFace learned": lambda C: fm.ArcFace(m=per_class(C), learn_scale=True),
    "SphereFace": lambda C: fm.SphereFace(lam=5.0),
    "AdaFace": lambda C: fm.AdaFace(h=5.0, momentum=0.5),
    "MagFace": lambda C: fm.MagFace(),
    "ElasticFace": lambda C: fm.ElasticFace(sigma=0.1),
    "ElasticFace+": lambda C: fm.ElasticFace(sigma=0.1, form="cos", plus=True),
    "Softmax": lambda C: fm.Softmax(),
    "L2Softmax": lambda C: fm.L2Softmax(s=64.0),
}
CASES = [
    *((name, C, "mean", {}) for name in MARGINS for C in (1, 3, 10, 1009)),
    *(("ArcFace learned", 1009, reduction, {}) for reduction in ("sum", "none")),
    *(("ArcFace", 1009, reduction, {"weighted": True}) for reduction in ("mean", "sum", "none")),
    *((name, C, "mean", {"sample_rate": 0.1}) for name in ("ArcFace learned", "Softmax") for C in (3, 1009, 3000)),
]


def problem(name, C, dtype, sizes, seed=0):
    """Weights [C, d], a bias [C], rows [B, d] and labels [B] of all ranks."""
    torch.manual_seed(seed)
    B = sum(sizes)
    plain = MARGINS[name](C).plain
    w = torch.randn(C, D, dtype=F64) * (0.2 + torch.rand(C, 1)) * (0.3 if plain else 1)
    y = torch.randint(0, C, (B,))
    f = (5 + 10 * torch.rand(B, 1)) * nn.functional.normalize(torch.randn(B, D, dtype=F64) + 0.3 * w[y])
    y[::4] = -100
    if len(sizes) > 3:
        y[B - sizes[3] :] = -100
    return w.to(dtype), torch.randn(C, dtype=dtype), f.to(dtype), y


def build(name, C, dtype, reduction, group=None, weighted=False, **options):
    weight = torch.linspace(0.5, 2, C) if weighted else None
    margin = MARGINS[name](C)
    options = options | dict(topk=3, reduction=reduction, class_weight=weight, group=group)
    return MarginHead(D, C, margin, bias=margin.plain, **options).to(dtype)


def step(head, w, bias, f, y, weighted, rows):
    """The outputs and gradients of one pass on `rows` of the batch."""
    head.load_full_weight(w)
    if head.bias is not None:
        head.bias.data.copy_(bias)
    f, y = f[rows].clone().requires_grad_(), y[rows]
    out = head(f, y, sample_weight=torch.linspace(0.1, 1, 12)[rows] if weighted else None)
    (out.loss.sum() if out.loss.ndim else out.loss).backward()
    parameters = {name: p.grad.to_dense() for name, p in head.named_parameters()}
    return [*(t.detach() for t in out), f.grad, parameters, {n: b for n, b in head.named_buffers() if "margin" in n}]


def one_process(name, C, reduction, dtype, sizes, given):
    head, drawn = build(name, C, dtype, reduction, **given), problem(name, C, dtype, sizes)
    torch.manual_seed(derive_seed(0, 0, 1))  # the seed of ElasticFace in a group
    return step(head, *drawn, given.get("weighted"), slice(None))


def on_ranks(dtype, sizes):
    group = dist.group.WORLD
    start = sum(sizes[: dist.get_rank()])
    rows = slice(start, start + sizes[dist.get_rank()])
    return [
        step(
            build(name, C, dtype, reduction, group, uneven=len(set(sizes)) > 1, **given),
            *problem(name, C, dtype, sizes),
            given.get("weighted"),
            rows,
        )
        for name, C, reduction, given in CASES
    ]


def distance(got, want):
    got, want = got.double(), want.double()
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    got, want = (t.nan_to_num(0, 0, 0) for t in (got, want))
    return float((got - want).norm() / want.norm().clamp(min=1e-30)) if want.any() else float(got.norm())


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (4, 4, 4), (3, 3, 3, 3), (7, 5), SIZES], ids=str)
def test_ranks_equal_one_process(ranks, dtype, sizes):
    N, limit = len(sizes), 1e-12 if dtype == F64 else 3e-6
    theirs = ranks(N, on_ranks, dtype, sizes)
    for i, (name, C, reduction, given) in enumerate(CASES):
        loss, score, hard_scores, hard_classes, df, parameters, buffers = one_process(
            name, C, reduction, dtype, sizes, given
        )
        shares = [rank[i] for rank in theirs]
        where = name, C, reduction, given
        if reduction == "none":
            assert distance(torch.cat([share[0] for share in shares]), loss) < limit, where
            df, parameters = df / N, {n: g / N for n, g in parameters.items()}
        else:
            assert distance(sum(share[0] for share in shares) / N, loss) < limit, where
        assert distance(torch.cat([share[1] for share in shares]), score) < limit, where
        assert distance(torch.cat([share[2] for share in shares]), hard_scores) < limit, where
        assert torch.equal(torch.cat([share[3] for share in shares]), hard_classes), where
        assert distance(torch.cat([share[4] for share in shares]) / N, df) < limit, where
        assert distance(torch.cat([share[5].pop("weight") for share in shares]), parameters.pop("weight")) < limit, (
            where
        )
        for share in shares:
            for n, gradient in parameters.items():
                assert distance(share[5][n], gradient) < limit, (n, *where)
                assert torch.equal(share[5][n], shares[0][5][n])
            for n, buffer in buffers.items():
                assert distance(share[6][n], buffer) < limit
                assert torch.equal(share[6][n], shares[0][6][n])
