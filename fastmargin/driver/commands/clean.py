"""Cleaning a data set with the network of a run: images far from their identity, identities close to one another.

    e_i = f(image_i) / ||f(image_i)||,    c_k = s / ||s||, s = sum of e_i over the images of identity k

    images.csv     the images of each identity by <e_i, c_k>, worst first (ArcFace, arXiv 1801.07698v1, 3.1.1: those too
                   far from the feature centre of their identity go, those about the threshold are looked at)
    remove.txt     the images with a cosine below a threshold, one a line, worst first of all
    pairs.csv      the pairs of identities whose centres have at least a given cosine: one person under two names?
    overlap.csv    the same of these identities and those of another data set, such as a test set, whose people should
                   not be trained on (ArcFace 3.4: cosine above 0.45; AM-Softmax 4.2)

An image counts in its own centre: of n images one that is like no other still has about 1 / n, and two images always
have the same cosine. Identities that the run held out are cleaned like the others. Images are embedded identity by
identity: memory is that of all centres and of a block of images, or of the largest identity.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastmargin.driver.config import GLYPHS, CleanConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.log import Log
from fastmargin.driver.reports import contact_sheet
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.backbone import Backbone, adapted, embed_images, load, load_backbone
from fastmargin.ops.common import rank_in_group
from fastmargin.ops.nontarget_lse import nontarget_lse

BLOCK = 4096  # images embedded, and centres compared, at a time
NEAREST = 8  # centres looked for around each, and twice as many while all of them are close
SHARES = (0.01, 0.05, 0.5)  # of the images, whose cosines help to choose --below
MOST = 1_000_000  # pairs of identities, more than anybody looks at

IMAGES = ("name", "images", "rank", "cosine", "image")
PAIRS = ("name", "images", "other", "other_images", "cosine")


class DataSet(NamedTuple):
    identities: Identities
    names: Sequence[str]  # [C] as they are printed
    sizes: Tensor  # [C] int64, images of each
    centres: Tensor  # [C, d] unit
    cosines: Tensor  # [N] of each image with the centre of its identity


class Close(NamedTuple):
    """Pairs of a row and a centre, the highest cosine first."""

    row: Tensor  # [n] int64
    centre: Tensor  # [n] int64
    cosine: Tensor  # [n]


def clean(where: Path, out: Path, options: CleanConfig, log: Log, model: str | None = None) -> None:
    """Writes the lists above into a new or empty folder and prints the first lines of each.

    model: as for `train.train`. ValueError for a folder that holds no run or no checkpoint, an `out` that is not
    empty, data that are none, and more than MOST pairs, or MOST / 2 within one set.
    """
    run_folder.check_unused(out)
    backbone = load_backbone(where, log, model, options.device)
    ours = adapted(backbone, options.source)
    theirs = None if options.against is None else adapted(backbone, options.against)
    loaded = [(config.source, load(backbone, config, log)) for config in (ours, theirs) if config is not None]
    given, *others = (describe(backbone, source, identities) for source, identities in loaded)
    out.mkdir(parents=True, exist_ok=True)
    rank_images(given, out, options, log)
    pairs = close(given.centres, given.centres, torch.arange(len(given.sizes)), options.above)
    once = pairs.row < pairs.centre
    list_pairs("pairs", Close(*(part[once] for part in pairs)), given, given, out, options, log)
    for other in others:
        pairs = close(given.centres, other.centres, torch.full_like(given.sizes, -1), options.above)
        list_pairs("overlap", pairs, given, other, out, options, log)
    log(f"lists: {out}")


def describe(backbone: Backbone, source: str, identities: Identities) -> DataSet:
    names = list(map(contact_sheet.caption, identities.names)) if source == GLYPHS else identities.names
    centres, cosines = centred(backbone.network, identities, backbone.config.dim)
    return DataSet(identities, names, identities.labels.bincount(), centres, cosines)


def centred(network: nn.Module, identities: Identities, dim: int) -> tuple[Tensor, Tensor]:  # [C, d], [N]
    """The centre of each identity and the cosine of each image with it. ValueError if an embedding is not finite."""
    labels = identities.labels
    centres, cosines = torch.empty(identities.num_classes, dim), torch.empty(len(labels))
    with tqdm(total=len(labels), unit="image", disable=not sys.stderr.isatty()) as bar:
        for rows in whole_identities(labels):
            x = F.normalize(embed_images(network, identities.images[rows]))
            if not x.isfinite().all():
                raise ValueError("the network gives embeddings that are not finite")
            own, place = labels[rows].unique(return_inverse=True)
            centres[own] = F.normalize(x.new_zeros(len(own), dim).index_add_(0, place, x))
            cosines[rows] = (x * centres[labels[rows]]).sum(1)
            bar.update(len(rows))
    return centres, cosines


def whole_identities(labels: Tensor) -> list[np.ndarray]:  # [N] -> [n] int64 each
    """All images, about BLOCK at a time, those of an identity together."""
    ends = labels.bincount().cumsum(0)
    cuts = ends[:-1][((ends - 1) // BLOCK).diff() > 0]
    return np.split(labels.argsort(stable=True).numpy(), cuts.tolist())


def close(
    rows: Tensor,  # [R, d] unit
    centres: Tensor,  # [C, d] unit
    itself: Tensor,  # [R] int64, the centre that is the row's own, -1: none
    above: float,
) -> Close:
    """All pairs of a row and another centre with a cosine of `above` or more, in both orders. No array of R x C.

    ValueError for more than MOST.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    todo, k, count = torch.arange(len(rows)), NEAREST, 0
    while len(todo):
        crowded = []
        for part in todo.split(BLOCK):
            _, _, cosine, centre = nontarget_lse(rows[part], centres, itself[part], topk=k)
            ends = cosine[:, -1] < above  # the list holds all that are close
            row, place = ((cosine >= above) & ends[:, None]).nonzero(as_tuple=True)
            found.append((part[row], centre[row, place], cosine[row, place]))
            crowded.append(part[~ends])
            count += len(row)
        todo = torch.cat(crowded)
        if count + k * len(todo) > MOST:
            raise ValueError(
                f"above is {above}, and more than {MOST // 2} pairs of identities are; want a higher cosine"
            )
        k *= 2
    row, centre, cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = cosine.argsort(descending=True, stable=True)
    return Close(row[order], centre[order], cosine[order])


def rank_images(given: DataSet, out: Path, options: CleanConfig, log: Log) -> None:
    """images.csv and, with a threshold, remove.txt."""
    worst = given.cosines.argsort(stable=True)
    labels, title = given.identities.labels, given.identities.title
    run_folder.write_csv(out / "images.csv", IMAGES, image_rows(given, worst[labels[worst].argsort(stable=True)]))
    quantiles = zip(SHARES, np.quantile(given.cosines.numpy(), SHARES), strict=True)
    log(
        f"{len(labels)} images of {len(given.sizes)} identities: cosine with the centre of the identity below "
        f"{', '.join(f'{cosine:.3f} for {share:.0%}' for share, cosine in quantiles)}; the worst:"
    )
    for row in worst[: options.limit].tolist():
        log(f"{given.cosines[row]:8.3f}  {given.names[int(labels[row])]}  {title(row)}")
    if options.below is not None:
        remove = worst[given.cosines[worst] < options.below]
        with run_folder.replaced(out / "remove.txt") as file:
            file.writelines(f"{title(row)}\n" for row in remove.tolist())
        emptied = int((labels[remove].bincount(minlength=len(given.sizes)) == given.sizes).sum())
        log(
            f"below {options.below}: {len(remove)} images of {len(labels[remove].unique())} identities, "
            f"{emptied} of which have no others"
        )


def image_rows(
    given: DataSet,
    order: Tensor,  # [N] images, those of an identity together, worst first
) -> Iterator[tuple[object, ...]]:
    """IMAGES of each."""
    labels = given.identities.labels[order]
    rank = rank_in_group(labels) + 1
    columns = (labels, given.sizes[labels], rank, given.cosines[order], order)
    for label, size, place, cosine, row in zip(*(column.numpy() for column in columns), strict=True):
        yield given.identities.names[label], size, place, f"{cosine:.6f}", given.identities.title(row)


def list_pairs(
    stem: str, pairs: Close, given: DataSet, other: DataSet, out: Path, options: CleanConfig, log: Log
) -> None:
    """A CSV of the pairs, and its first lines."""
    columns = (pairs.row, given.sizes[pairs.row], pairs.centre, other.sizes[pairs.centre], pairs.cosine)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    ours, theirs = given.identities.names, other.identities.names
    named = ((ours[one], size, theirs[two], its, f"{cosine:.6f}") for one, size, two, its, cosine in rows)
    run_folder.write_csv(out / f"{stem}.csv", PAIRS, named)
    log(f"{stem} of identities with a cosine of {options.above} or more: {len(rows)}")
    for one, size, two, its, cosine in rows[: options.limit]:
        log(f"{cosine:8.3f}  {given.names[one]} / {other.names[two]}  ({size} and {its} images)")
