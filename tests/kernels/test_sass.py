"""The loops of the CUDA kernels over logits, in machine code for sm_90a: instructions an element (bench/NOTES.md)."""

import re
import shutil
import subprocess

import pytest
from emulation import ROOT

SOURCES = [ROOT / "csrc" / "cuda" / name for name in ("nontarget_lse.cu", "nontarget_lse_bwd.cu")]
MOST = {
    "fwd_kernel": 9.25,
    "keep_kernelIf": 11.0,
    "keep_kernelINS_4Bf16": 11.5,
    "bwd_kernelIf": 6.75,
    "bwd_kernelINS_4Half": 7.0,
    "bwd_kernelINS_4Bf16": 7.0,
}

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not here: the CUDA kernels' instructions are NOT counted"
)


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """The machine code of every kernel: its name and {address: instruction}."""
    triton = pytest.importorskip("triton", reason="triton, and cuobjdump with it, is not here: nothing is counted")
    out, flags = {}, ["-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]
    for source in SOURCES:
        cubin = tmp_path_factory.mktemp("sass") / "kernels.cubin"
        subprocess.run(["nvcc", *flags, "-cubin", str(source), "-o", str(cubin)], check=True)
        tool = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        parts = [part.partition("\n") for part in said.split("Function : ")[1:]]
        out |= {name: dict(instructions(body)) for name, _, body in parts}
    return out


def instructions(body):
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/]*?);", body):
        yield int(address, 16), text


def jump(text):
    """Where an instruction may go on, if not behind itself."""
    to = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
    return int(to[1], 16) if to else None


def loops(code):
    """The instructions of every loop, without what a branch inside it jumps over: the rare cases."""
    for last, text in code.items():
        first, taken = jump(text), []
        if first is None or first >= last:
            continue
        at = first
        for address in (a for a in code if first <= a <= last):
            if address >= at:
                taken.append(code[address])
                at = max(at, jump(code[address]) or 0)
        yield taken


def count(loop, pattern):
    return sum(re.search(pattern, text) is not None for text in loop)


@pytest.mark.parametrize("kernel", MOST)
def test_instructions_an_element(functions, kernel):
    code = next(code for name, code in functions.items() if "nontarget_lse_" + kernel in name)
    assert not count(code.values(), r"\b(LDL|STL)\b")
    wide = [loop for loop in loops(code) if count(loop, r"LDG\S*\.128") == 4]  # two of products, two of scales
    assert len(wide) == 1
    (loop,) = wide
    elements = count(loop, r"MUFU\.EX2")
    print(f"{kernel}: {len(loop)} instructions for {elements} elements")
    assert elements == 8 and count(loop, r"\bLDG") == 4
    assert count(loop, r"\bSTG\S*\.(64|128)") == count(loop, r"\bSTG") == (0 if "fwd" in kernel else 2)
    assert len(loop) / elements <= MOST[kernel]
