"""When a class optimizer is taken off its head, and passes that no step() has ended."""

import pytest
import torch
from check import error
from test_optim import BACKENDS, SGD, C, batch, build, dense_steps, falling, train

from fastmargin import optim

ROUNDS = 6


def test_a_head_has_one_class_optimizer():
    head = build()
    one = optim.ClassSGD(head, 0.1)
    for kind in (optim.ClassSGD, optim.ClassAdamW):
        with pytest.raises(ValueError, match=r"the head has a ClassSGD: take that off first, by .*detach\(\)"):
            kind(head, 0.1)
    assert head.class_optimizer is one
    head.class_optimizer.detach()
    assert optim.ClassAdamW(head) is head.class_optimizer


@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_detached_optimizer_leaves_the_head_as_the_dense_one_would(in_backward, sample_rate):
    """Also between the backward pass, which has stepped, and step()."""
    ours, theirs = (build(sample_rate=sample_rate) for _ in range(2))
    one = optim.ClassSGD(ours, 0.5, **SGD["sgd"], in_backward=in_backward)
    two = torch.optim.SGD([theirs.weight], 0.5, **SGD["sgd"])
    train(ours, one, ROUNDS, falling)
    one.param_groups[0]["lr"] = falling(ROUNDS)
    dense_steps(theirs, two, ROUNDS + 1 if in_backward else ROUNDS, falling)
    one.zero_grad()
    loss = ours(*batch(ROUNDS)).loss
    if in_backward:
        loss.backward()
    one.detach()
    assert ours.class_optimizer is None and error(one.weight, theirs.weight) < 1e-12
    one.detach()  # a second time: nothing happens
    with pytest.raises(RuntimeError, match="this ClassSGD is detached from its head: create another one"):
        one.step()
    ours(*batch(1)).loss.backward()
    assert ours.weight.grad.is_sparse == (sample_rate < 1) and error(one.weight, theirs.weight) < 1e-12


def test_a_pass_of_before_detach_does_not_step():
    head = build()
    one = optim.ClassSGD(head, 0.5, in_backward=True)
    loss, before = head(*batch(0)).loss, head.weight.detach().clone()
    one.detach()
    with pytest.raises(RuntimeError, match="detached"):
        loss.backward()
    assert torch.equal(head.weight, before)


def test_another_optimizer_goes_on_with_the_state_of_the_first():
    ours, theirs = (build(sample_rate=0.1) for _ in range(2))
    one, two = optim.ClassSGD(ours, 0.5, 0.9), torch.optim.SGD([theirs.weight], 0.5, 0.9)
    train(ours, one, ROUNDS, falling)
    one.detach()
    again = optim.ClassSGD(ours, 0.5, 0.9, in_backward=True)
    again.load_state_dict(one.state_dict())
    train(ours, again, ROUNDS, falling)
    dense_steps(theirs, two, ROUNDS, falling)
    dense_steps(theirs, two, ROUNDS, falling)
    assert error(ours.weight, theirs.weight) < 1e-12


def test_an_extended_head_has_no_optimizer():
    head = build(sample_rate=0.1)
    one = optim.ClassSGD(head, 0.5, 0.9)
    train(head, one, 3)
    with pytest.raises(ValueError, match="n = -1"):
        head.extend(-1)
    assert head.class_optimizer is one
    head.extend(3)
    with pytest.raises(RuntimeError, match="detached"):
        one.step()
    train(head, optim.ClassSGD(head, 0.5, 0.9), 1)
    assert len(head.weight) == C + 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
def test_zero_grad_after_a_forward_pass_unlocks_the_head(sample_rate, backend):
    ours, theirs = (build(sample_rate=sample_rate, backend=backend) for _ in range(2))
    one = optim.ClassSGD(ours, 0.5, **SGD["sgd"], in_backward=True)
    two = torch.optim.SGD([theirs.weight], 0.5, **SGD["sgd"])
    for t in range(ROUNDS):
        given_up = ours(*batch(100 + t)).loss
        one.zero_grad()
        loss = ours(*batch(t)).loss
        with pytest.raises(RuntimeError, match="a second forward pass before step"):
            ours(*batch(t))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            given_up.backward()
        loss.backward()
        one.step()
        theirs(*batch(100 + t))  # so that both heads draw the same classes in the next pass
        theirs.weight.grad = None
        theirs(*batch(t)).loss.backward()
        theirs.weight.grad = theirs.weight.grad.to_dense()
        two.step()
    one.apply_lazy_updates()
    assert error(ours.weight, theirs.weight) < 1e-12 and one.state[one.weight]["step"] == ROUNDS


def test_the_pass_before_zero_grad_can_still_be_back_propagated():
    """loss, zero_grad(), backward(), step() is an order that many loops have."""
    ours, theirs = (build(sample_rate=0.1) for _ in range(2))
    one, two = optim.ClassSGD(ours, 0.5, 0.9, in_backward=True), torch.optim.SGD([theirs.weight], 0.5, 0.9)
    for t in range(ROUNDS):
        one.param_groups[0]["lr"] = falling(t)
        loss = ours(*batch(t)).loss
        one.zero_grad()
        loss.backward()
        one.step()
    dense_steps(theirs, two, ROUNDS, falling)
    assert error(ours.weight, theirs.weight) < 1e-12


@pytest.mark.parametrize("kind", [*SGD, "adamw"])
def test_zero_grad_after_a_backward_pass_counts_its_step(kind):
    """With the rate of the backward pass, although a schedule may have changed it since."""

    def run(end, change):
        head = build(sample_rate=0.1)
        one = (
            optim.ClassAdamW(head, in_backward=True)
            if kind == "adamw"
            else optim.ClassSGD(head, 0.5, **SGD[kind], in_backward=True)
        )
        for t in range(ROUNDS):
            one.param_groups[0]["lr"] = falling(t)
            head(*batch(t)).loss.backward()
            if change:
                one.param_groups[0]["lr"] = 7.0
            getattr(one, end)()
            one.step()  # the step is counted already
        assert one.state[one.weight]["step"] == ROUNDS
        return head.weight.detach()

    assert torch.equal(run("zero_grad", True), run("step", False))
    theirs = build(sample_rate=0.1)
    if kind != "adamw":
        dense_steps(theirs, torch.optim.SGD([theirs.weight], 0.5, **SGD[kind]), ROUNDS, falling)
        assert error(run("zero_grad", True), theirs.weight) < 1e-12
