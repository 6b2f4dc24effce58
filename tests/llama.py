"""A small Llama from transformers, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vision import define_operators


def write_llama(folder: Path, model: Any = None) -> None:
    """Save a Llama, a small one by default, and a tokenizer of the words ``w0`` to ``w63``."""
    library = define_operators()
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if model is None:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
            )
        )  # fmt: skip
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    del library
