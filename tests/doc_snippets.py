"""Reads the fenced blocks of a page and runs them: Python as it is, commands through the command line's own `main`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ep3stream.cli import main

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Snippet:
    """A fenced block, where it stands, and why it is not run, if it is not."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def is_code(self) -> bool:
        """Not what a program printed, or a file's layout."""
        return self.language in ("python", "sh")


def snippets(page: Path) -> Iterator[Snippet]:
    """Every fenced block of a page, from top to bottom."""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        yield Snippet(page.name, line, match["language"], match["text"], match["reason"])


def run_page(page: Path, smaller: Mapping[str, str]) -> list[str]:
    """Runs what the page says, in the current directory; returns which of the `smaller` sizes it did not mention.

    smaller: what a reader writes -> what stands in for it here, so that a page runs in seconds.
    """
    names: dict[str, object] = {"__name__": page.stem}
    unused = set(smaller)
    for snippet in snippets(page):
        if snippet.reason is not None or not snippet.is_code:
            continue
        text = snippet.text
        for size, stand_in in smaller.items():
            if size in text:
                unused.discard(size)
                text = text.replace(size, stand_in)
        if snippet.language == "python":
            # Blank lines before it, so that a traceback names the line of the page.
            exec(compile("\n" * (snippet.line - 1) + text, str(page), "exec"), names)
        else:
            for command in commands(text):
                _run(command, snippet)
    return sorted(unused)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, without comments and prompts."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def _run(words: list[str], snippet: Snippet) -> None:
    where = f"{snippet.page}:{snippet.line}: {shlex.join(words)}"
    assert words[0] == "ep3stream", (
        f"{where}: only ep3stream's own commands are run; mark the block with a reason"
    )
    assert main(words[1:]) == 0, where
