"""MarginHead with bfloat16 and float16 operands: edges, autocast, scaled losses, training."""

import pytest
import torch
from check import error
from dense import F32

import fastmargin as fm

BF16, F16 = torch.bfloat16, torch.float16
MARGINS = (fm.ArcFace, fm.CosFace, fm.SphereFace, fm.MagFace, fm.AdaFace, fm.NormFace, fm.L2Softmax)
margins = pytest.mark.parametrize("margin", MARGINS, ids=lambda margin: margin.__name__)


def step(head, f, y):
    """Outputs, and gradients of features and weight."""
    f = f.clone().requires_grad_()
    head.weight.grad = None
    out = head(f, y)
    out.loss.sum().backward()
    return [*out[:2], out.hard_scores, f.grad, head.weight.grad]


@pytest.mark.usefixtures("poison")
@margins
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_edges_are_finite(rounding, margin, dtype):
    head = fm.MarginHead(12, 50, margin(), topk=2, reduction="none", **rounding)
    with torch.no_grad():
        head.weight[3] = 0
        w = head.weight.clone()
    f = torch.stack((w[5], 64 * w[5], -w[6], 0 * w[7], w[8], torch.ones(12), 0.1 * w[9], 1e3 * w[9])).to(dtype)
    y = torch.tensor([5, 5, 6, 7, 3, 3, 9, 9])  # equal to its class, its opposite, no row, no class, tiny, huge
    assert all(t.isfinite().all() for t in step(head, f, y))
    assert all(t.isfinite().all() for t in step(head, f[:1], y[:1]))
    ignored = step(head, f, torch.full((8,), -100))
    assert not ignored[0].any() and not ignored[3].any() and not ignored[4].any()
    for C in (1, 2):
        few = fm.MarginHead(12, C, margin(), **rounding)
        loss, _, _, df, dw = step(few, f, torch.zeros(8, dtype=torch.int64))
        assert loss.isfinite() and df.isfinite().all() and dw.isfinite().all()


@margins
def test_the_target_is_scored_in_float32(rounding, margin):
    f, y = torch.randn(20, 12), torch.randint(0, 50, (20,))
    rounded = fm.MarginHead(12, 50, margin(), **rounding)(f, y)
    plain = fm.MarginHead(12, 50, margin(), backend=rounding["backend"])(f, y)
    assert torch.equal(rounded.target_score, plain.target_score)
    assert 0 < error(rounded.loss, plain.loss) < 1e-2


@margins
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast_leaves_weights_and_results_alone(rounding, margin, dtype):
    head = fm.MarginHead(12, 50, margin(), topk=3, **rounding).eval()  # eval(): AdaFace's statistics do not change
    f, y = torch.randn(20, 12).to(dtype), torch.randint(0, 50, (20,))
    storage, before = head.weight.data_ptr(), head.weight.detach().clone()
    want = step(head, f, y)
    with torch.autocast("cpu", dtype=dtype):
        got = step(head, f, y)
    assert head.weight.dtype == F32 and head.weight.data_ptr() == storage and torch.equal(head.weight, before)
    assert got[3].dtype == dtype and got[4].dtype == F32
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_scaled_loss_does_not_overflow(rounding):
    head = fm.MarginHead(12, 50, fm.ArcFace(), reduction="sum", **rounding)
    f, y = torch.randn(20, 12), torch.randint(0, 50, (20,))
    want = step(head, f, y)[4]
    head.weight.grad = None
    (65536 * head(f, y).loss).backward()
    torch.testing.assert_close(head.weight.grad, 65536 * want)


def test_training_goes_as_in_float32(rounding):
    """Batches of noisy class centers: the loss falls as it does in float32."""

    def losses(**options):
        generator = torch.Generator().manual_seed(0)
        centers = torch.randn(200, 32, generator=generator)
        head = fm.MarginHead(32, 200, fm.ArcFace(s=16.0, m=0.2), **options)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
        for _ in range(150):
            y = torch.randint(0, 200, (64,), generator=generator)
            loss = head(centers[y] + 0.3 * torch.randn(64, 32, generator=generator), y).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    rounded, plain = list(losses(**rounding)), list(losses(backend=rounding["backend"]))
    assert plain[-1] < 0.2 * plain[0]
    assert all(abs(a - b) < 0.02 * plain[0] for a, b in zip(rounded, plain, strict=True))
