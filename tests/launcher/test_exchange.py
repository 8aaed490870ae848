"""A folder that is replaced is complete at every moment."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from launcher import exchange
from launcher.exchange import replace_folder


def _version(folder: Path, number: int) -> Path:
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(str(number))
    return folder


def test_a_reader_finds_a_whole_folder_at_every_moment(tmp_path):
    """Two hundred replacements while a thread opens the folder: both files of one version, never none."""
    import os

    place = tmp_path / "place"
    assert replace_folder(_version(tmp_path / "first", 0), place)
    stop, seen, broken = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            try:
                folder = os.open(place, os.O_RDONLY)
            except FileNotFoundError:
                broken.append("missing")
                continue
            os.close(folder)
            seen.add((place / "b").read_text() if (place / "b").exists() else broken.append("without b"))

    thread = threading.Thread(target=read)
    thread.start()
    one_step = [replace_folder(_version(tmp_path / f"new-{number}", number), place) for number in range(1, 200)]
    stop.set()
    thread.join()
    assert (place / "a").read_text() == "199"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]
    if all(one_step):
        assert not broken
    assert len(seen) > 1


def test_where_folders_cannot_be_exchanged_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "_exchange", lambda one, other: False)
    place = tmp_path / "place"
    assert replace_folder(_version(tmp_path / "first", 0), place), "nothing to exchange"
    assert not replace_folder(_version(tmp_path / "second", 1), place)
    assert (place / "a").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]


def test_a_new_folder_that_is_missing_leaves_the_old_one(tmp_path):
    place = _version(tmp_path / "place", 0)
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", place)
    assert (place / "a").read_text() == "0"
