"""Safetensors files as byte ranges: what is not replaced stays as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.tensor_store import header_hash, open_base, open_file, rewrite_shards
from tests.helpers.merge_models import write_base
from trainers.errors import InputError
from trainers.files import sha256_file, sha256_json, weights_hash

TENSORS = {
    "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "f32": torch.linspace(-1, 1, 7),
    "f16": torch.ones(2, 2, dtype=torch.float16),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "i64": torch.arange(3),
    "bool": torch.tensor([True, False]),
}


def test_every_tensor_reads_as_safetensors_reads_it(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    store = open_base(tmp_path)
    assert set(store.tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        actual = store.read(name)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_rewriting_replaces_only_the_named_bytes(tmp_path, workers):
    (tmp_path / "out").mkdir()
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    store = open_base(tmp_path)
    new = {"f32": torch.full((7,), 9.0), "bf16": torch.zeros(2, 3, dtype=torch.bfloat16)}
    seen = {}

    def replacement(name, stored):
        seen[name] = stored.clone()
        return new[name]

    rewritten = rewrite_shards(store=store, folder=tmp_path / "out", names=list(new), replacement=replacement, workers=workers)
    before, after = (folder / "model.safetensors" for folder in (tmp_path, tmp_path / "out"))
    assert header_hash(before) == header_hash(after)
    assert seen.keys() == new.keys()
    assert all(torch.equal(seen[name], TENSORS[name]) for name in new)
    for name, value in load_file(after).items():
        assert torch.equal(value, new.get(name, TENSORS[name]))
    assert rewritten.sources == {"model.safetensors": sha256_file(before)}
    assert rewritten.tensors.keys() == new.keys()
    rewrite_shards(store=store, folder=tmp_path / "out", names=[], replacement=replacement, workers=workers)
    assert after.read_bytes() == before.read_bytes()


def test_the_hash_of_a_sharded_source_is_that_of_its_folder(tmp_path):
    folder = write_base(tmp_path / "base", shards=True)
    (tmp_path / "out").mkdir()
    rewritten = rewrite_shards(
        store=open_base(folder), folder=tmp_path / "out", names=["lm_head.weight"], replacement=lambda name, stored: stored
    )
    assert sha256_json(rewritten.sources) == weights_hash(folder)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_in_one_tensor_ends_the_rewriting(tmp_path, workers):
    (tmp_path / "out").mkdir()
    save_file(TENSORS, tmp_path / "model.safetensors")

    def fail(name, stored):
        if name == "f32":
            raise RuntimeError(f"no {name}")
        return stored

    with pytest.raises(RuntimeError, match="no f32"):
        rewrite_shards(store=open_base(tmp_path), folder=tmp_path / "out", names=["bf16", "f32", "f16"], replacement=fail, workers=workers)


def test_no_more_tensors_are_under_way_than_workers_and_one(tmp_path):
    """A tensor counts from the start of its call until the next one is written: more would cost memory."""
    (tmp_path / "out").mkdir()
    save_file({f"t{index}": torch.full((4,), float(index)) for index in range(20)}, tmp_path / "model.safetensors")
    store, begun, most = open_base(tmp_path), [], []

    def slow(name, stored):
        begun.append(name)
        path = tmp_path / "out" / "model.safetensors"
        written = max(path.stat().st_size - header, 0) // 16 if path.exists() else 0
        most.append(len(begun) - written)
        return stored

    header = store.tensors["t0"].start
    rewrite_shards(store=store, folder=tmp_path / "out", names=list(store.tensors), replacement=slow, workers=3)
    assert len(begun) == 20
    assert max(most) <= 4


def test_a_sharded_model_is_one_store(tmp_path):
    folder = write_base(tmp_path / "base", shards=True)
    store = open_base(folder)
    assert len(store.shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {name: tensor.shard.name for name, tensor in store.tensors.items()} == index["weight_map"]


def test_a_file_that_was_written_incompletely_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    data = path.read_bytes()
    for broken, message in (
        (data[:-1], "incompletely"),
        (data[:20], "not a complete"),
        (b"", "not a complete"),
        (data[:8] + b"x" * 5000, "not"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            open_file(path)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    folder = write_base(tmp_path / "base", shards=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = list(index["weight_map"].values())
    name, shard = next((name, shard) for name, shard in index["weight_map"].items() if shards.count(shard) > 1)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"ghost.weight": shard}}))
    with pytest.raises(InputError, match=r"ghost\.weight"):
        open_base(folder)
    path.write_text(json.dumps({"weight_map": {key: value for key, value in index["weight_map"].items() if key != name}}))
    with pytest.raises(InputError, match="names no shard"):
        open_base(folder)


def test_a_folder_without_weights_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="save_pretrained"):
        open_base(tmp_path)
    with pytest.raises(InputError, match="not found"):
        open_base(tmp_path / "nowhere")
