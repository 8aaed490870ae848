"""The merged checkpoint on disk: right values, everything else as in the base, and nothing at all after an error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.combine import model_thresholds
from merging.config import MergeConfig
from merging.merge import Meter, merge_checkpoint, verify_merge
from merging.task_vectors import open_task_vector
from merging.tensor_store import header_hash, open_base
from merging.ties import ties, trim
from tests.helpers.merge_models import write_base, write_full, write_lora
from trainers.errors import InputError, RunError, SetupError
from trainers.files import weights_hash
from trainers.modeling import load_adapted_model, load_model

CONFIGS = (
    MergeConfig(),
    MergeConfig(density=0.2, scale=1.3, weights=(0.6, 0.4), elect="weighted", divisor="weight"),
    MergeConfig(density=0.4, trim_scope="model", zero_sum="drop"),
    MergeConfig(method="linear", weights=(1, 3)),
    MergeConfig(method="task_arithmetic", weights=(1, -0.5), scale=0.7),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A bfloat16 base, two adapters of different rank and targets, and a full trial."""
    root = tmp_path_factory.mktemp("merge")
    base = write_base(root / "base")
    write_lora(root / "trial-01", base=base, seed=1)
    write_lora(root / "trial-02", base=base, seed=2, r=2, targets=["q_proj", "v_proj", "down_proj"])
    write_full(root / "trial-03", base=base, seed=3, only="layers.1")
    return root


def _plan(root: Path, trials: list[str], config: MergeConfig) -> dict[str, torch.Tensor]:
    """The merged tensors, computed whole, zero updates included, from the public pieces."""
    store = open_base(root / "base")
    vectors = [open_task_vector(base=root / "base", trial=root / trial) for trial in trials]
    thresholds = model_thresholds(vectors=vectors, density=config.density) if config.trim_scope == "model" else None
    weights = config.trial_weights(len(trials))
    planned = {}
    for name in store.tensors:
        before = store.read(name)
        zero = torch.zeros(before.shape)
        if not any(name in vector.names for vector in vectors):
            continue
        updates = [vector.update(name) if name in vector.names else zero for vector in vectors]
        if config.method == "ties":
            rule = {"elect": config.elect, "divisor": config.divisor, "zero_sum": config.zero_sum}
            merged = ties(updates=updates, density=config.density, weights=weights, thresholds=thresholds, **rule)
        else:
            merged = sum(update * weight for update, weight in zip(updates, weights, strict=True))
            merged = merged / sum(weights) if config.method == "linear" else merged
        planned[name] = (before.float() + config.scale * merged).to(before.dtype)
    return planned


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{config.trim_scope}-{config.elect}")
@pytest.mark.parametrize("trials", [["trial-01", "trial-02"], ["trial-01", "trial-03"]], ids=["two ranks", "adapter and full"])
def test_the_file_holds_the_merge_and_the_base_elsewhere(root, tmp_path, config, trials):
    record = merge_checkpoint(base=root / "base", trials=[root / trial for trial in trials], out=tmp_path / "out", config=config)
    planned, base, merged = (
        _plan(root, trials, config),
        load_file(root / "base" / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert list(merged) == list(base)
    for name, value in merged.items():
        assert value.dtype == base[name].dtype
        assert torch.equal(value.view(torch.int16), planned.get(name, base[name]).view(torch.int16)), name
    assert set(record["tensors"]) == set(planned)
    assert record["changed_weights"] == sum(int((merged[name] != base[name]).sum()) for name in base) > 0


def test_one_adapter_at_density_one_gives_that_adapter(root, tmp_path):
    """Both form the same float32 sum and round it once to bfloat16, so they agree in every bit."""
    merge_checkpoint(base=root / "base", trials=[root / "trial-01"], out=tmp_path / "out", config=MergeConfig(density=1.0))
    expected = load_adapted_model(root / "base", root / "trial-01", dtype="bfloat16").state_dict()
    base, merged = load_model(root / "base", dtype="bfloat16").state_dict(), load_model(tmp_path / "out", dtype="bfloat16").state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert not all(torch.equal(merged[name], base[name]) for name in expected)


def test_one_full_trial_at_density_one_gives_that_trial(root, tmp_path):
    """base + (trial - base) may miss the trial by one float32 step; rounded to the base's bfloat16, it does not here."""
    merge_checkpoint(base=root / "base", trials=[root / "trial-03"], out=tmp_path / "out", config=MergeConfig(density=1.0))
    expected = load_model(root / "trial-03", dtype="bfloat16").state_dict()
    actual = load_model(tmp_path / "out", dtype="bfloat16").state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_order_of_two_trials_does_not_change_the_file(root, tmp_path):
    for out, trials in (("ab", ["trial-01", "trial-02"]), ("ba", ["trial-02", "trial-01"])):
        merge_checkpoint(base=root / "base", trials=[root / trial for trial in trials], out=tmp_path / out, config=MergeConfig(density=0.3))
    assert (tmp_path / "ab/model.safetensors").read_bytes() == (tmp_path / "ba/model.safetensors").read_bytes()


@pytest.mark.parametrize("variant", ["shards", "tied"])
def test_headers_untouched_shards_index_and_tokenizer_keep_their_bytes(tmp_path, variant):
    base = write_base(tmp_path / "base", shards=variant == "shards", tied=variant == "tied")
    (base / "README.md").write_text("card of the base")
    (base / "pytorch_model.bin").write_bytes(b"stale")
    trial = write_lora(tmp_path / "trial", base=base, seed=1, targets=["q_proj"])
    out = tmp_path / "out"
    record = merge_checkpoint(base=base, trials=[trial], out=out, config=MergeConfig())
    before, after = open_base(base), open_base(out)
    assert ("lm_head.weight" in after.tensors) == (variant != "tied")
    for old, new in zip(before.shards, after.shards, strict=True):
        assert header_hash(old) == header_hash(new)
        touched = any(tensor.shard == old and tensor.name in record["tensors"] for tensor in before.tensors.values())
        assert (old.read_bytes() == new.read_bytes()) == (not touched)
    for file in base.iterdir():
        if file.suffix == ".json":
            assert (out / file.name).read_bytes() == file.read_bytes()
    assert not (out / "README.md").exists()
    assert not (out / "pytorch_model.bin").exists()
    tokens = torch.tensor([[1, 2, 3]])
    model = load_model(out)
    assert model(tokens).logits.isfinite().all()
    assert not torch.equal(model(tokens).logits, load_model(base)(tokens).logits)


def test_the_record_says_which_ties_ran_on_what(root, tmp_path):
    lines: list[str] = []
    config = MergeConfig(density=0.25, scale=1.5)
    merge_checkpoint(
        base=root / "base", trials=[root / "trial-01", root / "trial-02"], out=tmp_path / "out", config=config, progress=lines.append
    )
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert MergeConfig(**record["config"]) == config
    assert record["formula"] == config.formula()
    assert [trial["trial"] for trial in record["trials"]] == ["trial-01", "trial-02"]
    assert record["base"]["hash"] == weights_hash(root / "base")
    q_proj = record["tensors"]["model.layers.0.self_attn.q_proj.weight"]
    assert q_proj["kept"] == [0.25, 0.25]
    assert 0 < q_proj["sign_conflicts"] < 0.25
    assert q_proj["norm_ratio"] > 0
    assert record["tensors"]["model.layers.0.self_attn.k_proj.weight"]["kept"] == [0.25, 0.0]
    assert len(lines) == len(record["tensors"])
    megabytes = sum(store.num_bytes for name, store in open_base(root / "base").tensors.items() if name in record["tensors"]) / 2**20
    assert re.match(rf"{megabytes:.0f} of {megabytes:.0f} MiB, 0 s to go; model\..*% of the weights changed", lines[-1])
    assert record["seconds"] >= 0
    assert record["peak_rss_bytes"] > 0


def test_progress_tells_bytes_and_the_time_that_is_left():
    """After 1 of 4 MiB in 2 s, 6 s are left at this speed; after 3 of 4 MiB in 3 s, 1 s."""
    lines, times = [], iter((0.0, 2.0, 3.0))
    meter = Meter(total_bytes=4 << 20, say=lines.append, clock=lambda: next(times))
    meter.add(1 << 20, what="a")
    meter.add(2 << 20, what="b")
    assert lines == ["1 of 4 MiB, 6 s to go; a", "3 of 4 MiB, 1 s to go; b"]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(root, tmp_path, workers):
    trials = [root / "trial-01", root / "trial-02", root / "trial-03"]
    record = merge_checkpoint(base=root / "base", trials=trials, out=tmp_path / "out", config=MergeConfig(), workers=workers)
    alone = merge_checkpoint(base=root / "base", trials=trials, out=tmp_path / "alone", config=MergeConfig(), workers=2)
    assert record["tensors"] == alone["tensors"]
    assert list(record["tensors"]) == list(alone["tensors"])
    for shard in record["shards"]:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "alone" / shard).read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_a_gpu_merges_as_a_cpu_does(root, tmp_path, config):
    """Another order of additions in B @ A rounds a few weights the other way."""
    trials = [root / "trial-01", root / "trial-02"]
    for device in ("cpu", "cuda"):
        merge_checkpoint(base=root / "base", trials=trials, out=tmp_path / device, config=config, device=device)
    one, other = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    differing = sum(int((one[name] != other[name]).sum()) for name in one)
    assert differing <= max(2, 1e-4 * sum(value.numel() for value in one.values()))


def test_the_base_is_read_once_and_the_output_written_once(tmp_path):
    """Counted by the system: at most 1.2 times the base and the output, beside the adapters and this process's own files."""
    base = write_base(tmp_path / "base", width=512)
    write_lora(tmp_path / "trial-01", base=base, seed=1)
    write_lora(tmp_path / "trial-02", base=base, seed=2)
    trials = [tmp_path / "trial-01", tmp_path / "trial-02"]
    merge_checkpoint(base=base, trials=trials, out=tmp_path / "warm", config=MergeConfig())
    before = psutil.Process().io_counters()
    merge_checkpoint(base=base, trials=trials, out=tmp_path / "out", config=MergeConfig())
    after = psutil.Process().io_counters()
    size = (base / "model.safetensors").stat().st_size
    factors = sum((trial / "adapter_model.safetensors").stat().st_size for trial in trials)
    moved = after.read_chars - before.read_chars + after.write_chars - before.write_chars
    assert size > 4 << 20
    assert 2 * size < moved < 1.2 * 2 * size + 4 * factors


def test_a_trial_in_low_precision_is_noted(root, tmp_path):
    write_full(tmp_path / "trial", base=root / "base", seed=3, dtype=torch.bfloat16)
    record = merge_checkpoint(base=root / "base", trials=[tmp_path / "trial"], out=tmp_path / "out", config=MergeConfig())
    assert "BF16" in record["notes"][0]


def test_the_model_scope_trims_the_concatenated_vector(root):
    """One threshold over the whole task vector keeps what sorting the concatenation keeps; a threshold per tensor keeps something else."""
    vector = open_task_vector(base=root / "base", trial=root / "trial-01")
    whole = torch.cat([vector.update(name).flatten() for name in vector.names])
    (threshold,) = model_thresholds(vectors=[vector], density=0.3)
    assert threshold == whole.abs().sort(descending=True).values[int(0.3 * whole.numel()) - 1].item()
    kept = torch.cat([trim(vector.update(name), density=0.3, threshold=threshold).flatten() for name in vector.names])
    assert kept.count_nonzero() == int(0.3 * whole.numel())
    per_tensor = torch.cat([trim(vector.update(name), density=0.3).flatten() for name in vector.names])
    assert not torch.equal(kept, per_tensor)


def test_a_damaged_merge_is_found(root, tmp_path):
    out = tmp_path / "out"
    merge_checkpoint(base=root / "base", trials=[root / "trial-01"], out=out, config=MergeConfig())
    verify_merge(out)
    data = bytearray((out / "model.safetensors").read_bytes())
    tensor = open_base(out).tensors["model.layers.0.self_attn.q_proj.weight"]
    data[tensor.start] ^= 1
    (out / "model.safetensors").write_bytes(data)
    verify_merge(out, contents=False)
    with pytest.raises(RunError, match="q_proj"):
        verify_merge(out)
    (out / "model.safetensors").write_bytes(data[:-2])
    with pytest.raises(RunError, match="not the one that was planned"):
        verify_merge(out)


def test_an_earlier_merge_is_replaced(root, tmp_path):
    for density in (0.2, 0.9):
        merge_checkpoint(base=root / "base", trials=[root / "trial-01"], out=tmp_path / "out", config=MergeConfig(density=density))
    assert verify_merge(tmp_path / "out")["config"]["density"] == 0.9


def _nan_in_full(root: Path, tmp_path: Path) -> dict:
    shutil.copytree(root / "trial-03", tmp_path / "trial-09")
    tensors = load_file(tmp_path / "trial-09/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "trial-09/model.safetensors", metadata={"format": "pt"})
    return {"trials": [root / "trial-01", tmp_path / "trial-09"]}


def _nan_in_adapter(root: Path, tmp_path: Path) -> dict:
    shutil.copytree(root / "trial-01", tmp_path / "trial-09")
    tensors = load_file(tmp_path / "trial-09/adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / "trial-09/adapter_model.safetensors", metadata={"format": "pt"})
    return {"trials": [root / "trial-02", tmp_path / "trial-09"]}


def _used_out(root: Path, tmp_path: Path) -> dict:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("do not lose me")
    return {"out": tmp_path / "used"}


BAD_REQUESTS = {
    "no trial": (lambda root, tmp_path: {"trials": []}, "no trial"),
    "missing trial": (lambda root, tmp_path: {"trials": [tmp_path / "nowhere"]}, "not found"),
    "missing base": (lambda root, tmp_path: {"base": tmp_path / "nowhere"}, "not found"),
    "weights": (lambda root, tmp_path: {"config": MergeConfig(weights=(1,))}, "1 numbers for 2 trials"),
    "nan in an adapter": (_nan_in_adapter, "not finite"),
    "nan in a full trial": (_nan_in_full, "not finite"),
    "out is a trial": (lambda root, tmp_path: {"out": root / "trial-01"}, "not empty"),
    "out in use": (_used_out, "not empty"),
    "too large": (lambda root, tmp_path: {"config": MergeConfig(scale=1e38, method="task_arithmetic", weights=(1e9, 1e9))}, "not finite"),
}


@pytest.mark.parametrize("name", list(BAD_REQUESTS))
def test_an_error_leaves_no_output(root, tmp_path, name):
    make, message = BAD_REQUESTS[name]
    request = {"base": root / "base", "trials": [root / "trial-01", root / "trial-02"], "out": tmp_path / "out", "config": MergeConfig()}
    changes = make(root, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        merge_checkpoint(**(request | changes))
    if "nan" in name:
        assert "trial-09" in str(caught.value)
        assert "proj" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (root / "trial-01" / "adapter_model.safetensors").exists()


def test_a_merge_is_not_written_over_its_inputs(root, tmp_path):
    """Even a folder that looks like an earlier merge is kept while an input lies in it."""
    out = tmp_path / "out"
    merge_checkpoint(base=root / "base", trials=[root / "trial-01"], out=out, config=MergeConfig())
    with pytest.raises(InputError, match="is or contains the input"):
        merge_checkpoint(base=out, trials=[root / "trial-01"], out=out, config=MergeConfig())
    shutil.copytree(root / "trial-02", out / "inner")
    with pytest.raises(InputError, match="is or contains the input"):
        merge_checkpoint(base=root / "base", trials=[out / "inner"], out=out, config=MergeConfig())


def test_a_full_disk_is_noticed_before_writing(root, tmp_path, monkeypatch):
    monkeypatch.setattr("merging.merge.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(SetupError, match="GiB free"):
        merge_checkpoint(base=root / "base", trials=[root / "trial-01"], out=tmp_path / "out", config=MergeConfig())
    assert not list(tmp_path.iterdir())
