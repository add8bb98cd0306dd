"""The page of a report: one file that is well formed, fetches nothing and shows text as text."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from small_run import SMALL, small_data, train_loop  # noqa: F401 (a fixture, too)

from fastmargin.driver.commands import evaluate
from fastmargin.driver.config import HeadConfig, OptimConfig, TermConfig, TrainConfig
from fastmargin.driver.reports import page, report
from fastmargin.driver.training import run, run_folder

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = "<script>alert('&')</script>"
VOID = {"meta", "img"}
SECTIONS = [
    "What was trained", "Evaluation", "Training", "ROC", "Angles", "Margin", "Doppelgangers", "Timing",
    "Configuration", "Repeat",
]  # fmt: skip


class Page(HTMLParser):
    """What a browser would show; fails where a tag is not closed, or in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.alts: list[str] = []
        self.titles: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        assert len(given) == len(attrs) and not any(name.startswith("on") for name in given)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [given["id"] or ""] if "id" in given else []
        self.alts += [given["alt"] or ""] if "alt" in given else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "h2":
            self.titles.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data
        if "h2" in self.open:
            self.titles[-1] += data


def read(where: Path) -> Page:
    return Page((where / run_folder.REPORT / report.INDEX).read_text("utf-8"))


def reported(out: Path, config: TrainConfig = SMALL, names: Callable[[str], str] = str) -> Page:
    """The page of a small run whose identities have other names."""
    current = train_loop(config, out)
    current.train = replace(current.train, names=[names(name) for name in current.train.names])
    evaluate.finish(current, out, print)
    return read(out)


def test_a_whole_page(tmp_path: Path) -> None:
    """With another term, a hostile class name and a hostile folder."""
    out = tmp_path / "a <b>&amp; run"
    terms = {"center": TermConfig(weight=0.01), "git": TermConfig(0.1, {"pairs": "samples"})}
    seen = reported(out, replace(SMALL, terms=terms), lambda name: f"{name}{HOSTILE}")
    assert seen.titles == SECTIONS
    assert seen.tags.isdisjoint({"script", "b", "link", "iframe"})
    assert HOSTILE in seen.text and "a <b>&amp; run" in seen.text and "\N{REPLACEMENT CHARACTER}" not in seen.text
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in seen.links)
    assert {link[1:] for link in seen.links if link[0] == "#"} == set(seen.ids) and len(seen.ids) == len(SECTIONS)
    assert len(seen.alts) == 9 and all(seen.alts)
    pictures = {path.name for path in (out / run_folder.REPORT).glob("*.png")}
    assert pictures == {
        f"{name}.png" for name in "loss terms schedule mining roc theta psi doppelgangers timing".split()
    }
    metrics = json.loads((out / run_folder.METRICS).read_bytes())
    titled = {row[0]: row[1:] for row in seen.rows}
    assert titled["rank-1"] == [report.number(metrics[name]["rank1"]) for name in ("model", "raw_pixels")]
    assert titled["other terms"] == ["0.01 center, 0.1 git"]
    assert titled["dim"] == ["8", "128"] and titled["seed"] == ["0"], "the default, if the value is another"
    assert titled["terms.center.weight"] == ["0.01", ""] and titled["terms.git.options.pairs"] == ['"samples"', ""]
    order = ("terms.git.weight", "Options that have their default", "tensorboard", "The same again")
    assert sorted(order, key=seen.text.index) == list(order)
    assert titled["list_turnover"][0] == f"{run_folder.read_records(out)[-1]['list_turnover']:.1%}"
    assert titled[report.EMBEDDINGS["inter/intra"]][0] == report.number(metrics["model"]["inter/intra"])
    assert titled["torch"] == [torch.__version__]
    assert f"fastmargin evaluate {shlex.quote(str(out))}" in seen.text
    assert titled["loader"][1].endswith("%") and titled["a step"][1] == "100.0%"


def test_a_plain_layer_has_no_angles_and_the_page_says_why(tmp_path: Path) -> None:
    seen = reported(tmp_path / "run", replace(SMALL, head=HeadConfig("Softmax")))
    assert seen.titles == SECTIONS
    assert seen.text.count("None: Softmax is a plain layer, whose scores are logits and no cosines.") == 2
    assert not any((tmp_path / "run" / run_folder.REPORT / name).exists() for name in ("theta.png", "psi.png"))
    assert "loss and mean target logit over the steps" in seen.alts


def test_a_run_of_one_step(tmp_path: Path) -> None:
    seen = reported(tmp_path / "run", replace(SMALL, optim=OptimConfig(steps=1, batch_size=16)))
    assert seen.titles == SECTIONS and len(seen.alts) == 4, "no curves"
    assert "No curves: train.jsonl has one record, loss " in seen.text and "Of one record: " in seen.text
    assert seen.alts[1].endswith("at the start"), "which is the end, too"


def test_a_run_without_records_or_a_name_that_is_no_text(tmp_path: Path) -> None:
    """An older version wrote no seconds; the name of a file may contain bytes that are not UTF-8."""
    current = run.build(SMALL, print)
    current.train = replace(current.train, names=[f"{name}\udcff" for name in current.train.names])
    current.table.update(torch.tensor([0]), torch.tensor([[0.5]]), torch.tensor([[1]]))
    evaluate.finish(current, tmp_path, print)
    seen = read(tmp_path)
    assert "No curves: train.jsonl has no records." in seen.text and "train.jsonl has no seconds" in seen.text
    assert "None: the checkpoint holds none." in seen.text and seen.titles == SECTIONS
    assert "\N{REPLACEMENT CHARACTER}" in seen.text
    current.table.scores.fill_(-torch.inf)
    current.table.classes.fill_(-1)
    evaluate.finish(current, tmp_path, print)
    assert "None were mined." in read(tmp_path).text


def test_a_network_of_ones_own_is_resumed_from_python(tmp_path: Path) -> None:
    current = replace(run.build(SMALL, print), factory="mine:<net>")
    evaluate.finish(current, tmp_path, print)
    seen = read(tmp_path)
    assert "model='mine:<net>'" in seen.text and "fastmargin train" not in seen.text


def test_commands_hold_in_any_folder() -> None:
    shown = "".join(report.repeat(Path("a run"), run.build(SMALL, print), {}))
    assert page.command(f"fastmargin evaluate {shlex.quote(str(Path('a run').resolve()))}") in shown


def test_every_argument_is_escaped(tmp_path: Path) -> None:
    """Every argument of every function that takes text."""
    (tmp_path / "a.png").write_bytes(b"picture")
    quote = f'{HOSTILE}" onclick="x'
    parts = [
        page.paragraph(quote),
        page.command(quote),
        page.folded(quote, page.table([(quote, quote)], (quote, quote))),
        page.picture(tmp_path / "a.png", quote),
    ]
    page.write(tmp_path / "page.html", quote, [page.Section(quote, parts)])
    seen = Page((tmp_path / "page.html").read_text("utf-8"))
    assert "script" not in seen.tags and seen.alts == [quote] and seen.rows == [[quote] * 2] * 2
    assert seen.text.count(quote) == 11
