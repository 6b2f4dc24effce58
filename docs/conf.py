"""Configuration of the documentation. Nothing here needs the network, in the build or in the browser."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from typing import Any

# The products of the examples are so small that a second thread costs more than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import mumoe_tensor
from mumoe_tensor.training import scale

logger = logging.getLogger(__name__)

project = "mumoe_tensor"
author = "The mumoe_tensor developers"
copyright = f"{author}, Apache-2.0"
version = release = mumoe_tensor.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples"]
default_role = "obj"

# What stands in single backticks is a public name or a parameter. A name without a dot or a capital may be a
# parameter; all others must be found.
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"[a-z_]\w*"),
    ("py:obj", r"torch\..*"),
    ("py:obj", "(CP|Tucker|TR|TT)Tensor"),  # TensorLy's
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3


def markdown(rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def scale_table(kind: str) -> str:
    """FLOPs and memory of the published training runs, as a table in Markdown."""
    heading, *lines = scale.table(kind, scale.published(kind))
    # Names of settings stay on one line.
    marked = ([f"`{name}`", *figures] for name, *figures in lines)
    return markdown([heading, ["---:"] * len(heading), *marked])


def cost_table(**layer: Any) -> str:
    """The costs of a layer in every registered format, as a table in Markdown."""
    columns = (
        "format",
        "rank",
        "parameters",
        "of the gate",
        "FLOPs of one input",
        "saved",
        "max rank of an expert",
    )
    rows: list[Iterable[str]] = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for name, format in mumoe_tensor.formats().items():
        rank = None
        if bonds := format.bonds(num_levels=1):
            smallest = mumoe_tensor.cost(name, rank=(1,) * len(bonds), **layer)
            fits = smallest.parameters <= smallest.spec.dense_parameters
            rank = mumoe_tensor.fit_rank(name, **layer) if fits else 1
        cost = mumoe_tensor.cost(name, rank=rank, **layer)
        figures = (cost.parameters, cost.gate_parameters, cost.flops, cost.saved, cost.max_expert_rank)
        rows.append((f"`{name}`", f"`{rank}`" if rank else "none", *(f"{figure:,}" for figure in figures)))
    return markdown(rows)


#: Tables that pages show by these names.
myst_substitutions = {
    "cost_of_head": cost_table(experts=64, in_features=768, out_features=1000, bias=True, gate=True),
    "cost_of_block": cost_table(
        experts=256, in_features=768, hidden=3072, out_features=768, bias=True, gate=True
    ),
    "scale_of_gpt2": scale_table("gpt2"),
    "scale_of_mixer": scale_table("mixer"),
}

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what a parameter is
numpydoc_show_class_members = False

# All scripts are run in every build, also where only the library has changed. One that fails fails the build.
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "auto_examples",
    "within_subsection_order": "FileNameSortKey",
    "reference_url": {"mumoe_tensor": None},  # names in the scripts become links into the reference
    "doc_module": "mumoe_tensor",
    "backreferences_dir": "auto_examples/backreferences",
    "download_all_examples": False,
    "write_computation_times": False,
    "run_stale_examples": True,
    "show_signature": False,
    "capture_repr": (),
    "image_srcset": ["2x"],
}

html_theme = "furo"
html_title = f"mumoe_tensor {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False

# Formulas become MathML, which browsers draw without a script: the pages are readable offline.
html_math_renderer = "mathml"


def mathml(node: nodes.Node, as_block: bool) -> str:
    """Translate a formula; one that cannot be translated is a warning, and stays as it was written."""
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        return escape(node.astext())


def visit_math(self: Any, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    """Write a formula of its own, which scrolls where the page is narrower."""
    self.body.append(f'<div class="formula">{mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the renderer of formulas."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
