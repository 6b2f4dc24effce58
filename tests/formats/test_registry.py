"""Formats by name and as values: equality, programs of their own, and what configs write of them."""

from __future__ import annotations

import copy
import json
import pickle
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.formats.registry import config_entry
from mumoe_tensor.testing import check_equals_dense, run_check

pytestmark = pytest.mark.usefixtures("registry")


class PartialTucker(mt.Format):
    """Tucker in which only some modes have a factor, and all others are modes of the core."""

    name = "partial-tucker"
    title = "Partial Tucker"

    def __init__(self, compressed: tuple[str, ...] = ("i", "o"), core_first: bool = True):
        self.compressed, self.core_first = compressed, core_first

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        core = mt.Factor(" ".join(f"r_{m}" if m in self.compressed else m for m in modes))
        others = [mt.Factor(f"{m} r_{m}") for m in modes if m in self.compressed]
        return [core, *others] if self.core_first else [*others, core]


class Turned(mt.Format):
    """Two square factors of an experts' bond whose axes a setting exchanges: same shapes, other numbers."""

    name = "turned"
    title = "Turned"

    def __init__(self, is_turned: bool = False):
        self.is_turned = is_turned

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        *experts, i, o = modes
        middle = mt.Factor("q p" if self.is_turned else "p q")
        return [mt.Factor(f"{' '.join(experts)} {i} p"), middle, mt.Factor(f"{o} q")]


class Split(mt.Format):
    """Expert factors and a shared matrix joined by two bonds; a memory order other than that of the axes."""

    name = "split"
    title = "Split"

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        *experts, i, o = modes
        return [
            mt.Factor("p q", optional=True),
            *(mt.Factor(f"{m} p", memory_order=f"p {m}") for m in experts),
            mt.Factor(f"{i} q p"),
            mt.Factor(f"q p {o}", memory_order=f"p q {o}"),
        ]


ALL = PartialTucker(("n1", "i", "o"))
SOME = PartialTucker(("i",))


def dense_of(weight: mt.FactorizedTensor) -> Any:
    """The weight by one einsum over the declared indices."""
    declared = weight.format.factors(("n1", "i", "o"))
    letters: dict[str, int] = {}
    operands: list[Any] = []
    for factor, f in zip(weight.factors, declared, strict=True):
        operands += [factor, [letters.setdefault(x, len(letters)) for x in f.indices]]
    return np.einsum(*operands, [letters[x] for x in ("n1", "i", "o")])


def test_equal_means_the_same_class_and_the_same_settings() -> None:
    assert PartialTucker() == PartialTucker(("i", "o")) != SOME
    assert hash(PartialTucker()) == hash(PartialTucker(("i", "o")))
    assert len({ALL, SOME, PartialTucker(("i",)), mt.get_format("cp"), mt.get_format("tucker")}) == 4
    assert repr(SOME) == "PartialTucker(compressed=('i',), core_first=True)"
    assert repr(mt.get_format("cp")) == "CP()"
    assert PartialTucker() != type("Other", (PartialTucker,), {})()


def test_settings_in_slots_count() -> None:
    class Slotted(Turned):
        __slots__ = ("side",)

        def __init__(self, side: int):
            super().__init__()
            self.side = side

    assert Slotted(1) == Slotted(1) != Slotted(2)
    assert repr(Slotted(1)) == "Slotted(is_turned=False, side=1)"
    with pytest.raises(TypeError, match="hashable"):
        mt.get_format(Slotted([1]))


def test_a_format_that_was_used_equals_a_new_one() -> None:
    class Lazy(mt.Format):
        name, title = "lazy", "Lazy"

        def __init__(self, num_bonds: int):
            self.num_bonds = num_bonds

        @cached_property
        def bond_names(self) -> str:
            return " ".join(f"r{k}" for k in range(self.num_bonds))

        def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
            return [mt.Factor(f"{m} {self.bond_names}") for m in modes]

    used = Lazy(2)
    assert used.bonds(1) == ("r0", "r1")
    assert used == Lazy(2) != Lazy(3)
    assert hash(used) == hash(Lazy(2))
    assert repr(used) == "Lazy(num_bonds=2)"


@pytest.mark.parametrize("format", [ALL, SOME, PartialTucker((), False)], ids=repr)
def test_a_format_with_settings_passes_the_property_checks(format: mt.Format) -> None:
    run_check(check_equals_dense, format, share=4)


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_instances_of_one_class_share_no_program(backend: str) -> None:
    """Same class, same shapes of all factors, same rank: only the setting differs."""
    make: Any = {"numpy": lambda: np.asarray, "torch": lambda: pytest.importorskip("torch").from_numpy}.get(
        backend, lambda: pytest.importorskip("jax").numpy.asarray
    )()
    generator = np.random.default_rng(0)
    factors = [generator.standard_normal(shape) for shape in ((4, 3, 2), (2, 2), (5, 2))]
    z, a = generator.standard_normal((7, 3)), generator.standard_normal((7, 4))
    for is_turned in (False, True, False):
        weight = mt.FactorizedTensor(Turned(is_turned), factors)
        expected = np.einsum("Bn,Bi,nio->Bo", a, z, dense_of(weight))
        y = mt.multilinear_moe(
            mt.FactorizedTensor(Turned(is_turned), [*map(make, factors)]), make(z), [make(a)]
        )
        np.testing.assert_allclose(np.asarray(y), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mt.to_dense(weight), dense_of(weight), atol=1e-12)


def test_jit_compiles_once_for_each_value() -> None:
    jax = pytest.importorskip("jax")
    import mumoe_tensor.jax

    assert mumoe_tensor.jax
    traced = []

    @jax.jit
    def dense(weight: mt.FactorizedTensor) -> Any:
        traced.append(weight.format)
        return mt.to_dense(weight)

    generator = np.random.default_rng(0)
    factors = [generator.standard_normal(shape).astype("float32") for shape in ((4, 3, 2), (2, 2), (5, 2))]
    for is_turned in (False, True, False, True):
        weight = mt.FactorizedTensor(Turned(is_turned), factors)
        on_device = mt.FactorizedTensor(Turned(is_turned), [*map(jax.numpy.asarray, factors)])
        np.testing.assert_allclose(dense(on_device), dense_of(weight), rtol=1e-4, atol=1e-5)
    assert traced == [Turned(False), Turned(True)]


def test_plans_costs_and_ranks_follow_the_settings() -> None:
    sizes = dict(experts=4, in_features=30, out_features=20)
    for _ in range(2):
        assert mt.cost(ALL, **sizes, rank=(2, 3, 5)).parameters == 2 * 3 * 5 + 4 * 2 + 30 * 3 + 20 * 5
        assert mt.cost(SOME, **sizes, rank=3).parameters == 4 * 3 * 20 + 30 * 3
        assert (ALL.bonds(1), SOME.bonds(1)) == (("r_n1", "r_i", "r_o"), ("r_i",))
        assert len(mt.plan(ALL, **sizes, rank=(2, 3, 5)).steps) != len(mt.plan(SOME, **sizes, rank=3).steps)


def test_a_changed_setting_meets_no_earlier_declaration() -> None:
    format = PartialTucker()
    assert format.bonds(1) == ("r_i", "r_o")
    format.compressed = ("n1",)
    assert format.bonds(1) == ("r_n1",)
    assert PartialTucker().bonds(1) == ("r_i", "r_o")
    assert PartialTucker(("n1",)) == format


def test_a_setting_that_cannot_be_hashed_is_refused() -> None:
    refused = pytest.raises(TypeError, match=r"every setting of a format must be hashable.*\['i'\]")
    unhashable: Any = PartialTucker(["i"])  # type: ignore[arg-type]
    with refused:
        mt.get_format(unhashable)
    with refused:
        mt.plan(unhashable, experts=4, in_features=3, out_features=5, rank=3)
    with refused:
        mt.FactorizedTensor(unhashable, [np.ones((4, 2, 5)), np.ones((3, 2))])

    class Listed(PartialTucker):
        def __init__(self) -> None:
            super().__init__(["i"])  # type: ignore[arg-type]

    with refused:
        mt.register(Listed)
    assert "partial-tucker" not in mt.formats()


@given(st.lists(st.sampled_from(["n1", "i", "o"]), unique=True), st.booleans())
def test_a_config_entry_makes_the_format_again(compressed: list[str], core_first: bool) -> None:
    mt.register(PartialTucker)
    format = PartialTucker(tuple(compressed), core_first)
    entry = config_entry(format)
    assert (entry == "partial-tucker") == (format == PartialTucker())
    for again in (mt.get_format(json.loads(json.dumps(entry))), pickle.loads(pickle.dumps(format))):
        assert again == copy.deepcopy(format) == format
        assert hash(again) == hash(format)
        assert again.declaration(1) == format.declaration(1)


def test_an_entry_has_the_settings_that_differ() -> None:
    mt.register(PartialTucker)
    assert config_entry(PartialTucker()) == "partial-tucker"
    assert config_entry(SOME) == {"name": "partial-tucker", "compressed": ["i"]}
    assert mt.get_format({"name": "partial-tucker"}) is mt.get_format("partial-tucker")
    assert {name: config_entry(format) for name, format in mt.formats().items()} == {
        name: name for name in mt.formats()
    }


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "partial-tucker", "ranks": 3},
        {"name": "cp", "compressed": ["i"]},
        {"name": "no-such"},
        {"compressed": ["i"]},
        {},
        {"name": ["cp"]},
    ],
)
def test_entries_that_name_no_format_are_refused(entry: dict[str, Any]) -> None:
    mt.register(PartialTucker)
    with pytest.raises(ValueError, match=r"unknown format|cannot be made with"):
        mt.get_format(entry)


def test_formats_that_an_entry_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="must be registered to be stored in a config, got PartialTucker"):
        config_entry(SOME)
    mt.register(PartialTucker)
    with pytest.raises(ValueError, match="arguments of JSON types"):
        config_entry(PartialTucker(frozenset("i")))  # type: ignore[arg-type]
    changed = PartialTucker()
    changed.more = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="must store the arguments of its class unchanged"):
        config_entry(changed)


def test_a_class_defined_again_replaces_the_name_and_nothing_else() -> None:
    def define(bond: str) -> type[mt.Format]:
        class Again(mt.Format):
            name = title = "again"

            def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
                return [mt.Factor(f"{mode} {bond}") for mode in modes]

        return mt.register(Again)

    before = define("p")()
    after = define("q")()
    assert mt.get_format("again") == after != before
    assert (before.bonds(1), after.bonds(1)) == (("p",), ("q",))
    assert config_entry(after) == "again"
    with pytest.raises(ValueError, match="must be registered"):
        config_entry(before)


# ---- names -------------------------------------------------------------------------------------------------


def test_registered_formats() -> None:
    for name, format in mt.formats().items():
        assert format.name == name
        assert mt.get_format(name) is format
        assert mt.get_format(format) is format


def test_formats_returns_a_copy() -> None:
    mt.formats().clear()
    assert "cp" in mt.formats()


def test_a_format_that_is_not_registered_works_everywhere() -> None:
    format = Split()
    run_check(check_equals_dense, format, share=2)
    weight = mt.FactorizedTensor.random(format, experts=4, in_features=3, out_features=5, rank=(2, 3))
    assert weight.format is format
    assert mt.to_dense(weight).shape == (4, 3, 5)
    assert mt.plan(format, experts=4, in_features=3, out_features=5, rank=(2, 3)).flops > 0
    assert mt.cost(format, experts=4, in_features=3, out_features=5, rank=(2, 3)).parameters == 8 + 18 + 30
    assert mt.LayerSpec(format, experts=4, in_features=3, out_features=5, rank=(2, 3)).max_expert_rank == 3
    fit = mt.fit_rank(
        format, experts=4, in_features=3, out_features=5, rank=(2, None), parameters=60, rounding="down"
    )
    assert fit == (2, 3)
    with pytest.raises(ValueError, match="unknown format 'split'"):
        mt.plan("split", experts=4, in_features=3, out_features=5, rank=(2, 3))


def test_register_makes_a_format_known_by_its_name() -> None:
    assert mt.register(Split) is Split
    assert list(mt.formats())[-1] == "split"
    assert mt.get_format("split") == Split()
    mt.register(Split)  # once more is no mistake: modules are reloaded
    assert list(mt.formats()).count("split") == 1


# ---- layers ------------------------------------------------------------------------------------------------


def test_layers_and_their_configs() -> None:
    torch = pytest.importorskip("torch")
    from mumoe_tensor.nn import MuMoE, MuMoEMLP

    mt.register(PartialTucker)
    sizes = dict(experts=4, gate_norm="none")
    x = torch.randn(5, 6)
    layers = [
        MuMoE(6, 3, format=ALL, rank=(2, 3, 2), **sizes),
        MuMoE(6, 3, format=SOME, rank=3, **sizes),
        MuMoEMLP(6, 8, 3, format=SOME, rank=3, **sizes),
        MuMoE(6, 3, format=PartialTucker(), rank=(3, 2), **sizes),
    ]
    entries = [{"compressed": ["n1", "i", "o"]}, {"compressed": ["i"]}, {"compressed": ["i"]}, {}]
    for layer, settings in zip(layers, entries, strict=True):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        config = json.loads(json.dumps(layer.config))
        name = "partial-tucker"
        assert config["format"] == ({"name": name, **settings} if settings else name)
        again = type(layer).from_config(config)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), layer(x))
        assert again.config == layer.config
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))
    for layer in (layers[0], layers[1]):
        weight = layer.weight
        y, coefficients = layer(x, return_coefficients=True)
        dense = mt.to_dense(weight)
        bias = torch.einsum("Bn,no->Bo", coefficients[0], dense[:, -1])
        expected = torch.einsum("Bn,Bi,nio->Bo", coefficients[0], x, dense[:, :-1]) + bias
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_model_is_saved_with_the_settings(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    from mumoe_tensor.models import Mixer, MixerConfig, load_model, save_model

    mt.register(PartialTucker)
    sizes: dict[str, Any] = dict(image_size=8, patch=4, width=8, depth=1, token_hidden=4, channel_hidden=8)
    config = MixerConfig(**sizes, classes=3, experts=(2,), format=SOME, token_rank=(2,), channel_rank=(2,))
    assert config.format == {"name": "partial-tucker", "compressed": ["i"]}
    model = Mixer(config).eval()
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    assert again.config == config
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(images), model(images))


def test_settings_of_a_run_are_read_with_those_of_the_format(tmp_path: Any) -> None:
    pytest.importorskip("pydantic")
    from mumoe_tensor.training.settings import read_settings

    mt.register(PartialTucker)
    entry = {"name": "partial-tucker", "compressed": ["i"]}
    written = """model.format={name = "partial-tucker", compressed = ["i"]}"""
    assert read_settings("mixer", overrides=[written]).model.format == entry
    with pytest.raises(ValueError, match=r"format.*cannot be made with \{'ranks': 3\}: .*[^.]\.$"):
        read_settings("mixer", overrides=["""model.format={name = "partial-tucker", ranks = 3}"""])


def test_a_study_names_formats_with_settings_by_their_config() -> None:
    pytest.importorskip("torch")
    from mumoe_tensor import study

    mt.register(PartialTucker)
    assert study.prepare(formats=[PartialTucker(), "cp"]).formats == ("partial-tucker", "cp")
    names = study.prepare(formats=["cp", SOME]).formats
    assert names[0] == "cp"
    assert mt.get_format(json.loads(names[1])) == SOME


# ---- what is printed -----------------------------------------------------------------------------------


def test_settings_are_printed_where_the_name_does_not_tell_them() -> None:
    mt.register(PartialTucker)
    sizes = dict(experts=4, in_features=3, out_features=5)
    for format, printed in {
        PartialTucker(): "'partial-tucker'",
        SOME: repr(SOME),
        Turned(): repr(Turned()),
    }.items():
        rank = (2,) * len(format.bonds(1))
        assert f"({printed}, " in repr(mt.FactorizedTensor.random(format, **sizes, rank=rank))
        assert f"({printed}, " in repr(mt.LayerSpec(format, **sizes, rank=rank))
