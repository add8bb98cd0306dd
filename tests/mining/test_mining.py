"""The doppelganger table against brute force."""

import itertools

import pytest
import torch

from fastmargin.mining import DoppelgangerTable

NONE = -float("inf")


def brute_force_lists(labels, hard_scores, hard_classes, k):
    """For every class with a candidate: its k best distinct wrong classes, as [(score, class)]."""
    best = {}
    rows = zip(labels.tolist(), hard_scores.tolist(), hard_classes.tolist(), strict=True)
    for label, scores, classes in rows:
        for wrong, score in zip(classes, scores, strict=True):
            if label >= 0 and wrong >= 0 and wrong != label:
                pool = best.setdefault(label, {})
                pool[wrong] = max(score, pool.get(wrong, NONE))
    return {label: sorted((-s, c) for c, s in pool.items())[:k] for label, pool in best.items()}


@pytest.mark.parametrize(("k", "given"), [(1, 1), (1, 3), (2, 1), (3, 3), (4, 2)])
def test_update_equals_brute_force(k, given):
    generator = torch.Generator().manual_seed(k * 10 + given)
    table = DoppelgangerTable(12, k)
    lists = {c: [] for c in range(12)}
    for _ in range(60):
        labels = torch.randint(-1, 12, (17,), generator=generator)
        classes = torch.randint(-1, 12, (17, given), generator=generator)
        scores = torch.randint(0, 4, (17, given), generator=generator) / 4  # few values: many ties
        table.update(labels, scores, classes)
        lists |= brute_force_lists(labels, scores, classes, k)
        for c, expected in lists.items():
            empty = k - len(expected)
            assert table.classes[c].tolist() == [w for _, w in expected] + [-1] * empty
            assert table.scores[c].tolist() == [-s for s, _ in expected] + [NONE] * empty
    assert not (table.classes == torch.arange(12)[:, None]).any()


def test_update_by_hand():
    table = DoppelgangerTable(6, k=2)
    assert table.classes.tolist() == [[-1, -1]] * 6 and table.scores.tolist() == [[NONE, NONE]] * 6
    table.update(
        torch.tensor([0, 0, 1, -100, 5]),
        torch.tensor([[0.5, 0.2], [0.5, 0.7], [0.9, -0.1], [1.0, 1.0], [NONE, NONE]]),
        torch.tensor([[3, 2], [4, 3], [1, 0], [2, 3], [-1, -1]]),
    )
    # 0: class 3 at its larger score; then 4 before 2. 1: never itself. 5: nothing given. 2, 3, 4: not seen.
    assert table.classes.tolist() == [[3, 4], [0, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert table.scores[0].tolist() == [pytest.approx(0.7), 0.5]
    table.update(torch.tensor([0]), torch.tensor([[-0.5]]), torch.tensor([[2]]))
    assert table.classes[0].tolist() == [2, -1], "a visit replaces the list, old scores are not kept"
    assert table.classes[1].tolist() == [0, -1], "a class not visited keeps its list"
    table.update(torch.tensor([0, 1]), torch.tensor([[1.0], [NONE]]), torch.tensor([[0], [-1]]))
    assert table.classes[:2].tolist() == [[2, -1], [0, -1]], "without a candidate the list stays"


def test_ties_go_to_the_smaller_id_whatever_the_order_of_rows():
    for rows in itertools.permutations([(7, 0.5), (2, 0.5), (9, 0.5), (4, 0.25)]):
        table = DoppelgangerTable(10, k=3)
        wrong, scores = zip(*rows, strict=True)
        table.update(torch.full((4,), 3), torch.tensor(scores)[:, None], torch.tensor(wrong)[:, None])
        assert table.classes[3].tolist() == [2, 7, 9]


def test_update_takes_small_dtypes_empty_batches_and_nan():
    table = DoppelgangerTable(1000)
    table.update(torch.empty(0, dtype=torch.int64), torch.empty(0, 1), torch.empty(0, 1, dtype=torch.int64))
    assert (table.classes == -1).all()
    label = torch.tensor([200], dtype=torch.uint8)
    table.update(label, torch.tensor([[0.5]]).half(), torch.tensor([[7]]).short())
    assert table.classes[200, 0] == 7 and table.scores[200, 0] == 0.5
    table.update(torch.tensor([1, 1]), torch.tensor([[float("nan")], [0.1]]), torch.tensor([[5], [6]]))
    table.update(torch.tensor([1]), torch.tensor([[float("nan")]]), torch.tensor([[5]]))
    assert table.classes[1, 0] == 6, "NaN is no score"


@pytest.mark.parametrize(
    ("labels", "scores", "classes", "message"),
    [
        (torch.tensor([0, 4]), torch.zeros(2, 1), torch.tensor([[1], [2]]), r"labels\[1\] is 4"),
        (torch.tensor([0, 1]), torch.zeros(2, 1), torch.tensor([[1], [4]]), r"hard_classes\[1\] is \[4\]"),
        (torch.tensor([0]), torch.zeros(1, 1), torch.tensor([[-2]]), r"hard_classes\[0\] is \[-2\]"),
        (torch.tensor([0]), torch.zeros(1), torch.tensor([1]), r"want \[B\], \[B, k\], \[B, k\]"),
        (torch.tensor([[0]]), torch.zeros(1, 1), torch.tensor([[1]]), r"want \[B\], \[B, k\], \[B, k\]"),
        (torch.tensor([0, 1]), torch.zeros(1, 1), torch.tensor([[1]]), r"want \[B\], \[B, k\], \[B, k\]"),
        (torch.tensor([0]), torch.zeros(1, 2), torch.tensor([[1]]), r"want \[B\], \[B, k\], \[B, k\]"),
        (torch.tensor([0.0]), torch.zeros(1, 1), torch.tensor([[1]]), "want integers"),
        (torch.tensor([0]), torch.zeros(1, 1), torch.tensor([[1.0]]), "want integers"),
        (torch.tensor([0]), torch.zeros(1, 1).long(), torch.tensor([[1]]), "want integers"),
    ],
)
def test_update_refuses(labels, scores, classes, message):
    table = DoppelgangerTable(4)
    with pytest.raises(ValueError, match=message):
        table.update(labels, scores, classes)
    assert (table.classes == -1).all(), "a refused update changes nothing"


def test_table_state():
    table, other = DoppelgangerTable(5, 2), DoppelgangerTable(5, 2)
    table.update(torch.tensor([3]), torch.tensor([[0.5, 0.25]]), torch.tensor([[1, 0]]))
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.classes, table.classes) and torch.equal(other.scores, table.scores)
    table.update(torch.tensor([3]), torch.tensor([[0.5]]), torch.tensor([[2]]))
    assert other.classes[3].tolist() == [1, 0], "a loaded table is a copy"
    with pytest.raises(ValueError, match=r"classes is \(5, 2\); want shape \(5, 1\)"):
        DoppelgangerTable(5, 1).load_state_dict(table.state_dict())
    with pytest.raises(ValueError, match="scores is missing"):
        other.load_state_dict({"classes": table.classes})
    for wrong in ((0, 1), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            DoppelgangerTable(*wrong)


def test_a_head_that_mines_nothing_is_said():
    with pytest.raises(ValueError, match="topk=1"):
        DoppelgangerTable(5).update(torch.tensor([1, 2]), torch.empty(2, 0), torch.empty(2, 0, dtype=torch.int64))


def test_statistics_equal_brute_force():
    """Over the updates since the last take(); a class without a candidate is not counted."""
    generator = torch.Generator().manual_seed(0)
    table, best = DoppelgangerTable(12, k=2), {}
    for updates in (1, 7, 0, 30):
        batches, replaced, met = [], [], []
        for _ in range(updates):
            labels = torch.randint(-1, 12, (4,), generator=generator)
            classes = torch.randint(-1, 12, (4, 2), generator=generator)
            scores = torch.rand(4, 2, generator=generator)
            table.update(labels.short(), scores, classes)
            lists = {c: pool[0][1] for c, pool in brute_force_lists(labels, scores, classes, 2).items()}
            present = [wrong in labels.tolist() for wrong in lists.values()]
            batches.append(any(present))
            met += present
            replaced += [best.get(c) != wrong for c, wrong in lists.items()]
            best |= lists
        assert table.statistics.take() == {
            "confusable_batches": sum(batches) / max(1, updates),
            "confusable_classes": sum(met) / max(1, len(met)),
            "list_turnover": sum(replaced) / max(1, len(replaced)),
        }


def test_statistics_by_hand():
    table = DoppelgangerTable(6)
    scores = torch.ones(2, 1)
    table.update(torch.tensor([0, 1]), scores, torch.tensor([[2], [3]]))
    first = {"confusable_batches": 0, "confusable_classes": 0, "list_turnover": 1}
    assert table.statistics.take() == first, "from no class to one"
    table.update(torch.tensor([0, 1]), scores, torch.tensor([[2], [3]]))
    table.update(torch.tensor([0, 1]), scores, torch.tensor([[1], [3]]))
    table.update(torch.tensor([0, -100]), scores, torch.tensor([[1], [0]]))
    shares = {"confusable_batches": 1 / 3, "confusable_classes": 1 / 5, "list_turnover": 1 / 5}
    assert table.statistics.take() == shares


def test_doppelganger_counts_are_the_lists_a_class_is_on():
    table = DoppelgangerTable(5, k=2)
    assert table.doppelganger_counts().tolist() == [0] * 5
    table.update(torch.arange(4), torch.rand(4, 2), torch.tensor([[4, 1], [4, 0], [0, 4], [-1, -1]]))
    assert table.doppelganger_counts().tolist() == [2, 1, 0, 0, 3]
