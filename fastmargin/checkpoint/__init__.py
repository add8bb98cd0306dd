"""Checkpoints that are written atomically and verified by SHA-256, by and for any number of processes.

`save` takes, and `load_latest` returns, named tensors and plain state; `pack` and `unpack` turn a head, its optimizer,
a backbone or anything else with a state_dict into those and back. Needs safetensors.
"""

from fastmargin.checkpoint.objects import pack, unpack
from fastmargin.checkpoint.store import MANIFEST, Checkpoint, Verify, committed, load, load_latest, part_of, save
from fastmargin.checkpoint.tensors import TENSORS, Sharded, Tensors

__all__ = [
    "MANIFEST", "TENSORS", "Checkpoint", "Sharded", "Tensors", "Verify", "committed", "load", "load_latest", "pack",
    "part_of", "save", "unpack",
]  # fmt: skip
