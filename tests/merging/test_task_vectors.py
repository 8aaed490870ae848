"""What a trial changed: adapters and full checkpoints, read without building a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.task_vectors import checkpoint_hash, open_task_vector, resolve_checkpoint, trial_name
from merging.tensor_store import open_base
from tests.helpers.merge_models import write_base, write_full, write_lora
from trainers.errors import InputError
from trainers.files import weights_hash, write_json
from trainers.modeling import load_adapted_model

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("merge") / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def lora(base) -> Path:
    return write_lora(base.parent / "lora", base=base, seed=1)


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def _edit_tensors(folder: Path, file: str, change) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def _edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 5}},
        {"targets": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5},
        {"targets": ["embed_tokens", "k_proj"]},
        {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "rslora", "patterns", "other rank", "embedding", "modules_to_save"],
)
def test_an_adapter_update_is_what_peft_adds_to_the_base(base, tmp_path, settings):
    """float32 weights of size 1 carry peft's sum to 6e-8; a forgotten scale is off by its whole value, about 1e-2."""
    folder = write_lora(tmp_path / "trial", base=base, seed=3, **settings)
    vector, store = open_task_vector(base=base, trial=folder), open_base(base)
    adapted = load_adapted_model(base, folder).state_dict()
    for name in store.tensors:
        expected = adapted[name] - store.read(name)
        if name in vector.names:
            torch.testing.assert_close(vector.update(name), expected, rtol=0, atol=2e-7)
        else:
            assert torch.equal(expected, torch.zeros_like(expected))
    assert vector.kind == "lora"


def test_an_adapter_update_does_not_depend_on_how_its_factors_are_written(base, lora, tmp_path):
    """(A, B) -> (inverse(G) A, B G) is the same product. The factors themselves do change, and so does a wrong pairing."""
    other = _copy(lora, tmp_path / "gauge")
    gauge = torch.eye(4) + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def change(tensors):
        for key in list(tensors):
            tensors[key] = torch.linalg.inv(gauge) @ tensors[key] if "lora_A" in key else tensors[key] @ gauge

    _edit_tensors(other, "adapter_model.safetensors", change)
    first, second = (open_task_vector(base=base, trial=folder).update(Q_PROJ) for folder in (lora, other))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)
    assert weights_hash(lora) != weights_hash(other)


def test_a_transposed_base_takes_a_transposed_update(base, tmp_path):
    """With fan_in_fan_out the base stores (in, out); on the square q_proj the product is transposed and nothing else changes."""
    folder = write_lora(tmp_path / "trial", base=base, seed=3, targets=["q_proj"])
    before = open_task_vector(base=base, trial=folder).update(Q_PROJ)
    _edit_config(folder, fan_in_fan_out=True)
    assert torch.equal(open_task_vector(base=base, trial=folder).update(Q_PROJ), before.T)


def test_a_full_checkpoint_update_is_the_difference_where_there_is_one(base, tmp_path):
    folder = write_full(tmp_path / "trial", base=base, seed=2, only="mlp")
    vector, store, saved = open_task_vector(base=base, trial=folder), open_base(base), open_base(folder)
    assert vector.names
    assert all("mlp" in name for name in vector.names)
    for name in vector.names:
        assert torch.equal(vector.update(name), saved.read(name) - store.read(name))
    with pytest.raises(KeyError):
        vector.update(Q_PROJ)


def test_a_record_of_the_vector_names_kind_rank_and_hash(base, lora):
    record = open_task_vector(base=base, trial=lora).describe()
    assert (record["kind"], record["ranks"], record["scales"], record["hash"]) == ("lora", [4], [2.0], checkpoint_hash(lora))


def test_the_content_hash_follows_scale_and_weights_but_not_the_place(lora, tmp_path):
    other = _copy(lora, tmp_path / "elsewhere")
    assert checkpoint_hash(other) == checkpoint_hash(lora)
    _edit_config(other, base_model_name_or_path="another/path")
    assert checkpoint_hash(other) == checkpoint_hash(lora)
    _edit_config(other, lora_alpha=9)
    assert checkpoint_hash(other) != checkpoint_hash(lora)


def test_a_trial_folder_stands_for_its_newest_complete_checkpoint(base, lora, tmp_path):
    trial = tmp_path / "trials" / "trial-03"
    for step in ("step-000090", "step-000120"):
        _copy(lora, trial / "checkpoints" / step)
    half = _copy(lora, trial / "checkpoints" / "step-000200")
    (half / "manifest.json").unlink()
    assert resolve_checkpoint(trial).name == "step-000120"
    assert trial_name(resolve_checkpoint(trial)) == "trial-03"
    assert open_task_vector(base=base, trial=trial).trial == "trial-03"
    assert open_task_vector(base=base, trial=trial, name="trial-03@120").trial == "trial-03@120"


def test_a_trial_without_a_complete_checkpoint_is_refused(tmp_path, base):
    (tmp_path / "trial-01" / "checkpoints" / "step-1").mkdir(parents=True)
    with pytest.raises(InputError, match="no complete checkpoint"):
        open_task_vector(base=base, trial=tmp_path / "trial-01")
    with pytest.raises(InputError, match="not found"):
        open_task_vector(base=base, trial=tmp_path / "nothing")


def test_a_trial_of_another_target_is_refused(base, lora, tmp_path):
    other = write_base(tmp_path / "other", dtype=torch.float32, seed=9)
    with pytest.raises(InputError, match="another target"):
        open_task_vector(base=other, trial=lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"setting_of_tomorrow": {"a": 1}}, "setting_of_tomorrow"),
        ({"rank_pattern": {"q_proj": 7}}, "rank"),
    ],
)
def test_adapter_settings_that_change_the_update_are_refused(base, lora, tmp_path, changes, message):
    folder = _copy(lora, tmp_path / "trial")
    _edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as caught:
        open_task_vector(base=base, trial=folder)
    assert "trial" in str(caught.value)


A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(A_KEY), "only factor B"),
        (lambda tensors: tensors.update({A_KEY: torch.ones(4, 5)}), "shape"),
        (lambda tensors: tensors.update({"other.lora_A.weight": torch.ones(2)}), "unknown key"),
        (lambda tensors: tensors.update({A_KEY.replace("lora_A", "lora_magnitude"): torch.ones(2)}), "unknown key"),
        (lambda tensors: tensors.update({A_KEY.replace("q_proj", "x_proj"): torch.ones(4, 16)}), "only factor A"),
        (lambda tensors: tensors.update({"base_model.model.model.nowhere.weight": torch.ones(4)}), "not in the base"),
        (lambda tensors: tensors[A_KEY].fill_(float("nan")), "not finite"),
        (lambda tensors: tensors[A_KEY][0, 0].fill_(float("inf")), "1 of 64 values"),
    ],
)
def test_broken_adapters_stop_with_tensor_and_trial(base, lora, tmp_path, change, message):
    folder = _copy(lora, tmp_path / "trial-07")
    _edit_tensors(folder, "adapter_model.safetensors", change)
    with pytest.raises(InputError, match=message) as caught:
        open_task_vector(base=base, trial=folder)
    assert "trial-07" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(Q_PROJ), f"lacks tensor {Q_PROJ}"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "has tensor extra"),
        (lambda tensors: tensors.update({Q_PROJ: torch.ones(3, 3)}), "shape"),
        (lambda tensors: tensors[Q_PROJ].fill_(float("nan")), "256 of 256 values"),
    ],
)
def test_broken_full_checkpoints_stop_with_tensor_and_trial(base, tmp_path, change, message):
    folder = write_full(tmp_path / "trial-08", base=base, seed=2)
    _edit_tensors(folder, "model.safetensors", change)
    with pytest.raises(InputError, match=message) as caught:
        open_task_vector(base=base, trial=folder)
    assert "trial-08" in str(caught.value)


def test_a_checkpoint_equal_to_its_base_has_nothing_to_merge(base):
    with pytest.raises(InputError, match="equal to the base"):
        open_task_vector(base=base, trial=base)


def test_an_adapter_on_a_tied_embedding_is_refused(tmp_path):
    tied = write_base(tmp_path / "tied", tied=True)
    folder = write_lora(tmp_path / "trial", base=tied, seed=1, targets=["embed_tokens"])
    with pytest.raises(InputError, match="tied to the output head"):
        open_task_vector(base=tied, trial=folder)


def test_a_manifest_without_a_target_hash_is_accepted(base, lora, tmp_path):
    folder = _copy(lora, tmp_path / "trial")
    write_json(folder / "manifest.json", {})
    assert open_task_vector(base=base, trial=folder).names


def test_the_factors_multiply_to_the_update(base, tmp_path):
    """Bit for bit, because the update is their product; also transposed, as in an embedding. A full tensor has none."""
    folder = write_lora(tmp_path / "trial", base=base, seed=3, r=3, lora_alpha=5, targets=["embed_tokens", "k_proj"])
    vector = open_task_vector(base=base, trial=folder)
    for name in vector.names:
        factors = vector.factors(name)
        assert torch.equal(factors.dense(), vector.update(name))
        torch.testing.assert_close(factors.left @ factors.right, vector.update(name), rtol=1e-5, atol=1e-8)
        assert (factors.rank, factors.transpose) == (3, "embed" in name)
    assert set(vector.ranks().values()) == {3}
    full = open_task_vector(base=base, trial=write_full(tmp_path / "full", base=base, seed=2, only="mlp"))
    assert full.factors(full.names[0]) is None
    assert set(full.ranks()) == set(full.names)
    assert set(full.ranks().values()) == {None}


def test_a_module_saved_whole_counts_as_changed_only_if_it_was_trained(base, tmp_path):
    folder = write_lora(tmp_path / "trial", base=base, seed=3, targets=["q_proj"], modules_to_save=["lm_head"])
    assert None not in open_task_vector(base=base, trial=folder).ranks().values()
    _edit_tensors(folder, "adapter_model.safetensors", lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
    vector = open_task_vector(base=base, trial=folder)
    assert vector.ranks()["lm_head.weight"] is None
    assert vector.factors("lm_head.weight") is None


@pytest.mark.parametrize(("manifest", "seed"), [({"train": {"seed": 7}}, 7), ({"train": {}}, None), ({}, None)])
def test_the_record_tells_the_seed_of_the_trial(base, lora, tmp_path, manifest, seed):
    folder = _copy(lora, tmp_path / "trial")
    write_json(folder / "manifest.json", manifest)
    assert open_task_vector(base=base, trial=folder).describe()["seed"] == seed
