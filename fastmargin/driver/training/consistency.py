"""What must be the same on all ranks, or they would train together in silence and to no use: compared at the start.

The package and its files, the configuration, and the data: names, sizes and identity numbers, and the pixels of
PROBES images. Every difference is a ValueError on all ranks, which names the option or image and the rank.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fastmargin import __version__
from fastmargin.distributed.agreement import check_equal
from fastmargin.driver.config import TrainConfig, flatten
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.order import Permutation
from fastmargin.driver.training.processes import Processes
from fastmargin.files import sha256

PROBES = 256  # images whose pixels are compared
PER_MACHINE = ("data.cache", "data.workers")  # options that may differ between ranks


def check_settings(config: TrainConfig, factory: str | None, processes: Processes) -> None:
    options = {name: value for name, value in flatten(config).items() if name not in PER_MACHINE}
    package = {"the version of fastmargin": __version__, "the hash of fastmargin's files": package_hash()}
    check_equal({**package, **options, "model": factory}, processes.host)


def package_hash() -> str:
    """Eight hexadecimal digits of the Python files of fastmargin and fastmargin.kernels, their names included.

    In an editable installation kernels/ lies elsewhere; the digits are the same.
    """
    files: dict[str, str] = {}
    for package in ("fastmargin", "fastmargin.kernels"):
        (folder,) = map(Path, find_spec(package).submodule_search_locations)  # type: ignore[union-attr, arg-type]
        under = Path(*package.split("."))
        files |= {str(under / file.relative_to(folder)): sha256(file) for file in folder.rglob("*.py")}
    return sha256(repr(sorted(files.items())).encode())[:8]


def check_data(train: Identities, test: Identities, seed: int, processes: Processes) -> None:
    if processes.host is None:
        return
    for part, data in {"trained on": train, "held out": test}.items():
        check_equal({f"{name} of the data {part}": value for name, value in described(data).items()}, processes.host)
        check_equal({f"image {row} of those {part}": pixels for row, pixels in probes(data, seed)}, processes.host)


def described(data: Identities) -> dict[str, Any]:
    names = sha256("\n".join(data.names).encode())[:8]
    labels = sha256(data.labels.numpy().tobytes())[:8]
    return {
        "shape": tuple(data.images.shape),
        "number of identities": data.num_classes,
        "hash of the names": names,
        "hash of the identity numbers": labels,
    }


def probes(data: Identities, seed: int) -> list[tuple[int, str]]:
    """Numbers of images, drawn by the seed, and a hash of the pixels of each."""
    count = len(data.labels)
    rows = Permutation(count, seed, 0)(np.arange(min(PROBES, count))) if count else np.empty(0, np.int64)
    images = data.images[rows]
    return [(row, sha256(image.numpy().tobytes())[:8]) for row, image in zip(rows.tolist(), images, strict=True)]
