"""Writes docs/settings.md: every setting of a fit and of a conversion, as the fields of ep3stream/config declare it.

python tools/settings_table.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ep3stream.config import FIT_TABLES, ConvertConfig, Setting, settings_of

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

HEAD = """# Settings

<!-- Made by tools/settings_table.py of the fields in ep3stream/config. Change those, and run the tool. -->

Every setting of a fit has a place in a TOML file, which `ep3stream fit --config FILE.toml` reads, and in Python's
`FitConfig`. Most have an option too, which comes before the file. `RUN/config.toml` holds all settings of a run.

```python
import ep3stream

settings = ep3stream.FitConfig(
    kernel=ep3stream.KernelConfig(name="matern52"),
    solver=ep3stream.SolverConfig(centers=10_000, epochs=2),
)
print(settings.to_toml())
```

**Resumed** says what may change when a run is resumed: `free`, since the result stays the same (with more `epochs` the
fit goes on from its end); `--override`, from the step resumed at; nothing, since the work so far depends on
the setting. More under [Fitting](fitting.md#what-may-change-when-a-fit-is-resumed).
"""

ABOUT_CONVERT = """
## Conversion

The options of `ep3stream convert`, and in Python the fields of `ConvertConfig`. A conversion that goes on after a kill
must have the settings it began with, but for those that are free.
"""

RESUMED = {"fixed": "", "override": "`--override`", "free": "free"}


def page() -> str:
    """The text of the page."""
    parts = [HEAD]
    for name, table in FIT_TABLES.items():
        about = (table.__doc__ or "").splitlines()[0].replace("docs/kernels.md", "[Kernels](kernels.md)")
        parts.append(f"\n## [{name}]\n\n{about} `ep3stream.{table.__name__}`.\n")
        parts += rows(table)
    parts.append(ABOUT_CONVERT)
    parts += rows(ConvertConfig)
    return "".join(parts)


def rows(table: type) -> Iterator[str]:
    """The lines of the Markdown table of one dataclass."""
    yield "\n| setting | option | value | default | meaning | resumed |\n|---|---|---|---|---|---|\n"
    for each in settings_of(table):
        option = "" if each.option is None else f"`--{each.option}`"
        if each.kinds >= {bool, str}:
            option += f", `--{each.option}-dir`"
        cells = [f"`{each.name}`", option, value(each), each.default_text, each.help, RESUMED[each.on_resume]]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def value(each: Setting) -> str:
    """The values that a setting may have: its limit, or else its types and the texts it may be."""
    words = {
        "bool": "yes or no",
        "int": "whole number",
        "float": "number",
        "str": "text",
        "Path": "path",
        "Sequence": "list of names",
        "Mapping": "values by name",
    }
    kinds = {getattr(kind, "__name__", "") for kind in each.kinds}
    found = [words[kind] for kind in words if kind in kinds]
    if each.choices and "Sequence" not in kinds:
        found = [*(f"`{choice}`" for choice in each.choices), *found]
    if each.limit is None:
        return ", ".join(found)
    return f"text, or a number: {each.limit.words}" if "str" in kinds else each.limit.words


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 where the page is not up to date"
    )
    text = page()
    if parser.parse_args(arguments).check:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
