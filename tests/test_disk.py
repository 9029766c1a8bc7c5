"""The one way to replace a file, and the one lock: what they promise when something fails or two processes meet."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from ep3stream import disk
from ep3stream.conversion.work import conversion_work
from ep3stream.disk import LockHeldError, replacing, take_lock, write, write_file
from ep3stream.errors import InputError


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every operation on the disk, by its name and that of the file or directory, as it is done."""
    done: list[tuple[str, str]] = []

    def noting(name: str) -> None:
        operation = getattr(disk, name)

        def operate(path: Path, *rest: Any) -> Any:
            done.append((name, path.name))
            return operation(path, *rest)

        monkeypatch.setattr(disk, name, operate)

    for name in ("sync", "rename"):
        noting(name)
    return done


def test_what_replaces_a_file_is_on_the_disk_before_it_gets_the_name(
    tmp_path: Path, operations: list[tuple[str, str]]
) -> None:
    write_file(tmp_path / "page", b"new")
    assert operations == [("sync", ".page.partial"), ("rename", ".page.partial"), ("sync", tmp_path.name)]


def test_what_a_conversion_remembers_is_on_the_disk_before_it_gets_the_name(
    tmp_path: Path, operations: list[tuple[str, str]]
) -> None:
    with conversion_work(tmp_path / "store", {}, restart=False) as work:
        operations.clear()
        work.set_uploaded({"tags": 1})
        assert work.uploaded() == {"tags": 1}
        work.begin_commit()
    for name in ("uploaded.json", "committing"):
        partial = f".{name}.partial"
        expected = [("sync", partial), ("rename", partial), ("sync", ".store.convert")]
        assert [operations.pop(0) for _ in expected] == expected


def test_progress_that_a_power_failure_damages_is_no_progress(
    tmp_path: Path, operations: list[tuple[str, str]]
) -> None:
    with conversion_work(tmp_path / "store", {}, restart=False) as work:
        operations.clear()
        work.set_progress({"read": 1})
        assert work.progress() == {"read": 1}
        assert operations == [("rename", ".progress.json.partial")]  # Each second, and so without waiting.
        file = work.path / "progress.json"
        for damaged in (b"", file.read_bytes()[:-1], b"\0" * file.stat().st_size):
            file.write_bytes(damaged)
            assert work.progress() is None


def test_a_directory_takes_its_name_when_all_in_it_is_on_the_disk(
    tmp_path: Path, operations: list[tuple[str, str]]
) -> None:
    with replacing(tmp_path / "model") as partial:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "weights").write_bytes(b"1")
        (partial / "words").write_bytes(b"2")
    *synced, renamed, last = operations
    assert {name for _, name in synced} == {"deep", "weights", "words", ".model.partial"}
    assert (renamed, last) == (("rename", ".model.partial"), ("sync", tmp_path.name))
    assert (tmp_path / "model" / "deep" / "weights").read_bytes() == b"1"


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ZeroDivisionError()])
@pytest.mark.parametrize("is_shared", [False, True])
def test_when_the_writing_fails_the_old_file_stays_and_nothing_else(
    tmp_path: Path, error: BaseException, is_shared: bool
) -> None:
    (tmp_path / "page").write_bytes(b"old")

    def fail() -> None:
        with replacing(tmp_path / "page", is_shared) as partial:
            write(partial, [b"ne"])
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("page", b"old")]


def test_processes_that_replace_the_same_file_write_to_paths_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replacing(tmp_path / "page", is_shared=True) as mine:
        write(mine, [b"mine"])
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with replacing(tmp_path / "page", is_shared=True) as theirs:
            write(theirs, [b"theirs"])
        assert (tmp_path / "page").read_bytes() == b"theirs"
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("page", b"mine")]


@pytest.mark.parametrize("is_followed", [True, False])
def test_a_lock_on_a_file_that_its_holder_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_followed: bool
) -> None:
    """The holder before removes the file after this process has opened it; a third process may follow."""
    path, flock, third = tmp_path / "work" / "lock", fcntl.flock, []
    before = take_lock(path)

    def late(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        path.parent.rmdir()
        before.__exit__()
        if is_followed:
            third.append(take_lock(path))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    if is_followed:
        with pytest.raises(LockHeldError, match=f"process {os.getpid()} on"):
            take_lock(path)
        third[0].__exit__()
    with take_lock(path) as lock:
        assert not lock.left_by
        with pytest.raises(LockHeldError):
            take_lock(path)


def test_whoever_follows_a_conversion_that_removes_its_work_has_the_work_alone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with conversion_work(store, {"seed": 1}, restart=False) as first:
        first.remove()
        with conversion_work(store, {"seed": 2}, restart=False) as second:
            with (
                pytest.raises(InputError, match="is being made by"),
                conversion_work(store, {"seed": 2}, restart=False),
            ):
                pass
            assert second.rows.is_dir()


def test_a_conversion_gives_its_lock_back_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then another process must not take the directory: its files would be removed with the rest."""
    removed, sound = [], disk.remove
    with conversion_work(tmp_path / "store", {}, restart=False) as work:
        work.begin_commit()
        work.set_uploaded({})
        work.set_progress({})

        def remove(path: Path) -> None:
            removed.append(path.name)
            sound(path)

        monkeypatch.setattr("ep3stream.conversion.work.remove", remove)
        work.remove()
    assert removed[-3:] == ["committing", "uploaded.json", "lock"]
    assert sorted(removed[:-3]) == ["plan.json", "progress.json", "rows"]
    assert list(tmp_path.iterdir()) == []
