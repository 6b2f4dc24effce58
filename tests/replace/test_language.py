"""Language models and texts from the disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mumoe_tensor.replace.language import load_language_model, read_texts, windows, write_texts  # noqa: E402


def test_a_saved_model_is_loaded_with_its_tokenizer(saved_llama: Path, llama: Any) -> None:
    model, tokenizer = load_language_model(saved_llama)
    ids = torch.tensor([tokenizer("w3 w5 w1")["input_ids"]])
    assert ids.tolist() == [[3, 5, 1]]
    assert not model.training and next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)
    llama.bfloat16().save_pretrained(saved_llama)
    assert next(load_language_model(saved_llama)[0].parameters()).dtype == torch.float32


def test_a_torchvision_that_does_not_fit_is_named(
    saved_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(ImportError, match=r"must match the build of torch.*nms does not exist"):
        load_language_model(saved_llama)


def test_what_is_no_model_is_refused(tmp_path: Path, transformers: Any) -> None:
    with pytest.raises(NotADirectoryError, match="there is no folder"):
        load_language_model(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"must contain config.json or a \*.gguf file"):
        load_language_model(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"exactly one .*gguf file; .* has 2"):
        load_language_model(tmp_path)


def test_texts_come_back_from_a_file_and_from_a_folder(tmp_path: Path) -> None:
    texts = ["one\ntwo", "“three”"]
    write_texts(tmp_path / "texts.jsonl", texts)
    assert read_texts(tmp_path / "texts.jsonl") == texts
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    assert read_texts(tmp_path) == texts


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="texts must have documents"):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "a text must not be empty"),
        ('{"text": "a"}\n{"words": 3}', "line 2 must have a string under the key 'text'"),
        ('{"text": 3}', "line 1 must have a string under the key 'text', got 3"),
        ("plain text", "texts.jsonl"),
        ('{"text": "a"}\n\n{"text": "b"}', "line 2: it must be JSON"),
        ("[1]", "texts.jsonl"),
    ],
)
def test_a_file_without_texts_is_refused(tmp_path: Path, content: str, error: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=error):
        read_texts(path)


def test_windows_cut_documents_and_leave_the_rest() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    tokens, documents = windows(["1 2 3 4 5", "6", "7 8"], tokenizer, 2)
    assert [each.tolist() for each in tokens] == [[1, 2], [3, 4], [7, 8]]
    assert documents == (0, 0, 2)
    with pytest.raises(ValueError, match="at least 6 tokens"):
        windows(["1 2 3 4 5"], tokenizer, 6)
    with pytest.raises(TypeError, match="sequence of strings, got one string"):
        windows("1 2 3", tokenizer, 2)
    with pytest.raises(ValueError, match="context must be positive"):
        windows(["1"], tokenizer, 0)


def test_a_text_with_line_ends_of_unicode_is_one_line(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.jsonl", ["a\u2028b"])
    (tmp_path / "raw.jsonl").write_text(
        json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert read_texts(tmp_path / "texts.jsonl") == read_texts(tmp_path / "raw.jsonl") == ["a\u2028b"]
