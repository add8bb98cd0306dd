"""Weights of other libraries: loaded from files as they write them, they give the loss that they compute."""

import math
import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fastmargin as fm
from fastmargin.compat import insightface, pml

C, D = 10, 5


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, D, generator=generator), torch.randint(0, C, (8,), generator=generator)


def weights(dtype=torch.float32):
    return torch.randn(C, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def write_shards(folder, W, w=None, **changes):
    """What train_v2.py saves on W ranks, with stubs for backbone and optimizer, which are ignored."""
    w = weights() if w is None else w
    sizes = [len(w) // W + (rank < len(w) % W) for rank in range(W)]
    folder.mkdir(exist_ok=True)
    for rank, rows in enumerate(w.split(sizes)):
        net, shard = nn.Linear(2, 2), nn.Parameter(rows.clone())
        checkpoint = {
            "epoch": 1,
            "global_step": 2,
            "state_dict_backbone": net.state_dict(),
            "state_dict_softmax_fc": {"weight": shard.detach()},
            "state_optimizer": torch.optim.SGD([*net.parameters(), shard], 0.1).state_dict(),
            "state_lr_scheduler": {"base_lrs": [0.1], "last_epoch": 2},
        }
        torch.save(checkpoint | changes, folder / f"checkpoint_gpu_{rank}.pt")
    return folder


def loss_of_partial_fc(f, y, w, m2=0.0, m3=0.0):
    """The formulas of losses.CombinedMarginLoss and DistCrossEntropy."""
    cos = F.linear(F.normalize(f), F.normalize(w)).clamp(-1, 1)
    own = cos.gather(1, y[:, None])
    margined = own - m3 if m3 else (own.acos() + m2).cos()
    return F.cross_entropy(64 * cos.scatter(1, y[:, None], margined), y)


def loss_of_pml(f, y, w, m):
    """The formulas of losses.ArcFaceLoss, its margin in degrees; w [d, C]."""
    cos, m = F.normalize(f) @ F.normalize(w, dim=0), math.radians(m)
    own = cos.gather(1, y[:, None])
    theta = own.acos()
    margined = torch.where(theta <= math.pi - m, (theta + m).cos(), own - m * math.sin(m))
    return F.cross_entropy(64 * cos.scatter(1, y[:, None], margined), y)


@pytest.mark.parametrize("W", [1, 2, 3, 4, 12])  # of twelve ranks, two have no class
@pytest.mark.parametrize(
    ("margin", "numbers"),
    [(fm.ArcFace(m=0.5, beyond="none", slope="detached"), {"m2": 0.5}), (fm.CosFace(m=0.4), {"m3": 0.4})],
    ids=["arc", "cos"],
)
def test_partial_fc(tmp_path, W, margin, numbers):
    head = fm.MarginHead(D, C, margin)
    insightface.load_weight(head, write_shards(tmp_path / "run", W))
    assert torch.equal(head.weight, weights())
    f, y = batch()
    truth = loss_of_partial_fc(f.double(), y, weights().double(), **numbers)
    torch.testing.assert_close(head(f, y).loss.double(), truth, rtol=1e-5, atol=0)


def test_pml(tmp_path):
    torch.save({"W": weights().T}, tmp_path / "loss.pt")
    head = fm.MarginHead(D, C, fm.ArcFace(m=math.radians(28.6), beyond="linear"))
    pml.load_weight(head, tmp_path / "loss.pt")
    assert torch.equal(head.weight, weights())
    f, y = batch()
    truth = loss_of_pml(f.double(), y, weights().double().T, 28.6)
    torch.testing.assert_close(head(f, y).loss.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "margin"),
    [("ArcFaceLoss", fm.ArcFace(m=math.radians(28.6), beyond="linear")), ("CosFaceLoss", fm.CosFace())],
)
def test_pml_itself(tmp_path, name, margin):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = getattr(losses, name)(C, D)
    torch.save(theirs.state_dict(), tmp_path / "loss.pt")
    head = fm.MarginHead(D, C, margin)
    pml.load_weight(head, str(tmp_path / "loss.pt"))
    f, y = batch()
    torch.testing.assert_close(head(f, y).loss, theirs(f, y), rtol=1e-5, atol=0)


def test_other_dtypes_are_the_heads(tmp_path):
    head = fm.MarginHead(D, C, fm.ArcFace()).double()
    insightface.load_weight(head, write_shards(tmp_path, 2, weights(torch.bfloat16)))
    assert torch.equal(head.weight, weights(torch.bfloat16).double())


def load_on_ranks(folder):
    head = fm.MarginHead(D, C, fm.ArcFace(), group=dist.group.WORLD)
    for load, file in ((insightface.load_weight, folder / "run"), (pml.load_weight, folder / "loss.pt")):
        nn.init.constant_(head.weight, torch.nan)
        load(head, file)
        assert torch.equal(head.weight, weights()[slice(*head.class_range)])


def test_every_rank_reads_its_rows(ranks, tmp_path):
    write_shards(tmp_path / "run", 3)
    torch.save({"W": weights().T}, tmp_path / "loss.pt")
    ranks(4, load_on_ranks, tmp_path)


def test_pending_lazy_updates_are_not_applied_to_the_new_weights(tmp_path):
    head = fm.MarginHead(D, C, fm.ArcFace(), sample_rate=0.1)
    optimizer = fm.optim.ClassSGD(head, 0.1, 0.9, 0.1)
    head(*batch()).loss.backward()
    optimizer.step()
    insightface.load_weight(head, write_shards(tmp_path, 2))
    head._apply_lazy_updates()
    assert torch.equal(head.weight, weights())


# ---------------------------------------------------------------------------------------------- mistakes


class Crafted:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def refused(message):
    return pytest.raises(ValueError, match=message)


def test_shards_that_do_not_fit(tmp_path):
    head = fm.MarginHead(D, C, fm.ArcFace())
    before = head.weight.detach().clone()
    with refused(r"has no checkpoint_gpu_0.pt"):
        insightface.load_weight(head, tmp_path)
    folder = write_shards(tmp_path / "other", 2, torch.ones(C + 1, D))
    with refused(r"checkpoint_gpu_0.pt: the weight is \[6, 5\]: want \[5, 5\], of 10 classes on 2 ranks"):
        insightface.load_weight(head, folder)
    with refused(r"checkpoint_gpu_0.pt: the weight is \[5, 6\]: want \[5, 5\]"):
        insightface.load_weight(head, write_shards(tmp_path / "wide", 2, torch.ones(C, D + 1)))
    folder = write_shards(tmp_path / "gap", 3)
    (folder / "checkpoint_gpu_1.pt").unlink()
    with refused(r"checkpoint_gpu_1.pt is missing, and there are 2 files of other ranks"):
        insightface.load_weight(head, folder)
    folder = write_shards(tmp_path / "fewer", 3)
    (folder / "checkpoint_gpu_2.pt").unlink()
    with refused(r"checkpoint_gpu_0.pt: the weight is \[4, 5\]: want \[5, 5\], of 10 classes on 2 ranks"):
        insightface.load_weight(head, folder)
    for content, message in (
        ({}, "no 'weight' of state_dict_softmax_fc/weight: it has "),
        ([1], "no 'weight' of state_dict_softmax_fc/weight: it is no dict"),
        ({"weight": [1]}, "state_dict_softmax_fc/weight is a list: want a matrix of floating point"),
        ({"weight": torch.ones(C)}, r"is torch.float32 \[10\]: want a matrix"),
        ({"weight": torch.ones(C, D).long()}, r"is torch.int64 \[10, 5\]: want a matrix of floating point"),
    ):
        with refused(message):
            insightface.load_weight(head, write_shards(tmp_path / "odd", 1, state_dict_softmax_fc=content))
    assert torch.equal(head.weight, before)


def test_files_of_pml_that_do_not_fit(tmp_path):
    head, file = fm.MarginHead(D, C, fm.ArcFace()), tmp_path / "loss.pt"
    for content, message in (
        ({"W": weights()}, r"W is \[10, 5\]: want \[5, 10\], features times classes"),
        ({"weight": weights()}, "no 'W' of W: it has weight"),
        (weights(), "no 'W' of W: it is no dict"),
    ):
        torch.save(content, file)
        with refused(f"{re.escape(str(file))}: {message}"):
            pml.load_weight(head, file)
    with refused("absent.pt: not a file of torch.save"):
        pml.load_weight(head, tmp_path / "absent.pt")


def test_nothing_in_a_file_is_run(tmp_path):
    head = fm.MarginHead(D, C, fm.ArcFace())
    torch.save({"W": weights().T, "more": Crafted(tmp_path / "ran")}, tmp_path / "loss.pt")
    folder = write_shards(tmp_path / "run", 1, epoch=Crafted(tmp_path / "ran"))
    with refused(r"loss.pt: not a file of torch.save with tensors and plain values alone"):
        pml.load_weight(head, tmp_path / "loss.pt")
    with refused(r"checkpoint_gpu_0.pt: not a file of torch.save with tensors and plain values alone"):
        insightface.load_weight(head, folder)
    assert not (tmp_path / "ran").exists()
