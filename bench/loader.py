"""Images per second of the loader: alone, and in training with the default network, at 0, 1 and 2 workers.

`python bench/loader.py` prints a table of medians, lowest and highest. The numbers of workers take turns within each
round, so that a slow minute of the machine slows all. "packed" is a folder of JPEG files, read through its packed file;
the rate of packing them, which is done once, is printed first.
"""

import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from fastmargin.driver.config import DataConfig, OptimConfig, TrainConfig
from fastmargin.driver.data.sources import load_data
from fastmargin.driver.data.sources.synthetic import Synthetic
from fastmargin.driver.training import loader, loop
from fastmargin.driver.training.run import Run, build

WORKERS = (0, 1, 2)
ROUNDS = 3
BATCH = 128
ALONE, TRAINING = 16, 4  # steps of a round
CLASSES, IMAGES = 200, 10  # of the folder and of the synthetic identities


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {BATCH}, images/s")
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch) / "photographs")
        sources = {
            "glyphs, 32 x 32": DataConfig(),
            "synthetic, 112 x 112 x 3": DataConfig(source=f"synthetic:{CLASSES}x{IMAGES}", augment="faces"),
            "packed, 112 x 112 x 3": DataConfig(source=f"{scratch}/photographs", cache=scratch),
        }
        begin = time.perf_counter()
        load_data(sources["packed, 112 x 112 x 3"], lambda line: None)
        print(f"packing: {CLASSES * IMAGES / (time.perf_counter() - begin):.0f} images/s, decoded from JPEG")
        for name, config in sources.items():
            print_rates(name, config)


def write_folder(root: Path) -> None:
    """JPEG files of synthetic images with noise, so that a file is about as large as a photograph's."""
    rng = np.random.default_rng(0)
    made = Synthetic(CLASSES, IMAGES, 112, "rgb")
    for number in range(len(made)):
        folder = root / str(number // IMAGES)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = made[np.array([number])][0].numpy()
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=90)


def print_rates(name: str, data: DataConfig) -> None:
    optim = OptimConfig(steps=10**6, batch_size=BATCH)
    runs = {n: build(TrainConfig(data=replace(data, workers=n), optim=optim), print) for n in WORKERS}
    for title, measure in (("alone", alone), ("in training", training)):
        rates: dict[int, list[float]] = {n: [] for n in WORKERS}
        for _ in range(ROUNDS):
            for n, run in runs.items():
                rates[n].append(measure(run))
        for n, found in rates.items():
            print(f"{name:26}{title:14}{n} workers {median(found):8.0f} ({min(found):.0f} to {max(found):.0f})")


def alone(run: Run) -> float:
    prepared = loader.batches(run.batch_source())
    next(prepared)
    begin = time.perf_counter()
    for _ in islice(prepared, ALONE):
        pass
    return ALONE * BATCH / (time.perf_counter() - begin)


def training(run: Run) -> float:
    prepared = loader.batches(run.batch_source())
    loop.train_step(run, *next(prepared))
    begin = time.perf_counter()
    for images, labels in islice(prepared, TRAINING):
        loop.train_step(run, images, labels)
    return TRAINING * BATCH / (time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main())
