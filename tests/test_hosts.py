"""Several hosts, each a network namespace: a fit over them, a link that is cut, rows that another host reads."""

import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "hosts.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))), reason="needs root, ip and tc"
    ),
]


def said_of(monkeypatch, capfd, tmp_path, *options):
    """What the tool prints."""
    monkeypatch.syspath_prepend(TOOL.parent)
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--rows", "8000", "--directory", str(tmp_path), *options])
    import_module("hosts").main()
    return capfd.readouterr().out


@pytest.mark.parametrize("n_hosts", ["2", "3"])
def test_hosts_end_with_the_model_of_one_whatever_becomes_of_a_link(monkeypatch, capfd, tmp_path, n_hosts):
    said = said_of(monkeypatch, capfd, tmp_path, "--hosts", n_hosts, "--parts", "same,cut,dask")
    assert float(re.search(r"weights differ by (\S+)", said)[1]) < 1e-4
    assert re.search(r"link of host. cut after step \d+ .* went on [1-9] times, .* the same bytes", said)
    assert "rows read by a Dask worker on host" in said
    assert "OTHER BYTES" not in said
