"""One small step on a GPU by each of our backends, for a sanitizer to watch: several waves, ragged sizes, top-k."""

import torch

from fastmargin import nontarget_lse


def step(backend: str, compute_dtype: torch.dtype | None) -> None:
    x = torch.randn(513, 40, device="cuda", requires_grad=True)
    w = torch.randn(40_001, 40, device="cuda", requires_grad=True)
    y = torch.randint(-1, len(w), (len(x),), device="cuda")
    rest, target, values, _ = nontarget_lse(x, w, y, topk=3, compute_dtype=compute_dtype, backend=backend)
    (rest.sum() - target.sum() + values.sum()).backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    for backend in ("native", "triton"):
        for compute_dtype in (None, torch.bfloat16, torch.float16):
            step(backend, compute_dtype)
