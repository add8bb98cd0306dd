"""The class weights of a head: where they lie, what they start from, and what can be asked of them without a margin.

In a group each rank holds some of the classes (`class_range`), and a call is made by all ranks together, each with rows
of its own. What they tell each other is in distributed.py. Letters: B rows of all ranks, b of this one, C classes, d
features, k nearest.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin.distributed.functions import (
    OwnClasses,
    average_gradients,
    gather_classes,
    gather_rows,
    global_grad_norm,
    merge_shards,
    reshard,
)
from fastmargin.distributed.layout import Group, Layout, batch_layout, chunks
from fastmargin.head.checks import check_embeddings, check_imprint
from fastmargin.head.sampling import initial_rows
from fastmargin.margins.base import Margin
from fastmargin.ops.backends import check_compute_dtype, named
from fastmargin.ops.class_update import SteppingBackward
from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse


def apply_lazy_updates(head: "ClassWeights", *_: Any) -> None:
    head._apply_lazy_updates()


class OwnOptimizer(SteppingBackward, Protocol):
    """What the weights ask of an optimiser of theirs: see optim.py."""

    in_backward: bool

    def before_forward(self, rows: Tensor | None) -> None: ...

    def apply_lazy_updates(self, rows: Tensor | None = None) -> None: ...


class ClassWeights(nn.Module):
    """The weights of `num_classes` classes, as MarginHead's options of the same names say."""

    weight: nn.Parameter
    class_optimizer: OwnOptimizer | None  # which announces itself

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
        backend: str | None,
        seed: int,
    ) -> None:
        super().__init__()
        margin.check_classes(num_classes)
        self.margin, self.seed = margin, seed
        self.gather_dtype, self.compute_dtype, self.backend = gather_dtype, compute_dtype, backend
        self.classes = chunks(num_classes, group)
        self.weight = nn.Parameter(initial_rows(*self.class_range, in_features, seed))
        self.bias = nn.Parameter(torch.zeros(num_classes, dtype=torch.float32)) if bias else None
        self.class_optimizer = None
        self.register_state_dict_pre_hook(apply_lazy_updates)
        self.register_load_state_dict_pre_hook(apply_lazy_updates)
        named(IMPLS, backend)  # also of the environment: better now than at the first batch
        check_compute_dtype(compute_dtype, self.weight.dtype)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def num_classes(self) -> int:
        return self.classes.total

    @property
    def class_range(self) -> tuple[int, int]:
        """The classes [lo, hi) whose weights this process holds."""
        return self.classes.start, self.classes.stop

    def replicated_parameters(self) -> list[nn.Parameter]:
        """What an ordinary optimiser trains beside `weight`, in whole on every rank: learnt scale and margins, bias."""
        return [p for p in self.parameters() if p is not self.weight]

    def grad_norm(self, others: Iterable[nn.Parameter] = ()) -> Tensor:  # []
        """The 2-norm of all gradients: of all ranks' classes, the replicated parameters and `others`.

        others: such as a backbone's under DDP or FSDP2. For `torch.nn.utils.clip_grads_with_norm_`. RuntimeError beside
        an optimiser with in_backward=True, which leaves no gradient of the class weights.
        """
        if self.class_optimizer is not None and self.class_optimizer.in_backward:
            raise RuntimeError("in_backward=True leaves no gradient of the class weights to measure: want it False")
        return global_grad_norm(self.weight, [*self.replicated_parameters(), *others], self.classes.group)

    def _rows(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [b, d] -> x [b, d], norms [b], r [b]
        f = embeddings.to(self.weight.dtype)
        norms = f.norm(dim=1)
        r = self.margin.scale(norms)
        if not self.margin.normalize_features:
            return f, norms, r
        unit = f / norms.clamp(min=1e-6)[:, None]
        unit = torch.where(norms[:, None] == 0, 0.0, unit)  # a zero row has no direction to learn
        return r[:, None] * unit, norms, r

    def _primitive(
        self,
        x: Tensor,  # [b, d]
        y: Tensor,  # [B]
        k: int,
        batch: Layout,
        rows: Tensor | None = None,  # [n] rows of `weight`; None: all
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # rest [b], target [b], topk_values [b, k], topk_classes [b, k]
        """`nontarget_lse` of own rows over the classes of all ranks."""
        if batch.group is None and rows is None:
            return self._local(x, y, k, self.bias)
        average_gradients(self.replicated_parameters(), batch.group)
        place = self.classes.local_index(y)
        if rows is not None:
            place = torch.where(place < 0, -1, torch.searchsorted(rows, place))
        bias = None if self.bias is None else OwnClasses.apply(self.bias, self.classes)
        rest, target, values, found = self._local(gather_rows(x, batch, self.gather_dtype), place, k, bias, rows)
        if rows is not None:
            found = F.pad(rows, (0, 1), value=-1)[found]  # -1, none, finds the last
        found = torch.where(found < 0, -1, found + self.classes.start)
        return merge_shards(rest, target, values, found, batch)

    def _local(
        self,
        x: Tensor,  # [B, d]
        place: Tensor,  # [B]
        k: int,
        bias: Tensor | None,  # [C_local]
        rows: Tensor | None = None,  # [n]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # rest [B], target [B], topk_values [B, k], topk_classes [B, k]
        optimizer = None
        training = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if self.class_optimizer is not None and training:
            self.class_optimizer.before_forward(rows)
            optimizer = self.class_optimizer if self.class_optimizer.in_backward else None
        else:
            self._apply_lazy_updates()
        return nontarget_lse(
            x, self.weight, place, bias=bias, class_ids=rows, normalize_weight=self.margin.normalize_weight, topk=k,
            compute_dtype=self.compute_dtype, backend=self.backend, optimizer=optimizer,
        )  # fmt: skip

    def _apply_lazy_updates(self) -> None:
        """Before weights are read or set: those that sat out steps go where the optimiser would have them."""
        if self.class_optimizer is not None:
            self.class_optimizer.apply_lazy_updates()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what travels to another process, has an optimiser of its own or none."""
        self._apply_lazy_updates()
        return {**super().__getstate__(), "class_optimizer": None}

    def get_logits(self, embeddings: Tensor) -> Tensor:  # [b, d] -> [b, C]
        """All logits, without a margin: for few classes only, whose weights every rank gathers.

        ValueError for embeddings of the wrong width.
        """
        check_embeddings(embeddings, self.weight)
        self._apply_lazy_updates()
        average_gradients(self.replicated_parameters(), self.classes.group)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, _, _ = self._rows(embeddings)
            weight = gather_classes(self.weight, self.classes)
            weight = F.normalize(weight, eps=1e-12) if self.margin.normalize_weight else weight
            return F.linear(x, weight, self.bias)

    @torch.no_grad()
    def nearest(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [b, d] -> [b, k], [b, k]
        """The k classes nearest to each row, best first: scores (cosines, or logits of plain layers) and class ids.

        Any number of classes; no logits are stored. Where C < k the rest is score -inf, class -1. Ranks may bring
        different numbers of rows. ValueError for embeddings of the wrong width and k < 0.
        """
        check_embeddings(embeddings, self.weight)
        batch, embeddings = batch_layout(embeddings, self.classes.group)
        x, _, r = self._rows(embeddings)
        y = torch.full((batch.total,), -1, dtype=torch.int64, device=x.device)
        _, _, scores, classes = self._primitive(x, y, k, batch)
        return (scores if self.margin.plain else scores / r[:, None]), classes

    @torch.no_grad()
    def load_full_weight(self, w: Tensor) -> None:  # [C, d]
        """Sets all class weights, from a tensor of any dtype, of which a rank reads its own classes' rows.

        ValueError for another shape.
        """
        if not isinstance(w, Tensor) or w.shape != (self.num_classes, self.in_features):
            given = [*w.shape] if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"weight is {given}: want a tensor [{self.num_classes}, {self.in_features}]")
        self._apply_lazy_updates()
        self.weight.copy_(self.classes.local_slice(w))

    @torch.no_grad()
    def imprint(
        self,
        classes: Tensor,  # [n] int64, may repeat
        embeddings: Tensor,  # [n, d]
    ) -> None:
        """Sets each named class's weight to the mean of its unit embeddings (Doppelganger Mining, section 4).

        Where weights are normalised only the direction counts, and the row keeps its norm: its share of a gradient
        step goes with 1 / ||w||^2, and an imprinted class should learn as fast as the others. In a group the embeddings
        of a class may come from any ranks. ValueError for classes outside [0, C), and where the embeddings of a class
        have no mean direction or are not finite.
        """
        check_imprint(classes, embeddings, self.weight)
        given, _ = batch_layout(embeddings, self.classes.group)
        classes, embeddings = given.gather(classes), given.gather(embeddings)
        lo, hi = (int(classes.min()), int(classes.max())) if len(classes) else (0, 0)
        if not 0 <= lo <= hi < self.num_classes:
            raise ValueError(f"classes run from {lo} to {hi}: want [0, {self.num_classes})")
        ids, place = classes.unique(return_inverse=True)
        unit = F.normalize(embeddings.to(self.weight.dtype), eps=1e-6)
        total = unit.new_zeros(len(ids), self.in_features).index_add_(0, place, unit)
        lost = ~(total.norm(dim=1) > 1e-6)
        if lost.any():
            raise ValueError(f"the embeddings of class {int(ids[lost][0])} add up to nothing, or are not finite")
        self._apply_lazy_updates()
        here = self.classes.local_index(ids)
        here, total, count = here[here >= 0], total[here >= 0], place.bincount(minlength=len(ids))[here >= 0]
        if self.margin.normalize_weight:
            norm = self.weight[here].norm(dim=1, keepdim=True)
            self.weight[here] = F.normalize(total, eps=1e-6) * torch.where(norm > 0, norm, 1.0)
        else:
            self.weight[here] = total / count[:, None]

    @torch.no_grad()
    def extend(self, n: int) -> None:
        """Appends n classes, with the initial rows a larger head would have had, and lays all out anew over the ranks.

        `weight` becomes a new Parameter, and so does `bias`: hand them to the optimiser again. ValueError for n < 0.
        """
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"n = {n!r}: want an int of 0 or more")
        self._apply_lazy_updates()
        C = self.num_classes
        self.margin.check_classes(C + n)
        classes = chunks(C + n, self.classes.group)
        first = max(C, classes.start)
        fresh = initial_rows(first, max(first, classes.stop), self.in_features, self.seed).to(self.weight)
        weight = torch.cat((reshard(self.weight, self.classes, classes), fresh))
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.classes = classes
        if self.bias is not None:
            bias = torch.cat((self.bias, self.bias.new_zeros(n)))
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
