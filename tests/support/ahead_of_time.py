"""Triton kernels compiled for a GPU that need not be here."""

import re
import subprocess

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

STRIDES = ("a_row", "b_row", "e_row", "w_row")  # arguments that are multiples of 16 numbers where rows are aligned


def compiled(kernel, capability, types, constants, options):
    """Machine code. Arguments not in `types` point to float32; pointers and STRIDES are multiples of 16."""
    types = types | {name: "constexpr" for name in constants}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name in STRIDES]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(code, folder):
    """Registers and bytes of stack of a compiled kernel: spilled registers would lie on the stack."""
    (folder / "kernel.cubin").write_bytes(code.asm["cubin"])
    tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "kernel.cubin")]
    said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK", "LOCAL"))
