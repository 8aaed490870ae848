"""Every method from trial folders to a written model: the right weights, whatever the order of trials, tensors and workers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merging.combine import combine
from merging.config import MergeConfig
from merging.merge import merge_checkpoint
from merging.methods.run import run_method
from merging.methods.seeded import generator_for
from merging.methods.table import METHODS
from merging.task_vectors import open_task_vector
from tests.helpers.merge_models import write_base, write_full, write_lora
from trainers.errors import InputError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A float32 base, two adapters of different ranks and targets, one like the first, and a full trial."""
    root = tmp_path_factory.mktemp("methods")
    base = write_base(root / "base", dtype=torch.float32)
    write_lora(root / "trial-1", base=base, seed=1)
    write_lora(root / "trial-2", base=base, seed=2, r=2, targets=["q_proj", "down_proj"])
    write_lora(root / "trial-3", base=base, seed=3)
    write_full(root / "full", base=base, seed=4, only="layers.1")
    return root


def _trials(root: Path, method: str) -> list[Path]:
    return [root / "trial-1", root / ("trial-3" if method == "seed" else "trial-2")]


def _config(method: str, **settings) -> MergeConfig:
    settings |= {"density": 0.6} if "density" in METHODS[method].reads else {}
    return MergeConfig(method=method, scale=1.5, **settings)


@pytest.mark.parametrize("method", list(METHODS))
def test_the_file_holds_the_merge_of_all_updates_zero_ones_included(root, tmp_path, method):
    """A tensor that one trial leaves alone is merged with a zero update of that trial, whatever the method makes of it."""
    config, trials = _config(method, weights=(1.0, 0.5)), _trials(root, method)
    record = merge_checkpoint(base=root / "base", trials=trials, out=tmp_path / "out", config=config)
    base, merged = (load_file(folder / "model.safetensors") for folder in (root / "base", tmp_path / "out"))
    vectors = [open_task_vector(base=root / "base", trial=trial) for trial in trials]
    for name, before in base.items():
        if not any(name in vector.names for vector in vectors):
            assert torch.equal(merged[name], before)
            continue
        update = run_method(
            updates=[vector.update(name) if name in vector.names else torch.zeros_like(before) for vector in vectors],
            weights=(1.0, 0.5),
            config=config,
            generators=[generator_for(seed=42, tensor=name, content=vector.content_hash) for vector in vectors],
            factors=[vector.factors(name) if name in vector.names else None for vector in vectors],
        ).update
        # Bit for bit, but for knots, which a zero update takes from its factors to the whole matrix.
        torch.testing.assert_close(merged[name], before + 1.5 * update, rtol=0, atol=1e-6 if method == "knots" else 0)
    assert record["config"] == config.model_dump(mode="json")
    assert record["changed_weights"] > 0


@pytest.mark.parametrize("method", list(METHODS))
def test_trials_in_another_order_and_under_other_names_give_the_same_file(root, tmp_path, method):
    """Also with other numbers of workers. Another seed is the control where there is one."""
    trials = _trials(root, method)
    renamed = tmp_path / "a-copy"
    shutil.copytree(trials[1], renamed)
    config = _config(method)
    files = []
    for out, order, workers in (("ab", trials, 1), ("ba", [renamed, trials[0]], 3)):
        merge_checkpoint(base=root / "base", trials=order, out=tmp_path / out, config=config, workers=workers)
        files.append(load_file(tmp_path / out / "model.safetensors"))
    for name, value in files[0].items():
        torch.testing.assert_close(files[1][name], value, rtol=0, atol=1e-6 if method == "knots" else 0)
    if config.reads("seed"):
        merge_checkpoint(base=root / "base", trials=trials, out=tmp_path / "other", config=_config(method, seed=1))
        other = load_file(tmp_path / "other" / "model.safetensors")
        assert sum(int((other[name] != value).sum()) for name, value in files[0].items()) > 500


@pytest.mark.parametrize("method", [name for name in METHODS if name != "seed"])
def test_adapters_and_full_trials_merge_together(root, tmp_path, method):
    record = merge_checkpoint(base=root / "base", trials=[root / "trial-1", root / "full"], out=tmp_path / "out", config=_config(method))
    names = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"}
    assert names <= set(record["tensors"])


EXPECTED_KEPT = {"linear": 1, "task_arithmetic": 1, "slerp": 1, "unanimous": 0.5, "breadcrumbs": 0.6, "ties": 0.6, "magnitude_prune": 0.6,
                 "dare_linear": 0.6, "dare_ties": 0.6, "della": 0.6, "knots": 0.6, "seed": 0.6}  # fmt: skip


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_says_what_it_kept_where_signs_conflict_and_how_long_the_result_is(root, method):
    """On the 16 x 16 q_proj of two adapters. Conflicts count what was kept of both: none where only unanimous elements are."""
    vectors = [open_task_vector(base=root / "base", trial=trial) for trial in _trials(root, method)]
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = combine(name, vectors=vectors, config=_config(method))
    # 256 independent draws: three standard errors are 0.09. Exact counts are off by less than one element.
    tolerance = {"dare_linear": 0.1, "dare_ties": 0.1, "della": 0.1, "unanimous": 0.1}.get(method, 0.02)
    assert merged.kept == pytest.approx([EXPECTED_KEPT[method]] * 2, abs=tolerance)
    if method == "unanimous":
        assert merged.conflicts == 0
    else:
        assert 0.05 < merged.conflicts < 0.65
    mean = sum(float(vector.update(name).norm()) for vector in vectors) / 2
    assert merged.norm_ratio == pytest.approx(float(merged.update.norm()) / mean)
    silent = combine(name, vectors=vectors, config=_config(method), with_stats=False)
    assert torch.equal(silent.update, merged.update)


def test_methods_for_two_trials_refuse_three(root, tmp_path):
    trials = [root / f"trial-{number}" for number in (1, 2, 3)]
    with pytest.raises(InputError, match="merges 2 trials, not 3"):
        merge_checkpoint(base=root / "base", trials=trials, out=tmp_path / "out", config=MergeConfig(method="slerp"))
    assert not (tmp_path / "out").exists()
