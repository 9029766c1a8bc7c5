"""A hook of the documentation site: Mermaid flow charts become boxes of HTML, drawn without a script or a network.

Code hosts draw ```mermaid blocks themselves. The site's theme would fetch Mermaid (3 MB of script) from another server
when a page is read, which the site does not do. Understood are the lines that docs/architecture.md uses, one node or
edge a line; any other line ends the build:

    flowchart TD
    name["first line<br/>second line"]
    name --> other
    name -->|label| other

Nodes stand in rows: a node is one row below the lowest of the nodes that lead to it, and a node that no other leads to
is one row above the first of those it leads to.
"""

from __future__ import annotations

import html
import re
from typing import Any

_BLOCK = re.compile(r"^```mermaid\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_NODE = re.compile(r'(?P<name>\w+)\["(?P<text>[^"]*)"\]')
_EDGE = re.compile(r"(?P<start>\w+) -->(?:\|(?P<label>[^|]*)\|)? (?P<end>\w+)")
_BOX = "border: 1px solid; border-radius: .3em; padding: .3em .6em; text-align: center"
_ROW = "display: flex; flex-wrap: wrap; gap: .8em; justify-content: center; font-size: .7rem"


def on_page_markdown(markdown: str, /, **_: Any) -> str:
    """The page with its flow charts drawn. Raises ValueError for a line of one that is not understood."""
    return _BLOCK.sub(lambda match: drawn(match["text"]), markdown)


def drawn(text: str) -> str:
    """A flow chart as rows of boxes with arrows between the rows, as one block of HTML."""
    nodes, edges = parsed(text)
    rows = placed(nodes, edges)
    parts = []
    for number in range(max(rows.values()) + 1):
        if number:
            labels = [label for _, end, label in edges if label and rows[end] == number]
            parts.append(f'<div style="{_ROW}">&darr; {" &middot; ".join(map(html.escape, labels))}</div>')
        boxes = [f'<div style="{_BOX}">{nodes[name]}</div>' for name in nodes if rows[name] == number]
        parts.append(f'<div style="{_ROW}">{"".join(boxes)}</div>')
    return '<div class="diagram">' + "".join(parts) + "</div>"


def parsed(text: str) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """The nodes' texts by name, in their order, as HTML; and the edges: start, end, label or the empty text."""
    nodes: dict[str, str] = {}
    edges = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if node := _NODE.fullmatch(line):
            nodes[node["name"]] = "<br>".join(map(html.escape, re.split(r"<br ?/?>", node["text"])))
        elif edge := _EDGE.fullmatch(line):
            edges.append((edge["start"], edge["end"], edge["label"] or ""))
        elif not line.startswith("flowchart "):
            raise ValueError(
                f"a flow chart has the line {line!r}; see the docstring of tools/docs_diagrams.py"
            )
    if unknown := {name for start, end, _ in edges for name in (start, end)} - nodes.keys():
        raise ValueError(f"a flow chart has edges of {', '.join(sorted(unknown))}, which are no nodes of it")
    return nodes, edges


def placed(nodes: dict[str, str], edges: list[tuple[str, str, str]]) -> dict[str, int]:
    """The row of each node, from 0. Raises ValueError where edges lead in a circle."""
    rows = dict.fromkeys(nodes, 0)
    while moved := {end: rows[start] + 1 for start, end, _ in edges if rows[end] <= rows[start]}:
        rows |= moved
        if max(rows.values()) >= len(nodes):
            raise ValueError("a flow chart leads in a circle")
    for name in nodes.keys() - {end for _, end, _ in edges}:
        rows[name] = min((rows[end] for start, end, _ in edges if start == name), default=1) - 1
    return rows
