"""Nothing is ever half-written, and equal contents have equal hashes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.errors import InputError
from trainers.files import (
    append_jsonl,
    atomic_folder,
    read_json,
    read_jsonl,
    sha256_file,
    sha256_folder,
    sha256_json,
    strict_json,
    weights_hash,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# --- files ---


def test_a_file_is_written_whole_readable_and_into_new_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text.txt"
    write_text(path, "höchstens")
    assert path.read_bytes() == "höchstens".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == ["text.txt"], "no temporary file stays"


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.inf, -math.inf, 1.5], 3: (True, None), "ü": "é"})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, None, 1.5], "3": [True, None], "ü": "é"}
    assert "ü" in text
    assert read_json(tmp_path / "x.json") == json.loads(text)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    )
)
def test_finite_values_survive_strict_json_unchanged(value: object) -> None:
    actual = strict_json(value)
    json.dumps(actual, allow_nan=False)
    assert strict_json(actual) == actual
    if "NaN" not in json.dumps(value) and "Infinity" not in json.dumps(value):
        assert actual == value


def test_reading_a_missing_or_broken_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file not found\n  where: .*nowhere.json"):
        read_json(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text('{"a": 1')
    with pytest.raises(InputError, match=r"not a JSON file(.|\n)*broken.json"):
        read_json(tmp_path / "broken.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a JSON file"):
        read_json(tmp_path / "binary.json")


# --- append-only logs ---


def test_lines_are_appended_and_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    assert read_jsonl(path) == []
    for step in range(3):
        append_jsonl(path, {"step": step, "loss": math.nan})
    assert read_jsonl(path) == [{"step": step, "loss": None} for step in range(3)]


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_line_torn_by_a_kill_is_skipped_and_never_glued_to_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 22})
    path.write_bytes(path.read_bytes()[:-cut])
    torn = read_jsonl(path)
    assert torn[0] == {"step": 1}
    append_jsonl(path, {"step": 3})
    # Cutting the line break alone leaves a whole line.
    assert read_jsonl(path) == [{"step": 1}, *([{"step": 22}] if cut == 1 else []), {"step": 3}]


def test_a_line_torn_within_a_letter_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"name": "\xc3')
    assert read_jsonl(path) == [{"a": 1}]


# --- folders ---


def test_a_folder_takes_its_name_only_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with atomic_folder(path) as folder:
        assert folder.parent == tmp_path, "the rename stays within one file system"
        (folder / "weights").write_text("new")
        assert not path.exists()
    assert (path / "weights").read_text() == "new"
    assert names(tmp_path) == ["checkpoint"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_folder_untouched(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "checkpoint"
    with atomic_folder(path) as folder:
        (folder / "weights").write_text("old")
    before = (path / "weights").stat()

    def fail() -> None:
        with atomic_folder(path) as folder:
            (folder / "weights").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert (path / "weights").read_text() == "old"
    assert (path / "weights").stat().st_mtime_ns == before.st_mtime_ns
    assert names(tmp_path) == ["checkpoint"]


def test_a_block_that_fails_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "new"):
        raise RuntimeError
    assert names(tmp_path) == []


def test_a_new_folder_replaces_the_old_one_with_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    for name in ("old", "new"):
        with atomic_folder(path) as folder:
            (folder / name).write_text(name)
    assert names(path) == ["new"]
    assert names(tmp_path) == ["checkpoint"]


# --- hashes ---


def test_a_file_hash_is_sha256_over_all_blocks(tmp_path: Path) -> None:
    data = os.urandom((1 << 22) + 17)
    (tmp_path / "big").write_bytes(data)
    assert sha256_file(tmp_path / "big") == hashlib.sha256(data).hexdigest()


def test_a_json_hash_ignores_the_order_of_keys_and_nothing_else() -> None:
    expected = sha256_json({"a": 1, "b": [1, 2]})
    assert sha256_json({"b": [1, 2], "a": 1}) == expected
    assert sha256_json({"b": (1, 2), "a": 1}) == expected
    others = [{"a": 1, "b": [2, 1]}, {"a": 1.5, "b": [1, 2]}, {"a": "1", "b": [1, 2]}, {"a": 1}]
    assert len({expected, *map(sha256_json, others)}) == 5


def test_a_folder_hash_sees_names_and_contents_of_the_chosen_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    expected = sha256_folder(tmp_path)
    (tmp_path / "README.md").write_text("not hashed")
    assert sha256_folder(tmp_path) == expected
    weights = sha256_folder(tmp_path, suffixes=(".safetensors",))
    (tmp_path / "config.json").write_text("[]")
    assert sha256_folder(tmp_path) != expected
    assert sha256_folder(tmp_path, suffixes=(".safetensors",)) == weights
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert sha256_folder(tmp_path, suffixes=(".safetensors",)) != weights


def test_weights_are_the_same_with_and_without_the_state_of_their_optimizer(tmp_path: Path) -> None:
    """A checkpoint loses it when the next one is written, and is still the same model; other tensors count, and so do their names."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    expected = weights_hash(tmp_path)
    assert expected == sha256_folder(tmp_path, suffixes=(".safetensors",))
    (tmp_path / "optimizer.safetensors").write_bytes(b"moments")
    assert weights_hash(tmp_path) == expected
    (tmp_path / "model-2.safetensors").write_bytes(b"2")
    assert weights_hash(tmp_path) != expected
    (tmp_path / "model-2.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "other.safetensors")
    assert weights_hash(tmp_path) != expected
