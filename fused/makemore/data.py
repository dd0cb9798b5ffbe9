"""Words in, training examples out: a context of characters and the character that follows."""

import hashlib
import importlib.resources
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused.makemore.errors import InputError

TERMINATOR = "."
PACKAGED = "us-census-1990-given-names.txt"
SHUFFLE_SEED = 42
_MOST_NUMBERS = 2**28  # of all contexts, 2 GB


@dataclass(frozen=True)
class Split:
    """Examples: contexts x (N, T) and next characters y (N,), as indices into the vocabulary."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(self.x.to(device), self.y.to(device))

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Dataset:
    """Shuffled words, cut at 80% and 90% into training, validation and test examples."""

    source: str  # the path that was read, or the name of the packaged file
    sha256: str  # of the file's bytes
    words: int
    vocabulary: str  # character i has index i; the terminator is 0
    train: Split
    val: Split
    test: Split


def load(path: str | None, context: int, device: torch.device) -> Dataset:
    """Reads a text file with one word a line (the packaged names if path is None).

    Words are stripped of surrounding white space and empty lines are skipped. Raises InputError
    where the file cannot be read, is not UTF-8, has no words, too few to fill three splits, or a
    word with the terminator in it, or more contexts than memory is for.
    """
    source, raw = _read(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text (byte {error.start})") from None
    words = [word for line in text.splitlines() if (word := line.strip())]
    if not words:
        raise InputError(f"{source} is empty: expected one word a line")
    for number, word in enumerate(words, 1):
        if TERMINATOR in word:
            raise InputError(
                f"{source}: word {number}, {word!r}, contains {TERMINATOR!r}, "
                "which marks the end of a word"
            )
    vocabulary = TERMINATOR + "".join(sorted(set("".join(words))))
    examples = sum(len(word) + 1 for word in words)
    if examples * context > _MOST_NUMBERS:
        raise InputError(
            f"--context {context}: more than memory is for; expected at most "
            f"{_MOST_NUMBERS // examples} characters for the {examples} examples of {source}"
        )
    random.Random(SHUFFLE_SEED).shuffle(words)
    first, second = int(0.8 * len(words)), int(0.9 * len(words))
    if not 0 < first < second < len(words):
        raise InputError(
            f"{source} has {len(words)} word(s), too few to split into training, validation and "
            "test words: expected at least 10"
        )
    cuts = (words[:first], words[first:second], words[second:])
    index = {character: i for i, character in enumerate(vocabulary)}
    train, val, test = (_examples(cut, index, context).to(device) for cut in cuts)
    sha256 = hashlib.sha256(raw).hexdigest()
    return Dataset(source, sha256, len(words), vocabulary, train, val, test)


def _read(path: str | None) -> tuple[str, bytes]:
    if path is None:
        folder = importlib.resources.files("fused.makemore") / "data"
        return PACKAGED, (folder / PACKAGED).read_bytes()
    try:
        return path, Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _examples(words: list[str], index: dict[str, int], context: int) -> Split:
    x, y = [], []
    for word in words:
        window = [0] * context
        for character in word + TERMINATOR:
            x.append(window)
            y.append(index[character])
            window = [*window[1:], y[-1]]
    return Split(torch.tensor(x), torch.tensor(y))
