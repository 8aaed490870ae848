"""A storage that is full or gone for a minute is waited for, and nothing is half-written meanwhile."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainers import patience
from trainers.files import append_jsonl, atomic_folder, read_jsonl, write_bytes
from trainers.patience import FULL_SHARE, patience_s, patient, patiently, storage_limit_s, system_error


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.01)


def failing(function: Callable, *, times: int, number: int) -> tuple[Callable, list[int]]:
    """A function that raises an error of the system so many times before it works, and the calls."""
    calls: list[int] = []

    def call(*args: object, **kwargs: object) -> object:
        calls.append(len(calls))
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return function(*args, **kwargs)

    return call, calls


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_write_goes_on_when_the_storage_comes_back(
    number: int, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    call, calls = failing(getattr(os, step), times=2, number=number)
    monkeypatch.setattr(os, step, call)
    with caplog.at_level(logging.WARNING):
        write_bytes(path, b"new")
    assert len(calls) >= 3
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert os.strerror(number) in record.getMessage()


def test_an_error_that_does_not_pass_is_raised_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: waiting mends no missing permission."""
    call, calls = failing(os.replace, times=9, number=errno.EACCES)
    monkeypatch.setattr(os, "replace", call)
    with pytest.raises(PermissionError):
        write_bytes(tmp_path / "file", b"new")
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOSPC])
def test_when_patience_ends_the_error_is_raised_and_nothing_is_left(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "0.2")
    call, calls = failing(os.replace, times=10**6, number=number)
    monkeypatch.setattr(os, "replace", call)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_bytes(tmp_path / "file", b"new")
    assert len(calls) > 2
    assert list(tmp_path.iterdir()) == []


def test_without_patience_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "0")
    call, calls = failing(os.replace, times=1, number=errno.ESTALE)
    monkeypatch.setattr(os, "replace", call)
    with pytest.raises(OSError, match="Stale"):
        write_bytes(tmp_path / "file", b"new")
    assert len(calls) == 1


def test_a_full_disk_is_waited_for_less_long_than_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "120")
    assert storage_limit_s(OSError(errno.ESTALE, "")) == 120
    assert storage_limit_s(OSError(errno.ENOSPC, "")) == 120 * FULL_SHARE == 30
    assert storage_limit_s(OSError(errno.ENOENT, "")) is None
    assert storage_limit_s(ValueError("(os error 28)")) == 30, "the safetensors library reports numbers in words"
    assert system_error(ValueError("shape 28")) is None
    for nonsense in ("soon", "-5"):
        monkeypatch.setenv(patience.PATIENCE_VARIABLE, nonsense)
        assert patience_s() == (0 if nonsense == "-5" else patience.PATIENCE_S)


def test_within_a_patient_action_only_the_outer_one_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of its writes would wait as long as the whole."""
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "0.2")
    inner: list[int] = []
    outer: list[int] = []

    def write() -> None:
        inner.append(1)
        raise OSError(errno.ESTALE, "gone")

    @patient
    def save(folder: Path) -> None:
        outer.append(1)
        patiently(write, place=folder)

    with pytest.raises(OSError, match="gone"):
        save(tmp_path)
    assert len(outer) > 2
    assert len(inner) == len(outer)


def test_a_line_that_is_tried_again_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt wrote the line, and failed only after."""
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"step": 1})
    call, calls = failing(os.fsync, times=2, number=errno.EIO)
    monkeypatch.setattr(os, "fsync", call)
    append_jsonl(path, {"step": 2})
    assert len(calls) == 3
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    assert path.read_bytes().count(b"\n") == 2


def test_a_folder_is_published_when_the_storage_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the old one was moved away already; until then the old one is back in its place."""
    path = tmp_path / "checkpoint"
    with atomic_folder(path) as folder:
        (folder / "weights").write_text("old")
    seen: list[str] = []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target) == path and Path(source).name.endswith(".tmp") and len(seen) < 2:
            seen.append("failed")
            raise OSError(errno.ESTALE, "stale")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with atomic_folder(path) as folder:
        (folder / "weights").write_text("new")
    assert seen == ["failed", "failed"]
    assert (path / "weights").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


# --- a real file system that is full, or not mounted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode == 0
    )
    if not mounted:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


def later(action: Callable[[], object]) -> threading.Thread:
    """Do something once the test's own thread waits for it."""
    thread = threading.Thread(target=lambda: (time.sleep(0.3), action()))
    thread.start()
    return thread


def test_a_full_disk_that_is_cleaned_takes_the_file(small_disk: Path) -> None:
    (small_disk / "old").write_bytes(bytes(200_000))
    cleaner = later((small_disk / "old").unlink)
    write_bytes(small_disk / "new", bytes(150_000))
    cleaner.join()
    assert [entry.name for entry in small_disk.iterdir()] == ["new"]
    assert (small_disk / "new").stat().st_size == 150_000


def test_a_disk_that_stays_full_keeps_what_it_had(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.PATIENCE_VARIABLE, "0.4")
    write_bytes(small_disk / "file", b"old")
    append_jsonl(small_disk / "log.jsonl", {"step": 1})
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize))
    with pytest.raises(OSError, match="No space left") as caught:
        write_bytes(small_disk / "file", bytes(100_000))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        append_jsonl(small_disk / "log.jsonl", {"text": "x" * 100_000})
    assert (small_disk / "file").read_bytes() == b"old"
    assert (small_disk / "log.jsonl").read_bytes() == b'{"step": 1}\n', "no part of the line stays"
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["ballast", "file", "log.jsonl"]


def test_nothing_is_written_below_a_mount_that_is_gone(small_disk: Path) -> None:
    """Its folder is still there, and would take the file. It counts once it is mounted again."""
    write_bytes(small_disk / "runs" / "first", b"1")
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.umount2(os.fsencode(small_disk), 2) == 0
    write_below: list[bool] = []

    def mount_again() -> None:
        write_below.append((small_disk / "runs").exists())
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small_disk], check=True)

    helper = later(mount_again)
    write_bytes(small_disk / "runs" / "second", b"2")
    helper.join()
    assert write_below == [False]
    assert (small_disk / "runs" / "second").read_bytes() == b"2"
    assert os.path.ismount(small_disk)
