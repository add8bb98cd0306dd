"""Evaluation without the held-out data of a run: stored embeddings, and verification sets of image pairs.

Stored embeddings are a safetensors file with `embeddings` [N, d] and integer `labels` [N], as `fastmargin embed` writes
it; its metadata may hold `names`, a JSON list with the name of each label, else a label's name is its number as text. A
pair list in the format of LFW's pairs.txt names the n-th image of a name: the n-th row of that label.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastmargin import evaluation
from fastmargin.driver.commands.evaluate import resolvable
from fastmargin.driver.data.sources.pixels import Color, decode
from fastmargin.driver.log import Log
from fastmargin.driver.reports import report
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.backbone import embed_images, load_backbone

LARGEST = 40_000  # images: the scores of all their pairs, 0.8 billion, take 3 GB


def evaluate_stored(path: Path, pairs: str | None, out: str | None, log: Log) -> None:
    """Evaluates the embeddings of a file over all their pairs, or over those of a pair list.

    ValueError for a file that is not as described above, a pair list with images that are not in it, too many images.
    """
    embeddings, labels, names = read_embeddings(path)
    if pairs is None:
        if len(embeddings) > LARGEST:
            raise ValueError(f"{path} has {len(embeddings)} images; want {LARGEST} or fewer, or a pair list")
        results = evaluation.evaluate_embeddings(embeddings, labels)
        heading = f"{results['identities']} identities, {results['images']} images"
        return tell(heading, path.stem, results, report.EMBEDDINGS, out, log)
    listed = evaluation.read_pairs(pairs)
    first, second, same = listed.rows(labels, names)
    results = evaluation.evaluate_pairs(embeddings[first], embeddings[second], same, listed.folds)
    tell(f"{len(same)} pairs of {pairs}", path.stem, results, report.PAIRS, out, log)


def evaluate_set(
    where: Path,
    pairs: str,
    mirror: evaluation.Mirror | None,
    out: str | None,
    log: Log,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """Evaluates a run's network on a verification set of InsightFace; images of another size are resized.

    mirror: see `fastmargin.evaluation.mirrored`; model: as for `train.train`; device: None is a GPU where there is one.
    ValueError for a file that is no such set, an image that cannot be read.
    """
    _, network, (channels, size, _), _ = load_backbone(where, log, model, device)
    images, same = evaluation.read_bin(pairs)
    color: Color = "gray" if channels == 1 else "rgb"
    pixels = torch.stack([pixels_of(image, number, size, color) for number, image in enumerate(images)])
    features = describe(network, pixels, mirror)
    results = evaluation.evaluate_pairs(features[::2], features[1::2], same)
    tell(f"{len(same)} pairs of {pairs}, at {size} pixels", where.name, results, report.PAIRS, out, log)


def read_embeddings(path: Path) -> tuple[Tensor, Tensor, list[str] | None]:  # [N, d], [N] int64
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("embeddings", "labels")}
            names = json.loads((file.metadata() or {}).get("names", "null"))
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: want safetensors with embeddings and labels ({error})") from error
    embeddings, labels = tensors["embeddings"], tensors["labels"]
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        given = f"embeddings {[*embeddings.shape]}, labels {[*labels.shape]} {labels.dtype}"
        raise ValueError(f"{path}: {given}; want [N, d], and [N] of integers")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: names in its metadata are no list of text")
    return embeddings, labels.long(), names


def pixels_of(image: bytes, number: int, size: int, color: Color) -> Tensor:  # [size, size] or [size, size, 3] uint8
    """An encoded image, resized if need be."""
    try:
        return torch.from_numpy(decode(image, size, color).copy())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {number} of the verification set cannot be read: {error}") from error


def describe(
    network: nn.Module,
    pixels: Tensor,  # [N, H, W] or [N, H, W, 3] uint8
    mirror: evaluation.Mirror | None,
) -> Tensor:  # [N, d], or [N, 2 d]
    plain = embed_images(network, pixels)
    return plain if mirror is None else evaluation.mirrored(plain, embed_images(network, pixels.flip(2)), mirror)


def tell(
    heading: str, column: str, results: Mapping[str, float], titles: Mapping[str, str], out: str | None, log: Log
) -> None:
    """Prints the numbers, and writes them to `out` if it is given."""
    numbers = resolvable(results)
    log(report.lines(heading, {column: numbers}, titles))
    if titles is report.PAIRS:
        log(report.QUOTED)
    if out is not None:
        run_folder.write_json(Path(out), numbers)
        log(f"numbers: {out}")
