"""Margins that are fixed numbers: on the angle or on the cosine, one for all classes or one for each (base.py)."""

from torch import Tensor
from typing_extensions import Unpack

from fastmargin.margins.angles import Value, is_number
from fastmargin.margins.base import Margin, Options, Values, require_angle, require_cosine


class NormFace(Margin):
    """The cosine without a margin, s fixed or learned (Wang 2017); W-Norm with normalize_features=False.

    Args:
        s: the scale, above 0.
        options: learn_scale, normalize_features, beyond, slope: see `Margin`.

    Raises:
        ValueError: as `Margin`.
    """

    def __init__(self, *, s: float = 64.0, **options: Unpack[Options]) -> None:
        super().__init__(s=s, **options)


class SphereFace(Margin):
    """(cos(m theta), continued monotonically, + lam cos(theta)) / (1 + lam) (Liu 2017, A-Softmax).

    lam is 1000, almost no margin, until a `LambdaSchedule` lowers it. Features are not normalized; with
    normalize_features=True it is SphereFace-FNorm, of scale s.

    Args:
        s: the scale of SphereFace-FNorm, above 0.
        m: the factor of the angle, a number or [C].
        lam: the weight of the plain cosine, 0 or more.
        options: learn_scale, normalize_features, beyond, slope: see `Margin`.

    Raises:
        ValueError: as `Margin`.
    """

    def __init__(self, *, s: float = 64.0, m: Value = 4.0, lam: float = 1000.0, **options: Unpack[Options]) -> None:
        super().__init__(s=s, lam=lam, **(Options(normalize_features=False) | options))
        self._hold(m=m)

    def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:  # [B] each
        return self.of_rows("m", labels), 0.0, 0.0


class CosFace(Margin):
    """cos(theta) - m (Wang 2018).

    Args:
        s: the scale, above 0.
        m: a difference of cosines, from -2 to 2: a number or [C].
        options: learn_scale, normalize_features, beyond, slope: see `Margin`.

    Raises:
        ValueError: m outside its range; as `Margin`.
    """

    def __init__(self, *, s: float = 64.0, m: Value = 0.35, **options: Unpack[Options]) -> None:
        super().__init__(s=s, **options)
        self._hold(m=m)
        require_cosine("m", m)

    def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:  # [B] each
        return 1.0, 0.0, self.of_rows("m", labels)


class AMSoftmax(CosFace):
    """CosFace with the scale of AM-Softmax (Wang 2018, eq. 6): m on every row, not only where c > m.

    Args:
        s: the scale, above 0.
        m: a difference of cosines, from -2 to 2: a number or [C].
        options: learn_scale, normalize_features, beyond, slope: see `Margin`.

    Raises:
        ValueError: as `CosFace`.
    """

    def __init__(self, *, s: float = 30.0, m: Value = 0.35, **options: Unpack[Options]) -> None:
        super().__init__(s=s, m=m, **options)


class ArcFace(Margin):
    """cos(theta + m) (Deng 2018).

    Args:
        s: the scale, above 0.
        m: an angle in radians, from -pi to pi (0.5 is 28.6 degrees): a number or [C].
        options: learn_scale, normalize_features, beyond, slope: see `Margin`.

    Raises:
        ValueError: m outside its range; as `Margin`.
    """

    def __init__(self, *, s: float = 64.0, m: Value = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(s=s, m2=m, **options)
        self._hold(m=m)
        require_angle("m", m)

    def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:  # [B] each
        return 1.0, self.of_rows("m", labels), 0.0


class CombinedMargin(Margin):
    """cos(m1 theta + m2) - m3; (1, 0.3, 0.2) is InsightFace's `combined`.

    Args:
        s: the scale, above 0.
        m1: the factor of the angle, a number or [C].
        m2: an angle in radians, from -pi to pi: a number or [C].
        m3: a difference of cosines, from -2 to 2: a number or [C].
        lam: the weight of the plain cosine, 0 or more.
        options: learn_scale, normalize_features, beyond, slope: see `Margin`.

    Raises:
        ValueError: a margin outside its range; as `Margin`.
    """

    def __init__(
        self,
        *,
        s: float = 64.0,
        m1: Value = 1.0,
        m2: Value = 0.3,
        m3: Value = 0.2,
        lam: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(s=s, lam=lam, m2=m2 if is_number(m1, 1) else 0.0, **options)
        self._hold(m1=m1, m2=m2, m3=m3)
        require_angle("m2", m2)
        require_cosine("m3", m3)

    def row_margins(self, cos: Tensor, norms: Tensor, labels: Tensor) -> Values:  # [B] each
        return self.of_rows("m1", labels), self.of_rows("m2", labels), self.of_rows("m3", labels)
