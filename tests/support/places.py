"""Problems run on a device by a backend: a place is (device, backend). What comes back is on the CPU."""

import torch
from check import assert_as_good
from dense import F32, F64, cast, dense, run

from fastmargin.ops.nontarget_lse import nontarget_lse


def moved(device, *tensors):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors]


def run_on(place, x, w, y, bias, upstream, class_ids=None, **options):
    """`dense.run` there."""
    device, backend = place
    x, w, y, bias, class_ids = moved(device, x, w, y, bias, class_ids)
    got, classes = run(
        nontarget_lse, x, w, y, bias, moved(device, *upstream), class_ids=class_ids, backend=backend, **options
    )
    return moved("cpu", *got), classes.cpu()


def check(place, given, upstream, **options):
    """In float32 it errs at most twice as much as plain PyTorch, and finds the same classes as float64."""
    given32 = cast(F32, *given)
    truth, order = run(dense, *cast(F64, *given32), upstream, **options)
    plain, _ = run(dense, *given32, upstream, **options)
    got, classes = run_on(place, *given32, upstream, **options)
    assert torch.equal(classes, order)
    for a, p, t in zip(got, plain, truth, strict=True):
        assert_as_good(a, p, t)
