"""Merges on a resident model are those that would be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merging import combine, ties
from merging.config import MergeConfig
from merging.in_memory import MergeSession, TensorCache
from merging.merge import merge_checkpoint
from merging.task_vectors import open_task_vector
from tests.helpers.merge_models import write_base, write_full, write_lora
from trainers.errors import InputError
from trainers.modeling import load_model

TRIALS = ("trial-01", "trial-02", "trial-03")
CONFIGS = (
    MergeConfig(),
    MergeConfig(scale=1.4),
    MergeConfig(density=0.3, trim_scope="model"),
    MergeConfig(method="linear"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("merge")
    base = write_base(root / "base")
    write_lora(root / "trial-01", base=base, seed=1)
    write_lora(root / "trial-02", base=base, seed=2, r=2, targets=["q_proj"])
    write_full(root / "trial-03", base=base, seed=3, only="mlp")
    return root


def _session(root: Path, *, dtype: str, cache_bytes: int = 1 << 30) -> tuple:
    model = load_model(root / "base", dtype=dtype)
    vectors = [open_task_vector(base=root / "base", trial=root / trial) for trial in TRIALS]
    return model, MergeSession(model=model, base=root / "base", vectors=vectors, cache_bytes=cache_bytes)


def _equal(model, folder: Path, dtype: str) -> bool:
    expected = load_model(folder, dtype=dtype).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cache_bytes", [1 << 30, 0, 5000], ids=["all cached", "no cache", "little cache"])
def test_the_resident_model_equals_the_written_checkpoint_bit_for_bit(root, tmp_path, dtype, cache_bytes):
    """One session, merge after merge of different pairs, so that what an earlier one changed must have been put back."""
    model, session = _session(root, dtype=dtype, cache_bytes=cache_bytes)
    pairs = [("trial-01", "trial-03"), ("trial-02", "trial-03")]
    for number, (pair, config) in enumerate((pair, config) for pair in pairs for config in CONFIGS):
        out = tmp_path / str(number)
        merge_checkpoint(base=root / "base", trials=[root / trial for trial in pair], out=out, config=config)
        session.apply(pair, config)
        assert _equal(model, out, dtype)
        assert not _equal(model, root / "base", dtype)
    session.restore()
    assert _equal(model, root / "base", dtype)


def test_repeating_a_merge_does_not_drift(root):
    model, session = _session(root, dtype="bfloat16")
    session.apply(("trial-01", "trial-02"), MergeConfig(scale=1.2))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    for scale in (0.5, 0.9, 1.2):
        session.apply(("trial-01", "trial-02"), MergeConfig(scale=scale))
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("densities", "per_tensor"), [((0.2, 0.5, 0.8), 1), ((), 3)])
def test_thresholds_of_all_densities_come_from_one_count(root, monkeypatch, densities, per_tensor):
    """Per trial and tensor, however many merges ask; without the densities known beforehand, once for each of them."""
    counted = []
    honest = ties.magnitude_histogram

    def count(update, *, inside=None):
        counted.append(inside is None)
        return honest(update, inside=inside)

    monkeypatch.setattr(ties, "magnitude_histogram", count)
    vectors = [open_task_vector(base=root / "base", trial=root / trial) for trial in TRIALS]
    session = MergeSession(model=load_model(root / "base"), base=root / "base", vectors=vectors, densities=densities)
    for pair in (("trial-01", "trial-02"), ("trial-01", "trial-03"), ("trial-02", "trial-03")):
        for density in (0.2, 0.5, 0.8):
            session.apply(pair, MergeConfig(density=density, scale=1.1))
    assert sum(counted) == per_tensor * sum(len(vector.names) for vector in vectors)


def test_a_whole_model_is_counted_once_for_all_densities(root, monkeypatch):
    """The first pass over a trial's updates serves every density; the second, inside one bin, is that density's own."""
    counted = []
    honest = combine.magnitude_histogram

    def count(update, *, inside=None):
        counted.append(inside is None)
        return honest(update, inside=inside)

    monkeypatch.setattr(combine, "magnitude_histogram", count)
    _, session = _session(root, dtype="float32")
    for density in (0.2, 0.5, 0.8):
        session.apply(("trial-01", "trial-03"), MergeConfig(density=density, trim_scope="model"))
    changed = sum(len(open_task_vector(base=root / "base", trial=root / trial).names) for trial in ("trial-01", "trial-03"))
    assert (sum(counted), len(counted)) == (changed, 4 * changed)


def test_unknown_trials_and_wrong_weights_are_refused(root):
    _, session = _session(root, dtype="float32")
    with pytest.raises(InputError, match="trial-99"):
        session.apply(("trial-01", "trial-99"), MergeConfig())
    with pytest.raises(InputError, match="3 numbers for 2 trials"):
        session.apply(("trial-01", "trial-02"), MergeConfig(weights=(1, 1, 1)))


def test_a_model_that_lacks_a_merged_tensor_is_refused(root, tmp_path):
    vectors = [open_task_vector(base=root / "base", trial=root / "trial-01")]
    other = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="not in the loaded model"):
        MergeSession(model=other, base=root / "base", vectors=vectors)


def test_the_cache_keeps_the_most_recent_tensors_within_its_bytes():
    cache = TensorCache(limit_bytes=80)
    for key in range(3):
        cache.put((key,), torch.zeros(10))
    assert [cache.get((key,)) is not None for key in range(3)] == [False, True, True]
    cache.get((1,))
    cache.put((3,), torch.zeros(10))
    assert [cache.get((key,)) is not None for key in range(4)] == [False, True, False, True]
    assert cache.num_bytes == 80
    cache.put((4,), torch.zeros(100))
    assert cache.get((4,)) is None
