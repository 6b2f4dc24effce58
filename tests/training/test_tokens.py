"""Byte pairs and files of tokens: ids are those of GPT-2, text comes back, windows follow one another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402

from mumoe_tensor.training import tokens as module  # noqa: E402
from mumoe_tensor.training.tokens import TokenData, Tokenizer, Tokens, tokenize, write_tokens  # noqa: E402

#: Merges of a small vocabulary, in order; "Ġ" is a space.
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("b", "e"), ("Ġ", "be")]
REAL = Path(__file__).parents[2] / "data" / "gpt2-vocabulary"


def write_vocabulary(folder: Path) -> Path:
    """Files as those of GPT-2, of few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    ids |= {a + b: 256 + k for k, (a, b) in enumerate(MERGES)}
    (folder / "encoder.json").write_text(json.dumps({**ids, "<|endoftext|>": len(ids)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in MERGES), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


def bin_of(path: Path, ids: object) -> Path:
    path.write_bytes(np.asarray(ids, "<u2").tobytes())
    return path


# ---- byte pairs -------------------------------------------------------------------------------------------


def test_a_prefix_of_the_merges_is_a_vocabulary_of_its_own(vocabulary: Path) -> None:
    whole, some = Tokenizer(vocabulary), Tokenizer(vocabulary, 259)
    assert (whole.vocabulary, whole.end) == (262, 261) and (some.vocabulary, some.end) == (259, 258)
    assert whole.encode("the the be") == [257, 258, 260]
    # Two merges are left: "the" is one token still, " the" no more.
    space = whole.encode(" ")
    b, e = whole.encode("b") + whole.encode("e")
    assert some.encode("the the be") == [257, *space, 257, *space, b, e]
    assert max(Tokenizer(vocabulary, 257).encode("the the be")) < 256


@pytest.mark.parametrize("size", [257, 260, None])
@given(text=st.text(max_size=40))
@settings(max_examples=30)
def test_text_comes_back(text: str, size: int | None, vocabulary: Path) -> None:
    pairs = Tokenizer(vocabulary, size)
    for given_text in (text, text + "<|endoftext|> the\r\n\u2028 the"):
        ids = pairs.encode(given_text)
        assert pairs.decode(ids) == given_text
        assert all(0 <= i < pairs.end for i in ids), "the end of a text is no part of one"


@pytest.mark.parametrize("size", [256, 263, 0])
def test_a_vocabulary_has_the_bytes_and_some_of_the_merges(size: int, vocabulary: Path) -> None:
    with pytest.raises(ValueError, match=f"256 bytes.*5 merges; got {size} ids"):
        Tokenizer(vocabulary, size)


def test_ids_out_of_the_vocabulary_are_no_text(vocabulary: Path) -> None:
    assert [Tokenizer(vocabulary, size).decode([size - 1]) for size in (257, 259, 262)] == [
        "<|endoftext|>"
    ] * 3
    with pytest.raises(ValueError, match="from 0 to 258, got 259"):
        Tokenizer(vocabulary, 259).decode([3, 259])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("encoder.json", "[3]", r"encoder\.json: it must be a JSON object, got \[3\]"),
        ("encoder.json", "{", r"encoder\.json: it must be JSON: .*line 1"),
        (
            "vocab.bpe",
            "#version\nt h\nb e\n",
            r"encoder\.json: ids must be the bytes, then the merges in the order of",
        ),
        (
            "vocab.bpe",
            "#version\nth e\nt h\nĠ the\nb e\nĠ be\n",
            r"encoder\.json: ids must be the bytes, then the merges in the order of",
        ),
    ],
)
def test_files_that_are_no_vocabulary(name: str, content: str, message: str, tmp_path: Path) -> None:
    (write_vocabulary(tmp_path) / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="make data has not fetched gpt2-vocabulary")
def test_ids_are_those_of_gpt2() -> None:
    whole, some = Tokenizer(REAL), Tokenizer(REAL, 8192)
    assert (whole.vocabulary, whole.end) == (50_257, 50_256)
    assert whole.encode("Hello world") == [15496, 995]
    text = "O, that this too too solid flesh would melt, thaw, and resolve itself into a dew!\n" * 3
    few, many = whole.encode(text), some.encode(text)
    assert max(many) < some.end == 8191 and len(few) < len(many) and some.decode(many) == text
    # A word whose every merge is among the first is the same in both.
    assert some.encode(" the world") == whole.encode(" the world")


# ---- files ------------------------------------------------------------------------------------------------


def test_tokens_of_texts_with_their_ends(vocabulary: Path, tmp_path: Path) -> None:
    pairs = Tokenizer(vocabulary)
    assert write_tokens(["the the", "", "be"], pairs, tmp_path / "new" / "t.bin") == [3, 1, 2]
    content = (tmp_path / "new" / "t.bin").read_bytes()
    assert content == b"".join(i.to_bytes(2, "little") for i in (257, 258, 261, 261, 259, 261))


def test_a_text_that_fails_leaves_no_file(vocabulary: Path, tmp_path: Path) -> None:
    def texts():
        yield "the"
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        write_tokens(texts(), Tokenizer(vocabulary), tmp_path / "t.bin")
    assert list(tmp_path.iterdir()) == []


def test_windows_follow_one_another_and_labels_are_one_ahead(tmp_path: Path) -> None:
    tokens = Tokens(bin_of(tmp_path / "t.bin", range(100, 115)), context=4)
    assert len(tokens) == 3  # the label of the last token of a fourth would be beyond the file
    x, y = tokens.batch(torch.tensor([2, 0]))
    assert x.dtype == y.dtype == torch.int64
    assert x.tolist() == [[108, 109, 110, 111], [100, 101, 102, 103]]
    assert y.tolist() == [[109, 110, 111, 112], [101, 102, 103, 104]]
    for count, windows in ((15, 3), (16, 3), (17, 4)):
        assert len(Tokens(bin_of(tmp_path / "t.bin", range(count)), context=4)) == windows


@pytest.mark.parametrize(("chunk", "place"), [(4, 9), (4, 0), (4, 3), (100, 9), (5, 5)])
def test_the_largest_id_of_a_file(
    chunk: int, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    ids = np.arange(10)
    ids[place] = 65_535
    assert Tokens(bin_of(tmp_path / "t.bin", ids), 2).largest == 65_535


def test_files_that_have_no_window(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"a token has 2 bytes, but .*odd\.bin has 3"):
        Tokens(tmp_path / "odd.bin", 1)
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the token after it; .*empty\.bin has 0 tokens"):
        Tokens(tmp_path / "empty.bin", 1)
    with pytest.raises(ValueError, match=r"a window of 4 tokens and the token after it; .* has 4"):
        Tokens(bin_of(tmp_path / "t.bin", range(4)), 4)
    with pytest.raises(ValueError, match="context must be positive, got 0"):
        Tokens(tmp_path / "t.bin", 0)
    with pytest.raises(FileNotFoundError):
        Tokens(tmp_path / "none.bin", 4)


def test_ids_that_a_model_does_not_know(tmp_path: Path) -> None:
    paths = [str(bin_of(tmp_path / name, ids)) for name, ids in (("a", range(9)), ("b", [0, 1, 9, 0]))]
    for training, validation in (paths, paths[::-1]):
        with pytest.raises(ValueError, match=r"ids must be from 0 to 8, .*; .*b has 9"):
            TokenData(training, validation).read(2, vocabulary=9)
        first, second = TokenData(training, validation).read(2, vocabulary=10)
        assert (str(first.path), str(second.path)) == (training, validation)


# ---- folders of texts -------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in {"a_1": "the", "a_2": "the the", "b_1": "be", "c": "the be"}.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "notes.md").write_text("not a text")
    return folder


def test_files_are_parted_by_their_names(texts: Path, vocabulary: Path, tmp_path: Path) -> None:
    pairs, out = Tokenizer(vocabulary), tmp_path / "out"
    # (A file that is named and in the folder is there once.)
    content = tokenize([texts, texts / "a_1.txt"], pairs, out, hold_out=["a_*"], leave_out=["c*"])
    assert content == {
        "vocabulary": 262,
        "training": [{"file": "b_1.txt", "tokens": 2}],
        "validation": [{"file": "a_1.txt", "tokens": 2}, {"file": "a_2.txt", "tokens": 3}],
    }
    assert json.loads((out / "tokens.json").read_text()) == content
    assert np.fromfile(out / "training.bin", "<u2").tolist() == [259, 261]
    assert np.fromfile(out / "validation.bin", "<u2").tolist() == [257, 261, 257, 258, 261]


@pytest.mark.parametrize(
    ("hold_out", "leave_out", "message"),
    [
        (["z*"], [], "'z\\*' matches none"),
        (["c*"], ["z*"], "'z\\*' matches none"),
        (["*"], [], "training has none"),
        ([], [], "validation has none"),
        (["c*"], ["c*"], "validation has none"),
    ],
)
def test_patterns_that_part_nothing(
    hold_out: list[str], leave_out: list[str], message: str, texts: Path, vocabulary: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize([texts], Tokenizer(vocabulary), tmp_path / "out", hold_out=hold_out, leave_out=leave_out)
    assert not (tmp_path / "out").exists()


def test_sources_without_text(texts: Path, vocabulary: Path, tmp_path: Path) -> None:
    pairs, out = Tokenizer(vocabulary), tmp_path / "out"
    tokenize([texts], pairs, out, hold_out=["c*"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (texts / "c.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"c\.txt: a text must be UTF-8"):
        tokenize([texts], pairs, out, hold_out=["c*"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(ValueError, match=r"must contain \*\.txt files"):
        tokenize([vocabulary], Tokenizer(vocabulary), tmp_path / "out", hold_out=["c*"])
