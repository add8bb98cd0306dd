"""The pictures of a report and its tables as text: what they show is what was measured. The page: test_page.py."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastmargin import margins
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.reports import contact_sheet, plots, report
from fastmargin.driver.reports.contact_sheet import Pair

CURVE = (np.geomspace(1e-5, 1, 50), np.linspace(0, 1, 50))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    kept: list[Figure] = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), original(self, *a, **k))[1])
    return kept


def records(margin: float | None = 0.4) -> list[dict[str, float | None]]:
    ramp = [None if margin is None else margin * min(1, n / 3) for n in range(1, 7)]
    return [
        {"step": 10 * n, "loss": 20.0 / n, "target_score": 0.1 * n, "margin": m, "lr": 0.1 / n}
        for n, m in enumerate(ramp, start=1)
    ]


def identities(names: list[str], images: int = 9, colored: bool = False) -> Identities:
    labels = torch.arange(len(names)).repeat_interleave(images)
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None].expand(-1, 8, 8)
    return Identities(pixels[..., None].expand(-1, -1, -1, 3) if colored else pixels, labels, names)


def test_accuracies_come_with_their_deviation() -> None:
    numbers = {"accuracy_insightface": 0.9975, "std_insightface": 0.0012, "accuracy_best": 0.5, "val@1e-3": None}
    said = report.lines("7 pairs", {"x": numbers}, {key: key for key in numbers if "std" not in key}).splitlines()
    assert said[2].split() == ["accuracy_insightface", "0.9975", "+-", "0.0012"]
    assert [line.split()[1:] for line in said[3:5]] == [["0.5000"], ["-"]] and len(set(map(len, said[1:5]))) == 1


@pytest.mark.parametrize("glyphs", [True, False])
def test_names_that_are_hard_to_draw(tmp_path: Path, recwarn: pytest.WarningsRecorder, glyphs: bool) -> None:
    """Among them: a dollar (mathematics to matplotlib), a character that DejaVu Sans lacks, a merged identity."""
    file, names = tmp_path / "doppelgangers.png", ["$", "一", "AΑА", "_"]
    pairs = [Pair(0, 1, 0.9), Pair(2, 3, 0.8), Pair(0, 3, 0.7)]
    contact_sheet.plot_doppelgangers(file, pairs, identities(names, colored=not glyphs), glyphs=glyphs, plain=glyphs)
    picture = Image.open(file)
    picture.load()
    assert picture.format == "PNG" and min(picture.size) >= 200 and max(picture.size) <= 2000
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("glyphs", [True, False])
def test_a_cell_shows_a_class_above_its_doppelganger(tmp_path: Path, figures: list[Figure], glyphs: bool) -> None:
    data = identities(["a", "b", "c"], colored=not glyphs)
    pairs = [Pair(0, 1, 0.9), Pair(2, 0, 0.8)]
    contact_sheet.plot_doppelgangers(tmp_path / "pairs.png", pairs, data, glyphs=glyphs, plain=False)
    cells = figures[0].axes
    for axes, pair in zip(cells, pairs, strict=False):
        (drawn,) = axes.images
        strips = [contact_sheet.strip(data, label) for label in (pair.one, pair.other)]
        np.testing.assert_array_equal(drawn.get_array(), np.concatenate(strips))
        assert drawn.get_clim() == (0, 255) and drawn.get_cmap().name == ("gray_r" if glyphs else "gray")
    assert not any(axes.images for axes in cells[len(pairs) :])


def test_loss_and_where_the_margin_is_full(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_loss(tmp_path / "loss.png", records(), "cosine")
    above, below = figures[0].axes
    np.testing.assert_allclose(above.lines[0].get_xydata()[:, 1], [20 / n for n in range(1, 7)])
    np.testing.assert_allclose(below.lines[0].get_xydata(), [(10 * n, 0.1 * n) for n in range(1, 7)])
    assert list(above.lines[1].get_xdata()) == [30, 30]
    assert above.get_ylabel() and below.get_ylabel() == "mean target cosine" and below.get_xlabel() == "step"


def test_the_objective_is_drawn_above_the_loss_of_the_head(tmp_path: Path, figures: list[Figure]) -> None:
    lines = [{**record, "objective": 1000.0 + n} for n, record in enumerate(records())]
    plots.plot_loss(tmp_path / "loss.png", lines, "cosine")
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["objective", "head loss (nats)", "mean target cosine"]
    np.testing.assert_allclose(figures[0].axes[0].lines[0].get_ydata(), 1000 + np.arange(6))
    plots.plot_loss(tmp_path / "loss.png", [records()[0], *lines[1:]], "cosine")
    assert len(figures[1].axes) == 2, "a run that an older version began has records without one"


def test_a_constant_margin_is_not_marked(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_loss(tmp_path / "loss.png", [{**r, "margin": 0.4} for r in records()], "cosine")
    assert len(figures[0].axes[0].lines) == 1


def test_angles_are_degrees_and_densities(tmp_path: Path, figures: list[Figure]) -> None:
    cosines = {
        "start": torch.zeros(50),
        "end": torch.cat([torch.full((30,), math.cos(math.radians(37))), torch.ones(10)]),
    }
    plots.plot_theta(tmp_path / "theta.png", cosines)
    (axes,) = figures[0].axes
    start, end = axes.containers
    assert [sum(bar.get_height() * bar.get_width() for bar in bars) for bars in (start, end)] == pytest.approx([1, 1])
    tallest = max(end, key=lambda bar: bar.get_height())
    assert tallest.get_x() <= 37 <= tallest.get_x() + tallest.get_width()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["start: median 90°, n = 50", "end: median 37°, n = 40"]
    assert "degrees" in axes.get_xlabel()


def test_schedule_shows_a_margin_that_is_a_number(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_schedule(tmp_path / "schedule.png", records())
    plots.plot_schedule(tmp_path / "schedule.png", records(margin=None))
    assert [[axes.get_ylabel() for axes in figure.axes] for figure in figures] == [
        ["learning rate", "margin m"],
        ["learning rate"],
    ]
    np.testing.assert_allclose(figures[0].axes[1].lines[0].get_ydata(), [r["margin"] for r in records()])


def test_every_term_has_a_panel(tmp_path: Path, figures: list[Figure]) -> None:
    lines = [{**record, "terms": {"center": 2.0, "git": 0.1 * n}} for n, record in enumerate(records())]
    plots.plot_terms(tmp_path / "terms.png", lines)
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["center", "git"]
    np.testing.assert_allclose(figures[0].axes[1].lines[0].get_ydata(), 0.1 * np.arange(6))


def test_one_record_is_a_point_that_shows(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_loss(tmp_path / "loss.png", records()[:1], "cosine")
    assert figures[0].axes[0].lines[0].get_marker() == "."


def test_shares_of_mining_have_a_curve_each(tmp_path: Path, figures: list[Figure]) -> None:
    lines = [
        {**record, "confusable_classes": 0.1 * n, "list_turnover": 1 - 0.1 * n} for n, record in enumerate(records())
    ]
    plots.plot_mining(tmp_path / "mining.png", lines, report.DRAWN)
    (axes,) = figures[0].axes
    np.testing.assert_allclose([curve.get_ydata()[2] for curve in axes.lines], [0.2, 0.8])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["confusable classes", "list turnover"]
    assert len({curve.get_color() for curve in axes.lines}) == 2


def test_shares_that_an_older_version_did_not_record_are_left_out(tmp_path: Path) -> None:
    assert report.mining(tmp_path, records()) == [] and not list(tmp_path.iterdir())


def test_timing_stacks_milliseconds_from_the_first_step(tmp_path: Path, figures: list[Figure]) -> None:
    """A record covers the steps before it, so the band of the first begins at 0."""
    seconds = {"loader": 0.001, "backbone": 0.02, "head": 0.003, "rest": 0.0005}
    plots.plot_timing(tmp_path / "timing.png", [{"step": 10, "seconds": seconds}])
    (axes,) = figures[0].axes
    tops = [band.get_paths()[0].vertices[:, 1].max() for band in axes.collections]
    assert tops == pytest.approx([1, 21, 24, 24.5]) and axes.get_xlim() == (0, 10)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rest", "head", "backbone", "loader"]


NORMS = torch.linspace(10, 110, 101)


def test_psi_of_the_margin_that_was_used(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_psi(tmp_path / "psi.png", margins.ArcFace(s=30.0, m=0.4), NORMS)
    (axes,) = figures[0].axes
    cosine, psi = axes.lines
    degrees, values = psi.get_xydata().T
    below = np.radians(degrees) + 0.4 < np.pi
    np.testing.assert_allclose(values[below], np.cos(np.radians(degrees[below]) + 0.4), atol=1e-12)
    np.testing.assert_allclose(cosine.get_ydata(), np.cos(np.radians(degrees)), atol=1e-12)
    assert (degrees[0], degrees[-1]) == (0, 180) and "ArcFace(s=30.0, m=0.4" in figures[0].get_suptitle()


def test_psi_of_a_margin_that_depends_on_the_norm(tmp_path: Path, figures: list[Figure]) -> None:
    """MagFace's m grows from 0.45 at norm 10 to 0.8 at 110; at 90 degrees psi is -sin(m)."""
    plots.plot_psi(tmp_path / "psi.png", margins.MagFace(), NORMS)
    lines = figures[0].axes[0].lines[1:]
    at_90 = [line.get_ydata()[360] for line in lines]
    assert at_90 == pytest.approx([-math.sin(0.45 + 0.35 * share) for share in (0.05, 0.5, 0.95)])
    assert [line.get_label() for line in lines] == [
        "ψ(θ), norm 15 (5 % are shorter)",
        "ψ(θ), norm 60 (median)",
        "ψ(θ), norm 105 (5 % are longer)",
    ]


def test_drawing_psi_leaves_the_margin_and_the_draws_alone(tmp_path: Path, figures: list[Figure]) -> None:
    margin, state = margins.ElasticFace(), torch.get_rng_state()
    plots.plot_psi(tmp_path / "psi.png", margin, NORMS)
    assert margin.training and torch.equal(torch.get_rng_state(), state)
    assert len(figures[0].axes[0].lines) == 2, "its mean, which no norm changes"


def test_roc_has_a_logarithmic_axis_and_a_legend(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_roc(tmp_path / "roc.png", {"model": CURVE, "raw_pixels": (CURVE[0], CURVE[1] / 2)})
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log" and "FAR" in axes.get_xlabel() and "TAR" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["model", "raw pixels"]
    np.testing.assert_allclose(axes.lines[1].get_ydata(), CURVE[1] / 2)


def test_each_mined_pair_comes_once_best_first() -> None:
    inf = math.inf
    classes = torch.tensor([[1, 2], [0, 2], [3, 0], [1, 0], [-1, -1]])
    scores = torch.tensor([[0.7, 0.1], [0.9, 0.2], [0.8, 0.3], [0.95, 0.4], [-inf, -inf]])
    pairs = contact_sheet.mined_pairs(classes, scores)
    assert [(pair.one, pair.other) for pair in pairs] == [(3, 1), (1, 0), (2, 3), (3, 0), (2, 0), (1, 2)]
    assert [pair.score for pair in pairs] == pytest.approx([0.95, 0.9, 0.8, 0.4, 0.3, 0.2])
    assert contact_sheet.mined_pairs(classes, scores, limit=2) == pairs[:2]
    assert contact_sheet.mined_pairs(torch.full((3, 1), -1), torch.full((3, 1), -inf)) == []


def test_strip_shows_images_of_the_identity_alone() -> None:
    many, few = identities(["a", "b"], images=9), identities(["a", "b"], images=2)
    shown = contact_sheet.strip(many, 1)[1:-1].reshape(8, contact_sheet.EXAMPLES, 8)[0, :, 0]
    assert shown[0] == 9 and shown[-1] == 17 and (np.diff(shown.astype(int)) > 0).all()
    assert contact_sheet.strip(few, 1)[1, ::8].tolist() == [2, 3, 0, 0, 0, 0]
    colored = contact_sheet.strip(identities(["a", "b"], images=2, colored=True), 1)
    assert (
        colored.shape == (10, 8 * contact_sheet.EXAMPLES, 3)
        and (colored == contact_sheet.strip(few, 1)[..., None]).all()
    )


def test_caption() -> None:
    assert contact_sheet.caption("A") == "A U+0041"
    assert contact_sheet.caption("AΑА") == "A U+0041+2"
    assert contact_sheet.caption("一") == "U+4E00", "DejaVu Sans has no such character"


def test_names_are_short_and_can_be_drawn() -> None:
    assert contact_sheet.shortened("n000123") == "n000123"
    assert contact_sheet.shortened("Balinese/character01") == "…/character01" and contact_sheet.NAME == 13
    assert contact_sheet.shortened("一$é") == "?$é"


def test_table_and_progress() -> None:
    block = {"tar@1e-2": 0.5, "tar@1e-3": None, "rank1": 0.98765, "accuracy": 1.0, "identities": 10, "images": 70}
    lines = report.table({"model": block, "raw_pixels": {**block, "rank1": 0.25}}).splitlines()
    assert lines[0] == "10 identities never trained on, 70 images"
    assert lines[3].split() == ["TAR", "at", "FAR", "1e-3", "-", "-"]
    assert lines[4].split() == ["rank-1", "0.9877", "0.2500"]
    assert len({len(line) for line in lines[1:-1]}) == 1
    assert lines[-1] == "-: not resolvable, of too few pairs or identities"
    whole = {**block, "tar@1e-3": 0.5}
    assert "not resolvable" not in report.table({"model": whole, "raw_pixels": whole})
    few = report.table({"model": {**whole, "identities": 3}, "raw_pixels": whole})
    assert few.endswith("\n3 identities: these numbers say little")
    record = {"step": 20, "loss": 1.0, "target_score": 0.5, "images_per_second": 1234.5}
    record["margin"] = None
    with_terms = report.progress({**record, "objective": 200.0})
    assert with_terms.startswith("objective 200.000, head loss 1.000, target score")
    assert report.progress(record) == "loss 1.000, target score 0.500, 1234 images/s"
    assert report.progress(record | {"margin": 0.25}) == "loss 1.000, m 0.250, target score 0.500, 1234 images/s"
