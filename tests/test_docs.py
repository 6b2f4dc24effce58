"""What README, docs and docstrings say is run and compared with the code."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from math import prod
from pathlib import Path
from runpy import run_path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.formats import mode_names, registry
from mumoe_tensor.testing import CHECKS, check_format, run_check

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
BLOCK_TERM, TWO_FACTOR = (ROOT / "docs" / "how-to" / f"{name}.py" for name in ("block_term", "two_factor"))
MODULES = [
    module.name
    for module in pkgutil.walk_packages(mt.__path__, "mumoe_tensor.")
    if not module.name.endswith("__main__")
]
PACKAGES = ("nn", "replace", "analysis", "models", "training", "study", "browser")
#: Blocks of other languages (sh, text) are not run. What a block without prompts prints may stand below it.
PYTHON = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```output\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def library_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the library's formats at first, and no trace of those that a page or a test registers."""
    own = {
        name: format
        for name, format in mt.formats().items()
        if type(format).__module__.startswith("mumoe_tensor.")
    }
    monkeypatch.setattr(registry, "_registry", own)


@pytest.fixture
def own_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of formats beside the pages can be imported, and register their formats anew."""
    monkeypatch.syspath_prepend(BLOCK_TERM.parent)
    for path in (BLOCK_TERM, TWO_FACTOR):
        sys.modules.pop(path.stem, None)
    yield
    for path in (BLOCK_TERM, TWO_FACTOR):
        sys.modules.pop(path.stem, None)


#: Training takes another path where a processor rounds otherwise: with this flag the numbers of an output may
#: be off by two in their last digit.
ROUGH = doctest.register_optionflag("ROUGH")
NUMBER = re.compile(r"\d+\.?\d*")


class Checker(doctest.OutputChecker):
    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if not optionflags & ROUGH:
            return super().check_output(want, got, optionflags)
        pairs = zip(NUMBER.findall(want), NUMBER.findall(got), strict=False)
        is_near = all(abs(float(a) - float(b)) < 2.1 * 10.0 ** -len(a.partition(".")[2]) for a, b in pairs)
        return is_near and NUMBER.sub("0", want).split() == NUMBER.sub("0", got).split()


def python_blocks(path: Path) -> list[tuple[int, str, str | None]]:
    """Line number, source, and the output below it, of every Python block of a page."""
    text = path.read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n"), match[1], match[2]) for match in PYTHON.finditer(text)]


def run_page(path: Path) -> int:
    """Run the Python blocks of a page, one after the other in one namespace; return how many there are."""
    namespace: dict[str, Any] = {"__name__": "page"}
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.REPORT_NDIFF, verbose=False)
    report = StringIO()
    blocks = python_blocks(path)
    for line, source, output in blocks:
        if not source.startswith(">>>"):
            with redirect_stdout(StringIO()) as printed:
                exec(compile("\n" * line + source, str(path), "exec"), namespace)
            got = printed.getvalue()
            assert output is None or Checker().check_output(output, got, ROUGH), f"{path}:{line}: {got}"
            continue
        test = doctest.DocTestParser().get_doctest(source, namespace, path.name, str(path), line)
        runner.run(test, out=report.write, clear_globs=False)
        namespace.update(test.globs)
    assert not runner.failures, report.getvalue()
    return len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_runs(page: Path, own_files: None, request: pytest.FixtureRequest) -> None:
    if "transformers" in "".join(source for _, source, _ in python_blocks(page)):
        request.getfixturevalue("transformers")
    run_page(page)


def test_pages_are_found() -> None:
    names = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    assert {"index.md", "design.md", "explanation/planner.md", "how-to/declare-a-format.md"} <= names
    assert sum(len(python_blocks(page)) for page in PAGES) > 30


@pytest.mark.parametrize(
    "block", ["```python\n>>> n + 1\n4\n```\n", "```python\nprint(n + 1)\n```\n\n```output\n40\n```\n"]
)
def test_a_wrong_page_fails(tmp_path: Path, block: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\n>>> n = 1\n```\n\n{block}", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"page\.md"):
        run_page(page)


@pytest.mark.parametrize(
    ("want", "is_right"),
    [("97.5% of 4", True), ("97.2% of 5", True), ("97.1% of 4", False), ("97.4%", False)],
)
def test_rough_output(want: str, is_right: bool) -> None:
    assert Checker().check_output(want, "97.4% of 4\n", ROUGH) == is_right
    assert not Checker().check_output(want, "97.4% of 4\n", 0)


def test_readme_snippet_runs() -> None:
    pytest.importorskip("torch")
    namespace: dict[str, Any] = {}
    ((line, source, _),) = python_blocks(README)
    exec(compile("\n" * line + source, str(README), "exec"), namespace)
    layer, coefficients = namespace["layer"], namespace["coefficients"]
    assert prod(a.shape[-1] for a in coefficients) == 4096 and namespace["y"].shape == (32, 1000)
    parameters = sum(p.numel() for p in layer.parameters())
    assert 1 <= parameters / mt.dense_parameters(768, 1000) < 1.002
    assert namespace["matrix"].shape == (768, 1000) and namespace["bias"].shape == (1000,)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, request: pytest.FixtureRequest) -> None:
    if name == "mumoe_tensor.nn.pretrained":
        request.getfixturevalue("transformers")
    if name in ("mumoe_tensor.nn.kernels.gather", "mumoe_tensor.nn.kernels.simplex"):
        pytest.importorskip("triton")  # (for Linux alone)
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(verbose=False)
    report = StringIO()
    for test in finder.find(module, name):
        runner.run(test, out=report.write)
    assert not runner.failures, report.getvalue()


NAMES = (*PACKAGES, "formats", "testing")
PUBLIC = [mt, *(importlib.import_module(f"mumoe_tensor.{name}") for name in NAMES)]
MEMBERS = (FunctionType, classmethod, staticmethod, property)


def public_objects() -> dict[str, Any]:
    """Public functions and classes, and public methods and properties of these, by where they are defined."""
    actual: dict[str, Any] = {}
    for package in PUBLIC:
        for name in package.__all__:
            value = getattr(package, name)
            # A composite strategy is made by Hypothesis: its source cannot be had.
            if not callable(value) or "<locals>" in value.__qualname__:
                continue
            actual[f"{value.__module__}.{value.__qualname__}"] = value
            members = vars(value).items() if inspect.isclass(value) else ()
            for key, member in members:
                if not key.startswith("_") and isinstance(member, MEMBERS):
                    actual[f"{value.__module__}.{value.__qualname__}.{key}"] = getattr(value, key)
    return actual


OBJECTS = public_objects()
#: What a docstring may leave out: a longer summary, examples, links to others; what is returned, where the
#: first line says it; a parameter, or its description, where the signature says it. And a first line may be
#: "Whether ...".
OPTIONAL = {"ES01", "EX01", "PR01", "PR07", "RT01", "RT03", "SA01", "SA04", "SS05", "YD01"}


def docstring_errors(name: str) -> dict[str, str]:
    """Messages of numpydoc by their code, but for what may be left out."""
    validate = pytest.importorskip("numpydoc.validate")
    allowed = set(OPTIONAL)
    if inspect.getdoc(OBJECTS[name]):
        allowed.add("GL08")  # inherited from the method that it implements
    return {code: message for code, message in validate.validate(name)["errors"] if code not in allowed}


def test_docstrings_are_numpydoc() -> None:
    assert {name: errors for name in OBJECTS if (errors := docstring_errors(name))} == {}


def test_a_docstring_with_a_parameter_that_there_is_not_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = (name for name, value in OBJECTS.items() if value is mt.multilinear_moe)
    renamed = mt.multilinear_moe.__doc__.replace("coefficients : ", "weights : ")
    monkeypatch.setattr(mt.multilinear_moe, "__doc__", renamed)
    assert "weights" in docstring_errors(name)["PR02"]


def test_public_names_are_in_the_reference() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "reference")
    documented = set(re.findall(r"^\.\. auto(?:function|class|exception|data):: (\w+)$", pages, re.MULTILINE))
    for package in (mt, *(importlib.import_module(f"mumoe_tensor.{name}") for name in PACKAGES)):
        assert set(package.__all__) <= documented


# ---- links ----------------------------------------------------------------------------------------------


@pytest.fixture
def problems() -> Callable[[Path], list[str]]:
    actual: Callable[[Path], list[str]] = run_path(str(ROOT / "docs" / "check_links.py"))["problems"]
    return actual


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ('<a href="other.html#here">x</a> <a href="#top">x</a> <a href="https://x.org">x</a>', ""),
        ('<img src="picture.png" srcset="picture.png, picture.png 2.00x">', ""),
        ('<a href="missing.html">x</a>', "leads to no file"),
        ('<a href="other.html#there">x</a>', "leads to no such place"),
        ('<a href="#here">x</a>', "leads to no such place"),
        ('<img srcset="picture.png, missing.png 2.00x">', "leads to no file"),
        ('<script src="https://x.org/x.js"></script>', "loads https://x.org/x.js"),
        ('<link rel="stylesheet" href="//x.org/x.css">', "loads //x.org/x.css"),
    ],
)
def test_links_are_checked(
    body: str, wrong: str, tmp_path: Path, problems: Callable[[Path], list[str]]
) -> None:
    (tmp_path / "page.html").write_text(body, encoding="utf-8")
    (tmp_path / "other.html").write_text('<p id="here">x</p>', encoding="utf-8")
    (tmp_path / "picture.png").touch()
    actual = problems(tmp_path)
    assert (len(actual) == 1 and wrong in actual[0]) if wrong else not actual


def test_a_folder_without_pages_is_wrong(tmp_path: Path, problems: Callable[[Path], list[str]]) -> None:
    assert problems(tmp_path)


def test_the_readme_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = README.read_text(encoding="utf-8").partition("The extras of the package")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", named)) == set(project["optional-dependencies"])


def test_links_of_the_readme() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", README.read_text(encoding="utf-8"))
    assert len(links) > 5
    assert not [link for link in links if not (ROOT / link).exists()]


# ---- the tables of formats -----------------------------------------------------------------------------


def table_of(page: Path, mark: str) -> dict[str, dict[str, str]]:
    """The table between two marks of a page: a row a format, a cell a column."""
    section = page.read_text(encoding="utf-8").split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]
    head, _, *rows = (line for line in section.splitlines() if line.startswith("|"))
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    table = [[cell.replace("`", "").strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: dict(zip(columns, row, strict=True)) for row in table}


STRUCTURED = table_of(ROOT / "docs" / "explanation" / "einsum-layers.md", "structured")
TABLE = table_of(ROOT / "docs" / "explanation" / "formats.md", "formats") | STRUCTURED


def evaluated(formula: str, layer: mt.LayerSpec, **changed: int) -> int:
    """A formula of the tables, whose names stand for the sizes of modes, parts and bonds."""
    format, shape = layer.format, replace(layer, bias=False).mode_sizes
    sizes = dict(zip(mode_names(1), shape, strict=True))
    sizes |= zip(format.modes(1), format.part_sizes(shape), strict=True)
    sizes |= zip(format.bonds(1), layer.full_rank, strict=True)
    expression = formula.replace("·", "*")
    return int(eval(expression, {"__builtins__": {}, "min": min}, sizes | changed))


def test_tables_have_every_format() -> None:
    assert sorted(TABLE) == sorted(mt.formats())


@pytest.mark.parametrize("name", TABLE)
def test_table_names_factors_and_rank(name: str) -> None:
    format = mt.get_format(name)
    factors = [" ".join(f.indices) for f in format.declaration(1) if not f.optional]
    assert TABLE[name]["factors"] == ", ".join(factors)
    assert TABLE[name]["rank"] == f"({', '.join(format.bonds(1))})"


@pytest.mark.parametrize("name", TABLE)
@settings(max_examples=max(10, settings().max_examples // 2))
@given(data=st.data())
def test_table_formulas(name: str, data: st.DataObject) -> None:
    format = mt.get_format(name)
    size = st.integers(1, 30)
    n, i, o = (data.draw(size, label=mode) for mode in ("n1", "i", "o"))
    if format.is_split:
        parts = {mode: data.draw(st.tuples(size, size), label=mode) for mode in "io"}
        format, i, o = format.with_splits(parts), prod(parts["i"]), prod(parts["o"])
    rank = tuple(data.draw(size, label=bond) for bond in format.bonds(1))
    bias = data.draw(st.booleans(), label="bias")
    layer = mt.LayerSpec(format, experts=n, in_features=i, out_features=o, rank=rank, bias=bias)
    cost = mt.cost(layer, minimize="flops")
    row = TABLE[name]
    bias_row, vector = (0, bias * o) if format.splits_input else (bias, 0)
    assert evaluated(row["parameters"], layer, i=i + bias_row) + vector == cost.parameters
    assert evaluated(row["max rank of an expert"], layer) == cost.max_expert_rank
    flops = evaluated(row["FLOPs of one input"], layer)
    # A bias that is a term is a product more, and so are the bias rows of several terms.
    planned = replace(layer, bias=False) if name in STRUCTURED else layer
    assert flops >= mt.cost(planned, minimize="flops").flops
    assert name in STRUCTURED or flops == cost.reference_flops
    weight = mt.FactorizedTensor.random(layer, seed=0)
    assert sum(prod(factor.shape) for factor in weight.arrays) == cost.parameters


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_formats_at_the_sizes_of_the_page(name: str) -> None:
    rank = (8,) * len(mt.get_format(name).bonds(1))
    layer = mt.LayerSpec(name, experts=16, in_features=768, out_features=3072, rank=rank)
    row = STRUCTURED[name]
    assert evaluated(row["FLOPs of one input"], layer) == mt.cost(layer, minimize="flops").flops
    plan = mt.plan(layer, batch=1024)
    copied = sum(step.copied for step in plan.steps)
    output = sum(term.program.output_is_copied for term in plan.terms) * 1024 * layer.out_features
    expected = "no" if copied > output else "all but the output" if copied else "yes"
    assert row["reads without copies"] == expected


# ---- a format declared outside the package -------------------------------------------------------------


@pytest.mark.parametrize("path", [BLOCK_TERM, TWO_FACTOR], ids=lambda path: path.stem)
def test_a_declaration_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 30


def test_a_declared_format_has_every_property(own_files: None) -> None:
    importlib.import_module(BLOCK_TERM.stem)
    check_format("block-term")


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_so_has_one_with_split_modes(check: Any, own_files: None) -> None:
    importlib.import_module(TWO_FACTOR.stem)
    run_check(check, "two-factor", share=4)


@settings(max_examples=max(10, settings().max_examples // 2), deadline=None)
@given(data=st.data())
def test_block_term_is_the_block_term_decomposition(data: st.DataObject) -> None:
    """Against the definition written out, not against anything derived from the declaration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BLOCK_TERM.parent)
        format = importlib.import_module("block_term").BlockTerm()
    size = st.integers(1, 4)
    n, i, o, k, *ranks = (data.draw(size) for _ in range(7))
    weight = mt.FactorizedTensor.random(
        format, experts=n, in_features=i, out_features=o, rank=(k, *ranks), seed=data.draw(size)
    )
    core, *factors = weight.arrays
    expected = np.zeros((n, i, o))
    for block in range(k):
        u, v, w = (factor[:, block] for factor in factors)
        expected += np.einsum("pqs,np,iq,os->nio", core[block], u, v, w)
    np.testing.assert_allclose(mt.to_dense(weight), expected, atol=1e-12)


@settings(max_examples=max(10, settings().max_examples // 2), deadline=None)
@given(data=st.data())
def test_two_factor_is_the_layer_of_two_factors(data: st.DataObject) -> None:
    """Against the definition written out: parts γ β α of the input and φ ε δ of the output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TWO_FACTOR.parent)
        format = importlib.import_module("two_factor").TwoFactor()
    size = st.integers(1, 3)
    g, b, a, f, e, d, r, n = (data.draw(size) for _ in range(8))
    format = format.with_splits({"i": (g, b, a), "o": (f, e, d)})
    weight = mt.FactorizedTensor.random(
        format, experts=n, in_features=a * b * g, out_features=d * e * f, rank=r, seed=data.draw(size)
    )
    expected = np.einsum("nr,garfd,fgrbe->ngbafed", *weight.arrays).reshape(weight.shape)
    np.testing.assert_allclose(mt.to_dense(weight), expected, atol=1e-12)
