"""Which files a source has: each is read once, links are followed, and what is passed over or twice there is told."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

import ep3stream
from ep3stream import ConvertConfig, SourceError
from ep3stream.conversion.find_files import find_files


def write(path: Path, first: int = 0, n_rows: int = 3) -> Path:
    """A table of the columns n and y, whose numbers begin with `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"n": np.arange(first, first + n_rows, dtype=float), "y": np.arange(n_rows) * 1.0})
    text = "n,y\n" + "".join(f"{n},{y}\n" for n, y in zip(*table.to_pydict().values(), strict=True))
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        case ".bz2":
            path.write_bytes(bz2.compress(text.encode()))
        case ".xz":
            path.write_bytes(lzma.compress(text.encode()))
        case ".zst" | ".lz4" as suffix:
            codec = {".zst": "zstd", ".lz4": "lz4"}[suffix]
            with pa.OSFile(str(path), "wb") as raw, pa.CompressedOutputStream(raw, codec) as out:
                out.write(text.encode())
        case ".parquet":
            pq.write_table(table, path)
        case ".arrow":
            feather.write_feather(table, path)
        case _:
            path.write_text(text)
    return path


def read(source: object, store: Path, **settings: object) -> tuple[np.ndarray, list[str]]:
    config = ConvertConfig(target="y", shuffle=False, **settings)
    manifest = ep3stream.convert(source, store, config)
    with ep3stream.open_store(store) as opened:
        reader = opened.split("train")
        return np.asarray(reader.read_rows(np.arange(reader.info.n_rows))[0]), list(manifest.feature_names)


def found(*paths: Path) -> list[str]:
    return [file.path.name for file in find_files(paths)]


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=target.is_dir())


# -- Links


def test_linked_files_and_directories_below_a_directory_are_followed(tmp_path):
    write(tmp_path / "d" / "a.csv", 0)
    write(tmp_path / "elsewhere" / "b.csv", 10)
    write(tmp_path / "elsewhere" / "deep" / "c.csv", 20)
    write(tmp_path / "d.csv", 30)
    link(tmp_path / "d" / "more", tmp_path / "elsewhere")
    link(tmp_path / "d" / "z.csv", tmp_path / "d.csv")
    x, _ = read(tmp_path / "d", tmp_path / "s.zarr")
    assert x[:, 0].tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]


def test_a_linked_directory_may_be_named(tmp_path):
    write(tmp_path / "elsewhere" / "b.csv", 10)
    link(tmp_path / "d", tmp_path / "elsewhere")
    assert found(tmp_path / "d") == ["b.csv"]


@pytest.mark.parametrize("target", ["d", ".", "d/inner"])
def test_links_in_a_circle_end(target, tmp_path, caplog):
    write(tmp_path / "d" / "a.csv")
    write(tmp_path / "d" / "inner" / "b.csv")
    link(tmp_path / "d" / "inner" / "loop", (tmp_path / target).resolve())
    assert found(tmp_path / "d") == ["a.csv", "b.csv"]
    if target != ".":
        assert "links to directories that are read already are passed over" in caplog.text


@pytest.mark.parametrize("name", ["latest.csv", "aaa.csv", "inner/same.csv"])
@pytest.mark.parametrize("is_hard", [False, True])
def test_a_file_and_a_link_to_it_are_read_once_and_told(name, is_hard, tmp_path, caplog):
    write(tmp_path / "d" / "b.csv", 5)
    place = tmp_path / "d" / name
    place.parent.mkdir(exist_ok=True)
    if is_hard:
        os.link(tmp_path / "d" / "b.csv", place)
    else:
        link(place, tmp_path / "d" / "b.csv")
    x, _ = read(tmp_path / "d", tmp_path / "s.zarr")
    assert len(x) == 3
    assert "read once, though named or linked more than once" in caplog.text
    if not is_hard:
        assert f"{place} (the same file as {tmp_path / 'd' / 'b.csv'})" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        ["d", "d/a.csv"],
        ["d/a.csv", "d"],
        ["d", "d/*.csv"],
        ["d/*.csv", "d/a*"],
        ["d/a.csv", "d/../d/a.csv", "d/b.csv"],
        ["d", "d"],
        ["d", "d/."],
        ["d/**/*.csv", "d/[ab].csv"],
    ],
)
def test_names_that_overlap_give_each_file_once_and_are_told(names, tmp_path, caplog):
    write(tmp_path / "d" / "a.csv", 0)
    write(tmp_path / "d" / "b.csv", 10)
    x, _ = read([tmp_path / name for name in names], tmp_path / "s.zarr")
    assert x[:, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert "read once" in caplog.text


def test_a_pattern_that_matches_a_directory_reads_what_lies_below(tmp_path):
    for month in ("2026-01", "2026-02", "2025-12"):
        write(tmp_path / month / "rows.csv")
    assert [file.path.parent.name for file in find_files([tmp_path / "2026-*"])] == ["2026-01", "2026-02"]
    assert len(find_files([tmp_path / "**"])) == 3


def test_a_name_with_letters_of_patterns_is_a_name(tmp_path):
    assert found(write(tmp_path / "a[1]*.csv")) == ["a[1]*.csv"]


def test_files_come_in_the_order_of_their_names(tmp_path):
    for number in (10, 9, 1):
        write(tmp_path / "d" / f"part-{number}.csv")
    assert found(tmp_path / "d") == ["part-1.csv", "part-10.csv", "part-9.csv"]


# -- The same rows in two forms


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a.csv", "a.csv.gz"),
        ("a.csv.gz", "a.csv.zst"),
        ("a.csv", "a.csv.bz2"),
        ("a.csv.xz", "a.csv.lz4"),
        ("a.csv", "a.tsv"),
        ("a.csv", "a.parquet"),
        ("a.parquet", "a.arrow"),
        ("a.csv", "a.CSV.GZ"),
        ("a.2026.csv", "a.2026.parquet"),
        ("inner/a.csv", "inner/a.csv.gz"),
    ],
)
def test_one_name_in_two_forms_is_refused_unless_both_are_named(one, other, tmp_path):
    paths = [write(tmp_path / "d" / name) for name in (one, other)]
    with pytest.raises(
        SourceError, match=r"lies beside .*, probably the same rows .*name the files one by one"
    ):
        found(tmp_path / "d")
    with pytest.raises(SourceError, match="lies beside"):
        found(tmp_path / "d" / "**" / "a.*")
    assert len(found(*paths)) == 2
    assert len(found(paths[1], tmp_path / "d" / one)) == 2


@pytest.mark.parametrize("pair", [("a.csv", "b.csv.gz"), ("x/a.csv", "y/a.csv.gz"), ("a.csv", "a.b.csv")])
def test_other_names_or_places_are_other_rows(pair, tmp_path):
    for name in pair:
        write(tmp_path / "d" / name)
    assert len(found(tmp_path / "d")) == 2


# -- Passed over


@pytest.mark.parametrize("suffix", [".csv.bz2", ".csv.xz", ".csv.lz4", ".csv.zst", ".csv.gz", ".tsv.bz2"])
def test_packed_files_of_every_kind_are_read(suffix, tmp_path):
    path = write(tmp_path / f"feb{suffix}")
    if "tsv" in suffix:
        path.write_bytes(bz2.compress(bz2.decompress(path.read_bytes()).replace(b",", b"\t")))
    x, _ = read(tmp_path, tmp_path.parent / f"{tmp_path.name}.zarr")
    assert x[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".lz4"])
def test_packed_svmlight_is_read_and_packed_files_that_were_cut_are_refused(suffix, tmp_path):
    pack = {".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix) or (
        lambda data: pa.compress(data, "lz4", asbytes=True)
    )
    path = tmp_path / f"rows.svm{suffix}"
    path.write_bytes(pack(b"1.5 1:2 2:3\n2.5 1:1\n" * 2000))
    ep3stream.convert(path, tmp_path / "s.zarr", ConvertConfig())
    assert ep3stream.open_store(tmp_path / "s.zarr").manifest.splits["train"].n_rows == 4000
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(SourceError, match=f"rows.svm{suffix}: cannot be read"):
        ep3stream.convert(path, tmp_path / "t.zarr", ConvertConfig())


@pytest.mark.parametrize(
    "name",
    ["feb.xlsx", "feb.json", "part-0001", "feb.txt", ".hidden.csv", "_b.csv", "feb.csv.Z", "feb.avro", ".t/a.csv",
     "_temporary/0/part-0.parquet", "store.zarr/zarr.json", "feb.csv~", "x.npy"],
)  # fmt: skip
def test_what_is_passed_over_in_a_directory_is_told_by_name(name, tmp_path, caplog):
    write(tmp_path / "d" / "a.csv")
    write(tmp_path / "d" / name)
    assert found(tmp_path / "d") == ["a.csv"]
    shown = name.removesuffix("/zarr.json")
    assert f"{tmp_path / 'd'}: 1 file(s) are passed over: {shown}" in caplog.text


def test_many_files_that_are_passed_over_are_counted(tmp_path, caplog):
    write(tmp_path / "a.csv")
    for number in range(30):
        write(tmp_path / f"{number:02}.json")
    found(tmp_path)
    assert (
        "30 file(s) are passed over: 00.json, 01.json, 02.json, 03.json, 04.json and 25 more" in caplog.text
    )


@pytest.mark.parametrize(
    "name",
    ["_SUCCESS", "_metadata", "_common_metadata", ".part-0.parquet.crc", ".DS_Store", "README.md", "LICENSE",
     "a.csv.md5", "._a.csv", ".~lock.a.csv#", ".git/config", "_started_17", "_committed_17"],
)  # fmt: skip
def test_marks_of_writers_and_texts_for_people_are_passed_over_silently(name, tmp_path, caplog):
    write(tmp_path / "d" / "a.csv")
    write(tmp_path / "d" / name)
    assert found(tmp_path / "d") == ["a.csv"]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [("_delta_log/0.json", "Delta"), (".hoodie/x", "Hudi"), ("metadata/v1.metadata.json", "Iceberg")],
)
def test_tables_whose_log_tells_which_files_count_are_refused(name, kind, tmp_path):
    write(tmp_path / "d" / "data" / "a.parquet")
    write(tmp_path / "d" / name)
    with pytest.raises(SourceError, match=f"is a {kind} table, whose files may hold rows that were deleted"):
        found(tmp_path / "d")
    assert found(tmp_path / "d" / "data" / "a.parquet") == ["a.parquet"]


# -- What is no file


def test_broken_links_pipes_and_sockets_are_refused_in_a_line(tmp_path):
    write(tmp_path / "d" / "a.csv")
    link(tmp_path / "d" / "b.csv", tmp_path / "gone.csv")
    with pytest.raises(SourceError, match=r"b.csv: is a link to nothing \(.*gone.csv\)"):
        found(tmp_path / "d")
    with pytest.raises(SourceError, match="is a link to nothing"):
        found(tmp_path / "d" / "b.csv")
    (tmp_path / "d" / "b.csv").unlink()
    os.mkfifo(tmp_path / "d" / "b.csv")
    with pytest.raises(
        SourceError, match=r"b\.csv: is a pipe, and rows are read twice; write them to a file"
    ):
        found(tmp_path / "d")
    (tmp_path / "d" / "b.csv").unlink()
    here = os.getcwd()
    os.chdir(tmp_path / "d")  # The names of sockets are short.
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("b.csv")
            with pytest.raises(SourceError, match=r"b\.csv: is a socket"):
                found(tmp_path / "d")
    finally:
        os.chdir(here)


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    link(tmp_path / "d" / "a.csv", tmp_path / "d" / "a.csv")
    with pytest.raises(SourceError, match=r"a\.csv: is a link to nothing"):
        found(tmp_path / "d")


def test_a_directory_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "d" / "inner" / "a.csv")
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "inner":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(SourceError, match="inner: may not be read; change its permissions"):
        found(tmp_path / "d")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/*.csv", ["a.csv", "b.csv"]),
        ("**", ["a.csv", "b.csv"]),
        ("**/x/**/b.csv", ["b.csv"]),
        ("./**/b.csv", ["b.csv"]),
    ],
)
def test_a_pattern_over_links_in_circles_ends_and_reads_each_file_once(pattern, names, tmp_path):
    write(tmp_path / "d" / "a.csv")
    write(tmp_path / "d" / "x" / "b.csv")
    for name in ("loop", "again", "third"):
        link(tmp_path / "d" / "x" / name, tmp_path / "d")
    link(tmp_path / "d" / "y", tmp_path / "d" / "x")
    assert found(tmp_path / "d" / pattern) == names


def test_a_pattern_over_directories_follows_links_and_leaves_out_hidden_ones(tmp_path):
    write(tmp_path / "d" / ".hidden" / "a.csv")
    write(tmp_path / "elsewhere" / "b.csv")
    link(tmp_path / "d" / "more", tmp_path / "elsewhere")
    assert found(tmp_path / "d" / "**" / "*.csv") == ["b.csv"]


@pytest.mark.parametrize("names", [("a.csv", "a.csv.zip"), ("a.zip", "a.csv.zip"), ("a.csv", "a.CSV.ZIP")])
def test_a_table_beside_its_archive_is_refused(names, tmp_path):
    for name in names:
        write(tmp_path / "d" / name)
    with pytest.raises(SourceError, match="lies beside"):
        found(tmp_path / "d")


def test_locks_of_spreadsheets_are_passed_over(tmp_path):
    write(tmp_path / "d" / "a.csv")
    (tmp_path / "d" / "~$a.csv").write_bytes(b"\x05name")
    assert found(tmp_path / "d") == ["a.csv"]


@pytest.mark.parametrize("name", ["adult.data", "rows.txt", "rows.dat", "part-0001"])
def test_a_text_of_rows_under_another_name_is_refused_with_the_remedy(name, tmp_path):
    with pytest.raises(SourceError, match=r"call it \.csv or \.tsv if it is a text of rows"):
        found(write(tmp_path / name))


def parquet_with_metadata(folder: Path) -> None:
    written: list[pq.FileMetaData] = []
    table = pa.table({"a": [float(i) for i in range(6)], "y": [1.0] * 6})
    for number in range(3):
        name = f"deep/{number}.parquet" if number == 2 else f"{number}.parquet"
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(table[2 * number : 2 * number + 2], folder / name, metadata_collector=written)
        written[-1].set_file_path(name)
    pq.write_metadata(table.schema, folder / "_metadata", written)


@pytest.mark.parametrize("lost", [[], ["1.parquet"], ["deep/2.parquet"], ["0.parquet", "1.parquet"]])
def test_parts_that_the_metadata_of_parquet_names_must_be_there(tmp_path: Path, lost: list[str]) -> None:
    (tmp_path / "d").mkdir()
    parquet_with_metadata(tmp_path / "d")
    for name in lost:
        (tmp_path / "d" / name).unlink()
    config = ConvertConfig(target="y")
    if not lost:
        assert ep3stream.convert(tmp_path / "d", tmp_path / "s", config).splits["train"].n_rows == 6
        return
    with pytest.raises(
        SourceError, match=rf"names {len(lost)} file\(s\) that are not there \({', '.join(lost)}"
    ):
        ep3stream.convert(tmp_path / "d", tmp_path / "s", config)
    (tmp_path / "d/_metadata").unlink()
    assert ep3stream.convert(tmp_path / "d", tmp_path / "s", config).splits["train"].n_rows == 6 - 2 * len(
        lost
    )


def test_a_metadata_file_that_cannot_be_read_says_nothing_of_parts(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    parquet_with_metadata(tmp_path / "d")
    (tmp_path / "d/1.parquet").unlink()
    (tmp_path / "d/_metadata").write_bytes(b"PAR1 not PAR1")
    assert (
        ep3stream.convert(tmp_path / "d", tmp_path / "s", ConvertConfig(target="y")).splits["train"].n_rows
        == 4
    )


def test_files_with_the_same_bytes_are_told(tmp_path, caplog):
    for name in ("a.csv", "a (1).csv", "old/a.csv"):
        write(tmp_path / "d" / name)
    write(tmp_path / "d" / "b.csv", 7)
    assert len(read(tmp_path / "d", tmp_path / "s.zarr")[0]) == 12
    assert (
        f"their rows are there twice: {tmp_path / 'd' / 'a.csv'} (like {tmp_path / 'd' / 'a (1).csv'}), "
        f"{tmp_path / 'd' / 'old' / 'a.csv'} (like {tmp_path / 'd' / 'a (1).csv'})"
    ) in caplog.text
    caplog.clear()
    np.save(tmp_path / "x.npy", np.eye(3))
    np.save(tmp_path / "y.npy", np.eye(3))
    ep3stream.convert(
        None, tmp_path / "t.zarr", ConvertConfig(), x_file=tmp_path / "x.npy", y_file=tmp_path / "y.npy"
    )
    assert "the same bytes" not in caplog.text
