"""Registries of gates and activations, and their conversion to and from config entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mumoe_tensor import gates
from mumoe_tensor.arguments import arguments_of
from mumoe_tensor.calls import has_hooks
from mumoe_tensor.nn.functional import entmax15, softmax
from mumoe_tensor.nn.routing import JumpReLU, NearestCentres, Random, ReLUTopK, SigmoidTopK, TopK

AnyFunction = Callable[..., Any]
Function = TypeVar("Function", bound=AnyFunction)

#: Elementwise functions of `torch.nn.functional` without parameters or randomness, and their modules.
ELEMENTWISE: dict[str, type[nn.Module]] = {
    "leaky_relu": nn.LeakyReLU,
    **{
        module.__name__.lower(): module
        for module in (
            nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LogSigmoid,
            nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink, nn.Softsign,
            nn.Tanh, nn.Tanhshrink,
        )
    },
}  # fmt: skip


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return nn.functional.relu(x).square()


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(nn.functional, name) for name in ELEMENTWISE},
    # Used in CLIP and Nemotron.
    "quick_gelu": _quick_gelu,
    "relu2": _relu2,
}
#: The modules of torch.nn that configs can contain.
_MODULES: dict[str, type[nn.Module]] = {
    module.__name__: module
    for module in (
        *ELEMENTWISE.values(), nn.Identity, nn.PReLU, nn.RReLU, nn.Softmax, nn.Softmin, nn.Threshold
    )
}  # fmt: skip
_GELU_BY_TANH = {"name": "GELU", "approximate": "tanh"}
#: Activations of other libraries that are equivalent to a registered one, by module and class name.
_OF_OTHERS: dict[str, dict[str, str | dict[str, Any]]] = {
    "transformers.activations": {
        "AccurateGELUActivation": _GELU_BY_TANH,
        "FastGELUActivation": _GELU_BY_TANH,
        "GELUActivation": "GELU",
        "GELUTanh": _GELU_BY_TANH,
        "LinearActivation": "Identity",
        "MishActivation": "Mish",
        "NewGELUActivation": _GELU_BY_TANH,
        "PytorchGELUTanh": _GELU_BY_TANH,
        "QuickGELUActivation": "quick_gelu",
        "ReLUSquaredActivation": "relu2",
        "SiLUActivation": "SiLU",
    },
    "timm.layers.activations": {
        "GELU": "GELU",
        "GELUTanh": _GELU_BY_TANH,
        "HardSigmoid": "Hardsigmoid",
        "HardSwish": "Hardswish",
        "Mish": "Mish",
        "QuickGELU": "quick_gelu",
        "Sigmoid": "Sigmoid",
        "Swish": "SiLU",
        "Tanh": "Tanh",
    },
}
#: Arguments of torch's modules that a config omits: device and dtype, and deprecated names.
_NOT_WRITTEN = {nn.PReLU: ("device", "dtype"), nn.Hardtanh: ("min_value", "max_value")}


class Registry:
    """Functions, and classes whose instances are functions, by name, in addition to the modules of torch.

    `what` is the name of the argument of the layers, gate or activation. `aliases` maps functions to
    equivalent registered functions.
    """

    def __init__(
        self, what: str, entries: Mapping[str, AnyFunction], aliases: Mapping[AnyFunction, AnyFunction]
    ):
        self.what, self._entries, self._aliases = what, dict(entries), aliases

    @property
    def _all(self) -> dict[str, AnyFunction]:
        return {**_MODULES, **self._entries}

    def register(self, name: str, function: Function) -> Function:
        """Add a function or a class; see `register_gate`."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of a registered {self.what} must be a nonempty string, got {name!r}.")
        if not callable(function) or isinstance(function, nn.Module):
            raise TypeError(f"a registered {self.what} must be a function or a class, got {function!r}.")
        present = self._all.get(name, function)
        if not _have_one_definition(present, function):
            raise ValueError(f"every {self.what} must have a unique name; {name!r} is {present!r}.")
        self._entries[name] = function
        return function

    def read(
        self, value: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Callable[..., Tensor]:
        """Convert an argument, which is a function or a config entry, to a function.

        Device and dtype apply to the parameters of a module that is made from an entry.
        """
        if isinstance(value, type):
            raise TypeError(f"{self.what} must be a function or an instance, got the class {value.__name__}.")
        if callable(value):
            return self._equivalent(value)
        if not isinstance(value, (str, Mapping)):
            raise TypeError(f"{self.what} must be a function or its name, got {value!r}.")
        arguments = {"name": value} if isinstance(value, str) else dict(value)
        name = arguments.pop("name", None)
        entry: Any = self._all.get(name) if isinstance(name, str) else None
        if entry is None:
            raise ValueError(
                f"{self.what} must be one of {', '.join(self._entries)}, an activation of torch.nn such as "
                f"'GELU', or a name registered with register_{self.what}; got {value!r}."
            )
        if not isinstance(entry, type):
            if arguments:
                raise ValueError(f"{self.what} {name!r} is a function without settings, got {arguments}.")
            return entry
        try:
            made: Any = entry(**arguments)
        except TypeError as error:
            why = str(error).rstrip(".")
            raise ValueError(f"{self.what} {name!r} cannot be made with {arguments}: {why}.") from None
        return made.to(device=device, dtype=dtype) if isinstance(made, nn.Module) else made

    def write(self, function: Any) -> str | dict[str, Any]:
        """The config entry of a function in JSON types: its name, or the name and arguments of its class."""
        for name, entry in self._all.items():
            if entry is function:
                return name
            if entry is type(function):
                arguments = self._arguments(function)
                again = self._arguments(self.read({"name": name, **arguments}))
                if again != arguments:
                    raise ValueError(
                        f"an instance of a registered {self.what} must store its arguments unchanged; made "
                        f"with {arguments}, {name!r} has {again}."
                    )
                return {"name": name, **arguments}
        raise ValueError(
            f"the {self.what} must be registered to be stored in a config: name it with "
            f"register_{self.what}; got {function!r}."
        )

    def _arguments(self, instance: Any) -> dict[str, Any]:
        """The constructor arguments of an instance, read from attributes of the same names."""
        kind = type(instance)
        if kind.__init__ in (nn.Module.__init__, nn.Identity.__init__):  # these ignore their arguments
            return {}
        return arguments_of(instance, self.what, _NOT_WRITTEN.get(kind, ()))

    def _equivalent(self, function: Any) -> AnyFunction:
        """The equivalent registered function if there is one, otherwise the function itself."""
        kind = type(function)
        entry = _OF_OTHERS.get(kind.__module__, {}).get(kind.__name__)
        if entry is not None:
            equivalent = self.read(entry)
            return equivalent if not has_hooks(function) and _are_equal(function, equivalent) else function
        return next((same for alias, same in self._aliases.items() if alias is function), function)


def _have_one_definition(one: Any, other: Any) -> bool:
    """Whether two objects are the same, or come from one definition that ran twice, as in a notebook."""
    if one is other or not all(isinstance(x, (FunctionType, type)) for x in (one, other)):
        return one is other
    places = {(x.__module__, x.__qualname__) for x in (one, other)}
    return len(places) == 1 and "<" not in one.__qualname__  # not for <lambda>s and nested functions


def _are_equal(one: Callable[..., Tensor], other: Callable[..., Tensor]) -> bool:
    """Whether two elementwise functions are equal to within float32 precision."""
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            return torch.allclose(one(x), other(x), rtol=1e-9, atol=1e-9)
    except RuntimeError:  # fake tensors have no values
        return False


def elementwise(function: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """The function if it is an elementwise function of torch that does not work in place, otherwise None.

    For a module the result is its `forward` method: it may be called more than once, which global module
    hooks should not see.
    """
    if isinstance(function, nn.Module):
        is_listed = type(function) in ELEMENTWISE.values() and not getattr(function, "inplace", False)
        return function.forward if is_listed and not has_hooks(function) else None
    return function if any(function is listed for listed in _FUNCTIONS.values()) else None


GATES = Registry(
    "gate",
    {
        "entmax15": entmax15,
        "sparsemax": gates.sparsemax,
        "softmax": softmax,
        "topk": TopK,
        "relu_topk": ReLUTopK,
        "jumprelu": JumpReLU,
        "sigmoid_topk": SigmoidTopK,
        "random": Random,
        "nearest_centres": NearestCentres,
    },
    {gates.entmax15: entmax15, gates.softmax: softmax},
)
ACTIVATIONS = Registry(
    "activation",
    _FUNCTIONS,
    {getattr(torch, name): same for name, same in _FUNCTIONS.items() if hasattr(torch, name)},
)


def register_gate(name: str) -> Callable[[Function], Function]:
    """Register a gate under a name that configs refer to. Use it as a decorator.

    Returns
    -------
    callable
        A decorator for a map from logits of shape (..., N) to coefficients, or for a class whose instances
        are such maps. Instances must have every constructor argument as an attribute with the same name and a
        JSON type. The parameters of instances that are modules are part of the state of the layer.

    Raises
    ------
    ValueError
        If another gate has this name.
    TypeError
        If `name` is not a string, or the decorated object is neither a function nor a class.

    Examples
    --------
    >>> import torch
    >>> from mumoe_tensor.nn import MuMoE, entmax15
    >>> @register_gate("tempered")
    ... class Tempered(torch.nn.Module):
    ...     def __init__(self, start: float = 1.0):
    ...         super().__init__()
    ...         self.start = start
    ...         self.temperature = torch.nn.Parameter(torch.tensor(start))
    ...     def forward(self, logits):
    ...         return entmax15(logits / self.temperature)
    >>> layer = MuMoE(16, 8, experts=4, rank=2, gate=Tempered(2.0))
    >>> layer.config["gate"]
    {'name': 'tempered', 'start': 2.0}
    """
    return lambda function: GATES.register(name, function)


def register_activation(name: str) -> Callable[[Function], Function]:
    """Register an activation under a name that configs refer to; see `register_gate`.

    Examples
    --------
    >>> from mumoe_tensor.nn import MuMoEMLP
    >>> @register_activation("squared_relu")
    ... def squared_relu(x):
    ...     return x.relu() ** 2
    >>> MuMoEMLP(16, 32, 16, experts=4, rank=2, activation=squared_relu).config["activation"]
    'squared_relu'
    """
    return lambda function: ACTIVATIONS.register(name, function)
