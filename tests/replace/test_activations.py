"""Activations on the disk are those of the model, however they were collected."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mumoe_tensor.replace import ActivationRows, Activations  # noqa: E402


class Block(nn.Module):
    """A residual block: its MLP is called by keyword, gives a tuple, and its output is changed in place."""

    def __init__(self, features: int):
        super().__init__()
        self.mixing, self.mlp = nn.Linear(features, features), Pair(features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(x.cumsum(-2))
        y, _ = self.mlp(scale=1.5, hidden=x)
        y += x
        return y


class Pair(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden: Tensor, scale: float = 2.0) -> tuple[Tensor, None]:
        result = self.dropout(scale * self.linear(hidden).relu())
        return result, None


def language_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(32, 6), Block(6), Block(6), nn.Linear(6, 32))


def documents(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(32, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def expected(model: nn.Module, block: int, texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of the MLP of a block, text by text."""
    seen = []
    layers: Any = list(model.eval())
    for text in texts:
        x = layers[0](text)
        for layer in layers[1:block]:
            x = layer(x)
        x = x + layers[block].mixing(x.cumsum(-2))
        seen.append((x, 1.5 * layers[block].mlp.linear(x).relu()))
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


MODULES = ["1.mlp", "2.mlp"]


def test_rows_are_those_of_the_model(tmp_path: Path) -> None:
    model, texts = language_model(), documents(5, 5, 5, 3, 7, 7)
    seen: list[tuple[int, int]] = []
    store = Activations.collect(
        model.train(), MODULES, texts, tmp_path, batch_size=2, shard_rows=8, dtype="float32",
        progress=lambda done, total, text: seen.append((done, total)),
    )  # fmt: skip
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert store.modules == tuple(MODULES) and len(store) == 32
    assert store.documents.bincount().tolist() == [len(text) for text in texts]
    assert seen == [(2, 6), (3, 6), (4, 6), (6, 6)]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for block, name in enumerate(MODULES, 1):
        x, y = expected(model, block, texts)
        rows = store[name]
        order = torch.randint(32, (50,))
        torch.testing.assert_close(rows.batch(order), (x[order], y[order]))
        torch.testing.assert_close(rows.mean, y.mean(0))
        assert rows.variance == pytest.approx(float(y.var(0, unbiased=False).sum()), rel=1e-5)
        part = rows.take([4, 1])
        chosen = (store.documents == 1) | (store.documents == 4)
        torch.testing.assert_close(part.batch(range(len(part))), (x[chosen], y[chosen]))
        torch.testing.assert_close(part.mean, y[chosen].mean(0))
        assert part.documents.unique().tolist() == [1, 4] and len(part.take([4])) == 7
    assert store["1.mlp"].take(slice(2, None)).documents.unique().tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="documents must have rows"):
        store["1.mlp"].take([0]).take([1])
    with pytest.raises(KeyError, match=r"are 1.mlp, 2.mlp; got '3'"):
        store["3"]


def test_rows_below_a_norm(tmp_path: Path) -> None:
    """Large outputs of some rows do not count where they are left out."""
    model = nn.Sequential(nn.Embedding(8, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0] *= 1000
    texts = torch.randint(1, 8, (9, 5))
    texts[:, 0] = 0
    rows = Activations.collect(model, "1", texts, tmp_path, shard_rows=7, dtype="float32")["1"]
    x, y = rows.batch(range(len(rows)))
    assert rows.median_norm == pytest.approx(float(y.norm(dim=1).median()))
    below = rows.below(5 * rows.median_norm)
    is_below = y.norm(dim=1) <= 5 * y.norm(dim=1).median()
    assert not is_below[::5].any() and len(below) == int(is_below.sum()) < len(rows)
    torch.testing.assert_close(below.batch(range(len(below))), (x[is_below], y[is_below]), rtol=0, atol=0)
    torch.testing.assert_close(below.mean, y[is_below].mean(0))
    torch.testing.assert_close(below.input_mean, x[is_below].mean(0))
    assert below.documents.tolist() == rows.documents[is_below].tolist()
    with pytest.raises(ValueError, match="of at most the limit, 0; none have"):
        rows.below(0.0)


def test_rows_of_the_limit_and_of_chosen_documents_are_below_it() -> None:
    y = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 5.0], [0.0, 1.0]])
    rows = ActivationRows([(y, y)], torch.arange(4))
    assert rows.below(5.0).documents.tolist() == [0, 2, 3]
    part = rows.take([1, 2, 3]).below(5.0)
    assert part.documents.tolist() == [2, 3] and part.batch([0])[1].tolist() == [[0, 5]]


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=9),
    batch_size=st.integers(1, 4),
    shard_rows=st.integers(1, 12),
)
@settings(max_examples=settings().max_examples // 2)
def test_batches_and_shards_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], batch_size: int, shard_rows: int
) -> None:
    model, texts = language_model(), documents(*lengths)
    store = Activations.collect(
        model, "2.mlp", texts, tmp_path_factory.mktemp("store"),
        batch_size=batch_size, shard_rows=shard_rows, dtype="float32",
    )  # fmt: skip
    x, y = expected(model, 2, texts)
    order = torch.arange(len(store)).flip(0)
    torch.testing.assert_close(store["2.mlp"].batch(order), (x[order], y[order]))
    assert store.documents.tolist() == [k for k, n in enumerate(lengths) for _ in range(n)]


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-6)])
def test_numbers_are_held_in_the_dtype(tmp_path: Path, dtype: Any, error: float) -> None:
    model, texts = language_model(), documents(6, 6)
    rows = Activations.collect(model, "1.mlp", texts, tmp_path, dtype=dtype)["1.mlp"]
    for read, exact in zip(rows.batch(range(12)), expected(model, 1, texts), strict=True):
        assert read.dtype == torch.float32
        torch.testing.assert_close(read, exact, rtol=error, atol=error)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1e6, r"1.mlp/outputs must be in the range of float16, .*; the largest is .*dtype='float32'"),
        (1e-9, "in the range of float16"),
        (torch.nan, r"1.mlp/outputs must be finite; \d+ of 36 numbers are not"),
    ],
)
def test_numbers_that_the_dtype_does_not_hold_are_refused(
    tmp_path: Path, factor: float, message: str
) -> None:
    model: Any = language_model()
    with torch.no_grad():
        model[1].mlp.linear.weight *= factor
        model[1].mlp.linear.bias *= factor
    with pytest.raises(ValueError, match=message):
        Activations.collect(model, "1.mlp", documents(6), tmp_path)
    if factor == factor:
        Activations.collect(model, "1.mlp", documents(6), tmp_path, dtype="float32")


def test_only_the_first_forward_pass_is_whole(tmp_path: Path) -> None:
    model: Any = language_model()
    calls: list[int] = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    store = Activations.collect(model, ["1.mlp", "1.mlp"], documents(4, 5, 6, 7), tmp_path)
    assert len(store) == 22 and len(calls) == 1 and store.modules == ("1.mlp",)


def test_texts_of_one_length_and_other_shapes(tmp_path: Path) -> None:
    texts = [torch.randn(3, size, 4) for size in (4, 5, 5)]
    store = Activations.collect(nn.Sequential(nn.Linear(4, 4)), "0", texts, tmp_path, dtype="float32")
    assert store.documents.bincount().tolist() == [12, 15, 15]
    assert store["0"].batch(slice(None))[0].equal(torch.cat([text.flatten(0, 1) for text in texts]))


class Twice(nn.Module):
    """A module that is called twice, one that is not called, and some that give something else."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.text, self.vector, self.part, self.rows = (nn.Identity() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.text("text"), self.vector(x[0, 0]), self.part(x[:1]), self.rows(x.reshape(-1, 4)[1:])
        return self.last(self.twice(self.twice(x)))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("twice", "called once in a forward pass; 'twice' is called again"),
        ("never", "must be called in every forward pass; never is not"),
        ("text", r"float tensors of shape .*; text/inputs is str"),
        ("vector", r"vector/inputs is torch.float32 of \(4,\)"),
        ("part", r"part/inputs is torch.float32 of \(1, 3, 4\)"),
        ("rows", "it has 5 rows for 2 texts"),
        (["last", "never"], "never is not"),
        ("", "name must be the name of a module in the model"),
        ("las", "such as .*; got 'las'"),
        ([], "modules must not be empty, got none"),
    ],
)
def test_modules_that_cannot_be_collected(tmp_path: Path, module: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Activations.collect(Twice(), module, torch.randn(2, 3, 4), tmp_path)


def test_rows_of_all_modules_are_the_same(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(ValueError, match=r"the same number of rows, got .*'0/inputs': 6.*'2/inputs': 2"):
        Activations.collect(model, ["0", "2"], torch.randn(2, 3, 4), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"model": language_model(1)}, "model in .*manifest.json was"),
        (lambda a: a | {"texts": documents(5, 5, 5, seed=1)}, "inputs in"),
        (lambda a: a | {"texts": documents(5, 5)}, "texts, inputs in"),
        (lambda a: a | {"modules": "2.mlp"}, r"modules in .* was \['1.mlp'\], and is \['2.mlp'\] now"),
        (lambda a: a | {"dtype": "bfloat16"}, "dtype in"),
        (lambda a: a | {"model": nn.Sequential(*a["model"], nn.Tanh())}, "model in"),
        (lambda a: a["model"].register_buffer("scale", torch.ones(1)) or a, "model in"),
    ],
)
def test_a_folder_resumes_with_what_it_began_with(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    arguments: dict[str, Any] = {
        "model": language_model(), "modules": "1.mlp", "texts": documents(5, 5, 5), "dtype": "float16"
    }  # fmt: skip
    Activations.collect(folder=tmp_path, **arguments)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    Activations.collect(folder=tmp_path, **arguments, batch_size=1, shard_rows=3)
    with pytest.raises(ValueError, match=message):
        Activations.collect(folder=tmp_path, **change(arguments))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Activations(tmp_path)
    with pytest.raises(ValueError, match="texts must not be empty, got none"):
        Activations.collect(language_model(), "1.mlp", [], tmp_path)
    with pytest.raises(TypeError, match=r"texts must be tensors, .*; got list"):
        Activations.collect(language_model(), "1.mlp", [[1, 2]], tmp_path)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"must have tokens; number 1 has shape \(0,\)"):
        Activations.collect(language_model(), "1.mlp", documents(5, 0), tmp_path)
    with pytest.raises(ValueError, match=r"without a batch axis; got \(1, 4\)"):
        Activations.collect(language_model(), "1.mlp", [torch.ones(1, 4, dtype=torch.long)], tmp_path)
    Activations.collect(language_model(), "1.mlp", documents(5, 6, 7), tmp_path, shard_rows=1)
    _, second, third = sorted(tmp_path.glob("*.safetensors"))
    content = third.read_bytes()
    third.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"00000002-00000003.*complete safetensors file"):
        Activations(tmp_path)
    third.unlink()
    with pytest.raises(ValueError, match=r"2 of 3 texts. Run the collection again to resume"):
        Activations(tmp_path)
    third.write_bytes(content)
    second.unlink()
    with pytest.raises(ValueError, match=r"none from text 1 to .*00000002-00000003"):
        Activations(tmp_path)


KILLED = """
import sys
sys.path[:0] = [{here!r}]
from test_activations import MODULES, documents, language_model
from mumoe_tensor.replace import Activations
import time
def progress(done, total, text):
    print(done, flush=True)
    if done == 5:
        time.sleep(60)
Activations.collect(
    language_model(), MODULES, documents(*range(3, 13)), {folder!r}, shard_rows=10, batch_size=1,
    progress=progress,
)
"""


def test_a_killed_process_resumes(tmp_path: Path) -> None:
    here, folder = str(Path(__file__).parent), tmp_path / "killed"
    code = KILLED.format(here=here, folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "5\n":
            assert process.poll() is None
        process.kill()
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert [path.stem for path in sorted(shards)] == ["00000000-00000003", "00000003-00000005"]
    (folder / ".00000005-00000007.safetensors.abc.part").touch()
    time.sleep(0.01)
    seen: list[int] = []
    store = Activations.collect(
        language_model(), MODULES, documents(*range(3, 13)), folder, shard_rows=10, batch_size=1,
        progress=lambda done, total, text: seen.append(done),
    )  # fmt: skip
    assert seen == [6, 7, 8, 9, 10]
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert not list(folder.glob(".*"))
    whole = Activations.collect(language_model(), MODULES, documents(*range(3, 13)), tmp_path / "whole")
    for name in MODULES:
        read, again = (activations[name].batch(range(len(whole))) for activations in (store, whole))
        torch.testing.assert_close(read, again, rtol=1e-3, atol=1e-4)
    assert store.documents.equal(whole.documents)


def test_rows_are_on_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    model, texts = language_model(), documents(5, 5)
    with torch.device("meta"):
        rows = Activations.collect(model, "1.mlp", texts, tmp_path, dtype="float32")["1.mlp"].take([1])
        x, y = rows.batch([0, 3])
        mean = rows.mean
    expected_x, expected_y = expected(model, 1, texts[1:])
    torch.testing.assert_close((x, y, mean), (expected_x[[0, 3]], expected_y[[0, 3]], expected_y.mean(0)))


def test_shards_stay_on_the_disk(tmp_path: Path) -> None:
    """Rows are read when they are asked for: opening reads none."""
    store = Activations.collect(language_model(), "1.mlp", documents(5, 5), tmp_path, dtype="float32")
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    store = Activations(tmp_path)
    x = store["1.mlp"].batch([3])[0]
    place = content.index(x.numpy().tobytes())
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(torch.full((6,), 7.0).numpy().tobytes())
    assert store["1.mlp"].batch([3])[0].tolist() == [[7.0] * 6]


def test_a_model_of_transformers(llama: Any, texts: list[Tensor], tmp_path: Path) -> None:
    modules = ["model.layers.1.mlp", "model.layers.2.post_attention_layernorm", "model.layers.0.self_attn"]
    store = Activations.collect(llama, modules, texts, tmp_path, dtype="float32")
    x, y = store["model.layers.1.mlp"].batch(range(len(store)))
    with torch.no_grad():
        torch.testing.assert_close(llama.model.layers[1].mlp(x), y)
        x, y = store["model.layers.2.post_attention_layernorm"].batch(range(len(store)))
        torch.testing.assert_close(llama.model.layers[2].post_attention_layernorm(x), y)
    assert len(store) == sum(map(len, texts))
