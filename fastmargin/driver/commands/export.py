"""Write the network of a run, without its head, for use elsewhere: weights, a torch.export program, ONNX.

    backbone.safetensors   the weights, for `fastmargin.models.build_model`
    backbone.pt2           torch.export: torch.export.load(...).module() needs torch alone
    backbone.onnx          images [batch, C, H, W] -> embeddings [batch, dim]
    backbone.json          how to build it, its input (colors in the order red, green, blue, see `describe_images`) and
                           output, and the largest difference of each file from the run's network

All take a batch of any size, and compute as in evaluation mode. Each file is read back and compared with the run's
network on the same images, in batches of 5 and of 1.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmargin import __version__
from fastmargin.driver.log import Log
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.backbone import load_backbone
from fastmargin.files import written

STEM = "backbone"
ONNX = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "embeddings"  # names in ONNX
TOLERANCE = 1e-3  # of the largest number of an embedding: a file that differs by more is not the same network

Network = Callable[[Tensor], Tensor]  # [B, C, H, W] -> [B, d]


def export(where: Path, out: Path, log: Log, model: str | None = None) -> None:
    """Writes the network of the newest checkpoint of a run into a new or empty folder, in every format.

    Without the packages of ONNX that format is left out, and the log says so. model: as for `train.train`. ValueError
    for a folder without a run or a checkpoint, and for an `out` that is not empty; RuntimeError if a file computes
    something else than the run's network.
    """
    config, network, shape, step = load_backbone(where, log, model)
    run_folder.check_unused(out)
    out.mkdir(parents=True, exist_ok=True)
    images = torch.rand((5, *shape), generator=torch.Generator().manual_seed(0))
    differences = {}
    for name, write in {"safetensors": write_safetensors, "pt2": write_pt2, "onnx": write_onnx}.items():
        file = out / f"{STEM}.{name}"
        if name == "onnx" and (missing := [package for package in ONNX if not importlib.util.find_spec(package)]):
            log(f"{file}: not written, {', '.join(missing)} missing; pip install 'fastmargin[export]'")
            continue
        with torch.no_grad(), quiet():
            far = difference(write(file, network, images), network, images)
            check(file, far, network(images))
        log(f"{file}: largest difference to the run's network {far:.1e}, {file.stat().st_size / 2**20:.1f} MiB")
        differences[file.name] = far
    run_folder.write_json(
        out / f"{STEM}.json",
        {
            "model": {**asdict(config.model), "name": model or config.model.name},
            "images": describe_images(*shape),
            "embeddings": {
                "name": OUTPUT,
                "shape": ["batch", config.dim],
                "dtype": "float32",
                "normalized": False,
                "compare": "cosine",
            },
            "step": step,
            "largest_difference": differences,
            "versions": {"fastmargin": __version__, "torch": torch.__version__},
        },
    )


def describe_images(channels: int, height: int, width: int) -> dict[str, object]:
    """How an image becomes the network's input: what `sources.pixels.fit` and `augment_glyphs.to_float` do.

    Glyphs and Omniglot's drawings are bright on black; images from tensors are not converted.
    """
    steps = ["turned upright by its EXIF orientation", "to 8-bit gray" if channels == 1 else "to 8-bit RGB"]
    if height == width:
        steps.append(f"cropped in the middle to a square, resized to {width} x {height}, bicubic (PIL.ImageOps.fit)")
    return {
        "name": INPUT,
        "shape": ["batch", channels, height, width],
        "dtype": "float32",
        "channels": "gray" if channels == 1 else "RGB",
        "prepare": steps,
        "scale": "intensity / 255",
    }


def write_safetensors(file: Path, network: nn.Module, images: Tensor) -> Network:
    with written(file) as draft:
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, draft)
    empty = copy.deepcopy(network)
    for tensor in empty.state_dict().values():
        tensor.zero_()
    empty.load_state_dict(load_file(file))
    return empty


def write_pt2(file: Path, network: nn.Module, images: Tensor) -> Network:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file)
    return torch.export.load(file).module()


def write_onnx(file: Path, network: nn.Module, images: Tensor) -> Network:
    import onnxruntime

    torch.onnx.export(
        network,
        (images,),
        file,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: "batch"},),
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])


def difference(written: Network, network: nn.Module, images: Tensor) -> float:
    """The largest difference between two numbers of the embeddings; infinite for another shape or NaN."""
    largest = 0.0
    for batch in (images, images[:1]):
        got, expected = written(batch), network(batch)
        if got.shape != expected.shape or got.isnan().any():
            return float("inf")
        largest = max(largest, (got - expected).abs().max().item())
    return largest


def check(file: Path, far: float, embeddings: Tensor) -> None:
    scale = embeddings.abs().max().item()
    if not far <= TOLERANCE * scale:
        raise RuntimeError(f"{file} differs by {far:.1e} from the run's network, whose embeddings reach {scale:.1e}")


@contextmanager
def quiet() -> Iterator[None]:
    """Hides two harmless warnings of torch's exporters: no torchvision, and channels_last, which they do keep."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
