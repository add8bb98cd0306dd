"""The folder of a run, and the small files in it.

    config.json    the configuration; `--config RUN/config.json` repeats the run
    train.jsonl    one record per line, only ever appended to. A resumed run repeats the steps since its checkpoint:
                   the last line of a step counts, and a line cut off by a kill is ignored
    checkpoints/   see `fastmargin.checkpoint`
    report/        index.html, and the pictures in it as PNG
    tensorboard/   the records again, where `tensorboard` is set, see tensorboard.py
    metrics.json   written last, when the run has been evaluated
    lock           held by the process that trains, see `fastmargin.files`

This module imports no torch, so that a mistake in `--out` is reported at once.
"""

import csv
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from fastmargin.driver.config import BY_IMAGES, TrainConfig, differing, flatten, from_dict
from fastmargin.files import written

RUNS = Path("runs")
CONFIG, RECORDS, CHECKPOINTS, REPORT, METRICS = (
    "config.json", "train.jsonl", "checkpoints", "report", "metrics.json",
)  # fmt: skip


def check(where: Path, config: TrainConfig, settled: bool = False) -> None:
    """ValueError if the folder holds anything but a run of this configuration; OSError for a file.

    settled: options that depend on the number of images are filled in.
    """
    if not where.exists() or not any(where.iterdir()):
        return
    if not (where / CONFIG).is_file():
        raise ValueError(f"{lacking(where)}; give a new or an empty folder to train in")
    theirs = read_config(where)
    if names := differing(config, theirs):
        there, here = flatten(theirs), flatten(config)
        changes = ", ".join(f"{name} {there[name]} there, {here[name]} here" for name in names)
        if settled and set(names) <= set(BY_IMAGES):
            changes += "; where it is not given the number of images decides, and that has changed"
        mistake = f"{where} holds a run of another configuration: {changes}. To resume that run: {resuming(where)}"
        raise ValueError(mistake)


def resuming(where: Path) -> str:
    """The shell command that resumes a run."""
    return f"fastmargin train --config {shlex.quote(str(where / CONFIG))} --out {shlex.quote(str(where))}"


def lacking(where: Path) -> str:
    return f"{where} is not the folder of a run: it has no {CONFIG}"


def claim(out: str | None, config: TrainConfig) -> Path:
    """The folder to train in: `out`, made if needed, or a new one named by date and time. Raises as `check`."""
    where = dated() if out is None else Path(out)
    check(where, config, settled=True)
    where.mkdir(parents=True, exist_ok=True)
    if not (where / CONFIG).exists():
        write_json(where / CONFIG, asdict(config))
    return where


def check_unused(out: Path) -> None:
    """ValueError for a file, and for a folder that is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; want a new or an empty folder")


def dated() -> Path:
    """Makes and returns runs/YYYYmmdd-HHMMSS, with -2, -3, ... when several start in one second."""
    stem, number = f"{datetime.now():%Y%m%d-%H%M%S}", 1
    while True:
        where = RUNS / (stem if number == 1 else f"{stem}-{number}")
        try:
            where.mkdir(parents=True)
            return where
        except FileExistsError:
            number += 1


def read_config(where: Path) -> TrainConfig:
    """ValueError if the folder is not one that `fastmargin train` wrote."""
    file = where / CONFIG
    if not where.exists():
        raise ValueError(f"{where}: no such folder")
    if not file.is_file():
        raise ValueError(lacking(where))
    try:
        return from_dict(TrainConfig, json.loads(file.read_bytes()))
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is not the configuration of a run: {error}") from error


def finished(where: Path) -> bool:
    """Whether the run has made its last step and was evaluated after it."""
    file = where / METRICS
    return file.is_file() and json.loads(file.read_bytes()).get("step") == read_config(where).optim.steps


def append_record(where: Path, record: Mapping[str, Any]) -> None:
    with (where / RECORDS).open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # the last write was cut off by a kill
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def read_records(where: Path) -> list[dict[str, Any]]:
    """The records of a run, one per step, in order of the steps; none without the file."""
    if not (where / RECORDS).exists():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in (where / RECORDS).read_bytes().splitlines():
        try:
            record = json.loads(line)
            by_step[record["step"]] = record
        except (ValueError, TypeError, KeyError):
            continue  # cut off
    return [by_step[step] for step in sorted(by_step)]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes atomically: the whole file appears, or none of it."""
    with written(path) as draft:
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
    """As `write_json`, but a file to write to. UTF-8; file names that are not are written byte for byte."""
    with written(path) as draft, draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield file


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Lines end as RFC 4180 has it, so that a cell with any kind of line break is quoted. Text cells as `inert`."""
    with replaced(path) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([inert(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)


FORMULA = re.compile(r"'*[=+\-@\t\r]")


def inert(cell: str) -> str:
    """With an apostrophe before it if a spreadsheet would read it as a formula. Numbers stay as they are.

    A cell that begins with apostrophes and then as a formula gets one more: to read it, drop one.
    """
    return f"'{cell}" if FORMULA.match(cell) and not is_number(cell) else cell


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()  # float ignores a tab or a carriage return before the digits, a spreadsheet does not
