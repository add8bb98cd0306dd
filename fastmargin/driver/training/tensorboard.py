"""Records as TensorBoard's scalars, in RUN/tensorboard, for whoever asks: `fastmargin[tb]`.

A run that resumes repeats the steps since its checkpoint; the writer tells TensorBoard to forget them first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


def summary_writer() -> Any:
    """torch's class. ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard is true, and TensorBoard is not installed: pip install 'fastmargin[tb]'"
        ) from error
    return SummaryWriter


class Board:
    """step: the last one that counts; scalars of later ones are forgotten."""

    def __init__(self, where: Path, step: int) -> None:
        self.writer = summary_writer()(where / FOLDER, purge_step=step + 1)

    def add(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by name, "terms/center" where they are nested; all but its step."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[prefix + name] = value
    return found
