"""Installs fastmargin; the native extension is described by CMakeLists.txt, called from here.

Without a C++ compiler the package installs and runs on its portable backends; a compile error fails the installation.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMPILERS = [os.environ.get("CXX"), "c++", "g++", "clang++"]


def wants_cuda(torch_cuda: str | None) -> bool:
    """FASTMARGIN_CUDA decides, 0 or 1; if unset, CUDA kernels are built where torch has CUDA and nvcc is found."""
    choice = os.environ.get("FASTMARGIN_CUDA") or str(int(torch_cuda is not None and shutil.which("nvcc") is not None))
    if choice not in ("0", "1"):
        sys.exit(f"FASTMARGIN_CUDA={choice}: want 0 or 1")
    if choice == "1" and torch_cuda is None:
        sys.exit("FASTMARGIN_CUDA=1, but this torch is built without CUDA: install one with it, or unset the variable")
    return choice == "1"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            how = "install them first, then use pip install --no-build-isolation"
            sys.exit(f"fastmargin builds against the installed torch and pybind11 ({error}): {how}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}"  # kept: rebuilds are quick
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_ROOT={Path(torch.__file__).parent}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DFASTMARGIN_TORCH_VERSION={torch.__version__}",
            f"-DFASTMARGIN_CUDA={int(wants_cuda(torch.version.cuda))}",
        ]  # fmt: skip
        # cmake and ninja may come from pip, beside this Python, without its folder being on the PATH
        env = {**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))}
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=env)


has_compiler = any(name and shutil.which(name) for name in COMPILERS)
if not has_compiler:
    print("fastmargin: no C++ compiler found; installing without the native kernels", file=sys.stderr)

setup(
    packages=[*find_packages(include=["fastmargin*"]), "fastmargin.kernels"],
    package_dir={"fastmargin.kernels": "kernels"},
    ext_modules=[Extension("fastmargin._C", sources=[])] if has_compiler else [],
    cmdclass={"build_ext": CMakeBuild},
)
