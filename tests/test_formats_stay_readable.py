"""What earlier versions wrote, committed under tests/fixtures, is read by this one: stores, models, runs, settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ep3stream
from ep3stream import cli
from ep3stream.config import CONFIG_VERSION, FitConfig
from ep3stream.inspection.inspect import verify
from ep3stream.mesh import Mesh
from ep3stream.run.bundle import BUNDLE_VERSION
from ep3stream.run.event_log import read_lines
from ep3stream.run.setup import Setup
from ep3stream.run.state import list_checkpoints
from ep3stream.solver.projection import NystromProjection
from ep3stream.store.manifest import STORE_FORMAT_VERSION
from ep3stream.store.reader import open_store
from ep3stream.store.verify import verify_store

FIXTURES = sorted(
    path for path in (Path(__file__).parent / "fixtures").iterdir() if path.name.startswith("store-")
)
STORES = sorted(path for folder in FIXTURES for path in folder.iterdir() if path.suffix in (".zarr", ".h5"))
EVERY_FIXTURE = pytest.mark.parametrize("made", FIXTURES, ids=lambda path: path.name)


def test_the_formats_of_today_have_their_fixtures() -> None:
    """Else: python tests/fixtures/make.py."""
    current = f"store-{STORE_FORMAT_VERSION}-bundle-{BUNDLE_VERSION}-config-{CONFIG_VERSION}"
    assert current in [path.name for path in FIXTURES]


@pytest.mark.parametrize("path", STORES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_row_of_a_stored_store_is_read(path: Path) -> None:
    expected = np.load(path.parent / "expected.npz", allow_pickle=False)["x"]
    with open_store(path) as store:
        assert verify_store(store) == []
        assert verify_store(store, quick=True) == []
        readers = [store.split(name) for name in store.manifest.splits]
        read = np.concatenate([reader.read_rows(np.arange(reader.info.n_rows))[0] for reader in readers])
        if path.stem == "times":  # Its first column is a time, of which an offset was subtracted.
            assert store.manifest.format_version == 3
            read = (read.astype(np.float64) + store.manifest.offsets.x - [1.7e9, 0, 0]).astype(np.float32)
    assert read.shape == expected.shape
    sort = lambda x: x[np.argsort(x[:, 0], kind="stable")].astype(np.float32)  # noqa: E731
    np.testing.assert_allclose(sort(read), sort(expected.astype(read.dtype)), rtol=1e-6, atol=1e-6)


@EVERY_FIXTURE
def test_the_first_store_format_is_read_as_it_was_written(made: Path) -> None:
    with open_store(made / "format-1.zarr") as first, open_store(made / "rows.zarr") as later:
        assert first.manifest.format_version == 1
        assert first.manifest.conversion == {}
        assert first.manifest.splits == later.manifest.splits
        assert b"conversion" not in first.manifest.to_json()


@EVERY_FIXTURE
def test_a_stored_model_predicts_what_it_predicted(made: Path) -> None:
    assert verify(made / "run") == []
    expected = np.load(made / "expected.npz", allow_pickle=False)
    predictions = ep3stream.load(made / "run").predict(expected["x"])
    np.testing.assert_allclose(predictions, expected["predictions"], rtol=1e-3, atol=1e-4)


@EVERY_FIXTURE
def test_a_stored_run_without_its_model_predicts_from_its_checkpoint(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    shutil.rmtree(run / "model")
    expected = np.load(made / "expected.npz", allow_pickle=False)
    predictions = ep3stream.load(run).predict(expected["x"])
    np.testing.assert_allclose(predictions, expected["predictions"], rtol=1e-3, atol=1e-4)


@EVERY_FIXTURE
def test_a_stored_run_is_resumed_where_it_stopped(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    ((stopped, _), *_) = list_checkpoints(run / "checkpoints")
    config = FitConfig.from_toml((run / "config.toml").read_text(), "fixture")
    assert config.kernel.bandwidth == 2.5
    ep3stream.fit(made / "rows.zarr", run, config.with_settings({"solver": {"epochs": 3}}, "test"))
    events = [record for record in read_lines(run / "metrics.jsonl") if record["kind"] == "event"]
    assert ("resume", stopped) in [(event["event"], event["step"]) for event in events]
    assert (events[-1]["event"], events[-1]["step"]) == ("finish", 3 * stopped)
    assert verify(run) == []
    before, after = (ep3stream.load(path).predict(rows(made)[0]) for path in (made / "run", run))
    y = rows(made)[1]
    assert np.square(after - y).mean() < np.square(before - y).mean()


@pytest.mark.parametrize(
    "made", [path for path in FIXTURES if (path / "coded").exists()], ids=lambda path: path.name
)
def test_a_stored_model_of_codes_predicts_what_it_predicted_and_goes_on(made: Path, tmp_path: Path) -> None:
    expected = np.load(made / "coded" / "expected.npz", allow_pickle=False)
    run = Path(shutil.copytree(made / "coded" / "run", tmp_path / "run"))
    assert verify(run) == []
    predictions = ep3stream.load(run).predict(expected["x"])
    np.testing.assert_allclose(predictions, expected["predictions"], rtol=1e-3, atol=1e-4)
    with open_store(made / "coded" / "rows.zarr") as store:
        assert verify_store(store) == []
    config = FitConfig.from_toml((run / "config.toml").read_text(), "fixture")
    ep3stream.fit(made / "coded" / "rows.zarr", run, config.with_settings({"solver": {"epochs": 2}}, "test"))


def rows(made: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_store(made / "rows.zarr") as store:
        x, y = store.split("train").read_segment(0)
    return x, y[:, 0]


@EVERY_FIXTURE
def test_the_command_line_reads_a_stored_run_and_store(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (made / "run", made / "rows.zarr", made / "classes.h5"):
        assert cli.main(["inspect", str(path)]) == 0
        assert cli.main(["verify", str(path)]) == 0
    assert "sound" in capsys.readouterr().out


@EVERY_FIXTURE
def test_a_stored_set_up_has_the_projection_it_was_written_with(made: Path) -> None:
    """Formats 1 and 2 held the core, r x r, of each stage."""
    setup = Setup.load(made / "run" / "setup")
    config = FitConfig.from_toml((made / "run" / "config.toml").read_text(), "fixture")
    solver = setup.solver(config, None, Mesh(0, 1, torch.device("cpu")))
    projections = [solver.projection, *(stage.projection for stage in solver.later)]
    tensors = setup.tensors
    for number, projection in enumerate(projections):
        assert isinstance(projection, NystromProjection)
        found = (projection.half * projection.eigenvalue_scale) @ projection.half.T
        core = tensors["core"].reshape(-1, *found.shape)[number].double() if "core" in tensors else found
        torch.testing.assert_close(found, core, rtol=1e-4, atol=1e-6 * float(core.abs().max()))
        assert torch.equal(projection.basis, tensors["basis"])
