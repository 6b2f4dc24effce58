"""MLP-Mixer with dense MLPs or with experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.models.blocks import (
    DENSE,
    StochasticDepth,
    check_config,
    dense_block,
    drop_probabilities,
    expert_block,
)
from mumoe_tensor.nn.experts import Init
from mumoe_tensor.nn.gate import GateNorm


@dataclass(frozen=True)
class MixerConfig:
    """The config of a `Mixer`.

    Attributes
    ----------
    image_size : int
        Height and width of images.
    channels : int
        Number of channels of an image: 1 for greyscale, 3 for colour.
    patch : int
        Height and width of a patch, which is one token.
    width : int
        Token width.
    depth : int
        Number of blocks.
    token_hidden, channel_hidden : int
        Hidden sizes of the token-mixing and the channel-mixing MLP.
    classes : int
    format : str or dict
        Format of the experts: its name, or a dict with its name and settings. ``"mlp"`` is a model without
        experts, which ignores the following fields except `stochastic_depth`.
    experts : tuple of int
        Number of experts at each level.
    token_rank, channel_rank : tuple of int or None
        One entry per bond of the format. None solves for the rank: the MLP's number of parameters is then
        closest to that of the dense MLP.
    gate, gate_norm, init
        As in `.nn.MuMoE`.
    stochastic_depth : float
        Probability of dropping a branch of the last block for an image in training; it decreases linearly for
        earlier blocks.

    Raises
    ------
    ValueError, TypeError
        If a value is invalid, or patches do not tile an image.
    """

    image_size: int = 28
    channels: int = 1
    patch: int = 7
    width: int = 128
    depth: int = 4
    token_hidden: int = 64
    channel_hidden: int = 512
    classes: int = 10
    format: str | dict[str, Any] = DENSE
    experts: tuple[int, ...] = (64,)
    token_rank: tuple[int, ...] | None = None
    channel_rank: tuple[int, ...] | None = None
    gate: str = "entmax15"
    gate_norm: GateNorm = "batch"
    init: Init = "linear"
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("image_size", "channels", "patch", "width", "depth", "token_hidden", "channel_hidden")
        check_config(self, (*sizes, "classes"), ("stochastic_depth",), ranks=("token_rank", "channel_rank"))
        if self.image_size % self.patch:
            raise ValueError(
                f"patches must tile an image; image_size={self.image_size} is not a multiple of "
                f"patch={self.patch}."
            )

    @property
    def tokens(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch) ** 2


class Mixer(nn.Module):
    """MLP-Mixer: an image classifier with layers that mix tokens and layers that mix channels.

    With X of shape (tokens, width), a block computes ``U = X + MLP(LayerNorm(X)ᵀ)ᵀ`` and then ``Y = U +
    MLP(LayerNorm(U))`` (Tolstikhin et al., 2021, equation 1). Both MLPs may have experts (Oldfield et al.,
    2024). The input of the first gate is then one channel over all tokens, and the input of the second gate
    is one token over all channels.

    Parameters
    ----------
    config : MixerConfig
    device : torch.device or str, optional
        ``"meta"`` for a model without values.

    Attributes
    ----------
    config : MixerConfig
        The config, including the ranks that were solved for.

    References
    ----------
    Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", NeurIPS 2021.

    Examples
    --------
    >>> import torch
    >>> model = Mixer(MixerConfig(format="cp", experts=(16,)))
    >>> model(torch.rand(2, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, config: MixerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.patches = nn.Conv2d(
            config.channels, config.width, config.patch, stride=config.patch, device=device
        )
        self.blocks = nn.ModuleList(
            MixerBlock(config, probability, device)
            for probability in drop_probabilities(config.stochastic_depth, config.depth)
        )
        self.norm = nn.LayerNorm(config.width, device=device)
        self.head = nn.Linear(config.width, config.classes, device=device)
        if config.format != DENSE:
            first: Any = self.blocks[0]
            config = replace(
                config,
                token_rank=first.token_mlp.config["rank"],
                channel_rank=first.channel_mlp.config["rank"],
            )
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images.

        Parameters
        ----------
        images : Tensor of floats of shape (rows, channels, image_size, image_size)
            The second axis may be omitted if there is one channel.

        Returns
        -------
        Tensor of shape (rows, classes)

        Raises
        ------
        ValueError
            If images have the wrong shape or an integer dtype.
        """
        size, channels = self.config.image_size, self.config.channels
        if images.ndim == 3 and channels == 1:
            images = images.unsqueeze(1)
        if images.shape[1:] != (channels, size, size) or not images.is_floating_point():
            raise ValueError(
                f"images must be floats of shape (rows, {channels}, {size}, {size}), got {images.dtype} of "
                f"shape {tuple(images.shape)}."
            )
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits


class MixerBlock(nn.Module):
    """One block: tokens are mixed in every channel, then channels in every token.

    `probability` is the probability of dropping a branch in training.
    """

    def __init__(self, config: MixerConfig, probability: float, device: torch.device | str | None):
        super().__init__()
        self.token_norm = nn.LayerNorm(config.width, device=device)
        self.token_mlp = _mlp(config, config.tokens, config.token_hidden, config.token_rank, device)
        self.channel_norm = nn.LayerNorm(config.width, device=device)
        self.channel_mlp = _mlp(config, config.width, config.channel_hidden, config.channel_rank, device)
        self.drop = StochasticDepth(probability)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map a tensor of shape (rows, tokens, width) to one of the same shape."""
        mixed = self.token_mlp(self.token_norm(tokens).transpose(1, 2)).transpose(1, 2)
        tokens = tokens + self.drop(mixed)
        return tokens + self.drop(self.channel_mlp(self.channel_norm(tokens)))


def _mlp(
    config: MixerConfig,
    features: int,
    hidden: int,
    rank: tuple[int, ...] | None,
    device: torch.device | str | None,
) -> nn.Module:
    if config.format == DENSE:
        return dense_block(features, hidden, device=device)
    return expert_block(
        features, hidden, experts=config.experts, format=config.format, rank=rank, gate=config.gate,
        gate_norm=config.gate_norm, init=config.init, device=device,
    )  # fmt: skip
