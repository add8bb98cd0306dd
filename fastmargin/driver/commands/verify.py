"""Evaluation without the held-out data of a run: stored embeddings, and verification sets of image pairs.

Stored embeddings are a safetensors file with `embeddings` [N, d] and integer `labels` [N], as `fastmargin embed` writes
it; its metadata may hold `names`, a JSON list with the name of each label, else a label's name is its number as text.
`titles` and `held_out` are as in embed.py, and may be missing. Where `held_out` marks rows, only those are compared
unless told otherwise. In a pair list in the format of LFW's pairs.txt, image n is as in `PairList.rows`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

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


class Stored(NamedTuple):
    embeddings: Tensor  # [N, d]
    labels: Tensor  # [N] int64
    names: list[str] | None  # by label
    titles: list[str] | None  # [N]
    held_out: Tensor | None  # [N] bool


def evaluate_stored(
    path: Path,
    pairs: str | None,
    out: str | None,
    log: Log,
    identities: Literal["held_out", "all"] = "held_out",
    skip_missing: bool = False,
) -> None:
    """Evaluates the embeddings of a file over all their pairs, or over those of a pair list.

    ValueError for a file that is not as described above, a pair list with images that are not in it (skip_missing:
    those pairs are left out), too many images.
    """
    stored = read_embeddings(path)
    if identities == "held_out" and stored.held_out is not None:
        stored = only_held_out(path, stored, log)
    embeddings, labels = stored.embeddings, stored.labels
    if pairs is None:
        if len(embeddings) > LARGEST:
            raise ValueError(f"{path} has {len(embeddings)} images; want {LARGEST} or fewer, or a pair list")
        results = evaluation.evaluate_embeddings(embeddings, labels)
        heading = f"{results['identities']} identities, {results['images']} images"
        return tell(heading, path.stem, results, report.EMBEDDINGS, out, log)
    listed = evaluation.read_pairs(pairs)
    first, second, same = listed.rows(labels, stored.names, stored.titles, skip_missing)
    if left_out := len(listed.same) - len(same):
        log(f"{left_out} of {len(listed.same)} pairs are left out: the embeddings lack an image of each")
    results = evaluation.evaluate_pairs(embeddings[first], embeddings[second], same, listed.folds)
    tell(f"{len(same)} pairs of {pairs}", path.stem, results, report.PAIRS, out, log)


def only_held_out(path: Path, stored: Stored, log: Log) -> Stored:
    """The rows of identities that training did not see. ValueError if there are none."""
    assert stored.held_out is not None
    rows = stored.held_out.nonzero()[:, 0]
    labels = stored.labels[rows]
    if not len(rows):
        raise ValueError(f"{path}: all its identities were trained on; want --identities all to compare them")
    log(
        f"of identities held out from training: {len(labels.unique())} of {len(stored.labels.unique())} identities, "
        f"{len(rows)} of {len(stored.labels)} images; --identities all compares all"
    )
    titles = None if stored.titles is None else [stored.titles[row] for row in rows.tolist()]
    return Stored(stored.embeddings[rows], labels, stored.names, titles, None)


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


def read_embeddings(path: Path) -> Stored:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("embeddings", "labels")}
            optional = {name: file.get_tensor(name) for name in ("titles", "held_out") if name in file.keys()}
            names = json.loads((file.metadata() or {}).get("names", "null"))
        titles = json.loads(bytes(optional["titles"].tolist())) if "titles" in optional else None
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: want safetensors with embeddings and labels ({error})") from error
    embeddings, labels, held_out = tensors["embeddings"], tensors["labels"], optional.get("held_out")
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        given = f"embeddings {[*embeddings.shape]}, labels {[*labels.shape]} {labels.dtype}"
        raise ValueError(f"{path}: {given}; want [N, d], and [N] of integers")
    if names is not None and not is_text(names):
        raise ValueError(f"{path}: names in its metadata are no list of text")
    if titles is not None and not (is_text(titles) and len(titles) == len(labels)):
        raise ValueError(f"{path}: titles are no list of {len(labels)} texts")
    if held_out is not None and held_out.shape != labels.shape:
        raise ValueError(f"{path}: held_out is {[*held_out.shape]}; want {[*labels.shape]}, as the labels")
    return Stored(embeddings, labels.long(), names, titles, None if held_out is None else held_out.bool())


def is_text(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


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
