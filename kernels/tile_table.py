"""The tile sizes of the kernels, and the number of tiles per program: a table by GPU generation, operand type and rows.

Not triton.autotune: it times its candidates in the first call of a process. That waits for the device, cannot be
captured in a CUDA graph, and lets measured times choose the order of the sums, so that two machines, or two runs
without its cache, differ in the last bits. `python bench/gpu.py OUT --tiles` times the CANDIDATES, and TABLE is to hold
the fastest of them. That has not been done on a GPU yet: of the tiles that spill no register, TABLE holds the one that
moves the fewest bytes per product.

The copy engine (TMA) of Hopper and later loads operands of 16 bits whose rows are multiples of 16 bytes. All others are
loaded through pointers: float32 products run on the FMA units, for which the layout that TMA writes is slow; consumer
Blackwell (capability 12) has as little shared memory as older GPUs. Letters: B rows, n classes of a chunk, d features.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import operands
from .operands import chunk_size


class Tile(NamedTuple):
    rows: int
    classes: int
    features: int  # of a step of the product
    warps: int
    stages: int


AMPERE, HOPPER, BLACKWELL = 8, 9, 10  # generations, by compute capability
FLOAT, HALF = 4, 2  # bytes of an operand
H100 = 132  # multiprocessors
# Of the rule for chunks, see `most_classes`: seconds of the host for a launch, from Python, and rates of an H200.
LAUNCH, FLOPS, BANDWIDTH = 16e-6, 7e14, 4e12
MOST_WORKSPACE = 2**29  # bytes

CANDIDATES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (AMPERE, FLOAT): (Tile(128, 128, 16, 8, 2), Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2)),
    (AMPERE, HALF): (Tile(128, 128, 32, 8, 3), Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 3)),
    (HOPPER, HALF): (
        Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 3),
        Tile(128, 128, 64, 4, 2), Tile(64, 128, 64, 4, 4),
    ),
    (BLACKWELL, HALF): (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
}  # fmt: skip
# Each tile with the largest number of rows that it is used for; None: any number.
TABLE: dict[tuple[int, int], tuple[tuple[int | None, Tile], ...]] = {
    (AMPERE, FLOAT): ((64, Tile(64, 64, 32, 8, 2)), (None, Tile(128, 128, 16, 8, 2))),
    (AMPERE, HALF): ((64, Tile(64, 64, 64, 4, 3)), (None, Tile(128, 128, 32, 8, 3))),
    (HOPPER, HALF): ((64, Tile(64, 128, 64, 4, 4)), (128, Tile(128, 128, 64, 8, 4)), (None, Tile(256, 128, 64, 8, 3))),
    (BLACKWELL, HALF): ((None, Tile(128, 128, 64, 8, 3)),),
}

KEEPING = {(BLACKWELL, HALF): Tile(64, 128, 64, 4, 3)}  # for a forward pass that keeps exponentials: TABLE's spills


class Plan(NamedTuple):
    tile: Tile
    tma: bool
    step: int  # classes of a chunk
    strip: int  # class blocks of a program

    def blocks(self, t: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:  # [m, n]
        """The kernel argument for a tensor that is read or written in such blocks: a TMA descriptor, or the tensor."""
        return TensorDescriptor.from_tensor(t, [rows, columns]) if self.tma else t

    def operands(
        self,
        x: Tensor,  # [B, d]
        o: Tensor,  # [n, d]
    ) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
        tile = self.tile
        return self.blocks(x, tile.rows, tile.features), self.blocks(o, tile.classes, tile.features)

    def grid(self, B: int, n: int) -> tuple[int, int]:
        """Number of blocks of rows, and of strips of classes."""
        return triton.cdiv(B, self.tile.rows), triton.cdiv(triton.cdiv(n, self.tile.classes), self.strip)

    def options(self) -> dict[str, int]:
        tile = self.tile
        blocks = dict(BLOCK_B=tile.rows, BLOCK_C=tile.classes, BLOCK_D=tile.features, STRIP=self.strip, TMA=self.tma)
        return blocks | dict(num_warps=tile.warps, num_stages=tile.stages)


def plan_of(
    x: Tensor,  # [B, d] operands
    n: int,
    bytes_of_a_class: int,
    products: int,  # of a chunk, [B, d] times [d, n] in size
    launches: int,  # of a chunk
    keeps: bool = False,  # exponentials, in the forward pass
) -> Plan:
    key = key_of(x)
    tile = next(tile for rows, tile in TABLE[key] if rows is None or len(x) <= rows)
    tile = KEEPING.get(key, tile) if keeps else tile
    step = chunk_size(n, most_classes(*x.shape, bytes_of_a_class, products, launches), tile.classes)
    return Plan(tile, key[0] != AMPERE, step, strip_of(len(x), step, tile, multiprocessors(x.device)))


def most_classes(B: int, d: int, bytes_of_a_class: int, products: int, launches: int) -> int:
    """Classes of a chunk: its arrays fit an L2 cache, or more of them where the host could not keep up.

    The workspace is doubled until the GPU works on a chunk as long as the host launches it, at least. Counted for
    B = 4096, d = 512 and 5 launches of 16 us, bfloat16: 4,096 classes are 74 us of three products and 3 us for their
    weights, less than 80; 8,192 are 153 us. So C = 1e7 is 1,221 chunks, 0.10 s of launches beside 0.19 s of work. Then
    E is 64 MiB, and its second product reads a part of it from memory.
    """
    workspace = operands.WORKSPACE
    seconds_of_a_class = products * 2 * B * d / FLOPS + 6 * d / BANDWIDTH
    while workspace < MOST_WORKSPACE and workspace / bytes_of_a_class * seconds_of_a_class < launches * LAUNCH:
        workspace *= 2
    return workspace // bytes_of_a_class


def strip_of(B: int, n: int, tile: Tile, count: int) -> int:
    """Class blocks of a program: about two programs for each of `count` multiprocessors, of equal length.

    Long programs are better: a program loads its next block while it computes, but no program can load for another. Of
    two programs on a multiprocessor, one computes while the other waits, if both fit; if not, the second costs one more
    start. Example: B = 1024 and d = 512 in bfloat16 make 4 x 253 blocks per chunk, so 256 programs of 4 blocks; each of
    132 multiprocessors has 7.7 blocks on average, in the time of 8.
    """
    return max(triton.cdiv(triton.cdiv(B, tile.rows) * triton.cdiv(n, tile.classes), 2 * count), 1)


def key_of(x: Tensor) -> tuple[int, int]:  # [B, d] operands
    """GPU generation and operand size. The interpreter uses the tiles of Hopper."""
    if x.element_size() != HALF or x.shape[1] * HALF % 16:
        return AMPERE, x.element_size()
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else HOPPER
    return major if major in (HOPPER, BLACKWELL) else AMPERE, HALF


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else H100
