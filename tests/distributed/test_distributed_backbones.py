"""A backbone under DDP or FSDP2 and a head in the same group take the steps that one process takes with all rows."""

import pytest
import torch
import torch.distributed as dist
from check import error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

import fastmargin as fm
from fastmargin.head.margin_head import MarginHead

C, D, B, STEPS = 37, 16, 12, 4


def build(group):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, D)).double()
    margin = fm.ArcFace(m=nn.Parameter(torch.full((C,), 0.4)), learn_scale=True)
    return backbone, MarginHead(D, C, margin, group=group, topk=1).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        y = torch.randint(0, C, (2, B), generator=generator)
        y[0, 3] = -100
        yield torch.randn(2, B, 8, generator=generator, dtype=torch.float64), y


def train(model, head, local):
    """Steps of two accumulated passes each, clipped by the norm of all gradients."""
    parameters = [*model.parameters()], [*head.parameters()]
    optimizer = torch.optim.SGD([*parameters[0], *parameters[1]], lr=0.1, momentum=0.9)
    norms = []
    for images, labels in batches():
        for i in range(2):
            head(model(local(images[i])), local(labels[i])).loss.backward()
        norms.append(head.grad_norm(model.parameters()))
        for some in parameters:
            clip_grads_with_norm_(some, 5.0, norms[-1])
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(norms)


def compare(wrap):
    backbone, head = build(dist.group.WORLD)
    local = lambda t: t.chunk(dist.get_world_size())[dist.get_rank()]  # noqa: E731
    norms = train(wrap(backbone), head, local)
    one, whole = build(None)
    want = train(one, whole, lambda t: t)
    assert want.min() > 5  # so every step is clipped
    assert error(norms, want) < 1e-12
    for p, q in zip(backbone.parameters(), one.parameters(), strict=True):
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        assert error(p, q) < 1e-12
    assert error(head.classes.gather(head.weight), whole.weight) < 1e-12
    for p, q in zip(head.replicated_parameters(), whole.replicated_parameters(), strict=True):
        assert error(p, q) < 1e-12 and not torch.equal(p, build(None)[1].margin.s)


def ddp(backbone):
    return DistributedDataParallel(backbone)


def compiled(backbone):
    return torch.compile(DistributedDataParallel(backbone), backend="aot_eager")


def fsdp2(backbone):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (backbone[0], backbone[2], backbone):
        fully_shard(layer, mesh=mesh)
    return backbone


@pytest.mark.parametrize("wrap", [ddp, compiled, fsdp2], ids=lambda wrap: wrap.__name__)
def test_backbones(ranks, wrap):
    ranks(3, compare, wrap)
