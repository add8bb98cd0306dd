"""The splitmix64 generator (Steele, Lea and Flood 2014) on signed 64-bit integers, of numpy arrays or torch tensors.

Signed arithmetic that wraps modulo 2^64 has the bits of the unsigned one; torch has no unsigned multiplication. No
torch here: the data of a run is ordered without it.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Words = TypeVar("Words", NDArray[np.int64], "Tensor")


def signed(bits: int) -> int:
    """The signed number of the same 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


INCREMENT = signed(0x9E3779B97F4A7C15)  # state n of the stream that starts at s is s + n INCREMENT
FIRST, SECOND = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def finalize_(state: Words) -> Words:  # int64, any shape but []: numpy warns where a scalar overflows
    """The output of each state, in place: a bijection of the 64-bit words."""
    state ^= (state >> 30) & (2**34 - 1)  # the mask makes a shift of signed numbers one of bits
    state *= FIRST
    state ^= (state >> 27) & (2**37 - 1)
    state *= SECOND
    state ^= (state >> 31) & (2**33 - 1)
    return state
