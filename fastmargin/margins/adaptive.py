"""Margins that differ from row to row: by the norm of the features, or at random (base.py)."""

import math
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastmargin.margins.angles import Value
from fastmargin.margins.base import Margin, Options, Values, require_angle, require_cosine
from fastmargin.require import require

LIMITS = (1e-3, 100.0)  # of the norms that AdaFace reads


class AdaFace(Margin):
    """Margins by image quality, estimated by the norm (Kim 2022): m2 = -m z, m3 = m + m z with
    z = clip(h (norm - mu) / sd, -1, 1), without gradient to the norm.

    mu and sd are running statistics, initially 20 and 100. Norms are clipped to [0.001, 100], both in the public code
    and here; rows that are not finite stay out of the statistics.

    Args:
        s: the scale, above 0.
        m: an angle in radians, from -pi to pi: a number or [C].
        h: how fast the margin follows the norm, above 0.
        momentum: the weight of a batch in the statistics, above 0 and at most 1.
        options: learn_scale, normalize_features, beyond, slope: see `Margin`. beyond is "clip" if not given.

    Raises:
        ValueError: m, h or momentum outside its range; as `Margin`.
    """

    mu: Tensor  # []
    sd: Tensor  # []

    def __init__(
        self, *, s: float = 64.0, m: Value = 0.4, h: float = 0.333, momentum: float = 0.01, **options: Unpack[Options]
    ) -> None:
        super().__init__(s=s, **(Options(beyond="clip") | options))
        require(h > 0, "h", h, "a number > 0")
        require(0 < momentum <= 1, "momentum", momentum, "a share, > 0 and at most 1")
        self._hold(m=m)
        require_angle("m", m)
        self.h, self.momentum = h, momentum
        self.register_buffer("mu", torch.tensor(20.0))
        self.register_buffer("sd", torch.tensor(100.0))

    def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:  # [B] each
        norms = norms.detach().clamp(*LIMITS)
        z = (self.h * (norms - self.mu) / self.sd.clamp(min=1e-3)).clamp(-1, 1)
        m = self.of_rows("m", labels)
        return 1.0, -m * z, m + m * z

    @torch.no_grad()
    def observe(self, all_norms: Tensor, all_cos: Tensor) -> None:  # [n], [n]
        finite = all_norms.isfinite() & all_cos.isfinite()  # an overflow in float16 must not stay in mu and sd for good
        n = finite.sum()
        norms = torch.where(finite, all_norms.clamp(*LIMITS), torch.nan)
        mu = norms.nansum() / n
        sd = ((norms - mu).square().nansum() / (n - 1)).sqrt()
        for running, now in ((self.mu, mu), (self.sd, sd)):
            moved = running.lerp(now.to(running), self.momentum)
            running.copy_(torch.where(n > 1, moved, running))  # one row has no spread


class MagFace(Margin):
    """ArcFace whose m grows linearly with the norm a = clamp(norm, l_a, u_a), from l_m to u_m, with gradient to the
    norm, and the penalty lambda_g (a / u_a^2 + 1 / a), which lengthens features (Meng 2021).

    Norms outside [l_a, u_a] get no gradient from either, as in the public code.

    Args:
        s: the scale, above 0.
        l_m, u_m: the least and the largest margin, in radians; l_m <= u_m.
        l_a, u_a: the norms at which m is l_m and u_m; 0 < l_a < u_a.
        lambda_g: the factor of the penalty, 0 or more.
        options: learn_scale, normalize_features, beyond, slope: see `Margin`.

    Raises:
        ValueError: a number outside its range; as `Margin`.
    """

    def __init__(
        self,
        *,
        s: float = 64.0,
        l_m: float = 0.45,
        u_m: float = 0.8,
        l_a: float = 10.0,
        u_a: float = 110.0,
        lambda_g: float = 35.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(s=s, m2=l_m, **options)
        require(0 < l_a < u_a, "(l_a, u_a)", (l_a, u_a), "0 < l_a < u_a")
        require(l_m <= u_m < math.inf, "(l_m, u_m)", (l_m, u_m), "l_m <= u_m, finite")
        require(lambda_g >= 0, "lambda_g", lambda_g, "a number >= 0")
        require_angle("l_m", l_m)
        require_angle("u_m", u_m)
        self.l_m, self.u_m, self.l_a, self.u_a, self.lambda_g = l_m, u_m, l_a, u_a, lambda_g

    def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:  # [B] each
        share = (norms.clamp(self.l_a, self.u_a) - self.l_a) / (self.u_a - self.l_a)
        return 1.0, self.l_m + (self.u_m - self.l_m) * share, 0.0

    def penalty(self, norms: Tensor) -> Tensor:  # [B] -> [B]
        a = norms.clamp(self.l_a, self.u_a)
        return self.lambda_g * (a / self.u_a**2 + 1 / a)


class ElasticFace(Margin):
    """A random margin for each row, N(m, sigma), in training mode only (Boutros 2022).

    Uses torch's default generator, so that torch.manual_seed makes it reproducible; a head in a group seeds it in each
    pass.

    Args:
        s: the scale, above 0.
        m: the mean, a number or [C]: radians or a difference of cosines; 0.5 or 0.35 if not given.
        sigma: the standard deviation, 0 or more, in the unit of m.
        form: "arc" (m is m2) or "cos" (m is m3).
        plus: the largest margin goes to the smallest cosine, and so on.
        options: learn_scale, normalize_features, beyond, slope: see `Margin`.

    Raises:
        ValueError: an unknown form, m or sigma outside its range; as `Margin`.
    """

    random = True

    def __init__(
        self,
        *,
        s: float = 64.0,
        m: Value | None = None,
        sigma: float = 0.0125,
        form: Literal["arc", "cos"] = "arc",
        plus: bool = False,
        **options: Unpack[Options],
    ) -> None:
        require(form in ("arc", "cos"), "form", form, "'arc' or 'cos'")
        require(0 <= sigma < math.inf, "sigma", sigma, "a finite number >= 0")
        m = {"arc": 0.5, "cos": 0.35}[form] if m is None else m
        super().__init__(s=s, m2=m if form == "arc" else 0.0, **options)
        self._hold(m=m)
        (require_angle if form == "arc" else require_cosine)("m", m)
        self.sigma, self.form, self.plus = sigma, form, plus

    def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:  # [B] each
        m = self.of_rows("m", labels)
        if self.training:
            m = m + self.sigma * self._noise(cos.detach())
        return (1.0, m, 0.0) if self.form == "arc" else (1.0, 0.0, m)

    def _noise(self, cos: Tensor) -> Tensor:  # [B] -> [B] standard normal
        noise = torch.randn_like(cos)
        return noise.scatter(0, cos.argsort(descending=True), noise.sort().values) if self.plus else noise
