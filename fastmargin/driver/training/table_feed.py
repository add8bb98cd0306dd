"""The way of what a step has mined from the device into the table, which lies in host memory.

On a CPU it enters at once. From a GPU it is copied while the next step is being queued and enters after that one, so
that the host waits for no step but the one before. What is under way is part of a checkpoint.

Every process enters the rows of all, in the order of the ranks, so that their tables are equal, bit for bit: one
all-gather of 8 + 12 k bytes a row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmargin.distributed.layout import Layout
from fastmargin.head.margin_head import HeadOutput
from fastmargin.mining import DoppelgangerTable


class TableFeed:
    """rows: how those of a step lie over the ranks; late: enter them one step later."""

    def __init__(self, table: DoppelgangerTable, rows: Layout, late: bool) -> None:
        self.table, self.rows, self.late = table, rows, late
        self.waiting: dict[str, Tensor] = {}  # labels [B], hard_classes [B, k], hard_scores [B, k]
        self.copied: torch.cuda.Event | None = None

    def add(
        self,
        labels: Tensor,  # [b]
        out: HeadOutput,  # of b rows
    ) -> None:
        """The rows of a step: they enter the table, or those of the step before do."""
        self.flush()  # on a CPU, what a run on a GPU had under way
        mined = {"labels": labels, "hard_classes": out.hard_classes, "hard_scores": out.hard_scores}
        all_ranks = gathered(mined, self.rows)
        self.waiting = {name: t.to("cpu", non_blocking=True) for name, t in all_ranks.items()}
        if out.hard_scores.is_cuda:
            self.copied = torch.cuda.current_stream(out.hard_scores.device).record_event()
        if not self.late:
            self.flush()

    def flush(self) -> None:
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


def gathered(
    own: dict[str, Tensor],  # [b] or [b, k] of 4 or 8 bytes each
    rows: Layout,
) -> dict[str, Tensor]:  # [B] or [B, k]
    """The rows of all ranks, in one collective."""
    if rows.group is None:
        return own
    words = [t.reshape(rows.count, -1).contiguous().view(torch.int32) for t in own.values()]
    parts = rows.gather(torch.cat(words, 1)).split([part.shape[1] for part in words], 1)
    return {
        name: part.clone(memory_format=torch.contiguous_format).view(t.dtype).view(rows.total, *t.shape[1:])
        for (name, t), part in zip(own.items(), parts, strict=True)
    }
