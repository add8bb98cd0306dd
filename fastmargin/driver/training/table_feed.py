"""Brings the hard classes that a step has mined from the device into the doppelganger table, which is in host memory.

On a CPU the table is updated at once. From a GPU the copy is asynchronous, and the table is updated one step later, so
that the host only ever waits for the step before. What is still waiting is part of a checkpoint.

Every process updates its table with the rows of all ranks, in rank order, so that the tables are equal, bit for bit:
one all-gather of 8 + 12 k bytes a row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmargin.distributed.layout import Layout
from fastmargin.head.margin_head import HeadOutput
from fastmargin.mining import DoppelgangerTable


class TableFeed:
    """rows: those of a step, over the ranks. late: the table is updated one step later."""

    def __init__(self, table: DoppelgangerTable, rows: Layout, late: bool) -> None:
        self.table, self.rows, self.late = table, rows, late
        self.waiting: dict[str, Tensor] = {}  # labels [B], hard_scores [B, k], hard_classes [B, k]
        self.copied: torch.cuda.Event | None = None

    def add(
        self,
        labels: Tensor,  # [b]
        out: HeadOutput,  # of b rows
    ) -> None:
        """Takes the rows of a step and updates the table: with them or, if late, with those of the step before."""
        self.flush()  # if not late: what a checkpoint of a GPU run had waiting
        mined = {"labels": labels, "hard_scores": out.hard_scores, "hard_classes": out.hard_classes}
        all_ranks = gathered(mined, self.rows)
        self.waiting = {name: t.to("cpu", non_blocking=True) for name, t in all_ranks.items()}
        if out.hard_scores.is_cuda:
            self.copied = torch.cuda.current_stream(out.hard_scores.device).record_event()
        if not self.late:
            self.flush()

    def flush(self) -> None:
        """Updates the table with what is waiting."""
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
