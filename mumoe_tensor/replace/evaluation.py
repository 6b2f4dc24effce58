"""The loss of a language model with one of its modules replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.labels import as_integers
from mumoe_tensor.analysis.losses import logits_of
from mumoe_tensor.interval import interval
from mumoe_tensor.nn.described import check_model
from mumoe_tensor.nn.watch import evaluating, module_of
from mumoe_tensor.replace.moments import Moments
from mumoe_tensor.replace.shards import check_text
from mumoe_tensor.replace.usage import counted, use_of

#: Maximum number of tokens in a batch of several texts. All logits of a batch are in memory together.
BATCH_TOKENS = 2048


class DocumentLosses(NamedTuple):
    """Next-token cross entropy of each text.

    Attributes
    ----------
    nats : Tensor of float64 of shape (texts,)
        Sum over the predicted tokens, which are all but the first.
    tokens : Tensor of int64 of shape (texts,)
        Number of predicted tokens.
    """

    nats: Tensor
    tokens: Tensor

    def of_documents(self, documents: Sequence[int]) -> DocumentLosses:
        """The sums over the texts of each document.

        Parameters
        ----------
        documents : sequence of int
            Index of the document of each text.

        Raises
        ------
        ValueError
            If there is not one index per text.
        """
        if len(documents) != len(self.tokens):
            raise ValueError(
                f"documents must have an index for each of {len(self.tokens)} texts, got {len(documents)}."
            )
        places = torch.tensor(documents).unique(return_inverse=True)[1]
        count = int(places.max()) + 1
        return DocumentLosses(*(x.new_zeros(count).index_add(0, places, x) for x in self))

    @property
    def mean(self) -> float:
        """Nats per token, over the tokens of all texts."""
        return float(self.nats.sum() / self.tokens.sum())


class Bounds(NamedTuple):
    """Bounds for replacements: losses of the intact model, and with a module's outputs replaced by zeros.

    Attributes
    ----------
    intact, zeroed : DocumentLosses
    """

    intact: DocumentLosses
    zeroed: DocumentLosses


@dataclass(frozen=True)
class Evaluation:
    """The faithfulness and sparsity of a layer that replaces a module; see `evaluate`.

    Attributes
    ----------
    losses : DocumentLosses
        Losses with the layer in place of the module.
    bounds : Bounds
        Bounds for the same texts.
    nmse : float
        Total squared error of the layer's outputs, divided by the total variance of the module's outputs.
        Both are computed from the inputs of the module in the intact model. Without a limit, a few tokens may
        account for nearly all of the variance.
    relative_error : float
        Mean of the squared error divided by the squared norm of the module's output, over the tokens with a
        nonzero norm.
    active : float or None
        Average number of experts per token with a nonzero coefficient, over all levels; None without
        experts.
    dead : tuple of int
        Experts whose coefficient is zero for every token. Levels are numbered consecutively.
    """

    losses: DocumentLosses
    bounds: Bounds
    nmse: float
    relative_error: float
    active: float | None
    dead: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return int(self.losses.tokens.sum())

    @property
    def ce(self) -> float:
        """Cross entropy with the layer in place of the module, in nats per token."""
        return self.losses.mean

    @property
    def ce_intact(self) -> float:
        """Cross entropy of the intact model, in nats per token."""
        return self.bounds.intact.mean

    @property
    def ce_zeroed(self) -> float:
        """Cross entropy with the module's outputs replaced by zeros, in nats per token."""
        return self.bounds.zeroed.mean

    @property
    def rises(self) -> Tensor:
        """Increase in the cross entropy of each text, in nats per token, of shape (texts,)."""
        return (self.losses.nats - self.bounds.intact.nats) / self.losses.tokens

    @property
    def rise(self) -> float:
        """Increase in cross entropy over the intact model, in nats per token."""
        return self.interval()[0]

    def of_documents(self, documents: Sequence[int]) -> Evaluation:
        """A copy with texts merged into documents, which become the units of the interval.

        Parameters
        ----------
        documents : sequence of int
            Index of the document of each text.
        """
        losses, *bounds = (each.of_documents(documents) for each in (self.losses, *self.bounds))
        return replace(self, losses=losses, bounds=Bounds(*bounds))

    def interval(self) -> tuple[float, float | None]:
        """The rise, and the half-width of its 95 % interval over texts, which is None for a single text.

        Texts are the sampling units, weighted by length: the interval is that of a ratio of two means, by
        linearisation.
        """
        tokens = self.losses.tokens
        rise = float((self.rises * tokens).sum() / tokens.sum())
        weights = tokens / tokens.double().mean()
        return rise, interval((rise + weights * (self.rises - rise)).tolist())[1]


@contextmanager
def splice(model: nn.Module, name: str, module: nn.Module | None) -> Iterator[None]:
    """A context in which one module of a model is replaced.

    A module with several names in the model is replaced under all of them. Contexts can be nested. The
    original module is restored on exit, even after an error.

    Parameters
    ----------
    model : Module
    name : str
        Name of the module to replace, as in ``model.named_modules()``.
    module : Module or None
        The replacement. None for zeros of the shape of the original outputs.

    Raises
    ------
    ValueError
        If the model has no such module.
    TypeError
        If the replacement is not a module.

    Examples
    --------
    >>> import torch
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.ones(1, 4)
    >>> with splice(model, "0", None):
    ...     model(x)
    tensor([[0., 0., 0., 0.]])
    """
    old = module_of(model, name)
    if not (module is None or isinstance(module, nn.Module)):
        raise TypeError(f"the replacement for {name!r} must be a torch.nn.Module or None, got {module!r}.")
    names = [other for other, each in model.named_modules(remove_duplicate=False) if each is old]
    try:
        for each in names:
            model.set_submodule(each, Replaced(old, None) if module is None else module)
        yield
    finally:
        for each in names:
            model.set_submodule(each, old)


class Replaced(nn.Module):
    """A layer in place of a module, except that outputs of the module larger than a limit are kept.

    Parameters
    ----------
    module : Module
        The replaced module.
    layer : Module or None
        The replacement; None for zeros.
    limit : float, default inf
        Outputs of the module with a larger norm are kept; see `.ActivationRows.median_norm`.
    """

    def __init__(self, module: nn.Module, layer: nn.Module | None, limit: float = inf):
        super().__init__()
        self.module, self.layer, self.limit = module, layer, limit

    def forward(self, x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        y: Tensor = self.module(x, *inputs, **named)
        if not isinstance(y, Tensor):
            raise TypeError(f"a module to replace must return a tensor, got {type(y).__name__}.")
        output = torch.zeros_like(y) if self.layer is None else self.layer(x, *inputs, **named)
        if output.shape != y.shape:  # otherwise they would be broadcast
            raise ValueError(
                f"a layer must return outputs of the module's shape, {tuple(y.shape)}; got "
                f"{tuple(output.shape)}."
            )
        if self.limit == inf:
            return self._compared(y, output)
        is_large = y.norm(dim=-1, dtype=torch.promote_types(y.dtype, torch.float32)) > self.limit
        self._compared(y[~is_large], output[~is_large])
        return torch.where(is_large.unsqueeze(-1), y, output)

    def _compared(self, y: Tensor, output: Tensor) -> Tensor:
        """Combine the outputs of the layer and of the module."""
        return output


class _Compared(Replaced):
    """Accumulates the errors of the layer.

    The inputs are those of the intact model, since no earlier module has been replaced.
    """

    layer: nn.Module

    def __init__(self, module: nn.Module, layer: nn.Module, limit: float):
        super().__init__(module, layer, limit)
        self.rows, self.error, self.moments = 0, 0.0, Moments()
        self.relative_error, self.with_output = 0.0, 0

    def forward(self, x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        self.rows += x[..., 0].numel()
        return super().forward(x, *inputs, **named)

    def _compared(self, y: Tensor, output: Tensor) -> Tensor:
        rows = y.flatten(0, -2).float()
        errors = (output.flatten(0, -2).float() - rows).square().sum(1)
        self.error += float(errors.sum())
        squares = rows.square().sum(1)
        has_output = squares != 0  # also true for NaN
        self.relative_error += float((errors[has_output] / squares[has_output]).sum())
        self.with_output += int(has_output.sum())
        self.moments.update(rows)
        return output


@torch.no_grad()
def losses(model: nn.Module, texts: Sequence[Tensor]) -> DocumentLosses:
    """Next-token cross entropy.

    Parameters
    ----------
    model : Module
        Maps token ids of shape (texts, tokens) to logits of shape (texts, tokens, vocabulary), or to an
        object with an attribute `logits`. Runs in evaluation mode.
    texts : sequence of Tensor of int of shape (tokens,)
        Texts of at least two tokens. Texts of the same length share batches of at most 2,048 tokens. All
        logits of a batch, or of a longer text, are in memory together, so split long texts.

    Raises
    ------
    ValueError
        If there is no text, one has fewer than two tokens, or the logits have the wrong shape.
    TypeError
        If a text is not a tensor, or tokens are not integers.
    """
    check_model(model)
    texts = _read_texts(texts)
    nats = torch.zeros(len(texts), dtype=torch.float64)
    place = next((parameter.device for parameter in model.parameters()), None)
    with evaluating(model):
        for numbers in _batches([len(text) for text in texts]):
            tokens = torch.stack([texts[number] for number in numbers]).to(place)
            for number, of_text, text in zip(numbers, logits_of(model, tokens), tokens, strict=True):
                each = nn.functional.cross_entropy(of_text[:-1].float(), text[1:], reduction="none")
                nats[number] = each.cpu().double().sum()
    return DocumentLosses(nats, torch.tensor([len(text) - 1 for text in texts]))


def _read_texts(texts: Sequence[Tensor]) -> list[Tensor]:
    for text in texts:
        check_text(text)
    read = [as_integers(text, "tokens") for text in texts]
    if wrong := [tuple(text.shape) for text in read if text.ndim != 1 or len(text) < 2]:
        raise ValueError(f"texts must have shape (tokens,) with at least two tokens; got {wrong[:3]}.")
    if not read:
        raise ValueError("texts must not be empty, got none.")
    return read


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts of the same length, together of at most `BATCH_TOKENS` tokens, or of one text."""
    for length in sorted(set(lengths)):
        numbers = [number for number, each in enumerate(lengths) if each == length]
        count = max(1, BATCH_TOKENS // length)
        yield from (numbers[start : start + count] for start in range(0, len(numbers), count))


def bounds(model: nn.Module, name: str, texts: Sequence[Tensor], *, limit: float = inf) -> Bounds:
    """Losses of the intact model, and with a module's outputs replaced by zeros.

    Parameters
    ----------
    model : Module
        As in `losses`.
    name : str
        Name of the module.
    texts : sequence of Tensor of int of shape (tokens,)
        As in `losses`.
    limit : float, default inf
        As in `evaluate`.

    Raises
    ------
    ValueError, TypeError
        As in `splice` and `losses`.
    """
    with splice(model, name, Replaced(module_of(model, name), None, limit)):
        zeroed = losses(model, texts)
    return Bounds(losses(model, texts), zeroed)


def evaluate(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    texts: Sequence[Tensor],
    *,
    bounds: Bounds | None = None,
    limit: float = inf,
) -> Evaluation:
    """Evaluate a language model with a layer in place of a module.

    Parameters
    ----------
    model : Module
        As in `losses`.
    name : str
        Name of the module to replace, which must be called once in a forward pass.
    layer : Module
        The replacement, called with the inputs of the module.
    texts : sequence of Tensor of int of shape (tokens,)
        As in `losses`; the layer should not have been trained on them.
    bounds : Bounds, optional
        Result of the function `bounds` for the same model, module, texts and limit, which can be shared by
        many layers. Computed by default.
    limit : float, default inf
        Tokens for which the norm of the module's output is larger keep this output and are excluded from the
        errors; see `.ActivationRows.median_norm`.

    Raises
    ------
    ValueError
        If the layer's outputs do not have the shape of the module's outputs, the bounds are for other texts,
        or as in `splice` and `losses`.
    TypeError
        If the layer is not a module, the module does not return a tensor, or as in `splice` and `losses`.
    """
    texts = _read_texts(texts)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"a layer must be a torch.nn.Module, got {layer!r}.")
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}.")
    between = _bounds(model, name, texts, limit=limit) if bounds is None else bounds
    if between.intact.tokens.tolist() != [len(text) - 1 for text in texts]:
        raise ValueError("bounds must be for the same texts; their numbers of tokens differ.")
    compared = _Compared(module_of(model, name), layer, limit)
    with splice(model, name, compared), counted(layer) as usages:
        of_texts = losses(model, texts)
    count, moments = sum(map(len, texts)), compared.moments
    if compared.rows != count:
        raise ValueError(
            f"a forward pass must call {name!r} once, with every token; it got "
            f"{compared.rows} inputs for {count} tokens."
        )
    return Evaluation(
        of_texts,
        between,
        nmse=compared.error / moments.spread if moments.spread else nan,
        relative_error=compared.relative_error / compared.with_output if compared.with_output else nan,
        **use_of(usages)._asdict(),
    )


_bounds = bounds  # `bounds` is also the name of an argument.
