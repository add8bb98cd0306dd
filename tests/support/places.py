"""Problems run on a device by a backend: a place is (device, backend). What comes back is on the CPU."""

import os

import torch
from check import assert_as_good
from dense import F32, F64, cast, dense, run

from fastmargin.ops.exponentials import Keep, KeptBytes
from fastmargin.ops.nontarget_lse import log_sum_exp, nontarget_lse
from fastmargin.ops.problem import Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def moved(device, *tensors):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors]


def kept(x, w, y, *, bias=None, class_ids=None, topk=0, compute_dtype=None, backend=None):
    """nontarget_lse, keeping its exponentials."""
    keep = Keep(KeptBytes(2**40), float(x.detach().norm(dim=1).max()))
    out = log_sum_exp(Problem(x, w, y, bias, class_ids, True, compute_dtype), topk, backend, keep=keep)
    assert len(keep.kept.held) == 1
    return out


def run_on(place, x, w, y, bias, upstream, class_ids=None, op=nontarget_lse, **options):
    """`dense.run` there."""
    device, backend = place
    x, w, y, bias, class_ids = moved(device, x, w, y, bias, class_ids)
    got, classes = run(op, x, w, y, bias, moved(device, *upstream), class_ids=class_ids, backend=backend, **options)
    return moved("cpu", *got), classes.cpu()


def check(place, given, upstream, op=nontarget_lse, **options):
    """In float32 it errs at most twice as much as plain PyTorch, and finds the same classes as float64."""
    given32 = cast(F32, *given)
    truth, order = run(dense, *cast(F64, *given32), upstream, **options)
    plain, _ = run(dense, *given32, upstream, **options)
    got, classes = run_on(place, *given32, upstream, op=op, **options)
    assert torch.equal(classes, order)
    for a, p, t in zip(got, plain, truth, strict=True):
        assert_as_good(a, p, t)
