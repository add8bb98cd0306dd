"""Services of a MarginHead other than its loss: compilation, nearest, initial rows, extend, autocast, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from check import error
from torch import nn

import fastmargin as fm
from fastmargin.head.margin_head import MarginHead
from fastmargin.head.sampling import initial_rows

F32, F64 = torch.float32, torch.float64
HALF = [torch.bfloat16, torch.float16]


def problem(margin=None, C=50, d=16, B=12, **options):
    margin = fm.ArcFace() if margin is None else margin
    head = MarginHead(d, C, margin, **options)
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return head, 9 * torch.randn(B, d), torch.randint(0, C, (B,))


def step(head, f, y):
    """Outputs, df and dw of one pass of a head, whose state does not change."""
    head.zero_grad()
    f = f.detach().clone().requires_grad_()
    out = head(f, y)
    out.loss.backward()
    return [*(t.detach() for t in out), f.grad, head.weight.grad]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------- compiled, deterministic


def check_compiled(margin, backend, compiler):
    torch._dynamo.reset()
    head, f, y = problem(margin, topk=2, backend=backend)
    y[2] = -100
    compiled = torch.compile(head, fullgraph=True, backend=compiler)
    for got, want in zip(step(compiled, f, y), step(head, f, y), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert error(got.nan_to_num(), want.nan_to_num()) < 1e-5


@pytest.mark.parametrize("margin", [fm.ArcFace, fm.SphereFace])
def test_compiles_whole(backend, margin):
    check_compiled(margin(), backend, "aot_eager")


@pytest.mark.parametrize(("margin", "backend"), [(fm.ArcFace, None), (fm.SphereFace, "stream")])
def test_compiles_whole_with_inductor(margin, backend):
    check_compiled(margin(), backend, "inductor")


def test_compiled_code_reports_bad_labels_when_asked():
    torch._dynamo.reset()
    head, f, y = problem(reduction="none")
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    y[3] = y[5] = 77
    loss = compiled(f, y).loss
    assert loss[3] == loss[5] == 0 and (loss[:3] > 0).all()
    compiled(f, y.clamp(max=49))  # a good batch does not hide the bad one before it
    with pytest.raises(ValueError, match=r"label 77 of row 3 is outside \[0, 50\).*-100 \(2 such rows"):
        head.check()
    head.check()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_two_runs_are_equal_to_the_bit(backend, dtype):
    head, f, y = problem(C=2000, d=40, B=70, topk=4, backend=backend)
    head, f = head.to(dtype), f.to(dtype)
    assert equal(step(head, f, y), step(head, f, y))


# ---------------------------------------------------------------------------------------------- neighbors and weights


@pytest.mark.parametrize(
    ("margin", "bias"),
    [(fm.ArcFace(), False), (fm.SphereFace(), False), (fm.Softmax(), True), (fm.L2Softmax(), True)],
)
def test_nearest_is_topk_of_the_logits(backend, margin, bias):
    head, f, _ = problem(copy.deepcopy(margin), C=700, bias=bias, backend=backend)
    head.double()
    z = head.get_logits(f.double()).detach()
    if not margin.plain:
        z = F.normalize(f.double()) @ F.normalize(head.weight.detach()).T
        torch.testing.assert_close(head.get_logits(f.double()), z * margin.scale(f.double().norm(dim=1))[:, None])
    for k in (1, 6, 703):
        scores, classes = found = head.nearest(f.double(), k)
        assert scores is found.scores and classes is found.classes
        want = z.topk(min(k, 700))
        assert scores.shape == classes.shape == (12, k) and not scores.requires_grad
        assert torch.equal(classes[:, :700], want.indices)
        torch.testing.assert_close(scores[:, :700], want.values)
        assert (scores[:, 700:] == -torch.inf).all() and (classes[:, 700:] == -1).all()


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_leaves_weights_and_results_alone(backend, dtype):
    for margin in (fm.ArcFace(), fm.SphereFace(), fm.L2Softmax()):
        head, f, y = problem(margin, topk=3, backend=backend)
        f = f.to(dtype)
        storage, before = head.weight.data_ptr(), head.weight.detach().clone()
        want = step(head, f.float(), y)
        with torch.autocast("cpu", dtype=dtype):
            *got, df, dw = step(head, f, y)
        assert head.weight.dtype == F32 and head.weight.data_ptr() == storage and torch.equal(head.weight, before)
        assert equal(got, want[:4])
        assert dw.dtype == F32 and torch.equal(dw, want[5])
        assert df.dtype == dtype and torch.equal(df, want[4].to(dtype)) and df.isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_leaves_inference_alone(dtype):
    for margin in (fm.ArcFace(), fm.L2Softmax()):
        head, f, _ = problem(margin)
        want = *head.nearest(f, 2), head.get_logits(f)
        with torch.autocast("cpu", dtype=dtype):
            assert equal((*head.nearest(f, 2), head.get_logits(f)), want)


def test_a_scaled_loss_does_not_overflow(backend):
    head, f, y = problem(backend=backend)
    want = step(head, f, y)[-1]
    head.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        (65536 * head(f, y).loss).backward()
    torch.testing.assert_close(head.weight.grad, 65536 * want)


def test_initial_rows_belong_to_seed_and_class():
    state = torch.get_rng_state()
    small, large = MarginHead(24, 1000, fm.ArcFace()), MarginHead(24, 3000, fm.CosFace())
    assert torch.equal(torch.get_rng_state(), state)
    w = large.weight.detach()
    assert torch.equal(small.weight, w[:1000])
    for lo, hi in ((0, 1), (1000, 1030), (1023, 2049), (2048, 2048), (2990, 3000)):
        assert torch.equal(initial_rows(lo, hi, 24, 0), w[lo:hi])
    assert w.mean().abs() < 2e-4 and abs(w.std() / 0.01 - 1) < 0.01 and len(w.unique(dim=0)) == 3000
    assert not torch.isclose(MarginHead(24, 1000, fm.ArcFace(), seed=1).weight, small.weight).all(dim=1).any()


def test_initial_rows_do_not_depend_on_the_default_dtype():
    want, before = initial_rows(0, 5, 7, 0), torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        head = MarginHead(7, 5, fm.Softmax(), bias=True)
    finally:
        torch.set_default_dtype(before)
    assert head.weight.dtype == head.bias.dtype == F32 and torch.equal(head.weight, want)


def test_extend():
    large = MarginHead(8, 3000, fm.Softmax(), bias=True, seed=5)
    head = MarginHead(8, 1000, fm.Softmax(), bias=True, seed=5)
    nn.init.normal_(head.bias)
    bias = head.bias.detach().clone()
    head.extend(0)
    head.extend(2000)
    assert torch.equal(head.weight, large.weight) and isinstance(head.weight, nn.Parameter)
    assert torch.equal(head.bias, torch.cat((bias, torch.zeros(2000)))) and head.class_range == (0, 3000)
    assert all(t.isfinite().all() for t in step(head, torch.randn(2, 8), torch.tensor([0, 2999]))[:2])
    for refused in (
        MarginHead(8, 10, fm.ArcFace(m=torch.full((10,), 0.5))),
        MarginHead(8, 10, fm.ArcFace(), class_weight=torch.ones(10)),
    ):
        with pytest.raises(ValueError, match=r"length of m is 10; want 12|class_weight"):
            refused.extend(2)
        assert refused.num_classes == len(refused.weight) == 10
    with pytest.raises(ValueError, match="n = -1: want an int of 0 or more"):
        head.extend(-1)


def test_imprint():
    for margin in (fm.ArcFace(), fm.L2Softmax()):
        head, f, _ = problem(margin)
        before, classes = head.weight.detach().clone(), torch.tensor([9, 4, 9, 9])
        head.imprint(f[:4], classes)
        unit, rest = F.normalize(f), [c for c in range(50) if c not in (4, 9)]
        means = torch.stack((unit[1], unit[[0, 2, 3]].mean(0)))
        if margin.normalize_weight:
            means = F.normalize(means) * before[[4, 9]].norm(dim=1, keepdim=True)
        torch.testing.assert_close(head.weight[[4, 9]], means)
        assert torch.equal(head.weight[rest], before[rest])
        assert head.nearest(f[1:2], 1)[1].item() == 4
        assert all(t.isfinite().all() for t in step(head, f[1:2], torch.tensor([4]))[:2])
    with pytest.raises(ValueError, match=r"want embeddings \[n, 16\] and classes \[n\]; got \[3, 16\] and \[4\]"):
        head.imprint(f[:3], classes)
    with pytest.raises(ValueError, match=r"classes run from 0 to 50: want \[0, 50\)"):
        head.imprint(f[:2], torch.tensor([0, 50]))


def test_load_full_weight():
    head, _, _ = problem()
    storage, w = head.weight.data_ptr(), torch.randn(50, 16, dtype=F64)
    head.load_full_weight(w)
    assert torch.equal(head.weight, w.float()) and head.weight.data_ptr() == storage and head.weight.requires_grad
    with pytest.raises(ValueError, match=r"weight is \[16, 50\]: want a tensor \[50, 16\]"):
        head.load_full_weight(w.T)


def test_replicated_parameters():
    learned = fm.ArcFace(m=nn.Parameter(torch.full((50,), 0.5)), learn_scale=True)
    head, _, _ = problem(learned)
    assert {id(p) for p in head.replicated_parameters()} == {id(learned.s), id(learned.m)}
    head, _, _ = problem(fm.L2Softmax(), bias=True)
    assert {id(p) for p in head.replicated_parameters()} == {id(head.margin.s), id(head.bias)}
    assert problem()[0].replicated_parameters() == []


def test_state_dict_round_trip():
    def build(seed):
        torch.manual_seed(seed)
        margin = fm.AdaFace(momentum=0.5)
        return problem(margin, topk=2, class_weight=torch.rand(50), seed=seed)

    head, f, y = build(1)
    step(head, f, y)
    again, _, _ = build(2)
    state = head.state_dict()
    assert sorted(state) == ["class_weight", "margin.mu", "margin.sd", "weight"]
    again.load_state_dict(state)
    assert equal(step(head, f, y), step(again, f, y))


def test_statistics_move_in_training_only():
    head, f, y = problem(fm.AdaFace(momentum=1.0))
    y[0] = -100
    head.eval()(f, y)
    assert head.margin.mu == 20 and head.margin.sd == 100
    head.train()(f, y)
    sd, mu = torch.std_mean(f[1:].norm(dim=1))
    torch.testing.assert_close((head.margin.mu, head.margin.sd), (mu, sd))


def test_training_reaches_every_row():
    C, n = 20, 200
    centers, labels = torch.randn(C, 24), torch.arange(n) % C
    images = centers[labels] + 0.3 * torch.randn(n, 24)
    backbone, head = nn.Linear(24, 16), MarginHead(16, C, fm.ArcFace(s=16.0, m=0.3))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.02, momentum=0.9)
    angles = []
    for step in range(300):
        rows = torch.randint(0, n, (64,), generator=torch.Generator().manual_seed(step))
        out = head(backbone(images[rows]), labels[rows])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        angles.append(out.target_score.acos().rad2deg().mean().item())
    assert (head.nearest(backbone(images), 1)[1][:, 0] == labels).all()
    assert 80 < angles[0] < 100 and angles[-1] < 45 and angles[50] < angles[0]


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "in_features = 0: want an int of 1 or more"),
        ({"in_features": 4.0}, "in_features = 4.0: want an int"),
        ({"num_classes": 0}, "num_classes = 0: want an int of 1 or more"),
        ({"seed": -1}, "seed = -1: want an int of 0 or more"),
        ({"margin": "arcface"}, r"margin is 'arcface': want a Margin, such as fastmargin.ArcFace\(\)"),
        ({"margin": fm.ArcFace}, "want a Margin"),
        ({"margin": fm.ArcFace(m=torch.ones(4))}, "length of m is 4; want 5"),
        ({"reduction": "avg"}, "reduction = 'avg': want 'mean', 'sum' or 'none'"),
        ({"bias": True}, "ArcFace normalizes the weights"),
        ({"class_weight": torch.ones(4)}, r"class_weight is \[4\]: want a tensor \[5\]"),
        ({"topk": -1}, "topk = -1: want an int of 0 or more"),
        ({"topk": 1.5}, "topk = 1.5: want an int of 0 or more"),
        ({"backend": "cuda9"}, "unknown backend 'cuda9'"),
        (
            {"compute_dtype": "bfloat16"},
            "compute_dtype = bfloat16 for torch.float32 rows: want None, or torch.bfloat16",
        ),
    ],
)
def test_mistakes_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        MarginHead(**({"in_features": 3, "num_classes": 5, "margin": fm.ArcFace()} | options))


F3, Y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((F3[0], Y), r"want floating embeddings \[B, 3\]; got torch.float32 \[3\]"),
        ((torch.ones(2, 4), Y), r"got torch.float32 \[2, 4\]"),
        ((F3.long(), Y), r"want floating embeddings \[B, 3\]; got torch.int64 \[2, 3\]"),
        ((F3, Y[:1]), r"want int64 labels \[2\]; got torch.int64 \[1\]"),
        ((F3, Y.int()), r"want int64 labels \[2\]; got torch.int32 \[2\]"),
        ((F3, Y.float()), r"want int64 labels \[2\]; got torch.float32"),
        ((F3, Y, torch.ones(3)), r"want sample_weight \[2\]; got \[3\]"),
        ((F3.to("meta"), Y.to("meta")), "embeddings are on meta, the weight is on cpu"),
        ((F3, Y.to("meta")), "labels are on meta, embeddings on cpu"),
        ((F3, torch.tensor([0, 5])), r"label 5 of row 1 is outside \[0, 5\)"),
    ],
)
def test_mistakes_of_a_batch(given, message):
    head = MarginHead(3, 5, fm.ArcFace())
    with pytest.raises(ValueError, match=message):
        head(*given[:2], sample_weight=given[2] if given[2:] else None)


@pytest.mark.parametrize("wrong", [F3[0], torch.ones(2, 4)], ids=["ndim", "width"])
def test_mistakes_of_an_inference(wrong):
    head = MarginHead(3, 5, fm.ArcFace())
    for call in (head.get_logits, lambda f: head.nearest(f, 1)):
        with pytest.raises(ValueError, match="want "):
            call(wrong)


# ------------------------------------------------------------------------------------------------------ not a number


def test_not_a_number_is_not_hidden(backend):
    head, f, y = problem(topk=1, backend=backend)
    f[3, 5] = torch.nan
    out = head(f, y)
    assert out.loss.isnan() and out.target_score.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("embeddings", [torch.zeros(2, 16), torch.full((2, 16), torch.nan)])
def test_imprint_wants_a_direction(embeddings):
    head, *_ = problem()
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match="class 9"):
        head.imprint(embeddings, torch.tensor([9, 9]))
    assert torch.equal(head.weight, before)


def test_imprint_gives_a_zero_row_a_norm():
    head, f, _ = problem()
    with torch.no_grad():
        head.weight[9] = 0
    head.imprint(f[:1], torch.tensor([9]))
    torch.testing.assert_close(head.weight[9], F.normalize(f[0], dim=0))


def test_extend_keeps_what_was_frozen():
    head, *_ = problem()
    head.weight.requires_grad_(False)
    head.extend(2)
    assert not head.weight.requires_grad


def test_statistics_compile():
    """AdaFace's statistics skip ignored rows without boolean indexing: no host sync, no dynamic shape."""
    torch._dynamo.reset()
    head, f, y = problem(fm.AdaFace(momentum=0.5))
    y[2] = -100
    twin = copy.deepcopy(head)
    torch.compile(head, fullgraph=True, backend="aot_eager")(f, y)
    twin(f, y)
    norms = f.norm(dim=1)[y >= 0]
    torch.testing.assert_close(head.margin.mu, 10 + 0.5 * norms.mean())
    torch.testing.assert_close(head.margin.sd, 50 + 0.5 * norms.std())
    torch.testing.assert_close(head.margin.mu, twin.margin.mu)


@pytest.mark.parametrize("given", [[1.0] * 50, -torch.ones(50), torch.full((50,), torch.nan)], ids=str)
def test_class_weights_are_weights(given):
    with pytest.raises(ValueError, match="class_weight"):
        problem(class_weight=given)


def test_arguments_that_are_no_tensors():
    head, f, y = problem()
    for given in ((f.numpy(), y), (f, y.tolist()), (f, y.numpy())):
        with pytest.raises(ValueError, match="want a tensor"):
            head(*given)
    with pytest.raises(ValueError, match="sample_weight"):
        head(f, y, sample_weight=[1.0] * 12)
    with pytest.raises(ValueError, match="int64 tensor"):
        head.imprint(f[:1], [1])
    with pytest.raises(ValueError, match=r"want an int64 tensor, after embeddings: imprint\(embeddings, classes\)"):
        head.imprint(torch.tensor([1]), f[:1])
