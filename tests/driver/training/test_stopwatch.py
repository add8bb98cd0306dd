"""Where the seconds of a step go, by a clock that the test advances and fake GPU events."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import SMALL, small_data, train_loop  # noqa: F401 (a fixture, too)
from torch import Tensor, nn

from fastmargin.driver.training import loader, loop, run, run_folder, stopwatch
from fastmargin.driver.training.stopwatch import PARTS, Stopwatch

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


class Spend(torch.autograd.Function):
    """The identity; its passes take as long as they are told to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, forward: float, backward: float) -> Tensor:
        ctx.clock, ctx.backward_takes = clock, backward
        clock.seconds += forward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        ctx.clock.seconds += ctx.backward_takes
        return dx, None, None, None


class Slow(nn.Module):
    """A network followed by a layer whose passes take known times."""

    def __init__(self, inner: nn.Module, clock: Clock, forward: float, backward: float) -> None:
        super().__init__()
        self.inner, self.takes = inner, (clock, forward, backward)

    def forward(self, x: Tensor) -> Tensor:  # [B, ...] -> [B, d]
        return Spend.apply(self.inner(x), *self.takes)


def test_the_backward_pass_of_a_step_is_split_too(clock: Clock) -> None:
    """Two steps: the loader takes 1 and 3 s, the backbone 10 + 20, the head's term 100 + 200, what follows 1000."""
    current = run.build(SMALL, print)
    current.replica = Slow(current.model, clock, 10, 20)
    current.terms.forward = lambda x, labels: Spend.apply(x, clock, 100, 200).sum() * 0  # type: ignore[method-assign]
    current.watch = Stopwatch(current.head.weight.device)
    batches = loader.batches(current.batch_source())
    for wait in (1, 3):
        clock.seconds += wait
        current.watch("loader")
        loop.train_step(current, *next(batches))
        clock.seconds += 1000
    assert current.watch.per_step(2) == {"loader": 2 + 500, "backbone": 30, "head": 300, "rest": 500}


def test_seconds_of_a_stretch_end_where_they_are_read(clock: Clock) -> None:
    watch = Stopwatch()
    clock.seconds += 4
    watch("loader")
    clock.seconds += 2
    assert watch.per_step(2) == {"loader": 2, "backbone": 0, "head": 0, "rest": 1}
    clock.seconds += 5  # saving a checkpoint
    watch("rest")
    assert watch.per_step(1) == {"loader": 0, "backbone": 0, "head": 0, "rest": 5}


def test_embeddings_without_a_gradient_have_no_backward_pass() -> None:
    Stopwatch().split(torch.ones(2, 3))


def test_events_of_a_gpu_are_awaited_when_they_are_read_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.known, self.milliseconds = False, 250.0 * len(events)
            events.append(self)

        def record(self) -> None: ...

        def synchronize(self) -> None:
            self.known = True

        def elapsed_time(self, later: "Event") -> float:
            assert later.known
            return later.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    for part in ("loader", "backbone", "head", "backbone"):
        watch(part)
    assert not any(event.known for event in events)
    assert watch.per_step(1) == {"loader": 0.25, "backbone": 0.5, "head": 0.25, "rest": 0.25}


def test_records_of_a_run_hold_the_seconds_and_the_machine(tmp_path: Path) -> None:
    train_loop(SMALL, tmp_path)
    for record in run_folder.read_records(tmp_path):
        assert tuple(record["seconds"]) == PARTS and all(seconds > 0 for seconds in record["seconds"].values())
        assert record["machine"].endswith(", 1 thread") and len(record["machine"]) > len(", 1 thread")
