"""The gate, which computes the expert coefficients of an input, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from mumoe_tensor import gates
from mumoe_tensor.calls import (
    HOOKS_ON_ALL_MODULES,
    autocast_dtype,
    check_dense,
    has_hooks,
    is_frozen,
    is_transformed,
)
from mumoe_tensor.checks import as_positive, check_choice
from mumoe_tensor.gates import Gate
from mumoe_tensor.nn import entmax, kernels
from mumoe_tensor.nn.functional import entmax15, is_eager_on_cpu, softmax
from mumoe_tensor.nn.kernels.coefficients import Norm, coefficients
from mumoe_tensor.nn.norm import LogitBatchNorm
from mumoe_tensor.nn.registry import GATES
from mumoe_tensor.nn.sparse import FEWEST_EXPERTS, SparseCoefficients
from mumoe_tensor.nn.states import WholeState
from mumoe_tensor.spec import expert_counts

GateNorm = Literal["batch", "layer", "none"]
#: Gates that process levels of the same size in one call.
ROWWISE = (entmax15, gates.entmax15, gates.sparsemax, softmax, gates.softmax)


class ExpertGate(WholeState):
    r"""Expert coefficients of an input: ``a_e = gate(norm(G_e^T z))`` for every level e.

    Equation (2) of Oldfield et al. (2024). The weight is initialised to zero, so every expert of a level
    starts with the coefficient 1 / N. For a gate that selects experts, such as top-k, the weight is normal
    with variance 1 / in_features.

    Parameters
    ----------
    experts : sequence of int
        Number of experts at each level.
    gate : str, dict or callable, default "entmax15"
        ``"entmax15"``, ``"sparsemax"``, ``"softmax"``, a name registered with `.register_gate`, or any
        function that maps logits along the last axis. A dict contains the name of a class and the arguments
        of the instance, as in ``{"name": "topk", "k": 2}``; see `mumoe_tensor.nn.routing`. The gate is called
        in float32 (or float64 for float64 inputs), also under autocast. For custom gates, see
        `mumoe_tensor.gates.Gate`.
    gate_norm : {"batch", "layer", "none"}, default "batch"
        Normalisation of the logits, without affine parameters: over all rows of the batch, or over the
        experts of a level.

    Attributes
    ----------
    weight : Parameter of shape (out_features, in_features)
        The rows of ``G^T``, concatenated over the levels. An empty buffer if there are no levels or the gate
        reads the input instead of logits.
    num_experts : tuple of int
        Number of experts at each level.
    out_features : int
        Total number of experts over all levels.
    gate : callable
        The function that maps logits to coefficients. A module is registered as a submodule.
    norm : LogitBatchNorm or None
    reads_input : bool
        Whether the gate reads the input instead of logits, like the null models ``"random"`` and
        ``"nearest_centres"``.
    per_expert : tuple of str
        Names of the parameters and buffers of the gate with one entry per expert, such as ``bias``.
    """

    per_expert: tuple[str, ...] = ()

    def __init__(
        self,
        in_features: int,
        experts: Sequence[int],
        *,
        gate: str | dict[str, Any] | Gate = "entmax15",
        gate_norm: GateNorm = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = as_positive(in_features, "in_features")
        self.num_experts = expert_counts(experts)
        self.gate = GATES.read(gate, device, dtype)
        self.gate_norm = check_choice(gate_norm, get_args(GateNorm), "gate_norm")
        self.out_features = total = sum(self.num_experts)
        # The sparse computation copies arrays that are not contiguous.
        same = len(self.num_experts) > 1 and len(set(self.num_experts)) == 1
        self._is_stacked = same and self.num_experts[0] < FEWEST_EXPERTS
        self.reads_input = bool(getattr(self.gate, "reads_input", False))
        num_logits = 0 if self.reads_input else total
        weight = torch.empty(num_logits, self.in_features, device=device, dtype=dtype)
        if num_logits:
            self.weight = nn.Parameter(weight)
        else:  # not a parameter: tools for distributed training expect every parameter to be used
            self.register_buffer("weight", weight)
        has_norm = self.gate_norm == "batch" and num_logits
        self.norm = LogitBatchNorm(total, device, dtype) if has_norm else None
        for name, start in self._first_values().items():
            self.per_expert += (name,)
            values = start.detach().to(self.weight.device, self.weight.dtype)
            if isinstance(start, nn.Parameter):
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weight: zero, or random if the gate selects experts."""
        if getattr(self.gate, "random_start", False):
            nn.init.normal_(self.weight, std=self.in_features**-0.5)
        else:
            nn.init.zeros_(self.weight)
        for name, start in self._first_values().items():
            getattr(self, name).copy_(start)

    def _first_values(self) -> dict[str, Tensor]:
        """Initial values of the arrays with one entry per expert; see `mumoe_tensor.gates.Gate`."""
        per_expert = getattr(self.gate, "per_expert", None)
        if per_expert is None or not self.num_experts:
            return {}
        with torch.device(self.weight.device):
            levels = [per_expert(n, self.in_features) for n in self.num_experts]
        return {name: type(x)(torch.cat([level[name] for level in levels])) for name, x in levels[0].items()}

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a submodule, but ignore a `SyncBatchNorm` for the norm.

        `SyncBatchNorm.convert_sync_batchnorm` sets one, but the norm already computes its statistics over all
        processes.
        """
        if name != "norm" or not isinstance(module, nn.SyncBatchNorm):
            super().add_module(name, module)

    @torch.no_grad()
    def fit(self, z: Tensor) -> Self:
        """Fit a gate such as ``"nearest_centres"`` to inputs, level by level.

        Parameters
        ----------
        z : Tensor of shape (..., in_features)
            Inputs of the gate, at least as many as a level has experts.

        Raises
        ------
        ValueError
            If the gate has nothing to fit, or the inputs have the wrong shape.
        ModuleNotFoundError
            If scikit-learn, which computes k-means, is not installed.
        """
        fit: Any = getattr(self.gate, "fit", None)
        if fit is None or not self.num_experts:
            raise ValueError(
                f"a gate must have a method fit and levels to be fitted, got ExpertGate({self.extra_repr()})."
            )
        check_dense(z)
        if z.shape[-1:] != (self.in_features,):
            raise ValueError(f"inputs must have {self.in_features} features, got shape {tuple(z.shape)}.")
        rows = z.reshape(-1, self.in_features)
        levels = [fit(rows, n) for n in self.num_experts]
        for name in levels[0]:
            getattr(self, name).copy_(torch.cat([level[name] for level in levels]))
        return self

    @property
    def is_sparse_gradient(self) -> bool:
        """Whether the gate declares ``sparse_gradient`` (see `mumoe_tensor.gates.Gate`) and has no hooks."""
        hooks = (self._forward_hooks, self._backward_hooks, self._backward_pre_hooks, *HOOKS_ON_ALL_MODULES)
        return type(self) is ExpertGate and getattr(self.gate, "sparse_gradient", False) and not any(hooks)

    def forward(self, z: Tensor, mask: Tensor | None = None, sparse: bool = False) -> tuple[Any, ...]:
        """Compute the coefficients of inputs.

        Parameters
        ----------
        z : Tensor of shape (..., in_features)
        mask : Tensor of bool, or of integers 0 and 1, of shape (...), optional
            False for rows (padded tokens) that batch norm ignores.
        sparse : bool, default False
            Return ``sparse.SparseCoefficients`` for levels with many experts if the gate selects few of them.

        Returns
        -------
        tuple of Tensor of shape (..., N_e)
            One tensor per level, in the dtype of `z`.

        Raises
        ------
        TypeError
            If the input is not a dense tensor, or the dtype of the mask is neither bool nor integer.
        ValueError
            If the input has the wrong number of features, or the mask has the wrong shape or other values
            than 0 and 1. On an accelerator, or when torch traces the call, values are not read, and any
            nonzero integer counts as 1.
        """
        check_dense(z)
        if z.ndim == 0 or z.shape[-1] != self.in_features:
            raise ValueError(
                f"the last axis of the gate's input must have in_features = {self.in_features} entries, got "
                f"shape {tuple(z.shape)}."
            )
        if mask is not None:
            mask = _read_mask(mask, z.shape[:-1])
        if not self.num_experts:
            return ()
        if self.reads_input:
            is_under_autocast = autocast_dtype(z.device) is not None
            with torch.autocast(z.device.type, enabled=False) if is_under_autocast else nullcontext():
                return self._coefficients_of_input(z, sparse)
        if z.device.type in kernels.DEVICES and kernels.serve(z) and self._power is not None:
            return self._by_kernels(z, mask, self._power)
        frozen = is_frozen(self)
        if frozen and self._is_norm_folded(z) and autocast_dtype(z.device) is None:
            assert self.norm is not None
            scale, shift = self.norm.affine_map(z.dtype)
            logits = nn.functional.linear(z, scale.unsqueeze(1) * self.weight, shift)
            return self.coefficients_of(logits, z.dtype, sparse)
        logits = nn.functional.linear(z, self.weight)
        if frozen and self._is_by_numpy(logits):
            return entmax.coefficients_of_levels(logits, self.num_experts, self.norm)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        is_under_autocast = autocast_dtype(z.device) is not None
        with torch.autocast(z.device.type, enabled=False) if is_under_autocast else nullcontext():
            normed = logits if self.norm is None else self.norm(logits, mask)
            return self.coefficients_of(normed, z.dtype, sparse)

    def _is_norm_folded(self, z: Tensor) -> bool:
        """Whether to fold frozen batch norm into the weight: if the batch has many rows and logits."""
        rows = z.numel() // self.in_features
        if rows <= self.in_features or rows * self.out_features <= entmax.FEW:
            return False
        if self.norm is None or self.norm.training:
            return False
        return z.dtype in (torch.float32, torch.float64) and self._is_norm_frozen(z)

    def _is_norm_frozen(self, z: Tensor) -> bool:
        """Whether batch norm uses running statistics, which are on the device of the logits."""
        norm = self.norm
        if norm is None or norm.training or has_hooks(norm):
            return False
        # Some tools remove the statistics, or move them to the device only when the norm itself is called.
        var = norm.running_var
        return var is not None and var.device == z.device

    def _is_by_numpy(self, logits: Tensor) -> bool:
        """Whether NumPy computes the coefficients: for few logits and a norm that treats rows separately."""
        return (
            self._power == 2
            and is_eager_on_cpu(logits)
            and logits.dtype == torch.float32
            and logits.numel() <= entmax.FEW
            and (self.gate_norm == "none" if self.norm is None else self._is_norm_frozen(logits))
        )

    @property
    def _power(self) -> int | None:
        """The parameter of `.kernels.coefficients` for the gate; None for gates without a kernel."""
        gate = self.gate
        return 2 if gate is entmax15 or gate is gates.entmax15 else 1 if gate is gates.sparsemax else None

    def _by_kernels(self, z: Tensor, mask: Tensor | None, power: int) -> tuple[Tensor, ...]:
        """Coefficients computed by kernels, which include the norm if it does not depend on other rows."""
        logits = nn.functional.linear(z, self.weight)
        norm: Norm = "layer" if self.gate_norm == "layer" else "none"
        statistics: Sequence[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(self.num_experts)
        if self._is_norm_frozen(z) and not is_transformed():
            assert self.norm is not None
            norm = "batch"
            means, variances = self.norm.running_mean, self.norm.running_var
            statistics = list(
                zip(means.split(self.num_experts), variances.split(self.num_experts), strict=True)
            )
        elif self.norm is not None:
            is_under_autocast = autocast_dtype(z.device) is not None
            with torch.autocast(z.device.type, enabled=False) if is_under_autocast else nullcontext():
                logits = self.norm(logits.float(), mask)
        parts = logits.split(self.num_experts, -1) if len(self.num_experts) > 1 else (logits,)
        pairs = zip(parts, statistics, strict=True)
        return tuple([coefficients(x, power, norm, mean, var, z.dtype) for x, (mean, var) in pairs])

    def coefficients_of(
        self, logits: Tensor, dtype: torch.dtype | None = None, sparse: bool = False
    ) -> tuple[Any, ...]:
        """Coefficients from the logits after batch norm, level by level, in `dtype` or the logits' dtype."""
        count = len(self.num_experts)
        if self._is_stacked and self.gate in ROWWISE:
            # A single call of the gate is faster.
            rows = logits.unflatten(-1, (count, -1))
            if self.gate_norm == "layer":
                rows = nn.functional.layer_norm(rows, rows.shape[-1:])
            p = self.gate(rows).to(dtype or logits.dtype)
            return tuple([p.select(-2, level) for level in range(count)])
        parts = logits.split(self.num_experts, -1) if count > 1 else (logits,)
        if self.gate_norm == "layer":
            parts = tuple(nn.functional.layer_norm(part, part.shape[-1:]) for part in parts)
        levels = self._values_of_levels() if self.per_expert else [{}] * len(parts)
        pairs = zip(parts, levels, strict=True)
        gate, dtype = self._select if sparse else self.gate, dtype or logits.dtype
        return tuple([gate(part, **values).to(dtype) for part, values in pairs])

    def _select(self, *arguments: Any, **values: Tensor) -> Any:
        """Call the gate's `select`, and convert to dense coefficients if this is faster."""
        gate: Any = self.gate
        coefficients = gate.select(*arguments, **values)
        if type(coefficients) is SparseCoefficients and not coefficients.is_few:
            return coefficients.dense()
        return coefficients

    def _coefficients_of_input(self, z: Tensor, sparse: bool) -> tuple[Any, ...]:
        """Coefficients by a gate that reads the input instead of logits."""
        gate: Any = self._select if sparse else self.gate
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        pairs = zip(self.num_experts, self._values_of_levels(), strict=True)
        return tuple([gate(wide, n, **values).to(z.dtype) for n, values in pairs])

    def _values_of_levels(self) -> list[dict[str, Tensor]]:
        """The arrays with one entry per expert, level by level."""
        levels: list[dict[str, Tensor]] = [{} for _ in self.num_experts]
        for name in self.per_expert:
            for level, values in zip(levels, getattr(self, name).split(self.num_experts), strict=True):
                level[name] = values
        return levels

    def extra_repr(self) -> str:
        gate = getattr(self.gate, "__name__", type(self.gate).__name__)
        return f"{self.in_features}, experts={self.num_experts}, gate={gate!r}, gate_norm={self.gate_norm!r}"


def _read_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """Check a mask of rows, and convert it to bool."""
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"a mask must be a tensor of bool or of integers 0 and 1, got {kind}.")
    if mask.shape != shape:
        raise ValueError(
            f"a mask must have an entry for every row of the input, {tuple(shape)}, got shape "
            f"{tuple(mask.shape)}."
        )
    if mask.dtype == torch.bool:
        return mask
    counted = mask.bool()
    if is_eager_on_cpu(mask) and not torch.equal(counted.to(mask.dtype), mask):
        raise ValueError(f"a mask of integers must contain only 0 and 1, got {mask.min()} to {mask.max()}.")
    return counted
