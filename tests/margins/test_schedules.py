"""Schedules: their formulas, the attributes they write, resuming, and compiled margins without recompilation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastmargin import margins as fm
from fastmargin.margins.schedules import LambdaSchedule, MarginRamp, Schedule


def test_lambda_schedule() -> None:
    margin = fm.SphereFace(lam=7.0)
    schedule = LambdaSchedule(margin)
    seen = [margin.lam]
    for _ in range(2_000):
        schedule.step()
        seen.append(margin.lam)
    assert seen[0] == 1000.0 and seen[1] == pytest.approx(1000 / 1.12) and seen[100] == pytest.approx(1000 / 13)
    assert seen[1658] > 5.0 and seen[1659] == 5.0 == seen[-1]  # 1 + 0.12 n = 200 at n = 1658.3
    assert margin(torch.tensor([0.5]), torch.ones(1), torch.zeros(1).long()).item() == pytest.approx(1 / 6)
    steep = LambdaSchedule(margin, base=100.0, gamma=1.0, power=2.0, floor=1.0)
    steep.step()
    assert margin.lam == 25.0


def test_margin_ramp() -> None:
    per_class = torch.tensor([0.4, 0.8])
    for margin, name, full in ((fm.ArcFace(), "m", 0.5), (fm.CombinedMargin(m3=per_class), "m3", per_class)):
        ramp, seen = MarginRamp(margin, name, steps=4), []
        for _ in range(6):
            seen.append(torch.as_tensor(getattr(margin, name)).clone())
            ramp.step()
        for share, value in zip((0, 0.25, 0.5, 0.75, 1, 1), seen, strict=True):
            torch.testing.assert_close(value, torch.as_tensor(full) * share)
        assert torch.equal(seen[-1], torch.as_tensor(full))
    sphere = fm.SphereFace(m=4)
    ramp = MarginRamp(sphere, "m", steps=2, start=1.0)
    ramp.step()
    assert sphere.m == 2.5


def test_schedules_resume() -> None:
    def build() -> tuple[fm.Margin, LambdaSchedule, MarginRamp]:
        margin = fm.SphereFace(m=torch.tensor([2.0, 4.0]))
        return margin, LambdaSchedule(margin), MarginRamp(margin, "m", steps=10, start=1.0)

    margin, *schedules = build()
    for _ in range(7):
        [schedule.step() for schedule in schedules]
    again, *fresh = build()
    again.load_state_dict(margin.state_dict())
    for new, old in zip(fresh, schedules, strict=True):
        new.load_state_dict(old.state_dict())
    for _ in range(2):
        assert again.lam == margin.lam and torch.equal(again.m, margin.m)
        [schedule.step() for schedule in (*schedules, *fresh)]
    assert margin.m.tolist() == pytest.approx([1.9, 3.7])


def gradient(psi_of: Callable[..., Tensor]) -> Tensor:  # [33]
    cos, norms, labels = torch.linspace(-1, 1, 33), torch.linspace(5, 120, 33), torch.arange(33) % 5
    cos.requires_grad_()
    return torch.autograd.grad(psi_of(cos, norms, labels).sum(), cos)[0]


@pytest.mark.parametrize(
    ("margin", "scheduled"),
    [
        (fm.SphereFace(m=torch.full((5,), 4.0)), LambdaSchedule),
        (fm.ArcFace(), lambda margin: MarginRamp(margin, "m", 20)),
        (fm.AdaFace(), None),
        (fm.MagFace(beyond="easy", slope="detached"), None),
    ],
)
def test_compiled_whole_and_once(margin: fm.Margin, scheduled: Callable[[fm.Margin], Schedule] | None) -> None:
    """torch.compile makes a number symbolic at its first change, and specializes on 0."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(margin, backend=counter, fullgraph=True)
    schedule = scheduled(margin) if scheduled else None
    for _ in range(12):
        torch.testing.assert_close(gradient(compiled), gradient(margin), rtol=1e-4, atol=1e-5)
        if schedule:
            schedule.step()
    assert counter.frame_count <= (3 if schedule else 1)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: LambdaSchedule(fm.SphereFace(), gamma=-0.1), "gamma is -0.1; want"),
        (lambda: MarginRamp(fm.ArcFace(), "m2", 10), "attribute is 'm2'; want a number of ArcFace"),
        (lambda: MarginRamp(fm.ArcFace(), "beyond", 10), "attribute is 'beyond'"),
        (lambda: MarginRamp(fm.ArcFace(m=nn.Parameter(torch.ones(3))), "m", 10), "that is not learned"),
        (lambda: MarginRamp(fm.ArcFace(), "m", 0), "steps is 0; want at least 1"),
    ],
)
def test_mistakes_say_what_was_given_and_what_is_wanted(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
