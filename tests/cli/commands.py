"""Every command on small data, as a line to run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from mumoe_tensor.cli import app

SIZES = "--experts 4 --in-features 3 --out-features 2"
#: Lines of the commands. ``{data}`` is a folder with what `prepare` writes, ``{out}`` where results go.
LINES = {
    "formats": "formats",
    "plan": f"plan cp {SIZES} --rank 2",
    "cost": f"cost cp {SIZES} --rank 2",
    "fit": f"fit cp {SIZES} --parameters 100",
    "study": "study --in-features 6 --out-features 4 --experts 2 --formats cp --quick --seconds 0.001 "
    "--data none --devices cpu --jobs 1 --out {out}",
    "bias": "bias --data adult --folder {data} --target income --group Male=0 --quick --out {out}",
    "tokenize": "tokenize {data}/texts/one.txt {data}/texts/two.txt --hold-out two* "
    "--vocabulary-files {data} --out {out}",
    "data": "data --list",
    "replace": "replace {data}/llama --grid {data}/grid.toml --training {data}/training.jsonl "
    "--validation {data}/test.jsonl --test {data}/test.jsonl --out {out}",
    "inspect": "inspect {data}/head --out {out}/page.html --rows 20",
    "train head": "train head --features {data}/x.npz --experts 2 --epochs 1 --batch-size 8 --out {out}",
    "train mixer": "train mixer {data}/mixer.toml --out {out}",
    "train gpt2": "train gpt2 {data}/gpt2.toml --out {out}",
}


def prepare(data: Path) -> None:
    """Write what the lines read: features, images, texts, tokens, people, settings, a head, a Llama."""
    draw = np.random.default_rng(0)
    y = np.arange(60) % 3
    np.savez(data / "x.npz", x=draw.normal(size=(60, 6)) + 3 * np.eye(6)[y], y=y)
    np.savez(data / "images.npz", x=draw.random((40, 4, 4)), y=np.arange(40) % 3)
    (np.arange(300) % 5).astype("<u2").tofile(data / "tokens.bin")
    (data / "mixer.toml").write_text(
        f"[data]\ninputs = '{data}/images.npz'\nvalidation = 0.25\n"
        "[model]\nimage_size = 4\npatch = 2\nwidth = 8\ndepth = 1\ntoken_hidden = 8\nchannel_hidden = 8\n"
        "classes = 3\n[train]\nepochs = 1\nbatch_size = 10\n"
    )
    (data / "gpt2.toml").write_text(
        f"[data]\ntraining = '{data}/tokens.bin'\nvalidation = '{data}/tokens.bin'\n"
        "[model]\nvocabulary = 6\ncontext = 8\nwidth = 8\ndepth = 1\nheads = 2\nhidden = 8\n"
        "[train]\nsteps = 4\nevaluate_every = 2\nbatch_size = 8\n"
    )
    from tokenizers.pre_tokenizers import ByteLevel

    ids = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "th", "<|endoftext|>"])}
    (data / "encoder.json").write_text(json.dumps(ids))
    (data / "vocab.bpe").write_text("#version: 0.2\nt h\n")
    (data / "texts").mkdir()
    for name in ("one", "two"):
        (data / "texts" / f"{name}.txt").write_text("the other")
    (data / "adult").mkdir()
    for name in ("adult.data", "adult.test"):
        people = (
            f"{draw.integers(20, 60)}, Private, 1, HS-grad, 9, Divorced, Sales, Unmarried, White, "
            f"{draw.choice(['Male', 'Female'])}, 0, 0, 40, Cuba, {draw.choice(['<=50K', '>50K'])}"
            for _ in range(900)
        )
        (data / "adult" / name).write_text("\n".join(people))
    from llama import write_llama

    write_llama(data / "llama")
    (data / "grid.toml").write_text(
        "context = 8\ntuned_at = 2\n[train]\nsteps = 2\nbatch_size = 8\n"
        '[[places]]\nmodule = "model.layers.0.mlp"\nk = [2]\nseeds = [1]\n'
        '[arms.MxD]\nlayer = "MixtureOfDecoders"\n'
    )
    for part in ("training", "test"):
        texts = (" ".join(f"w{i}" for i in draw.integers(64, size=8)) for _ in range(3))
        (data / f"{part}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert run(LINES["train head"], data, data / "head").exit_code == 0


def run(line: str, data: Path, out: Path, **options: Any) -> Any:
    """Run a line."""
    runner = CliRunner(**options)
    return runner.invoke(app, shlex.split(line.format(data=data, out=out)))


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
