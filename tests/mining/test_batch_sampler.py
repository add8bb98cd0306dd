"""The doppelganger batch sampler against the rules in the docstring of mining.py."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastmargin.mining import DoppelgangerBatchSampler, DoppelgangerTable, fit_counts

NONE = -float("inf")


# ---- image counts ----


def counts_by_the_rule(drawn, total, low):
    """Rule 1, one count at a time."""
    counts = []
    for count in drawn:
        counts.append(min(count, total - sum(counts)))
        if sum(counts) == total:
            break
    if low > 1 and counts[-1] == 1:
        if counts[-2] > 2:
            counts[-2:] = [counts[-2] - 1, 2]
        else:
            counts[-2:] = [3]
    return counts


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 3), (2, 2), (2, 4), (3, 3), (3, 5), (4, 6)])
def test_counts_of_every_possible_draw(low, high):
    for total in range(low, 3 * low + 2):
        for drawn in itertools.product(range(low, high + 1), repeat=-(-total // low)):
            counts = fit_counts(np.array(drawn), total, low).tolist()
            assert counts == counts_by_the_rule(drawn, total, low)
            assert sum(counts) == total and min(counts) >= min(low, 2)
            assert all(low <= c <= high for c in counts[:-2])
            assert max(counts) <= high or (high == 2 and counts[-1] == 3)


# ---- the batches ----


def table_of(next_class):
    """A table of k = 1 with the doppelgangers `next_class` [C]."""
    table = DoppelgangerTable(len(next_class))
    table.classes[:, 0] = torch.as_tensor(next_class)
    return table


def make(table, batch_size=81, *, images_each=8, random_classes=1 / 3, counts=(3, 3), **options):
    labels = torch.arange(table.num_classes * images_each) % table.num_classes  # image i is of class i mod C
    return DoppelgangerBatchSampler(labels, table, batch_size, random_classes=random_classes, counts=counts, **options)


def classes_in_order(batch, num_classes):
    """The classes of a batch in the order they were drawn; asserts that each is one run."""
    runs = [c for c, _ in itertools.groupby(i % num_classes for i in batch)]
    assert len(set(runs)) == len(runs), "a class was drawn twice"
    return runs


def first_batches(sampler, n):
    batches = []
    for batch in itertools.islice(sampler, n):
        batches.append(batch)
        sampler.step()
    return batches


@pytest.mark.parametrize("random_classes", [1, 2, 9, 0.01, 0.2, 0.5, 1.0, 400])
@pytest.mark.parametrize("k", [1, 3])
def test_batches_follow_the_rules(random_classes, k):
    generator = torch.Generator().manual_seed(k)
    table = DoppelgangerTable(60, k)
    table.classes.copy_(torch.randint(-1, 60, (60, k), generator=generator))
    sampler = make(table, 60, random_classes=random_classes, counts=(2, 5))
    seen = set()
    for batch in first_batches(sampler, 100):
        assert len(batch) == 60
        classes = classes_in_order(batch, 60)
        share = isinstance(random_classes, float)
        at_random = max(1, round(random_classes * len(classes))) if share else random_classes
        for i in range(at_random, len(classes)):
            doppelgangers = table.classes[classes[i - at_random]].tolist()
            fresh = [c for c in doppelgangers if c >= 0 and c not in classes[:i]]
            assert not fresh or classes[i] == fresh[0]
        sizes = [sum(i % 60 == c for i in batch) for c in classes]
        assert all(2 <= n <= 5 for n in sizes) and len(set(batch)) == 60
        seen.add(tuple(sizes))
    assert len(seen) > 90, "counts are random"


def test_shares_make_pairs_and_chains_of_three():
    following = np.roll(np.arange(100_000), -1)  # the list of c is c + 1
    for random_classes, chain in ((1 / 3, 3), (9, 3), (1, 27), (1 / 27, 27)):
        sampler = make(table_of(following), random_classes=random_classes, images_each=3)
        for batch in first_batches(sampler, 20):
            classes = np.array(classes_in_order(batch, 100_000))
            assert len(classes) == 27
            chains = classes.reshape(chain, 27 // chain)  # down a column: one chain
            assert (np.diff(chains, axis=0) % 100_000 == 1).all()


def test_cycles_are_cut():
    table = table_of(np.arange(1000) ^ 1)  # A <-> B
    for batch in first_batches(make(table, 12, random_classes=1, counts=(2, 2)), 50):
        pairs = np.array(classes_in_order(batch, 1000)).reshape(3, 2)
        assert (pairs[:, 0] == pairs[:, 1] ^ 1).all()
        assert len(set(pairs[:, 0] // 2)) == 3


def test_the_next_on_a_list_is_taken_where_the_first_is_in_the_batch():
    """A and B are each other's first doppelganger, A + 2 and B + 2 their second: one chain visits pair after pair."""
    table = DoppelgangerTable(1000, k=3)
    label = torch.arange(1000)
    table.classes[:, 0], table.classes[:, 1] = label ^ 1, (label + 2) % 1000
    for batch in first_batches(make(table, 20, random_classes=1, counts=(2, 2)), 20):
        classes = np.array(classes_in_order(batch, 1000))
        assert (classes[1::2] == classes[::2] ^ 1).all()
        assert (classes[2::2] == (classes[1:-1:2] + 2) % 1000).all()


def test_an_empty_list_gives_random_classes_uniformly():
    batches = first_batches(make(DoppelgangerTable(40), 20, random_classes=1, counts=(2, 2)), 2000)
    drawn = np.bincount(np.array([classes_in_order(b, 40) for b in batches]).ravel(), minlength=40)
    expected = 2000 * 10 / 40
    chi_square = ((drawn - expected) ** 2 / expected).sum()
    assert chi_square < 73  # 39 degrees of freedom: exceeded with probability 1e-3


def test_a_batch_of_all_classes_and_of_classes_with_few_images():
    batch = first_batches(make(table_of([1, 2, 0]), 9, images_each=2), 1)[0]
    assert sorted(classes_in_order(batch, 3)) == [0, 1, 2]
    assert all(sum(i % 3 == c for i in batch) == 3 for c in range(3)), "drawn with replacement"
    images = np.bincount(np.ravel(first_batches(make(DoppelgangerTable(5), 9), 2000)), minlength=40)
    assert abs(images - 450).max() < 110, "images of a class are drawn uniformly"


def test_batches_depend_on_seed_number_and_table_alone():
    table = table_of(np.roll(np.arange(500), -1))
    usual = first_batches(make(table, seed=7), 30)
    assert usual == first_batches(make(table, seed=7), 30)
    assert usual == first_batches(make(table, seed=7, lag=2), 30), "with a table that stands still"
    other = first_batches(make(table, seed=8), 30)
    assert all(a != b for a, b in zip(usual, other, strict=True))
    assert len({tuple(b) for b in usual}) == 30


def test_streams_of_neighboring_batches_share_nothing():
    """Counters one apart would repeat the same random words four draws later."""
    batches = first_batches(make(DoppelgangerTable(100_000), images_each=3, random_classes=1.0), 50)
    classes = [set(classes_in_order(b, 100_000)) for b in batches]
    assert sum(len(a & b) for a, b in itertools.pairwise(classes)) < 10


def test_labels_of_any_kind_and_order():
    table = table_of([1, 2, 3, 0])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 5))
    made = [
        first_batches(DoppelgangerBatchSampler(kind, table, 8, random_classes=0.5, counts=(2, 5)), 5)
        for kind in (labels, torch.from_numpy(labels), torch.from_numpy(labels.astype(np.uint8)))
    ]
    assert made[0] == made[1] == made[2]
    for batch in made[0]:
        runs = [c for c, _ in itertools.groupby(labels[batch])]
        assert len(set(runs)) == len(runs) and len(set(batch)) == 8


# ---- the queue ----


@pytest.mark.parametrize("lag", [1, 3, 8])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_batch_knows_the_table_of_step_t_minus_lag(lag, ahead):
    """After n steps the list of c is c + n + 1, so the differences inside a batch tell n."""
    ahead = min(ahead, lag - 1)
    table = table_of((np.arange(5000) + 1) % 5000)
    sampler = make(table, 12, random_classes=1, lag=lag, images_each=3)
    batches = iter(sampler)
    fetched = [next(batches) for _ in range(ahead)]
    for step in range(30):
        fetched.append(next(batches))
        table.classes[:, 0] = (torch.arange(5000) + step + 2) % 5000
        sampler.step()
    for t, batch in enumerate(fetched):
        steps_made = max(0, t - lag + 1)  # step t - lag, counted from 0, was the last one
        assert (np.diff(classes_in_order(batch, 5000)) % 5000 == steps_made + 1).all()


def test_running_ahead_and_falling_behind():
    sampler = make(DoppelgangerTable(50), lag=3)
    batches = iter(sampler)
    first = [next(batches) for _ in range(3)]
    with pytest.raises(RuntimeError, match=r"batch 3 was asked for after 0 steps with lag 3"):
        next(batches)
    again = iter(sampler)
    assert [next(again) for _ in range(3)] == first, "what was not stepped is given again"
    sampler.step()
    next(again)
    for _ in range(4):
        sampler.step()
    with pytest.raises(RuntimeError, match="once per batch"):
        next(again)
    with pytest.raises(TypeError):
        len(sampler)


def train(table, sampler, steps, prefetch=0):
    """Batches used in `steps` steps that change the table by what they see; `prefetch` more stay unused."""
    batches, used, waiting = iter(sampler), [], []
    for _ in range(steps):
        while len(waiting) <= prefetch:
            waiting.append(next(batches))
        batch = torch.tensor(waiting.pop(0))
        wrong = (batch * 31 + sampler.steps) % table.num_classes
        table.update(batch % table.num_classes, torch.cos(batch.float())[:, None], wrong[:, None])
        sampler.step()
        used.append(batch.tolist())
    return used


@pytest.mark.parametrize("prefetch", [0, 3, 7])
@pytest.mark.parametrize("stop", [0, 5, 12])
def test_resume_is_exact_however_far_a_loader_ran_ahead(prefetch, stop):
    whole = DoppelgangerTable(200)
    expected = train(whole, make(whole, counts=(2, 8)), 30)
    table = DoppelgangerTable(200)
    sampler = make(table, counts=(2, 8))
    before = train(table, sampler, stop, prefetch)
    saved = {k: v.clone() for k, v in table.state_dict().items()}
    queue = sampler.state_dict()
    assert queue["batches"].shape == (8, 81) and int(queue["steps"]) == stop
    train(table, sampler, 3)  # what happens after the save is lost

    resumed = DoppelgangerTable(200)
    resumed.load_state_dict(saved)
    other = make(DoppelgangerTable(200), counts=(2, 8))
    other.table = resumed
    other.load_state_dict(queue)
    assert before + train(resumed, other, 30 - stop, prefetch) == expected
    assert torch.equal(resumed.classes, whole.classes) and torch.equal(resumed.scores, whole.scores)


def test_loading_keeps_the_queue_and_refuses_another_shape():
    sampler, other = (make(DoppelgangerTable(50), seed=seed) for seed in (0, 1))
    first_batches(sampler, 4)
    other.load_state_dict(sampler.state_dict())
    assert list(itertools.islice(other, 8)) == list(itertools.islice(sampler, 8))
    with pytest.raises(ValueError, match=r"shape \(8, 81\); want \[lag, M\] = \(3, 81\)"):
        make(DoppelgangerTable(50), lag=3).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match=r"shape \(8, 81\); want \[lag, M\] = \(8, 60\)"):
        make(DoppelgangerTable(50), 60).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match=r"of 54"):
        make(DoppelgangerTable(27), images_each=2).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="want steps and batches"):
        other.load_state_dict({"steps": torch.tensor(1)})


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader(workers):
    table, twin = (table_of(np.roll(np.arange(300), -1)) for _ in range(2))
    sampler, plain = make(table, lag=5), make(twin, lag=5)
    loader = DataLoader(torch.arange(300 * 8), batch_sampler=sampler, num_workers=workers)
    fetched = []
    for step, batch in enumerate(itertools.islice(loader, 12)):
        fetched.append(batch.tolist())
        table.classes[:, 0] = (torch.arange(300) + step + 2) % 300
        sampler.step()
    for step, batch in enumerate(itertools.islice(plain, 12)):
        assert batch == fetched[step]
        twin.classes[:, 0] = (torch.arange(300) + step + 2) % 300
        plain.step()


def test_a_lag_below_the_prefetch_is_said():
    sampler = make(DoppelgangerTable(50), lag=2)
    loader = DataLoader(torch.arange(400), batch_sampler=sampler, num_workers=2)
    with pytest.raises(RuntimeError, match=r"num_workers \* prefetch_factor \+ 1"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2}, "at least the 3 images"),
        ({"batch_size": 0}, "at least the 3 images"),
        ({"counts": (0, 3)}, "1 <= low <= high"),
        ({"counts": (4, 3)}, "1 <= low <= high"),
        ({"random_classes": 0.0}, "float in"),
        ({"random_classes": 1.5}, "float in"),
        ({"random_classes": float("nan")}, "float in"),
        ({"random_classes": 0}, "float in"),
        ({"random_classes": True}, "float in"),
        ({"lag": 0}, "lag of at least 1"),
        ({"seed": -1}, "seed in"),
        ({"seed": 2**64}, "seed in"),
        ({"batch_size": 31 * 3}, "may need 31 classes; the table has 30"),
        ({"batch_size": 30 * 3 + 1}, "may need 31 classes"),
    ],
)
def test_sampler_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(DoppelgangerTable(30), **{"batch_size": 81, **options})


def test_sampler_takes_as_few_classes_as_a_batch_can_need():
    sampler = make(DoppelgangerTable(40), 81, counts=(2, 2), random_classes=1.0)  # 39 classes of 2, one of 3
    assert len(classes_in_order(next(iter(sampler)), 40)) == 40
    with pytest.raises(ValueError, match="may need 40 classes"):
        make(DoppelgangerTable(39), 81, counts=(2, 2), random_classes=1.0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3, 3], "class 2 has no image"),
        ([0, 1, 2, 4], r"labels\[3\] is 4"),
        ([0, 1, 2, -1], r"labels\[3\] is -1"),
        ([0.0, 1.0], "want integers"),
        ([[0, 1], [2, 3]], "want integers"),
    ],
)
def test_sampler_refuses_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        DoppelgangerBatchSampler(torch.tensor(labels), DoppelgangerTable(4), 4, random_classes=0.5)
