"""Doppelganger mining: the nearest wrong class of every class, and batches that put the two together.

Source: Smirnov et al., Doppelganger Mining for Face Representation Learning (ICCVW 2017), 3.1 and 3.2.
Letters: B rows, C classes, k listed classes, N images; a batch has M images of N_c classes, N_r at random.

The list. After a step, every class of the batch gets the k best distinct wrong classes over its rows, by
prototype score, ties to the smaller id. The paper has k = 1, one number per class.

The batch.
1. Image counts are drawn uniformly from [low, high] until they reach M; the last count is cut to fit. Should
   that leave it 1 image while low > 1, it takes one from the class before. Where that class has only 2, it
   gets the lone image instead.
2. N_r classes are drawn at random.
3. Class i, N_r <= i < N_c, is the first on the list of class i - N_r that is not in the batch yet. If there
   is none, it is a random class that is not in the batch. So N_r = N_c / 2 gives pairs, N_c / 3 chains of
   three, N_r = 1 a single chain, and cycles are cut.
4. The images of a class are drawn without replacement; with it, where the class has fewer than asked.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class MiningStatistics:
    """How mining goes, counted batch by batch until it is taken. A list here is its first class."""

    batches: int = 0
    confusable: int = 0  # batches that hold a class together with the one that this batch finds nearest to it
    lists: int = 0  # that were replaced
    met: int = 0  # of them: their class was in the batch, too
    changed: int = 0  # of them: to another class, or from none

    def count(
        self,
        changed: Tensor,  # [n] bool, of each list that a batch replaces
        present: Tensor,  # [n] bool: the class now listed is in the batch, too
    ) -> None:
        self.batches += 1
        self.confusable += bool(present.any())
        self.lists += len(changed)
        self.met += int(present.sum())
        self.changed += int(changed.sum())

    def take(self) -> dict[str, float]:
        """Shares since the last time, 0 where there was nothing to count.

        confusable_batches: of the batches, those with a confusable pair: nearly all, where they are large.
        confusable_classes: of their classes, those that meet the class nearest to them.
        list_turnover: of the lists replaced, those that now name another class.
        """
        shares = {
            "confusable_batches": self.confusable / max(1, self.batches),
            "confusable_classes": self.met / max(1, self.lists),
            "list_turnover": self.changed / max(1, self.lists),
        }
        self.batches = self.confusable = self.lists = self.met = self.changed = 0
        return shares


class DoppelgangerTable:
    """The k nearest wrong classes of each of C classes, as last seen, best first.

    `classes` [C, k] int64, -1 where empty; `scores` [C, k] float32, -inf where empty. Both live in host
    memory, where batches are drawn. `statistics` count the updates. ValueError if C or k is below 1.
    """

    def __init__(self, num_classes: int, k: int = 1) -> None:
        if num_classes < 1 or k < 1:
            raise ValueError(f"num_classes is {num_classes}, k is {k}; want at least 1 of each")
        self.num_classes, self.k = num_classes, k
        self.classes = torch.full((num_classes, k), -1, dtype=torch.int64)
        self.scores = torch.full((num_classes, k), -torch.inf)
        self.statistics = MiningStatistics()

    def update(
        self,
        labels: Tensor,  # [B] integers below C; negative: the row is skipped
        hard_classes: Tensor,  # [B, k'] integers, -1: none
        hard_scores: Tensor,  # [B, k'] floats, compared as float32
    ) -> None:
        """Replaces the lists of the classes in this batch; k' need not be k.

        A class without a candidate (none given, only itself, only NaN scores) keeps its list. ValueError for
        wrong shapes or dtypes, labels of C or more, and hard_classes outside [-1, C).
        """
        # From a device: the first copy waits for the step, the other two find it done.
        labels, hard_classes, hard_scores = (t.detach().cpu() for t in (labels, hard_classes, hard_scores))
        _check_rows(labels, hard_classes, hard_scores)
        own, wrong = labels.long()[:, None].expand_as(hard_classes), hard_classes.long()
        _refuse("labels", labels, own[:, :1] >= self.num_classes, self.num_classes)
        _refuse("hard_classes", wrong, (wrong < -1) | (wrong >= self.num_classes), self.num_classes)
        usable = (own >= 0) & (wrong >= 0) & (wrong != own) & ~hard_scores.isnan()
        own, wrong, score, place = _ranked(own[usable], wrong[usable], hard_scores[usable].float())
        nearest = place == 0
        changed = self.classes[own[nearest], 0] != wrong[nearest]
        self.statistics.count(changed, torch.isin(wrong[nearest], labels.long()))
        self.classes[own], self.scores[own] = -1, -torch.inf
        best = place < self.k
        self.classes[own[best], place[best]] = wrong[best]
        self.scores[own[best], place[best]] = score[best]

    def listed(self) -> Tensor:  # [C] int64
        """On how many lists each class is: the most confusable are on the most."""
        return self.classes[self.classes >= 0].bincount(minlength=self.num_classes)

    def state_dict(self) -> dict[str, Tensor]:
        """`classes` and `scores`: the tensors themselves, not copies, as torch's modules give theirs."""
        return {"classes": self.classes, "scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies a saved table into this one. ValueError if it was made for another C or k."""
        for name, ours in self.state_dict().items():
            given = tuple(state[name].shape) if name in state else "missing"
            if given != tuple(ours.shape):
                raise ValueError(f"saved table: {name} is {given}; want shape {tuple(ours.shape)}")
        for name, ours in self.state_dict().items():
            ours.copy_(state[name])


class DoppelgangerBatchSampler:
    """Endless batches of M image indices, for a DataLoader's `batch_sampler`. It has no length.

    A float random_classes is a share of the batch: N_r = max(1, round(share * N_c)); 1.0 draws every class
    at random. An int is N_r itself; 1 makes a single chain. counts = (low, high): images of a class.

    `lag` batches are drawn at the start, from the table as given. `step()`, called once after each optimiser
    step and its `table.update`, drops the oldest batch and draws one more: batch t knows step t - lag and
    none later. A loader may run ahead by `lag` batches; further is a RuntimeError (a lag of
    num_workers * prefetch_factor + 1 is enough). A new iterator starts at the oldest batch not stepped, so
    what a loader had prefetched when a run stopped does not matter. Randomness is a pure function of
    (seed, t) and the table.

    ValueError for options out of range, labels outside [0, C), a class without images, and fewer classes
    than a batch may need.
    """

    def __init__(
        self,
        labels: Tensor | np.ndarray,  # [N] integers in [0, C), the class of each image
        table: DoppelgangerTable,
        batch_size: int,
        *,
        random_classes: float | int,
        counts: tuple[int, int] = (2, 8),
        lag: int = 8,
        seed: int = 0,
    ) -> None:
        _check_options(batch_size, random_classes, counts, lag, seed)
        self.table, self.batch_size, self.random_classes = table, batch_size, random_classes
        (self.low, self.high), self.lag, self.seed = counts, lag, seed
        self._most = -(-batch_size // self.low)  # counts that reach M however small they are
        needed = len(fit_counts(np.full(self._most, self.low), batch_size, self.low))
        if needed > table.num_classes:
            raise ValueError(
                f"{batch_size} images with {self.low} or more per class may need {needed} classes; "
                f"the table has {table.num_classes}"
            )
        self._images, self._starts = _images_by_class(labels, table.num_classes)
        self.steps = 0  # optimiser steps made: the number of the oldest batch held
        self._queue = deque(self._draw(number) for number in range(lag))

    def __iter__(self) -> Iterator[list[int]]:
        number = self.steps
        while True:
            yield self._batch(number)
            number += 1

    def step(self) -> None:
        """A step is done and the table knows it: drops the oldest batch, draws one more."""
        self.steps += 1
        self._queue.popleft()
        self._queue.append(self._draw(self.steps + self.lag - 1))

    def state_dict(self) -> dict[str, Tensor]:
        """`steps` [] and the batches not stepped, `batches` [lag, M], int64. The table is saved apart."""
        return {"steps": torch.tensor(self.steps), "batches": torch.from_numpy(np.stack(self._queue))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where the saved one stood; take a new iterator. ValueError for another lag or M."""
        if not {"steps", "batches"} <= set(state):
            raise ValueError(f"saved sampler has {sorted(state)}; want steps and batches")
        batches, wanted = torch.as_tensor(state["batches"]).cpu().numpy(), (self.lag, self.batch_size)
        if batches.shape != wanted:
            raise ValueError(f"saved batches have shape {batches.shape}; want [lag, M] = {wanted}")
        if batches.min() < 0 or batches.max() >= len(self._images):
            raise ValueError(f"saved batches hold image {batches.max()} of {len(self._images)}")
        self.steps, self._queue = int(state["steps"]), deque(batches.copy())

    def _batch(self, number: int) -> list[int]:
        asked = f"batch {number} was asked for after {self.steps} steps"
        if number >= self.steps + self.lag:
            raise RuntimeError(
                f"{asked} with lag {self.lag}: call step() after each optimiser step, "
                "and let lag be at least num_workers * prefetch_factor + 1"
            )
        if number < self.steps:
            raise RuntimeError(f"{asked}: call step() once per batch")
        return self._queue[number - self.steps].tolist()

    def _draw(self, number: int) -> np.ndarray:  # [M] int64
        # The number is the highest word of the counter, so that the streams of two batches never meet.
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, number]))
        counts = rng.integers(self.low, self.high + 1, size=self._most)
        counts = fit_counts(counts, self.batch_size, self.low)
        classes = self._draw_classes(rng, len(counts))
        return np.concatenate([self._draw_images(rng, c, n) for c, n in zip(classes, counts, strict=True)])

    def _draw_classes(self, rng: np.random.Generator, amount: int) -> list[int]:
        """Rules 2 and 3: `amount` different classes."""
        at_random = self._random_amount(amount)
        listed = self.table.classes.numpy()
        classes: list[int] = []
        used = {-1}  # an empty place of a list is never a candidate
        for i in range(amount):
            candidates = listed[classes[i - at_random]].tolist() if i >= at_random else []
            chosen = next((c for c in candidates if c not in used), None)
            classes.append(_unused(rng, used, self.table.num_classes) if chosen is None else chosen)
            used.add(classes[-1])
        return classes

    def _random_amount(self, amount: int) -> int:  # N_r for N_c = amount; more than N_c is as good as N_c
        share = isinstance(self.random_classes, float)
        return max(1, round(self.random_classes * amount)) if share else int(self.random_classes)

    def _draw_images(self, rng: np.random.Generator, of: int, count: int) -> np.ndarray:  # [count] int64
        images = self._images[self._starts[of] : self._starts[of + 1]]
        return rng.choice(images, count, replace=len(images) < count)


def fit_counts(
    counts: np.ndarray,  # [n] images of each class, all at least low, that reach total together
    total: int,  # at least low
    low: int,
) -> np.ndarray:  # [N_c]
    """Rule 1: the first counts that make up `total` exactly."""
    ends = counts.cumsum()
    last = int(np.searchsorted(ends, total))
    counts = counts[: last + 1].copy()
    counts[last] -= ends[last] - total
    if counts[last] > 1 or low == 1:
        return counts
    if counts[last - 1] == 2:
        return np.append(counts[: last - 1], 3)
    counts[last - 1 :] += [-1, 1]
    return counts


def _unused(rng: np.random.Generator, used: set[int], num_classes: int) -> int:
    """A class not in `used`, uniformly, without work over C. There is one: a batch fits into C classes."""
    while (drawn := int(rng.integers(num_classes))) in used:
        pass
    return drawn


def _images_by_class(
    labels: Tensor | np.ndarray,  # [N]
    num_classes: int,
) -> tuple[np.ndarray, np.ndarray]:  # [N], [C + 1]
    """The images in order of their class, and where each class starts among them."""
    given = torch.as_tensor(labels).cpu()
    if given.ndim != 1 or not _is_integer(given):
        raise ValueError(f"labels are {given.dtype} {list(given.shape)}; want integers [N]")
    classes = given.long()
    _refuse("labels", given, (classes < 0) | (classes >= num_classes), num_classes)
    sizes = classes.bincount(minlength=num_classes)
    if (sizes == 0).any():
        empty = int((sizes == 0).nonzero()[0])
        raise ValueError(f"class {empty} has no image; every class of the table may be drawn")
    return classes.argsort(stable=True).numpy(), np.concatenate([[0], sizes.cumsum(0).numpy()])


def _ranked(
    own: Tensor,  # [n] int64
    wrong: Tensor,  # [n] int64
    score: Tensor,  # [n] float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The distinct (own, wrong) pairs, each with its best score and its place in the list of `own`."""
    order = _order(own, wrong, -score)
    own, wrong, score = own[order], wrong[order], score[order]
    first = torch.ones_like(own, dtype=torch.bool)
    first[1:] = (own[1:] != own[:-1]) | (wrong[1:] != wrong[:-1])
    own, wrong, score = own[first], wrong[first], score[first]
    order = _order(own, -score, wrong)
    own, wrong, score = own[order], wrong[order], score[order]
    sizes = own.unique_consecutive(return_counts=True)[1]
    place = torch.arange(len(own)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return own, wrong, score, place


def _order(*keys: Tensor) -> Tensor:  # [n] each -> [n]
    """The permutation that sorts by the first key, ties by the second, and so on."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _check_rows(
    labels: Tensor,  # [B]
    hard_classes: Tensor,  # [B, k']
    hard_scores: Tensor,  # [B, k']
) -> None:
    rows = (labels, hard_classes, hard_scores)
    shapes, dtypes = [list(t.shape) for t in rows], [t.dtype for t in rows]
    if hard_classes.ndim != 2 or shapes[1] != shapes[2] or shapes[0] != shapes[1][:1]:
        raise ValueError(f"labels, hard_classes, hard_scores are {shapes}; want [B], [B, k], [B, k]")
    if hard_classes.shape[1] == 0:
        raise ValueError("hard_classes is [B, 0]: nothing was mined; give the head topk=1 or more")
    if not (_is_integer(labels) and _is_integer(hard_classes) and hard_scores.is_floating_point()):
        raise ValueError(f"labels, hard_classes, hard_scores are {dtypes}; want integers but for scores")


def _check_options(batch_size: int, random_classes: float | int, counts: tuple[int, int], lag: int, seed: int) -> None:
    low, high = counts
    if not 1 <= low <= high:
        raise ValueError(f"counts is {counts}; want (low, high) with 1 <= low <= high")
    if batch_size < low:
        raise ValueError(f"batch_size is {batch_size}; want at least the {low} images of one class")
    share = isinstance(random_classes, float) and 0 < random_classes <= 1
    number = isinstance(random_classes, int | np.integer) and random_classes >= 1
    if not (share or number) or isinstance(random_classes, bool):
        raise ValueError(f"random_classes is {random_classes!r}; want a float in (0, 1] or an int from 1")
    if lag < 1 or not 0 <= seed < 2**64:
        raise ValueError(f"lag is {lag}, seed is {seed}; want a lag of at least 1, a seed in [0, 2**64)")


def _refuse(
    name: str,
    values: Tensor,  # [B, ...]
    outside: Tensor,  # [B, ...] bool
    num_classes: int,
) -> None:
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(f"{name}[{row}] is {values[row].tolist()}; there are {num_classes} classes")


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
