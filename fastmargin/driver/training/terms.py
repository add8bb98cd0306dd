"""The terms of the loss beside the head's: loss = head + sum_t weight_t L_t (GIT eq. 1, MML eq. 12, DOP 4.2.5).

    name             loss, whose keyword arguments are options; further options
    center           fm.center_loss           update, alpha: of the bank of centers
    git              fm.git_loss
    minimum_margin   fm.minimum_margin_loss   route of its gradient: through_update (default), batch_means or centers
    marginal         fm.marginal_loss
    range            fm.range_loss
    margin_based     fm.margin_based_loss     beta: initial value of the boundary, which is learned
    METRIC_LEARNING  the class of that name in pytorch_metric_learning.losses; scale: initial length of the rows, which
                     is learned; without it rows are normalized

Rows are the embeddings as the network outputs them. The first three share one bank of centers, whose options are those
of center (with weight 0, center only sets them). Losses see the centers of the step before; the bank is updated after
the optimizer's step. With the route "centers" it also takes a gradient step on the minimum margin: the run's learning
rate times the gradient of the weighted term, without momentum or weight decay.

Each of N processes computes the terms of its own rows, b of B, and the objective is the average over the processes. So
that means and sums over rows are those of all rows, a term is multiplied by N b / B (with reduction "sum", by N). The
bank sees all rows, and so does the minimum margin by the route through_update; pairs are of rows of one process.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastmargin.distributed.functions import averaged
from fastmargin.distributed.layout import Layout
from fastmargin.driver.config import TermConfig
from fastmargin.losses.center import CenterBank, batch_means, center_loss
from fastmargin.losses.git import git_loss
from fastmargin.losses.minimum_margin import minimum_margin_loss
from fastmargin.losses.pairs import margin_based_loss, marginal_loss, range_loss
from fastmargin.losses.rows import wide
from fastmargin.ops.common import unit_rows
from fastmargin.require import require

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # rows [B, d], labels [B] -> scalar

BANKED: dict[str, Callable[..., Tensor]] = {"center": center_loss, "git": git_loss}  # of rows, labels and centers
OF_ROWS: dict[str, Callable[..., Tensor]] = {"marginal": marginal_loss, "range": range_loss}

# Losses of pytorch-metric-learning 2.9 of rows and labels, whose arguments are numbers and text. A name from a
# configuration looks up nothing else.
METRIC_LEARNING = frozenset(
    "AngularLoss ArcFaceLoss CircleLoss ContrastiveLoss CosFaceLoss DynamicSoftMarginLoss FastAPLoss "
    "GeneralizedLiftedStructureLoss HistogramLoss InstanceLoss IntraPairVarianceLoss LargeMarginSoftmaxLoss "
    "LiftedStructureLoss ManifoldLoss MarginLoss MultiSimilarityLoss NCALoss NPairsLoss NTXentLoss "
    "NormalizedSoftmaxLoss P2SGradLoss PNPLoss ProxyAnchorLoss ProxyNCALoss RankedListLoss "
    "SignalToNoiseRatioContrastiveLoss SmoothAPLoss SoftTripleLoss SphereFaceLoss SubCenterArcFaceLoss SupConLoss "
    "ThresholdConsistentMarginLoss TripletMarginLoss TupletMarginLoss".split()
)


class Terms(nn.Module):
    """The terms of a configuration: a call gives their weighted sum, `last` each term without its weight.

    rows: those of a batch, over the processes; None: all are here. Every term is tried out on four rows, so that a
    mistake in its options is found here: the ValueError names the term.
    """

    def __init__(
        self, config: Mapping[str, TermConfig], num_classes: int, dim: int, rows: Layout | None = None
    ) -> None:
        super().__init__()
        self.weights = {name: term.weight for name, term in config.items()}
        options = {name: dict(term.options) for name, term in config.items()}
        self.shares = {name: share(name, given, rows) for name, given in options.items()}
        self.bank: CenterBank | None = None
        if config.keys() & {*BANKED, "minimum_margin"}:
            of_bank = {k: options["center"].pop(k) for k in ("update", "alpha") if k in options.get("center", {})}
            with named("center"):
                self.bank = CenterBank(dim, num_classes, **of_bank, group=None if rows is None else rows.group)
        self.losses: dict[str, Loss] = {}
        for name, given in options.items():
            with named(name):
                self.losses[name] = build_loss(name, given, self.bank)
                try_out(self.losses[name], dim)
        self.learned = nn.ModuleDict({name: loss for name, loss in self.losses.items() if isinstance(loss, nn.Module)})
        self.last: dict[str, Tensor] = {}  # scalars of the last batch

    def forward(
        self,
        x: Tensor,  # [B, d]
        labels: Tensor,  # [B]
    ) -> Tensor | float:
        """The weighted sum of the terms, 0.0 without any."""
        values = {name: self.shares[name] * loss(x, labels) for name, loss in self.losses.items()}
        self.last = {name: value.detach() for name, value in values.items()}
        return sum((self.weights[name] * value for name, value in values.items()), 0.0)

    def update(
        self,
        x: Tensor,  # [B, d]
        labels: Tensor,  # [B]
        lr: float,
    ) -> None:
        """Updates the centers; to be called after the optimizer's step."""
        if self.bank is not None:
            self.bank.update(x, labels)
        trained = self.losses.get("minimum_margin")
        if isinstance(trained, TrainedCenters):
            trained.step(lr)


def share(name: str, options: Mapping[str, Any], rows: Layout | None) -> float:
    """The factor of a term of this rank's rows in a group: see the top of this file."""
    if rows is None or name == "minimum_margin":
        return 1.0
    summed = options.get("reduction") == "sum"
    return len(rows.sizes) * (1.0 if summed else rows.count / rows.total)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Turns a mistake in the options of a term into a ValueError that names the term."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # pytorch_metric_learning raises all four
        raise ValueError(f"terms.{name}: {error}") from error


def try_out(loss: Loss, dim: int) -> None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        value = loss(torch.randn(4, dim), torch.tensor([0, 0, 1, 1]))
    require(value.ndim == 0, "its value", [*value.shape], "a scalar, by reduction 'mean' or 'sum'")


def build_loss(name: str, options: dict[str, Any], bank: CenterBank | None) -> Loss:
    if name in BANKED and bank is not None:
        return lambda x, labels: BANKED[name](x, labels, bank.centers, **options)
    if name == "minimum_margin" and bank is not None:
        return build_minimum_margin(bank, **options)
    if name in OF_ROWS:
        return partial(OF_ROWS[name], **options)
    return MarginBased(**options) if name == "margin_based" else metric_learning(name, **options)


def build_minimum_margin(bank: CenterBank, route: str = "through_update", **options: Any) -> Loss:
    routes = {"through_update": bank.updated, "batch_means": batch_means}
    require(route in (*routes, "centers"), "route", route, "through_update, batch_means or centers")
    if route == "centers":
        return TrainedCenters(bank, options)

    def loss(x: Tensor, labels: Tensor) -> Tensor:  # [B, d], [B]
        centers, classes = routes[route](x, labels)
        if options.get("scope") == "all":
            centers = bank.centers.index_copy(0, classes, centers)
        return minimum_margin_loss(centers, **options)

    return loss


class TrainedCenters:
    """The minimum margin of the bank's centers, with a gradient step of its own: in a group with the gradient averaged
    over the ranks, an all-reduce of C d numbers per step."""

    def __init__(self, bank: CenterBank, options: dict[str, Any]) -> None:
        self.bank, self.options = bank, options
        self.leaf = bank.centers  # of the last loss: shares memory with the centers, has a gradient of its own

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:  # [B, d], [B]
        self.leaf = self.bank.centers.detach().requires_grad_()
        return minimum_margin_loss(self.leaf, labels, **self.options)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        gradient = self.leaf.grad
        if self.bank.group is not None:  # dense, as sparse gradients have different rows on each rank
            own = torch.zeros_like(self.leaf) if gradient is None else gradient.to_dense()
            gradient = averaged(own, self.bank.group)
        if gradient is not None:
            self.bank.centers.add_(gradient, alpha=-lr)


class MarginBased(nn.Module):
    """The margin-based loss with a learned boundary (DOP eq. 2)."""

    def __init__(self, beta: float = 0.5, **options: Any) -> None:
        super().__init__()
        self.beta, self.options = nn.Parameter(torch.tensor(float(beta))), options

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # [B, d], [B]
        return margin_based_loss(x, labels, self.beta, **self.options)


class Scaled(nn.Module):
    """A loss of rows scaled to one learned length (DOP 4.2.5: lifted structure, initially 12)."""

    def __init__(self, loss: nn.Module, scale: float) -> None:
        super().__init__()
        self.loss, self.scale = loss, nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # [B, d], [B]
        value: Tensor = self.loss(self.scale * unit_rows(wide(x))[0], labels)
        return value


def metric_learning(name: str, scale: float | None = None, **options: Any) -> nn.Module:
    if name not in METRIC_LEARNING:
        ours = ", ".join((*BANKED, "minimum_margin", *OF_ROWS, "margin_based"))
        theirs = ", ".join(sorted(METRIC_LEARNING))
        raise ValueError(f"no such loss; want {ours}, or of pytorch_metric_learning.losses {theirs}")
    try:
        from pytorch_metric_learning import distances, losses
    except ImportError as error:
        raise ValueError(
            "pytorch-metric-learning, which has this loss, is not installed: pip install 'fastmargin[pml]'"
        ) from error
    kind: type[nn.Module] | None = getattr(losses, name, None)
    if kind is None:
        raise ValueError("the pytorch-metric-learning that is installed has no such loss; want a newer one")
    if scale is None:
        return kind(**options)
    return Scaled(kind(distance=distances.LpDistance(normalize_embeddings=False), **options), scale)
