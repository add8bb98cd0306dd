"""Where identities come from. A `data.source` in files is recognized by their content, not by their names:

    source                                  size      augmentation   module
    glyphs                                  32        glyphs         glyphs, drawn from fonts
    a folder with a folder for each         112       faces          folder
    InsightFace's train.rec, or its folder  112       faces          recordio
    an IDX file of images (MNIST)           its own   glyphs         idx
    Omniglot's zips, a comma between them   32        glyphs         omniglot
    a safetensors file                      its own   none           tensors
    synthetic:CLASSESxIMAGES                112       none           synthetic

Size and augmentation are those that a null stands for. A null `data.color` keeps the images' own; folders and
records are gray if all their images are, else in color; synthetic images are in color.

Encoded pictures (folder, recordio) are decoded once, into a packed file: see `packed`. `pixels` scales them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastmargin.driver.config import GLYPHS, DataConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources import folder, glyphs, idx, omniglot, recordio, synthetic, tensors
from fastmargin.driver.log import Log

EVALUATED = 10_000  # images at most: an evaluation compares all their pairs


class Kind(NamedTuple):
    """What differs between the kinds of sources."""

    load: Callable[[DataConfig, Log], Identities]
    augment: str  # where data.augment is null
    key: Callable[[str], object] = str  # of an identity's name: decides whether it is held out


KINDS = {
    GLYPHS: Kind(glyphs.load_glyphs, "glyphs", glyphs.first_code_point),
    "synthetic": Kind(synthetic.load_synthetic, "none"),
    "folder": Kind(folder.load_folder, "faces"),
    "recordio": Kind(recordio.load_recordio, "faces"),
    "idx": Kind(idx.load_idx, "glyphs"),
    "omniglot": Kind(omniglot.load_omniglot, "glyphs"),
    "tensors": Kind(tensors.load_tensors, "none"),
}


def load_data(config: DataConfig, log: Log) -> tuple[Identities, Identities]:
    """(train, test): what to train on, and the images of the identities held out that an evaluation compares.

    ValueError if the source is none of those above, is damaged, or has no images.
    """
    train, held_out = load_all(config, log).split(config.holdout, config.split_seed, key_of(config))
    test = held_out.comparable(EVALUATED, config.split_seed)
    if len(test.labels) < len(held_out.labels):
        log(
            f"data: evaluated are {test.num_classes} of {held_out.num_classes} identities held out, by "
            f"{len(test.labels)} of {len(held_out.labels)} images: 2 or more of each, {EVALUATED} in all at most"
        )
    return train, test


def load_all(config: DataConfig, log: Log) -> Identities:
    """All identities of the source, held out or not. ValueError as for `load_data`."""
    return KINDS[recognize(config.source)].load(config, log)


def key_of(config: DataConfig) -> Callable[[str], object]:
    """The function of an identity's name that decides whether it is held out."""
    return KINDS[recognize(config.source)].key


def recognize(source: str) -> str:
    """The kind of a source, a key of KINDS. ValueError if it is of none."""
    if source == GLYPHS or source.startswith(synthetic.PREFIX):
        return source.partition(":")[0]
    path = Path(source)
    if path.is_dir():
        return "recordio" if (path / "train.rec").is_file() else "folder"
    paths = [path] if path.is_file() else [Path(part) for part in source.split(",")]
    if not all(path.is_file() for path in paths):
        raise ValueError(f"data.source is {source!r}, and there is no such file or folder; want one, or {GLYPHS}")
    kinds = {kind_of_file(path) for path in paths}
    if len(paths) > 1 and kinds != {"omniglot"}:
        raise ValueError(f"data.source is {source!r}; want Omniglot's zips alone where there is more than one file")
    return kinds.pop()


def kind_of_file(path: Path) -> str:
    """The kind by the first bytes. ValueError if they are those of no kind."""
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(idx.GZIP):
        return "idx"
    if start.startswith(recordio.MAGIC):
        return "recordio"
    if start.startswith(b"PK\3\4"):
        return "omniglot"
    if start[8:9] == b"{":
        return "tensors"
    if start.startswith(b"\0\0"):
        return "idx"
    raise ValueError(
        f"data.source is {path}, which begins with {start[:4].hex(' ')}; want a train.rec of InsightFace, an IDX "
        "file of images, Omniglot's zips or a safetensors file; or a folder that has a folder for each identity"
    )
