"""Numbers that float32 would merge are stored less a recorded offset; what no offset mends is told by column."""

from __future__ import annotations

import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import ep3stream
from ep3stream import ConvertConfig
from ep3stream.conversion.offsets import precision_of, sample_rows
from ep3stream.values.offsets import exact_difference

N = np.arange(3000)
RNG = np.random.default_rng(5)

# Values of which float32 keeps a part, and which an offset keeps all of.
MENDED: dict[str, NDArray[Any]] = {
    "days as yyyymmdd": 20260401 + N % 30,
    "minutes as yyyymmddhhmm": 202604010000 + 100 * (N % 24),
    "seconds since 1970": 1_776_000_000 + N,
    "milliseconds since 1970": 1_776_000_000_000 + 1000 * N,
    "nanoseconds since 1970": 1_776_000_000_000_000_000 + 1000 * N,
    "microseconds as float64": 1_776_000_000_000_000.0 + N,
    "northing by 0.1 m": 5_432_100 + (N % 1000) / 10,
    "Excel's days with fractions": 46_113 + N / 86_400,
    "temperature in mK": 300_000_000 + RNG.integers(-1000, 1000, 3000),
    "pressure in Pa by 0.01": 9_101_325 + RNG.integers(-1000, 1000, 3000) / 100,
    "years with fractions": 2026.123456 + 1e-7 * N,
    "ids around 2^53": 2**53 - 1500 + N,
    "uint64 beyond int64": np.uint64(2**63) + N.astype(np.uint64),
    "negative int64": -(2**60) - N,
    "counts around 1e8": 100_000_000 + RNG.poisson(1e4, 3000),
    "degrees by 1e-6": 37 + RNG.integers(0, 10**6, 3000) / 1e6,
    "tiny differences of tiny numbers": 1e-6 + 1e-15 * N,
    "times and a few zeros": np.where(N % 10 == 0, 0, 1_776_000_000 + N),
    "a constant that is no float32": np.full(3000, 20_260_401),
    "microseconds of a long duration": 1.776e9 + N * 1e-6,
    "int32 beyond 2^24": (2_000_000_000 + N).astype(np.int32),
    "most significant byte first": (1.776e9 + N).astype(">f8").astype(np.float64),
}

# Values that float32 holds well enough, or about as well with an offset.
LEFT: dict[str, NDArray[Any]] = {
    "normal": RNG.normal(size=3000),
    "uniform": RNG.uniform(size=3000),
    "years": 1990 + N % 37,
    "whole numbers below 2^24": 10_000_000 + N,
    "amounts over a wide range": RNG.integers(0, 10**9, 3000),
    "a constant fraction": np.full(3000, 0.1),
    "prices": RNG.integers(0, 10**5, 3000) / 100,
    "zeros": np.zeros(3000),
    "a constant computed in several ways": 0.3 + RNG.integers(-3, 3, 3000) * 5e-17,
    "sums that should be 1": 1 + RNG.integers(-30, 30, 3000) * 1e-15,
    "a wave computed at many places": 2 + np.sin(2 * np.pi * N / 60),
}


def stored(path: Path, split: str = "train") -> tuple[NDArray[Any], NDArray[Any], Any]:
    """x and y of a split with the offsets added, in float64, and the manifest."""
    with ep3stream.open_store(path) as store:
        manifest = store.manifest
        x, y = store.split(split).read_rows(np.arange(manifest.splits[split].n_rows))
    return x.astype(np.float64) + manifest.offsets.x, y + manifest.offsets.y, manifest


def plain(**settings: Any) -> ConvertConfig:
    return ConvertConfig(shuffle=False, **settings)


def frame(values: Any, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"v": values, "n": N % 7, "y": (N % 3).astype(float), **columns})


@pytest.mark.parametrize("name", MENDED)
def test_what_float32_would_merge_is_stored_less_an_offset(tmp_path: Path, name: str) -> None:
    values = MENDED[name]
    ep3stream.convert(frame(values), tmp_path / "s.zarr", plain(target="y"))
    manifest = stored(tmp_path / "s.zarr")[2]
    offset = manifest.offsets.x[0]
    with ep3stream.open_store(tmp_path / "s.zarr") as store:
        kept = np.unique(store.split("train").read_rows(N)[0][:, 0])
    assert offset != 0
    assert len(kept) == len(np.unique(values))
    spread = float(values.max() - values.min())
    if "zeros" not in name:
        # In units of the stored numbers, for x itself is rounded to float64 where the offset is beyond 2^53.
        np.testing.assert_allclose(
            np.sort(kept), exact_difference(np.unique(values), offset), atol=max(spread, 1.0) * 1e-7
        )
    assert manifest.offsets.x[1] == 0


@pytest.mark.parametrize("name", LEFT)
def test_what_float32_holds_is_stored_as_it_is(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    ep3stream.convert(frame(LEFT[name]), tmp_path / "s.zarr", plain(target="y"))
    with ep3stream.open_store(tmp_path / "s.zarr") as store:
        x, _ = store.split("train").read_rows(N)
        assert not store.manifest.offsets.x.any()
        assert "offset" not in str(store.manifest.columns)
    np.testing.assert_array_equal(x[:, 0], LEFT[name].astype(np.float32))
    assert "rounding" not in caplog.text


def test_a_zero_among_large_numbers_stays_zero(tmp_path: Path) -> None:
    ep3stream.convert(frame(MENDED["times and a few zeros"]), tmp_path / "s.zarr", plain(target="y"))
    x, _, _ = stored(tmp_path / "s.zarr")
    np.testing.assert_array_equal(x[:, 0], MENDED["times and a few zeros"])


def test_a_target_of_a_large_mean_keeps_its_signal(tmp_path: Path) -> None:
    signal = np.sin(N)
    table = frame(N).assign(y=1.7e9 + signal, second=signal)
    ep3stream.convert(table, tmp_path / "s.zarr", plain(target=("y", "second")))
    _, y, manifest = stored(tmp_path / "s.zarr")
    assert manifest.offsets.y.tolist() == [1.7e9, 0]
    np.testing.assert_allclose(y[:, 0], table.y, atol=1e-6)
    np.testing.assert_array_equal(y[:, 1], signal.astype(np.float32))


def test_gaps_do_not_disturb_an_offset(tmp_path: Path) -> None:
    values = np.where(N < 1000, np.nan, 1_776_000_000.0 + N)
    ep3stream.convert(frame(values), tmp_path / "s.zarr", plain(target="y", missing="drop"))
    x, _, _ = stored(tmp_path / "s.zarr")
    np.testing.assert_array_equal(x[:, 0], values[1000:])


def test_the_mean_that_fills_gaps_is_that_of_the_values(tmp_path: Path) -> None:
    values = np.where(N % 3 == 0, np.nan, 1_776_000_000.0 + N)
    manifest = ep3stream.convert(frame(values), tmp_path / "s.zarr", plain(target="y", missing="mean"))
    x, _, _ = stored(tmp_path / "s.zarr")
    np.testing.assert_allclose(x[::3, 0], np.nanmean(values), atol=1e-3)
    assert manifest.conversion["fills"]["v"] == pytest.approx(np.nanmean(values), abs=1e-3)


def test_offsets_do_not_depend_on_the_memory(tmp_path: Path) -> None:
    n = 30_000
    rows = np.arange(n)
    table = pd.DataFrame({"v": 1_776_000_000_000 + 977 * rows, "y": rows % 5 * 1.0})
    table.loc[15_000:, "v"] += 10**9
    pq.write_table(pa.Table.from_pandas(table), tmp_path / "t.parquet", row_group_size=777)
    digests = set()
    for memory in (1 << 20, 1 << 30):
        path = tmp_path / f"{memory}.zarr"
        manifest = ep3stream.convert(
            tmp_path / "t.parquet", path, plain(target="y", memory_bytes=memory, segment_bytes=4096)
        )
        digests.add((manifest.splits["train"].digests, manifest.offsets.x[0]))
    assert len(digests) == 1


def test_a_batch_that_is_filled_again_by_its_maker_is_copied(tmp_path: Path) -> None:
    def batches() -> Any:
        x, y = np.empty((100, 1)), np.empty(100)
        for first in range(0, 3000, 100):
            x[:, 0], y[:] = 1_776_000_000 + N[first : first + 100], N[first : first + 100]
            yield x, y

    ep3stream.convert(batches, tmp_path / "s.zarr", plain())
    x, y, _ = stored(tmp_path / "s.zarr")
    np.testing.assert_array_equal(x[100:, 0], 1_776_000_000 + N[100:])
    np.testing.assert_array_equal(y[100:, 0], N[100:])


def test_a_source_that_can_be_read_once_gets_offsets(tmp_path: Path) -> None:
    x, y = (1_776_000_000.0 + N)[:, None], np.sin(N)
    ep3stream.convert(iter([(x[:7], y[:7]), (x[7:], y[7:])]), tmp_path / "s.zarr", plain())
    np.testing.assert_array_equal(stored(tmp_path / "s.zarr")[0], x)


def test_a_later_part_of_another_type_has_the_same_offset(tmp_path: Path) -> None:
    rows = np.arange(12_000)
    pq.write_table(pa.table({"v": 1_776_000_000 + rows, "y": rows * 1.0}), tmp_path / "1.parquet")
    later = pa.table({"v": pa.array(N, pa.int16()), "y": N * 1.0})
    pq.write_table(later, tmp_path / "2.parquet")
    ep3stream.convert(
        [tmp_path / "1.parquet", tmp_path / "2.parquet"], tmp_path / "s.zarr", plain(target="y")
    )
    x, _, manifest = stored(tmp_path / "s.zarr")
    assert manifest.offsets.x[0] > 0
    np.testing.assert_array_equal(x[:12_000, 0], 1_776_000_000 + rows)
    np.testing.assert_allclose(x[12_000:, 0], N, atol=64)  # Half of the unit of float32 at 1.8e9.


@pytest.mark.parametrize("zeros", [False, True])
def test_svmlight_files_of_large_values_keep_them_and_their_zeros(tmp_path: Path, zeros: bool) -> None:
    lines = [f"{i % 3}.5 1:{1_776_000_000 + i} 2:{i % 5 + 1}" for i in N]
    if zeros:
        lines[::3] = [f"{i % 3}.5 2:{i % 5 + 1}" for i in N[::3]]
    (tmp_path / "rows.svm").write_text("\n".join([*lines, ""]))
    ep3stream.convert(tmp_path / "rows.svm", tmp_path / "s.zarr", plain())
    x, _, _ = stored(tmp_path / "s.zarr")
    expected = 1_776_000_000 + N
    np.testing.assert_array_equal(x[:, 0], np.where(N % 3, expected, 0) if zeros else expected)


def test_masked_rows_and_dask_frames_have_offsets(tmp_path: Path) -> None:
    values = 1.776e9 + N
    masked = np.ma.array(values[:, None], mask=(N % 10 == 0)[:, None])
    ep3stream.convert((masked, N * 1.0), tmp_path / "1.zarr", plain(missing="drop"))
    np.testing.assert_array_equal(stored(tmp_path / "1.zarr")[0][:, 0], values[N % 10 > 0])
    dd = pytest.importorskip("dask.dataframe")
    frames = dd.from_pandas(frame(1_776_000_000 + N), npartitions=7)
    ep3stream.convert(frames, tmp_path / "2.zarr", plain(target="y"))
    np.testing.assert_array_equal(stored(tmp_path / "2.zarr")[0][:, 0], values)


def test_a_day_that_fills_the_first_rows_does_not_hide_the_next_days(tmp_path: Path) -> None:
    days = np.repeat(20_260_401 + np.arange(10), 12_000)
    ep3stream.convert(pd.DataFrame({"v": days, "y": days % 2 * 1.0}), tmp_path / "s.zarr", plain(target="y"))
    np.testing.assert_array_equal(stored(tmp_path / "s.zarr")[0][:, 0], days)


def test_decimals_and_timestamps_have_offsets(tmp_path: Path) -> None:
    table = pa.table(
        {
            "amount": pa.array(
                [Decimal(5_432_100_000 + i) / 1000 for i in range(3000)], pa.decimal128(12, 3)
            ),
            "time": pa.array(1_776_000_000 + N, pa.timestamp("s")),
            "y": N * 1.0,
        }
    )
    ep3stream.convert(table, tmp_path / "s.zarr", plain(target="y", dates=("days",)))
    x, _, manifest = stored(tmp_path / "s.zarr")
    assert (manifest.offsets.x != 0).all()
    np.testing.assert_allclose(x[:, 0], 5_432_100 + N / 1000, atol=1e-6)
    np.testing.assert_allclose(x[:, 1] * 86_400, 1_776_000_000 + N, atol=1e-3)


def test_a_store_like_another_subtracts_its_offsets(tmp_path: Path) -> None:
    ep3stream.convert(frame(1_776_000_000 + N), tmp_path / "1.zarr", plain(target="y"))
    later = frame(1_776_100_000 + N)
    later.to_csv(tmp_path / "later.csv", index=False)
    ep3stream.convert(tmp_path / "later.csv", tmp_path / "2.zarr", ConvertConfig(like=tmp_path / "1.zarr"))
    _, _, first = stored(tmp_path / "1.zarr")
    x, _, second = stored(tmp_path / "2.zarr")
    np.testing.assert_array_equal(first.offsets.x, second.offsets.x)
    np.testing.assert_array_equal(x[:, 0], later.v)


def test_inspect_shows_the_users_values(tmp_path: Path) -> None:
    table = frame(1_776_000_000 + N).assign(y=1.7e9 + N)
    ep3stream.convert(table, tmp_path / "s.zarr", plain(target="y"))
    content = ep3stream.inspect(tmp_path / "s.zarr")
    (column, _) = content["features"]["train"]
    assert (column["min"], column["max"]) == (1_776_000_000, 1_776_002_999)
    assert content["splits"]["train"]["target_mean"] == [1.7e9 + 1499.5]


def test_float16_stores_numbers_less_an_offset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"v": 20_260_401 + N % 30, "w": 5000 + np.sin(N)}
    ep3stream.convert(
        frame(values["v"], w=values["w"]), tmp_path / "s.zarr", plain(target="y", dtype="float16")
    )
    x, _, _ = stored(tmp_path / "s.zarr")
    np.testing.assert_array_equal(x[:, 0], values["v"])
    np.testing.assert_allclose(x[:, 2], values["w"], atol=1e-3)
    assert "WARNING" not in caplog.text


def test_an_ordinary_float16_store_has_no_offsets(tmp_path: Path) -> None:
    ep3stream.convert(frame(RNG.normal(size=3000)), tmp_path / "s.zarr", plain(target="y", dtype="float16"))
    assert not stored(tmp_path / "s.zarr")[2].offsets.x.any()


LOST = {
    "two clusters of times": np.where(N % 2, 1_776_000_000 + N, 3_776_000_000 + N),
    "whole numbers beyond 2^53 as float64": 1.776e18 + 256.0 * (N % 500),
    "small steps around numbers far apart": (N % 5) * 1e9 + N / 1000,
}


@pytest.mark.parametrize("name", LOST)
def test_what_no_offset_mends_is_told_by_column(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    ep3stream.convert(frame(LOST[name]), tmp_path / "s.zarr", plain(target="y"))
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told.startswith("column 'v'")
    assert "leave the column out" in told


def test_a_loss_behind_the_first_rows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = np.arange(40_000)
    table = pd.DataFrame({"v": np.where(rows < 12_000, rows, 1_776_000_000_000 + rows), "y": rows % 2 * 1.0})
    ep3stream.convert(table, tmp_path / "s.zarr", plain(target="y"))
    assert "column 'v': rounding to float32 keeps" in caplog.text
    assert not stored(tmp_path / "s.zarr")[2].offsets.x.any()


def test_values_that_become_0_are_told_by_column(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pd.DataFrame(
        {"a": [1e-271, 2e-117, 0.0, -566779.25], "b": [1e-38, 1.0, 2.0, 3.0], "y": [1, 2, 1e-99, 4]}
    )
    ep3stream.convert(table, tmp_path / "s.zarr", plain(target="y"))
    told = [record.getMessage() for record in caplog.records if "stored as 0" in record.getMessage()]
    assert [message.split(" are")[0] for message in told] == ["column 'a': 2 values", "column 'y': 1 values"]


def test_the_loss_of_a_target_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ep3stream.convert(frame(N).assign(y=(N % 2) * 1.7e9 + np.sin(N)), tmp_path / "s.zarr", plain(target="y"))
    assert "target 'y': rounding to float32 keeps" in caplog.text


def test_a_difference_of_64_bit_integers_is_exact() -> None:
    signed = np.array([-(2**63), -1, 0, 2**63 - 1])
    np.testing.assert_array_equal(exact_difference(signed, 1.0), [-(2.0**63) - 1, -2, -1, 2.0**63 - 2])
    unsigned = np.array([0, 2**63, 2**63 + 1, 2**64 - 1], np.uint64)
    np.testing.assert_array_equal(exact_difference(unsigned, 2.0**63), [-(2.0**63), 0, 1, 2.0**63 - 1])
    near = np.array([2**53 + 1, 2**53 + 2])
    np.testing.assert_array_equal(exact_difference(near, 2.0**53), [1, 2])


def test_whole_numbers_keep_whole_offsets() -> None:
    for values in (20_260_401 + N, 1_776_000_000.0 + N, -(2**60) - N):
        assert precision_of(np.asarray(values), "float32").offset % 1 == 0


def test_the_sample_of_wide_rows_is_smaller() -> None:
    assert sample_rows(1) == 10_000
    assert 64 <= sample_rows(100_000) < 100


# Numbers near 0 beside larger ones, which an offset of the larger ones would make one.
NEAR_ZERO: dict[str, list[float]] = {
    "two fractions": [0.001, 0.002],
    "two that float32 tells as zeros": [-6e-61, 0.0],
    "a zero and a small number": [0.0, 1e-9],
    "both signs": [-3e-12, 3e-12],
    "flags": [1, 2],
    "of float32's least": [1e-38, 2e-38],
}


@pytest.mark.parametrize("name", NEAR_ZERO)
def test_an_offset_makes_one_of_no_numbers_that_float32_keeps_apart(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    few = NEAR_ZERO[name]
    values = np.array([few[row] if row < 2 else 1_776_000_000.0 + row for row in N])
    ep3stream.convert(frame(values), tmp_path / "s.zarr", plain(target="y"))
    x, _, manifest = stored(tmp_path / "s.zarr")
    assert not manifest.offsets.x.any()
    np.testing.assert_array_equal(x[:2, 0], np.array(few, np.float32))
    assert "column 'v': rounding to float32 keeps" in caplog.text


@pytest.mark.parametrize("by", ["split file", "like"])
def test_losses_among_the_first_rows_of_a_later_file_are_told(
    tmp_path: Path, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, later = (
        frame(N / 8),
        pd.DataFrame({"v": np.r_[0.5, 1_776_000_000.0 + N[:60]], "n": 1, "y": N[:61] % 7.0}),
    )
    for name, table in (("a", first), ("b", later)):
        table.to_parquet(tmp_path / f"{name}.parquet")
    if by == "like":
        ep3stream.convert(tmp_path / "a.parquet", tmp_path / "a.zarr", plain(target="y"))
        assert not caplog.records
        ep3stream.convert(
            tmp_path / "b.parquet", tmp_path / "s.zarr", ConvertConfig(like=tmp_path / "a.zarr")
        )
    else:
        settings = plain(target="y", split_files={"later": tmp_path / "b.parquet"})
        ep3stream.convert(tmp_path / "a.parquet", tmp_path / "s.zarr", settings)
    assert "column 'v': rounding to float32 keeps" in caplog.text


def test_an_offset_of_the_first_file_that_merges_rows_of_a_later_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = plain(target="y", split_files={"later": tmp_path / "b.parquet"})
    frame(N / 64 % 9).to_parquet(tmp_path / "b.parquet")
    ep3stream.convert(frame(1_776_000_000 + N), tmp_path / "s.zarr", settings)
    assert "column 'v': rounding to float32 keeps" in caplog.text


WITH_GAPS: dict[str, NDArray[Any]] = {
    "uint64": np.uint64(16017012281334359971) + N.astype(np.uint64),
    "int64": 2**60 + 3 * N,
    "negative": -(2**62) - 7 * N,
    "around 2^53": 2**53 - 1500 + N,
    "nanoseconds": 1_776_000_000_000_000_000 + 1001 * N,
}


@pytest.mark.parametrize("format", ["parquet", "feather"])
@pytest.mark.parametrize("name", WITH_GAPS)
def test_a_gap_takes_no_digits_from_the_whole_numbers_beside_it(
    tmp_path: Path, name: str, format: str
) -> None:
    values = WITH_GAPS[name]
    table = pa.table({"v": pa.array(values, mask=N == 2000), "y": N % 7 * 1.0})
    file = tmp_path / f"t.{format}"
    if format == "feather":
        feather.write_feather(table, file, chunksize=500)
    else:
        pq.write_table(table, file, row_group_size=500)
    manifests = [
        ep3stream.convert(
            file, tmp_path / f"{memory}.zarr", plain(target="y", segment_bytes=4096, memory_bytes=memory)
        )
        for memory in (1 << 14, 1 << 26)
    ]
    assert len({manifest.splits["train"].digests for manifest in manifests}) == 1
    with ep3stream.open_store(tmp_path / "16384.zarr") as store:
        offset, known = int(store.manifest.offsets.x[0]), N != 2000
        x = store.split("train").read_rows(N)[0][known, 0]
    exact = np.array([int(value) - offset for value in values[known]], np.float32)
    np.testing.assert_array_equal(x, exact)
    assert len(np.unique(x)) == known.sum()


def test_whole_numbers_that_name_folders_keep_their_digits_under_like(tmp_path: Path) -> None:
    keys = [5885918053491685766 + key for key in range(3)]
    for key in keys:
        (tmp_path / "d" / f"k={key}").mkdir(parents=True)
        pq.write_table(pa.table({"a": [key % 7.0], "y": [1.0]}), tmp_path / "d" / f"k={key}" / "a.parquet")
    ep3stream.convert(tmp_path / "d", tmp_path / "s.zarr", plain(target="y"))
    ep3stream.convert(tmp_path / "d", tmp_path / "t.zarr", ConvertConfig(like=tmp_path / "s.zarr"))
    for name in ("s.zarr", "t.zarr"):
        with ep3stream.open_store(tmp_path / name) as store:
            x, _ = store.split("train").read_rows(np.arange(3))
            column = list(store.manifest.feature_names).index("k")
            assert np.diff(x[:, column]).tolist() == [1, 1]


@pytest.mark.parametrize("gap", [False, True])
def test_decimals_beyond_float64_keep_their_digits(tmp_path: Path, gap: bool) -> None:
    values = [Decimal(2**53 + 1 + k) for k in range(4)] + ([None] if gap else [])
    table = pa.table(
        {"v": pa.array(values, pa.decimal128(20, 0)), "y": [float(k) for k in range(len(values))]}
    )
    ep3stream.convert(table, tmp_path / "s.zarr", plain(target="y"))
    with ep3stream.open_store(tmp_path / "s.zarr") as store:
        x, _ = store.split("train").read_rows(np.arange(4))
    np.testing.assert_array_equal(np.diff(x[:, 0]), 1)


def test_several_targets_keep_the_digits_of_each(tmp_path: Path) -> None:
    table = pa.table({"v": [1.0, 2.0, 3.0], "y": [2**53 + k for k in (3, 5, 8)], "z": [0.5, 1.5, 2.5]})
    ep3stream.convert(table, tmp_path / "s.zarr", plain(target=["y", "z"]))
    with ep3stream.open_store(tmp_path / "s.zarr") as store:
        _, y = store.split("train").read_rows(np.arange(3))
    np.testing.assert_array_equal(np.diff(y, axis=0), [[2, 1], [3, 1]])
