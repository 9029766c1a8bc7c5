"""Stores in buckets: made, read and refused as on a disk, against a real S3 endpoint on loopback."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import BUCKET, ENVIRONMENT, S3Server, s3_server
from small_stores import plain_config, smooth_rows

import ep3stream
from ep3stream import ConvertConfig, cli
from ep3stream.conversion.convert import convert
from ep3stream.errors import ConfigError, DamagedDataError, DiskError, InputError
from ep3stream.store import object_files, retries
from ep3stream.store.files import ObjectUrl, location
from ep3stream.store.object_files import ObjectFiles
from ep3stream.store.reader import open_store
from ep3stream.store.verify import verify_store

URL = f"s3://{BUCKET}/stores/rows.zarr"
SETTINGS: dict[str, Any] = {
    "splits": {"train": 0.8, "test": 0.2},
    "segment_bytes": 4096,
    "memory_bytes": 1 << 20,
}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_files, "_BACKOFF_S", 0.001)
    monkeypatch.setattr(object_files, "_RETRIES", 2)
    monkeypatch.setattr(object_files, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(object_files, "_PATIENCE_S", 1.0)
    monkeypatch.chdir(tmp_path)
    x, y = smooth_rows(1500)
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    server.reset()
    return server


def make(place: str | Path = URL, **settings: Any) -> ep3stream.store.manifest.Manifest:
    more = {name: settings.pop(name) for name in ("restart", "work", "progress") if name in settings}
    return convert("rows.npz", place, ConvertConfig(**(SETTINGS | settings)), **more)


def objects(url: str = URL) -> dict[str, bytes]:
    files = ObjectFiles(location(url))
    return {name: files.read_small(name, 1 << 20) for name in files.listing()}


def files(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


@pytest.mark.parametrize(
    "settings", [{}, {"codec": "lz4"}, {"segment_bytes": 4096, "codec": "zstd", "dtype": "float16"}], ids=str
)
def test_a_store_in_a_bucket_is_byte_for_byte_the_one_on_a_disk(s3, tmp_path, settings):
    made = make(tmp_path / "local.zarr", **settings)
    assert make(**settings) == made
    assert objects() == files(tmp_path / "local.zarr")
    assert not list(tmp_path.glob(".*"))
    with open_store(URL) as remote, open_store(tmp_path / "local.zarr") as local:
        assert verify_store(remote) == verify_store(remote, quick=True) == []
        for split in ("train", "test"):
            rows = np.arange(local.split(split).info.n_rows)
            for there, here in zip(
                remote.split(split).read_rows(rows), local.split(split).read_rows(rows), strict=True
            ):
                np.testing.assert_array_equal(there, here)


def test_shards_are_read_chunk_by_chunk(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("ep3stream.conversion.spec._MAX_FILES", 2)
    assert make().splits["train"].segments_per_file > 1
    make(tmp_path / "local.zarr")
    assert objects() == files(tmp_path / "local.zarr")
    with open_store(URL) as remote:
        assert verify_store(remote) == []


def test_a_fit_from_a_bucket_ends_with_the_bytes_of_one_from_a_disk(s3, tmp_path, capsys):
    make()
    make(tmp_path / "local.zarr")
    config = plain_config(solver={"centers": 40})
    ep3stream.fit(URL, tmp_path / "far", config)
    ep3stream.fit(tmp_path / "local.zarr", tmp_path / "near", config)
    assert files(tmp_path / "far" / "model") == files(tmp_path / "near" / "model")
    far = ep3stream.evaluate(tmp_path / "far", URL)
    assert far == ep3stream.evaluate(tmp_path / "near", tmp_path / "local.zarr")
    assert ep3stream.predict(tmp_path / "far", URL, tmp_path / "out.npy") == far["n"]
    for command in ("inspect", "verify"):
        capsys.readouterr()
        assert cli.main([command, "--json", URL]) == 0
        assert json.loads(capsys.readouterr().out)["path"] == URL


def test_centers_may_be_a_split_in_a_bucket(s3, tmp_path):
    make()
    config = plain_config(solver={"centers": f"{URL}/test", "epochs": 0.1})
    ep3stream.fit(URL, tmp_path / "run", config)
    assert (
        ep3stream.inspect(tmp_path / "run")["plan"]["n_centers"] == open_store(URL).split("test").info.n_rows
    )


def test_dask_workers_read_from_the_bucket_themselves(s3):
    from distributed import LocalCluster
    from test_prefetch import _copies, _stream

    from ep3stream.stream.order import RowOrder

    make()
    reader = open_store(URL).split("train")
    info = reader.info
    order = RowOrder(1, info.n_rows, info.segment_rows, 2, 200, np.empty(0, np.int64))
    with LocalCluster(
        1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        far = _copies(_stream(reader, 0, order.steps_per_epoch, order, dask=cluster.scheduler_address))
    assert far == _copies(_stream(reader, 0, order.steps_per_epoch, order))


# Making a store: all or nothing, and resumable.


def test_the_manifest_is_put_last_and_once(s3):
    make()
    put = s3.keys("PUT")
    assert put[-1] == "stores/rows.zarr/manifest.json"
    assert len(put) == len(set(put)) == len(objects())


def interrupt_at(s3: S3Server, number: int) -> None:
    """Has the upload fail for good at its put `number`."""
    s3.fault = lambda request: 403 if request.method == "PUT" and len(s3.keys("PUT")) >= number else None


@pytest.mark.parametrize("number", [1, 7, -1])
def test_an_upload_that_was_stopped_is_no_store_and_goes_on_with_what_is_missing(s3, tmp_path, number):
    make(tmp_path / "local.zarr")
    expected = files(tmp_path / "local.zarr")
    interrupt_at(s3, number % len(expected) or len(expected))
    with pytest.raises(
        DiskError, match=rf"{URL} cannot be written .*AccessDenied.* run the same command to go on"
    ):
        make()
    with pytest.raises(InputError, match=r"is not a finished store|does not exist"):
        open_store(URL)
    done = set(objects())
    s3.fault, s3.requests = lambda _: None, []
    make()
    assert objects() == expected
    assert not {name.removeprefix("stores/rows.zarr/") for name in s3.keys("PUT")} & done
    assert not list(tmp_path.glob(".*"))


def test_a_conversion_killed_behind_its_manifest_finds_its_work_done(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("ep3stream.conversion.work.ConversionWork.remove", lambda _: None)
    made = make()
    monkeypatch.undo()
    s3.requests = []
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert make() == made
    assert s3.keys("PUT") == []
    assert not list(tmp_path.glob(".*"))


def test_other_settings_are_refused_by_name_and_restart_leaves_nothing_of_the_first_upload(s3, tmp_path):
    interrupt_at(s3, 20)
    with pytest.raises(DiskError):
        make()
    s3.fault = lambda _: None
    with pytest.raises(InputError, match="an unfinished conversion had segment_bytes"):
        make(segment_bytes=1 << 14)
    make(segment_bytes=1 << 14, restart=True)
    make(tmp_path / "local.zarr", segment_bytes=1 << 14)
    assert objects() == files(tmp_path / "local.zarr")


def test_what_lies_in_the_bucket_already_is_never_touched(s3, tmp_path):
    files = ObjectFiles(ObjectUrl(BUCKET, "stores/rows.zarr"))
    files.put("mine.txt", b"mine")
    with pytest.raises(InputError, match=rf"{URL} exists: it holds 1 objects, mine.txt among them"):
        make()
    assert objects() == {"mine.txt": b"mine"}
    assert not list(tmp_path.glob(".*"))
    files.delete(["mine.txt"])
    interrupt_at(s3, 5)
    with pytest.raises(DiskError):
        make()
    s3.fault = lambda _: None
    files.put("mine.txt", b"mine")
    with pytest.raises(InputError, match=r"1 objects that are not of this conversion, mine.txt among them"):
        make()


def test_of_two_conversions_to_one_name_the_second_does_not_replace_the_first(s3, monkeypatch):
    theirs = ObjectFiles(ObjectUrl(BUCKET, "stores/rows.zarr"))

    def meanwhile(done: Any) -> None:
        if done.stage == "upload" and done.share == 1:
            theirs.put("manifest.json", b"theirs")

    with pytest.raises(InputError, match="was made by another conversion meanwhile"):
        make(progress=meanwhile)
    assert objects()["manifest.json"] == b"theirs"


def test_a_server_that_knows_no_conditions_is_asked_before(s3, monkeypatch):
    s3.fault = lambda request: 501 if request.is_new else None
    make()
    assert verify_store(open_store(URL)) == []
    with pytest.raises(FileExistsError):
        ObjectFiles(ObjectUrl(BUCKET, "stores/rows.zarr")).put("manifest.json", b"", is_new=True)


def test_the_work_lies_where_the_user_says(s3, tmp_path):
    interrupt_at(s3, 3)
    (tmp_path / "big").mkdir()
    with pytest.raises(DiskError):
        make(work=tmp_path / "big")
    assert [path.name.startswith(".rows.zarr-") for path in (tmp_path / "big").iterdir()] == [True]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ConfigError, match=r"work is .* is no bucket's"):
        make(tmp_path / "local.zarr", work=tmp_path)


# Damage.


def change_a_byte(files: ObjectFiles, name: str, data: bytes) -> None:
    files.put(name, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


@pytest.mark.parametrize(
    ("hurt", "words", "codec"),
    [
        (change_a_byte, "does not decode", "none"),
        (change_a_byte, "does not decode", "lz4"),
        (lambda files, name, data: files.put(name, data[:-1]), r"has \d+ bytes; it must have", "lz4"),
        (lambda files, name, data: files.delete([name]), "is missing", "none"),
    ],
    ids=["a changed byte", "a changed byte, packed", "a shorter object", "no object"],
)
def test_a_damaged_object_is_named_and_never_data(s3, capsys, tmp_path, hurt, words, codec):
    make(codec=codec)
    store, name = ObjectFiles(ObjectUrl(BUCKET, "stores/rows.zarr")), "train/x/c/1/0"
    hurt(store, name, objects()[name])
    reader = open_store(URL).split("train")
    with pytest.raises(
        DamagedDataError, match=rf"{URL}: split train, segment 1 cannot be read .*{name} {words}"
    ):
        reader.read_segment(1)
    reader.read_segment(0)
    assert cli.main(["verify", URL]) == 3
    assert re.search(f"{name} {words}", capsys.readouterr().out)


def test_objects_that_do_not_belong_to_the_store_are_named(s3):
    make()
    ObjectFiles(ObjectUrl(BUCKET, "stores/rows.zarr")).put("train/extra", b"")
    with open_store(URL) as store:
        assert verify_store(store, quick=True) == [f"{URL}: train/extra does not belong to the store"]


# Requests.


def test_a_segment_comes_in_parts_side_by_side_and_never_too_many(s3, monkeypatch):
    make(segment_bytes=1 << 14)
    monkeypatch.setattr(object_files, "_PART_BYTES", 1 << 10)
    monkeypatch.setattr(object_files, "_REQUESTS", 6)
    monkeypatch.setattr(object_files, "_SHORT_BYTES", 16)
    reader = open_store(URL).split("train")
    s3.requests, s3.most_at_once = [], 0
    s3.fault = lambda _: 0.02
    reader.read_segment(0)
    wanted = [request.range for request in s3.requests if request.path.endswith("train/x/c/0/0")]
    assert len(wanted) == 16
    assert (
        max(int(stop) - int(start) for start, stop in (each[6:].split("-") for each in wanted))
        < (1 << 10) + 16
    )
    assert 1 < s3.most_at_once <= 6


def test_answers_that_fail_once_are_asked_for_again_and_told_of_in_two_lines(s3, caplog, monkeypatch):
    monkeypatch.setattr(retries, "_OUTAGES", {})
    make()
    failed = set()

    def once(request: Any) -> Any:
        key = (request.method, request.path, request.range)
        if request.method != "GET" or key in failed:
            return None
        failed.add(key)
        return (500, "short", None)[len(failed) % 3]

    s3.fault = once
    with open_store(URL) as store:
        rows = np.arange(store.manifest.splits["train"].n_rows)
        assert len(store.split("train").read_rows(rows)[0]) == len(rows)
    first, last = (record.message for record in caplog.records)
    assert first.startswith(f"{URL}: a read failed, trying again: ")
    assert re.fullmatch(rf"{URL}: reads go on; \d+ had failed", last)


# Refusals.


@pytest.mark.parametrize(
    "url", ["s3://", "s3://bucket", "s3://bucket/", "s3:///key", "s3://b/a//c", "s3://bucket/../x"]
)
def test_urls_that_name_no_object_are_refused(url):
    with pytest.raises(ConfigError, match=r"names no object; write it like s3://bucket/flights.zarr"):
        location(url)


def test_a_url_survives_being_taken_for_a_path(tmp_path):
    assert (
        location(Path(URL))
        == location(URL)
        == location(location(URL))
        == ObjectUrl(BUCKET, "stores/rows.zarr")
    )
    assert str(location(URL + "/")) == URL
    assert location("s3") == Path("s3").absolute()


def test_a_missing_bucket_is_named(s3, capsys):
    for arguments in (["inspect", "s3://other/rows.zarr"], ["convert", "rows.npz", "s3://other/rows.zarr"]):
        assert cli.main(arguments) == 2
        assert "bucket 'other' does not exist; make it" in capsys.readouterr().err


def test_refused_credentials_and_dead_endpoints_are_told_from_damage(s3, capsys, monkeypatch):
    make()
    s3.fault = lambda _: 403
    for arguments in (["inspect", URL], ["convert", "rows.npz", URL + "2"]):
        assert cli.main(arguments) == 2
        assert "AccessDenied: as the test will have it" in capsys.readouterr().err
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert cli.main(["fit", URL, "run"]) == 2
    assert f"{URL} cannot be reached (" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "rows.npz", f"s3://{BUCKET}/rows.h5"], "is in a bucket, where stores are Zarr"),
        (["fit", URL, f"s3://{BUCKET}/run"], "is in a bucket, where only stores are kept"),
        (["predict", "run", URL, f"s3://{BUCKET}/out.npy"], "is in a bucket, where only stores are kept"),
        (["inspect", f"s3://{BUCKET}/nothing"], "does not exist; convert the data first"),
    ],
)
def test_what_a_bucket_does_not_hold_is_refused(s3, capsys, arguments, words):
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not Path("s3:").exists()
