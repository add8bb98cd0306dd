"""`fastmargin export`: what the files compute, and the messages for formats that cannot be written."""

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from samples import pictures
from torch import nn

from fastmargin import checkpoint
from fastmargin.driver.commands import cli, export
from fastmargin.driver.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from fastmargin.driver.data.augment_glyphs import to_float
from fastmargin.driver.data.sources.pixels import decode
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.backbone import build_backbone
from fastmargin.models import build_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = TrainConfig(optim=OptimConfig(steps=1600), data=DataConfig(size=16), dim=8)
WITH_ONNX = all(importlib.util.find_spec(package) for package in export.ONNX)


def run_of(config: TrainConfig, where: Path, factory: str | None = None) -> nn.Module:
    """A run whose checkpoint holds a network with running statistics of its own; returns the network."""
    run_folder.claim(str(where), config)
    shape = 1, config.data.size, config.data.size
    network = build_backbone(config, shape, factory)
    network(torch.rand(16, *shape))
    tensors = {f"model/{name}": tensor for name, tensor in network.state_dict().items()}
    checkpoint.save(where / run_folder.CHECKPOINTS, 7, tensors, {"factory": factory, "input": [*shape]})
    return network.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, str]:
    """The files of the default network, the network, and the output."""
    where = tmp_path_factory.mktemp("export")
    network = run_of(SMALL, where / "run")
    said: list[str] = []
    export.export(where / "run", where / "out", said.append)
    return where / "out", network, "\n".join(said)


def test_weights_build_the_same_network(exported: tuple[Path, nn.Module, str]) -> None:
    out, network, said = exported
    facts = json.loads((out / "backbone.json").read_bytes())
    channels, *size = facts["images"]["shape"][1:]
    again = build_model(facts["model"]["name"], facts["embeddings"]["shape"][-1], size, channels).eval()
    again.load_state_dict(load_file(out / "backbone.safetensors"))
    images = torch.rand(3, 1, 16, 16)
    assert torch.equal(again(images), network(images))
    assert facts["step"] == 7 and facts["largest_difference"]["backbone.safetensors"] == 0
    assert "backbone.safetensors: largest difference to the run's network 0.0e+00" in said


def test_what_it_takes_and_gives_is_said(exported: tuple[Path, nn.Module, str]) -> None:
    """It is also true: a photograph prepared as it says equals the input of the run's network."""
    facts = json.loads((exported[0] / "backbone.json").read_bytes())
    assert facts["images"]["name"] == "images" and facts["images"]["shape"] == ["batch", 1, 16, 16]
    assert facts["images"]["channels"] == "gray" and export.describe_images(3, 112, 112)["channels"] == "RGB"
    assert facts["embeddings"] == {
        "name": "embeddings", "shape": ["batch", 8], "dtype": "float32", "normalized": False, "compare": "cosine"
    }  # fmt: skip
    assert not torch.allclose(exported[1](torch.rand(3, 1, 16, 16)).norm(dim=1), torch.ones(3))
    assert facts["versions"]["fastmargin"]
    assert "resized to 16 x 16, bicubic" in facts["images"]["prepare"][-1]
    photograph = Image.fromarray(pictures(1, 40)[0][:, :30])
    photograph.save(buffer := io.BytesIO(), "PNG")
    stored = torch.from_numpy(decode(buffer.getvalue(), 16, "rgb")[None].copy())
    square = ImageOps.fit(photograph, (16, 16), Image.Resampling.BICUBIC)
    prepared = torch.from_numpy(np.asarray(square).transpose(2, 0, 1)[None] / np.float32(255))
    torch.testing.assert_close(to_float(stored), prepared)


def test_files_have_the_mode_of_any_new_file(exported: tuple[Path, nn.Module, str]) -> None:
    assert len({path.stat().st_mode for path in exported[0].iterdir()}) == 1


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_the_program_takes_any_batch(exported: tuple[Path, nn.Module, str], batch: int) -> None:
    out, network, said = exported
    program = torch.export.load(out / "backbone.pt2").module()
    images = torch.rand(batch, 1, 16, 16)
    torch.testing.assert_close(program(images), network(images))
    assert "backbone.pt2: largest difference to the run's network" in said


@pytest.mark.skipif(not WITH_ONNX, reason="onnx, onnxscript or onnxruntime is not installed: ONNX is NOT tested")
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_onnx_takes_any_batch(exported: tuple[Path, nn.Module, str], batch: int) -> None:
    import onnxruntime

    out, network, said = exported
    session = onnxruntime.InferenceSession(out / "backbone.onnx")
    assert [(node.name, node.shape) for node in (*session.get_inputs(), *session.get_outputs())] == [
        ("images", ["batch", 1, 16, 16]),
        ("embeddings", ["batch", 8]),
    ]
    images = torch.rand(batch, 1, 16, 16)
    (got,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), network(images), rtol=1e-4, atol=1e-4)
    assert "backbone.onnx: largest difference to the run's network" in said


def test_without_onnx_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(SMALL, tmp_path / "run")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else found(name, *a))
    monkeypatch.setattr(export, "ONNX", ("json", "onnxscript"))
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("backbone.onnx: not written, onnxscript missing; pip install 'fastmargin[export]'")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"backbone.safetensors", "backbone.pt2", "backbone.json"}


def test_a_network_with_layers_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has ARFA, whose k are buffers, maxout and parallel convolutions."""
    monkeypatch.setattr(export, "ONNX", ("absent",))  # one network is enough for the slow format
    network = run_of(replace(SMALL, model=ModelConfig("doppelganger")), tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "out", print)
    images = torch.rand(4, 1, 16, 16)
    program = torch.export.load(tmp_path / "out/backbone.pt2").module()
    torch.testing.assert_close(program(images), network(images))


def test_a_file_that_computes_something_else_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(SMALL, tmp_path / "run")
    original = export.write_pt2

    def wrong(*arguments: object) -> export.Network:
        network = original(*arguments)  # type: ignore[arg-type]
        return lambda images: network(images) + 0.1

    monkeypatch.setattr(export, "write_pt2", wrong)
    with pytest.raises(RuntimeError, match=r"backbone\.pt2 differs by 1\.0e-01 from the run's network"):
        export.export(tmp_path / "run", tmp_path / "out", print)
    assert not (tmp_path / "out/backbone.json").exists()


def test_difference_is_infinite_for_what_cannot_be_compared() -> None:
    flat, images = nn.Flatten(), torch.rand(5, 1, 2, 2)
    assert export.difference(flat, flat, images) == 0
    assert export.difference(lambda x: flat(x)[:, :3], flat, images) == float("inf")
    assert export.difference(lambda x: flat(x) * float("nan"), flat, images) == float("inf")
    assert export.difference(lambda x: flat(x) + (len(x) == 1), flat, images) == 1, "one image alone is tried too"


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mistake(*arguments: str | Path) -> str:
        assert cli.main(["export", *map(str, arguments)]) == cli.MISTAKE
        said = capsys.readouterr().err
        assert said.startswith("fastmargin: ") and said.count("\n") == 1
        return said

    assert "--out is required" in mistake(tmp_path)
    assert "not the folder of a run" in mistake(tmp_path, "--out", tmp_path / "out")
    run_folder.claim(str(tmp_path / "run"), SMALL)
    assert "no checkpoint yet" in mistake(tmp_path / "run", "--out", tmp_path / "out")
    run_of(SMALL, tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("precious")
    assert "full is not empty" in mistake(tmp_path / "run", "--out", tmp_path / "full")
    assert "thesis.tex" in mistake(tmp_path / "run", "--out", tmp_path / "full/thesis.tex")
    assert not (tmp_path / "out").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "ONNX", ("absent",))
    run_of(SMALL, tmp_path / "run")
    (tmp_path / "run" / run_folder.CHECKPOINTS / "step-00000009").mkdir()
    export.export(tmp_path / "run", tmp_path / "out", print)
    said = capsys.readouterr().out.splitlines()
    assert "passed over a damaged checkpoint" in said[0] and "step-00000009" in said[0]
    assert said[1] == "checkpoint of step 7 of 1600"


def test_a_network_of_ones_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ONNX", ("absent",))
    run_of(SMALL, tmp_path / "run", "small_run:pixels")
    with pytest.raises(ValueError, match="the run's network is small_run:pixels; here it is cnn"):
        export.export(tmp_path / "run", tmp_path / "out", print)
    export.export(tmp_path / "run", tmp_path / "out", print, model="small_run:pixels")
    assert json.loads((tmp_path / "out/backbone.json").read_bytes())["model"]["name"] == "small_run:pixels"
