"""`fastmargin evaluate` on stored embeddings, pair lists and verification sets."""

import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from embeddings import blobs
from PIL import Image
from safetensors.torch import save_file
from small_run import SMALL, identities, load_data

from fastmargin.driver.commands import cli, evaluate, train, verify
from fastmargin.driver.data.augment_glyphs import to_float
from fastmargin.driver.training import backbone, run, run_folder
from fastmargin.evaluation import evaluate_embeddings, evaluate_pairs, mirrored

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["Ann", "Bob", "Cy"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of four steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_data", load_data)
        config = replace(SMALL, optim=replace(SMALL.optim, steps=4))
        yield train.train(config, str(tmp_path_factory.mktemp("verify") / "run"), print)


def answer(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert answer(*arguments) == cli.MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("fastmargin: ") and said.count("\n") == 1
    return said


# ---- stored embeddings ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stored_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype) -> None:
    x, y = blobs(400, 60, noise=0.8)
    embeddings, labels = torch.from_numpy(x).to(dtype), torch.from_numpy(y)
    save_file({"embeddings": embeddings, "labels": labels}, tmp_path / "faces.safetensors")
    assert answer("evaluate", tmp_path / "faces.safetensors", "--out", tmp_path / "numbers.json") == 0
    expected = evaluate_embeddings(embeddings, labels)
    assert json.loads((tmp_path / "numbers.json").read_bytes()) == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "60 identities, 400 images" and lines[1].split() == ["faces"]
    assert f"TAR at FAR 1e-3 {expected['tar@1e-3']:.4f}".split() in [line.split() for line in lines]


def test_what_cannot_be_resolved_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = {"embeddings": torch.eye(3)[[0, 0, 1, 2]], "labels": torch.tensor([0, 0, 1, 2])}
    save_file(stored, tmp_path / "few.safetensors")
    assert answer("evaluate", tmp_path / "few.safetensors", "--out", tmp_path / "n.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["TAR", "at", "FAR", "1e-2", "-"] in [line.split() for line in lines]
    assert "-: not resolvable, of too few pairs or identities" in lines
    assert json.loads((tmp_path / "n.json").read_bytes())["tar@1e-2"] is None


@pytest.mark.parametrize("named", [True, False])
def test_a_pair_list_over_stored_embeddings(tmp_path: Path, named: bool) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([2, 0, 1], 5)
    x = torch.from_numpy(rng.normal(size=(15, 4)) + 2 * np.eye(4)[y]).float()
    names = NAMES if named else ["0", "1", "2"]
    rows = {(names[c], n + 1): int(np.flatnonzero(y == c)[n]) for c in range(3) for n in range(5)}
    folds = [[(0, 1, 0, 2), (2, 1, 2, 4), (0, 1, 1, 3), (1, 5, 2, 2)], [(1, 1, 1, 4), (1, 2, 1, 3)]]
    folds[1] += [(2, 2, 0, 5), (1, 4, 0, 1)]
    lines, pairs = ["2 2"], []
    for a, i, b, j in folds[0] + folds[1]:
        lines.append(f"{names[a]} {i} {j}" if a == b else f"{names[a]} {i} {names[b]} {j}")
        pairs.append((rows[names[a], i], rows[names[b], j], a == b))
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    metadata = {"names": json.dumps(NAMES)} if named else None
    save_file({"embeddings": x, "labels": torch.from_numpy(y)}, tmp_path / "x.safetensors", metadata)
    given = tmp_path / "x.safetensors", "--pairs", tmp_path / "pairs.txt", "--out", tmp_path / "n.json"
    assert answer("evaluate", *given) == 0
    first, second, same = map(np.array, zip(*pairs, strict=True))
    expected = evaluate.resolvable(evaluate_pairs(x[first], x[second], same, folds=2))
    assert json.loads((tmp_path / "n.json").read_bytes()) == expected and expected["pairs"] == 8


def test_files_that_hold_no_embeddings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0 no JSON")
    assert "want safetensors with embeddings and labels" in mistake(capsys, "evaluate", path)
    x, y = torch.eye(3), torch.tensor([0, 0, 1])
    for tensors, metadata, said in (
        ({"embeddings": x}, None, "labels"),
        ({"labels": y}, None, "embeddings"),
        ({"embeddings": x, "labels": y[:2]}, None, "labels [2] torch.int64; want [N, d], and [N] of integers"),
        ({"embeddings": x, "labels": y.float()}, None, "torch.float32"),
        ({"embeddings": x[0], "labels": y}, None, "embeddings [3]"),
        ({"embeddings": x, "labels": y}, {"names": "Ann"}, "want safetensors"),
        ({"embeddings": x, "labels": y}, {"names": '{"0": "Ann"}'}, "no list of text"),
        ({"embeddings": x * torch.nan, "labels": y}, None, "embedding 0 of 3 is not finite"),
    ):
        save_file(tensors, path, metadata)
        assert said in mistake(capsys, "evaluate", path)
    save_file({"embeddings": x, "labels": y}, path)
    monkeypatch.setattr(verify, "LARGEST", 2)
    assert "has 3 images; want 2 or fewer, or a pair list" in mistake(capsys, "evaluate", path)


@pytest.mark.parametrize("head", ["1 1", "1"])
def test_a_list_of_one_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str) -> None:
    path, pairs = tmp_path / "x.safetensors", tmp_path / "pairs.txt"
    save_file({"embeddings": torch.eye(3)[[0, 0, 1]], "labels": torch.tensor([0, 0, 1])}, path)
    pairs.write_text(f"{head}\n0 1 2\n0 1 1 1\n")
    assert answer("evaluate", path, "--pairs", pairs) == 0
    titled = {line[:37].strip(): line[37:].strip() for line in capsys.readouterr().out.splitlines()}
    assert (
        titled["10-fold accuracy, insightface"] == "-" and titled["accuracy at the best threshold of all"] == "1.0000"
    )


def test_pair_lists_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, pairs = tmp_path / "x.safetensors", tmp_path / "pairs.txt"
    save_file({"embeddings": torch.eye(3), "labels": torch.tensor([0, 0, 1])}, path)
    pairs.write_text("1 1\n0 1 2\n0 1 1 2\n")
    said = mistake(capsys, "evaluate", path, "--pairs", pairs)
    assert "no row for 1 of the pair list's 3 images: 1 2" in said
    save_file({"embeddings": torch.eye(3), "labels": torch.tensor([0, 0, 1])}, path, {"names": json.dumps(NAMES)})
    said = mistake(capsys, "evaluate", path, "--pairs", pairs)
    assert "no row for 3 of the pair list's 3 images: 0 1, " in said
    pairs.write_text("nothing")
    assert "line 1" in mistake(capsys, "evaluate", path, "--pairs", pairs)
    assert "absent.txt" in mistake(capsys, "evaluate", path, "--pairs", tmp_path / "absent.txt")
    assert "mirror is 'sum'" in mistake(capsys, "evaluate", path, "--mirror", "sum")
    assert "mirror" in mistake(capsys, "evaluate", path, "--mirror", "half")


def test_pairs_that_lack_an_image_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, pairs = tmp_path / "x.safetensors", tmp_path / "pairs.txt"
    save_file({"embeddings": torch.eye(3)[[0, 0, 1]], "labels": torch.tensor([0, 0, 1])}, path)
    pairs.write_text("1 2\n0 1 2\n0 1 3\n0 1 1 1\n0 2 1 1\n")
    assert "images: 0 3" in mistake(capsys, "evaluate", path, "--pairs", pairs)
    assert answer("evaluate", path, "--pairs", pairs, "--skip_missing", "true") == 0
    said = capsys.readouterr().out
    assert "1 of 4 pairs are left out" in said and "3 pairs of" in said
    assert "skip_missing is True" in mistake(capsys, "evaluate", path, "--skip_missing", "true")


def test_identities_trained_on_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = blobs(400, 60, noise=0.8)
    embeddings, labels = torch.from_numpy(x), torch.from_numpy(y)
    path, held_out = tmp_path / "x.safetensors", labels % 3 == 0
    save_file({"embeddings": embeddings, "labels": labels, "held_out": held_out.to(torch.int8)}, path)
    assert answer("evaluate", path, "--out", tmp_path / "n.json") == 0
    expected = evaluate_embeddings(embeddings[held_out], labels[held_out])
    assert json.loads((tmp_path / "n.json").read_bytes()) == evaluate.resolvable(expected)
    said = capsys.readouterr().out
    assert f"20 of 60 identities, {int(held_out.sum())} of 400 images; --identities all compares all" in said
    assert answer("evaluate", path, "--identities", "all", "--out", tmp_path / "n.json") == 0
    assert "60 identities, 400 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "n.json").read_bytes()) == evaluate_embeddings(embeddings, labels)
    save_file({"embeddings": embeddings, "labels": labels, "held_out": torch.zeros(400, dtype=torch.int8)}, path)
    assert "want --identities all" in mistake(capsys, "evaluate", path)
    save_file({"embeddings": embeddings, "labels": labels, "held_out": torch.zeros(4, dtype=torch.int8)}, path)
    assert "held_out is [4]; want [400]" in mistake(capsys, "evaluate", path)


# ---- verification sets ----


def encoded(pixels: torch.Tensor, size: int, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).convert(mode).resize((size, size), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Path, torch.Tensor, np.ndarray]:
    """A .bin of twelve pairs, some in color and of twice the size; its pixels as decoded; which pairs are genuine."""
    images = identities().images[torch.randperm(240)[:24]]
    same = np.arange(12) % 2 == 0
    files = [encoded(p, 16, "RGB" if n % 3 else "L") for n, p in enumerate(images)]
    (tmp_path / "set.bin").write_bytes(pickle.dumps((files, same.tolist())))
    return tmp_path / "set.bin", images, same


@pytest.mark.parametrize("mirror", [None, "mean", "sum", "concat"])
def test_a_verification_set(
    trained: Path, tmp_path: Path, pairs: tuple[Path, torch.Tensor, np.ndarray], mirror: str | None
) -> None:
    path, images, same = pairs
    options = [] if mirror is None else ["--mirror", mirror]
    assert answer("evaluate", trained, "--pairs", path, "--out", tmp_path / "n.json", *options) == 0
    _, model, _, step = backbone.load_backbone(trained, print)
    assert step == 4 and not model.training
    with torch.inference_mode():
        x, flipped = (model(to_float(pixels)) for pixels in (images, images.flip(2)))
    x = x if mirror is None else mirrored(x, flipped, mirror)  # type: ignore[arg-type]
    expected = evaluate.resolvable(evaluate_pairs(x[::2], x[1::2], same))
    assert json.loads((tmp_path / "n.json").read_bytes()) == pytest.approx(expected)
    assert expected["pairs"] == 12 and (x.shape[1] == (16 if mirror == "concat" else 8))


def test_images_of_another_size_are_resized() -> None:
    pixels = identities().images[0]
    twice = verify.pixels_of(encoded(pixels, 32, "RGB"), 0, 16, "gray")
    assert twice.shape == (16, 16) and twice.dtype == torch.uint8
    assert (twice.float() - pixels.float()).abs().mean() < (pixels.float() - pixels.float().mean()).abs().mean() / 2
    assert torch.equal(verify.pixels_of(encoded(pixels, 16), 0, 16, "gray"), pixels)


def test_mistakes_with_verification_sets(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pairs: tuple[Path, torch.Tensor, np.ndarray]
) -> None:
    path, images, _ = pairs
    before = (trained / run_folder.METRICS).read_bytes()
    assert "mirror is 'sum'" in mistake(capsys, "evaluate", trained, "--mirror", "sum")
    assert "identities is 'all'" in mistake(capsys, "evaluate", trained, "--identities", "all")
    assert "out is" in mistake(capsys, "evaluate", trained, "--out", tmp_path / "n.json")
    assert "no such folder" in mistake(capsys, "evaluate", tmp_path / "none", "--pairs", path)
    (tmp_path / "bad.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "not admitted" in mistake(capsys, "evaluate", trained, "--pairs", tmp_path / "bad.bin")
    (tmp_path / "bad.bin").write_bytes(pickle.dumps(([encoded(images[0], 16), b"GIF8"], [True])))
    assert "image 1 of the verification set cannot be read" in mistake(
        capsys, "evaluate", trained, "--pairs", tmp_path / "bad.bin"
    )
    (tmp_path / "bad.bin").write_bytes(pickle.dumps(([encoded(images[0], 16)] * 4, [True, False])))
    assert "folds is 10 for 2 pairs" in mistake(capsys, "evaluate", trained, "--pairs", tmp_path / "bad.bin")
    assert (trained / run_folder.METRICS).read_bytes() == before


def test_a_run_without_a_checkpoint(tmp_path: Path, pairs: tuple[Path, torch.Tensor, np.ndarray]) -> None:
    run_folder.claim(str(tmp_path / "run"), SMALL)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        verify.evaluate_set(tmp_path / "run", str(pairs[0]), None, None, print)
