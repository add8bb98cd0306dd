"""Random batches and random places for a head: rows of any length or not finite, readers of weights, wrappers, states.

The oracles are float64 formulas written here, or torch's dense optimizer.
"""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from check import error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fastmargin as fm
from fastmargin.ops.nontarget_lse import IMPLS

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = [name for name in ("native", "stream", "reference") if name in IMPLS]
BAD = (torch.nan, torch.inf, -torch.inf)


@pytest.fixture(scope="module")
def group():
    """This process alone, as a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def spoiled(rng: random.Random, x: Tensor, most: int) -> tuple[Tensor, Tensor]:  # [B, d] -> [B, d], [B] finite
    """With numbers that are not finite at up to 4 places of up to `most` of its rows."""
    x = x.clone()
    for row in rng.sample(range(len(x)), rng.randint(1, most)):
        for _ in range(rng.randint(1, 4)):
            x[row, rng.randrange(x.shape[1])] = rng.choice(BAD)
    return x, x.isfinite().all(1)


# ---------------------------------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("seed", range(20))
def test_statistics_of_adaface(rng, seed):
    B, d, momentum = rng.randint(2, 20), rng.randint(1, 12), rng.choice([0.01, 0.3, 1.0])
    head = fm.MarginHead(d, 9, fm.AdaFace(momentum=momentum), sample_rate=rng.choice([0.5, 1.0]))
    mu, sd = 20.0, 100.0
    for kept_rows in (rng.randint(0, B - 1), B):
        x, finite = torch.randn(B, d) * 10 ** rng.uniform(-4, 3), torch.ones(B, dtype=torch.bool)
        if kept_rows < B:
            x, finite = spoiled(rng, x, B - kept_rows)
        head(x, torch.randint(0, 9, (B,)))
        norms = np.linalg.norm(x[finite].double().numpy(), axis=1).clip(1e-3, 100)
        if len(norms) > 1:
            mu += momentum * (norms.mean() - mu)
            sd += momentum * (norms.std(ddof=1) - sd)
    assert head.margin.mu.item() == pytest.approx(mu, rel=1e-4)
    assert head.margin.sd.item() == pytest.approx(sd, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("seed", range(14))
def test_statistics_of_a_center_bank(rng, seed):
    B, d, C = rng.randint(1, 20), rng.randint(1, 12), rng.randint(1, 6)
    rule, alpha = rng.choice(["paper", "sgd", "ema"]), rng.uniform(0.1, 1)
    bank, centers = fm.CenterBank(d, C, rule, alpha), np.zeros((C, d))
    for spoil in (True, False):
        x, labels = torch.randn(B, d), torch.randint(0, C, (B,))
        x, finite = spoiled(rng, x, B) if spoil else (x, torch.ones(B, dtype=torch.bool))
        bank.update(x, labels)
        for j in labels[finite].unique().tolist():
            rows = x[finite & (labels == j)].double().numpy()
            rate = alpha / {"paper": 1 + len(rows), "sgd": 1, "ema": len(rows)}[rule]
            centers[j] += rate * (rows - centers[j]).sum(0)
    np.testing.assert_allclose(bank.centers.numpy(), centers, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- where no head belongs


class Last(nn.Module):
    """Calls the head, the last part of whatever it is nested in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return next(part for part in self.modules() if isinstance(part, fm.MarginHead))(f, y).loss


def nested(rng, head):
    for _ in range(rng.randint(0, 3)):
        head = rng.choice(
            [nn.Sequential, lambda m: nn.ModuleList([nn.Linear(3, 3), m]), lambda m: nn.ModuleDict({"a": m})]
        )(head)
    return head


@pytest.mark.parametrize("seed", range(10))
def test_wrappers_of_a_head_in_a_group_raise(rng, group, seed):
    B, C = rng.randint(1, 6), rng.randint(4, 30)
    options = dict(sample_rate=rng.choice([0.5, 1.0]), topk=rng.randint(0, 2), group=group)
    head = fm.MarginHead(3, C, rng.choice([fm.ArcFace, fm.AdaFace, fm.NormFace])(), **options)
    match rng.choice(["ddp", "fsdp", "replica"]):
        case "ddp":
            model = nn.parallel.DistributedDataParallel(Last(nested(rng, head)), find_unused_parameters=True)
            with pytest.raises(RuntimeError, match="DistributedDataParallel around a head in a group"):
                model(torch.randn(B, 3), torch.randint(0, C, (B,)))
        case "fsdp":
            with pytest.raises(RuntimeError, match="fully_shard of a head in a group"):
                fully_shard(Last(nested(rng, head)), mesh=init_device_mesh("cpu", (1,)))
        case "replica":  # what DataParallel makes of every module, for each GPU
            with pytest.raises(RuntimeError, match="DataParallel of a head in a group"):
                head._replicate_for_data_parallel()


@pytest.mark.parametrize("seed", range(14))
def test_checkpointed_heads_raise_where_the_second_pass_would_differ(rng, seed):
    B, C, rate = rng.randint(2, 8), rng.randint(5, 40), rng.choice([0.2, 0.7, 1.0])
    margin = rng.choice([fm.ArcFace, fm.ElasticFace, fm.AdaFace, fm.MagFace, fm.CosFace])()
    head, f, y = (
        fm.MarginHead(6, C, margin, sample_rate=rate, backend=rng.choice(BACKENDS)),
        torch.randn(B, 6),
        torch.randint(0, C, (B,)),
    )
    f.requires_grad_()
    differs = rate < 1 or isinstance(margin, fm.ElasticFace | fm.AdaFace)
    want = None if differs else torch.autograd.grad(head(f, y).loss, f)[0]
    loss = checkpoint(
        lambda f: Last(nested(rng, head))(f.tanh() if differs else f, y), f, use_reentrant=rng.random() < 0.5
    )
    if differs:
        with pytest.raises(ValueError, match="keep the head out of the checkpointed part"):
            loss.backward()
    else:
        loss.backward()
        assert error(f.grad, want) < 1e-6


@pytest.mark.parametrize("seed", range(14))
def test_second_derivatives_raise(rng, seed):
    B, C, k, plain = rng.randint(1, 6), rng.randint(4, 20), rng.randint(1, 3), rng.random() < 0.5
    x, w = torch.randn(B, 5, requires_grad=True), torch.randn(C, 5, requires_grad=True)
    options = dict(topk=k, normalize_weight=not plain, backend=rng.choice(BACKENDS))
    out = fm.nontarget_lse(x, w, torch.randint(0, C, (B,)), bias=torch.randn(C) if plain else None, **options)
    first = sum(out[i].sum() for i in rng.sample(range(3), rng.randint(1, 3)))
    through, then = rng.choice([x, w]), rng.choice([x, w])
    gradient = torch.autograd.grad(first, through, create_graph=True)[0]
    second = rng.choice([gradient.sum(), gradient.square().sum(), (gradient - 1).abs().max()]) + then.square().sum()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(second, then)


# ---------------------------------------------------------------------------------------------- weights that are read

READERS = {
    "weight": lambda m: m[1].weight,
    "parameters": lambda m: next(m[1].parameters()),
    "named_parameters": lambda m: dict(m.named_parameters())["1.weight"],
    "get_parameter": lambda m: m.get_parameter("1.weight"),
    "state_dict": lambda m: m.state_dict()["1.weight"],
    "copy": lambda m: copy.deepcopy(m)[1].weight,
    "average": lambda m: AveragedModel(m).module[1].weight,
    "vector": lambda m: nn.utils.parameters_to_vector(m.parameters()).view_as(m[1]._parameters["weight"]),
}


@pytest.mark.parametrize("seed", range(30))
def test_weights_that_are_read_are_those_of_the_dense_optimizer(rng, seed):
    C, d, lr, momentum = rng.randint(20, 300), rng.randint(2, 8), rng.uniform(0.01, 0.5), rng.choice([0.5, 0.9, 0.99])
    options = dict(weight_decay=rng.choice([0.0, 1e-3]), nesterov=rng.random() < 0.5)
    rate, in_backward = rng.uniform(0.01, 0.5), rng.random() < 0.5
    ours, theirs = (
        nn.Sequential(nn.Identity(), fm.MarginHead(d, C, fm.CosFace(s=16.0), sample_rate=rate).double()) for _ in "12"
    )
    lazy = fm.optim.ClassSGD(ours[1], lr, momentum, in_backward=in_backward, **options)
    dense = torch.optim.SGD([theirs[1].weight], lr, momentum, **options)
    averages = AveragedModel(ours), AveragedModel(theirs)
    for _ in range(rng.randint(3, 12)):
        f, y = torch.randn(4, d, dtype=torch.float64), torch.randint(0, C, (4,))
        for optimizer, model in ((lazy, ours), (dense, theirs)):
            optimizer.zero_grad()
            model[1](f, y).loss.backward()
            if optimizer is dense:
                model[1].weight.grad = model[1].weight.grad.to_dense()
            optimizer.step()
        if rng.random() < 0.3:
            for average, model in zip(averages, (ours, theirs), strict=True):
                average.update_parameters(model)
        if rng.random() < 0.3:
            name = rng.choice([*READERS])
            assert error(READERS[name](ours), theirs[1].weight) < 1e-10, name
    name = rng.choice([*READERS])
    assert error(READERS[name](ours), theirs[1].weight) < 1e-10, name
    assert error(averages[0].module[1].weight, averages[1].module[1].weight) < 1e-10


# ---------------------------------------------------------------------------------------------- rows of any length


def unit(x: np.ndarray) -> np.ndarray:  # [n, d] float64; zero rows stay zero, rows that are not finite become NaN
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return x / np.where(norms == 0, 1.0, norms)


def arcface(cos: np.ndarray, own: np.ndarray, s: float, m: float) -> np.ndarray:  # [B, C], [B] -> [B]
    """Cross entropy over s cos, the own class at s cos(theta + m)."""
    z = s * cos
    rows = np.arange(len(z))
    z[rows, own] = s * np.cos(np.arccos(cos[rows, own].clip(-1, 1)) + m)
    top = z.max(1)
    return top + np.log(np.exp(z - top[:, None]).sum(1)) - z[rows, own]


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_any_length(rng, seed):
    B, C, d = rng.randint(1, 12), rng.randint(5, 60), rng.randint(4, 32)
    k, s, m = rng.randint(1, 4), rng.uniform(8, 64), rng.uniform(0, 0.4)
    head = fm.MarginHead(d, C, fm.ArcFace(s=s, m=m), topk=k, reduction="none", backend=BACKENDS[seed % len(BACKENDS)])
    with torch.no_grad():
        head.weight.copy_(torch.randn(C, d) * torch.tensor([10 ** rng.uniform(-6, 6) for _ in range(C)])[:, None])
    lengths = torch.tensor([rng.choice([0.0, torch.nan, *[10 ** rng.uniform(-30, 30)] * 6]) for _ in range(B)])
    x, y = F.normalize(torch.randn(B, d)) * lengths[:, None], torch.randint(0, C, (B,))
    if rng.random() < 0.3:
        x, _ = spoiled(rng, x, 1)
    cos = unit(x.double().numpy()) @ unit(head.weight.detach().double().numpy()).T
    wrong = np.where(np.arange(C) == y.numpy()[:, None], -np.inf, cos)
    out, (scores, classes) = head(x, y), head.nearest(x, k)
    good = x.isfinite().all(1).numpy()
    assert np.isnan(out.loss.detach().numpy()[~good]).all()
    for table, values, ids in ((wrong, out.hard_scores, out.hard_classes), (cos, scores, classes)):
        values, ids = values.numpy(), ids.numpy()
        assert np.isnan(values[~good]).all() and (ids[~good] == -1).all()
        np.testing.assert_allclose(values[good], -np.sort(-table[good])[:, :k], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(table[good], ids[good], 1), values[good], atol=1e-5)
        assert all(len(set(row)) == k for row in ids[good].tolist())
    own = cos[good, y.numpy()[good]]
    np.testing.assert_allclose(out.target_score.numpy()[good], own, atol=1e-5)
    np.testing.assert_allclose(
        out.loss.detach().numpy()[good], arcface(cos[good], y.numpy()[good], s, m), rtol=1e-4, atol=1e-3
    )


# ---------------------------------------------------------------------------------------------- states

STATELESS = (fm.ArcFace, fm.CosFace, fm.NormFace, fm.MagFace, fm.ElasticFace, fm.SphereFace)


@pytest.mark.parametrize("seed", range(16))
def test_a_state_loads_strictly_into_any_head(rng, group, seed):
    """Margins without a state of their own replace each other; AdaFace takes that of an AdaFace."""
    C, d, stateful = rng.randint(3, 40), rng.randint(2, 8), rng.random() < 0.3
    first, second = (
        nested(
            rng,
            fm.MarginHead(
                d,
                C,
                fm.AdaFace() if stateful else rng.choice(STATELESS)(),
                seed=i,
                sample_rate=rng.choice([0.3, 1.0]),
                group=rng.choice([None, group]),
            ),
        )
        for i in range(2)
    )
    one, two = (next(part for part in model.modules() if isinstance(part, fm.MarginHead)) for model in (first, second))
    passes = rng.randint(0, 3)
    for _ in range(passes):
        one(torch.randn(3, d), torch.randint(0, C, (3,)))
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one.weight, two.weight)
    assert all(torch.equal(a, b) for a, b in zip(one.margin.buffers(), two.margin.buffers(), strict=True))
    assert two.counter is None or two.counter.step == (passes if one.counter is not None else 0)
