"""Checks of a head's options and batches. Each raises ValueError."""

import hashlib
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from fastmargin.margins.base import Margin
from fastmargin.ops.backends import HALVES
from fastmargin.ops.checks import check_int64
from fastmargin.torch_private import within_backward_pass, within_ddp

IN_A_GROUP = (
    "head in a group, whose ranks hold different classes: wrap the backbone alone, and call the head on its output"
)


def check_options(
    sizes: Mapping[str, tuple[int, int]],  # by name: the value given, the smallest allowed
    margin: Margin,
    bias: bool,
    sample_rate: float,
    gather_dtype: torch.dtype | None,
    reduction: str,
    ignore_index: int,
) -> None:
    for name, (size, least) in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name} = {size!r}: want an int of {least} or more")
    if not isinstance(margin, Margin):
        raise ValueError(f"margin is {margin!r}: want a Margin, such as fastmargin.ArcFace()")
    if bias and margin.normalize_weight:
        raise ValueError(f"{type(margin).__name__} normalizes the weights: a bias has no meaning beside it")
    if not isinstance(sample_rate, int | float) or isinstance(sample_rate, bool) or not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate = {sample_rate!r}: want a share of the classes, above 0 and at most 1")
    if gather_dtype not in (None, *HALVES):
        raise ValueError(f"gather_dtype = {gather_dtype!r}: want None, torch.bfloat16 or torch.float16")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction = {reduction!r}: want 'mean', 'sum' or 'none'")
    if not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index = {ignore_index!r}: want an int")


def digest(*tensors: Tensor, text: str = "") -> str:
    """Eight hexadecimal digits of a text and the bits of tensors, for ranks to compare."""
    sha256 = hashlib.sha256(text.encode())
    for tensor in tensors:
        sha256.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()[:8]


def module_fingerprint(module: nn.Module) -> str:
    """Its repr and a digest of its submodules: their types, numbers and strings, parameters and buffers."""
    described = [
        (name, type(part).__qualname__, {k: v for k, v in vars(part).items() if isinstance(v, Real | str | None)})
        for name, part in module.named_modules()
    ]
    return f"{module!r} {digest(*module.parameters(), *module.buffers(), text=repr(described))}"


def check_class_weight(class_weight: Tensor, num_classes: int) -> None:  # [C]
    if not isinstance(class_weight, Tensor) or class_weight.shape != (num_classes,):
        given = [*class_weight.shape] if isinstance(class_weight, Tensor) else type(class_weight).__name__
        raise ValueError(f"class_weight is {given}: want a tensor [{num_classes}]")
    if not bool((class_weight >= 0).all() and class_weight.isfinite().all()):
        raise ValueError("class_weight has an entry that is negative or not finite: want finite weights, 0 or more")


def check_one_device(head: nn.Module) -> None:
    """A head whose `weight` was replaced by one on another device left its buffers behind."""
    device = next(head.parameters(recurse=False)).device  # without recursion: applies no lazy updates
    for name, held in (*head.named_buffers(recurse=False), *head.get_submodule("margin").named_buffers("margin")):
        if held.device != device:
            where = f"the weight is on {device}, {name} on {held.device}"
            raise ValueError(f"{where}: move the whole head, head.to({device})")


def check_first_pass(sample_rate: float, margin: Margin) -> None:
    """In training a pass that activation checkpointing recomputes draws other classes and margins, or moves statistics
    again. Not validated in compiled code."""
    changes = sample_rate < 1 or margin.whole_batch
    if changes and not torch.compiler.is_compiling() and within_backward_pass():
        raise ValueError(
            "a training pass of the head inside a backward pass, as in activation checkpointing: its sampled classes, "
            "random margins and statistics are not those of the first pass; keep the head out of the checkpointed part"
        )


def check_wrapper(head: nn.Module) -> None:
    """Not validated in compiled code."""
    if not torch.compiler.is_compiling() and within_ddp(head):
        raise RuntimeError(f"DistributedDataParallel around a {IN_A_GROUP}; its weights are now those of rank 0")


def check_embeddings(
    embeddings: Tensor,  # [B, d]
    weight: Tensor,  # [C, d]
) -> None:
    d = weight.shape[1]
    if not isinstance(embeddings, Tensor):
        raise ValueError(f"embeddings are a {type(embeddings).__name__}: want a tensor [B, {d}]")
    if embeddings.ndim != 2 or embeddings.shape[1] != d or not embeddings.is_floating_point():
        raise ValueError(f"want floating embeddings [B, {d}]; got {embeddings.dtype} {[*embeddings.shape]}")
    if embeddings.device != weight.device:
        raise ValueError(f"embeddings are on {embeddings.device}, the weight is on {weight.device}")


def check_rows(
    embeddings: Tensor,  # [B, d]
    labels: Tensor,  # [B]
    sample_weight: Tensor | None,  # [B]
    hard_classes: Tensor | None,  # [B, k]
) -> None:
    """What comes with each row of the embeddings."""
    B = len(embeddings)
    given = (("labels", labels), ("sample_weight", sample_weight), ("hard_classes", hard_classes))
    for name, value in given:
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: want a tensor of {B} rows")
    check_int64("labels", labels, B)
    if sample_weight is not None and sample_weight.shape != (B,):
        raise ValueError(f"want sample_weight [{B}]; got {[*sample_weight.shape]}")
    hard = hard_classes
    if hard is not None and (hard.ndim != 2 or len(hard) != B or hard.dtype != torch.int64):
        raise ValueError(f"want int64 hard_classes [{B}, k]; got {hard.dtype} {[*hard.shape]}")
    for name, value in given:
        if value is not None and value.device != embeddings.device:
            raise ValueError(f"{name} are on {value.device}, embeddings on {embeddings.device}")


def check_hard_classes(
    hard_classes: Tensor,  # [B, k]
    num_classes: int,
) -> None:
    """Ids in [-1, C). Not validated on CUDA, where it would synchronize: ids outside are ignored there, as -1 is."""
    if hard_classes.device.type != "cpu":
        return
    for outside in hard_classes[(hard_classes < -1) | (hard_classes >= num_classes)][:1].tolist():
        raise ValueError(f"hard_classes has {outside}: want class ids in [0, {num_classes}), or -1 for none")


def check_imprint(
    embeddings: Tensor,  # [n, d]
    classes: Tensor,  # [n]
    weight: Tensor,  # [C, d]
) -> None:
    if not isinstance(classes, Tensor) or classes.dtype != torch.int64:
        given = getattr(classes, "dtype", type(classes).__name__)
        raise ValueError(f"classes are {given}: want an int64 tensor, after embeddings: imprint(embeddings, classes)")
    check_embeddings(embeddings, weight)
    if classes.ndim != 1 or embeddings.shape != (len(classes), weight.shape[1]):
        raise ValueError(
            f"want embeddings [n, {weight.shape[1]}] and classes [n]; got {[*embeddings.shape]} and {[*classes.shape]}"
        )
