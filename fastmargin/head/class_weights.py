"""The class weights of a head: their shards, their initial values, and the queries that need no margin.

In a group each rank holds a range of the classes (`class_range`), and all ranks make every call together, each with its
own rows; the collectives are in fastmargin/distributed. Letters: B rows of all ranks, b of this one, C classes, d
features, k nearest. A class has up to three numbers:

    global class id   in [0, C): labels, results
    local index       row of this rank's `weight`: global id - start of the rank's range
    subset index      position in `subset`, the sorted local indices that a pass sampled; on CUDA then -1, no class

-1 in each: no class, or a class of another rank.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin.distributed.functions import (
    LocalEntries,
    average_gradients,
    gather_classes,
    gather_rows,
    global_grad_norm,
    merge_shards,
    reshard,
)
from fastmargin.distributed.layout import Group, Layout, batch_layout, chunks
from fastmargin.head.checks import IN_A_GROUP, check_embeddings, check_imprint
from fastmargin.head.sampling import initial_rows
from fastmargin.margins.base import Margin
from fastmargin.ops.backends import check_compute_dtype, named
from fastmargin.ops.class_update import SteppingBackward
from fastmargin.ops.common import unit_rows
from fastmargin.ops.exponentials import Keep, KeptBytes
from fastmargin.ops.nontarget_lse import IMPLS, LSEOutput, log_sum_exp
from fastmargin.ops.problem import Problem


def apply_lazy_updates(head: "ClassWeights", *_: Any) -> None:
    head._apply_lazy_updates()


class LazyOptimizer(SteppingBackward, Protocol):
    """The interface that a head needs of its class optimizer (optim/base.py). subset: local indices [n]; None: all."""

    in_backward: bool

    def before_forward(self, subset: Tensor | None) -> None: ...

    def apply_lazy_updates(self, subset: Tensor | None = None) -> None: ...

    def detach(self) -> None: ...


class Nearest(NamedTuple):
    """The classes nearest to each row, best first.

    Attributes:
        scores: [b, k] cosines where weights are normalized, else logits; -inf where there are fewer classes.
        classes: [b, k] int64; -1 where there are fewer.
    """

    scores: Tensor  # [b, k] cosines where weights are normalized, else logits; -inf where there are fewer classes
    classes: Tensor  # [b, k] int64; -1 where there are fewer


def to_index(
    ids: Tensor,  # [B] global class ids, -1: none; those of this rank are in the subset
    classes: Layout,
    subset: Tensor | None,  # [n] local indices, sorted, then perhaps -1; None: all classes of this rank
) -> Tensor:  # [B] local indices or, with a subset, subset indices
    local = ids if classes.group is None else classes.local_index(ids)
    if subset is None:
        return local
    rising = subset.masked_fill(subset < 0, torch.iinfo(torch.int64).max)
    return torch.where(local < 0, -1, torch.searchsorted(rising, local))


def to_global_id(
    index: Tensor,  # [B, k] local indices or, with a subset, subset indices; -1: none
    classes: Layout,
    subset: Tensor | None,  # [n]
) -> Tensor:  # [B, k]
    """The inverse of `to_index`."""
    local = index
    if subset is not None:
        none = len(subset)  # -1 is appended there, so that an empty subset can be indexed, too
        local = F.pad(subset, (0, 1), value=-1)[torch.where(index < 0, none, index)]
    return local if classes.group is None else classes.global_id(local)


class ClassWeights(nn.Module):
    """The weights of `num_classes` classes. Options: as MarginHead's of the same names."""

    weight: nn.Parameter
    class_optimizer: LazyOptimizer | None  # set by the optimizer itself

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: Margin,
        *,
        bias: bool,
        group: Group | None,
        gather_dtype: torch.dtype | None,
        compute_dtype: torch.dtype | None,
        keep_bytes: int,
        backend: str | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.class_optimizer = None
        margin.check_classes(num_classes)
        self.margin, self.seed = margin, seed
        self.gather_dtype, self.compute_dtype, self.backend = gather_dtype, compute_dtype, backend
        self.kept = KeptBytes(keep_bytes)
        self.classes = chunks(num_classes, group)
        self.weight = nn.Parameter(initial_rows(*self.class_range, in_features, seed))
        self.bias = nn.Parameter(torch.zeros(num_classes, dtype=torch.float32)) if bias else None
        self.register_state_dict_pre_hook(apply_lazy_updates)
        self.register_load_state_dict_pre_hook(apply_lazy_updates)
        named(IMPLS, backend)  # raises now, and not at the first batch; reads the environment, too
        check_compute_dtype(compute_dtype, self._weight.dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self._apply_lazy_updates()
        return super().__getattr__(name)

    def named_modules(self, *args: Any, **options: Any) -> Iterator[Any]:
        """As nn.Module's, which `parameters()` of the head and of a module that contains it call."""
        self._apply_lazy_updates()
        return super().named_modules(*args, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and hasattr(value, "full_tensor") and self.classes.group is not None:
            raise RuntimeError(f"fully_shard of a {IN_A_GROUP}")
        super().__setattr__(name, value)

    def _replicate_for_data_parallel(self) -> Any:
        if self.classes.group is not None:
            raise RuntimeError(f"DataParallel of a {IN_A_GROUP}")
        return super()._replicate_for_data_parallel()

    @property
    def _weight(self) -> nn.Parameter:  # [C_local, d]
        """`weight`, whose rows may have pending lazy updates."""
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """d, the width of the embeddings."""
        return self._weight.shape[1]

    @property
    def num_classes(self) -> int:
        """C, over all ranks."""
        return self.classes.total

    @property
    def class_range(self) -> tuple[int, int]:
        """The classes [lo, hi) whose weights this process holds."""
        return self.classes.start, self.classes.stop

    def replicated_parameters(self) -> list[nn.Parameter]:
        """The parameters that every rank holds in full, for an ordinary optimizer.

        Returns:
            Those of the learned scale (a scalar), learned margins [C] and the bias [C], where there are such.
        """
        return [*([] if self.bias is None else [self.bias]), *self.margin.parameters()]

    def grad_norm(self, others: Iterable[nn.Parameter] = ()) -> Tensor:  # []
        """The 2-norm of all gradients: class weights of all ranks, replicated parameters and `others`.

        For `torch.nn.utils.clip_grads_with_norm_`.

        Args:
            others: parameters of a backbone, of any shape [...], also under DDP or FSDP2.

        Returns:
            A scalar.

        Raises:
            RuntimeError: an optimizer that has in_backward=True: there is no gradient of the class weights then.
        """
        if self.class_optimizer is not None and self.class_optimizer.in_backward:
            raise RuntimeError("in_backward=True leaves no gradient of the class weights to measure: want it False")
        return global_grad_norm(self._weight, [*self.replicated_parameters(), *others], self.classes.group)

    def _rows(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [b, d] -> x [b, d], norms [b], r [b]
        f = embeddings.to(self._weight.dtype)
        unit, norms = unit_rows(f)
        r = self.margin.scale(norms)
        return (r[:, None] * unit if self.margin.normalize_features else f), norms, r

    @property
    def _max_norm(self) -> float:
        """No row of `_rows` is longer; inf where only the rows themselves can tell."""
        margin = self.margin
        fixed = margin.normalize_features and isinstance(margin.s, float) and type(margin).scale is Margin.scale
        return float(margin.s) if fixed else math.inf

    def _nontarget_lse(
        self,
        x: Tensor,  # [b, d]
        y: Tensor,  # [B] global class ids, -1: none
        k: int,
        batch: Layout,
        subset: Tensor | None = None,  # [n] local indices, sorted; None: all
    ) -> LSEOutput:  # rest [b], target [b], topk_values [b, k], topk_classes [b, k] global class ids
        """`nontarget_lse` of this rank's rows over the classes of all ranks.

        In a group each rank computes the rows of all ranks over its own classes, and `merge_shards` gives each rank the
        result of its rows.
        """
        average_gradients(self.replicated_parameters(), batch.group)
        bias = self.bias
        if bias is not None and (batch.group is not None or subset is not None):
            bias = LocalEntries.apply(bias, self.classes)
        problem = Problem(
            gather_rows(x, batch, self.gather_dtype),
            self._weight,
            to_index(y, self.classes, subset),
            bias,
            subset,
            self.margin.normalize_weight,
            self.compute_dtype,
        )
        keep = Keep(self.kept, self._max_norm)
        shard = log_sum_exp(problem, k, self.backend, self._stepping_optimizer(subset), keep)
        shard = shard._replace(topk_classes=to_global_id(shard.topk_classes, self.classes, subset))
        return shard if batch.group is None else merge_shards(shard, batch)

    def _stepping_optimizer(self, subset: Tensor | None) -> LazyOptimizer | None:  # [n] local indices; None: all
        """Brings these rows up to date; returns the class optimizer if the backward pass is to make its step."""
        training = self.training and torch.is_grad_enabled() and self._weight.requires_grad
        if self.class_optimizer is None or not training:
            self._apply_lazy_updates()
            return None
        self.class_optimizer.before_forward(subset)
        return self.class_optimizer if self.class_optimizer.in_backward else None

    def _apply_lazy_updates(self) -> None:
        """Applies pending lazy updates, before weights are read or written."""
        if self.class_optimizer is not None:
            self.class_optimizer.apply_lazy_updates()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles drop the attached optimizer."""
        self._apply_lazy_updates()
        return {**super().__getstate__(), "class_optimizer": None}

    def get_logits(self, embeddings: Tensor) -> Tensor:  # [b, d] -> [b, C]
        """All logits, without a margin. For few classes only: every rank gathers all weights.

        Args:
            embeddings: [b, d] of any floating dtype.

        Returns:
            [b, C], cosines times the scale where both are normalized.

        Raises:
            ValueError: embeddings of the wrong width or dtype, or on another device.
        """
        check_embeddings(embeddings, self._weight)
        self._apply_lazy_updates()
        average_gradients(self.replicated_parameters(), self.classes.group)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, _, _ = self._rows(embeddings)
            weight = gather_classes(self.weight, self.classes)
            weight = F.normalize(weight, eps=1e-12) if self.margin.normalize_weight else weight
            return F.linear(x, weight, self.bias)

    @torch.no_grad()
    def nearest(self, embeddings: Tensor, k: int) -> Nearest:  # [b, d] -> [b, k] each
        """The k classes nearest to each row, best first. Without gradient.

        Any number of classes; no logits are stored. Ranks may have different numbers of rows.

        Args:
            embeddings: [b, d] of any floating dtype.
            k: 0 or more.

        Returns:
            scores [b, k] and classes [b, k]: see `Nearest`.

        Raises:
            ValueError: embeddings of the wrong width or dtype, or on another device; k < 0.
        """
        check_embeddings(embeddings, self._weight)
        batch, embeddings = batch_layout(embeddings, self.classes.group)
        x, _, r = self._rows(embeddings)
        y = torch.full((batch.total,), -1, dtype=torch.int64, device=x.device)
        out = self._nontarget_lse(x, y, k, batch)
        scores = out.topk_values if self.margin.plain else out.topk_values / r[:, None]
        return Nearest(scores, out.topk_classes)

    @torch.no_grad()
    def load_full_weight(self, w: Tensor) -> None:  # [C, d]
        """Sets all class weights; a rank reads only the rows of its own classes.

        Args:
            w: [C, d] of any dtype.

        Raises:
            ValueError: another shape.
        """
        if not isinstance(w, Tensor) or w.shape != (self.num_classes, self.in_features):
            given = [*w.shape] if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"weight is {given}: want a tensor [{self.num_classes}, {self.in_features}]")
        self._apply_lazy_updates()
        self.weight.copy_(self.classes.local_slice(w))

    @torch.no_grad()
    def imprint(
        self,
        embeddings: Tensor,  # [n, d]
        classes: Tensor,  # [n] int64, may repeat
    ) -> None:
        """Sets each named class's weight to the mean of its unit embeddings (Doppelganger Mining, section 4).

        Where weights are normalized only the direction counts, and the row keeps its norm: a gradient step turns the
        direction in proportion to 1 / ||w||^2, so with its old norm an imprinted class learns as fast as the others. In
        a group the embeddings of a class may come from any ranks.

        Args:
            embeddings: [n, d] of any floating dtype.
            classes: [n] int64 in [0, C), may repeat: the class of each.

        Raises:
            ValueError: shapes or dtypes that do not fit, classes outside [0, C), and a class whose embeddings have no
                mean direction or are not finite.
        """
        check_imprint(embeddings, classes, self.weight)
        given, _ = batch_layout(embeddings, self.classes.group)
        classes, embeddings = given.gather(classes), given.gather(embeddings)
        lo, hi = (int(classes.min()), int(classes.max())) if len(classes) else (0, 0)
        if not 0 <= lo <= hi < self.num_classes:
            raise ValueError(f"classes run from {lo} to {hi}: want [0, {self.num_classes})")
        ids, inverse = classes.unique(return_inverse=True)
        unit, _ = unit_rows(embeddings.to(self.weight.dtype))
        total = unit.new_zeros(len(ids), self.in_features).index_add_(0, inverse, unit)
        undefined = ~(total.norm(dim=1) > 1e-6)
        if undefined.any():
            raise ValueError(f"the embeddings of class {int(ids[undefined][0])} add up to nothing, or are not finite")
        self._apply_lazy_updates()
        local = self.classes.local_index(ids)
        held = local >= 0
        local, total, count = local[held], total[held], inverse.bincount(minlength=len(ids))[held]
        if self.margin.normalize_weight:
            norm = self.weight[local].norm(dim=1, keepdim=True)
            self.weight[local] = unit_rows(total)[0] * torch.where(norm > 0, norm, 1.0)
        else:
            self.weight[local] = total / count[:, None]

    @torch.no_grad()
    def extend(self, n: int) -> None:
        """Appends n classes, with the initial rows of a larger head of this seed, and reshards all over the ranks.

        `weight` and `bias` become new Parameters: create a new optimizer for them. A class optimizer is detached.

        Args:
            n: the number of new classes.

        Raises:
            ValueError: n < 0, or per-class margins, which have no entries for them.
        """
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"n = {n!r}: want an int of 0 or more")
        C = self.num_classes
        self.margin.check_classes(C + n)
        if self.class_optimizer is not None:
            self.class_optimizer.detach()
        classes = chunks(C + n, self.classes.group)
        first = max(C, classes.start)
        fresh = initial_rows(first, max(first, classes.stop), self.in_features, self.seed).to(self.weight)
        weight = torch.cat((reshard(self.weight, self.classes, classes), fresh))
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.classes = classes
        if self.bias is not None:
            bias = torch.cat((self.bias, self.bias.new_zeros(n)))
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
