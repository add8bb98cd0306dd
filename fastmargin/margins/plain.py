"""Plain linear layers: no cosine and so no psi; the head takes the target's logit as it is."""

from fastmargin.margins.base import Margin


class Softmax(Margin):
    """The plain linear layer: features and weights as they are, bias allowed."""

    plain = True
    normalize_weight = False

    def __init__(self) -> None:
        super().__init__(normalize_features=False)


class L2Softmax(Margin):
    """Features on a sphere of learnt radius s, plain weights and bias (Ranjan 2017)."""

    plain = True
    normalize_weight = False

    def __init__(self, s: float = 16.0, learn_scale: bool = True) -> None:
        super().__init__(s, learn_scale=learn_scale)
