"""OperandCache: steps with and without it are equal to the bit, whatever else writes the weights.

By the CUDA kernels on the CPU (emulation.py); `pytest -m gpu` runs the steps on a device.
"""

import copy

import pytest
import torch
from dense import F32, cast, problem
from emulation import wants_compiler
from torch._subclasses import FakeTensorMode

import fastmargin as fm
from fastmargin import optim
from fastmargin.ops.backends import native_can_run
from fastmargin.ops.class_update import Step
from fastmargin.ops.nontarget_lse import IMPLS, log_sum_exp
from fastmargin.ops.problem import BackwardInput, Problem

BF16, F16 = torch.bfloat16, torch.float16
C, D, B = 800, 37, 20  # three class chunks
OPTIMIZERS = {
    "sgd": lambda head, **options: optim.ClassSGD(head, 0.5, 0.9, 5e-2, in_backward=True, **options),
    "nesterov": lambda head, **options: optim.ClassSGD(head, 0.5, 0.9, nesterov=True, in_backward=True, **options),
    "without momentum": lambda head, **options: optim.ClassSGD(head, 0.5, in_backward=True, **options),
    "adamw": lambda head, **options: optim.ClassAdamW(head, 0.01, in_backward=True, **options),
}


@pytest.fixture
def made(emulated, monkeypatch):
    """A list that grows by an entry each time that the operands are made other than by a step."""
    calls, functions = [], IMPLS["emulated"].functions
    counted = {**functions, "operands": lambda *args: (calls.append(args), functions["operands"](*args))}
    monkeypatch.setitem(IMPLS, "emulated", IMPLS["emulated"]._replace(functions=counted))
    return calls


def build(kind="sgd", dtype=BF16, shape=(C, D), plain=False, place=("cpu", "emulated"), **options):
    """A head, one of whose class weights is zero, and its optimizer."""
    margin = fm.Softmax() if plain else fm.CosFace(s=16.0)
    device, backend = place
    head = fm.MarginHead(shape[1], shape[0], margin, bias=plain, topk=1, compute_dtype=dtype, backend=backend).to(
        device
    )
    with torch.no_grad():
        head.weight[7] = 0
    return head, OPTIMIZERS[kind](head, **options)


def step(t, head, optimizer, rows=B):
    """The loss, the gradient of the rows, and all tensors that the step changed."""
    generator = torch.Generator().manual_seed(t)
    device = head.weight.device
    x = torch.randn(rows, head.in_features, generator=generator).to(device).requires_grad_()
    loss = head(x, torch.randint(0, C // 4, (rows,), generator=generator).to(device)).loss
    loss.backward()
    optimizer.step()
    return [loss.detach(), x.grad, head.weight.detach().clone(), *(optimizer.state_dict()["state"][0].values())]


def same(got, want):
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(got, want, strict=True))


def cache_is_fresh(head, optimizer):
    """It holds the operands of the weights as they are now."""
    kept = optimizer.operand_cache.parts
    fresh = {name: torch.full_like(t, torch.nan) for name, t in kept.items()}
    ops = torch.ops.fastmargin if head.weight.is_cuda else torch.ops.fastmargin_emulated
    ops.class_operands(head.weight.detach(), head.margin.normalize_weight, *fresh.values())
    return same(kept.values(), fresh.values())


@wants_compiler
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("kind", "shape", "plain"),
    [*[(kind, (C, D), False) for kind in OPTIMIZERS], ("sgd", (300, 530), False), ("adamw", (C, D), True)],
    ids=str,
)
def test_steps_are_the_same_to_the_bit(made, kind, shape, plain, dtype):
    ours, theirs = build(kind, dtype, shape, plain, cache_operands=True), build(kind, dtype, shape, plain)
    for t in range(4):
        rows = 0 if t == 2 else B
        assert same(step(t, *ours, rows), step(t, *theirs, rows))
        assert cache_is_fresh(*ours)
    assert len(made) == 1  # by the first pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is run on a GPU")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(40_000, 512), (5_001, 531)], ids=str)
def test_steps_on_a_gpu_are_the_same_to_the_bit(kind, shape, dtype):
    if not native_can_run(torch.empty(0, device="cuda")):
        pytest.skip("built without CUDA: the CUDA kernels are NOT run")
    place = ("cuda", "native")
    ours, theirs = build(kind, dtype, shape, place=place, cache_operands=True), build(kind, dtype, shape, place=place)
    for t in range(4):
        assert same(step(t, *ours, rows=300), step(t, *theirs, rows=300))
        assert cache_is_fresh(*ours)


@wants_compiler
def test_passes_read_the_cache(made):
    ours, theirs = build(cache_operands=True), build()
    assert same(step(0, *ours), step(0, *theirs))
    ours[1].operand_cache.parts["operands"][3] += 1
    assert not same(step(1, *ours), step(1, *theirs))


def by_another_backend(head, optimizer):
    """A backend whose step does not write the cache."""
    head.backend = "reference"
    step(9, head, optimizer)
    head.backend = "emulated"


def by_some_rows(head, optimizer):
    rows, y = torch.arange(0, C, 3), torch.arange(B)
    optimizer.before_forward(rows)
    p = Problem(torch.ones(B, D), head.weight, y, class_ids=rows, compute_dtype=head.compute_dtype)
    log_sum_exp(p, 0, "emulated", optimizer).rest.sum().backward()
    optimizer.step()
    optimizer.apply_lazy_updates()


def other_weights():
    return torch.randn(C, D, generator=torch.Generator().manual_seed(5))


def assign(head, optimizer):
    head.weight.data = other_weights()


def assign_twice(head, optimizer):
    """The second may be allocated in the memory of the first weights, if that was freed."""
    head.weight.data = head.weight.data * 2
    head.weight.data = head.weight.data * 2


@torch.no_grad()
def assign_a_row(head, optimizer):
    head.weight[5] = 1.0


WRITES = {
    "an index": assign_a_row,
    "copy_ of a detached alias": lambda head, optimizer: head.weight.detach().copy_(other_weights()),
    "load_full_weight": lambda head, optimizer: head.load_full_weight(other_weights()),
    "load_state_dict": lambda head, optimizer: head.load_state_dict({"weight": other_weights()}, strict=False),
    "imprint": lambda head, optimizer: head.imprint(other_weights()[:50], torch.arange(50)),
    "other memory": assign,
    "other memory, twice": assign_twice,
    "another dtype and back": lambda head, optimizer: head.to(BF16).to(F32),
    "another compute_dtype": lambda head, optimizer: setattr(head, "compute_dtype", F16),
    "another backend": by_another_backend,
    "some rows": by_some_rows,
}


@wants_compiler
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_any_other_write_makes_it_anew(made, write):
    ours, theirs = build(cache_operands=True), build()
    for pair in (ours, theirs):
        step(0, *pair)
        write(*pair)
    for t in (1, 2):
        assert same(step(t, *ours), step(t, *theirs))
    assert len(made) == 2 and cache_is_fresh(*ours)


@wants_compiler
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_extended_head(made, kind):
    ours, theirs = build(kind, cache_operands=True), build(kind)
    ends = []
    for (head, optimizer), options in ((ours, {"cache_operands": True}), (theirs, {})):
        step(0, head, optimizer)
        head.extend(30)
        ends.append(step(1, head, OPTIMIZERS[kind](head, **options)))
    assert same(*ends)


@wants_compiler
def test_passes_that_do_not_step_leave_it(made):
    head, optimizer = build(cache_operands=True)
    step(0, head, optimizer)
    head.eval()(torch.ones(3, D), torch.arange(3))
    head.train().nearest(torch.ones(3, D), 2)
    head.weight.requires_grad_(False)
    head(torch.ones(3, D, requires_grad=True), torch.arange(3)).loss.backward()
    head.weight.requires_grad_(True)
    step(1, head, optimizer)
    assert len(made) == 1 and cache_is_fresh(head, optimizer)


@wants_compiler
def test_a_write_between_the_passes_is_refused_as_ever(made):
    head, _ = build(cache_operands=True)
    loss = head(torch.ones(3, D), torch.arange(3)).loss
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@wants_compiler
def test_an_invalidated_cache_is_made_again_in_the_backward_pass(made):
    ours, theirs = build(cache_operands=True), build()
    for head, _ in (ours, theirs):
        loss = head(torch.ones(3, D), torch.arange(3)).loss
        if head is ours[0]:
            ours[1].operand_cache.invalidate()
        loss.backward()
    assert torch.equal(ours[0].weight, theirs[0].weight) and len(made) == 2 and cache_is_fresh(*ours)


@wants_compiler
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_classes_whose_gradient_overflows_keep_their_operands(emulated, kind):
    x, w, y, _, (d_rest, d_target, _) = problem(B, D, C)
    x, w, d_rest, d_target = cast(F32, x, w, d_rest, d_target)
    functions = IMPLS["emulated"].functions
    scale = torch.tensor(1024.0)
    d_target[0] = torch.inf
    parts = [torch.empty(C, D, dtype=BF16), torch.empty(2, C)]
    cached = dict(zip(("operands", "scales"), parts, strict=True))
    functions["operands"](w, True, *parts)
    before = w.clone(), *(t.clone() for t in parts)
    p = Problem(x, w, y, compute_dtype=BF16)
    out = functions["fwd"](p, 0, False, **cached)
    state = [torch.zeros_like(w) for _ in range(1 if kind == "sgd" else 2)]
    hyper = [0.3, 0.9, 0.0, 0.0] if kind == "sgd" else [0.1, 0.0, 0.8, 0.95, 1e-6, 0.2, 0.05**0.5]
    given = BackwardInput(
        out.rest, out.topk_classes, out.expected_weight, out.exponentials, d_rest * scale, d_target * scale, None
    )
    functions["bwd_update"](p, given, False, False, Step(state, kind, hyper, scale), **cached)
    fresh = [torch.empty_like(t) for t in parts]
    functions["operands"](w, True, *fresh)
    assert same(parts, fresh)
    assert torch.equal(w[y[0]], before[0][y[0]]) and torch.equal(parts[0][y[0]], before[1][y[0]])
    assert int((parts[0] != before[1]).any(1).sum()) > C // 2


@wants_compiler
def test_the_cache_is_no_state(made):
    ours, theirs = build(cache_operands=True), build()
    step(0, *ours), step(0, *theirs)
    assert ours[1].state_dict()["state"][0].keys() == theirs[1].state_dict()["state"][0].keys()
    assert ours[0].state_dict().keys() == theirs[0].state_dict().keys()
    ours[1].load_state_dict(copy.deepcopy(ours[1].state_dict()))
    assert same(step(1, *ours), step(1, *theirs))
    assert copy.deepcopy(ours[0]).class_optimizer is None


@wants_compiler
@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"in_backward": False}, {}, "in_backward=False: want in_backward=True"),
        ({}, {"compute_dtype": None}, "compute_dtype = None: want torch.bfloat16 or torch.float16"),
        ({}, {"compute_dtype": F32}, "compute_dtype = torch.float32: want"),
        ({}, {"sample_rate": 0.1}, "sample_rate = 0.1: want 1.0"),
        ({}, {"backend": "stream"}, "the stream backend on cpu: want native on a GPU"),
        ({}, {"backend": "native"}, "the native backend on cpu: want native on a GPU"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [lambda head, **o: optim.ClassSGD(head, 0.1, **o), optim.ClassAdamW])
def test_where_there_can_be_none(emulated, make, options, changes, message):
    if changes.get("backend") == "native" and "native" not in IMPLS:
        pytest.skip("native kernels not built")
    head = fm.MarginHead(D, C, fm.CosFace(), **{"compute_dtype": BF16, "backend": "emulated"} | changes)
    with pytest.raises(ValueError, match=message):
        make(head, **{"in_backward": True, "cache_operands": True} | options)


@wants_compiler
def test_the_ops_check_cached_operands(emulated):
    x, w, y = torch.randn(3, 5), torch.randn(9, 5), torch.arange(3)
    fwd, make = IMPLS["emulated"].functions["fwd"], IMPLS["emulated"].functions["operands"]
    o, scales = torch.zeros(9, 5, dtype=BF16), torch.zeros(2, 9)
    for rows, compute, parts, message in (
        (None, BF16, (o, None), "want operands with their scales"),
        (None, BF16, (o[:4], scales), "want operands"),
        (None, BF16, (o, scales.T), "want scales"),
        (None, BF16, (o.T.contiguous().T, scales), "want contiguous operands"),
        (None, F16, (o, scales), "want operands"),
        (None, None, (w, scales), "want operands of bfloat16 or float16"),
        (torch.arange(4), BF16, (o, scales), "the operands of all classes, or class_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            fwd(Problem(x, w, y, None, rows, True, compute), 0, False, operands=parts[0], scales=parts[1])
    with pytest.raises(ValueError, match="want operands of bfloat16 or float16"):
        make(w, True, torch.zeros(9, 5), scales)
    torch.library.opcheck(make, (w, True, o, scales), test_utils="test_schema")


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
def test_the_native_ops_on_a_cpu_have_none():
    x, w, y = torch.randn(3, 5), torch.randn(9, 5), torch.arange(3)
    parts = torch.zeros(9, 5, dtype=BF16), torch.zeros(2, 9)
    with pytest.raises(ValueError, match="for GPUs"):
        torch.ops.fastmargin.nontarget_lse_fwd(x, w, y, None, None, None, True, 1, 0, None, False, *parts)


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
def test_shapes_are_known_without_running():
    op = torch.ops.fastmargin
    with FakeTensorMode():
        x, w, y = (torch.empty(*n, device="cuda") for n in ((3, 5), (9, 5), (3,)))
        parts = torch.empty(9, 5, dtype=BF16, device="cuda"), torch.empty(2, 9, device="cuda")
        given = (y.long(), None, None, None, True, 1)
        op.class_operands(w, True, *parts)
        rest, values, classes, *kept = op.nontarget_lse_fwd(x, w, *given, 2, BF16, True, *parts)
        saved = (BF16, rest, classes, *kept, rest, rest, values, True, False)
        dx, _ = op.nontarget_lse_bwd_update(x, w, *given, *saved, [w], "sgd", [0.0] * 4, None, *parts)
    assert rest.shape == (3,) and values.shape == classes.shape == (3, 2) and dx.shape == (3, 5)
