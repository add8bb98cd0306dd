"""Write the embeddings of a data set by the network of a run, for `fastmargin evaluate`. A safetensors file:

    embeddings   float32 [N, d], as the network makes them: not normalized, compared by cosine
    labels       int64 [N], 0..C-1
    titles       uint8, a JSON list in UTF-8: a title of each image, the path of its file where it has one
    held_out     int8 [N], for the run's own data: 1 for identities that training did not see
    names        in the metadata, a JSON list: the name of each label

Rows are in the order of the source; a folder is ordered by name, then by path.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.sources import key_of
from fastmargin.driver.log import Log
from fastmargin.driver.training.backbone import adapted, embed_images, load, load_backbone
from fastmargin.files import written


def embed(
    where: Path, source: str | None, out: Path, log: Log, model: str | None = None, device: str | None = None
) -> None:
    """Writes the embeddings of all images of a source by the newest checkpoint of a run.

    Images in files are read block by block: only the embeddings stay in memory.
    source: as for training; None: all data of the run, held out or not. model: as for `train.train`; device: None is a
    GPU where there is one. ValueError for a folder that holds no run or no checkpoint, a source that is no data,
    embeddings that are not finite; OSError for an `out` that cannot be written.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"out is {out}; want the name of a file, in a folder that is there")
    backbone = load_backbone(where, log, model, device)
    config, own = adapted(backbone, source), backbone.config.data
    identities = load(backbone, config, log)
    embeddings = embed_images(backbone.network, identities.images)
    if not (finite := embeddings.isfinite().all(1)).all():
        title = identities.title(int(finite.int().argmin()))
        raise ValueError(f"the network gives embeddings that are not finite, the first of {title}")
    held_out = None
    if config.source == own.source or same_files(config.source, own.source):
        held_out = torch.from_numpy(identities.held_out(own.holdout, own.split_seed, key_of(own)))
    save(out, embeddings, identities, held_out)
    log(f"{out}: {len(embeddings)} images of {identities.num_classes} identities, {embeddings.shape[1]} numbers each")


def same_files(source: str, other: str) -> bool:
    """Whether two sources are one file or folder, however its path is written."""
    return Path(source).exists() and Path(other).exists() and Path(source).samefile(other)


def save(
    out: Path,
    embeddings: Tensor,  # [N, d]
    identities: Identities,  # with N images
    held_out: Tensor | None,  # [N] bool; None: not known
) -> None:
    titles = json.dumps([identities.title(number) for number in range(len(embeddings))]).encode()
    tensors = {
        "embeddings": embeddings.contiguous(),
        "labels": identities.labels.contiguous(),
        "titles": torch.frombuffer(bytearray(titles), dtype=torch.uint8),
    }
    if held_out is not None:
        tensors["held_out"] = held_out.to(torch.int8)
    with written(out) as draft:
        save_file(tensors, draft, {"names": json.dumps(identities.names)})
