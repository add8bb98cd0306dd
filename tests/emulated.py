"""The CUDA kernels built for the CPU, by cuda_on_cpu/cuda_runtime.h: the kernels and the host code as they are."""

import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
COMPILER = next((c for c in (os.environ.get("CXX"), "c++", "g++") if c and shutil.which(c)), None)


def torch_flags() -> list[str]:
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    return ["-std=c++20", *include, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def built(root: Path, folder: Path) -> Path:
    """The library of a tree's kernels and glue, with waves so small that a test has several."""
    stand_in, cuda = root / "tests" / "cuda_on_cpu", root / "csrc" / "cuda"
    units = [*cuda.glob("*.cu"), cuda / "glue.cpp", stand_in / "device.cpp"]
    flags = [*torch_flags(), f"-I{stand_in}", "-O1", "-fPIC", "-x", "c++", "-DFASTMARGIN_WAVE_BYTES=65536"]
    flags += ["-U_FORTIFY_SOURCE"]  # it takes jumps between fibers for a broken stack
    jobs = [
        subprocess.Popen([COMPILER, *flags, "-c", str(unit), "-o", str(folder / f"{unit.parent.name}.{unit.name}.o")])
        for unit in units
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    library = folder / "libemulated.so"
    link = [f"-L{path}" for path in cpp_extension.library_paths()]
    objects = [str(path) for path in folder.glob("*.o")]
    subprocess.run([COMPILER, "-shared", *objects, *link, "-ltorch_cpu", "-lc10", "-o", str(library)], check=True)
    return library
