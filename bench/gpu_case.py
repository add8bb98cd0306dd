"""Small steps on a GPU by our own kernels, for a sanitizer: several chunks, ragged sizes, class_ids, bias, pairs."""

import torch

from fastmargin import ArcFace, MarginHead, nontarget_lse, optim, pairwise_potential


def step(B: int, d: int, C: int, plain: bool, **options: object) -> None:
    x = torch.randn(B, d, device="cuda", requires_grad=True)
    w = torch.randn(d, C, device="cuda").T.requires_grad_()
    bias = torch.randn(C, device="cuda", requires_grad=True) if plain else None
    class_ids = torch.arange(0, C, 2, device="cuda") if plain else None
    y = torch.randint(-1, C // 2, (B,), device="cuda")
    rest, target, values, _ = nontarget_lse(
        x, w, y, bias=bias, class_ids=class_ids, normalize_weight=not plain, topk=3, **options
    )
    (rest.sum() - target.sum() + values.sum()).backward()
    torch.cuda.synchronize()


def class_step(B: int, d: int, C: int, **options: object) -> None:
    """Two steps made in the backward pass; the second reads the operand cache that the first has written."""
    head = MarginHead(d, C, ArcFace(), backend="native", **options).cuda()
    optimizer = optim.ClassSGD(head, 0.1, 0.9, 5e-4, in_backward=True, cache_operands=True)
    for _ in range(2):
        head(torch.randn(B, d, device="cuda"), torch.randint(0, C, (B,), device="cuda")).loss.backward()
        optimizer.step()
    torch.cuda.synchronize()


def pair_step(N: int, M: int, d: int, **options: object) -> None:
    """Backward, with too many rows for one chunk."""
    b = torch.randn(M, d, device="cuda")
    a = (b[:N] + 1e-3 * torch.randn(N, d, device="cuda")).requires_grad_()
    a_ids, b_ids = (torch.randint(0, 9, (n,), device="cuda") for n in (N, M))
    pairwise_potential(a, b.requires_grad_(), a_ids, b_ids, **options).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    for compute_dtype in (None, torch.bfloat16, torch.float16):
        for plain in (False, True):
            step(513, 41, 40_001, plain, compute_dtype=compute_dtype, backend="native")
    class_step(513, 41, 40_001, compute_dtype=torch.bfloat16)
    class_step(5, 531, 1_001, compute_dtype=torch.float16)
    pair_step(513, 16_501, 41, kind="inverse", backend="native")
    pair_step(513, 16_501, 41, kind="hinge", margin=50.0, b_weight=torch.rand(16_501, device="cuda"), backend="native")
