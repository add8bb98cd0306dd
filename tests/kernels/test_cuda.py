"""The CUDA kernels: what guards their arithmetic, and nvcc for every architecture (test_kernels.py has the values)."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import ROOT, built, compiler, torch_flags, wants_compiler

CUDA = ROOT / "csrc" / "cuda"
KERNELS = sorted(CUDA.glob("*.cu"))


WRONG = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x, w, y = torch.randn(5, 8), torch.randn(600, 8), torch.randint(0, 600, (5,))
rest = torch.ops.fastmargin_emulated.nontarget_lse_fwd(x, w, y, None, None, None, True, 1, 0, None, False)[0]
z = x.double() @ torch.nn.functional.normalize(w.double()).T
want = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
print(float((rest - want).abs().max() / want.abs().max()))
"""


@wants_compiler
@pytest.mark.parametrize(
    ("constant", "wrong"), [("5.0000001201e-1", "5.0000001201e-1"), ("5.0000001201e-1", "5.01e-1")]
)
def test_a_wrong_constant_in_the_shared_arithmetic_is_seen(constant, wrong, tmp_path):
    """csrc/tile.h is what CPU and GPU kernels share: a constant that is off by a thousandth fails these tests."""
    for part in ("csrc", "tests/cuda_on_cpu"):
        shutil.copytree(ROOT / part, tmp_path / part)
    tile = tmp_path / "csrc" / "tile.h"
    tile.write_text(tile.read_text().replace(constant, wrong))
    library = built(tmp_path, tmp_path)
    done = subprocess.run([sys.executable, "-c", WRONG, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) < 1e-6) == (constant == wrong)


# ---------------------------------------------------------------------------------------------- compilation

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100"]
INSTANCES = {"O": 3, "Stored": 2, "Phi": 2, "Rule": 2}  # of a kernel, by its template's parameters


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here: the CUDA kernels are NOT compiled")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_compile_without_spills(source, architecture, tmp_path):
    flags = ["-std=c++20", "-Xptxas", "-v", f"-arch={architecture}"]
    done = subprocess.run(
        ["nvcc", *flags, "-cubin", str(source), "-o", str(tmp_path / "kernel.cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    text = source.read_text()
    templates = re.findall(r"template <typename (\w+)(?:, typename (\w+))?>\n__global__", text)
    instances = [math.prod(INSTANCES[name] for name in names if name) for names in templates]
    assert len(said) == text.count("__global__") - len(templates) + sum(instances)
    for name, stack, stores, loads, registers in said:
        kernel = re.search(r"\d([a-z_]+_kernel)", name)[1]
        print(f"{architecture} {kernel}: {registers} registers, {stack} bytes of stack")
        assert int(stores) == int(loads) == 0


@wants_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="CUDA's headers are not here: the glue is NOT compiled")
@pytest.mark.parametrize("unit", sorted(path.name for path in CUDA.glob("*.cpp")))
def test_the_glue_compiles_against_torch_without_cuda(unit):
    said = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    toolkit = Path(re.search(r"TOP=(\S+)", said)[1])
    flags = [*torch_flags(), f"-I{toolkit / 'include'}", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-fsyntax-only", "-Wall"]
    done = subprocess.run([compiler, *flags, str(CUDA / unit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
