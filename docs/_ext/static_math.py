"""Formulas as SVG, made at build time: pages need no JavaScript, no network and no font."""

from __future__ import annotations

from html import escape
from typing import Any

import ziamath
from docutils import nodes
from sphinx.application import Sphinx

_PIXELS = 17


def _svg(node: nodes.Node, inline: bool) -> str:
    """An <svg> whose baseline is that of the surrounding text."""
    latex = node.astext().replace(r"\mathrel{+}=", "+=")
    if not inline and r"\\" in latex:
        latex = rf"\begin{{aligned}} {latex} \end{{aligned}}"
    formula = ziamath.Latex(latex, size=_PIXELS, inline=inline, color="currentColor")
    label = f'role="img" aria-label="{escape(node.astext(), quote=True)}"'
    return formula.svg().replace(
        "<svg ", f'<svg {label} style="vertical-align: {formula.getyofst():.2f}px" ', 1
    )


def _inline(translator: Any, node: nodes.Node) -> None:
    translator.body.append(_svg(node, inline=True))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.Node) -> None:
    translator.body.append(f'<div class="formula">{_svg(node, inline=False)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the renderer that conf.py names in ``html_math_renderer``."""
    app.add_html_math_renderer("svg", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
