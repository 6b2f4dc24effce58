"""GPT-2 without biases, with dense MLPs or with experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_positive
from mumoe_tensor.models.blocks import (
    DENSE,
    StochasticDepth,
    check_config,
    dense_block,
    drop_probabilities,
    expert_block,
)
from mumoe_tensor.nn.experts import Init
from mumoe_tensor.nn.functional import is_eager_on_cpu
from mumoe_tensor.nn.gate import GateNorm
from mumoe_tensor.nn.watch import evaluating, watch_coefficients


@dataclass(frozen=True)
class GPT2Config:
    """The config of a `GPT2`. The default sizes are those of GPT-2 with 124M parameters.

    Attributes
    ----------
    vocabulary : int
        Size of the vocabulary.
    context : int
        Maximum number of tokens in the context.
    width : int
        Token width.
    depth : int
        Number of blocks.
    heads : int
        Number of attention heads, which must divide `width`.
    hidden : int
        Hidden size of an MLP.
    dropout : float
        Dropout probability of attention weights, branch outputs and embeddings.
    format : str or dict
        Format of the experts: its name, or a dict with its name and settings. ``"mlp"`` is a model without
        experts, which ignores the following fields except `stochastic_depth`.
    experts : tuple of int
        Number of experts at each level.
    rank : tuple of int or None
        One entry per bond of the format. None solves for the rank: the block's number of parameters is then
        closest to that of the dense block, including norms.
    gate, gate_norm, init
        As in `.nn.MuMoE`. In training, batch norm computes its statistics over all tokens, including later
        ones.
    stochastic_depth : float
        Probability of dropping a branch of the last block for a row in training; it decreases linearly for
        earlier blocks.

    Raises
    ------
    ValueError, TypeError
        If a value is invalid, or the heads do not divide the width.
    """

    vocabulary: int = 50304
    context: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    dropout: float = 0.0
    format: str | dict[str, Any] = DENSE
    experts: tuple[int, ...] = (256,)
    rank: tuple[int, ...] | None = None
    gate: str = "entmax15"
    gate_norm: GateNorm = "layer"
    init: Init = "linear"
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "context", "width", "depth", "heads", "hidden")
        check_config(self, sizes, ("dropout", "stochastic_depth"), ranks=("rank",))
        if self.width % self.heads:
            raise ValueError(
                f"heads must divide the width; width={self.width} is not a multiple of heads={self.heads}."
            )


class GPT2(nn.Module):
    """GPT-2: a transformer that predicts the next token, with pre-norm and GELU, without biases.

    The output layer is tied to the token embedding (Radford et al., 2019). A dense MLP follows a layer norm.
    An MLP of experts has biases and its own input norm, so the input of its gate is the residual stream
    (Oldfield et al., 2024). Dense weights are initialised with standard deviation 0.02, or 0.02 / √(2 depth)
    at the end of a branch.

    Parameters
    ----------
    config : GPT2Config
    device : torch.device or str, optional
        ``"meta"`` for a model without values.

    Attributes
    ----------
    config : GPT2Config
        The config, including the rank that was solved for.

    References
    ----------
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    Examples
    --------
    >>> import torch
    >>> sizes = dict(vocabulary=100, context=8, width=32, depth=2, heads=4, hidden=128)
    >>> model = GPT2(GPT2Config(**sizes, format="tr", experts=(4, 4)))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 100])
    >>> model.config.rank
    (4, 4, 4, 6)
    """

    def __init__(self, config: GPT2Config, device: torch.device | str | None = None):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width, device=device)
        self.position_embedding = nn.Embedding(config.context, config.width, device=device)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            GPT2Block(config, probability, device)
            for probability in drop_probabilities(config.stochastic_depth, config.depth)
        )
        self.norm = nn.LayerNorm(config.width, bias=False, device=device)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        if config.format != DENSE:
            first: Any = self.blocks[0]
            config = replace(config, rank=first.mlp.config["rank"])
        self.config = config

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at each position.

        Parameters
        ----------
        tokens : Tensor of int64 of shape (rows, tokens)

        Returns
        -------
        Tensor of shape (rows, tokens, vocabulary)

        Raises
        ------
        ValueError
            If a row has more tokens than the context, or a token is not in the vocabulary. A compiled model
            does not check the latter, which causes a device-side assertion on CUDA.
        """
        self._check(tokens)
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"a row must have at most context = {self.config.context} tokens, got {tokens.shape[1]}."
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(self.norm(x), self.token_embedding.weight)

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "tokens must be integers (int64) of shape (rows, tokens), at least one row and token, got "
                f"{tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        # Only if values can be read without waiting for a device.
        if not is_eager_on_cpu(tokens):
            return
        least, most = (int(x) for x in tokens.aminmax())
        if least < 0 or most >= self.config.vocabulary:
            raise ValueError(
                f"tokens must be from 0 to {self.config.vocabulary - 1}, got values from {least} to {most}."
            )

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        steps: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        return_coefficients: bool = False,
    ) -> Any:
        """Continue rows of tokens by sampling one token at a time, in evaluation mode.

        Parameters
        ----------
        tokens : Tensor of int64 of shape (rows, tokens)
            The start of each row. If it is longer than the context, the last tokens are used.
        steps : int
            Number of tokens to add to each row.
        temperature : float, default 1
            Logits are divided by the temperature; 0 selects the most probable token.
        top_k : int, optional
            Sample only from this number of most probable tokens.
        generator : torch.Generator, optional
            A generator on the device of the model; by default torch's generator.
        return_coefficients : bool, default False

        Returns
        -------
        Tensor of shape (rows, tokens + steps)
        dict
            Only with `return_coefficients`: see `coefficients`.

        Raises
        ------
        ValueError
            If tokens are missing or invalid, or an option is out of range.
        """
        self._check(tokens)
        as_positive(steps, "steps")
        if top_k is not None and not 1 <= top_k <= self.config.vocabulary:
            raise ValueError(
                f"top_k must be from 1 to the vocabulary of {self.config.vocabulary}, got {top_k}."
            )
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {temperature}.")
        with evaluating(self):
            for _ in range(steps):
                logits = self(tokens[:, -self.config.context :])[:, -1].float()
                if top_k is not None:
                    least = logits.topk(top_k).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                if temperature:
                    # The maximum becomes zero, so that small temperatures do not overflow.
                    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
                    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                else:
                    drawn = logits.argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, drawn.to(tokens.dtype)], 1)
        return (tokens, self.coefficients(tokens)) if return_coefficients else tokens

    @torch.no_grad()
    def coefficients(self, tokens: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Expert coefficients of every block for each token, in evaluation mode.

        The coefficients of a token are computed from the context that ends with this token.

        Parameters
        ----------
        tokens : Tensor of int64 of shape (rows, tokens)
            Any number of tokens. Each token beyond the context takes a separate forward pass.

        Returns
        -------
        dict of str to tuple of Tensor of shape (rows, tokens, N_e)
            One tensor per level, by name of the gate.

        Raises
        ------
        ValueError
            If the model has no experts, or a token is not in the vocabulary.
        """
        self._check(tokens)
        rows, count = tokens.shape
        context = self.config.context
        windows_of: dict[str, list[tuple[Tensor, ...]]] = {}
        with evaluating(self):
            for end in range(min(count, context), count + 1):
                window = tokens[:, max(end - context, 0) : end]
                # All tokens of the first window are new; in later windows only the last one is.
                new = slice(None) if end <= context else slice(-1, None)

                def keep(name: str, levels: tuple[Tensor, ...], new: slice = new) -> None:
                    parts = tuple(a.reshape(rows, -1, a.shape[-1])[:, new].clone() for a in levels)
                    windows_of.setdefault(name, []).append(parts)

                with watch_coefficients(self, keep):
                    self(window)
        return {
            name: tuple(torch.cat(parts, 1) for parts in zip(*windows, strict=True))
            for name, windows in windows_of.items()
        }


class GPT2Block(nn.Module):
    """One block: attention and an MLP, each with a residual connection.

    `probability` is the probability of dropping a branch in training.
    """

    def __init__(self, config: GPT2Config, probability: float, device: torch.device | str | None):
        super().__init__()
        width, hidden, dropout = config.width, config.hidden, config.dropout
        std, last = 0.02, 0.02 / (2 * config.depth) ** 0.5
        self.attention_norm = nn.LayerNorm(width, bias=False, device=device)
        self.attention = CausalAttention(width, config.heads, dropout, device)
        nn.init.normal_(self.attention.inputs.weight, std=std)
        nn.init.normal_(self.attention.output.weight, std=last)
        self.mlp_norm: nn.Module
        self.mlp: Any
        if config.format == DENSE:
            self.mlp_norm = nn.LayerNorm(width, bias=False, device=device)
            self.mlp = dense_block(width, hidden, bias=False, dropout=dropout, device=device)
            nn.init.normal_(self.mlp.up.weight, std=std)
            nn.init.normal_(self.mlp.down.weight, std=last)
        else:
            # Experts have their own input norm. The budget is that of the dense MLP and its norm, minus the
            # scale and shift of the input norm.
            self.mlp_norm = nn.Identity()
            self.mlp = expert_block(
                width, hidden, experts=config.experts, format=config.format, rank=config.rank,
                parameters=2 * width * hidden + width - 2 * width, gate=config.gate,
                gate_norm=config.gate_norm, init=config.init, input_norm=True, dropout=dropout, device=device,
            )  # fmt: skip
        self.drop = StochasticDepth(probability)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream after the block, of shape (rows, tokens, width) like the input."""
        x = x + self.drop(self.attention(self.attention_norm(x)))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class CausalAttention(nn.Module):
    """Causal multi-head attention, with dropout of the attention weights and of the outputs."""

    def __init__(self, width: int, heads: int, dropout: float, device: torch.device | str | None):
        super().__init__()
        self.heads, self.probability = heads, dropout
        self.inputs = nn.Linear(width, 3 * width, bias=False, device=device)
        self.output = nn.Linear(width, width, bias=False, device=device)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of shape (rows, tokens, width) to one of the same shape."""
        rows, tokens, width = x.shape
        parts = self.inputs(x).reshape(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.probability if self.training else 0.0
        )
        y: Tensor = self.dropout(self.output(mixed.transpose(1, 2).reshape(rows, tokens, width)))
        return y
