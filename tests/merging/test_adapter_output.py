"""A merge written as an adapter: the same model where its rank allows it, a known loss where it does not, nothing after an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.adapter_output import merge_adapter, truncate, truncate_product
from merging.config import MergeConfig
from merging.merge import merge_checkpoint
from merging.task_vectors import open_task_vector
from tests.helpers.merge_models import write_base, write_full, write_lora
from trainers.errors import InputError
from trainers.files import weights_hash
from trainers.modeling import load_model

torch.set_num_threads(1)

EXACT = ("linear", "task_arithmetic", "slerp", "knots", "seed")
DENSE = ("ties", "magnitude_prune", "dare_linear", "dare_ties", "della", "breadcrumbs", "unanimous")
TOKENS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A float32 base and adapters of different ranks, scales and targets, one of them on the embedding."""
    root = tmp_path_factory.mktemp("adapters")
    base = write_base(root / "base", dtype=torch.float32)
    write_lora(root / "trial-1", base=base, seed=1)
    write_lora(root / "trial-2", base=base, seed=2, r=2, targets=["q_proj", "v_proj", "embed_tokens"])
    # peft starts an embedding's A, not its B, from zero.
    file, key = root / "trial-2" / "adapter_model.safetensors", "base_model.model.model.embed_tokens.lora_embedding_A"
    tensors = load_file(file)
    tensors[key] = 0.1 * torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(2))
    save_file(tensors, file, metadata={"format": "pt"})
    write_lora(root / "trial-3", base=base, seed=3, lora_alpha=3)
    write_full(root / "full", base=base, seed=4, only="mlp")
    return root


def _trials(root: Path, method: str) -> list[Path]:
    return [root / "trial-1", root / ("trial-3" if method == "seed" else "trial-2")]


def _logits(base: Path, folder: Path) -> torch.Tensor:
    """As anyone would load it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), str(folder)) if (folder / "adapter_config.json").exists() else load_model(folder)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("method", EXACT)
def test_a_low_rank_merge_is_the_written_model(root, tmp_path, method):
    """Logits of about 0.1 agree to a few float32 steps. The base is the control: it differs by far more."""
    config = MergeConfig(method=method, scale=1.3, weights=(1.0, 0.5))
    record = merge_adapter(base=root / "base", trials=_trials(root, method), out=tmp_path / "adapter", config=config)
    merge_checkpoint(base=root / "base", trials=_trials(root, method), out=tmp_path / "model", config=config)
    adapter, model = _logits(root / "base", tmp_path / "adapter"), _logits(root / "base", tmp_path / "model")
    torch.testing.assert_close(adapter, model, rtol=0, atol=1e-6)
    assert (model - _logits(root / "base", root / "base")).abs().max() > 0.01
    assert record["lost_energy"] == 0
    q_proj, down = (record["tensors"][f"model.layers.0.{name}.weight"] for name in ("self_attn.q_proj", "mlp.down_proj"))
    assert (q_proj["rank"], down["rank"]) == ((4, 4) if method == "seed" else (6, 4))


@pytest.mark.parametrize("method", DENSE)
def test_other_merges_are_cut_off_and_say_what_they_lost(root, tmp_path, method):
    """The reported loss is the squared norm of the difference between adapter and written model, and falls to nothing at full rank."""
    losses = []
    for rank in (None, 2, 16):
        config = MergeConfig(method=method, scale=1.3)
        arguments = {"base": root / "base", "trials": _trials(root, method), "config": config}
        record = merge_adapter(**arguments, out=tmp_path / "adapter", rank=rank)
        merge_checkpoint(**arguments, out=tmp_path / "model")
        before, after = (load_file(folder / "model.safetensors") for folder in (root / "base", tmp_path / "model"))
        written = open_task_vector(base=root / "base", trial=tmp_path / "adapter")
        lost = energy = 0.0
        for name, stats in record["tensors"].items():
            update = after[name] - before[name]
            difference = float((update - written.update(name)).double().square().sum())
            total = float(update.double().square().sum())
            assert stats["lost_energy"] == pytest.approx(difference / total if total else 0.0, abs=1e-6)
            lost, energy = lost + difference, energy + total
        assert record["lost_energy"] == pytest.approx(lost / energy, abs=1e-6)
        losses.append(record["lost_energy"])
    assert record["tensors"]["model.layers.0.self_attn.q_proj.weight"]["rank"] == 16
    # Full rank loses nothing, the rank of both parents a little, 2 most.
    assert losses[2] < 1e-10
    assert 1e-4 < losses[0] < losses[1] < 0.9
    torch.testing.assert_close(_logits(root / "base", tmp_path / "adapter"), _logits(root / "base", tmp_path / "model"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", EXACT)
def test_a_lower_rank_than_the_merge_has_is_the_best_of_that_rank(root, tmp_path, method):
    arguments = {"base": root / "base", "trials": _trials(root, method), "config": MergeConfig(method=method)}
    whole = merge_adapter(**arguments, out=tmp_path / "whole", rank=None)
    cut = merge_adapter(**arguments, out=tmp_path / "cut", rank=3)
    exact, written = (open_task_vector(base=root / "base", trial=tmp_path / name) for name in ("whole", "cut"))
    for name, stats in cut["tensors"].items():
        singular = torch.linalg.svdvals(exact.update(name).double())
        assert stats["rank"] == min(3, whole["tensors"][name]["rank"])
        assert stats["lost_energy"] == pytest.approx(float(singular[3:].square().sum() / singular.square().sum()), abs=1e-6)
        difference = (exact.update(name) - written.update(name)).double().square().sum() / singular.square().sum()
        assert float(difference) == pytest.approx(stats["lost_energy"], abs=1e-6)
    assert 0 < cut["lost_energy"] < 0.6


def test_the_folder_is_pefts_and_the_record_says_how_it_was_made(root, tmp_path):
    lines: list[str] = []
    config = MergeConfig(method="dare_ties", seed=7)
    merge_adapter(base=root / "base", trials=_trials(root, "dare_ties"), out=tmp_path / "out", config=config, rank=5, progress=lines.append)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "merge.json"]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (5, 5, {})
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert MergeConfig(**record["config"]) == config
    assert (record["output"], record["rank"], record["formula"]) == ("adapter", 5, config.formula())
    assert "seed 7" in record["formula"]
    assert record["base"]["hash"] == weights_hash(root / "base")
    assert [trial["trial"] for trial in record["trials"]] == ["trial-1", "trial-2"]
    assert len(lines) == len(record["tensors"])
    # A merged adapter is a trial like any other.
    merge_checkpoint(base=root / "base", trials=[tmp_path / "out"], out=tmp_path / "model", config=MergeConfig(method="linear"))


def test_modules_of_another_rank_have_patterns(root, tmp_path):
    merge_adapter(base=root / "base", trials=_trials(root, "linear"), out=tmp_path / "out", config=MergeConfig(method="linear"))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["r"] == 4
    assert settings["rank_pattern"] == settings["alpha_pattern"]
    assert settings["rank_pattern"]["model.layers.1.self_attn.q_proj"] == 6
    assert settings["rank_pattern"]["model.embed_tokens"] == 2


@pytest.mark.parametrize("method", ["linear", "ties", "knots"])
def test_a_transposed_base_gets_a_transposed_adapter(root, tmp_path, method):
    """With fan_in_fan_out the base stores (in, out); the written adapter must say so, and mean the same update."""
    folder = write_lora(tmp_path / "trial", base=root / "base", seed=3, targets=["q_proj"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    config = MergeConfig(method=method, **({} if method == "linear" else {"density": 1.0}))
    merge_adapter(base=root / "base", trials=[folder], out=tmp_path / "out", config=config)
    before, after = (open_task_vector(base=root / "base", trial=one) for one in (folder, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    for name in before.names:
        torch.testing.assert_close(after.update(name), before.update(name), rtol=1e-4, atol=1e-7)
        assert not torch.allclose(after.update(name), before.update(name).T, rtol=1e-1, atol=1e-3)


def test_trials_without_factors_are_refused_before_anything_is_written(root, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"trial full is a full checkpoint.*\n.*\n.*\n.*--output model"):
        merge_adapter(base=root / "base", trials=[root / "trial-1", root / "full"], out=out, config=MergeConfig())
    folder = write_lora(tmp_path / "with-head", base=root / "base", seed=3, targets=["q_proj"], modules_to_save=["lm_head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"with-head stores tensor lm_head\.weight whole"):
        merge_adapter(base=root / "base", trials=[root / "trial-1", folder], out=out, config=MergeConfig())
    with pytest.raises(InputError, match="rank = 0"):
        merge_adapter(base=root / "base", trials=[root / "trial-1"], out=out, config=MergeConfig(), rank=0)
    with pytest.raises(InputError, match="3 numbers for 2 trials"):
        merge_adapter(base=root / "base", trials=_trials(root, "ties"), out=out, config=MergeConfig(weights=(1, 1, 1)))
    with pytest.raises(InputError, match="merges 2 trials"):
        merge_adapter(base=root / "base", trials=[root / "trial-1"], out=out, config=MergeConfig(method="slerp"))
    assert not out.exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        merge_adapter(base=root / "base", trials=[root / "trial-1"], out=tmp_path / "used", config=MergeConfig())
    assert [file.name for file in (tmp_path / "used").iterdir()] == ["thesis.tex"]


def test_a_large_matrix_is_cut_off_nearly_as_well_as_possible(monkeypatch):
    """A flat spectrum, the hardest case: the kept energy is at least 98 % of the best, what is reported lost is what is missing, and
    the result follows from the seed. Without power iterations it is measurably worse."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 260, generator=generator) + 3 * torch.randn(300, 1, generator=generator)
    best = truncate(matrix, rank=16)
    monkeypatch.setattr("merging.adapter_output.EXACT_SIZE", 8)
    torch.manual_seed(5)
    near = truncate(matrix, rank=16)
    torch.manual_seed(6)
    state = torch.random.get_rng_state()
    again = truncate(matrix, rank=16)
    assert torch.equal(near.left, again.left)
    assert torch.equal(torch.random.get_rng_state(), state)
    missing = float((matrix - near.left @ near.right).double().square().sum())
    assert near.lost == pytest.approx(missing, rel=1e-4)
    kept, possible = near.energy - near.lost, best.energy - best.lost
    assert 0.98 * possible < kept <= possible * (1 + 1e-6)
    monkeypatch.setattr("merging.adapter_output.POWER_ITERATIONS", 0)
    hasty = truncate(matrix, rank=16)
    assert hasty.lost > near.lost


def test_a_product_is_cut_off_as_the_matrix_is():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(30, 7, generator=generator), torch.randn(7, 20, generator=generator)
    product, matrix = truncate_product(left, right, rank=4), truncate(left @ right, rank=4)
    torch.testing.assert_close(product.left @ product.right, matrix.left @ matrix.right, rtol=1e-4, atol=1e-4)
    assert (product.lost, product.energy) == pytest.approx((matrix.lost, matrix.energy), rel=1e-5)
    whole = truncate_product(left, right, rank=None)
    assert torch.equal(whole.left, left)
    assert whole.lost == 0
