"""Builds wheel and sdist, installs the wheel into an empty environment, and uses it there for a small job.

    python tools/check_release.py [--constraint constraints.txt] [--keep dist]

Needs PyPI's `build`, and an index to install from: a minute or two. Prints a line for each thing that was checked;
ends with 1 at the first that is not as it must be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SDIST_HAS = ("tests/conftest.py", "tools/check_release.py", "docs/formats.md", "examples/flights_demo.py",
             "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "Makefile",
             "constraints.txt", "pyproject.toml")  # fmt: skip
JOB = """
import numpy as np, ep3stream
x = np.random.default_rng(0).standard_normal((2000, 3)).astype(np.float32)
ep3stream.convert((x, x[:, 0] * x[:, 1]), "rows.zarr")
ep3stream.fit("rows.zarr", "run", ep3stream.FitConfig(solver=ep3stream.SolverConfig(centers=200)))
assert ep3stream.load("run").predict(x[:5]).shape == (5,)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constraint", type=Path)
    parser.add_argument(
        "--keep", type=Path, metavar="DIRECTORY", help="where wheel and sdist go when all is well"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel, sdist = build(Path(folder, "dist"))
            check_wheel(wheel)
            check_sdist(sdist)
            check_installed(wheel, Path(folder), options.constraint)
        except (AssertionError, subprocess.CalledProcessError) as error:
            print(f"not a release: {error}", file=sys.stderr)
            return 1
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            for file in (wheel, sdist):
                shutil.copy(file, options.keep)
    return 0


def build(out: Path) -> tuple[Path, Path]:
    run([sys.executable, "-m", "build", "--outdir", out, ROOT], ROOT)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    say(f"built {wheel.name} and {sdist.name}")
    return wheel, sdist


def check_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "ep3stream").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    require(tracked <= names, f"the wheel lacks {sorted(tracked - names)}")
    foreign = [name for name in names - tracked if ".dist-info/" not in name]
    require(not foreign, f"the wheel has {foreign} besides the package")
    require("ep3stream/py.typed" in names, "the wheel lacks py.typed")
    say(f"the wheel has the {len(tracked)} files of the package, py.typed among them, and no others")


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in SDIST_HAS if name not in names]
    require(not missing, f"the sdist lacks {missing}")
    say(f"the sdist has tests, tools, docs and examples: {len(names)} files")


def check_installed(wheel: Path, folder: Path, constraint: Path | None) -> None:
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    more = [] if constraint is None else ["--constraint", constraint.absolute()]
    run([python, "-m", "pip", "install", "--quiet", *more, wheel], folder)
    run([python, "-m", "pip", "check"], folder)
    version = run([folder / "venv" / "bin" / "ep3stream", "--version"], folder).strip()
    require(version == f"ep3stream {wheel.name.split('-')[1]}", f"--version says {version!r}")
    run([python, "-c", JOB], folder)
    run([folder / "venv" / "bin" / "ep3stream", "status", "run"], folder)
    say(f"installed into an empty environment it says {version!r}, converts, fits and predicts")


def run(command: list[object], folder: Path) -> str:
    """The output of a command outside this source tree's own environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return result.stdout


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
