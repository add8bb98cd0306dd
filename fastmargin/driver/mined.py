"""The way of what a step has mined from the device into the table, which lies in host memory.

On a CPU it enters at once. From a GPU it is copied while the next step is being queued and enters after that one, so
that the host waits for no step but the one before. What is under way is part of a checkpoint.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmargin.head import HeadOutput
from fastmargin.mining import DoppelgangerTable


class Mined:
    """late: enter rows one step later."""

    def __init__(self, table: DoppelgangerTable, late: bool) -> None:
        self.table, self.late = table, late
        self.waiting: dict[str, Tensor] = {}  # labels [B], hard_classes [B, k], hard_scores [B, k]
        self.copied: torch.cuda.Event | None = None

    def add(
        self,
        labels: Tensor,  # [B], in host memory
        out: HeadOutput,
    ) -> None:
        """The rows of a step: they enter the table, or those of the step before do."""
        if self.late:
            self.enter()
        self.waiting = {
            "labels": labels,
            "hard_classes": out.hard_classes.to("cpu", non_blocking=True),
            "hard_scores": out.hard_scores.to("cpu", non_blocking=True),
        }
        if out.hard_scores.is_cuda:
            self.copied = torch.cuda.current_stream(out.hard_scores.device).record_event()
        if not self.late:
            self.enter()

    def enter(self) -> None:
        """What is under way enters the table."""
        self.wait()
        if self.waiting:
            self.table.update(**self.waiting)
        self.waiting = {}

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()

    def state_dict(self) -> dict[str, Tensor]:
        self.wait()
        return self.waiting

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        self.waiting = dict(saved)
