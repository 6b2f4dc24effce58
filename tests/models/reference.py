"""Both models once more, in functions that spell the equations out, with every expert's matrix formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

import mumoe_tensor as mt
from mumoe_tensor.nn import MuMoEMLP


def norm(x: Tensor, module: Any) -> Tensor:
    return layer_norm(x, x.shape[-1:], module.weight, module.bias)


def coefficients(block: MuMoEMLP, x: Tensor) -> list[Tensor]:
    """Softmax, so that no code of the library is needed, over logits that are normed over experts or not."""
    assert block.config["gate"] == "softmax" and block.config["gate_norm"] in ("layer", "none")
    levels = (x @ block.gate.weight.T).split(block.config["experts"], -1)
    if block.config["gate_norm"] == "layer":
        levels = tuple(layer_norm(level, level.shape[-1:]) for level in levels)
    return [level.softmax(-1) for level in levels]


def mix(weight: Any, levels: list[Tensor], z: Tensor) -> Tensor:
    """Sum over the experts n of their joint coefficient times ``W_nᵀ (z, 1)``."""
    matrices = torch.as_tensor(mt.to_dense(weight))
    z = torch.cat([z, torch.ones_like(z[..., :1])], -1)
    if len(levels) == 1:
        return torch.einsum("rtn,rti,nio->rto", levels[0], z, matrices)
    return torch.einsum("rtn,rtm,rti,nmio->rto", *levels, z, matrices)


def mlp(block: Any, x: Tensor) -> Tensor:
    if not isinstance(block, MuMoEMLP):
        hidden = gelu(nn.functional.linear(x, block.up.weight, block.up.bias))
        return nn.functional.linear(hidden, block.down.weight, block.down.bias)
    levels = coefficients(block, x)
    z = norm(x, block.input_norm) if block.input_norm else x
    return mix(block.down.weight, levels, gelu(mix(block.up.weight, levels, z)))


def mixer(model: Any, images: Tensor) -> Tensor:
    config = model.config
    size, count = config.patch, config.image_size // config.patch
    patches = [
        images[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size].flatten(1)
        for row in range(count)
        for column in range(count)
    ]
    x = torch.stack(patches, 1) @ model.patches.weight.flatten(1).T + model.patches.bias
    for block in model.blocks:
        x = x + mlp(block.token_mlp, norm(x, block.token_norm).mT).mT
        x = x + mlp(block.channel_mlp, norm(x, block.channel_norm))
    return norm(x, model.norm).mean(1) @ model.head.weight.T + model.head.bias


def attention(module: Any, x: Tensor) -> Tensor:
    query, key, value = (x @ module.inputs.weight.T).chunk(3, -1)
    size = x.shape[-1] // module.heads
    results = []
    for head in range(module.heads):
        q, k, v = (part[..., head * size : (head + 1) * size] for part in (query, key, value))
        scores = q @ k.mT / size**0.5
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        results.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
    return torch.cat(results, -1) @ module.output.weight.T


def gpt2(model: Any, tokens: Tensor) -> Tensor:
    x = model.token_embedding.weight[tokens] + model.position_embedding.weight[: tokens.shape[1]]
    for block in model.blocks:
        x = x + attention(block.attention, norm(x, block.attention_norm))
        is_dense = isinstance(block.mlp_norm, nn.LayerNorm)
        x = x + mlp(block.mlp, norm(x, block.mlp_norm) if is_dense else x)
    return norm(x, model.norm) @ model.token_embedding.weight.T
