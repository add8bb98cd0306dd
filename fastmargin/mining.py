"""Doppelganger mining: the nearest wrong class of every class, and batches that put the two together.

Source: Smirnov et al., Doppelganger Mining for Face Representation Learning (ICCVW 2017), 3.1 and 3.2.
Letters: B rows, C classes, k doppelgangers of a class, N images; a batch has M images of N_c classes, N_r at random.

The table. After a step, the doppelgangers of every class of the batch are replaced: by the k best distinct wrong
classes over its rows, by their score for the class weight, of equal scores the smaller id. The paper has k = 1.

The batch.
1. Image counts are drawn uniformly from [low, high] until they reach M; the last count is cut to fit. If that leaves
   the last class 1 image while low > 1, it takes one from the class before. If that class has only 2 images, it takes
   the single image of the last class instead.
2. N_r classes are drawn at random.
3. Class i, N_r <= i < N_c, is the first doppelganger of class i - N_r that is not in the batch yet. If there is
   none, it is a random class that is not in the batch. So N_r = N_c / 2 gives pairs, N_c / 3 chains of three,
   N_r = 1 a single chain, and cycles are cut.
4. The images of a class are drawn without replacement; with replacement if the class has too few.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmargin.ops.common import rank_in_group


@dataclass
class MiningStatistics:
    """Counts over the batches since the last `take()`. Of the doppelgangers of a class only the first one counts."""

    batches: int = 0
    confusable: int = 0  # batches that contain a class and its new first doppelganger
    replaced: int = 0  # classes whose doppelgangers were replaced
    met: int = 0  # of them: those whose new first doppelganger was in the batch, too
    changed: int = 0  # of them: those whose first doppelganger became another, or had been none

    def count(
        self,
        changed: Tensor,  # [n] bool, of each class whose doppelgangers a batch replaces
        present: Tensor,  # [n] bool: its new first doppelganger is in the batch, too
    ) -> None:
        self.batches += 1
        self.confusable += bool(present.any())
        self.replaced += len(changed)
        self.met += int(present.sum())
        self.changed += int(changed.sum())

    def take(self) -> dict[str, float]:
        """Shares since the last call, 0 where there was nothing to count; resets the counts.

        confusable_batches: the share of batches that contain a class and its doppelganger: nearly 1 for large batches.
        confusable_classes: the share of their classes whose doppelganger is in the same batch.
        list_turnover: the share of replaced doppelgangers that became another class.
        """
        shares = {
            "confusable_batches": self.confusable / max(1, self.batches),
            "confusable_classes": self.met / max(1, self.replaced),
            "list_turnover": self.changed / max(1, self.replaced),
        }
        self.batches = self.confusable = self.replaced = self.met = self.changed = 0
        return shares


class DoppelgangerTable:
    """The k nearest wrong classes of each of C classes, from the last batch that contained the class, best first.

    `scores` [C, k] float32, -inf where empty; `classes` [C, k] int64, -1 where empty. Both are in host memory, where
    batches are drawn. `statistics` counts the updates.

    Args:
        num_classes: C.
        k: the number of doppelgangers of a class; the paper's is 1.

    Raises:
        ValueError: C or k below 1.
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
        hard_scores: Tensor,  # [B, k'] floats, compared as float32
        hard_classes: Tensor,  # [B, k'] integers, -1: none
    ) -> None:
        """Replaces the doppelgangers of the classes in this batch; k' need not be k.

        A class without a candidate (none given, only itself, only NaN scores) keeps its doppelgangers.

        Args:
            labels: [B] integers below C; negative: the row is skipped.
            hard_scores: [B, k'] floats, compared as float32.
            hard_classes: [B, k'] integers, -1: none.

        Raises:
            ValueError: wrong shapes or dtypes, labels of C or more, and hard_classes outside [-1, C).
        """
        # From a GPU: the first copy waits for the step to finish, the other two do not wait.
        labels, hard_scores, hard_classes = (t.detach().cpu() for t in (labels, hard_scores, hard_classes))
        _check_rows(labels, hard_scores, hard_classes)
        label, hard = labels.long()[:, None].expand_as(hard_classes), hard_classes.long()
        _check_range("labels", labels, label[:, :1] >= self.num_classes, self.num_classes)
        _check_range("hard_classes", hard, (hard < -1) | (hard >= self.num_classes), self.num_classes)
        usable = (label >= 0) & (hard >= 0) & (hard != label) & ~hard_scores.isnan()
        label, hard, score, rank = _ranked(label[usable], hard[usable], hard_scores[usable].float())
        nearest = rank == 0
        changed = self.classes[label[nearest], 0] != hard[nearest]
        self.statistics.count(changed, torch.isin(hard[nearest], labels.long()))
        self.classes[label], self.scores[label] = -1, -torch.inf
        best = rank < self.k
        self.classes[label[best], rank[best]] = hard[best]
        self.scores[label[best], rank[best]] = score[best]

    def doppelganger_counts(self) -> Tensor:  # [C] int64
        """How many classes have each class as a doppelganger: most for the most confusable ones.

        Returns:
            [C] int64.
        """
        return self.classes[self.classes >= 0].bincount(minlength=self.num_classes)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies, as in a state_dict of torch.nn.Module.

        Returns:
            "classes" [C, k] int64 and "scores" [C, k] float32.
        """
        return {"classes": self.classes, "scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies a saved table into this one.

        Args:
            state: "classes" [C, k] and "scores" [C, k].

        Raises:
            ValueError: another C or k.
        """
        for name, tensor in self.state_dict().items():
            given = tuple(state[name].shape) if name in state else "missing"
            if given != tuple(tensor.shape):
                raise ValueError(f"saved table: {name} is {given}; want shape {tuple(tensor.shape)}")
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class DoppelgangerBatchSampler:
    """Endless batches of M image indices, for a DataLoader's `batch_sampler`. It has no length.

    `lag` batches are drawn at the start, from the table as given. `step()`, called once after each optimizer step and
    its `table.update`, drops the oldest batch and draws one more: so batch t is drawn from the table after step
    t - lag. A loader may prefetch `lag` batches; more raises RuntimeError (a lag of num_workers * prefetch_factor + 1
    is enough). A new iterator starts at the oldest batch without a `step()`, so batches that a loader had prefetched
    when a run stopped are not lost. Batch t is a pure function of (seed, t) and the table.

    Args:
        labels: [N] integers in [0, C), the class of each image.
        table: of C classes.
        batch_size: M.
        random_classes: a float is a share of the batch: N_r = max(1, round(share * N_c)); 1.0 draws every class at
            random. An int is N_r itself; 1 makes a single chain.
        counts: (low, high), the number of images of a class.
        lag: batches that are drawn ahead, 1 or more.
        seed: of all draws, in [0, 2**64).

    Raises:
        ValueError: options out of range, labels outside [0, C), a class without images, and a table with fewer classes
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
        self._most = -(-batch_size // self.low)  # as many counts as reach M if all are the smallest
        needed = len(fit_counts(np.full(self._most, self.low), batch_size, self.low))
        if needed > table.num_classes:
            raise ValueError(
                f"{batch_size} images with {self.low} or more per class may need {needed} classes; "
                f"the table has {table.num_classes}"
            )
        self._images, self._starts = _images_by_class(labels, table.num_classes)
        self.steps = 0  # optimizer steps made, and so the number of the oldest batch in the queue
        self._queue = deque(self._draw(number) for number in range(lag))

    def __iter__(self) -> Iterator[list[int]]:
        number = self.steps
        while True:
            yield self._batch(number)
            number += 1

    def step(self) -> None:
        """Call once after each optimizer step and table update: drops the oldest batch, draws one more."""
        self.steps += 1
        self._queue.popleft()
        self._queue.append(self._draw(self.steps + self.lag - 1))

    def state_dict(self) -> dict[str, Tensor]:
        """What a run resumes from. The table is not included: save it, too.

        Returns:
            "steps", a scalar, and the queue "batches" [lag, M], both int64.
        """
        return {"steps": torch.tensor(self.steps), "batches": torch.from_numpy(np.stack(self._queue))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues where the saved one stood; make a new iterator.

        Args:
            state: "steps", a scalar, and "batches" [lag, M].

        Raises:
            ValueError: another lag or M, or images that are not there.
        """
        if not {"steps", "batches"} <= set(state):
            raise ValueError(f"saved sampler has {sorted(state)}; want steps and batches")
        batches, shape = torch.as_tensor(state["batches"]).cpu().numpy(), (self.lag, self.batch_size)
        if batches.shape != shape:
            raise ValueError(f"saved batches have shape {batches.shape}; want [lag, M] = {shape}")
        if batches.min() < 0 or batches.max() >= len(self._images):
            raise ValueError(f"saved batches hold image {batches.max()} of {len(self._images)}")
        self.steps, self._queue = int(state["steps"]), deque(batches.copy())

    def _batch(self, number: int) -> list[int]:
        asked = f"batch {number} was asked for after {self.steps} steps"
        if number >= self.steps + self.lag:
            raise RuntimeError(
                f"{asked} with lag {self.lag}: call step() after each optimizer step, "
                "and let lag be at least num_workers * prefetch_factor + 1"
            )
        if number < self.steps:
            raise RuntimeError(f"{asked}: call step() once per batch")
        return self._queue[number - self.steps].tolist()

    def _draw(self, number: int) -> np.ndarray:  # [M] int64
        # The number is the highest word of the counter, so that the streams of two batches do not overlap.
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, number]))
        counts = rng.integers(self.low, self.high + 1, size=self._most)
        counts = fit_counts(counts, self.batch_size, self.low)
        classes = self._draw_classes(rng, len(counts))
        return np.concatenate([self._draw_images(rng, c, n) for c, n in zip(classes, counts, strict=True)])

    def _draw_classes(self, rng: np.random.Generator, amount: int) -> list[int]:
        """Rules 2 and 3: `amount` different classes."""
        at_random = self._random_amount(amount)
        doppelgangers = self.table.classes.numpy()
        classes: list[int] = []
        used = {-1}  # an empty entry of the table is never a candidate
        for i in range(amount):
            candidates = doppelgangers[classes[i - at_random]].tolist() if i >= at_random else []
            chosen = next((c for c in candidates if c not in used), None)
            classes.append(_unused(rng, used, self.table.num_classes) if chosen is None else chosen)
            used.add(classes[-1])
        return classes

    def _random_amount(self, amount: int) -> int:  # N_r for N_c = amount; more than N_c acts as N_c
        share = isinstance(self.random_classes, float)
        return max(1, round(self.random_classes * amount)) if share else int(self.random_classes)

    def _draw_images(self, rng: np.random.Generator, label: int, count: int) -> np.ndarray:  # [count] int64
        images = self._images[self._starts[label] : self._starts[label + 1]]
        return rng.choice(images, count, replace=len(images) < count)


def fit_counts(
    counts: np.ndarray,  # [n] images of each class, all at least low; their sum is at least total
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
    """A random class that is not in `used`, in O(1) memory. There is one: no batch needs more than C classes."""
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
    _check_range("labels", given, (classes < 0) | (classes >= num_classes), num_classes)
    sizes = classes.bincount(minlength=num_classes)
    if (sizes == 0).any():
        empty = int((sizes == 0).nonzero()[0])
        raise ValueError(f"class {empty} has no image; every class of the table may be drawn")
    return classes.argsort(stable=True).numpy(), np.concatenate([[0], sizes.cumsum(0).numpy()])


def _ranked(
    label: Tensor,  # [n] int64
    hard: Tensor,  # [n] int64
    score: Tensor,  # [n] float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # label, hard, score, rank: [m] each
    """The distinct (label, hard) pairs, each with its best score and its rank among the hard classes of the label."""
    order = _order(label, hard, -score)
    label, hard, score = label[order], hard[order], score[order]
    first = torch.ones_like(label, dtype=torch.bool)
    first[1:] = (label[1:] != label[:-1]) | (hard[1:] != hard[:-1])
    label, hard, score = label[first], hard[first], score[first]
    order = _order(label, -score, hard)
    label, hard, score = label[order], hard[order], score[order]
    return label, hard, score, rank_in_group(label)


def _order(*keys: Tensor) -> Tensor:  # [n] each -> [n]
    """The permutation that sorts by the first key, equal ones by the second, and so on."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _check_rows(
    labels: Tensor,  # [B]
    hard_scores: Tensor,  # [B, k']
    hard_classes: Tensor,  # [B, k']
) -> None:
    rows = (labels, hard_scores, hard_classes)
    shapes, dtypes = [list(t.shape) for t in rows], [t.dtype for t in rows]
    if hard_classes.ndim != 2 or shapes[1] != shapes[2] or shapes[0] != shapes[1][:1]:
        raise ValueError(f"labels, hard_scores, hard_classes are {shapes}; want [B], [B, k], [B, k]")
    if hard_classes.shape[1] == 0:
        raise ValueError("hard_classes is [B, 0]: nothing was mined; give the head topk=1 or more")
    if not (_is_integer(labels) and _is_integer(hard_classes) and hard_scores.is_floating_point()):
        raise ValueError(f"labels, hard_scores, hard_classes are {dtypes}; want integers but for scores")


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


def _check_range(
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
