"""Published lists of pairs.

LFW's pairs.txt (vis-www.cs.umass.edu/lfw): the first line holds the number of folds and the pairs of each kind
in a fold, or that number alone for one fold; then, for each fold, its genuine pairs `name n m` and its impostor
pairs `name n name m`. Image n of NAME is the file NAME_000n.jpg. Names may have spaces where tabs separate the fields.

InsightFace's verification sets (lfw.bin, cfp_fp.bin, agedb_30.bin): a pickled pair (images, same), where images
is a list of 2 P encoded files, pair p being images 2p and 2p + 1, and same a list of P booleans.
"""

import io
import pickle
import pickletools
import re
import unicodedata
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from fastmargin.evaluation.arrays import Array, array
from fastmargin.evaluation.sampling import Pairs

Image = tuple[str, int]  # name, number

SHOWN = 10  # images that an error names

ADMITTED = frozenset(  # opcodes of a pickle that build lists, tuples, bytes and numbers, and call nothing
    "PROTO FRAME STOP MARK EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING NEWTRUE NEWFALSE BININT BININT1 BININT2 "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET".split()
)
DAMAGE = (ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError)


class PairList(NamedTuple):
    """Pairs of named images, in the order of the folds.

    Attributes:
        first: P images, each a (name, number).
        second: P images, likewise.
        same: [P] bool.
        folds: their number.
    """

    first: list[Image]  # P
    second: list[Image]  # P
    same: np.ndarray  # [P] bool
    folds: int

    def rows(
        self,
        labels: Array,  # [N]
        names: list[str] | None = None,  # [C], by label
        titles: list[str] | None = None,  # [N], paths of the images
        skip_missing: bool = False,
    ) -> Pairs:
        """The pairs as rows of N labeled embeddings.

        Image n of a name is the row whose file, in a folder of that name, has a name that ends in n: 7.jpg, A_0007.jpg.
        Without titles, or if one is no such path, it is the n-th row with that label. Without names, the label as text
        is the name. Names are compared in Unicode's NFC.

        Args:
            labels: [N] integers.
            names: C of them, by label.
            titles: N of them, paths of the images.
            skip_missing: pairs with an image without a row are left out.

        Returns:
            Indices first [P] and second [P], and same [P]: see `Pairs`.

        Raises:
            ValueError: images without a row, unless skip_missing, or with two; a label without a name.
        """
        found = rows_by_image(array(labels).tolist(), names, titles)
        sides = [[(nfc(name), n) for name, n in side] for side in (self.first, self.second)]
        listed = dict.fromkeys(image for pair in zip(*sides, strict=True) for image in pair)
        if double := [image for image in listed if len(found.get(image, ())) > 1]:
            raise ValueError(
                f"the embeddings have more than one row for an image of the pair list: {some_images(double)}"
            )
        missing = {image: None for image in listed if image not in found}
        if missing and not skip_missing:
            raise ValueError(
                f"the embeddings have no row for {len(missing)} of the pair list's {len(listed)} images: "
                f"{some_images([*missing])}. "
                "Image n of a name is the file in a folder of that name whose own name ends in n; of embeddings "
                "without such paths, the n-th row of that name"
            )
        kept = [p for p, pair in enumerate(zip(*sides, strict=True)) if missing.keys().isdisjoint(pair)]
        first, second = (np.array([found[side[p]][0] for p in kept], np.int64) for side in sides)
        return Pairs(first, second, self.same[kept])


def rows_by_image(
    labels: list[int],  # N
    names: list[str] | None,
    titles: list[str] | None,
) -> dict[Image, list[int]]:
    """The rows of each image; names as in `PairList.rows`."""
    named = [nfc(name_of(label, names)) for label in labels]
    numbers = None if titles is None else numbers_of(named, titles)
    found: dict[Image, list[int]] = {}
    counts: dict[int, int] = {}
    for row, (label, name) in enumerate(zip(labels, named, strict=True)):
        counts[label] = counts.get(label, 0) + 1
        number = counts[label] if numbers is None else numbers[row]
        if number is not None:
            found.setdefault((name, number), []).append(row)
    return found


def name_of(label: int, names: list[str] | None) -> str:
    """Raises ValueError for a label without a name."""
    if names is not None and not 0 <= label < len(names):
        raise ValueError(f"label {label}; want 0 to {len(names) - 1}, there are {len(names)} names")
    return str(label) if names is None else names[label]


def numbers_of(
    names: list[str],  # N
    titles: list[str],  # N
) -> list[int | None] | None:
    """The number that ends the name of each file, None where there is none; None if a title is no path of a file in a
    folder of that name."""
    paths = [PurePath(nfc(title)) for title in titles]
    if not all(name in path.parts[:-1] for name, path in zip(names, paths, strict=True)):
        return None
    ends = (re.search(r"[0-9]+$", path.stem) for path in paths)
    return [end and int(end[0]) for end in ends]


def nfc(text: str) -> str:
    """Composed: a file system may store the same name decomposed."""
    return unicodedata.normalize("NFC", text)


def some_images(images: list[Image]) -> str:
    """The first few by name, and how many more there are."""
    named = ", ".join(f"{name} {number}" for name, number in images[:SHOWN])
    more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
    return named + more


class ImagePairs(NamedTuple):
    """A verification set: pair p is images 2p and 2p + 1.

    Attributes:
        images: 2 P encoded files.
        same: [P] bool.
    """

    images: list[bytes]  # 2 P encoded files
    same: np.ndarray  # [P] bool


def read_pairs(path: str | Path) -> PairList:
    """Reads a pairs.txt.

    Args:
        path: of the file.

    Returns:
        Its P pairs of named images.

    Raises:
        ValueError: a line that does not follow the format, which it names.
        OSError: as `open`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no pair list: {error}") from error
    fields = [words_of(line) for line in lines]
    while fields and not fields[-1]:
        fields.pop()
    head = [int(word) for word in fields[0] if word.isdecimal()] if fields else []
    if len(head) not in (1, 2) or len(head) != len(fields[0]) or min(head) < 1:
        raise ValueError(f"{path}, line 1: want the number of folds and of pairs of each kind, as `10 300`")
    folds, each = (1, *head)[-2:]
    if len(fields) != 1 + 2 * folds * each:
        raise ValueError(f"{path} has {len(fields) - 1} pairs; its first line wants {2 * folds * each}")
    pairs = []
    for number, words in enumerate(fields[1:]):
        same = number % (2 * each) < each
        image_words = [*words[:2], words[0], words[2]] if same and len(words) == 3 else words
        if len(words) != (3 if same else 4) or not (image_words[1] + image_words[3]).isdecimal():
            want = "name n m" if same else "name n name m"
            raise ValueError(f"{path}, line {number + 2}: {' '.join(words)!r}; want `{want}`")
        name, n, other, m = image_words
        pairs.append(((name, int(n)), (other, int(m)), same))
    first, second, kinds = (list(column) for column in zip(*pairs, strict=True))
    return PairList(first, second, np.array(kinds), folds)


def words_of(line: str) -> list[str]:
    """The fields of a line, separated by tabs if it has three or four so, else by any space."""
    words = [word.strip() for word in line.strip().split("\t")]
    return words if len(words) in (3, 4) else line.split()


def read_bin(path: str | Path) -> ImagePairs:
    """Reads a verification set of InsightFace, of pickle protocol 2 (from Python 2, too, whose bytes are str) or later.

    A pickle can run any code. So its opcodes are checked first: only those that build lists, tuples, bytes and
    booleans are allowed. Then it is read by an unpickler that looks up no class and no function.

    Args:
        path: of the file.

    Returns:
        2 P encoded images, and same [P].

    Raises:
        ValueError: anything else than such a set.
        OSError: as `open`.
    """
    try:
        content = _unpickle(Path(path).read_bytes())
    except (*DAMAGE, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no verification set: {error}") from error
    if not isinstance(content, list | tuple) or len(content) != 2 or not all(isinstance(x, list) for x in content):
        raise ValueError(f"{path} is no verification set: want (images, same), two lists")
    images, same = content
    if not all(isinstance(image, bytes) for image in images) or not all(flag in (0, 1) for flag in same):
        raise ValueError(f"{path} is no verification set: want encoded images as bytes, and booleans")
    if not same or len(images) != 2 * len(same):
        raise ValueError(f"{path} has {len(images)} images for {len(same)} pairs; want two for each, one pair or more")
    return ImagePairs(images, np.array(same, bool))


def _unpickle(data: bytes) -> Any:
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name not in ADMITTED:
            raise pickle.UnpicklingError(f"its pickle has the instruction {instruction.name}, which is not admitted")
        if "PUT" in instruction.name and (argument or 0) > len(data):  # the unpickler allocates as many
            raise pickle.UnpicklingError(f"its pickle would fill a table of {argument} objects")
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is not admitted")
