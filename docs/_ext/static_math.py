"""Formulas as MathML, made when the site is built: pages need no JavaScript and no network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def _mathml(node: nodes.Node, display: str) -> str:
    latex = node.astext()
    if "&" in latex or r"\\" in latex:
        latex = rf"\begin{{aligned}} {latex} \end{{aligned}}"
    return convert(latex, display=display)


def _inline(translator: Any, node: nodes.Node) -> None:
    translator.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.Node) -> None:
    translator.body.append(f'<div class="formula">{_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the two visitors as the HTML builder's way to show formulas."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
