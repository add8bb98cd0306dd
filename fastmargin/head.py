"""MarginHead: the class weights and the loss, on top of `nontarget_lse`. No B x C array is stored.

    x_i    = r_i f_i / ||f_i||        r_i = margin.scale: s, or ||f_i|| where features are not normalised
    rest_i, target_i, topk_i = nontarget_lse(x, W, y)
    cos_i  = target_i / r_i
    loss_i = -logsigmoid(r_i psi(cos_i) - rest_i) + penalty_i
             = cross entropy with margin psi on the target (ArcFace eq. 9, AM-Softmax eq. 6, SphereFace, ...)

A plain layer (Softmax, L2Softmax) has no cosine: loss_i = -logsigmoid(target_i - rest_i).
Letters: B rows, C classes, d features, k mined classes.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin.backends import check_compute_dtype, pick
from fastmargin.margins import Margin
from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse

BLOCK = 1024  # classes that share a generator of initial rows


class HeadOutput(NamedTuple):
    """What a head returns. Scores are cosines where weights are normalised, else logits; all but loss are detached."""

    loss: Tensor  # scalar, or [B] with reduction="none"
    target_score: Tensor  # [B], NaN on ignored rows
    hard_classes: Tensor  # [B, k] the nearest wrong classes, best first; -1 where there is none
    hard_scores: Tensor  # [B, k], -inf where there is none


def initial_rows(first: int, last: int, d: int, seed: int) -> Tensor:  # [last - first, d]
    """Rows first..last of the endless normal(0, .01) matrix that belongs to a seed.

    Each block of 1,024 classes has a generator of its own, so a class starts the same however many classes there are.
    """
    out = torch.empty(last - first, d, dtype=torch.float32)
    for block in range(first // BLOCK, -(-last // BLOCK)):
        words = np.random.SeedSequence((seed, block)).generate_state(2)
        generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        rows = torch.empty(BLOCK, d, dtype=torch.float32).normal_(0, 0.01, generator=generator)
        lo, hi = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
        out[lo - first : hi - first] = rows[lo - block * BLOCK : hi - block * BLOCK]
    return out


def check_class_weight(class_weight: Tensor, num_classes: int) -> None:  # [C]
    if not isinstance(class_weight, Tensor) or class_weight.shape != (num_classes,):
        given = [*class_weight.shape] if isinstance(class_weight, Tensor) else type(class_weight).__name__
        raise ValueError(f"class_weight is {given}: want a tensor [{num_classes}]")
    if not bool((class_weight >= 0).all() and class_weight.isfinite().all()):
        raise ValueError("class_weight has an entry that is negative or not finite: want finite weights, 0 or more")


class MarginHead(nn.Module):
    """A margin-softmax classifier over `num_classes` classes, trained without ever storing the logits.

    Args:
        in_features: d, the width of the embeddings.
        num_classes: C.
        margin: what happens to the target's cosine: `ArcFace()`, `CosFace()`, ...
        bias: a bias per class; only for margins with plain weights (Softmax, L2Softmax).
        topk: k, how many nearest wrong classes each row reports.
        compute_dtype: torch.bfloat16 or torch.float16: what float32 rows and weights are rounded to for the products
            over all classes; the weights, every sum and the target's cosine stay float32. None: no rounding, and the
            only choice of a head that is made `.double()`. See `nontarget_lse`.
        reduction: "mean" over the valid rows, "sum", or "none".
        ignore_index: rows with this label have no loss and no gradient.
        class_weight: [C], a factor per class; the mean divides by their sum, as F.cross_entropy does.
        check_labels: calls `check()` in every forward pass (a host sync on a GPU; the CPU checks anyway).
        backend: of the primitive; see `nontarget_lse`.
        seed: of the initial weights, 0 or more.

    Raises:
        ValueError: for any option outside its range, here; for bad labels, see `forward`.
    """

    weight: nn.Parameter
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
        compute_dtype: torch.dtype | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        ignore_index: int = -100,
        class_weight: Tensor | None = None,  # [C]
        check_labels: bool = False,
        backend: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"in_features": (in_features, 1), "num_classes": (num_classes, 1), "topk": (topk, 0), "seed": (seed, 0)}
        for name, (size, least) in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise ValueError(f"{name} = {size!r}: want an int of {least} or more")
        if not isinstance(margin, Margin):
            raise ValueError(f"margin is {margin!r}: want a Margin, such as fastmargin.ArcFace()")
        if not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index = {ignore_index!r}: want an int")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction = {reduction!r}: want 'mean', 'sum' or 'none'")
        if bias and margin.normalize_weight:
            raise ValueError(f"{type(margin).__name__} normalises the weights: a bias has no meaning beside it")
        if class_weight is not None:
            check_class_weight(class_weight, num_classes)
        margin.check_classes(num_classes)
        self.margin, self.topk, self.reduction, self.seed = margin, topk, reduction, seed
        self.ignore_index, self.check_labels = ignore_index, check_labels
        self.compute_dtype, self.backend = compute_dtype, backend
        self.weight = nn.Parameter(initial_rows(0, num_classes, in_features, seed))
        self.bias = nn.Parameter(torch.zeros(num_classes, dtype=torch.float32)) if bias else None
        pick(IMPLS, self.weight, backend)  # also of the environment: better now than at the first batch
        check_compute_dtype(compute_dtype, self.weight.dtype)
        self.register_buffer("class_weight", None if class_weight is None else class_weight.detach().clone())
        # count, first row and its label, of the first bad batch since the last check()
        self.register_buffer("bad_label", torch.zeros(3, dtype=torch.int64), persistent=False)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def class_range(self) -> tuple[int, int]:
        """The classes [lo, hi) whose weights this process holds."""
        return 0, len(self.weight)

    def forward(
        self,
        embeddings: Tensor,  # [B, d]
        labels: Tensor,  # [B] int64 in [0, C), or ignore_index
        *,
        sample_weight: Tensor | None = None,  # [B]
    ) -> HeadOutput:
        """The loss of a batch and, with topk, the nearest wrong classes of its rows.

        A label outside [0, C) raises ValueError on the CPU. On a GPU and in compiled code, where looking at labels
        would stall, its row counts as ignored and `check()` raises.
        """
        self._check_embeddings(embeddings)
        self._check_labels(embeddings, labels, sample_weight)
        valid = (labels >= 0) & (labels < self.num_classes) & (labels != self.ignore_index)
        self._note_bad(labels, ~valid & (labels != self.ignore_index))
        y = torch.where(valid, labels, -1)
        x, norms, r = self._rows(embeddings.masked_fill(~valid[:, None], 0.0))
        rest, target, hard_scores, hard_classes = self._primitive(x, y, self.topk)
        unit = torch.ones_like(r) if self.margin.plain else r
        score = target / unit
        loss = -F.logsigmoid(self._target(score, target, r, norms, y, valid) - rest)
        penalty = self.margin.penalty(norms)
        if penalty is not None:
            loss = loss + penalty
        return HeadOutput(
            self._reduce(loss, y, valid, sample_weight),
            score.detach().masked_fill(~valid, torch.nan),
            hard_classes.masked_fill(~valid[:, None], -1),
            (hard_scores / unit[:, None]).detach().masked_fill(~valid[:, None], -torch.inf),
        )

    def _target(
        self, cos: Tensor, target: Tensor, r: Tensor, norms: Tensor, y: Tensor, valid: Tensor
    ) -> Tensor:  # [B] each -> [B], the target's logit with its margin
        if self.margin.plain:
            return target
        if self.training:
            self.margin.observe(*(t.detach().masked_fill(~valid, torch.nan) for t in (norms, cos)))
        return r * self.margin(cos, norms, y)

    def _rows(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, d] -> x [B, d], norms [B], r [B]
        f = embeddings.to(self.weight.dtype)
        norms = f.norm(dim=1)
        r = self.margin.scale(norms)
        if not self.margin.normalize_features:
            return f, norms, r
        unit = f / norms.clamp(min=1e-6)[:, None]
        unit = torch.where(norms[:, None] == 0, 0.0, unit)  # a zero row has no direction to learn
        return r[:, None] * unit, norms, r

    def _reduce(
        self,
        loss: Tensor,  # [B]
        y: Tensor,  # [B]
        valid: Tensor,  # [B]
        sample_weight: Tensor | None,  # [B]
    ) -> Tensor:
        weight = valid.to(loss.dtype)
        if self.class_weight is not None:
            weight = weight * self.class_weight.to(loss.dtype)[y.clamp(min=0)]
        loss = torch.where(valid, loss * weight, 0.0)
        if sample_weight is not None:
            loss = loss * sample_weight.to(loss.dtype)
        if self.reduction == "none":
            return loss
        total = loss.sum()
        if self.reduction == "sum":
            return total
        divisor = weight.sum()
        return total / torch.where(divisor == 0, 1.0, divisor)

    def _check_embeddings(self, embeddings: Tensor) -> None:  # [B, d]
        d = self.in_features
        if not isinstance(embeddings, Tensor):
            raise ValueError(f"embeddings are a {type(embeddings).__name__}: want a tensor [B, {d}]")
        if embeddings.ndim != 2 or embeddings.shape[1] != d or not embeddings.is_floating_point():
            raise ValueError(f"want floating embeddings [B, {d}]; got {embeddings.dtype} {[*embeddings.shape]}")
        if embeddings.device != self.weight.device:
            raise ValueError(f"embeddings are on {embeddings.device}, the weight is on {self.weight.device}")

    def _check_labels(
        self,
        embeddings: Tensor,  # [B, d]
        labels: Tensor,  # [B]
        sample_weight: Tensor | None,  # [B]
    ) -> None:
        for name, given in (("labels", labels), ("sample_weight", sample_weight)):
            if given is not None and not isinstance(given, Tensor):
                raise ValueError(f"{name} are a {type(given).__name__}: want a tensor [{len(embeddings)}]")
        if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"want int64 labels [{len(embeddings)}]; got {labels.dtype} {[*labels.shape]}")
        if sample_weight is not None and sample_weight.shape != labels.shape:
            raise ValueError(f"want sample_weight [{len(labels)}]; got {[*sample_weight.shape]}")
        for name, given in (("labels", labels), ("sample_weight", sample_weight)):
            if given is not None and given.device != embeddings.device:
                raise ValueError(f"{name} are on {given.device}, embeddings on {embeddings.device}")

    def _note_bad(self, labels: Tensor, bad: Tensor) -> None:  # [B], [B]
        if len(labels) == 0:
            return
        row = bad.int().argmax(0, keepdim=True)
        seen = torch.cat((bad.sum(0, keepdim=True), row, labels.gather(0, row)))
        self.bad_label.copy_(torch.where(self.bad_label[0] > 0, self.bad_label, seen))
        if self.check_labels or (labels.device.type == "cpu" and not torch.compiler.is_compiling()):
            self.check()

    def check(self) -> None:
        """Raises ValueError if a batch since the last call had a label outside [0, C). A host sync."""
        count, row, label = self.bad_label.tolist()
        if count:
            self.bad_label.zero_()
            raise ValueError(
                f"label {label} of row {row} is outside [0, {self.num_classes}) and is not ignore_index "
                f"{self.ignore_index} ({count} such rows in that batch)"
            )

    def get_logits(self, embeddings: Tensor) -> Tensor:  # [B, d] -> [B, C]
        """All logits, without a margin: for few classes only. ValueError for embeddings of the wrong width."""
        self._check_embeddings(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, _, _ = self._rows(embeddings)
            weight = F.normalize(self.weight, eps=1e-12) if self.margin.normalize_weight else self.weight
            return F.linear(x, weight, self.bias)

    @torch.no_grad()
    def nearest(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [B, d] -> [B, k], [B, k]
        """The k classes nearest to each row, best first: scores (cosines, or logits of plain layers) and class ids.

        Any number of classes; no logits are stored. Where C < k the rest is score -inf, class -1.
        ValueError for embeddings of the wrong width and k < 0.
        """
        self._check_embeddings(embeddings)
        x, _, r = self._rows(embeddings)
        y = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        _, _, scores, classes = self._primitive(x, y, k)
        return (scores if self.margin.plain else scores / r[:, None]), classes

    def _primitive(
        self,
        x: Tensor,  # [B, d]
        y: Tensor,  # [B]
        k: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # rest [B], target [B], topk_values [B, k], topk_classes [B, k]
        return nontarget_lse(
            x, self.weight, y, bias=self.bias, normalize_weight=self.margin.normalize_weight, topk=k,
            compute_dtype=self.compute_dtype, backend=self.backend,
        )  # fmt: skip

    @torch.no_grad()
    def load_full_weight(self, w: Tensor) -> None:  # [C, d]
        """Sets all class weights, from a tensor of any dtype. ValueError for another shape."""
        if not isinstance(w, Tensor) or w.shape != self.weight.shape:
            given = [*w.shape] if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"weight is {given}: want a tensor [{self.num_classes}, {self.in_features}]")
        self.weight.copy_(w)

    @torch.no_grad()
    def imprint(
        self,
        classes: Tensor,  # [n] int64, may repeat
        embeddings: Tensor,  # [n, d]
    ) -> None:
        """Sets each named class's weight to the mean of its unit embeddings (Doppelganger Mining, section 4).

        Where weights are normalised only the direction counts, and the row keeps its norm: its share of a gradient
        step goes with 1 / ||w||^2, and an imprinted class should learn as fast as the others. ValueError for classes
        outside [0, C), and where the embeddings of a class have no mean direction or are not finite.
        """
        if not isinstance(classes, Tensor) or classes.dtype != torch.int64:
            raise ValueError(f"classes are {getattr(classes, 'dtype', type(classes).__name__)}: want an int64 tensor")
        self._check_embeddings(embeddings)
        if classes.ndim != 1 or embeddings.shape != (len(classes), self.in_features):
            raise ValueError(
                f"want classes [n] and embeddings [n, {self.in_features}]; "
                f"got {[*classes.shape]} and {[*embeddings.shape]}"
            )
        lo, hi = (int(classes.min()), int(classes.max())) if len(classes) else (0, 0)
        if not 0 <= lo <= hi < self.num_classes:
            raise ValueError(f"classes run from {lo} to {hi}: want [0, {self.num_classes})")
        ids, place = classes.unique(return_inverse=True)
        unit = F.normalize(embeddings.to(self.weight.dtype), eps=1e-6)
        total = unit.new_zeros(len(ids), self.in_features).index_add_(0, place, unit)
        lost = ~(total.norm(dim=1) > 1e-6)
        if lost.any():
            raise ValueError(f"the embeddings of class {int(ids[lost][0])} add up to nothing, or are not finite")
        if self.margin.normalize_weight:
            norm = self.weight[ids].norm(dim=1, keepdim=True)
            self.weight[ids] = F.normalize(total, eps=1e-6) * torch.where(norm > 0, norm, 1.0)
        else:
            self.weight[ids] = total / place.bincount(minlength=len(ids))[:, None]

    @torch.no_grad()
    def extend(self, n: int) -> None:
        """Appends n classes, with the initial rows a larger head would have had. `weight` becomes a new Parameter:
        hand it to the optimiser again."""
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"n = {n!r}: want an int of 0 or more")
        if self.class_weight is not None:
            raise ValueError("this head has a class_weight: the new classes have none; build a new head instead")
        C = self.num_classes
        self.margin.check_classes(C + n)
        rows = initial_rows(C, C + n, self.in_features, self.seed).to(self.weight)
        self.weight = nn.Parameter(torch.cat((self.weight, rows)), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            bias = torch.cat((self.bias, self.bias.new_zeros(n)))
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)

    def replicated_parameters(self) -> list[nn.Parameter]:
        """What an ordinary optimiser trains beside `weight`: learnt scale, learnt margins, bias."""
        return [p for p in self.parameters() if p is not self.weight]

    def extra_repr(self) -> str:
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return f"in_features={self.in_features}, num_classes={self.num_classes}, topk={self.topk}{compute}"
