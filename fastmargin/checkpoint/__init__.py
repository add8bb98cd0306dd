"""Checkpoints that are written atomically and verified by SHA-256, by and for any number of processes.

`save` takes, and `load_latest` returns, named tensors and plain state; `pack` and `unpack` turn a head, its optimizer,
a backbone or anything else with a state_dict into those and back. Needs safetensors.
"""

from fastmargin.checkpoint.objects import pack, unpack
from fastmargin.checkpoint.store import Checkpoint, Verify, load, load_latest, save
from fastmargin.checkpoint.tensors import Sharded, Tensors

__all__ = ["Checkpoint", "Sharded", "Tensors", "Verify", "load", "load_latest", "pack", "save", "unpack"]
