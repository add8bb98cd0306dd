"""pytorch-metric-learning's classifier losses: ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss and the like.

Their state_dict has the class weights as `W` [d, C], a column per class. Their margins are in degrees, those here in
radians: `ArcFaceLoss(C, d)` is `ArcFace(s=64, m=math.radians(28.6), beyond="linear")`, `CosFaceLoss(C, d)` is
`CosFace(s=64, m=0.35)`.
"""

from pathlib import Path

from fastmargin.compat.files import read_tensor
from fastmargin.head.margin_head import MarginHead


def load_weight(head: MarginHead, file: str | Path) -> None:
    """Sets a head's weights from `torch.save(loss.state_dict(), file)`; in a group every rank takes the rows it holds.

    Args:
        head: of as many classes and features as the file; its weights are changed.
        file: with `W` [d, C].

    Raises:
        ValueError: a file without `W`, or of another number of classes or width.
    """
    w = read_tensor(Path(file), "W")
    if w.shape != (head.in_features, head.num_classes):
        want = f"[{head.in_features}, {head.num_classes}], features times classes"
        raise ValueError(f"{file}: W is {[*w.shape]}: want {want}")
    head.load_full_weight(w.T)
