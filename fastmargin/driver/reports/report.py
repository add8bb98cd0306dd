"""The report of a run: a page of HTML with its pictures, which are PNG files, too, its numbers and its configuration.

Where a run has nothing to show in a section (no angles, no records), the page says why.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor

from fastmargin.driver.config import GLYPHS, TrainConfig, flatten
from fastmargin.driver.data.augmentation import augmentation
from fastmargin.driver.reports import contact_sheet, page, plots
from fastmargin.driver.reports.page import Section
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.loop import progress
from fastmargin.driver.training.run import Run
from fastmargin.driver.training.stopwatch import PARTS

INDEX = "index.html"


FEW = 10  # with fewer identities held out, the report warns


QUOTED = (
    "Of the 10-fold accuracies, insightface is the one that face papers since 2018 quote for LFW; sphereface is that "
    "of SphereFace and AM-Softmax, euclidean that of Git loss. Do not compare one with another."
)


UNRESOLVED = "-: not resolvable, of too few pairs or identities"


MEANING = (
    "loader: waiting for a batch; backbone: the network, forward and backward; head: the loss with its terms, forward "
    "and backward, and the step of the class weights where the backward pass makes it; rest: other optimizer steps, "
    "mining, records, checkpoints."
)


MINING = {
    "confusable_batches": "batches that have a class together with its doppelganger",
    "confusable_classes": "classes of a batch whose doppelganger is in it, too",
    "list_turnover": "lists of doppelgangers whose first class has changed, of those that a batch has updated",
}


DRAWN = {"confusable_classes": "confusable classes", "list_turnover": "list turnover"}


RUN = {
    "tar@1e-2": "TAR at FAR 1e-2",
    "tar@1e-3": "TAR at FAR 1e-3",
    "rank1": "rank-1",
    "accuracy": "10-fold accuracy",
}


EMBEDDINGS = {
    "tar@1e-2": "TAR at FAR 1e-2",
    "tar@1e-3": "TAR at FAR 1e-3",
    "tar@1e-4": "TAR at FAR 1e-4",
    "rank1": "rank-1",
    "rank5": "rank-5",
    "coverage@99%": "coverage at 99 % precision, one image enrolled",
    "dir@1e-2": "open set: DIR at FAR 1e-2, rank 1",
    "accuracy": "10-fold accuracy, insightface",
    "inter/intra": "distance between classes / within a class",
}


PAIRS = {
    "accuracy_insightface": "10-fold accuracy, insightface",
    "accuracy_sphereface": "10-fold accuracy, sphereface",
    "accuracy_euclidean": "10-fold accuracy, euclidean",
    "accuracy_best": "accuracy at the best threshold of all",
    "val@1e-3": "VAL at FAR 1e-3",
    "tar@1e-2": "TAR at FAR 1e-2",
    "tar@1e-3": "TAR at FAR 1e-3",
}


class Measured(NamedTuple):
    """The results of an evaluation."""

    metrics: Mapping[str, Any]  # as in metrics.json
    curves: Mapping[str, plots.Curve]  # "model", "raw_pixels"
    norms: Tensor  # [N] of the held-out images' embeddings


def draw(where: Path, run: Run, measured: Measured) -> None:
    """Writes all pictures and the page into the folder of the run.

    Glyphs are drawn black on white and named by code point; other images are shown as they are.
    """
    into = where / run_folder.REPORT
    into.mkdir(exist_ok=True)
    records = run_folder.read_records(where)
    sections = [
        Section("What was trained", [page.table(summary(run, records))]),
        Section("Evaluation", evaluation(measured.metrics)),
        Section("Training", training(into, run, records)),
        Section("ROC", roc(into, measured.curves)),
        Section("Angles", angles(into, run)),
        Section("Margin", margin(into, run, measured.norms)),
        Section("Doppelgangers", doppelgangers(into, run)),
        Section("Timing", timing(into, run, records)),
        Section("Configuration", configuration(run.config)),
        Section("Repeat", repeat(where, run, measured.metrics["versions"])),
    ]
    page.write(into / INDEX, f"{where.resolve().name}: {run.config.head.margin} on {run.config.data.source}", sections)


def summary(run: Run, records: plots.Records) -> list[tuple[str, str]]:
    config, train, test = run.config, run.train, run.test
    learned = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    size = " x ".join(map(str, train.images.shape[1:]))
    rows = [
        ("data", f"{config.data.source}, {size} pixels, augmentation {augmentation(config.data)}"),
        ("identities", f"{train.num_classes:,} trained on, {test.num_classes:,} held out"),
        ("images", f"{len(train.images):,} trained on, {len(test.images):,} held out"),
        ("network", f"{run.factory or config.model.name}, {learned:,} parameters, {config.dim} features"),
        ("margin", str(run.head.margin)),
        ("other terms", ", ".join(f"{term.weight:g} {name}" for name, term in config.terms.items())),
        ("batches", f"{config.optim.batch_size} images, sampler {config.sampler.name}"),
        ("steps", f"{run.step:,} of {config.optim.steps:,}, {run.seconds:,.0f} s"),
        ("machine", trained_on(records)),
    ]
    return [row for row in rows if row[1]]


def trained_on(records: plots.Records) -> str:
    """The machines of a run: a resumed run may have several."""
    return "; ".join(dict.fromkeys(record["machine"] for record in records if "machine" in record))


def evaluation(metrics: Mapping[str, Any]) -> list[str]:
    model, raw = metrics["model"], metrics["raw_pixels"]
    rows = [(title, number(model[key]), number(raw[key])) for key, title in EMBEDDINGS.items()]
    return [
        page.paragraph(heading(model)),
        page.table(rows, ("", "model", "raw pixels"), numeric=True),
        *map(page.paragraph, notes([model, raw], EMBEDDINGS)),
        page.paragraph(f"{QUOTED} This one is on pairs sampled from the images held out."),
    ]


def training(into: Path, run: Run, records: plots.Records) -> list[str]:
    if not records:
        return [page.paragraph(f"No curves: {run_folder.RECORDS} has no records.")]
    if len(records) == 1:
        words = f"No curves: {run_folder.RECORDS} has one record, {progress(records[0])}."
        return [page.paragraph(words), *mining(into, records)]
    score = "logit" if run.head.margin.plain else "cosine"
    plots.plot_loss(into / "loss.png", records, score)
    plots.plot_schedule(into / "schedule.png", records)
    shown = [page.picture(into / "loss.png", f"loss and mean target {score} over the steps")]
    if records[-1]["terms"]:
        plots.plot_terms(into / "terms.png", records)
        shown.append(page.picture(into / "terms.png", "each term of the loss over the steps"))
    return [
        *shown,
        page.picture(into / "schedule.png", "learning rate and margin over the steps"),
        *mining(into, records),
    ]


def mining(into: Path, records: plots.Records) -> list[str]:
    """The shares of `MiningStatistics` and their curves. Records of older versions, which have fewer, are left out."""
    records = [record for record in records if MINING.keys() <= record.keys()]
    if not records:
        return []
    rows = [(name, f"{records[-1][name]:.1%}", meaning) for name, meaning in MINING.items()]
    shown = [page.table(rows, ("mining", f"step {records[-1]['step']:,}", "share of"))]
    if len(records) > 1:
        plots.plot_mining(into / "mining.png", records, DRAWN)
        shown.append(page.picture(into / "mining.png", f"{' and '.join(DRAWN.values())} over the steps"))
    return shown


def roc(into: Path, curves: Mapping[str, plots.Curve]) -> list[str]:
    plots.plot_roc(into / "roc.png", curves)
    return [page.picture(into / "roc.png", "true accept rate over false accept rate, of the model and of raw pixels")]


def angles(into: Path, run: Run) -> list[str]:
    cosines: dict[str, Tensor] = {}
    for stage, values in run.cosines.items():  # in a very short run several stages are the same steps
        if len(values) and not any(values.equal(others) for others in cosines.values()):
            cosines[stage] = values
    if not cosines:
        return [page.paragraph(without_angles(run))]
    plots.plot_theta(into / "theta.png", cosines)
    stages = " and ".join(", ".join(cosines).rsplit(", ", 1))
    return [page.picture(into / "theta.png", f"histograms of the angle of an image and its class, at the {stages}")]


def margin(into: Path, run: Run, norms: Tensor) -> list[str]:
    if run.head.margin.plain:
        return [page.paragraph(without_angles(run))]
    plots.plot_psi(into / "psi.png", run.head.margin, norms)
    return [page.picture(into / "psi.png", "psi, which replaces the cosine of the target, over its angle")]


def without_angles(run: Run) -> str:
    if run.head.margin.plain:
        return f"None: {run.config.head.margin} is a plain layer, whose scores are logits and no cosines."
    return "None: the checkpoint holds none."


def doppelgangers(into: Path, run: Run) -> list[str]:
    pairs = contact_sheet.mined_pairs(run.table.classes, run.table.scores)
    if not pairs:
        return [page.paragraph("None were mined.")]
    file = into / "doppelgangers.png"
    contact_sheet.plot_doppelgangers(
        file, pairs, run.train, glyphs=run.config.data.source == GLYPHS, plain=run.head.margin.plain
    )
    names = [(run.train.names[one], run.train.names[other], f"{score:.3f}") for one, other, score in pairs]
    return [
        page.picture(file, "images of the most similar pairs of classes"),
        page.folded("Their names in full", page.table(names, ("class", "its nearest wrong class", "score"))),
    ]


def timing(into: Path, run: Run, records: plots.Records) -> list[str]:
    timed = [record for record in records if "seconds" in record]
    if not timed:
        return [page.paragraph(f"None: {run_folder.RECORDS} has no seconds.")]
    seconds = {part: median(record["seconds"][part] for record in timed) for part in PARTS}
    whole = median(sum(record["seconds"].values()) for record in timed)
    rows = [(title, f"{1000 * s:.2f}", f"{s / whole:.1%}") for title, s in {**seconds, "a step": whole}.items()]
    of = f"Medians of {len(timed)} records" if len(timed) > 1 else "Of one record"
    speed = f"{run.config.optim.batch_size / whole:,.0f} images/s"
    return [
        page.paragraph(f"{of}: {speed}. {MEANING}"),
        page.table(rows, ("part", "ms a step", "share"), numeric=True),
        *timing_curve(into, timed),
    ]


def timing_curve(into: Path, timed: plots.Records) -> list[str]:
    if len(timed) == 1:
        return []
    plots.plot_timing(into / "timing.png", timed)
    return [page.picture(into / "timing.png", "milliseconds of each part of a step over the steps")]


def configuration(config: TrainConfig) -> list[str]:
    """The options that differ from their default; all others are in a part that opens on a click."""
    usual, given = (dict(single_options(c)) for c in (TrainConfig(), config))
    changed = [(name, value, usual.get(name, "")) for name, value in given.items() if value != usual.get(name)]
    same = [(name, value) for name, value in given.items() if value == usual.get(name)]
    head = ("option", "value", "default")
    return [
        page.table(changed, head) if changed else page.paragraph("Every option has its default."),
        page.folded("Options that have their default", page.table(same, head[:2])),
    ]


def single_options(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Dotted names and values as JSON, with a line for the weight and each option of a term."""
    yield from ((name, json.dumps(value)) for name, value in flatten(config).items() if name != "terms")
    for name, term in config.terms.items():
        yield f"terms.{name}.weight", json.dumps(term.weight)
        yield from ((f"terms.{name}.options.{key}", json.dumps(value)) for key, value in term.options.items())


def repeat(where: Path, run: Run, versions: Mapping[str, str]) -> list[str]:
    where = where.resolve()
    file, out = shlex.quote(str(where / run_folder.CONFIG)), shlex.quote(str(where))
    aims = {
        "The same again, elsewhere": f"fastmargin train --config {file} --out NEW",
        "Go on after a stop": f"fastmargin train --config {file} --out {out}",
        "Evaluate the last checkpoint, and draw this page anew": f"fastmargin evaluate {out}",
    }
    shown = [page.paragraph(f"{aim}:") + page.command(words) for aim, words in aims.items()]
    if run.factory is not None:
        shown = [page.paragraph(f"From Python: fastmargin.driver.commands.train, with model={run.factory!r}.")]
    return [*shown, page.table(list(versions.items()))]


def table(metrics: Mapping[str, Any]) -> str:
    """The metrics of the model beside those of raw pixels, as text."""
    model, raw = metrics["model"], metrics["raw_pixels"]
    return lines(heading(model), {"model": model, "raw pixels": raw}, RUN)


def heading(model: Mapping[str, Any]) -> str:
    return f"{model['identities']} identities never trained on, {model['images']} images"


def lines(
    heading: str,
    columns: Mapping[str, Mapping[str, Any]],  # numbers by key; None: not resolvable
    titles: Mapping[str, str],  # of the keys to show
) -> str:
    """A table as text: a row for each title, a column for each set of numbers."""
    first = max(map(len, titles.values())) + 2
    cells = {name: [name, *(cell(numbers, key) for key in titles)] for name, numbers in columns.items()}
    widths = {name: max(10, max(map(len, column)) + 2) for name, column in cells.items()}
    rows = [heading]
    for i, title in enumerate(("", *titles.values())):
        rows.append(f"{title:{first}}" + "".join(f"{cells[name][i]:>{n}}" for name, n in widths.items()))
    return "\n".join(rows + notes(list(columns.values()), titles))


def notes(
    columns: Sequence[Mapping[str, Any]],  # numbers by key
    titles: Mapping[str, str],  # of the keys to show
) -> list[str]:
    """Warnings to print below a table."""
    count = min(numbers.get("identities", FEW) for numbers in columns)
    said = [f"{count} identities: these numbers say little"] if count < FEW else []
    return said + [UNRESOLVED] * any(numbers[key] is None for numbers in columns for key in titles)


def cell(numbers: Mapping[str, Any], key: str) -> str:
    """A number, and its standard deviation over the folds where it has one."""
    spread = numbers.get(f"std_{key.removeprefix('accuracy_')}")
    return number(numbers[key]) + ("" if spread is None else f" +- {number(spread)}")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
