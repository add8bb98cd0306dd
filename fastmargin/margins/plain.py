"""Plain linear layers: no cosine and so no psi; the head uses the target's logit as it is."""

from fastmargin.margins.base import Margin


class Softmax(Margin):
    """The plain linear layer: neither features nor weights are normalized; a bias is allowed."""

    plain = True
    normalize_weight = False

    def __init__(self) -> None:
        super().__init__(normalize_features=False)


class L2Softmax(Margin):
    """Features on a sphere of learned radius s; weights not normalized, a bias is allowed (Ranjan 2017).

    Args:
        s: the radius, above 0; the initial one if it is learned.
        learn_scale: s is a Parameter.

    Raises:
        ValueError: as `Margin`.
    """

    plain = True
    normalize_weight = False

    def __init__(self, *, s: float = 16.0, learn_scale: bool = True) -> None:
        super().__init__(s=s, learn_scale=learn_scale)
