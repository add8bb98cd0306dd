"""ClassSGD and ClassAdamW against torch's optimizers: full classes, sampled classes, in the backward pass, on ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from check import error
from dense import F32, F64

import fastmargin as fm
from fastmargin import optim
from fastmargin.head.margin_head import MarginHead
from fastmargin.ops.nontarget_lse import IMPLS

C, D, B = 2100, 12, 20
BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")),
    "stream",
    "reference",
]
SGD = {
    "sgd": dict(momentum=0.9, weight_decay=5e-2),
    "nesterov": dict(momentum=0.9, weight_decay=5e-2, nesterov=True),
    "plain": dict(weight_decay=5e-2),
}


def build(seed=0, dtype=F64, **options):
    return MarginHead(D, C, fm.CosFace(s=16.0), seed=seed, **options).to(dtype)


def batch(t, dtype=F64):
    generator = torch.Generator().manual_seed(t)
    return torch.randn(B, D, dtype=dtype, generator=generator), torch.randint(0, C, (B,), generator=generator)


def train(head, optimizer, steps, lr=None, dtype=F64):
    """Trains, and returns the gradient of the rows of the first batch."""
    first = None
    for t in range(steps):
        if lr:
            optimizer.param_groups[0]["lr"] = lr(t)
        x, y = batch(t, dtype)
        x.requires_grad_()
        optimizer.zero_grad()
        head(x, y).loss.backward()
        first = x.grad if t == 0 else first
        optimizer.step()
    return first


def falling(t):
    return 0.5 / (1 + t % 7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
@pytest.mark.parametrize("kind", [*SGD, "adamw"])
def test_full_classes_step_as_torch_does(kind, in_backward, backend):
    ours, theirs = build(backend=backend), build(backend=backend)
    if kind == "adamw":
        one = optim.ClassAdamW(ours, 0.01, (0.8, 0.99), 1e-7, 0.1, in_backward=in_backward)
        two = torch.optim.AdamW([theirs.weight], 0.01, (0.8, 0.99), 1e-7, 0.1)
    else:
        one = optim.ClassSGD(ours, 0.5, **SGD[kind], in_backward=in_backward)
        two = torch.optim.SGD([theirs.weight], 0.5, **SGD[kind])
    lr = None if kind == "adamw" else falling
    dx, want = train(ours, one, 6, lr), train(theirs, two, 6, lr)
    assert torch.equal(dx, want)  # with the weights before the step
    assert error(ours.weight - build().weight, theirs.weight - build().weight) < 1e-12
    assert ours.weight.grad is None if in_backward else ours.weight.grad is not None


def dense_steps(head, optimizer, steps, lr):
    """Sampled classes by torch: a dense gradient with zeros where a class was not drawn."""
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr(t)
        head.weight.grad = None
        head(*batch(t)).loss.backward()
        head.weight.grad = head.weight.grad.to_dense()
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
@pytest.mark.parametrize("kind", SGD)
def test_sampled_sgd_is_the_dense_optimizer(kind, in_backward, backend, monkeypatch):
    """Momentum and decay of the steps that a class skipped, at changing rates; the list of products is cut once."""
    monkeypatch.setattr(optim.sgd, "HISTORY", 20)
    ours, theirs = (build(sample_rate=0.1, backend=backend) for _ in range(2))
    one = optim.ClassSGD(ours, 0.5, **SGD[kind], in_backward=in_backward)
    two = torch.optim.SGD([theirs.weight], 0.5, **SGD[kind])
    train(ours, one, 30, falling)
    assert len(one.products) == 1 + 30 - 20
    stale = error(one.weight, theirs.weight)
    dense_steps(theirs, two, 30, falling)
    assert stale > 1e-3 and error(one.weight, theirs.weight) > 1e-6  # some rows are not updated yet
    one.apply_lazy_updates()
    assert error(ours.weight, theirs.weight) < 1e-12
    if "momentum" in SGD[kind]:
        mine, right = (o.state[h.weight]["momentum_buffer"] for o, h in ((one, ours), (two, theirs)))
        assert error(mine, right) < 1e-12


def test_float32_catches_up_after_a_thousand_steps():
    """A row that was drawn once, long ago: a product of a thousand matrices."""

    def begin():
        head = build(dtype=F32, sample_rate=1e-3)
        one = optim.ClassSGD(head, 0.1, momentum=0.9, weight_decay=1e-3)
        train(head, one, 3, dtype=F32)
        return head, one

    ours, one = begin()
    for _ in range(1000):
        one.subset = torch.empty(0, dtype=torch.int64)
        one._advance()
    one.apply_lazy_updates()
    fresh, again = begin()
    again.apply_lazy_updates()
    w, v = fresh.weight.detach().double(), again.state[fresh.weight]["momentum_buffer"].double()
    for _ in range(1000):
        v = 0.9 * v + 1e-3 * w
        w = w - 0.1 * v
    assert error(ours.weight, w) < 1e-5 and error(one.state[ours.weight]["momentum_buffer"], v) < 1e-5


def test_sampled_adamw_freezes_what_sits_out():
    head = build(sample_rate=0.05)
    one = optim.ClassAdamW(head, 0.01)
    before = head.weight.detach().clone()
    used = torch.zeros(C, dtype=torch.bool)
    for t in range(3):
        one.zero_grad()
        head(*batch(t)).loss.backward()
        used[head.sampled] = True
        one.step()
    moved = (head.weight.detach() != before).any(1)
    assert torch.equal(moved, used) and 0 < int(used.sum()) < C
    assert one.state[head.weight]["step"] == 3 and not one.state[head.weight]["exp_avg"][~used].any()


@pytest.mark.parametrize("in_backward", [False, True])
def test_whoever_reads_the_weights_reads_them_caught_up(in_backward):
    reads = {
        "nearest": lambda head: head.nearest(batch(9)[0], 1)[0],
        "logits": lambda head: head.get_logits(batch(9)[0]),
        "state": lambda head: head.state_dict()["weight"],
        "loss": lambda head: head.eval()(*batch(9)).loss,
    }
    for read in reads.values():
        ours, theirs = (build(sample_rate=0.1) for _ in range(2))
        train(ours, optim.ClassSGD(ours, 0.5, momentum=0.9, in_backward=in_backward), 5, falling)
        dense_steps(theirs, torch.optim.SGD([theirs.weight], 0.5, momentum=0.9), 5, falling)
        with torch.no_grad():
            assert error(read(ours), read(theirs)) < 1e-12


@pytest.mark.parametrize(
    "write",
    [
        lambda head: head.imprint(
            torch.randn(50, D, dtype=F64, generator=torch.Generator().manual_seed(1)), torch.arange(50)
        ),
        lambda head: head.load_full_weight(torch.ones(C, D)),
        lambda head: head.load_state_dict(build(seed=3, sample_rate=0.1).state_dict()),
        lambda head: head.extend(3),
        lambda head: head.class_optimizer and (head.class_optimizer.detach(), optim.ClassSGD(head, 0.1)),
        lambda head: copy.deepcopy(head),
    ],
    ids=["imprint", "load_full_weight", "load_state_dict", "extend", "another optimizer", "a copy"],
)
def test_whoever_writes_the_weights_finds_them_caught_up(write):
    ours, theirs = (build(sample_rate=0.1) for _ in range(2))
    one = optim.ClassSGD(ours, 0.5, momentum=0.9, weight_decay=5e-2)
    train(ours, one, 5, falling)
    dense_steps(theirs, torch.optim.SGD([theirs.weight], 0.5, momentum=0.9, weight_decay=5e-2), 5, falling)
    for head in (ours, theirs):
        write(head)
    if ours.weight.shape == (C, D):
        one.apply_lazy_updates()
    assert error(ours.weight, theirs.weight) < 1e-12
    assert copy.deepcopy(ours).class_optimizer is None


def test_a_dense_gradient_of_a_sampled_head(monkeypatch):
    """A term beside the head's loss makes it dense: skipped rows are updated first."""
    ours, theirs = (build(sample_rate=0.1) for _ in range(2))
    one, two = optim.ClassSGD(ours, 0.5, 0.9, 5e-2), torch.optim.SGD([theirs.weight], 0.5, 0.9, weight_decay=5e-2)
    train(ours, one, 5, falling)
    dense_steps(theirs, two, 5, falling)
    for head, optimizer in ((ours, one), (theirs, two)):
        optimizer.zero_grad()
        head(*batch(6)).loss.backward()
        head.weight.grad = head.weight.grad.to_dense()
        optimizer.step()
    one.apply_lazy_updates()
    assert error(ours.weight, theirs.weight) < 1e-12


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_backend_named_by_the_environment(monkeypatch, in_backward):
    weights = []
    for name in ("", "reference"):
        monkeypatch.setenv("FASTMARGIN_BACKEND", name)
        head = build(sample_rate=0.1)
        train(head, optim.ClassSGD(head, 0.5, 0.9, in_backward=in_backward), 2)
        weights.append(head.state_dict()["weight"])
    assert error(*weights) < 1e-12 and not torch.equal(weights[0], build().weight)


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
def test_a_step_is_the_backends_own(monkeypatch):
    def refuse(*_):
        raise AssertionError("a native op of a head whose backend is stream")

    functions = dict.fromkeys(("update", "lazy_update"), refuse)
    monkeypatch.setitem(optim.sgd.IMPLS, "native", optim.sgd.IMPLS["native"]._replace(functions=functions))
    head = build(sample_rate=0.1, backend="stream")
    train(head, optim.ClassSGD(head, 0.5, 0.9), 2)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_two_losses_of_sampled_classes_in_one_backward_pass(backend):
    ours, theirs = (build(sample_rate=0.1, backend=backend) for _ in range(2))
    one, two = optim.ClassSGD(ours, 0.5, 0.9), torch.optim.SGD([theirs.weight], 0.5, 0.9)
    train(ours, one, 3, falling)
    dense_steps(theirs, two, 3, falling)
    for head, optimizer in ((ours, one), (theirs, two)):
        optimizer.zero_grad()
        (head(*batch(5)).loss + head(*batch(6)).loss).backward()
    theirs.weight.grad = theirs.weight.grad.to_dense()
    one.step(), two.step(), one.apply_lazy_updates()
    assert error(ours.weight, theirs.weight) < 1e-12


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
def test_a_state_dict_resumes(kind, sample_rate):
    def begin():
        head = build(sample_rate=sample_rate)
        made = optim.ClassAdamW(head) if kind == "adamw" else optim.ClassSGD(head, 0.3, 0.9, 1e-2)
        return head, made, torch.optim.lr_scheduler.StepLR(made, 2, 0.5)

    def run(head, optimizer, scheduler, steps):
        for t in steps:
            optimizer.zero_grad()
            head(*batch(t)).loss.backward()
            optimizer.step()
            scheduler.step()

    whole = begin()
    run(*whole, range(7))
    first = begin()
    run(*first, range(3))
    states = copy.deepcopy([part.state_dict() for part in first])
    second = begin()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    run(*second, range(3, 7))
    whole[1].apply_lazy_updates()
    second[1].apply_lazy_updates()
    assert error(second[0].weight, whole[0].weight) < 1e-13


def test_gradient_accumulation_and_clipping_without_in_backward():
    ours, theirs = build(), build()
    one, two = optim.ClassSGD(ours, 0.5), torch.optim.SGD([theirs.weight], 0.5)
    for head, optimizer in ((ours, one), (theirs, two)):
        for t in range(2):
            head(*batch(t)).loss.backward()
        torch.nn.utils.clip_grad_norm_([head.weight], 0.1)
        optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("in_backward", [False, True])
def test_grad_scaler(in_backward):
    ours, theirs = build(dtype=F32), build(dtype=F32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    one = optim.ClassSGD(ours, 0.5, 0.9, in_backward=in_backward, scaler=scaler if in_backward else None)
    two = torch.optim.SGD([theirs.weight], 0.5, 0.9)
    for t in range(3):
        one.zero_grad()
        two.zero_grad()
        scaler.scale(ours(*batch(t, F32)).loss).backward()
        if in_backward:
            one.step()
        else:
            scaler.step(one)
            scaler.update()
        theirs(*batch(t, F32)).loss.backward()
        two.step()
    assert error(ours.weight, theirs.weight) < 1e-6


def test_a_batch_whose_gradient_overflows_changes_nothing_in_backward():
    head = build(dtype=F32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    one = optim.ClassSGD(head, 0.5, 0.9, in_backward=True, scaler=scaler)
    before = head.weight.detach().clone()
    (scaler.scale(head(*batch(0, F32)).loss) * 1e38).backward()
    one.step()
    assert torch.equal(head.weight, before) and not one.state[head.weight]["momentum_buffer"].any()


def test_in_backward_every_pass_is_a_step():
    head = build()
    one = optim.ClassSGD(head, 0.5, in_backward=True)
    loss = head(*batch(0)).loss
    with pytest.raises(RuntimeError, match="a second forward pass before step"):
        head(*batch(1))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward pass before step|modified by an inplace"):
        loss.backward()
    one.step()
    with torch.no_grad():
        head(*batch(1))  # a forward pass under no_grad is no step
        head(*batch(2))
    head(*batch(1)).loss.backward()
    one.step()
    assert one.state[head.weight]["step"] == 2
    one.step()  # without a pass since the last one
    assert one.state[head.weight]["step"] == 2


def test_a_frozen_head_steps_nowhere():
    head = build()
    one = optim.ClassSGD(head, 0.5, in_backward=True)
    head.weight.requires_grad_(False)
    before = head.weight.clone()
    x, y = batch(0)
    head(x.requires_grad_(), y).loss.backward()
    one.step()
    assert torch.equal(head.weight, before) and x.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda head: optim.ClassSGD(head.weight, 0.1), "head is a Parameter: want a MarginHead"),
        (lambda head: optim.ClassSGD(head, -0.1), "lr = -0.1: want 0 or more"),
        (lambda head: optim.ClassSGD(head, 0.1, momentum=1.0), "momentum = 1.0: want 0 or more, below 1"),
        (lambda head: optim.ClassSGD(head, 0.1, weight_decay=-1.0), "weight_decay = -1.0"),
        (lambda head: optim.ClassSGD(head, 0.1, nesterov=True), "want a momentum above 0"),
        (lambda head: optim.ClassSGD(head, 0.1, scaler=object()), "scaler is for in_backward=True"),
        (lambda head: optim.ClassAdamW(head, betas=(0.9, 1.0)), r"betas\[1\] = 1.0"),
        (lambda head: optim.ClassAdamW(head, eps=-1.0), "eps = -1.0"),
        (lambda head: optim.ClassSGD(head, 0.1).add_param_group({"params": [head.weight]}), "one parameter"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make(build())


# Ranks: every rank steps the classes that it holds


def sharded(kind, in_backward, sample_rate, whole):
    group = None if whole else dist.group.WORLD
    head = build(sample_rate=sample_rate, group=group)
    made = {
        "sgd": lambda: optim.ClassSGD(head, 0.5, 0.9, 1e-2, in_backward=in_backward),
        "adamw": lambda: optim.ClassAdamW(head, in_backward=in_backward),
    }[kind]()
    for t in range(4):
        x, y = batch(t)
        local = slice(None) if whole else slice(*(B * (dist.get_rank() + i) // dist.get_world_size() for i in (0, 1)))
        made.zero_grad()
        head(x[local], y[local]).loss.backward()
        made.step()
    made.apply_lazy_updates()
    return head.weight.detach()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
def test_ranks_equal_one_process(ranks, kind, in_backward, sample_rate):
    whole = sharded(kind, in_backward, sample_rate, whole=True)
    parts = ranks(2, sharded, kind, in_backward, sample_rate, False)
    assert error(torch.cat(parts), whole) < 1e-12


def replica():
    with pytest.raises(ValueError, match="a head that other processes hold too"):
        optim.ClassSGD(build(), 0.1, in_backward=True)


def test_a_replica_does_not_step_in_backward(ranks):
    ranks(2, replica)
