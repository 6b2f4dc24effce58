"""This library's GPT-2 compared with that of transformers: ``python -m benchmarks.gpt2``.

Both have the same sizes, but GPT-2 in transformers always has biases in linear layers and norms. With
experts, its MLPs are replaced by the same blocks. Reports tokens per second of a forward pass and of a
training step (forward and backward), as medians over rounds in which the models take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from mumoe_tensor.measure.passes import forward
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.models import GPT2, GPT2Config
from mumoe_tensor.nn import replace_mlp

SIZES = dict(vocabulary=4096, context=128, width=256, depth=4, heads=4, hidden=1024)
ROWS, ROUNDS, EXPERTS = 4, 9, 64


def ours(format: str) -> Callable[[Any], Any]:
    return GPT2(GPT2Config(**SIZES, format=format, experts=(EXPERTS,)))


def theirs(format: str) -> Callable[[Any], Any]:
    # transformers imports torchvision, which lacks these operators with a build of torch it does not match.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import transformers

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=SIZES["vocabulary"], n_positions=SIZES["context"], n_embd=SIZES["width"],
            n_layer=SIZES["depth"], n_head=SIZES["heads"], n_inner=SIZES["hidden"],
            activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip
    if format != "mlp":
        replace_mlp(model, "transformer.h.*.mlp", experts=EXPERTS, format=format, gate_norm="layer")
    model.train()
    return lambda tokens: model(tokens).logits


def main() -> None:
    tokens = torch.randint(SIZES["vocabulary"], (ROWS, SIZES["context"]))
    print(f"{SIZES}, {ROWS} rows, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for format in ("mlp", "cp", "tr"):
        torch.manual_seed(0)
        models = {"ours": ours(format), "transformers": theirs(format)}

        def step(model: Callable[[Any], Any]) -> None:
            cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

        for kind in ("forward", "step"):
            calls = {
                name: partial(step, model) if kind == "step" else forward(model, tokens)
                for name, model in models.items()
            }
            times = compare(calls, "ours", rounds=ROUNDS, limit=60)
            speeds = ", ".join(f"{name} {tokens.numel() / times.spread(name).median:,.0f}" for name in models)
            print(f"{format:>4} {kind:>8}: {speeds} tokens per second")


if __name__ == "__main__":
    main()
