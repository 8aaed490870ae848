"""Checkpoints: what they hold, who can load them, and which of them a trial may go on from."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.tiny_trial import tiny_inputs, tiny_train
from trainers.checkpoint import ADAPTER, MANIFEST, OPTIMIZER, WEIGHTS, changed_keys, checkpoint_folder, finished_checkpoints
from trainers.checkpoint import load_checkpoint as load
from trainers.checkpoint import save_checkpoint as save
from trainers.config import EngineConfig, LoraConfig, TrainConfig
from trainers.engine.base import TrainingState
from trainers.engine.local import LocalEngine
from trainers.errors import InputError
from trainers.files import read_json, sha256_file, sha256_json, write_json
from trainers.loop import TrialInputs, build_model
from trainers.modeling import load_adapted_model, load_model

torch.set_num_threads(1)

LORA = tiny_train()
FULL = tiny_train(lora=None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrialInputs:
    return tiny_inputs(tmp_path_factory.mktemp("checkpoint"))


def trained_state(inputs: TrialInputs, train: TrainConfig, *, step: int = 3) -> tuple[TrainingState, Tensor]:
    """A state whose weights and moments are all different from zero, and the logits of the model that it stands for."""
    model = build_model(inputs, train=train)
    engine = LocalEngine(model, weight_decay=0.0, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(step)
    for value in model.trainable().values():
        value.grad = torch.randn(value.shape, generator=generator)
    engine.step(learning_rate=0.05)
    model.eval()
    with torch.no_grad():
        logits = model.lm(torch.arange(10)[None]).logits
    state = engine.state()
    return TrainingState(step, state.weights, state.exp_avg, state.exp_avg_sq), logits


def write(inputs: TrialInputs, trial: Path, *, train: TrainConfig = LORA, step: int = 3, **changes) -> Path:
    state = changes.pop("state", None) or trained_state(inputs, train, step=step)[0]
    facts = {"target_hash": inputs.target_hash, "target": str(inputs.target), "num_steps": 6}
    return save(trial, state=state, train=train, facts=facts, model_files=inputs.target, **changes)


def logits_of(model) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


# --- what a checkpoint holds ---


def test_a_lora_checkpoint_holds_the_adapter_its_configuration_the_optimizer_and_a_manifest(inputs: TrialInputs, tmp_path: Path) -> None:
    path = write(inputs, tmp_path)
    assert path == tmp_path / "checkpoints" / "step-000003" == checkpoint_folder(tmp_path, step=3)
    assert {file.name for file in path.iterdir()} == {ADAPTER, "adapter_config.json", OPTIMIZER, MANIFEST}
    manifest = read_json(path / MANIFEST)
    assert manifest["optimizer_step"] == 3
    assert (manifest["kind"], manifest["weights_file"]) == ("lora", ADAPTER)
    assert manifest["weights_sha256"] == sha256_file(path / ADAPTER)
    assert manifest["train"] == LORA.model_dump(mode="json")
    assert manifest["train_hash"] == sha256_json(manifest["train"])
    assert (manifest["target_hash"], manifest["num_steps"]) == (inputs.target_hash, 6)


def test_the_adapter_configuration_is_peft_s_own(inputs: TrialInputs, tmp_path: Path) -> None:
    """Compared with what peft writes for the same adapters, wherever both have a key; and no key is ours alone."""
    train = tiny_train(lora=LoraConfig(r=3, lora_alpha=7, target_modules=("q_proj", "down_proj"), use_rslora=True))
    ours = read_json(write(inputs, tmp_path, train=train) / "adapter_config.json")
    model = build_model(inputs, train=train).lm
    model.save_pretrained(str(tmp_path / "peft"))
    theirs = read_json(tmp_path / "peft" / "adapter_config.json")
    assert set(ours) <= set(theirs)
    for key in set(ours) - {"target_modules", "base_model_name_or_path"}:
        assert ours[key] == theirs[key], key
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"]) == ["down_proj", "q_proj"]
    assert set(load_file(checkpoint_folder(tmp_path, step=3) / ADAPTER)) == set(load_file(tmp_path / "peft" / ADAPTER))


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(r=4, lora_alpha=8), LoraConfig(r=4, lora_alpha=8, use_rslora=True), LoraConfig(r=2, target_modules=("v_proj",))],
    ids=["all linear modules", "rank-stabilised", "one module"],
)
def test_plain_peft_loads_the_adapter_with_the_same_logits(inputs: TrialInputs, tmp_path: Path, lora: LoraConfig) -> None:
    from peft import PeftModel

    train = tiny_train(lora=lora)
    state, expected = trained_state(inputs, train)
    path = write(inputs, tmp_path, train=train, state=state)
    loaded = PeftModel.from_pretrained(load_model(inputs.target), str(path)).eval()
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits_of(load_adapted_model(inputs.target, path)), expected, rtol=0, atol=1e-5)
    assert float((logits_of(load_model(inputs.target)) - expected).abs().max()) > 1e-3, "negative control: the adapter does something"


def test_transformers_loads_a_full_parameter_checkpoint_with_its_tokenizer(inputs: TrialInputs, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state, expected = trained_state(inputs, FULL)
    path = write(inputs, tmp_path, train=FULL, state=state)
    loaded, info = AutoModelForCausalLM.from_pretrained(str(path), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits_of(loaded), expected)
    assert torch.equal(logits_of(load_adapted_model(inputs.target, path)), expected)
    assert float((logits_of(load_model(inputs.target)) - expected).abs().max()) > 1e-3
    texts = [AutoTokenizer.from_pretrained(str(folder))("Where does Ada live?")["input_ids"] for folder in (path, inputs.target)]
    assert texts[0] == texts[1]
    assert read_json(path / MANIFEST)["weights_file"] == WEIGHTS


def test_a_full_checkpoint_of_a_half_precision_target_says_that_it_is_float32(inputs: TrialInputs, tmp_path: Path) -> None:
    """The masters are saved; a reader that trusts config.json must not round them to the target's dtype."""
    import shutil

    target = tmp_path / "half"
    shutil.copytree(inputs.target, target)
    write_json(target / "config.json", {**read_json(target / "config.json"), "dtype": "bfloat16", "torch_dtype": "bfloat16"})
    write_json(target / MANIFEST, {"not": "ours"})
    write_json(target / "model.safetensors.index.json", {"weight_map": {}})
    state = trained_state(inputs, FULL)[0]
    path = save(tmp_path / "trial", state=state, train=FULL, facts={"target_hash": "t"}, model_files=target)
    config = read_json(path / "config.json")
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config
    assert not (path / "model.safetensors.index.json").exists()
    assert read_json(path / MANIFEST)["optimizer_step"] == 3


# --- which checkpoints count ---


def test_only_the_newest_checkpoint_keeps_its_optimizer(inputs: TrialInputs, tmp_path: Path) -> None:
    paths = [write(inputs, tmp_path, step=step) for step in (2, 4, 6)]
    assert finished_checkpoints(tmp_path) == paths
    assert [(path / OPTIMIZER).exists() for path in paths] == [False, False, True]
    assert all((path / ADAPTER).exists() for path in paths)
    assert load(paths[-1], train=LORA, target_hash=inputs.target_hash).optimizer_step == 6
    with pytest.raises(InputError, match="holds no optimizer state and cannot be resumed"):
        load(paths[0], train=LORA, target_hash=inputs.target_hash)


def test_a_folder_without_its_manifest_is_not_finished(inputs: TrialInputs, tmp_path: Path) -> None:
    assert finished_checkpoints(tmp_path) == []
    first, second = (write(inputs, tmp_path, step=step) for step in (9, 10))
    (tmp_path / "checkpoints" / "step-000099").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / ".step-000011.x.tmp").mkdir()
    assert finished_checkpoints(tmp_path) == [first, second]
    (second / MANIFEST).unlink()
    assert finished_checkpoints(tmp_path) == [first]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_its_optimizer(
    inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers import checkpoint

    path = write(inputs, tmp_path, step=3)
    later = trained_state(inputs, LORA, step=6)[0]

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint, "sha256_json", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write(inputs, tmp_path, state=later)
    assert finished_checkpoints(tmp_path) == [path]
    assert (path / OPTIMIZER).exists()
    assert [folder.name for folder in path.parent.iterdir()] == ["step-000003"]


# --- going on from one ---


@pytest.mark.parametrize("train", [LORA, FULL], ids=["lora", "full"])
def test_a_saved_state_loads_bit_equal_under_the_model_s_own_names(inputs: TrialInputs, tmp_path: Path, train: TrainConfig) -> None:
    expected = trained_state(inputs, train)[0]
    actual = load(write(inputs, tmp_path, train=train, state=expected), train=train, target_hash=inputs.target_hash)
    assert actual.optimizer_step == 3
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        given, found = getattr(expected, name), getattr(actual, name)
        assert found.keys() == given.keys() == build_model(inputs, train=train).trainable().keys()
        assert all(torch.equal(found[key], given[key]) for key in given)
        assert any(float(value.abs().max()) > 0 for value in given.values())
    engine = LocalEngine(build_model(inputs, train=train), weight_decay=0.0, max_grad_norm=1.0)
    engine.load_state(actual)
    assert all(torch.equal(engine.state().weights[key], expected.weights[key]) for key in expected.weights)


def test_spreading_may_change_between_runs_and_nothing_else(inputs: TrialInputs, tmp_path: Path) -> None:
    path = write(inputs, tmp_path)
    spread = tiny_train(engine=EngineConfig(name="deepspeed", zero_stage=3, ranks=4), per_device_train_batch_size=1)
    assert load(path, train=spread, target_hash=inputs.target_hash).optimizer_step == 3
    changes = {
        "learning_rate": {"learning_rate": 1e-3},
        "objective.beta": {"objective": {**LORA.objective.model_dump(), "beta": 0.5}},
        "lora.r": {"lora": LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0)},
        "train_batch_size": {"train_batch_size": 2},
        "seed": {"seed": 1},
        "engine.dtype": {"engine": EngineConfig(name="torch", dtype="bfloat16")},
        "lora": {"lora": None},
    }
    for key, change in changes.items():
        with pytest.raises(InputError, match=rf"another configuration: {key}\n"):
            load(path, train=tiny_train(**change), target_hash=inputs.target_hash)


def test_a_checkpoint_of_another_target_is_refused(inputs: TrialInputs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trained from another target model\n  where: .*step-000003"):
        load(write(inputs, tmp_path), train=LORA, target_hash="another")


def test_damaged_files_are_refused_by_name(inputs: TrialInputs, tmp_path: Path) -> None:
    def damaged(name: str, damage) -> Path:
        path = write(inputs, tmp_path / name)
        damage(path)
        return path

    def flip(path: Path) -> None:
        data = bytearray((path / ADAPTER).read_bytes())
        data[-1] ^= 1
        (path / ADAPTER).write_bytes(data)

    def rewrite(path: Path) -> None:
        """A whole file of other weights: every header fits, the hash does not."""
        save_file({name: value + 1 for name, value in load_file(path / ADAPTER).items()}, path / ADAPTER)

    for name, damage, message in (
        ("flipped", flip, rf"do not match its manifest\n  where: .*{ADAPTER}"),
        ("rewritten", rewrite, "do not match its manifest"),
        ("missing", lambda path: (path / ADAPTER).unlink(), "the checkpoint cannot be read"),
        (
            "torn",
            lambda path: (path / OPTIMIZER).write_bytes((path / OPTIMIZER).read_bytes()[:50]),
            "the optimizer state does not match the manifest",
        ),
        ("manifest", lambda path: (path / MANIFEST).write_text("{"), "not a JSON file"),
    ):
        with pytest.raises(InputError, match=message):
            load(damaged(name, damage), train=LORA, target_hash=inputs.target_hash)


def test_changed_keys_are_dotted_paths() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": {"f": 1}}
    new = copy.deepcopy(old)
    assert changed_keys(old, new) == []
    new["b"]["c"] = [1, 3]
    new["b"]["new"] = 0
    new["e"] = None
    assert changed_keys(old, new) == ["b.c", "b.new", "e"]
    assert changed_keys(new, old) == ["b.c", "b.new", "e"]
