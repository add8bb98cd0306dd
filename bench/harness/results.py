"""The published figures of a machine: results/<cpu>-<isa>-<n>-threads.json, a Markdown table and a chart beside it.

A shape that is measured again replaces its old figures; the others stay, each with its date and its torch.
"""

import json
import platform
import re
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness.chart import draw
from harness.measure import FORWARD, FORWARD_BACKWARD

FOLDER = Path(__file__).parents[1] / "results"
Record = Mapping[str, Any]  # a shape: B, d, C, torch, date, rounds, contestants

PREAMBLE = """\
Seconds are medians of interleaved rounds. "x eager" is how many times as fast as eager PyTorch in float32 with the same
loss, also for bfloat16; for the floors, which compute no loss, as eager PyTorch with the ArcFace margin. Contestants
carry that margin unless their name says NormFace; then the normalization that libraries of linear layers lack is
counted. Peak memory is above the inputs, of the largest pass measured; the gradient of the weights
counts where there is one."""


class Table(NamedTuple):
    """A kind of record: the fields that tell its cases apart, and the text around its figures."""

    suffix: str  # of the files
    key: tuple[str, ...]
    title: str  # of a case
    preamble: str


PAIRS = Table(
    "-pairs",
    ("M", "measure", "N"),
    "{measure}: {N:,} samples, {M:,} centers, d = {d}",
    """\
A step: the sum and its gradients, of samples and centers (both gradients), of samples alone (centers detached), or of
all classes' centers among themselves (all classes; samples take no part). Seconds are medians of interleaved rounds;
"x eager" is how many times as fast as the faster of the two eager forms. Peak memory is above the inputs; gradients
count.""",
)
STEPS = Table(
    "-steps",
    ("C", "measure", "ranks"),
    "{measure}, ranks: {ranks}; B = {B}, d = {d}, C = {C:,}",
    """\
A whole step of a head: forward, backward, SGD with momentum and decay. Seconds are medians of rounds in turn, a
process for each contestant and rank; the ranks share the threads, the rows and the classes. "x eager" is how many times
as fast as PartialFC's operations with torch's SGD on as many ranks. Peak memory is a rank's, above the process with its
inputs, weights and momentum.""",
)


def cpu() -> str:
    """The model, without trade marks and clock: AMD EPYC."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    return " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", model).split())


def stamp(rounds: int) -> Record:
    return {"torch": torch.__version__, "date": date.today().isoformat(), "rounds": rounds}


def store(record: Record, threads: int) -> None:
    """Rewrites the three files of the head's figures with this shape in them."""
    path, name = file_and_name(threads)
    shapes = inserted(path, threads, record, size)
    draw(path.with_suffix(".png"), name, shapes)
    parts = [f"# {name}", PREAMBLE, f"![speed relative to eager]({path.stem}.png)", *map(section, shapes)]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def store_table(table: Table, record: Record, threads: int) -> None:
    """Rewrites the two files of a table with this case in them."""
    path, name = file_and_name(threads, table.suffix)
    cases = inserted(path, threads, record, lambda r: [r[field] for field in table.key])
    parts = [f"# {name}", table.preamble, *(table_section(table, case) for case in cases)]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def machine(threads: int) -> Record:
    return {"cpu": cpu(), "isa": torch.backends.cpu.get_cpu_capability(), "threads": threads}


def file_and_name(threads: int, suffix: str = "") -> tuple[Path, str]:
    """The JSON file of this machine, and its name in words."""
    name = "{cpu}, {isa}, {threads} threads".format(**machine(threads))
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", name.lower()) + suffix + ".json"), name


def inserted(path: Path, threads: int, record: Record, key: Callable[[Record], Any]) -> list[Record]:
    """Writes this record to the file, in place of an older one with the same key; returns all records of the file."""
    old = json.loads(path.read_text())["shapes"] if path.exists() else []
    shapes = sorted([record, *(r for r in old if key(r) != key(record))], key=key)
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps({**machine(threads), "shapes": shapes}, indent=1) + "\n")
    return shapes


def size(record: Record) -> tuple[int, int, int]:
    return record["C"], record["d"], record["B"]


def section(record: Record) -> str:
    """A shape in Markdown."""
    head = "## B = {B:,}, d = {d:,}, C = {C:,}\n\ntorch {torch}, {date}, medians of {rounds} rounds; ".format(**record)
    head += f"gradient of the weights: {record['C'] * record['d'] * 4 / 2**20:.0f} MiB.\n\n"
    columns = "| contestant | forward s | x eager | forward + backward s | x eager | peak MiB |\n"
    rows = [line(name, figures) for name, figures in record["contestants"].items()]
    return "\n".join([head + columns + "| --- |" + " ---: |" * 5, *rows])


def table_section(table: Table, record: Record) -> str:
    """A case in Markdown."""
    rows = [
        f"## {table.title.format(**record)}\n",
        "torch {torch}, {date}, medians of {rounds} rounds.\n".format(**record),
    ]
    rows += ["| contestant | s | x eager | peak MiB |", "| --- | ---: | ---: | ---: |"]
    for name, figures in record["contestants"].items():
        times, peak = figures["times_eager"], figures.get("peak_mib")
        cells = [
            name,
            f"{figures['median']:.3g}",
            f"{times:.2f}" if times else "",
            "" if peak is None else f"{peak:.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def line(name: str, figures: Mapping[str, Any]) -> str:
    cells = [name]
    for measure in (FORWARD, FORWARD_BACKWARD):
        given = figures.get(measure)
        cells += [f"{given['median']:.3g}", f"{given['times_eager']:.2f}"] if given else ["", ""]
    cells.append(f"{figures['peak_mib']:.0f}" if "peak_mib" in figures else "")
    return f"| {' | '.join(cells)} |"
