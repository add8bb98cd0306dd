"""LFW's pairs.txt and InsightFace's verification sets: what is read, what is refused, what is never run."""

import os
import pickle
import struct

import numpy as np
import pytest
import torch

from fastmargin.evaluation import PairList, read_bin, read_pairs
from fastmargin.evaluation.pair_lists import _Unpickler

TWO_FOLDS = "2\t1\nAnn\t1\t3\nAnn\t2\tBob_Lee\t1\nBob_Lee\t1\t2\nCy\t1\tAnn\t1\n"


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- pairs.txt ----


def test_two_folds(tmp_path):
    got = read_pairs(write(tmp_path / "pairs.txt", TWO_FOLDS))
    assert got.first == [("Ann", 1), ("Ann", 2), ("Bob_Lee", 1), ("Cy", 1)]
    assert got.second == [("Ann", 3), ("Bob_Lee", 1), ("Bob_Lee", 2), ("Ann", 1)]
    assert got.same.tolist() == [True, False, True, False] and got.folds == 2


def test_one_fold_of_the_development_lists(tmp_path):
    """pairsDevTest.txt: one number; genuine pairs first, then impostors. Blank lines at the end are ignored."""
    got = read_pairs(write(tmp_path / "pairs.txt", "2\r\nA 1 2\r\nB 1 4\r\nA 1 B 2\r\nC 1 A 2\r\n\r\n"))
    assert got.same.tolist() == [True, True, False, False] and got.folds == 1


def test_as_large_as_lfw(tmp_path):
    lines = []
    for fold in range(10):
        lines += [f"P{fold}_{n} 1 2" for n in range(300)] + [f"P{fold}_{n} 1 Q{n} 3" for n in range(300)]
    got = read_pairs(write(tmp_path / "pairs.txt", "\n".join(["10\t300", *lines])))
    assert len(got.same) == 6000 and got.folds == 10
    assert all(fold[:300].all() and not fold[300:].any() for fold in np.split(got.same, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: want the number of folds"),
        ("ten 300\n", "line 1: want the number of folds"),
        ("1 2 3\n", "line 1: want the number of folds"),
        ("0 300\n", "line 1: want the number of folds"),
        ("-1 300\n", "line 1: want the number of folds"),
        ("2 1\nA 1 2\nA 1 B 1\n", "has 2 pairs; its first line wants 4"),
        (TWO_FOLDS + "A 1 2\n", "has 5 pairs; its first line wants 4"),
        ("1 1\nA 1 B 2\nA 1 B 1\n", "line 2: 'A 1 B 2'; want `name n m`"),
        ("1 1\nA 1 2\nA 1 2\n", "line 3: 'A 1 2'; want `name n name m`"),
        ("1 1\nA 1 x\nA 1 B 1\n", "line 2: 'A 1 x'"),
        ("1 1\nA 1 2\nA 1 B -1\n", "line 3: 'A 1 B -1'"),
        ("1 1\n\nA 1 B 1\n", "line 2: ''"),
        (b"\x89PNG\xff\xfe", "is no pair list"),
    ],
)
def test_lines_that_are_not_as_the_format_has_them(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / "pairs.txt", text))


def test_pairs_as_rows_of_embeddings(tmp_path):
    """Image n of a name is the n-th row of that name, wherever it is."""
    pairs = read_pairs(write(tmp_path / "pairs.txt", TWO_FOLDS))
    labels = torch.tensor([2, 0, 1, 0, 1, 0])  # Cy, Ann, Bob, Ann, Bob, Ann
    got = pairs.rows(labels, ["Ann", "Bob_Lee", "Cy"])
    assert got.first.tolist() == [1, 3, 2, 0] and got.second.tolist() == [5, 2, 4, 1]
    assert np.array_equal(got.same, pairs.same)
    numbered = PairList([("7", 2)], [("-3", 1)], np.array([False]), 1)
    assert [side.tolist() for side in numbered.rows(np.array([7, -3, 7]))[:2]] == [[2], [1]]


def test_images_that_are_not_there(tmp_path):
    pairs = read_pairs(write(tmp_path / "pairs.txt", TWO_FOLDS))
    with pytest.raises(ValueError, match="no row for 1 of the pair list's 6 images: Ann 3"):
        pairs.rows(np.array([0, 0, 1, 1, 2]), ["Ann", "Bob_Lee", "Cy"])
    with pytest.raises(ValueError, match="no row for 6 of the pair list's 6 images: Ann 1, "):
        pairs.rows(np.array([0, 0, 0]))
    with pytest.raises(ValueError, match="label 3; want 0 to 2, there are 3 names"):
        pairs.rows(np.array([0, 3]), ["Ann", "Bob_Lee", "Cy"])
    with pytest.raises(ValueError, match="label -1"):
        pairs.rows(np.array([0, -1]), ["Ann", "Bob_Lee", "Cy"])


def test_image_n_is_the_file_whose_name_ends_in_n():
    """Text order is another one: 1, 10, 11, 12, 2, ...; and files may be missing."""
    files = sorted([*(f"data/P0/{n}.jpg" for n in range(1, 13)), "data/P0/cover.jpg"])
    files += ["data/A/x/A_0001.png", "data/A/A_0003.png", "data/A/A_0004.png"]
    labels, names = np.array([0] * 13 + [1] * 3), ["P0", "A"]
    pairs = PairList([("P0", 2), ("P0", 10), ("A", 1)], [("P0", 10), ("A", 4), ("A", 3)], np.array([1, 0, 1], bool), 1)
    first, second, _ = pairs.rows(labels, names, files)
    at = [[files[row] for row in side] for side in (first, second)]
    assert at == [
        ["data/P0/2.jpg", "data/P0/10.jpg", "data/A/x/A_0001.png"],
        ["data/P0/10.jpg", "data/A/A_0004.png", "data/A/A_0003.png"],
    ]


def test_images_that_are_missing_are_counted_and_named_or_skipped():
    files = ["A/A_0001.png", "A/A_0003.png", "A/A_0004.png"]
    pairs = PairList([("A", 1), ("A", 1), ("A", 2)], [("A", 2), ("A", 4), ("B", 7)], np.array([True, True, False]), 1)
    with pytest.raises(ValueError, match=r"no row for 2 of the pair list's 4 images: A 2, B 7"):
        pairs.rows([0, 0, 0], ["A"], files)
    kept = pairs.rows([0, 0, 0], ["A"], files, skip_missing=True)
    assert [side.tolist() for side in kept] == [[0], [2], [True]]
    many = PairList([("A", n) for n in range(20, 40)], [("A", 1)] * 20, np.ones(20, bool), 1)
    with pytest.raises(ValueError, match=r"no row for 20 of the pair list's 21 images: A 20, .*A 29 and 10 more"):
        many.rows([0, 0, 0], ["A"], files)


def test_two_files_of_one_number_are_an_error():
    pairs = PairList([("A", 1)], [("A", 2)], np.array([True]), 1)
    with pytest.raises(ValueError, match="more than one row for an image of the pair list: A 1"):
        pairs.rows([0, 0, 0], ["A"], ["A/1.png", "A/A_0001.png", "A/2.png"])


@pytest.mark.parametrize("titles", [["train.rec, record 7", "train.rec, record 8"], ["image 4", "image 5"]])
def test_titles_that_are_no_paths_count_rows(titles):
    pairs = PairList([("9", 1)], [("9", 2)], np.array([True]), 1)
    assert [side.tolist() for side in pairs.rows([9, 9], None, titles)[:2]] == [[0], [1]]


def test_names_with_spaces_a_byte_order_mark_and_either_form_of_unicode(tmp_path):
    text = "\ufeff1\t1\r\nJose\u0301 Mari\u0301a\t1\t2\r\nAnn Lee \t1\tJos\u00e9 Mar\u00eda\t2\r\n"
    pairs = read_pairs(write(tmp_path / "pairs.txt", text))
    assert pairs.second[0][0] == "Jose\u0301 Mari\u0301a" and pairs.first[1] == ("Ann Lee", 1)
    composed, decomposed = "Jos\u00e9 Mar\u00eda", "Jose\u0301 Mari\u0301a"
    for name in (composed, decomposed):
        files = [f"p/{name}/1.jpg", f"p/{name}/2.jpg", "p/Ann Lee/1.jpg"]
        for titles in (None, files):
            got = pairs.rows([0, 0, 1], [name, "Ann Lee"], titles)
            assert got.first.tolist() == [0, 2] and got.second.tolist() == [1, 1]


# ---- verification sets ----

IMAGES, SAME = [b"one", b"two" * 100, b"\x00\xff", b"one"], [True, False]


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [tuple, list])
def test_sets_of_every_protocol_that_has_bytes(tmp_path, protocol, kind):
    got = read_bin(write(tmp_path / "lfw.bin", pickle.dumps(kind((IMAGES, SAME)), protocol)))
    assert got.images == IMAGES and got.same.tolist() == SAME and got.same.dtype == bool


def test_sets_of_python_2(tmp_path):
    """Its text of 8 bits, SHORT_BINSTRING and BINSTRING, in protocol 2, the one InsightFace's tool asked for there."""
    short, long = b"\xff\xd8\x00jpeg", b"\x80" * 300
    images = b"]q\x01(U" + bytes([len(short)]) + short + b"q\x02T" + struct.pack("<i", 300) + long + b"q\x03e"
    got = read_bin(write(tmp_path / "lfw.bin", b"\x80\x02" + images + b"]q\x04\x88a\x86q\x05."))
    assert got.images == [short, long] and got.same.tolist() == [True]


def test_flags_may_be_numbers(tmp_path):
    got = read_bin(write(tmp_path / "lfw.bin", pickle.dumps((IMAGES, [1, 0]))))
    assert got.same.tolist() == [True, False]


MARK = "/tmp/fastmargin-a-pickle-ran-code"


class Attack:
    """A pickle that calls a function while it is read, as any pickle may."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"os.system, protocol {protocol}", pickle.dumps((IMAGES, [Attack(os.system, f"touch {MARK}")]), protocol)
        yield f"eval, protocol {protocol}", pickle.dumps(([Attack(eval, f"open({MARK!r}, 'w')")], SAME), protocol)
    touch = f"touch {MARK}".encode()
    yield "INST", b"(S'" + touch + b"'\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nS'" + touch + b"'\no."
    yield "by text on the stack", b"\x80\x04\x8c\x02os\x8c\x06system\x93S'" + touch + b"'\n\x85R."
    yield "EXT1", b"\x80\x02\x82\x01."
    yield "BUILD", b"]}S'append'\nN\x86b."
    yield "a persistent id", b"Ptouch\n."
    yield "numpy", pickle.dumps(([b"a", b"b"], [np.bool_(True)]))
    yield "an array", pickle.dumps(([np.zeros(3, np.uint8)] * 2, [True]))


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in attacks()])
def test_nothing_in_a_pickle_is_run(tmp_path, content):
    with pytest.raises(ValueError, match=r"is no verification set: .*not admitted"):
        read_bin(write(tmp_path / "lfw.bin", content))
    assert not os.path.exists(MARK)


def test_the_attacks_work_on_pickle_itself(tmp_path):
    """Otherwise the test above would prove nothing."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Attack(os.system, f"touch {mark}")))
    assert mark.exists()


def test_the_unpickler_looks_nothing_up_even_if_an_instruction_slips_through(tmp_path):
    path = write(tmp_path / "lfw.bin", pickle.dumps(Attack(os.system, f"touch {MARK}")))
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match=r"asks for posix\.system"):
        _Unpickler(file).load()
    assert not os.path.exists(MARK)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xd8\xff\xe0 a JPEG", id="no pickle"),
        pytest.param(pickle.dumps((IMAGES, SAME))[:-1], id="cut at the end"),
        pytest.param(pickle.dumps((IMAGES, SAME))[:40], id="cut in an image"),
        pytest.param(b".", id="nothing on the stack"),
        pytest.param(b"\x80\x04a.", id="append to nothing"),
        pytest.param(b"\x80\x04h\x07.", id="recalls what was never kept"),
        pytest.param(b"\x80\xff].", id="protocol 255"),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.", id="an image of 2^62 bytes"),
        pytest.param(b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"a.", id="an image of 4 GB"),
        pytest.param(b"\x80\x02T" + struct.pack("<i", -5) + b"a.", id="an image of -5 bytes"),
        pytest.param(b"\x80\x04]r" + struct.pack("<I", 2**32 - 2) + b".", id="a table of 4 G objects"),
        pytest.param(b"I" + b"9" * 5000 + b"\n.", id="a number of 5,000 digits"),
        pytest.param(b"]0]0" * 3 + b".", id="takes from the stack"),
        pytest.param(b"]" * 100_000 + b"a" * 99_999 + b".", id="lists 100,000 deep"),
        pytest.param(pickle.dumps(IMAGES), id="one list"),
        pytest.param(pickle.dumps((IMAGES, SAME, [])), id="three"),
        pytest.param(pickle.dumps((IMAGES, (True, False))), id="a tuple"),
        pytest.param(pickle.dumps((IMAGES[:3], SAME)), id="an image short"),
        pytest.param(pickle.dumps((IMAGES, [True])), id="a flag short"),
        pytest.param(pickle.dumps(([], [])), id="no pair"),
        pytest.param(pickle.dumps((IMAGES, [True, 2])), id="a flag of 2"),
        pytest.param(pickle.dumps((IMAGES, [True, [1]])), id="a flag of a list"),
        pytest.param(pickle.dumps((["a", "b"], [True])), id="text"),
        pytest.param(pickle.dumps(([7, 8], [True])), id="numbers"),
    ],
)
def test_damaged_and_other_pickles(tmp_path, content):
    with pytest.raises(ValueError, match=r"lfw\.bin"):
        read_bin(write(tmp_path / "lfw.bin", content))
