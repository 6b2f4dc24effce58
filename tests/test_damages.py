"""Every file that a command reads, with every damage: one line names the file, and nothing is changed."""

from __future__ import annotations

import builtins
import gzip
import io
import json
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for package in (
    "accelerate",
    "fairlearn",
    "matplotlib",
    "plotly",
    "pydantic",
    "safetensors",
    "tokenizers",
    "typer",
):
    pytest.importorskip(package)

from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from mumoe_tensor import study  # noqa: E402
from mumoe_tensor.cli import app  # noqa: E402
from mumoe_tensor.configs.bias import RECIPES  # noqa: E402
from mumoe_tensor.experiments import bias  # noqa: E402
from mumoe_tensor.models import load_head, load_model, save_head, save_model  # noqa: E402
from mumoe_tensor.nn.weights import read_tensors, read_weights, write_tensors  # noqa: E402
from mumoe_tensor.study import Results, Setting  # noqa: E402
from mumoe_tensor.training import attributes, read_images, read_npz  # noqa: E402
from mumoe_tensor.training.checkpoint import Checkpoints  # noqa: E402
from mumoe_tensor.training.run import read_config  # noqa: E402

RUNS = Path(__file__).parent / "data" / "states" / "runs.tar.xz"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of finished runs, their models written anew, and what else commands read."""
    folder = tmp_path_factory.mktemp("recorded")
    with tarfile.open(RUNS) as archive:
        archive.extractall(folder, filter="data")
    shutil.rmtree(folder / "mixer" / "tensorboard")
    save_model(load_model(folder / "mixer" / "model.safetensors"), folder / "mixer" / "model.safetensors")
    save_head(load_head(folder / "head" / "head.safetensors"), folder / "head" / "head.safetensors")
    shutil.copytree(folder / "mixer", folder / "begun")
    (folder / "begun" / "model.safetensors").unlink()
    checkpoints = Checkpoints(folder / "begun" / "checkpoints")
    checkpoints.write(4, *checkpoints.read(4))
    checkpoints.path(2).unlink()
    config = read_config(folder / "mixer" / "config.json")
    config["settings"]["data"]["scale"] = True
    for name in ("mixer", "begun"):
        (folder / name / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "own.toml").write_text(toml(config["settings"]))
    shutil.rmtree(folder / "study")
    layer, more = study.Layer("Layer", 8, 6), {"data": "none", "devices": ["cpu"]}
    planned = study.plan(study.prepare(layer, experts=2, formats=["cp"], batch=4, **more))
    with study.open_folder(planned.setting, folder / "study") as (_, results, _):
        for task in planned.tasks[:3]:
            results.add(task.run(), {"machine": "none"})
    texts = folder / "texts"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text("Wherefore art\nthou\n")
    pairs = folder / "pairs"
    pairs.mkdir()
    ids = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "th", "<|endoftext|>"])}
    (pairs / "encoder.json").write_text(json.dumps(ids))
    (pairs / "vocab.bpe").write_text("#version: 0.2\nt h\n", encoding="utf-8")
    (folder / "celeba").mkdir()
    names, values = ["Blond_Hair", "Male", "Smiling"], np.random.default_rng(0).choice([-1, 1], (80, 3))
    rows = [f"{k:06}.jpg,{','.join(map(str, row))}\n" for k, row in enumerate(values)]
    with zipfile.ZipFile(folder / "celeba" / "celeba.csv.zip", "w") as archive:
        archive.writestr("celeba.csv", "".join([f"filename,{','.join(names)}\n", *rows]))
    np.savez(folder / "embeddings.npz", x=np.random.default_rng(0).random((80, 4)))
    return folder


@pytest.fixture
def work(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder."""
    monkeypatch.setattr(attributes, "CELEBA_PARTS", (60, 10, 10))
    shutil.copytree(recorded, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def toml(settings: dict[str, Any]) -> str:
    lines = []
    for name, table in settings.items():
        if isinstance(table, dict):
            lines.append(f"[{name}]")
            lines += [f"{key} = {json.dumps('none' if v is None else v)}" for key, v in table.items()]
    return "\n".join(lines)


HEAD = "train head --features features.npz --experts 4 --rank 3 --epochs 1 --out new"
ABOVE = "train head --images images.npz --out new --weights"
STUDY = (
    "study --in-features 8 --out-features 3 --formats cp --data features.npz --quick --experts 2 "
    "--parameters 1000 --head-experts 4 --head-parameters 1000 --out new"
)
MIXER = "train mixer own.toml --out"
TOKENIZE = "tokenize texts --hold-out b.txt --vocabulary-files pairs --out new"
CELEBA = "bias --target Smiling --group Male --folder . --out new"
ADULT = "bias --target income --group Male=0 --data adult --folder . --quick --seeds 1 --out"
GPT2 = (
    "train gpt2 --set data.training=training.bin --set data.validation=validation.bin --set model.context=8 "
    "--set model.vocabulary=41 --out new"
)
#: What a command reads: its format, its file, and the command.
READS = [
    ("features", "features.npz", HEAD),
    ("features", "features.npz", STUDY),
    ("images", "images.npz", f"{MIXER} new"),
    ("array", "embeddings.npz", f"{CELEBA} --embeddings embeddings.npz"),
    ("array", "pictures.npz", "inspect head --images pictures.npz"),
    ("toml", "own.toml", f"{MIXER} new"),
    ("text", "texts/a.txt", TOKENIZE),
    ("json", "pairs/encoder.json", TOKENIZE),
    ("text", "pairs/vocab.bpe", TOKENIZE),
    ("config", "mixer/config.json", "inspect mixer"),
    ("config", "head/config.json", "inspect head"),
    ("config", "mixer/config.json", f"{MIXER} mixer"),
    ("model", "mixer/model.safetensors", "inspect mixer"),
    ("model", "head/head.safetensors", "inspect head"),
    ("tensors", "begun/checkpoints/step-00000004.safetensors", f"{MIXER} begun"),
    ("table", "mixer/metrics.csv", f"{MIXER} mixer"),
    ("json", "study/study.json", "study --setting study/study.json --out study"),
    ("config", "study/study.json", "study --setting study/study.json --out study"),
    ("table", "study/results.csv", "study --setting study/study.json --out study"),
    ("table", "bias/results.csv", f"{ADULT} bias"),
    ("lines", "adult/adult.data", f"{ADULT} new"),
    ("zip", "celeba/celeba.csv.zip", CELEBA),
    ("bytes", "training.bin", GPT2),
    ("json", "head/config.json", HEAD.replace("--out new", "--out head")),
    ("json", "tokens.json", "inspect gpt2 --vocabulary-files pairs"),
    ("weights", "weights.pth", f"{ABOVE} weights.pth"),
    ("weights", "weights.safetensors", f"{ABOVE} weights.safetensors"),
]


# ---- damages ----------------------------------------------------------------------------------------------


def content(make: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(make(path.read_bytes()))


def changed(make: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change what a file of JSON says."""
    return lambda path: path.write_text(json.dumps(make(json.loads(path.read_text()))))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def arrays(change: Callable[..., Any]) -> Damage:
    """Change the arrays of an archive; what has no labels gets none."""

    def damage(path: Path) -> None:
        with np.load(path) as archive:
            before = dict(archive)
        after = change(**before)
        np.savez(path, **{name: after[name] for name in after if name in before or name not in "xy"})

    return damage


def header(shape: str) -> Damage:
    """An array that declares another shape than it has."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        entries["x.npy"] = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 64
        with zipfile.ZipFile(path, "w") as archive:
            for name, entry in entries.items():
                archive.writestr(name, entry)

    return damage


def double_entry(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x.npy", archive.read("x.npy"))


def single_array(path: Path) -> None:
    with np.load(path) as archive, path.with_suffix(".npy").open("wb") as file:
        np.save(file, archive["x"])
    path.with_suffix(".npy").rename(path)


def with_value(value: Any) -> Callable[..., Any]:
    def change(x: Any, **others: Any) -> Any:
        x = x.astype(np.float64)
        x.flat[0] = value
        return {"x": x, **others}

    return change


def tensors(change: Callable[[dict[str, Any], dict[str, str]], Any], checked: bool = True) -> Damage:
    """Write a file of tensors anew, with checksums that are right, or without."""

    def damage(path: Path) -> None:
        from safetensors.torch import save_file

        state, about = read_tensors(path)
        state = {name: value.clone() for name, value in state.items()}
        change(state, about)
        if checked:
            write_tensors(path, state, about)
        else:
            save_file(state, path, about)

    return damage


def huge(*names: str) -> Damage:
    """Sizes in the description that no memory has room for."""

    def change(state: dict[str, Any], about: dict[str, str]) -> None:
        for key in about:
            for name in names:
                about[key] = about[key].replace(f'"{name}": ', f'"{name}": 1000000000')

    return tensors(change)


#: In a description, one that the shapes of the tensors do not tell.
NUMBER: Any = re.compile(rb'(stochastic_depth|total|in_features)\\": \d')


def write(path: Path, x: Any) -> None:
    if path.suffix == ".pth":
        torch.save({"x": x}, path)
    else:
        write_tensors(path, {"x": x}, {})


class Evil:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("was-run"),)


def flip(place: Callable[[bytes], int]) -> Damage:
    """Flip one bit."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place(data)] ^= 1
        path.write_bytes(data)

    return damage


EVERY: dict[str, Damage] = {
    "a folder": folder,
    "empty": content(lambda old: b""),
    "cut": content(lambda old: old[: len(old) // 2 - 1 + len(old) // 2 % 2]),
    "binary": content(lambda old: bytes(range(255, 0, -1)) * 3),
}
TEXT: dict[str, Damage] = EVERY | {
    "latin-1": content(lambda old: old + b"caf\xe9\n"),
    "NUL": content(lambda old: old.replace(b"\n", b"\0\n") + b"\0\n"),
}
JSON: dict[str, Damage] = TEXT | {
    "a list": content(lambda old: b"[" + old + b"]"),
    "deep": content(lambda old: b'{"a":' * 100_000),
    "a key twice": content(lambda old: old.replace(b"{", b'{"k": 1, "k": 2, ', 1)),
    "NaN": content(lambda old: old.replace(b"{", b'{"k": NaN, ', 1)),
    "too large a number": content(lambda old: old.replace(b"{", b'{"k": 1e999, ', 1)),
    "a key too many": changed(lambda actual: actual | {"k": 1}),
    "a key missing": changed(lambda actual: dict(list(actual.items())[1:])),
}


def inside(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the first object in a file of JSON."""

    def make(actual: dict[str, Any]) -> Any:
        change(actual[next(iter(actual))])
        return actual

    return changed(make)


def deepest(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """Change the first object that has no object in it."""

    def make(actual: dict[str, Any]) -> None:
        inner = [value for value in actual.values() if isinstance(value, dict)]
        (deepest(change) if inner else change)(inner[-1] if inner else actual)

    return make


ARRAY: dict[str, Damage] = EVERY | {
    "a single array": single_array,
    "strings": arrays(lambda x, **rest: {"x": x.astype(str), **rest}),
    "dates": arrays(lambda x, **rest: {"x": x.astype("int64").astype("datetime64[D]"), **rest}),
    "complex": arrays(lambda x, **rest: {"x": x.astype(complex), **rest}),
    "objects": arrays(lambda x, **rest: {"x": x.astype(object), **rest}),
    "no axis": arrays(lambda x, **rest: {"x": x.sum() * 0, **rest}),
    "a row too few": arrays(lambda x, **rest: {"x": x[1:], **rest}),
    "no row": arrays(lambda x, **rest: {"x": x[:0], **rest}),
    "no x": arrays(lambda x, **rest: {"z": x, **rest}),
    "NaN": arrays(with_value(np.nan)),
    "infinity": arrays(with_value(-np.inf)),
    "beyond float32": arrays(with_value(1e300)),
    "twice": double_entry,
    "a huge shape": header("(1000000000000,)"),
    "a shape that is none": header("(1000000000000"),
    "one bit": flip(lambda data: 200),
}
LABELS: dict[str, Damage] = {
    "no labels": arrays(lambda x, y: {"x": x, "z": y}),
    "labels of halves": arrays(lambda x, y: {"x": x, "y": y / 2}),
    "labels that are bools": arrays(lambda x, y: {"x": x, "y": y > 0}),
    "negative labels": arrays(lambda x, y: {"x": x, "y": y - 1}),
    "labels beyond int64": arrays(lambda x, y: {"x": x, "y": y.astype(np.uint64) + np.uint64(2**63)}),
    "labels that are dates": arrays(lambda x, y: {"x": x, "y": y + 20_260_101}),
    "a column of labels": arrays(lambda x, y: {"x": x, "y": y[:, None]}),
}
TENSORS: dict[str, Damage] = EVERY | {
    "no safetensors": content(lambda old: b"no tensors at all, but a text"),
    "one bit of a tensor": flip(lambda data: -1),
    "one bit of the description": flip(lambda data: data.index(b"checksums") + 20),
    "one bit of a number": flip(lambda data: NUMBER.search(data).end() - 1),
    "one bit of the word for checksums": flip(lambda data: data.index(b"checksums")),
    "one bit of a shape": flip(lambda data: data.index(b'"shape":[') + 9),
    "a tensor dropped": tensors(lambda state, about: state.pop(sorted(state)[0])),
    "a tensor dropped, no checksums": tensors(lambda state, about: state.pop(sorted(state)[0]), False),
    "a tensor too many": tensors(lambda state, about: state.update(bogus=torch.ones(2))),
    "another shape": tensors(lambda state, about: state.update({sorted(state)[0]: torch.ones(7, 5)})),
    "no description": tensors(lambda state, about: about.clear()),
    "no description or checksums": tensors(lambda state, about: about.clear(), False),
    "a description that is none": tensors(lambda state, about: about.update(dict.fromkeys(about, "{"))),
    "an empty description": tensors(lambda state, about: about.update(dict.fromkeys(about, "{}"))),
}
DAMAGES: dict[str, dict[str, Damage]] = {
    "bytes": {name: EVERY[name] for name in ("a folder", "empty", "cut")},
    "text": TEXT,
    "toml": TEXT
    | {
        "deep": content(lambda old: b"a = " + b"[" * 100_000),
        "a key twice": content(lambda old: old + b"\n[data]\n"),
        "an unknown key": content(lambda old: old + b"\nbogus = 1\n"),
        "an unknown table": content(lambda old: old + b"\n[bogus]\n"),
        "a value of another type": content(lambda old: old.replace(b"epochs = ", b"epochs = 0.")),
    },
    "json": JSON,
    "config": JSON
    | {
        "a value of another type": inside(deepest(lambda actual: actual.update({next(iter(actual)): [{}]}))),
        "an unknown key": inside(deepest(lambda actual: actual.update(bogus=1))),
        "a list inside": changed(lambda actual: actual | {next(iter(actual)): [1]}),
        "another kind of run": changed(lambda actual: {"setting": {}, "head": {}} if "settings" in actual else
                                    {"settings": {}, "model": {}}),
    },
    "lines": TEXT
    | {
        "a row too short": content(lambda old: old + b"\n39, Private, 3\n"),
        "a row too long": content(lambda old: old + old.splitlines()[0] + b", 4\n"),
        "words for numbers": content(lambda old: b"x" + old),
        "another income": content(lambda old: old.replace(b">50K", b">60K", 1)),
    },
    "zip": EVERY
    | {
        "no table": lambda path: zipfile.ZipFile(path, "w").close(),
        "a row too few": lambda path: _table(path, lambda text: text[:-20]),
        "other values": lambda path: _table(path, lambda text: text.replace("-1", "0", 1)),
        "no filename": lambda path: _table(path, lambda text: text.replace("filename", "file", 1)),
    },
    "table": TEXT
    | {
        "the last line cut": content(lambda old: old[:-2]),
        "a row twice": content(lambda old: old + old.splitlines(keepends=True)[-1]),
        "a row too short": content(lambda old: old + b"1,2\n"),
        "another column": content(lambda old: old.replace(b",", b",bogus,", 1)),
        "another version": content(lambda old: old.replace(b"seconds", b"time").replace(b"value", b"worth")),
        "words for numbers": content(lambda old: old + old.splitlines(keepends=True)[-1].replace(b"0", b"x")),
        "only the columns": content(lambda old: old.splitlines(keepends=True)[0] + b"\n"),
    },
    "array": ARRAY,
    "features": ARRAY | LABELS,
    "images": ARRAY
    | LABELS
    | {
        "above 255": arrays(lambda x, y: {"x": x.astype(np.int32) + 1, "y": y}),
        "below 0": arrays(lambda x, y: {"x": x.astype(np.int16) - 1, "y": y}),
        "floats up to 255": arrays(lambda x, y: {"x": x.astype(np.float32), "y": y}),
        "two axes": arrays(lambda x, y: {"x": x[:, 0], "y": y}),
    },
    "tensors": TENSORS,
    "weights": EVERY
    | {
        "a number": lambda path: torch.save(3, path),
        "a list": lambda path: torch.save([torch.ones(2)], path),
        "code": lambda path: path.write_bytes(pickle.dumps(Evil())),
        "other tensors": lambda path: write(path, torch.ones(2)),
    },
    "model": TENSORS | {"huge sizes": huge("width", "in_features"), "many blocks": huge("depth", "classes")},
}  # fmt: skip


def _table(path: Path, change: Callable[[str], str]) -> None:
    with zipfile.ZipFile(path) as archive:
        text = archive.read("celeba.csv").decode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("celeba.csv", change(text))


#: What is no damage there.
FINE = {
    ("json", "tokens.json", "a key too many"),
    ("text", "a.txt", "cut"), ("images", "images.npz", "a folder"),
}  # fmt: skip
CASES = [
    pytest.param(command, file, damage, id=f"{command.split(' --')[0]}-{file}-{name}".replace("/", "."))
    for kind, file, command in READS
    for name, damage in DAMAGES[kind].items()
    if (kind, file.rpartition("/")[2], name) not in FINE
]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(command: str, file: str, work: Path, around: Any = None) -> None:
    """A command that must be refused: one line that names a file, and nothing is changed."""
    before = tree(work)
    with around or nullcontext():
        result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (
        result.output,
        result.exception,
    )
    assert result.stdout == "" and result.stderr.count("\n") == 1, result.output
    assert file in result.stderr, result.stderr
    assert tree(work) == before


@pytest.mark.parametrize(("command", "file", "damage"), CASES)
def test_a_damage_is_told_in_one_line(command: str, file: str, damage: Damage, work: Path) -> None:
    if file == "pictures.npz":
        shutil.copy("images.npz", file)
    elif file.startswith("weights"):
        write(work / file, torch.ones(3))
    elif file == "tokens.json":
        (work / file).write_text(json.dumps({"vocabulary": 258, "training": []}))
    damage(work / file)
    refused(command, file, work)


# ---- what is no file of a kind of its own -----------------------------------------------------------------


def idx(array: Any, code: int) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


BYTES = idx(np.zeros((60, 8, 8), np.uint8), 0x08)
IDX: dict[str, tuple[str, bytes]] = {
    "empty": ("x", b""),
    "cut": ("x", BYTES[:-1]),
    "binary": ("x", bytes(range(255))),
    "not gzipped": ("x.gz", BYTES),
    "cut gzip": ("x.gz", gzip.compress(BYTES)[:-9]),
    "a huge shape": ("x", bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 2**31)),
    "255 axes": ("x", bytes([0, 0, 8, 255]) + struct.pack(">255I", *[1] * 255) + b"1"),
    "NaN": ("x", idx(np.full((60, 8, 8), np.nan, ">f4"), 0x0D)),
    "above 255": ("x", idx(np.full((60, 8, 8), 256, ">i2"), 0x0B)),
    "halves": ("y", idx(np.full(60, 0.5, ">f4"), 0x0D)),
    "negative": ("y", idx(np.full(60, -1, ">i4"), 0x0C)),
    "a column": ("y", idx(np.zeros((60, 1), np.uint8), 0x08)),
    "a label too few": ("y", idx(np.zeros(59, np.uint8), 0x08)),
}


@pytest.mark.parametrize("damage", IDX)
def test_idx(damage: str, work: Path) -> None:
    files = {"x": BYTES, "y": idx(np.arange(60, dtype=np.uint8) % 3, 0x08)}
    name, data = IDX[damage]
    files[name] = data
    for file, written in files.items():
        (work / file).write_bytes(written)
    x, y = ("x.gz" if "x.gz" in files else "x"), "y"
    refused(f"{MIXER} new --set data.inputs={x} --set data.labels={y}", name, work)


PATHS = {
    HEAD.replace("features.npz", "{}"): "text",
    f"{MIXER} new".replace("own.toml", "{}.toml"): "toml",
    f"{MIXER} new --set data.inputs={{}}": "images",
    f"{CELEBA} --embeddings {{}}": "array",
    "inspect head --images {}": "array",
    TOKENIZE.replace("texts", "{} texts/b.txt"): "text",
    TOKENIZE.replace("pairs", "{}"): "folder",
    "inspect {}": "folder",
    "study --setting {} --out new": "json",
    GPT2.replace("training.bin", "{}"): "bytes",
    "bias --target Smiling --group Male --folder {} --out new": "folder",
}


@contextmanager
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of this name cannot be opened. (To an administrator every file is readable.)"""
    real = io.open

    def opened(file: Any, *arguments: Any, **options: Any) -> Any:
        if "unreadable" in str(file):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments, **options)

    with monkeypatch.context() as patch:
        for module in (io, builtins):
            patch.setattr(module, "open", opened)
        yield


@pytest.mark.parametrize("command", PATHS)
@pytest.mark.parametrize("path", ["missing", "own.toml/inside", "unreadable", "texts"])
def test_a_path_that_cannot_be_read(
    command: str, path: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "texts" and (PATHS[command] in ("folder", "images") or "tokenize" in command):
        pytest.skip("takes a folder")
    line = command.format(path)
    if path == "texts":
        (work / "texts.toml").mkdir()
    if path == "unreadable":
        if PATHS[command] == "folder":
            shutil.copytree("pairs" if "tokenize" in command else "head", path)
            shutil.copytree("celeba", f"{path}/celeba")
        else:
            (work / (f"{path}.toml" if PATHS[command] == "toml" else path)).write_bytes(b"12345678" * 100)
    refused(line, path, work, unreadable(monkeypatch))


@pytest.mark.parametrize(
    "command",
    [
        f"{MIXER} new --set model.width=1000000000",
        f"{MIXER} new --set model.depth=1000000000",
        f"{MIXER} new --set model.channel_hidden=10000000000000",
        f"{GPT2} --set model.vocabulary=60000000000",
        f"{GPT2} --set model.width=3000000000",
        f"{GPT2} --set model.depth=1000000000",
        HEAD.replace("--rank 3", "--hidden 1000000000 --format hadamard"),
        HEAD.replace("--rank 3", "--rank 1000000000"),
    ],
)
def test_sizes_that_no_memory_has_room_for(command: str, work: Path) -> None:
    refused(command, "memory", work)


@pytest.mark.parametrize("damage", ["cut", "a tensor dropped", "one bit of a tensor", "missing"])
def test_models_of_an_experiment(damage: str, work: Path) -> None:
    (old,) = (work / "bias" / "models").glob("*mumoe-0.pt")
    path = old.with_suffix(".safetensors")
    write_tensors(path, read_weights(old), {})
    old.unlink()
    (TENSORS | {"missing": Path.unlink})[damage](path)
    task = attributes.read_adult(work / "adult", ("income", 1), ("Male", 0))
    experiment = bias.Experiment(task, RECIPES["adult"].quick(), work / "bias")
    with pytest.raises((ValueError, FileNotFoundError), match="mumoe-0"):
        experiment.test()


# ---- what is no damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_marks_and_ends_of_lines_are_read(mark: bytes, end: bytes, work: Path) -> None:
    before = {}
    files = "own.toml mixer/config.json mixer/metrics.csv study/study.json study/results.csv texts/a.txt"
    for file in f"{files} pairs/encoder.json pairs/vocab.bpe adult/adult.data".split():
        before[file] = (work / file).read_bytes()
        (work / file).write_bytes(mark + before[file].replace(b"\n", end))
    for command in (f"{MIXER} mixer --json", TOKENIZE, "inspect mixer --rows 4 --removed 1"):
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.stderr
    assert not json.loads(CliRunner().invoke(app, f"{MIXER} mixer --json".split()).stdout)["trained"]
    tokens = json.loads((work / "new" / "tokens.json").read_text())
    assert tokens["training"][0]["tokens"] == tokens["validation"][0]["tokens"]
    assert len(Results(work / "study" / "results.csv")) == before["study/results.csv"].count(b"\n") - 1
    assert Setting.from_json(work / "study" / "study.json").batch == 4
    assert len(attributes.read_adult(work / "adult", ("income", 1), ("Male", 0)).test) == 59


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<i4", ">u4", "<i8", ">u8"])
def test_images_of_any_integers_are_scaled_and_features_are_not(dtype: str, tmp_path: Path) -> None:
    x, y = np.arange(256).reshape(4, 8, 8), np.array([0, 1, 0, 2])
    np.savez(tmp_path / "d.npz", x=x.astype(dtype), y=y.astype(dtype))
    images, features = read_images(tmp_path / "d.npz"), read_npz(tmp_path / "d.npz")
    np.testing.assert_allclose(images.x, x / 255, rtol=1e-6)
    assert np.array_equal(features.x, x) and images.y.tolist() == features.y.tolist() == y.tolist()


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", ">f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_other_numbers_are_read_as_they_are(dtype: str, order: Any, tmp_path: Path) -> None:
    x = np.array([[0, 1, 0.5], [0.25, 1, 0.75]]).astype(dtype, order=order)
    np.savez_compressed(tmp_path / "d.npz", x=x, y=np.array([0, 1]), more=np.array(["a"]))
    for read in (read_images, read_npz):
        data = read(tmp_path / "d.npz")
        assert data.x.dtype == torch.float32 and np.array_equal(data.x, x.astype(np.float32))
