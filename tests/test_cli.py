"""The command line prints what the library returns, and bad input is one line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import mumoe_tensor as mt

pytest.importorskip("typer")

from typer.testing import CliRunner

from mumoe_tensor.cli import app
from mumoe_tensor.contraction.machine import MACHINES, in_words

PLAN = "plan tucker --experts 256 --in-features 768 --out-features 768 --rank 64,128,128 --batch 8192"
COST = "cost cp --experts 256 --in-features 768 --hidden 3072 --out-features 768 --rank 556 --bias --gate"
SIZES = "--experts 64 --in-features 768 --out-features 1000"
FIT = f"fit tr {SIZES} --rank '4,4,?' --parameters 769000 --bias --gate"
SMALL = "--experts 4 --in-features 3 --out-features 2"

needs_training = pytest.mark.skipif(
    not all(map(find_spec, ("accelerate", "pydantic", "safetensors", "tensorboardX", "tokenizers", "torch"))),
    reason="training needs the extra train",
)


def run(line: str) -> str:
    """Output of a command that succeeds, with nothing on stderr."""
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def figures(line: str) -> object:
    """What a command prints with ``--json``: the whole of stdout must be JSON."""
    return json.loads(run(f"{line} --json"))


# ---- every command ----------------------------------------------------------------------------------------


def test_formats_are_the_registered_ones() -> None:
    actual = figures("formats")
    assert [entry["name"] for entry in actual] == list(mt.formats())
    for entry, format in zip(actual, mt.formats().values(), strict=True):
        assert entry["title"] == format.title
        assert entry["rank"] == list(format.bonds(1))
        assert len(entry["factors"]) == len(format.declaration(1))
        # The closed form, evaluated, is the number of parameters.
        rank = tuple(range(2, 2 + len(format.bonds(1))))
        values = {"N": 7, "I": 12, "O": 35, **dict(zip(format.bonds(1), rank, strict=True))}
        values |= {"I1": 3, "I2": 4, "O1": 5, "O2": 7}
        counted = eval(entry["parameters"].replace("·", "*"), {}, values)
        cost = mt.cost(format, experts=7, in_features=12, out_features=35, rank=rank)
        assert counted == cost.parameters
        assert entry["splits"] == {mode.upper(): parts for mode, parts in format.splits.items()}
        assert len(entry["terms"]) == len(format.summands(1))
    table = run("formats")
    for format in mt.formats().values():
        assert format.name in table and format.title in table
    assert "b1 N b2" in table and "+ b2·I·b3" in table and "I in 2" in table and "O1 I1 r O2" in table


def test_plan() -> None:
    expected = mt.plan(
        "tucker", experts=256, in_features=768, out_features=768, rank=(64, 128, 128), batch=8192
    )
    assert run(PLAN).strip() == str(expected).strip()
    actual = figures(PLAN)
    for name in ("flops", "write", "copied", "size", "peak", "saved", "seconds"):
        assert actual[name] == getattr(expected, name)
    assert mt.Machine(**actual["machine"]) == expected.machine
    assert [step["equation"] for step in actual["steps"]] == [step.equation for step in expected.steps]
    assert [tuple(step["shape"]) for step in actual["steps"]] == [step.shape for step in expected.steps]
    assert sum(step["flops"] for step in actual["steps"]) == actual["flops"]


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ("--minimize peak", {"minimize": "peak"}),
        ("--implementation reconstructed", {"implementation": "reconstructed"}),
        ("--fold-weights", {"fold_weights": True}),
        ("--dtype float32", {"dtype": "float32"}),
        ("--machine h200 --dtype bfloat16", {"machine": "h200", "dtype": "bfloat16"}),
        ('--machine \'{"flops": 3e14, "bandwidth": 2e12}\'', {"machine": mt.Machine(3e14, 2e12)}),
        ("--memory-limit 20000", {"memory_limit": 20_000}),
        ("--bias --implementation reconstructed", {"bias": True, "implementation": "reconstructed"}),
    ],
)
def test_every_option_of_plan_reaches_the_library(options: str, keywords: dict) -> None:
    sizes = {"experts": (8, 6), "in_features": 24, "out_features": 20, "rank": (3, 5, 7, 6), "batch": 64}
    expected = mt.plan("tucker", **sizes, **keywords)
    plain = "plan tucker --experts 8x6 --in-features 24 --out-features 20 --rank 3,5,7,6 --batch 64"
    actual = figures(f"{plain} {options}")
    for name in ("flops", "write", "size", "peak", "saved", "implementation", "seconds"):
        assert actual[name] == getattr(expected, name)
    assert len(actual["constant_steps"]) == len(expected.constant_steps)
    assert run(f"{plain} {options}").strip() == str(expected).strip()


def test_cost() -> None:
    expected = mt.cost(
        "cp", experts=256, in_features=768, hidden=3072, out_features=768, rank=556, bias=True, gate=True
    )
    actual = figures(COST)
    names = ("parameters", "flops", "reference_flops", "write", "size", "peak", "saved", "max_expert_rank")
    for name in (*names, "gate_parameters", "gate_flops", "seconds", "gate_seconds"):
        assert actual[name] == getattr(expected, name), name
    assert [layer["parameters"] for layer in actual["layers"]] == [
        x.weight_parameters for x in expected.spec.layers
    ]
    assert [layer["flops"] for layer in actual["layers"]] == [x.flops for x in expected.plans]
    table = run(COST)
    for name in names:
        assert f"{getattr(expected, name):,}" in table
    assert "768 → 3072" in table and "3072 → 768" in table
    assert in_words(expected.seconds) in table and str(expected.plans[0].machine) in table
    gpu = figures(f"{COST} --machine cuda --dtype bfloat16")
    assert gpu["seconds"] < actual["seconds"] and gpu["machine"] == asdict(MACHINES["cuda"]["bfloat16"])
    gated = figures(f"{COST} --gated")
    assert gated["parameters"] == actual["parameters"] + actual["layers"][0]["parameters"]
    assert run(f"{COST} --gated").count("768 → 3072") == 2


def test_layers_of_equal_sizes_have_a_column_each() -> None:
    table = run("cost cp --experts 2 --in-features 6 --hidden 6 --out-features 6 --rank 2")
    assert table.count("6 → 6") == 2


def test_cost_without_levels_gate_or_hidden_size() -> None:
    actual = figures("cost dense --experts none --in-features 9 --out-features 5 --bias --dtype float16")
    assert actual["parameters"] == 50 and actual["gate_parameters"] == 0 and actual["unit"] == "bytes"
    assert "gate" not in run("cost dense --experts none --in-features 9 --out-features 5")


def test_cost_shows_padding() -> None:
    padded = '\'{"name":"btt","splits":{"i":[2,5]}}\''
    line = f"cost {padded} --experts none --in-features 9 --hidden 8 --out-features 4 --rank 2"
    assert run(line).endswith("in_features 9 padded to 10\nhidden 8 padded to 10\n")
    assert figures(line)["padded"] == {"in_features": 10, "hidden": 10}
    assert "padded" not in run(COST) and figures(COST)["padded"] == {}


def test_fit() -> None:
    actual = figures(FIT)
    sizes = {"experts": 64, "in_features": 768, "out_features": 1000, "bias": True, "gate": True}
    rank = mt.fit_rank("tr", rank=(4, 4, None), parameters=769_000, **sizes)
    assert tuple(actual["rank"]) == rank
    assert actual["parameters"] == mt.cost("tr", rank=rank, **sizes).parameters
    assert actual["budget"] == 769_000 and actual["gate_parameters"] == 64 * 768
    text = run(FIT)
    assert f"rank {','.join(map(str, rank))}\n" in text and f"{actual['parameters']:,}" in text


def test_fit_matches_the_dense_block_and_rounds() -> None:
    line = "fit cp --experts 16 --in-features 40 --hidden 50 --out-features 30 --bias --gate --rounding"
    ranks = [figures(f"{line} {rounding}")["rank"] for rounding in ("down", "up")]
    assert ranks[1][0] == ranks[0][0] + 1
    assert figures(f"{line} down")["budget"] == 41 * 50 + 51 * 30
    below, above = (figures(f"{line} {r}")["parameters"] for r in ("down", "up"))
    assert below < 41 * 50 + 51 * 30 < above
    assert figures(f"{line} down --gated")["budget"] == 2 * 41 * 50 + 51 * 30


def test_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of the command reach the library; tests/study tests the study itself."""
    pytest.importorskip("plotly")
    from mumoe_tensor.study import sweep

    monkeypatch.setattr(sweep, "peaks", lambda *_: (1, 2))
    monkeypatch.setattr("mumoe_tensor.progress.LINE_SECONDS", 1e9)
    sizes = "--in-features 40 --hidden 50 --out-features 30"
    line = f"study {sizes} --experts 4,3x2 --formats cp,hadamard --parameters 0.9x --batch 4 --data none"
    line += f" --seed 7 --seconds 0.001 --devices cpu --quick --jobs 1 --out {tmp_path}"
    actual = figures(line)
    assert {Path(file).suffix for file in actual["files"]} == {".csv", ".html", ".json", ".png", ".svg"}
    assert all(Path(file).stat().st_size > 0 for file in actual["files"])
    setting = actual["setting"]
    assert setting["layer"]["hidden"] == 50 and setting["experts"] == [[4], [3, 2]] and setting["seed"] == 7
    budget = round(0.9 * (41 * 50 + 51 * 30))
    layer = {"experts": 4, "in_features": 40, "hidden": 50, "out_features": 30, "bias": True, "gate": True}
    rank = mt.fit_rank("cp", rounding="nearest", parameters=budget, **layer)
    rows = [row for row in actual["rows"] if (row["subject"], row["experts"]) == ("cp", "4")]
    (row,) = [r for r in rows if r["quantity"] == "parameters" and r["sizes"] == "40x50x30"]
    assert row["value"] == mt.cost("cp", rank=rank, **layer).parameters and row["rank"] == str(rank)
    assert {row["seed"] for row in rows if row["quantity"] == "forward"} == {7}
    # Again, from its own setting: everything is there.
    text = run(f"study --jobs 1 --setting {tmp_path}/study.json --out {tmp_path}")
    assert f"{row['value']:,.0f}" in text and "report.html" in text


def test_version_and_help() -> None:
    assert run("--version") == f"{mt.__version__}\n"
    assert "Usage" in run("") and "Usage" in run("--help")
    first = [line.strip() for line in run("").splitlines() if line.startswith("  mumoe-tensor ")]
    assert len(first) == 3 and first[-1] == "mumoe-tensor study --quick"
    assert all(run(line.removeprefix("mumoe-tensor ")) for line in first[:2])
    for command in ("formats", "plan", "cost", "fit", "study", "inspect", "tokenize"):
        assert command in run("--help")
        output = " ".join(run(f"{command} --help").split())
        assert f"Example: mumoe-tensor {command}" in output and "--json" in output


def test_help_of_the_study_names_its_layers() -> None:
    from mumoe_tensor.study import LAYERS

    output = run("study --help")
    for name in LAYERS:
        assert name in output


@pytest.mark.parametrize("command", [PLAN, COST, FIT, "study --layer gpt2-mlp --experts 256,64x64"])
def test_examples_in_the_help_are_the_documented_ones(command: str) -> None:
    output = "".join(run(f"{command.split()[0]} --help").split())
    assert "".join(f"mumoe-tensor {command}".split()) in output


@needs_training
def test_defaults_of_options_are_those_of_the_settings() -> None:
    from dataclasses import fields
    from inspect import signature

    from mumoe_tensor.cli.training import train_head
    from mumoe_tensor.configs.head import HeadModelConfig
    from mumoe_tensor.models import Head

    settings = signature(Head).parameters
    for field in fields(HeadModelConfig):
        assert field.name in signature(train_head).parameters
        assert settings[field.name].default == field.default, field.name


def own_tokens(folder: Path) -> str:
    """Options for a tiny GPT-2 on a file of tokens that repeat themselves."""
    (np.arange(300) % 5).astype("<u2").tofile(folder / "tokens.bin")
    model = {"vocabulary": 6, "context": 8, "width": 16, "depth": 1, "heads": 2, "hidden": 32, "dropout": 0}
    train = {"steps": 8, "evaluate_every": 4, "batch_size": 8, "learning_rate": 0.01}
    settings = {"data.training": folder / "tokens.bin", "data.validation": folder / "tokens.bin"}
    settings |= {f"model.{k}": v for k, v in model.items()} | {f"train.{k}": v for k, v in train.items()}
    return " ".join(f"--set {k}={v}" for k, v in settings.items())


@needs_training
def test_train_gpt2(tmp_path: Path) -> None:
    line = f"train gpt2 {own_tokens(tmp_path)} --set model.format=cp --set model.experts=[4]"
    line += f" --set model.rank=[3] --out {tmp_path}/out"
    actual = figures(line)
    assert actual["ranks"] == {"rank": [3]} and actual["steps"] == 8 and actual["trained"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoints", "config.json", "metrics.csv", "model.safetensors", "tensorboard"
    ]  # fmt: skip
    output = run(line)
    assert f"{actual['parameters']:,} parameters, rank [3]" in output
    assert f"loss {actual['validation_loss']:.4f} on validation rows, after 8 steps" in output
    assert "it was already trained, --fresh trains it again" in output
    assert f"Written to {tmp_path}/out" in output
    assert figures(f"{line} --fresh")["trained"]
    other = CliRunner().invoke(app, shlex.split(f"{line} --set train.seed=1"))
    assert other.exit_code == 2 and "train.seed is 0 there, 1 here" in other.stderr


@needs_training
def test_train_mixer_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).random((40, 4, 4)), y=np.arange(40) % 3)
    (tmp_path / "own.toml").write_text(
        f"[data]\ninputs = '{tmp_path}/images.npz'\nvalidation = 0.25\n"
        "[model]\nimage_size = 4\npatch = 2\nwidth = 8\ndepth = 1\ntoken_hidden = 8\nchannel_hidden = 8\n"
        "classes = 3\n[train]\nepochs = 1\nbatch_size = 10\n"
    )
    line = f"train mixer {tmp_path}/own.toml --set train.steps=2 --out {tmp_path}/out"
    actual = figures(line)
    assert actual["steps"] == 2 and 0 <= actual["accuracy"] <= 1 and actual["seconds"] > 0
    assert actual["ranks"] == {"token_rank": None, "channel_rank": None}
    # A model without experts has no rank.
    assert run(line).startswith(f"{actual['parameters']:,} parameters\n")


@needs_training
def test_a_training_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = shlex.split(f"train gpt2 {own_tokens(tmp_path)} --out {tmp_path}/out")
    result = CliRunner().invoke(app, [*line, "--set", "train.learning_rate=1e30", "--set", "train.clip=none"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "must be finite" in result.stderr or "must be a finite number" in result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()

    assert CliRunner().invoke(app, [*line, "--fresh"]).exit_code == 0
    (tmp_path / "out" / "model.safetensors").unlink()
    for path in (tmp_path / "out" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2 and "no good checkpoint" in result.stderr and result.stderr.count("\n") == 1
    result = CliRunner().invoke(app, [*line, "--from-step", "3"])
    assert result.exit_code == 2 and "no checkpoint of step 3" in result.stderr

    from mumoe_tensor.training import run as runs

    for error, code, message in [
        (OSError("no space left"), 2, "no space left"),
        (KeyboardInterrupt(), 130, "the same command resumes"),
        (signal.SIGTERM, 130, "the same command resumes"),
    ]:

        def fails(*args: object, error: BaseException | signal.Signals = error, **options: object) -> None:
            if isinstance(error, BaseException):
                raise error
            signal.raise_signal(error)

        monkeypatch.setattr(runs, "train", fails)
        result = CliRunner().invoke(app, [*line, "--fresh"])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert result.exit_code == code and message in result.stderr and result.stderr.count("\n") == 1


@needs_training
def test_tokenize(tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    ids = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "th", "the", "<|endoftext|>"])}
    (tmp_path / "encoder.json").write_text(json.dumps(ids))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n")
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in {"one": "the", "two": "the the", "three": "t"}.items():
        (texts / f"{name}.txt").write_text(text)
    line = f"tokenize {texts} --vocabulary-files {tmp_path} --hold-out 'tw*' --leave-out three*"
    line += f" --out {tmp_path}/t"
    actual = figures(line)
    assert actual["vocabulary"] == 259 and actual["training"] == [{"file": "one.txt", "tokens": 2}]
    assert actual["validation"] == [{"file": "two.txt", "tokens": 4}]
    assert np.fromfile(tmp_path / "t" / "training.bin", "<u2").tolist() == [257, 258]
    output = run(f"{line} --vocabulary 258")
    assert "two.txt" in output and "validation" in output and "258 ids" in output
    assert "three.txt" not in output
    assert np.fromfile(tmp_path / "t" / "training.bin", "<u2").tolist() == [256, ids["e"], 257]
    result = CliRunner().invoke(app, shlex.split(f"{line} --hold-out none*"))
    assert result.exit_code == 2 and "'none*' matches none" in result.stderr


# ---- bad input --------------------------------------------------------------------------------------------

BAD = [
    ("nonsense", "nonsense"),
    ("plan", "Missing argument"),
    ("plan cp", "--experts"),
    ("plan --no-such-option", "--no-such-option"),
    (f"plan nope {SMALL} --rank 2", "the formats are 'btt', 'cp', 'cp-matrix', 'dense',"),
    (f"plan cp {SMALL}", "must have one entry per bond, r; got None; fit_rank (`mumoe-tensor fit`) solves"),
    (f"cost tucker {SMALL}", "must have one entry per bond, r_n1, r_i, r_o; got None"),
    (f"plan cp {SMALL} --rank 2,3", "got (2, 3)"),
    (f"plan cp {SMALL} --rank two", "--rank must be comma-separated numbers"),
    (f"plan cp {SMALL} --rank ?", "every entry of the rank must be a number"),
    (f"plan cp {SMALL} --rank 0", "every rank must be positive, got 0"),
    (f"plan cp {SMALL} --rank 2 --minimize speed", "'time', 'flops', 'peak', got 'speed'"),
    (f"plan cp {SMALL} --rank 2 --implementation fast", "'factorized', 'reconstructed', 'auto'"),
    (f"plan cp {SMALL} --rank 2 --dtype int8", "'float64', 'float32', 'bfloat16', 'float16'"),
    (f"plan cp {SMALL} --rank 2 --machine gpu", "machine must be one of 'cpu', 'cuda', 'h200', got 'gpu'"),
    (f"plan cp {SMALL} --rank 2 --machine {{", "a machine must be a name or JSON, got '{'"),
    (f'cost cp {SMALL} --rank 2 --machine {{"flops":1}}', "must have flops and bandwidth, and may have"),
    (f'cost cp {SMALL} --rank 2 --machine {{"flops":1,"bandwidth":0}}', "bandwidth of a machine must be"),
    (f"plan cp {SMALL} --rank 2 --batch -1", "batch, if not zero, must be positive, got -1"),
    (f"plan cp {SMALL} --rank 2 --batch many", "--batch"),
    (f"plan cp {SMALL} --rank 2 --memory-limit 1 --batch 9", "memory_limit"),
    (
        "plan cp --experts 4y4 --in-features 3 --out-features 2 --rank 2",
        "levels such as 64x64, or none, got '4y4'",
    ),
    ("plan cp --experts 4x --in-features 3 --out-features 2 --rank 2", "got '4x'"),
    ("plan cp --experts 0 --in-features 3 --out-features 2 --rank 2", "must be positive, got 0"),
    ("plan cp --experts 4 --in-features 0 --out-features 2 --rank 2", "in_features must be positive, got 0"),
    ("cost cp --experts 4 --in-features 3 --out-features 2 --hidden 0 --rank 2", "hidden must be positive"),
    (f"cost nope {SMALL} --rank 2", "unknown format 'nope'"),
    (f"cost dense {SMALL} --rank 2", "no entries"),
    (f"fit hadamard {SMALL}", "hadamard"),
    (f"fit cp {SMALL} --rank 3", "exactly one entry of the rank must be None"),
    (f"fit tr {SMALL} --rank ?,?,2", "exactly one entry of the rank must be None"),
    (
        f"fit cp {SMALL} --parameters lots",
        "parameters must be match, a positive number, or a multiple such as 0.5x; got 'lots'",
    ),
    (f"fit cp {SMALL} --parameters 0", "parameters must be positive, got 0"),
    (f"fit cp {SMALL} --parameters nanx", "or a multiple such as 0.5x; got 'nanx'"),
    (f"fit cp {SMALL} --rounding off", "'up', 'down', 'nearest', got 'off'"),
    ("fit tr --experts 2000 --in-features 768 --out-features 1000 --gate", "the gate alone has 1,536,000"),
    ("study --layer gpt5", "'gpt2-mlp', 'clip-head'"),
    ("study --formats cp,nope", "unknown format 'nope'"),
    ("study --formats cp --experts many", "--experts must be a number"),
    ("study --batch 0", "batch must be positive, got 0"),
    ("study --layer clip-head --hidden 3", "a study needs --layer, or --in-features"),
    ("study --in-features 3", "a study needs --layer, or --in-features"),
    ("study --in-features 0 --out-features 2", "in_features must be positive, got 0"),
    ("study --setting nothing.json", "nothing.json"),
    ("study --setting nothing.json --seed 1", "--setting cannot be combined with options"),
    ("study --data nothing.npz", "there is no file 'nothing.npz'"),
    ("study --devices tpu", "must be one of 'cpu', 'cuda', got 'tpu'"),
    ("study --seconds 0", "seconds must be positive and finite, got 0"),
    ("study --memory -1", "memory must be positive and finite, got -1"),
    ("study --seed -1", "seed must not be negative, got -1"),
    ("study --weight none.safetensors:a", "none.safetensors"),
    ("study --weight x.npz:a --weight=y.npz:a", "--weight must be given once"),
    ("study --weight x.npy --layer clip-head", "a study needs one of --layer, --weight"),
    ("study --inputs x.npy", "inputs and transposed can only be used with a weight"),
    ("study --parameters some", "parameters must be match, a positive number, or a multiple"),
    ("study --parameters 10 --formats cp,tr", "some format must fit the budget"),
    ("train gpt3", "gpt3"),
    ("train mixer nothing.toml", "nothing.toml"),
    ("train mixer gpt2", "one of mixer, mixer-s16-cp, mixer-s16-mlp, mixer-s16-tr; got 'gpt2'"),
    ("train gpt2 --set train.batch_size=-1", "train: batch_size must be positive, got -1"),
    ("train gpt2 --set train.batch_size", "as train.epochs=3; got 'train.batch_size'"),
    ("train gpt2", "training.bin"),
    ("train mixer", "train-images-idx3-ubyte.gz does not exist; `mumoe-tensor data` fetches"),
    ("train head --images x.npz", "data/efficientnet-lite0 has none: `mumoe-tensor data efficientnet-lite0`"),
    ("tokenize nothing.txt --hold-out no*", "encoder.json; `mumoe-tensor data gpt2-vocabulary` fetches it"),
    ("inspect --model a:b --data x.npz --allow-import --shown 0", "shown must be positive, got 0"),
    ("inspect --model a:b --data x.npz --allow-import --out .", "--out must be a file, but . is a folder"),
]


@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    line: str, message: str, json_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, line.split() + ["--json"] * json_too)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mumoe-tensor: ") and result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("here first")
    result = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "file" in result.stderr
    assert (tmp_path / "file").read_text() == "here first"


def test_a_study_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "mumoe_tensor[study]" in result.stderr
    assert result.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_is_not_passed_off_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **keywords: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(mt, "plan", broken)
    result = CliRunner().invoke(app, PLAN.split())
    assert isinstance(result.exception, RuntimeError)


# ---- as a process -----------------------------------------------------------------------------------------


def process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_runs_and_loads_no_torch_for_a_plan() -> None:
    code = (
        "import atexit, sys\n"
        "from mumoe_tensor.cli import app\n"
        "atexit.register(lambda: print(sorted({'torch', 'jax', 'matplotlib'} & set(sys.modules)),"
        " file=sys.stderr))\n"
        "app()"
    )
    done = process(code, *PLAN.split(), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["batch"] == 8192
    assert done.stderr == "[]\n"
    done = process(code, "plan", "nope", *SMALL.split())
    assert done.returncode == 2 and done.stdout == ""
    first, last = done.stderr.splitlines()
    assert first.startswith("mumoe-tensor: unknown format 'nope'") and last == "[]"


def test_threads_wait_passively_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def policy() -> tuple[str | None, str | None]:
        run("formats")
        return os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")

    for spins in (None, "7"):
        # (`setenv` first, so that both are as before after the test.)
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        if spins:
            monkeypatch.setenv("GOMP_SPINCOUNT", spins)
        assert policy() == ("passive", spins or "3000")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert policy() == ("active", None)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_the_command_names_it(missing: str) -> None:
    done = process(f"import sys; sys.modules[{missing!r}] = None\nfrom mumoe_tensor.cli import app")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "mumoe_tensor[cli]" in done.stderr


def test_the_installed_command_is_this_one() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="mumoe-tensor")
    assert entry.load() is app
