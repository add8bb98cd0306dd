"""Margins: psi, a function of the target's cosine that replaces it. Autograd on [B] tensors, no class axis.

    theta = acos(c),  c the target's cosine clamped to [-1, 1];  phi = m1 theta + m2
    psi   = (P(phi) + lam c) / (1 + lam) - m3
    loss  = -logsigmoid(r psi - rest),  r the row's scale, rest = log sum over the other classes

P is cos(phi) for 0 <= phi <= pi. `beyond` selects what it is elsewhere:

    monotone   (-1)^k cos(phi) - 2k,  k = floor(phi / pi)   C1, never rises with theta, may leave [-1, 1]
    none       cos(phi)                                     rises again, ArcFace 0.5 from 151.352 degrees
    linear     c - m2 sin(m2) beyond pi                     only for m1 = 1, m2 > 0; jumps down at phi = pi
    easy       c wherever c <= 0                            jumps up at c = 0
    clip       cos of phi clipped to [1e-3, pi - 1e-3]      no slope outside: such rows stop learning

`slope` is the derivative that the cosine gets in backward: "exact", that of psi, or "detached", 1, as in InsightFace's
torch ArcFace and SphereFace-R. In both cases a margin that depends on something learned (a Parameter, the norm in
MagFace) gets its own gradient.

Near |c| = 1 the slope of theta has no bound, so its divisor sin(theta) is floored, at 1e-3 in float32 and
1e-7 in float64: a row that equals its class weight gets a finite gradient. The clamp of c never zeroes one.
Where m1 is the number 1 the value is c cos(m2) - sin(theta) sin(m2), without an acos.

Angles are radians; a margin above pi, perhaps in degrees, raises ValueError. B rows, C classes. Sources: SphereFace
(Liu 2017), L2-Softmax (Ranjan 2017), AM-Softmax (Wang 2018, eq. 4-6), ArcFace (Deng 2018, eq. 9), MagFace (Meng 2021),
AdaFace (Kim 2022), ElasticFace (2022).
"""

import math
from numbers import Real
from typing import Literal, TypeAlias, TypedDict, get_args

import torch
from torch import Tensor, nn

from fastmargin.margins.angles import SafeAcos, Value, add_slope, branch, cos_sin, is_number, sine
from fastmargin.require import require

Beyond: TypeAlias = Literal["monotone", "none", "linear", "easy", "clip"]


Slope: TypeAlias = Literal["exact", "detached"]


Values: TypeAlias = tuple[Value, Value, Value]  # m1, m2, m3


CLIP = 1e-3  # "clip" keeps phi this far inside (0, pi)


class Options(TypedDict, total=False):
    """Options of every cosine margin besides its scale and its margins."""

    learn_scale: bool  # s becomes a Parameter with the given initial value
    normalize_features: bool  # False: the row's own norm is its scale and s is not used
    beyond: Beyond
    slope: Slope


def require_angle(name: str, value: Value) -> None:
    """Rejects margins above pi: most likely they are in degrees."""
    require_within(math.pi, name, value, "an angle in radians, from -pi to pi (28.6 degrees are 0.5)")


def require_cosine(name: str, value: Value) -> None:
    require_within(2, name, value, "a difference of cosines, from -2 to 2")


def require_within(limit: float, name: str, value: Value, want: str) -> None:
    for number in value[value.abs() > limit][:1].tolist() if isinstance(value, Tensor) else [value]:
        require(abs(number) <= limit, name, number, want)


class Margin(nn.Module):
    """The base of all margins; its own `row_margins`, (1, 0, 0), is the plain cosine.

    A subclass stores its margins as attributes (`_hold`) and returns each row's (m1, m2, m3) from `row_margins`. A
    float attribute may be changed at any time, as schedules do.

    Args:
        s: the scale, above 0; arguments go by name.
        lam: SphereFace's weight of the plain cosine, 0 or more.
        m2: the configured m2 in radians, a number or [C], if m1 = 1, else 0; beyond="linear" needs it above 0.
        learn_scale: s becomes a Parameter, a float32 scalar, with the given initial value.
        normalize_features: False: the row's own norm is its scale, and s is not used.
        beyond: what psi is where m1 theta + m2 is outside [0, pi]: see the module.
        slope: "exact" or "detached": see the module.

    Raises:
        ValueError: an unknown option, s <= 0, lam < 0, a learned scale that would not be used.
    """

    plain: bool = False  # no cosine: the head uses the target's logit as it is and never calls forward
    random: bool = False  # uses random numbers for the rows of a batch
    normalize_weight: bool = True
    s: float | Tensor

    def __init__(
        self,
        *,
        s: float = 64.0,
        lam: float = 0.0,
        m2: Value = 0.0,
        learn_scale: bool = False,
        normalize_features: bool = True,
        beyond: Beyond = "monotone",
        slope: Slope = "exact",
    ) -> None:
        super().__init__()
        require(isinstance(s, Real) and 0 < s < math.inf, "s", s, "a finite number > 0")
        require(isinstance(lam, Real) and 0 <= lam < math.inf, "lam", lam, "a finite number >= 0")
        require(beyond in get_args(Beyond), "beyond", beyond, f"one of {get_args(Beyond)}")
        require(slope in get_args(Slope), "slope", slope, f"one of {get_args(Slope)}")
        require(normalize_features or not learn_scale, "learn_scale", True, "normalize_features=True with it")
        defined = beyond != "linear" or bool(torch.as_tensor(m2).gt(0).all())
        require(defined, "beyond", beyond, "a margin with m1 = 1 and m2 > 0 for it")
        self.s = nn.Parameter(torch.tensor(float(s))) if learn_scale else float(s)
        self.lam = float(lam)
        self.normalize_features, self.beyond, self.slope = normalize_features, beyond, slope
        self._held: tuple[str, ...] = ()

    def _hold(self, **margins: Value) -> None:
        """Stores each as an attribute: a float, a [C] buffer or, if given as one, a [C] Parameter."""
        for name, value in margins.items():
            if not isinstance(value, Tensor):
                good = isinstance(value, Real) and math.isfinite(value)
                require(good, name, value, "a finite number or a tensor of shape [C]")
                setattr(self, name, float(value))
                continue
            good = value.ndim == 1 and len(value) > 0 and value.is_floating_point()
            given = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            require(good and bool(value.isfinite().all()), name, given, "finite floats, [C], or a number")
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value.detach().clone())
        self._held += tuple(margins)

    def extra_repr(self) -> str:
        def shown(value: Value) -> float | str:
            if not isinstance(value, Tensor):
                return value
            return f"[{len(value)}]" if value.ndim else value.item()

        return ", ".join(f"{name}={shown(getattr(self, name))}" for name in ("s", *self._held)) + f", {self.beyond}"

    def check_classes(self, num_classes: int) -> None:
        """Checks that every per-class margin has one entry for each class of the head.

        Args:
            num_classes: C.

        Raises:
            ValueError: a margin [n], n not C.
        """
        for name in self._held:
            value = getattr(self, name)
            length = len(value) if isinstance(value, Tensor) else num_classes
            require(length == num_classes, f"length of {name}", length, f"{num_classes}, one for each class")

    def of_rows(self, name: str, labels: Tensor) -> Value:  # [B] -> number or [B]
        """The margin of that name for each row. Ignored rows may have labels outside [0, C).

        Args:
            name: of the attribute, such as "m".
            labels: [B] int64.

        Returns:
            A number, or [B] where the margin is [C].
        """
        value = getattr(self, name)
        return value[labels.clamp(0, len(value) - 1)] if isinstance(value, Tensor) else value

    def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:  # [B] each -> number or [B]
        """(m1, m2, m3) of the rows; psi is cos(m1 theta + m2) - m3, see the module. Subclasses override it.

        Args:
            cos: [B] of each row and the weight of its class.
            norms: [B] of the features before normalization.
            labels: [B] int64; those of ignored rows may be outside [0, C).

        Returns:
            m1, m2, m3: each a number or [B]; m2 in radians.
        """
        return 1.0, 0.0, 0.0

    def scale(self, norms: Tensor) -> Tensor:  # [B] -> [B]
        """r, what the cosines of each row are multiplied by.

        Args:
            norms: [B] of the features before normalization.

        Returns:
            [B] s, or the norms where features are not normalized; at least 1e-6.
        """
        r = torch.ones_like(norms) * self.s if self.normalize_features else norms
        return r.clamp(min=1e-6)

    def forward(
        self,
        cos: Tensor,  # [B] of the row and its class weight; may be outside [-1, 1] by rounding
        norms: Tensor,  # [B] of the features before normalization
        labels: Tensor,  # [B] integers; psi of a row with a label outside [0, C) is undefined, and the caller drops it
    ) -> Tensor:
        """psi, what replaces the target's cosine. Differentiable in cos and norms; see the module.

        Args:
            cos: [B] of each row and the weight of its class; may be outside [-1, 1] by rounding.
            norms: [B] of the features before normalization.
            labels: [B] int64. psi of a row with a label outside [0, C) is undefined, and the caller drops it.

        Returns:
            [B], in the dtype of cos.

        Raises:
            ValueError: a plain layer has no psi; `row_margins` of a subclass returned something else than a triple.
        """
        require(not self.plain, "margin", type(self).__name__, "one with a cosine: a plain layer has no psi")
        if self.slope == "detached":
            return add_slope(self._psi(cos.detach(), norms, labels), cos)
        return self._psi(cos, norms, labels)

    def _psi(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Tensor:  # [B] each -> [B]
        margins = self.row_margins(cos, norms, labels)
        require(isinstance(margins, tuple) and len(margins) == 3, "row_margins", margins, "(m1, m2, m3)")
        m1, m2, m3 = (m.to(cos.dtype) if isinstance(m, Tensor) else m for m in margins)
        c = add_slope(cos.detach().clamp(-1, 1), cos)
        return (self._bent(c, m1, m2) + self.lam * c) / (1 + self.lam) - m3

    def _bent(self, c: Tensor, m1: Value, m2: Value) -> Tensor:  # [B] in [-1, 1], number or [B] -> [B]
        """P(phi), by the module's table."""
        if is_number(m1, 1) and is_number(m2, 0):
            return c  # phi = theta is never outside [0, pi]
        theta = SafeAcos.apply(c)
        phi = m1 * theta + m2
        cos_m2, sin_m2 = cos_sin(m2)
        cos_phi = c * cos_m2 - sine(c, theta) * sin_m2 if is_number(m1, 1) else torch.cos(phi)
        if self.beyond == "monotone":
            k = branch(theta, m1, m2)
            return (1 - 2 * k.remainder(2)) * cos_phi - 2 * k
        if self.beyond == "linear":
            return torch.where(phi > math.pi, c - m2 * sin_m2, cos_phi)
        if self.beyond == "easy":
            return torch.where(c > 0, cos_phi, c)
        if self.beyond == "clip":
            edge = math.cos(CLIP)
            return torch.where(phi < CLIP, edge, torch.where(phi > math.pi - CLIP, -edge, cos_phi))
        return cos_phi

    def observe(self, all_norms: Tensor, all_cos: Tensor) -> None:  # [n], [n]
        """Updates statistics of the batch, if the margin has any. Called in training, before forward.

        Args:
            all_norms: [n] of the features of all rows, detached; NaN for ignored ones.
            all_cos: [n] their cosines, likewise.
        """

    @property
    def whole_batch(self) -> bool:
        """Whether psi in training depends on other rows or random numbers: each rank then computes the whole batch."""
        return self.random or type(self).observe is not Margin.observe

    def penalty(self, norms: Tensor) -> Tensor | None:  # [B] -> [B]
        """A term that the head adds to the loss of each row.

        Args:
            norms: [B] of the features before normalization.

        Returns:
            [B], or None: no term.
        """
        return None
