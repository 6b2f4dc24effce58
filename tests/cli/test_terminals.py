"""Commands on every kind of terminal, with every number, and where an extra is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from commands import LINES, run
from rich.console import Console
from rich.table import Table
from typer.main import get_command

from mumoe_tensor.cli import app, console
from mumoe_tensor.extras import EXTRAS, missing
from mumoe_tensor.progress import progress_bar

ROOT = Path(__file__).parents[2]


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """All commands with their names."""
    for name, command in (group or get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} ")
        else:
            yield before + name, command


COMMANDS = dict(commands())


def test_every_command_has_a_line() -> None:
    assert set(COMMANDS) == set(LINES)


def test_every_option_has_a_text() -> None:
    for name, command in COMMANDS.items():
        assert all(param.help for param in command.params), name


@pytest.mark.parametrize(
    ("command", "option", "words"),
    [
        ("study", "head_experts", "Numbers of experts of the heads. (8,32; quick 8)"),
        ("study", "transposed", "Whether the weight is stored as in x out"),
        ("train head", "validation", "Fraction of the rows held out for validation. (0.2)"),
        ("train head", "epochs", "Passes over the rows. (20)"),
        ("train head", "experts", "Number of experts, such as 64, or 8x8 for two levels. (64)"),
        ("bias", "seeds", "Number of training runs of each model. (5)"),
        ("inspect", "shown", "Number of inputs to show for each expert. (8)"),
    ],
)
def test_options_follow_from_the_configs(command: str, option: str, words: str) -> None:
    (param,) = (param for param in COMMANDS[command].params if param.name == option)
    assert f"{param.help} ({param.show_default})".startswith(words) and param.default is None


# ---- encodings --------------------------------------------------------------------------------------------

#: All but those that take long, and print as the others do.
QUICK = [command for command in LINES if command not in ("study", "bias")]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize(
    ("command", "options"), [*((name, "") for name in QUICK), *((name, "--help") for name in LINES)]
)
def test_no_encoding_stops_a_command(
    command: str, options: str, encoding: str, data: Path, tmp_path: Path
) -> None:
    result = run(f"{LINES[command]} {options}", data, tmp_path / "out", charset=encoding)
    assert result.exit_code == 0, (result.exception, result.output)
    assert result.stdout.strip()


def test_json_is_the_same_in_every_encoding(data: Path, tmp_path: Path) -> None:
    (tmp_path / "größe").mkdir()
    line = LINES["inspect"].replace("{out}", "{out}/größe") + " --json"
    output = [run(line, data, tmp_path, charset=encoding).stdout for encoding in ("ascii", "utf-8")]
    assert output[0] == output[1] and "gr\\u00f6\\u00dfe" in output[0]


# ---- tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 48, 80])  # the longest name and cell fit into 48
@pytest.mark.parametrize("command", ["formats", "cost", "tokenize"])
def test_tables_are_whole(
    command: str, width: int | None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is cut off, and no line is longer than the terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("COLUMNS", "1000")
    words = set(run(LINES[command], data, tmp_path / "wide").stdout.split())
    monkeypatch.delenv("COLUMNS")
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    result = run(LINES[command], data, tmp_path / "out")
    assert result.exit_code == 0 and "…" not in result.stdout
    output = set(result.stdout.split())
    assert not [word for word in words - output if not re.search("out|wide|─", word)]


@pytest.mark.parametrize("width", [10, 30, 60, 200])
def test_columns_that_do_not_fit_come_below(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    table = console.new_table("name", *(f"column {k}" for k in range(8)), title="Title")
    table.add_row("a row with a name", *(f"value-{k}" for k in range(8)))
    console.show(table)
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= width
    # Nothing is lost, however narrow it is: only parted.
    letters = sorted(re.sub(r"\s|─|-", "", output))
    parts = output.count("Title")
    row = "Title" + "name" + "a row with a name"
    cells = "".join(f"column {k}value-{k}" for k in range(8))
    assert letters == sorted(re.sub(r"\s|-", "", row * parts + cells))
    assert (parts == 1) == (width == 200)
    console.show(table, labels=2)
    output = capsys.readouterr().out
    if width == 60:  # both labels with each part
        assert output.count("value-0") == output.count("a row with a name") > 1


def test_a_terminal_without_a_size_is_80_wide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = console.new_table("name", *(f"column {k}" for k in range(20)))
    table.add_row("row", *(f"value-{k}" for k in range(20)))
    console.show(table)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, printed.splitlines())) <= 80 and "value-19" in printed


def test_progress_is_in_lines_where_output_is_piped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mumoe_tensor.progress.LINE_SECONDS", 0.0)
    with progress_bar("a study") as progress:
        progress(1, 4, "time of CP")
    assert capsys.readouterr().err == " 25 % time of CP\n"


def test_tables_of_a_study_and_of_bias_are_shown_by_the_same_function() -> None:
    """No command prints a table that a narrow terminal would cut."""
    for path in (ROOT / "mumoe_tensor" / "cli").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path.name == "console.py" or not re.search(r"print\(table\)", text), path
    assert isinstance(console.new_table("a"), Table) and Console is not None


# ---- where the output goes --------------------------------------------------------------------------------


def print_formats(stdout: Any) -> Any:
    """A process whose output waits in a buffer."""
    code = "from mumoe_tensor.cli import app; app()"
    return subprocess.run(
        [sys.executable, "-c", code, "formats", "--json"], stdout=stdout, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip


def test_a_reader_that_is_gone_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = print_formats(writer)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = print_formats(full)
    assert done.returncode == 2 and done.stderr == "mumoe-tensor: No space left on device.\n"


# ---- numbers ----------------------------------------------------------------------------------------------

VALUES = ("nan", "inf", "-1", "0", str(2**70))
NUMBERS = [
    (name, f"--{option.replace('_', '-')}", value)
    for name, command in COMMANDS.items()
    for option, hint in get_type_hints(command.callback).items()
    if {int, float} & {hint, *get_args(hint)}
    for value in VALUES
]
#: Options that may be 0. A batch may be empty.
ZERO = {"--batch", "--seed", "--removed", "--weight-decay", "--head-hidden"}


@pytest.mark.parametrize(("command", "option", "value"), NUMBERS)
def test_every_number_is_taken_or_refused_in_one_line(
    command: str, option: str, value: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = LINES[command]
    if command == "study":
        from mumoe_tensor import study

        # What is taken is not measured here.
        monkeypatch.setattr(study, "measure", lambda *_: sys.exit(0))
    if command == "bias":
        from mumoe_tensor.experiments.bias import Experiment

        monkeypatch.setattr(Experiment, "validate", lambda *_: sys.exit(0))
    result = run(f"{line} {option} {value}", data, tmp_path / "out")
    if result.exit_code == 0:
        assert value == "0" and option in ZERO, f"{option} {value} is taken"
        return
    assert result.exit_code == 2, (result.exception, result.output)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_numbers_were_looked_at() -> None:
    looked = {option for _, option, _ in NUMBERS}
    assert {"--seed", "--validation", "--epochs", "--memory", "--rows", "--batch", "--from-step"} <= looked


@pytest.mark.parametrize(
    ("setting", "value"),
    [("train.seed", 2**70), ("train.seed", -1), ("train.learning_rate", "nan"), ("train.epochs", 0)],
)
@pytest.mark.parametrize("command", ["train mixer", "train gpt2"])
def test_numbers_in_settings(command: str, setting: str, value: Any, data: Path, tmp_path: Path) -> None:
    result = run(f"{LINES[command]} --set {setting}={value}", data, tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert setting.replace(".", ": ") in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_train_alone_says_what_is_missing(data: Path, tmp_path: Path) -> None:
    result = run("train", data, tmp_path)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("mumoe-tensor: Missing command; see '")


# ---- extras -----------------------------------------------------------------------------------------------

#: What each command needs besides the library and the command line.
NEEDED = {
    "study": ("torch", "train", "study"),
    "bias": ("torch", "train", "experiments"),
    **dict.fromkeys(("tokenize", "inspect", "train head", "train mixer", "train gpt2"), ("torch", "train")),
    "data": ("torch", "train"),
    "replace": ("torch", "train", "transformers"),
}


@pytest.mark.parametrize(
    ("command", "extra", "package"),
    [
        (command, extra, package)
        for command, extras in NEEDED.items()
        for extra in extras
        for package in EXTRAS[extra]
        if f"[{extra}]" in str(missing(package))  # which names the first of several extras
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    command: str, extra: str, package: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = run(LINES[command], data, tmp_path / "out")
    assert result.exit_code == 2 and result.stdout == ""
    expected = f"{package} is not installed; pip install 'mumoe_tensor[{extra}]'."
    assert result.stderr == f"mumoe-tensor: {expected}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_module_of_a_package_is_missing_as_the_package_is() -> None:
    assert missing("torch.nn") == missing("torch") is not None


def test_without_any_extra_but_the_command_lines(data: Path, tmp_path: Path) -> None:
    """Commands that need no more run, and no other ends in a traceback."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from mumoe_tensor.extras import EXTRAS
for extra, packages in EXTRAS.items():
    if extra != "cli":
        sys.modules.update(dict.fromkeys(set(packages) - {"pydantic"}))  # that typer needs itself
from pathlib import Path
from commands import LINES, run
for command, line in LINES.items():
    result = run(line, Path(sys.argv[2]), Path(sys.argv[3]))
    print(command, result.exit_code, result.stderr.count("\\n"), "mumoe_tensor[" in result.stderr, sep=",")
"""
    arguments = [str(Path(__file__).parent), str(data), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [f"{command},{2 if command in NEEDED else 0}," for command in LINES]
    for line, start in zip(done.stdout.splitlines(), expected, strict=True):
        assert line == start + ("1,True" if ",2," in start else "0,False")


def test_extras_are_those_of_the_package() -> None:
    import tomllib

    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        listed = {re.split(r"[<>=\[]", entry)[0] for entry in declared[extra]} - {"mumoe_tensor"}
        listed |= {"pandas"} if extra == "experiments" else set()  # that fairlearn brings
        assert listed == {names.get(package, package).replace("_", "-") for package in packages}, extra
