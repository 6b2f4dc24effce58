"""A language model from transformers, small enough for every test, and texts of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama import write_llama

torch = pytest.importorskip("torch")


@pytest.fixture
def llama(transformers: Any) -> Any:
    """A Llama with random weights, large enough that no module is without an effect on the loss."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def texts() -> list[Any]:
    """Documents of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (length,), generator=generator) for length in (7, 12, 2, 7, 7, 5, 12, 9)]


@pytest.fixture
def saved_llama(llama: Any, tmp_path: Path) -> Path:
    """Its folder, with a tokenizer of the words ``w0`` to ``w63``."""
    write_llama(tmp_path / "llama", llama)
    return tmp_path / "llama"
