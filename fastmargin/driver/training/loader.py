"""Batches: which images, read and augmented, perhaps ahead of training.

Batch t is a function of (seed, t) and, with the doppelganger sampler, of what it has drawn: of no thread and of no
earlier batch. So any number of workers gives the same batches, bit for bit, and those that were prepared when a run
stopped are prepared again. Of N processes each draws all of a batch, and loads its share: of every part, where a step
has several (optim.accumulation), so that all have the parts that one process has.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, starmap
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmargin.driver.data.augmentation import AUGMENTS, Augment, Indices, augmentation
from fastmargin.driver.data.order import UniformBatches
from fastmargin.driver.training.run import Run

AHEAD = 2  # batches prepared ahead by each worker


class Batch(NamedTuple):
    images: Tensor  # [b, 1, H, W] or [b, 3, H, W] float32
    labels: Tensor  # [b] int64


def batches(run: Run) -> Iterator[Batch]:
    """The batches of the steps that the run has still to make; what a thread raises is raised here."""
    workers, wanted = run.config.data.workers, numbers(run)
    prepare = partial(load, run, AUGMENTS[augmentation(run.config.data)])
    if workers == 0:
        yield from starmap(prepare, wanted)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))  # the rest is for training
    try:
        started = deque(pool.submit(prepare, *batch) for batch in islice(wanted, 1 + ahead(run)))
        while started:
            yield started.popleft().result()
            started.extend(pool.submit(prepare, *batch) for batch in islice(wanted, 1))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # for threads yet to come: a worker's setting is theirs too


def ahead(run: Run) -> int:
    """Batches prepared beside the one that is trained on: the doppelganger sampler draws `lag` of them in all."""
    most = AHEAD * run.config.data.workers
    return most if isinstance(run.order, UniformBatches) else min(most, run.order.lag - 1)


def numbers(run: Run) -> Iterator[tuple[Indices, Indices]]:
    """Numbers [b] of this process's images and their epochs [b], for each step that is left.

    What the doppelganger sampler draws is numbered, so that an image it repeats is augmented anew each time.
    """
    size, left = run.config.optim.batch_size, range(run.step, run.config.optim.steps)
    if isinstance(run.order, UniformBatches):
        for step in left:
            yield own(run, run.order.indices(step)), own(run, run.order.epochs(step))
    else:
        for step, drawn in zip(left, run.order, strict=False):  # it has no end
            yield own(run, np.array(drawn)), own(run, step * size + np.arange(size))


def own(
    run: Run,
    all_ranks: Indices,  # [B]
) -> Indices:  # [b]
    """This process's share of each part of a batch."""
    return all_ranks.reshape(run.config.optim.accumulation, -1)[:, run.part.start : run.part.stop].reshape(-1)


def load(run: Run, transform: Augment, index: Indices, epoch: Indices) -> Batch:
    images, labels = transform(run.train.images[index], index, epoch, run.config.seed), run.train.labels[index]
    return Batch(*(t.pin_memory() if run.device.type == "cuda" else t for t in (images, labels)))
