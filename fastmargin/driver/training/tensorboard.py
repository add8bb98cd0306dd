"""Records as TensorBoard scalars, in RUN/tensorboard, where the option `tensorboard` is set. Needs `fastmargin[tb]`.

A resumed run repeats the steps since its checkpoint; the writer tells TensorBoard to drop their first scalars.
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
    """step: of the checkpoint; scalars of later steps are dropped."""

    def __init__(self, where: Path, step: int) -> None:
        self.writer = summary_writer()(where / FOLDER, purge_step=step + 1)

    def add(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by name, except its step; "terms/center" where they are nested."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[prefix + name] = value
    return found
