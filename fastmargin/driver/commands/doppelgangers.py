"""What a run has mined: the most similar pairs of classes, the most confusable classes, and all lists as a CSV.

A score is the largest that a row of the class had with the other class when the class was last in a batch: a cosine, or
a logit for a plain layer (Smirnov et al., Doppelganger Mining for Face Representation Learning, ICCVW 2017, 3.2).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastmargin.checkpoint.store import part_of
from fastmargin.driver.config import GLYPHS
from fastmargin.driver.data.sources import load_data
from fastmargin.driver.log import Log, on_one_line
from fastmargin.driver.reports import contact_sheet
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.backbone import log_step, newest
from fastmargin.driver.training.run import build_margin
from fastmargin.driver.training.state import check_images
from fastmargin.mining import DoppelgangerTable

STEM = "doppelgangers"
COLUMNS = ("class", "name", "rank", "other", "other_name", "score")


def doppelgangers(where: Path, out: Path | None, limit: int, log: Log) -> None:
    """Prints `limit` pairs and classes of a run's newest checkpoint; writes STEM.csv and a contact sheet, STEM.png.

    out: folder for both; None: the report folder of the run. ValueError for a folder that holds no run or no
    checkpoint, and for images other than those that the run was trained on.
    """
    config = run_folder.read_config(where)
    saved = newest(where, log)
    log_step(saved, config, log)
    train, _ = load_data(config.data, log)
    check_images(saved, train)
    table = DoppelgangerTable(train.num_classes, config.head.topk)
    table.load_state_dict(part_of(saved.tensors, "table"))
    if pending := part_of(saved.tensors, "mined"):  # on a GPU the last update is still to be made
        table.update(**pending)
    glyphs = config.data.source == GLYPHS
    names = list(map(contact_sheet.caption if glyphs else on_one_line, train.names))
    log(f"most similar pairs, the larger score of the two:\n{pairs_of(table, names, limit)}")
    log(f"most confusable classes, the number of lists they are on:\n{most_listed(table, names, limit)}")
    out = out or where / run_folder.REPORT
    out.mkdir(parents=True, exist_ok=True)
    run_folder.write_csv(out / f"{STEM}.csv", COLUMNS, rows_of(table, train.names))
    pairs, plain = contact_sheet.mined_pairs(table.classes, table.scores), build_margin(config.head).plain
    contact_sheet.plot_doppelgangers(out / f"{STEM}.png", pairs, train, glyphs=glyphs, plain=plain)
    log(f"all lists: {out / STEM}.csv, contact sheet: {out / STEM}.png")


def pairs_of(table: DoppelgangerTable, names: Sequence[str], limit: int) -> str:
    """A line for each pair; it is mutual where each class is on the other's list."""
    lines = []
    for one, other, score in contact_sheet.mined_pairs(table.classes, table.scores, limit):
        mutual = one in table.classes[other] and other in table.classes[one]
        lines.append(f"{score:8.3f}  {'mutual' * mutual:6}  {names[one]} / {names[other]}")
    return "\n".join(lines)


def most_listed(table: DoppelgangerTable, names: Sequence[str], limit: int) -> str:
    """A line for each class that is on a list, in order of falling number of lists."""
    lists = table.doppelganger_counts()
    order = lists.argsort(descending=True, stable=True)[:limit].tolist()
    return "\n".join(f"{lists[label]:8}  {names[label]}" for label in order if lists[label])


def rows_of(table: DoppelgangerTable, names: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """COLUMNS of every filled entry of the table, in order of class and rank; the best of a list has rank 1."""
    filled = (table.classes >= 0).nonzero()
    others, scores = table.classes[table.classes >= 0], table.scores[table.classes >= 0]
    for (label, rank), other, score in zip(filled.tolist(), others.tolist(), scores.tolist(), strict=True):
        yield label, names[label], rank + 1, other, names[other], f"{score:.6f}"
