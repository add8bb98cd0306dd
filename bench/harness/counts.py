"""What a step of a head is on a GPU: its launches, products and bytes, and the time that they would take at best.

`step` computes them from shapes, for both backends, by the loops of nontarget_lse_glue.cpp, nontarget_lse_bwd_glue.cpp
and kernels/nontarget_lse.py. Rates are those of an H200: 780 TFLOP/s of bfloat16 products, 4.3 TB/s of memory, and, an
assumption, 9 TB/s of L2 cache. No GPU has confirmed any of it. Launches are of the package's kernels and of products,
without torch's on [B] numbers, some twenty a step.

Letters: B rows, d features, n classes, k of top-k, e bytes of an operand.
"""

from typing import NamedTuple

import torch

from fastmargin.kernels import tile_table
from fastmargin.kernels.nontarget_lse import kept_step
from fastmargin.kernels.operands import GROUP

FLOPS, MEMORY, CACHE = 7.8e14, 4.3e12, 9e12  # a second
HOST = {"native": (5e-6, 8e-6), "triton": (16e-6, 16e-6)}  # seconds of a kernel's launch and of a product's
CHUNK_BYTES, MOST_CLASSES, DOUBLINGS = 2**25, 2**14, 4  # nontarget_lse_chunks.h


class Part(NamedTuple):
    """Of a step. Bytes: through memory, and between kernels that a cache serves."""

    name: str
    kernels: int = 0
    products: int = 0
    flops: float = 0.0
    memory: float = 0.0
    cache: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.flops / FLOPS, self.memory / MEMORY) + self.cache / CACHE


class Shape(NamedTuple):
    B: int
    d: int
    n: int
    topk: int = 1
    e: int = 2
    kept: bool = False
    in_backward: bool = False  # ClassSGD's step with momentum; native alone
    cached: bool = False  # operands, from one step to the next; with in_backward


def native_chunks(s: Shape, products: int, kernels: int, chunk_bytes: int, launch: float) -> int:
    """most_classes of nontarget_lse_chunks.h."""
    seconds = (kernels + 1.6 * products) * launch
    of_a_class = products * 2.0 * s.B * s.d / tile_table.FLOPS + 14 * s.d / tile_table.BANDWIDTH + 4 * s.B / CACHE
    n = min(max(chunk_bytes // 4 // max(s.B, s.d) // 64 * 64, 256), MOST_CLASSES)
    for _ in range(DOUBLINGS):
        n = 2 * n if n * of_a_class < seconds else n
    return -(-s.n // n)


def triton_chunks(s: Shape, wide: bool, lists: bool, products: int, launches: int) -> int:
    """As kernels/nontarget_lse.py plans them. wide: E is stored; lists: group maxima are."""
    x = torch.empty(s.B, s.d, dtype=torch.bfloat16 if s.e == 2 else torch.float32, device="meta")
    of_a_class = max(s.e * max(s.d, s.B if wide else 0), 4 * s.B // GROUP if lists else 0)
    return -(-s.n // tile_table.plan_of(x, s.n, of_a_class, products, launches, keeps=lists and wide).step)


def step(backend: str, s: Shape, chunk_bytes: int = CHUNK_BYTES, launch: float = HOST["native"][0]) -> list[Part]:
    """The parts of a forward and backward pass with dx and dw, in their order."""
    native, sums_dx = backend == "native", s.kept
    if native:
        forward = native_chunks(s, 1 + sums_dx, 2, chunk_bytes, launch)
        products = 1 if s.kept else 3
        backward = native_chunks(s, products, (0 if s.kept else 2) + 1 + s.in_backward, chunk_bytes, launch)
    else:
        forward = triton_chunks(s, s.kept, s.topk > 0, 1 + sums_dx, 2 + sums_dx + (s.topk > 0))
        backward = -(-s.n // kept_step(s.B, s.d, s.n)) if s.kept else triton_chunks(s, True, False, 3, 5)
    product, weights, exponentials = 2.0 * s.B * s.d * s.n, 4.0 * s.d * s.n, float(s.e * s.B * s.n)
    made = 0 if s.cached else 1
    operands = Part("operands", forward * made, 0, 0, weights * made + (0 if made else s.e * s.d * s.n))
    z = Part("z", 0, forward if native else 0, product, 0, 4.0 * s.B * s.n if native else 0)
    reads = Part("exponentials", forward, 0, 0, exponentials if s.kept else 0, 4.0 * s.B * s.n if native else 0)
    lists = Part("top-k", 1 if native else (forward + 2 if s.topk else 0), 0, 0, 0, 4.0 * s.B * s.n / GROUP)
    dx = Part("dx", 0, forward if s.kept else backward, product, 0, exponentials)
    finish_dx = Part("rows", (2 + s.kept + 1) if native else 1)
    parts = [operands, z, reads, lists]
    if s.kept:
        parts += [dx]
    else:
        parts += [
            operands._replace(name="operands again", kernels=backward * made),
            z._replace(name="z again", products=backward if native else 0),
            reads._replace(name="exponentials again", kernels=backward, cache=reads.cache + exponentials),
            dx,
        ]
    dw = Part("dw", 0, backward, product, exponentials if s.kept else 0, 0 if s.kept else exponentials)
    moved = (4 if s.in_backward else 2) * weights  # w read, dw written; or w and momentum read and written
    finish = Part("finish", backward * (1 + s.in_backward), 0, 0, moved, 2 * weights if s.in_backward else weights)
    return [*parts, dw, finish, finish_dx]


def launches(parts: list[Part]) -> tuple[int, int]:
    """Of kernels and of products."""
    return sum(p.kernels for p in parts), sum(p.products for p in parts)


def seconds(parts: list[Part], backend: str) -> tuple[float, float]:
    """Of the device and of the host; a step takes the longer one."""
    kernels, products = launches(parts)
    kernel, product = HOST[backend]
    return sum(p.seconds for p in parts), kernels * kernel + products * product


def report(backend: str, s: Shape) -> str:
    parts = step(backend, s)
    lines = [
        f"{p.name:20} {p.kernels:6} {p.products:6} {p.flops / 1e12:8.2f} {p.memory / 1e9:8.2f} {p.cache / 1e9:8.2f} "
        f"{p.seconds * 1e3:8.2f}"
        for p in parts
    ]
    device, host = seconds(parts, backend)
    head = f"{'':20} {'kernel':>6} {'prod.':>6} {'TFLOP':>8} {'GB':>8} {'L2 GB':>8} {'ms':>8}"
    return "\n".join([f"{backend} {s}", head, *lines, f"device {device * 1e3:.2f} ms, host {host * 1e3:.2f} ms"])


if __name__ == "__main__":
    for shape in (Shape(1024, 512, 10**6), Shape(4096, 512, 10**7)):
        for backend in ("native", "triton"):
            for kept in (False, True):
                print(report(backend, shape._replace(kept=kept)), end="\n\n")
