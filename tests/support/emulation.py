"""The CUDA path on the CPU: its kernels and host code, built as they are against the stand-in in cuda_on_cpu/."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]

compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++") if c and shutil.which(c)), None)
wants_compiler = pytest.mark.skipif(compiler is None, reason="no C++ compiler: the CUDA kernels are NOT run")


def torch_flags():
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    return ["-std=c++20", *include, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def built(root, folder):
    """The library of a source tree's kernels and glue for the CPU, with chunks so small that a test has several.

    Rows are in parts only where a test has fewer than eight.
    """
    stand_in, cuda = root / "tests" / "cuda_on_cpu", root / "csrc" / "cuda"
    units = [*cuda.glob("*.cu"), *cuda.glob("*glue.cpp"), stand_in / "device.cpp"]
    flags = [*torch_flags(), f"-I{stand_in}", "-O1", "-fPIC", "-x", "c++", "-DFASTMARGIN_CHUNK_BYTES=65536"]
    flags += ["-DFASTMARGIN_MULTIPROCESSORS=8", "-DFASTMARGIN_LAUNCH_SECONDS=0.0"]
    flags += ["-U_FORTIFY_SOURCE"]  # it takes jumps between fibers for a broken stack
    jobs = [
        subprocess.Popen([compiler, *flags, "-c", str(unit), "-o", str(folder / f"{unit.parent.name}.{unit.name}.o")])
        for unit in units
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    library = folder / "libemulated.so"
    link = [f"-L{path}" for path in cpp_extension.library_paths()]
    objects = [str(path) for path in folder.glob("*.o")]
    subprocess.run([compiler, "-shared", *objects, *link, "-ltorch_cpu", "-lc10", "-o", str(library)], check=True)
    return library
