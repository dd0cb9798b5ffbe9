"""From a text file to examples, and what is said of files that are none."""

import hashlib
from pathlib import Path

import pytest
import torch

from fused.makemore import data
from fused.makemore.errors import InputError

CPU = torch.device("cpu")


def write(tmp_path, text: str | bytes) -> str:
    path = tmp_path / "words.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_the_notebooks_examples(names_file) -> None:
    dataset = data.load(str(names_file), 3, CPU)
    assert dataset.words == 32033
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (182625, 22655, 22866)
    assert dataset.vocabulary == ".abcdefghijklmnopqrstuvwxyz"


def test_the_packaged_names() -> None:
    dataset = data.load(None, 3, CPU)
    assert dataset.words == 5163
    assert dataset.vocabulary == ".abcdefghijklmnopqrstuvwxyz"


def test_contexts_slide_over_each_word(tmp_path) -> None:
    dataset = data.load(write(tmp_path, "ab\n" * 10), 3, CPU)
    assert dataset.train.x[:3].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert dataset.train.y[:3].tolist() == [1, 2, 0]
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (24, 3, 3)


def test_any_alphabet_line_ending_and_byte_order_mark(tmp_path) -> None:
    text = "\ufeff" + "\r\n".join(["æøå", " два ", "", "三"] * 5)
    path = write(tmp_path, text)
    dataset = data.load(path, 2, CPU)
    assert dataset.words == 15
    assert dataset.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert dataset.vocabulary == "." + "".join(sorted("æøåдва三"))


BAD = {
    "empty": (b"", "is empty"),
    "blank lines": (b"\n \n", "is empty"),
    "not UTF-8": (b"abc\n\xff\xfe\n", r"is not UTF-8 text \(byte 4\)"),
    "terminator": (b"anna\nst.john\n", r"word 2, 'st\.john', contains '\.'"),
    "too few": (b"anna\nbob\n", r"has 2 word\(s\), too few"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, tmp_path) -> None:
    content, message = BAD[case]
    with pytest.raises(InputError, match=message):
        data.load(write(tmp_path, content), 3, CPU)


def test_missing_file_and_folder(tmp_path) -> None:
    with pytest.raises(InputError, match="cannot read .*No such file"):
        data.load(str(tmp_path / "nothing.txt"), 3, CPU)
    with pytest.raises(InputError, match="cannot read .*directory"):
        data.load(str(tmp_path), 3, CPU)
