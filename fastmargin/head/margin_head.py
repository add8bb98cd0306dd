"""MarginHead: the class weights and the loss, on top of `nontarget_lse`. No B x C array is stored.

    x_i    = r_i f_i / ||f_i||        r_i = margin.scale: s, or ||f_i|| where features are not normalized
    rest_i, target_i, topk_i = nontarget_lse(x, W, y)
    cos_i  = target_i / r_i
    loss_i = -logsigmoid(r_i psi(cos_i) - rest_i) + penalty_i
             = cross entropy with margin psi on the target (ArcFace eq. 9, AM-Softmax eq. 6, SphereFace, ...)

A plain layer (Softmax, L2Softmax) has no cosine: loss_i = -logsigmoid(target_i - rest_i).
Letters: B rows, b of them on this rank, C classes, d features, k nearest wrong classes. Without a group b = B.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.distributed.agreement import check_group
from fastmargin.distributed.layout import Group, Layout, batch_layout
from fastmargin.head.checks import (
    check_class_weight,
    check_embeddings,
    check_first_pass,
    check_hard_classes,
    check_one_device,
    check_options,
    check_rows,
    check_wrapper,
    digest,
    module_fingerprint,
)
from fastmargin.head.class_weights import ClassWeights
from fastmargin.head.sampling import StepCounter, derive_seed, sampled_classes, seeded_rng
from fastmargin.margins.base import Margin


class HeadOutput(NamedTuple):
    """What a head returns. Scores are cosines where weights are normalized, else logits. All but the loss are detached.

    Attributes:
        loss: a scalar, or [b] with reduction="none".
        target_score: [b] to the own class; NaN on ignored rows.
        hard_scores: [b, k] of the nearest wrong classes, best first; -inf where there is none.
        hard_classes: [b, k] int64, their ids; -1 where there is none.
    """

    loss: Tensor  # scalar, or [b] with reduction="none"
    target_score: Tensor  # [b], NaN on ignored rows
    hard_scores: Tensor  # [b, k] of the nearest wrong classes, best first; -inf where there is none
    hard_classes: Tensor  # [b, k] int64, their ids; -1 where there is none


def match_counter(head: "MarginHead", state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A head that counts and one that does not read each other's state: the count starts from 0, or is dropped."""
    key = f"{prefix}counter._extra_state"
    if head.counter is None:
        state.pop(key, None)
    else:
        state.setdefault(key, torch.tensor(0))


class MarginHead(ClassWeights):
    """A margin-softmax classifier over `num_classes` classes, trained without ever storing the logits.

    Args:
        in_features: d, the width of the embeddings.
        num_classes: C.
        margin: the function of the target's cosine: `ArcFace()`, `CosFace()`, ...
        bias: a bias per class; only for margins with plain weights (Softmax, L2Softmax).
        topk: k, the number of nearest wrong classes reported for each row.
        sample_rate: the fraction of the classes that a training pass samples, in addition to those of the batch
            (PartialFC). Hard classes are found among these, and the gradient of `weight` is sparse COO.
        group: a torch.distributed group of all processes. Each rank holds a range of the classes (`class_range`), and
            all ranks call the head together, each with its own rows. The objective is the average of their losses, as
            in DDP and FSDP2; wrap the backbone in one of these, not the head. None: one process holds all classes.
        uneven: ranks may have different numbers of rows; on a GPU this costs a host sync in every pass.
        gather_dtype: torch.bfloat16 or torch.float16: dtype for the all_gather of embeddings, normalized and scaled;
            scores then contain its rounding. None: no cast.
        compute_dtype: torch.bfloat16 or torch.float16: what float32 rows and weights are rounded to for the products
            over all classes; the weights, every sum and the target's cosine stay float32. None: no rounding; a head in
            float64 (`.double()`) accepts no other. See `nontarget_lse`.
        keep_bytes: memory for the exponentials of forward passes, of all that are not yet backpropagated together. A
            pass whose B x C numbers, 2 bytes each with compute_dtype=torch.bfloat16, else 4, do not fit makes them
            again in the backward pass: four products of that size and not three. Gradients then differ in their last
            bits. Only on a GPU, for margins with a fixed s and normalized weights, and not with torch.float16.
        reduction: "mean" over the valid rows, "sum", or "none". In a group each rank's "mean" or "sum" is N times its
            share, so that averaging over ranks (DDP) gives the global value.
        ignore_index: rows with this label have no loss and no gradient.
        class_weight: [C], a factor per class; "mean" divides by the sum of the rows' factors, as F.cross_entropy does.
        check_labels: calls `check()` in every forward pass: a host sync on a GPU. On the CPU it always runs.
        backend: of the op `nontarget_lse`.
        seed: of the initial weights, the sampled classes and random margins, 0 or more.

    `counter.step` counts the training passes of a head in a group or with sampled classes: their random numbers depend
    on (seed, step) alone. Heads that count and heads that do not load each other's state strictly. `sampled` [n] are
    the local indices (rows of `weight`) of the last pass that sampled, sorted; None: all. On CUDA they may end in -1,
    no class: their number is an upper bound, so that no pass waits for the device, except with the backends stream and
    reference. The gradient of `weight` is not coalesced there.

    `bad_label` holds the first bad label since the last `check()`, `class_optimizer` the attached class optimizer.

    `weight`, `parameters()`, `named_parameters()` and `state_dict()`, also those of a module that contains the head,
    first apply the pending updates of an optimizer with sampled classes, to all rows. For a Parameter held from
    earlier call the optimizer's `apply_lazy_updates()` before it is read.

    Which optimizer: one of torch on `parameters()` takes the dense gradient of all classes; `fm.optim.ClassSGD` and
    `ClassAdamW` are for steps inside the backward pass and for sampled classes.

    Raises:
        ValueError: for any option outside its range, or not the same on all ranks; for bad labels, see `forward`.
        RuntimeError: a head in a group inside DistributedDataParallel (in its first pass), fully_shard or DataParallel.
    """

    class_weight: Tensor | None
    bad_label: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: Margin,
        *,
        bias: bool = False,
        topk: int = 0,
        sample_rate: float = 1.0,
        group: Group | None = None,
        uneven: bool = False,
        gather_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        keep_bytes: int = 0,
        reduction: Literal["mean", "sum", "none"] = "mean",
        ignore_index: int = -100,
        class_weight: Tensor | None = None,  # [C]
        check_labels: bool = False,
        backend: str | None = None,
        seed: int = 0,
    ) -> None:
        sizes = {"in_features": (in_features, 1), "num_classes": (num_classes, 1), "topk": (topk, 0), "seed": (seed, 0)}
        sizes["keep_bytes"] = keep_bytes, 0
        check_options(sizes, margin, bias, sample_rate, gather_dtype, reduction, ignore_index)
        if class_weight is not None:
            check_class_weight(class_weight, num_classes)
        if group is not None:
            check_group(
                group,
                dict(
                    in_features=in_features,
                    num_classes=num_classes,
                    margin=module_fingerprint(margin),
                    bias=bias,
                    topk=topk,
                    seed=seed,
                    sample_rate=sample_rate,
                    uneven=uneven,
                    gather_dtype=gather_dtype,
                    compute_dtype=compute_dtype,
                    keep_bytes=keep_bytes,
                    reduction=reduction,
                    ignore_index=ignore_index,
                    check_labels=check_labels,
                    class_weight=None if class_weight is None else digest(class_weight),
                ),
            )
        super().__init__(
            in_features,
            num_classes,
            margin,
            bias=bias,
            group=group,
            gather_dtype=gather_dtype,
            compute_dtype=compute_dtype,
            keep_bytes=keep_bytes,
            backend=backend,
            seed=seed,
        )
        self.topk, self.sample_rate, self.uneven = topk, sample_rate, uneven
        self.reduction, self.ignore_index, self.check_labels = reduction, ignore_index, check_labels
        self.register_buffer("class_weight", None if class_weight is None else class_weight.detach().clone())
        # number of bad labels, first row, its label (and its rank) in the first bad batch since the last check()
        self.register_buffer("bad_label", torch.zeros(3 if group is None else 4, dtype=torch.int64), persistent=False)
        self.counter = StepCounter() if group is not None or sample_rate < 1 else None
        self.sampled: Tensor | None = None
        self.register_load_state_dict_pre_hook(match_counter)

    def forward(
        self,
        embeddings: Tensor,  # [b, d]
        labels: Tensor,  # [b] int64 in [0, C), or ignore_index
        *,
        sample_weight: Tensor | None = None,  # [b]
        hard_classes: Tensor | None = None,  # [b, k] int64, -1: none
    ) -> HeadOutput:
        """The loss of a batch and, with topk, the nearest wrong classes of its rows.

        Keep a head that samples classes, or whose margin draws numbers or has statistics, out of activation
        checkpointing: its training pass inside a backward pass raises.

        A row that is not finite has a NaN loss, and a NaN in it hard_classes -1.

        Args:
            embeddings: [b, d] of any floating dtype and length. Where features are normalized, their gradient is
                divided by max(length, 1e-6), and a zero row gets none.
            labels: [b] int64 in [0, C), or ignore_index.
            sample_weight: [b], a factor of each row's loss.
            hard_classes: [b, k] int64, -1: none. They are always among the sampled classes, such as
                `DoppelgangerTable.classes[labels]`.

        Returns:
            loss, a scalar or [b]; target_score [b]; hard_scores [b, topk] and hard_classes [b, topk]: see `HeadOutput`.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit. On the CPU also a label outside [0, C), on any rank,
                and different numbers of rows without `uneven`. Labels are not validated in compiled code and on CUDA,
                where
                that would synchronize: such a row is ignored, and the next `check()` raises. Different numbers of rows
                are not validated on CUDA, and the collectives fail or time out.
            RuntimeError: a head in a group inside DistributedDataParallel; with a class optimizer in_backward=True, a
                second pass before its `step()`.
        """
        if self.training:
            check_first_pass(self.sample_rate, self.margin)
        if self.classes.group is not None:
            check_wrapper(self)
        check_one_device(self)
        check_embeddings(embeddings, self._weight)
        check_rows(embeddings, labels, sample_weight, hard_classes)
        may_sync = self.check_labels or embeddings.device.type == "cpu"
        batch, embeddings = batch_layout(embeddings, self.classes.group, uneven=self.uneven, may_sync=may_sync)
        y = self._known(batch.gather(labels), batch)
        known = y >= 0
        valid = batch.local_slice(known)
        x, norms, r = self._rows(embeddings.masked_fill(~valid[:, None], 0.0))
        subset = self._sample(y, hard_classes, batch)
        out = self._nontarget_lse(x, y, self.topk, batch, subset)
        unit = torch.ones_like(r) if self.margin.plain else r
        score = out.target / unit
        logit = out.target if self.margin.plain else r * self._psi(score, norms, y, batch)
        loss = -F.logsigmoid(logit - out.rest)
        penalty = self.margin.penalty(norms)
        if penalty is not None:
            loss = loss + penalty
        if self.training and self.counter is not None:
            self.counter.step += 1
        return HeadOutput(
            self._reduce(loss, y, known, sample_weight, batch),
            score.detach().masked_fill(~valid, torch.nan),
            (out.topk_values / unit[:, None]).detach().masked_fill(~valid[:, None], -torch.inf),
            out.topk_classes.masked_fill(~valid[:, None], -1),
        )

    def _known(self, labels: Tensor, batch: Layout) -> Tensor:  # [B] -> [B], -1 on ignored and bad rows
        counted = labels != self.ignore_index
        inside = (labels >= 0) & (labels < self.num_classes)
        self._note_bad(labels, counted & ~inside, batch)
        return torch.where(counted & inside, labels, -1)

    def _note_bad(self, labels: Tensor, bad: Tensor, batch: Layout) -> None:  # [B], [B]
        if len(labels) == 0:
            return
        first = bad.int().argmax(0, keepdim=True)
        row, *rank = (first,) if batch.group is None else batch.local_index_and_rank(first)
        seen = torch.cat((bad.sum(0, keepdim=True), row, labels.gather(0, first), *rank))
        self.bad_label.copy_(torch.where(self.bad_label[0] > 0, self.bad_label, seen))
        if self.check_labels or (labels.device.type == "cpu" and not torch.compiler.is_compiling()):
            self.check()

    def check(self) -> None:
        """Looks, with a host sync, for bad labels in the batches since the last call; of all ranks.

        Raises:
            ValueError: a batch had a label outside [0, C) that is not ignore_index; on all ranks.
        """
        count, row, label, *rank = self.bad_label.tolist()
        if count:
            self.bad_label.zero_()
            of_rank = f" of rank {rank[0]}" if rank else ""
            raise ValueError(
                f"label {label} of row {row}{of_rank} is outside [0, {self.num_classes}) and is not ignore_index "
                f"{self.ignore_index} ({count} such rows in that batch)"
            )

    def _sample(
        self,
        y: Tensor,  # [B]
        hard_classes: Tensor | None,  # [b, k]
        batch: Layout,
    ) -> Tensor | None:  # [n] local indices, sorted, then on CUDA -1; None: all
        if not self.training or self.counter is None or self.sample_rate == 1:
            return None
        required = y
        if hard_classes is not None:
            hard_classes = batch.gather(hard_classes)
            check_hard_classes(hard_classes, self.num_classes)
            required = torch.cat((y, hard_classes.flatten()))
        step_seed = derive_seed(self.seed, self.counter.step)
        self.sampled = sampled_classes(self.classes, required, self.sample_rate, step_seed)
        return self.sampled

    def _psi(
        self,
        cos: Tensor,  # [b]
        norms: Tensor,  # [b]
        y: Tensor,  # [B]
        batch: Layout,
    ) -> Tensor:  # [b]
        """psi. In a group, gathers cosines and norms, so that batch statistics and random margins match one process."""
        if batch.group is None or not self.training or not self.margin.whole_batch:
            return self._observe_and_psi(cos, norms, batch.local_slice(y))
        all_cos, all_norms = batch.gather(torch.stack((cos, norms), 1)).unbind(1)
        assert self.counter is not None  # there is one in a group
        with seeded_rng(derive_seed(self.seed, self.counter.step, 1), cos.device):
            psi = self._observe_and_psi(batch.splice_local(all_cos, cos), batch.splice_local(all_norms, norms), y)
            return batch.local_slice(psi)

    def _observe_and_psi(self, cos: Tensor, norms: Tensor, y: Tensor) -> Tensor:  # [n] each -> [n]
        if self.training:
            ignored = y < 0
            self.margin.observe(*(t.detach().masked_fill(ignored, torch.nan) for t in (norms, cos)))
        return self.margin(cos, norms, y)

    def _reduce(
        self,
        loss: Tensor,  # [b]
        y: Tensor,  # [B]
        known: Tensor,  # [B]
        sample_weight: Tensor | None,  # [b]
        batch: Layout,
    ) -> Tensor:
        weights = known.to(loss.dtype)
        if self.class_weight is not None:
            weights = weights * self.class_weight.to(loss.dtype)[y.clamp(min=0)]
        loss = torch.where(batch.local_slice(known), loss * batch.local_slice(weights), 0.0)
        if sample_weight is not None:
            loss = loss * sample_weight.to(loss.dtype)
        if self.reduction == "none":
            return loss
        total = loss.sum() if batch.group is None else len(batch.sizes) * loss.sum()
        if self.reduction == "sum":
            return total
        divisor = weights.sum()
        return total / torch.where(divisor == 0, 1.0, divisor)

    def extend(self, n: int) -> None:
        """Appends n classes: see ClassWeights.

        `weight` and `bias` become new Parameters: create a new optimizer for them. A class optimizer is detached.

        Args:
            n: the number of new classes.

        Raises:
            ValueError: n < 0; a head with a class_weight or per-class margins, which have no entries for them.
        """
        if self.class_weight is not None:
            raise ValueError("this head has a class_weight: the new classes have none; build a new head instead")
        super().extend(n)

    def extra_repr(self) -> str:
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return f"in_features={self.in_features}, num_classes={self.num_classes}, topk={self.topk}{compute}"
