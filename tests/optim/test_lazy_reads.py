"""Weights that are read elsewhere, while an optimizer has updates of sampled classes pending."""

import pytest
import torch
from check import error
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastmargin as fm
from fastmargin.head.margin_head import MarginHead


def pair():
    """A model whose class weights are updated lazily, and one with a dense optimizer."""
    ours, theirs = (
        nn.Sequential(nn.Identity(), MarginHead(12, 2100, fm.CosFace(s=16.0), sample_rate=0.1).double())
        for _ in range(2)
    )
    return (ours, fm.optim.ClassSGD(ours[1], 0.5, 0.9)), (theirs, torch.optim.SGD([theirs[1].weight], 0.5, 0.9))


def steps(model, optimizer, first, last):
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        optimizer.zero_grad()
        f, y = torch.randn(8, 12, generator=generator, dtype=torch.float64), torch.arange(8)
        model[1](f, y).loss.backward()
        if not isinstance(optimizer, fm.optim.ClassSGD):
            model[1].weight.grad = model[1].weight.grad.to_dense()
        optimizer.step()


@pytest.mark.parametrize(
    "read",
    [
        lambda model: model[1].weight,
        lambda model: next(model[1].parameters()),
        lambda model: dict(model.named_parameters())["1.weight"],
        lambda model: list(model.parameters())[-1],
        lambda model: model.state_dict()["1.weight"],
    ],
    ids=["weight", "parameters", "named parameters of a model", "parameters of a model", "state_dict of a model"],
)
def test_weights_that_are_read_are_up_to_date(read):
    (ours, one), (theirs, two) = pair()
    steps(ours, one, 0, 3), steps(theirs, two, 0, 3)
    assert error(one.weight, theirs[1].weight) > 1e-6, "pending updates"
    assert error(read(ours), theirs[1].weight) < 1e-12


def test_a_training_pass_leaves_updates_pending():
    ours, one = pair()[0]
    steps(ours, one, 0, 5)
    assert len(one.products) == 1 + 5 and one.steps_applied.max() > one.steps_applied.min()


def test_an_averaged_model_averages_weights_that_are_up_to_date():
    (ours, one), (theirs, two) = pair()
    averages = AveragedModel(ours), AveragedModel(theirs)
    for t in (0, 2, 4):
        steps(ours, one, t, t + 2), steps(theirs, two, t, t + 2)
        for average, model in zip(averages, (ours, theirs), strict=True):
            average.update_parameters(model)
    assert error(averages[0].module[1].weight, averages[1].module[1].weight) < 1e-12
