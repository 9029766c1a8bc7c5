"""A hook of the documentation site: formulas become MathML, which browsers draw without a script or a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and $$...$$ in its generic mode.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(page_html: str, /, **_: Any) -> str:
    """Each formula of a page, drawn; a LaTeX command that is not understood ends the build."""
    return _FORMULA.sub(_mathml, page_html)


def _mathml(match: re.Match[str]) -> str:
    is_block = match["tag"] == "div"
    drawn = convert(html.unescape(match["tex"]).strip(), display="block" if is_block else "inline")
    # Browsers align columns by style alone.
    drawn = re.sub(r'columnalign="(\w+)"', r'style="text-align: \1"', drawn)
    return f'<div class="formula">{drawn}</div>' if is_block else drawn
