"""A step of the class weights bumps their version counter: graphs that saved the old weights raise."""

import pytest
import torch
from test_optim import BACKENDS, batch, build

import fastmargin as fm
from fastmargin import optim


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_term_on_the_weights_sees_those_of_before_the_step_or_raises(backend):
    """The backward pass visits last what was computed first."""

    def gradient(head, in_backward, head_first):
        optim.ClassSGD(head, 5.0, in_backward=in_backward)
        f, y = batch(0)
        f.requires_grad_()
        losses = [lambda: head(f, y).loss, lambda: (f @ head.weight.detach().T).square().mean()]
        sum(loss() for loss in (losses if head_first else losses[::-1])).backward()
        return f.grad

    for head_first in (True, False):
        want = gradient(build(backend=backend), False, head_first)
        if head_first:
            assert torch.equal(gradient(build(backend=backend), True, True), want)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradient(build(backend=backend), True, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_backward", [False, True])
def test_the_graph_of_a_step_ago_is_refused(backend, in_backward):
    head = build(backend=backend)
    one = optim.ClassSGD(head, 0.5, in_backward=in_backward)
    old = head(*batch(0)).loss
    old.backward(retain_graph=True)
    one.step()
    head(*batch(1))  # the next step's forward pass
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()
    assert torch.equal(head.weight, before)


def test_a_scaled_gradient_without_the_scaler_is_refused():
    head = fm.MarginHead(4, 6, fm.ArcFace())
    optimizer = fm.optim.ClassSGD(head, lr=0.1, in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(head(torch.randn(3, 4), torch.arange(3)).loss).backward()
    with pytest.raises(RuntimeError, match="give scaler= to the optimizer"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="no gradient of the class weights"):
        head.grad_norm()
