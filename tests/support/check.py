"""The comparison rule: an implementation may err at most twice as much as plain PyTorch at the same dtype."""

import torch
from torch import Tensor


def error(got: Tensor, truth: Tensor) -> float:
    """max|got - truth| / max|truth|; infinities must agree, and are left out."""
    got, truth = got.detach().double(), truth.detach().double()
    assert got.shape == truth.shape
    assert torch.equal(got.isinf(), truth.isinf()) and not got.isnan().any()
    finite = ~truth.isinf()
    if not finite.any():
        return 0.0
    return float((got - truth)[finite].abs().max() / truth[finite].abs().max().clamp(min=1e-30))


def assert_as_good(got: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """`got` is at most `factor` times as far from the float64 `truth` as `plain`, plus 8 eps."""
    eps = torch.finfo(got.dtype).eps
    ours, theirs = error(got, truth), error(plain, truth)
    assert ours <= factor * theirs + 8 * eps, f"error {ours:.2e}, plain PyTorch {theirs:.2e}"
