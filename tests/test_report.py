"""The report: what the pictures show is what was measured."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastmargin.driver import report
from fastmargin.driver.data import Identities

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
        {"step": 10 * n, "loss": 20.0 / n, "target_score": 0.1 * n, "margin": m} for n, m in enumerate(ramp, start=1)
    ]


def identities(names: list[str], images: int = 9, colored: bool = False) -> Identities:
    labels = torch.arange(len(names)).repeat_interleave(images)
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None].expand(-1, 8, 8)
    return Identities(pixels[..., None].expand(-1, -1, -1, 3) if colored else pixels, labels, names)


@pytest.mark.parametrize("glyphs", [True, False])
def test_all_pictures_are_there_and_can_be_opened(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, glyphs: bool
) -> None:
    """Among the names: a dollar (mathematics to matplotlib), a character that DejaVu Sans lacks, a merged identity."""
    names = ["$", "一", "AΑА", "_"]
    report.draw(
        tmp_path / "report",
        records=records(),
        curves={"model": CURVE, "raw_pixels": CURVE},
        cosines={"start": torch.zeros(100), "end": torch.full((100,), 0.8)},
        pairs=[report.Pair(0, 1, 0.9), report.Pair(2, 3, 0.8), report.Pair(0, 3, 0.7)],
        identities=identities(names, colored=not glyphs),
        glyphs=glyphs,
    )
    pictures = {path.name: Image.open(path) for path in (tmp_path / "report").iterdir()}
    assert set(pictures) == {"loss.png", "roc.png", "theta.png", "doppelgangers.png"}
    for picture in pictures.values():
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 200 and max(picture.size) <= 2000
    assert [str(warning.message) for warning in recwarn] == []


def test_without_cosines_there_are_no_angles(tmp_path: Path, figures: list[Figure]) -> None:
    (tmp_path / "report").mkdir()
    report.draw(
        tmp_path / "report",
        records=records(margin=None),
        curves={"model": CURVE, "raw_pixels": CURVE},
        cosines={"start": torch.empty(0), "end": torch.empty(0)},
        pairs=[],
        identities=identities(["a"]),
        glyphs=False,
    )
    assert not (tmp_path / "report" / "theta.png").exists()
    assert "logit" in figures[0].axes[1].get_ylabel()


def test_loss_and_where_the_margin_is_full(tmp_path: Path, figures: list[Figure]) -> None:
    report.plot_loss(tmp_path / "loss.png", records(), "cosine")
    above, below = figures[0].axes
    np.testing.assert_allclose(above.lines[0].get_xydata()[:, 1], [20 / n for n in range(1, 7)])
    np.testing.assert_allclose(below.lines[0].get_xydata(), [(10 * n, 0.1 * n) for n in range(1, 7)])
    assert list(above.lines[1].get_xdata()) == [30, 30]
    assert above.get_ylabel() and below.get_ylabel() == "mean target cosine" and below.get_xlabel() == "step"


def test_a_constant_margin_is_not_marked(tmp_path: Path, figures: list[Figure]) -> None:
    report.plot_loss(tmp_path / "loss.png", [{**r, "margin": 0.4} for r in records()], "cosine")
    assert len(figures[0].axes[0].lines) == 1


def test_angles_are_degrees_and_densities(tmp_path: Path, figures: list[Figure]) -> None:
    cosines = {
        "start": torch.zeros(50),
        "end": torch.cat([torch.full((30,), math.cos(math.radians(37))), torch.ones(10)]),
    }
    report.plot_theta(tmp_path / "theta.png", cosines)
    (axes,) = figures[0].axes
    start, end = axes.containers
    assert [sum(bar.get_height() * bar.get_width() for bar in bars) for bars in (start, end)] == pytest.approx([1, 1])
    tallest = max(end, key=lambda bar: bar.get_height())
    assert tallest.get_x() <= 37 <= tallest.get_x() + tallest.get_width()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["start: median 90°, n = 50", "end: median 37°, n = 40"]
    assert "degrees" in axes.get_xlabel()


def test_roc_has_a_logarithmic_axis_and_a_legend(tmp_path: Path, figures: list[Figure]) -> None:
    report.plot_roc(tmp_path / "roc.png", {"model": CURVE, "raw_pixels": (CURVE[0], CURVE[1] / 2)})
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log" and "FAR" in axes.get_xlabel() and "TAR" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["model", "raw pixels"]
    np.testing.assert_allclose(axes.lines[1].get_ydata(), CURVE[1] / 2)


def test_each_mined_pair_comes_once_best_first() -> None:
    inf = math.inf
    classes = torch.tensor([[1, 2], [0, 2], [3, 0], [1, 0], [-1, -1]])
    scores = torch.tensor([[0.7, 0.1], [0.9, 0.2], [0.8, 0.3], [0.95, 0.4], [-inf, -inf]])
    pairs = report.mined_pairs(classes, scores)
    assert [(pair.one, pair.other) for pair in pairs] == [(3, 1), (1, 0), (2, 3), (3, 0), (2, 0), (1, 2)]
    assert [pair.score for pair in pairs] == pytest.approx([0.95, 0.9, 0.8, 0.4, 0.3, 0.2])
    assert report.mined_pairs(classes, scores, limit=2) == pairs[:2]
    assert report.mined_pairs(torch.full((3, 1), -1), torch.full((3, 1), -inf)) == []


def test_strip_shows_images_of_the_identity_alone() -> None:
    many, few = identities(["a", "b"], images=9), identities(["a", "b"], images=2)
    shown = report.strip(many, 1)[1:-1].reshape(8, report.EXAMPLES, 8)[0, :, 0]
    assert shown[0] == 9 and shown[-1] == 17 and (np.diff(shown.astype(int)) > 0).all()
    assert report.strip(few, 1)[1, ::8].tolist() == [2, 3, 0, 0, 0, 0]
    colored = report.strip(identities(["a", "b"], images=2, colored=True), 1)
    assert colored.shape == (10, 8 * report.EXAMPLES, 3) and (colored == report.strip(few, 1)[..., None]).all()


def test_caption() -> None:
    assert report.caption("A") == "A U+0041"
    assert report.caption("AΑА") == "A U+0041+2"
    assert report.caption("一") == "U+4E00", "DejaVu Sans has no such character"


def test_names_are_short_and_can_be_drawn() -> None:
    assert report.shortened("n000123") == "n000123"
    assert report.shortened("Balinese/character01") == "…/character01" and report.NAME == 13
    assert report.shortened("一$é") == "?$é"


def test_table_and_progress() -> None:
    block = {"tar@1e-2": 0.5, "tar@1e-3": None, "rank1": 0.98765, "accuracy": 1.0, "identities": 7, "images": 70}
    lines = report.table({"model": block, "raw_pixels": {**block, "rank1": 0.25}}).splitlines()
    assert lines[0] == "7 identities never trained on, 70 images"
    assert lines[3].split() == ["TAR", "at", "FAR", "1e-3", "-", "-"]
    assert lines[4].split() == ["rank-1", "0.9877", "0.2500"]
    assert len({len(line) for line in lines[1:-1]}) == 1
    assert lines[-1] == "-: not resolvable, of too few pairs or identities"
    whole = {**block, "tar@1e-3": 0.5}
    assert "not resolvable" not in report.table({"model": whole, "raw_pixels": whole})
    record = {"step": 20, "loss": 1.0, "target_score": 0.5, "images_per_second": 1234.5}
    assert report.progress(record) == "loss 1.000, target score 0.500, 1234 images/s"
