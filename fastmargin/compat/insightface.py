"""InsightFace's `PartialFC_V2`, from recognition/arcface_torch.

Each of W ranks has its part of the classes, C // W of them and one more on the first C % W ranks, in
`checkpoint_gpu_RANK.pt` (with `save_all_states`) at state_dict_softmax_fc / weight, [C_rank, d]. Its margins are here
`ArcFace(s=64, m=0.5, beyond="none", slope="detached")` and `CosFace(s=64, m=0.4)`.
"""

from pathlib import Path

import torch

from fastmargin.compat.files import read_tensor
from fastmargin.head.margin_head import MarginHead

NAMES = "state_dict_softmax_fc", "weight"


@torch.no_grad()
def load_weight(head: MarginHead, folder: str | Path) -> None:
    """Sets a head's weights from the shard files in a folder; in a group every rank reads the rows it holds.

    Args:
        head: of as many classes and features as the shards have together; its weights are changed.
        folder: with checkpoint_gpu_0.pt and so on.

    Raises:
        ValueError: a file is missing or not one of torch.save, or the shards do not add up to the head's classes and
            width.
    """
    folder = Path(folder)
    files = [folder / f"checkpoint_gpu_{rank}.pt" for rank in range(len([*folder.glob("checkpoint_gpu_*.pt")]))]
    if not files:
        raise ValueError(f"{folder} has no checkpoint_gpu_0.pt")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing, and there are {len(files)} files of other ranks")
    shards = [read_tensor(file, *NAMES) for file in files]
    C, W = head.num_classes, len(shards)
    for rank, (file, shard) in enumerate(zip(files, shards, strict=True)):
        rows = C // W + (rank < C % W)
        if shard.shape != (rows, head.in_features):
            want = f"[{rows}, {head.in_features}], of {C} classes on {W} ranks"
            raise ValueError(f"{file}: the weight is {[*shard.shape]}: want {want}")
    head._apply_lazy_updates()
    (lo, hi), start = head.class_range, 0
    for shard in shards:
        first, last = max(lo, start), min(hi, start + len(shard))
        if first < last:
            head.weight[first - lo : last - lo] = shard[first - start : last - start].to(head.weight)
        start += len(shard)
