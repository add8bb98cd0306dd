"""Faults in a group: every rank raises, or its process ends; none waits longer than the group's timeout."""

import os
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastmargin as fm
from fastmargin import optim
from fastmargin.distributed import agreement
from fastmargin.head.margin_head import MarginHead

TIMEOUT = 5  # seconds
F, Y = torch.ones(4, 3), torch.tensor([0, 1, 2, -100])
M = torch.arange(5) / 10


def head(C=5, margin=None, **options):
    return MarginHead(3, C, margin or fm.ArcFace(), group=dist.group.WORLD, **options)


# ---------------------------------------------------------------------------------------------- mistakes all ranks see


def bad_labels():
    for uneven in (False, True):
        it = head(uneven=uneven, sample_rate=0.5)
        mine = slice(0, 4 - (uneven and dist.get_rank() == 0))
        labels = Y.clone()
        if dist.get_rank() == 1:
            labels[2:] = torch.tensor([5, -1])
        with pytest.raises(ValueError, match=r"label 5 of row 2 of rank 1 is outside \[0, 5\).*-100 \(2 such rows"):
            it(F[mine], labels[mine])
        assert it.counter.step == 0
        it(F[mine], Y[mine]).loss.backward()  # a good batch afterwards works
        it.check()


def unequal_batches():
    it = head()
    mine = slice(0, 2 + dist.get_rank())
    with pytest.raises(
        ValueError, match=r"batches have \[2, 3, 4\] rows: want the same number on every rank, or .* uneven=True"
    ):
        it(F[mine], Y[mine])
    it(F, Y).loss.backward()


def no_rows_at_all():
    for uneven in (False, True):
        it = head(uneven=uneven, topk=2)
        out = it(F[:0], Y[:0])
        out.loss.backward()
        assert out.loss == 0 and not it.weight.grad.any() and out.hard_classes.shape == (0, 2)


def wrong_hard_classes():
    it = head(sample_rate=0.5)
    hard = torch.full((4, 2), 5 if dist.get_rank() == 2 else -1)
    with pytest.raises(ValueError, match=r"hard_classes has 5: want class ids in \[0, 5\), or -1"):
        it(F, Y, hard_classes=hard)


class Like(fm.AdaFace):
    """Another margin with the repr of AdaFace."""

    def _get_name(self):
        return "AdaFace"


def options_that_differ():
    rank = dist.get_rank()
    for options, message in (
        ({"seed": rank}, "seed is 0 on rank 0, 1 on rank 1: want one value"),
        ({"C": 5 + rank // 2}, "num_classes is 5 on rank 0, 6 on rank 2"),
        ({"gather_dtype": (None, torch.bfloat16)[rank % 2]}, "gather_dtype is None on rank 0"),
        ({"class_weight": torch.ones(5) + rank}, "class_weight is '.*' on rank 0, '.*' on rank 1"),
        ({"class_weight": torch.ones(5) if rank else None}, "class_weight is None on rank 0, '.*' on rank 1"),
        *(({"margin": margin}, r"margin is '\w+\(.*\) \w+' on rank 0") for margin in (
            fm.AdaFace(h=0.333 - 0.1 * rank), fm.ElasticFace(sigma=0.1 * (1 + rank)), fm.ArcFace(m=M + 0.1 * rank),
            fm.AdaFace() if rank else Like(),
        )),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            head(**options)
    head(margin=fm.ArcFace(m=M), class_weight=M)


def optimizers_that_differ():
    """They raise in the first step, before any weight has changed."""
    rank = dist.get_rank()
    SGD, AdamW = optim.ClassSGD, optim.ClassAdamW
    for build, message in (
        (lambda h: SGD(h, lr=0.1 + (rank == 2)), "lr is 0.1 on rank 0, 1.1 on rank 2: want one value"),
        (lambda h: SGD(h, lr=0.1, momentum=0.5 * (rank == 1)), "momentum is 0.0 on rank 0, 0.5 on rank 1"),
        (lambda h: SGD(h, lr=0.1, in_backward=rank != 1), "in_backward is True on rank 0, False on rank 1"),
        (
            lambda h: AdamW(h, lr=0.1) if rank == 1 else SGD(h, lr=0.1),
            "optimizer is 'ClassSGD' on rank 0, 'ClassAdamW'",
        ),
        (lambda h: AdamW(h, betas=(0.9, 0.99 + 0.001 * rank), in_backward=True), r"betas is \(0.9, 0.99\) on rank 0"),
    ):
        it = head(sample_rate=0.5)
        optimizer, before = build(it), it.weight.detach().clone()
        with pytest.raises(ValueError, match=message):
            it(F, Y).loss.backward()
            optimizer.step()
        assert torch.equal(it.weight, before)


def a_loaded_optimizer_is_compared_again():
    it, loss = head(), lambda: it(F, Y).loss
    optimizer = optim.ClassSGD(it, lr=0.1)
    for differ in (False, True):
        saved = optimizer.state_dict()
        saved["param_groups"][0]["lr"] = 0.1 + differ * dist.get_rank()
        optimizer.load_state_dict(saved)
        loss().backward()
        if differ:
            with pytest.raises(ValueError, match=r"lr is 0\.1 on rank 0, 1\.1 on rank 1"):
                optimizer.step()
        else:
            optimizer.step()


def banks_that_differ():
    group, rank = dist.group.WORLD, dist.get_rank()
    for options, message in (
        ((3, 5, "paper", 0.5 + 0.1 * rank), "alpha is 0.5 on rank 0, 0.6 on rank 1"),
        ((3, 5, "sgd" if rank == 2 else "ema"), "update is 'ema' on rank 0, 'sgd' on rank 2"),
        ((3, 5 + rank), "num_classes is 5 on rank 0, 6 on rank 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fm.CenterBank(*options, group=group)


def checkpoints_of_different_steps():
    with pytest.raises(ValueError, match="step is 7 on rank 0, 8 on rank 1: want one value"):
        fm.checkpoint.save("never made", 7 + dist.get_rank(), {"x": F}, {}, group=dist.group.WORLD)
    assert not Path("never made").exists()


def groups_that_will_not_do():
    some = dist.new_group([0, 1])
    for group, message in (("gloo", "group is 'gloo': want a ProcessGroup"), (-100, "want a ProcessGroup")):
        with pytest.raises(ValueError, match=message):
            MarginHead(3, 5, fm.ArcFace(), group=group)
    if dist.get_rank() < 2:
        with pytest.raises(ValueError, match="2 of 3 processes: want a group of all"):
            MarginHead(3, 5, fm.ArcFace(), group=some)


def wrapped_heads():
    """Around a head or around a model that contains it; a head without a group is replicated as any module is."""
    for model in (head(C=6), nn.ModuleList([nn.Linear(3, 3), head(C=6)])):
        run = nn.parallel.DistributedDataParallel(Last(model))
        with pytest.raises(RuntimeError, match=r"DistributedDataParallel around a head in a group.* wrap the backbone"):
            run(F, Y)
    with pytest.raises(RuntimeError, match=r"fully_shard of a head in a group.* wrap the backbone"):
        fully_shard(nn.Sequential(nn.Linear(3, 3), head(C=7)), mesh=init_device_mesh("cpu", (3,)))
    with pytest.raises(RuntimeError, match=r"DataParallel of a head in a group.* wrap the backbone"):
        head()._replicate_for_data_parallel()
    copies = nn.parallel.DistributedDataParallel(MarginHead(3, 5, fm.ArcFace()), broadcast_buffers=False)
    copies(F, Y).loss.backward()


class Last(nn.Module):
    """Calls the head, which is the module or its last part."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, f, y):
        return (self.module[-1] if isinstance(self.module, nn.ModuleList) else self.module)(f, y).loss


MISTAKES = (
    wrapped_heads,
    bad_labels,
    unequal_batches,
    no_rows_at_all,
    wrong_hard_classes,
    options_that_differ,
    optimizers_that_differ,
    a_loaded_optimizer_is_compared_again,
    banks_that_differ,
    checkpoints_of_different_steps,
    groups_that_will_not_do,
)


@pytest.mark.parametrize("task", MISTAKES, ids=lambda task: task.__name__)
def test_every_rank_sees_a_mistake(ranks, task):
    ranks(3, task)


# ---------------------------------------------------------------------------------------------- accidents of one rank


def accident(kind):
    """The error of a rank, and after how many seconds it came."""
    it, unlucky = head(topk=1), dist.get_rank() == 1
    it(F, Y).loss.backward()
    start = time.monotonic()
    try:
        if unlucky and kind == "dies before a pass":
            os._exit(1)
        loss = it(F[:, :2] if unlucky and kind == "has other embeddings" else F, Y).loss
        if unlucky and kind == "dies within a pass":
            os._exit(1)
        if unlucky and kind == "makes no backward pass":
            time.sleep(TIMEOUT + 2)
        else:
            loss.backward()
    except Exception as error:
        return error, time.monotonic() - start
    return None, 0


DEATHS = ("dies before a pass", "dies within a pass")  # the other rank raises at once
ACCIDENTS = (*DEATHS, "has other embeddings", "makes no backward pass")


@pytest.mark.parametrize("kind", ACCIDENTS)
def test_the_other_rank_does_not_wait_longer_than_the_timeout(kind):
    pool = Ranks(2)
    try:
        pool.send(2, accident, kind, timeout=timedelta(seconds=TIMEOUT))
        error, seconds = pool.result(0)
    finally:
        pool.close()
    assert isinstance(error, RuntimeError) and seconds < TIMEOUT + 5 * (kind not in DEATHS)


@pytest.mark.parametrize(
    ("backend", "local", "current", "refused"),
    [("nccl", 1, 0, True), ("nccl", 1, 1, False), ("nccl", 0, 0, False), ("gloo", 1, 0, False)],
)
def test_two_ranks_on_one_gpu_are_refused_before_nccl_waits_for_ever(monkeypatch, backend, local, current, refused):
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(dist, "get_backend", lambda _: backend)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    with pytest.raises(ValueError, match=r"call torch.cuda.set_device\(1\) first") if refused else nullcontext():
        agreement.check_device(object())
