"""Batches: which images a step takes, read and augmented, in threads ahead of training if so configured.

Batch t is a function of (seed, t) and, with the doppelganger sampler, of what the sampler has drawn: it depends on no
thread and on no earlier batch. So any number of workers gives the same batches, bit for bit, and a resumed run prepares
again those that were ready when it stopped. Of N processes each draws the indices of the whole batch and loads its own
rows: of every part, where a step has several (optim.accumulation), so that the parts are those of one process.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, starmap
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmargin.distributed.layout import Layout
from fastmargin.driver.config import DataConfig
from fastmargin.driver.data.augmentation import AUGMENTS, Augment, Indices, augmentation
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.data.order import UniformBatches
from fastmargin.mining import DoppelgangerBatchSampler

AHEAD = 2  # batches prepared ahead by each worker

Order = UniformBatches | DoppelgangerBatchSampler


class Batch(NamedTuple):
    images: Tensor  # [b, 1, H, W] or [b, 3, H, W] float32
    labels: Tensor  # [b] int64


@dataclass(frozen=True)
class BatchSource:
    """What batches are made of."""

    train: Identities
    order: Order
    data: DataConfig  # for augmentation and workers
    seed: int
    parts: int  # of a step (optim.accumulation)
    part: Layout  # the rows of each part, over the processes
    steps: range  # first step to make, last step + 1
    pin_memory: bool  # for a GPU


def batches(source: BatchSource) -> Iterator[Batch]:
    """The batches of source.steps; what a worker thread raises is raised here."""
    workers, requests = source.data.workers, indices_and_epochs(source)
    prepare = partial(load, source, AUGMENTS[augmentation(source.data)])
    if workers == 0:
        yield from starmap(prepare, requests)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))  # the rest is for training
    try:
        started = deque(pool.submit(prepare, *request) for request in islice(requests, 1 + ahead(source)))
        while started:
            yield started.popleft().result()
            started.extend(pool.submit(prepare, *request) for request in islice(requests, 1))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a worker's setting would also hold for threads started later


def ahead(source: BatchSource) -> int:
    """Batches prepared beside the one in training. The doppelganger sampler draws no more than `lag` in all."""
    most = AHEAD * source.data.workers
    return most if isinstance(source.order, UniformBatches) else min(most, source.order.lag - 1)


def indices_and_epochs(source: BatchSource) -> Iterator[tuple[Indices, Indices]]:
    """For each step, the indices [b] of this process's images and the epoch [b] of each, which seeds its augmentation.

    With the doppelganger sampler, which may repeat an image, a running number stands for the epoch: every repetition
    is augmented anew.
    """
    if isinstance(source.order, UniformBatches):
        for step in source.steps:
            yield local_rows(source, source.order.indices(step)), local_rows(source, source.order.epochs(step))
    else:
        size = source.order.batch_size
        for step, drawn in zip(source.steps, source.order, strict=False):  # the sampler never ends
            yield local_rows(source, np.array(drawn)), local_rows(source, step * size + np.arange(size))


def local_rows(
    source: BatchSource,
    batch: Indices,  # [B]
) -> Indices:  # [b]
    """This process's rows of each part of a batch."""
    return batch.reshape(source.parts, -1)[:, source.part.start : source.part.stop].reshape(-1)


def load(source: BatchSource, transform: Augment, index: Indices, epoch: Indices) -> Batch:
    images = transform(source.train.images[index], index, epoch, source.seed)
    labels = source.train.labels[index]
    return Batch(*(t.pin_memory() if source.pin_memory else t for t in (images, labels)))
