"""One trial gives the same numbers under plain torch and under ZeRO 0 to 3, on one process or two, resumed or not.

Tolerance of two runs that differ only in how sums are ordered: measured on this model, losses of about 17 nats differ by at
most 2e-5 over six steps and adapter entries by at most 3e-6; 2e-4 and 5e-5 leave a factor of ten for other machines. The
negative controls below show that a wrong denominator or a doubled gradient moves both by far more.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_trial import tiny_inputs, tiny_train
from trainers.checkpoint import finished_checkpoints
from trainers.config import EngineConfig, TrainConfig
from trainers.distributed import Rank
from trainers.errors import InputError
from trainers.loop import TrialInputs, train_worker

LOSS_TOLERANCE = 2e-4
WEIGHT_TOLERANCE = 5e-5


def run_trial(*, train: TrainConfig, inputs: TrialInputs, trial: Path, rank: Rank | None = None, wrong: str = "") -> list[float]:
    """Losses of all steps; ``wrong`` breaks one thing on purpose."""
    if wrong == "counts of one rank":
        from trainers.engine.deepspeed_engine import DeepSpeedEngine

        honest = DeepSpeedEngine.sum
        DeepSpeedEngine.sum = lambda self, values: [2 * value for value in values] if len(values) == 4 else honest(self, values)
    if wrong == "gradients averaged":
        from trainers.engine.deepspeed_engine import DeepSpeedEngine

        backward = DeepSpeedEngine.backward
        DeepSpeedEngine.backward = lambda self, loss, *, last: backward(self, loss / self.world_size, last=last)
    return [metrics["loss"] for metrics in train_worker(train=train, inputs=inputs, trial=trial, rank=rank)]


def weights_of(trial: Path) -> dict[str, torch.Tensor]:
    folder = finished_checkpoints(trial)[-1]
    return load_file(next(file for file in (folder / "adapter_model.safetensors", folder / "model.safetensors") if file.exists()))


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrialInputs:
    return tiny_inputs(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def plain(inputs: TrialInputs, tmp_path_factory: pytest.TempPathFactory):
    """Plain torch, one process: losses and adapter."""
    trial = tmp_path_factory.mktemp("plain")
    losses = run_trial(train=tiny_train(), inputs=inputs, trial=trial)
    return losses, weights_of(trial)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_on_one_process_equals_plain_torch(stage: int, inputs: TrialInputs, plain, tmp_path: Path) -> None:
    train = tiny_train(engine=EngineConfig(name="deepspeed", zero_stage=stage))
    losses = run_trial(train=train, inputs=inputs, trial=tmp_path)
    assert losses == pytest.approx(plain[0], abs=LOSS_TOLERANCE)
    assert largest_difference(weights_of(tmp_path), plain[1]) < WEIGHT_TOLERANCE


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_equal_plain_torch_on_one(stage: int, inputs: TrialInputs, plain, tmp_path: Path) -> None:
    """Same global batch of four pairs; each rank computes two of them, in two micro-batches."""
    train = tiny_train(engine=EngineConfig(name="deepspeed", zero_stage=stage, ranks=2), per_device_train_batch_size=1)
    losses = run_ranks(run_trial, world_size=2, train=train, inputs=inputs, trial=tmp_path)
    assert losses[0] == losses[1], "metrics are those of the whole step on every rank"
    assert losses[0] == pytest.approx(plain[0], abs=LOSS_TOLERANCE)
    assert largest_difference(weights_of(tmp_path), plain[1]) < WEIGHT_TOLERANCE


@pytest.mark.ranks
@pytest.mark.parametrize("wrong", ["counts of one rank", "gradients averaged"])
def test_the_tolerance_rejects_a_wrong_normalisation(wrong: str, inputs: TrialInputs, plain, tmp_path: Path) -> None:
    """Negative control: dividing by one rank's counts, or averaging a gradient that must be summed, is seen.

    Gradient clipping would hide a common factor, so it is set out of reach in both arms.
    """
    unclipped = tmp_path / "unclipped"
    expected = run_trial(train=tiny_train(max_grad_norm=1e6), inputs=inputs, trial=unclipped)
    train = tiny_train(engine=EngineConfig(name="deepspeed", zero_stage=2, ranks=2), per_device_train_batch_size=1, max_grad_norm=1e6)
    losses = run_ranks(run_trial, world_size=2, train=train, inputs=inputs, trial=tmp_path / "wrong", wrong=wrong)
    loss_error = max(abs(a - b) for a, b in zip(losses[0], expected, strict=True))
    weight_error = largest_difference(weights_of(tmp_path / "wrong"), weights_of(unclipped))
    assert loss_error > 10 * LOSS_TOLERANCE or weight_error > 2 * WEIGHT_TOLERANCE


def test_micro_batches_change_nothing(inputs: TrialInputs, plain, tmp_path: Path) -> None:
    losses = run_trial(train=tiny_train(per_device_train_batch_size=1), inputs=inputs, trial=tmp_path)
    assert losses == pytest.approx(plain[0], abs=LOSS_TOLERANCE)
    assert largest_difference(weights_of(tmp_path), plain[1]) < WEIGHT_TOLERANCE


def interrupt_after(steps: int, *, train: TrainConfig, inputs: TrialInputs, trial: Path) -> None:
    generator = train_worker(train=train, inputs=inputs, trial=trial)
    for _ in range(steps):
        next(generator)
    generator.close()


@pytest.mark.parametrize("engine", [EngineConfig(name="torch"), *(EngineConfig(zero_stage=stage) for stage in (0, 1, 2, 3))], ids=str)
def test_a_resumed_trial_is_bit_equal_to_an_undisturbed_one(engine: EngineConfig, inputs: TrialInputs, tmp_path: Path) -> None:
    """Dropout is on, so the random stream must resume too; the checkpoint lies at step 3 of 6, the interruption at step 4."""
    train = tiny_train(engine=engine, lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.1})
    undisturbed = run_trial(train=train, inputs=inputs, trial=tmp_path / "a")
    interrupt_after(4, train=train, inputs=inputs, trial=tmp_path / "b")
    assert [folder.name for folder in finished_checkpoints(tmp_path / "b")] == ["step-000003"]
    resumed = run_trial(train=train, inputs=inputs, trial=tmp_path / "b")
    assert resumed == undisturbed[3:]
    assert largest_difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0.0
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in "ab"]
    assert metrics == [6, 6], "steps that were repeated are not logged twice"


def test_a_checkpoint_resumes_under_another_engine_and_stage(inputs: TrialInputs, plain, tmp_path: Path) -> None:
    interrupt_after(4, train=tiny_train(engine=EngineConfig(zero_stage=3)), inputs=inputs, trial=tmp_path)
    resumed = run_trial(train=tiny_train(engine=EngineConfig(zero_stage=1)), inputs=inputs, trial=tmp_path)
    assert resumed == pytest.approx(plain[0][3:], abs=LOSS_TOLERANCE)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_one_process_resumes_on_two(stage: int, inputs: TrialInputs, plain, tmp_path: Path) -> None:
    interrupt_after(4, train=tiny_train(), inputs=inputs, trial=tmp_path)
    train = tiny_train(engine=EngineConfig(name="deepspeed", zero_stage=stage, ranks=2), per_device_train_batch_size=2)
    resumed = run_ranks(run_trial, world_size=2, train=train, inputs=inputs, trial=tmp_path)
    assert resumed[0] == pytest.approx(plain[0][3:], abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("stage", [2, 3])
def test_full_parameter_trials_agree_and_resume(stage: int, inputs: TrialInputs, tmp_path: Path) -> None:
    changes = {"lora": None, "learning_rate": 1e-3}
    expected = run_trial(train=tiny_train(**changes), inputs=inputs, trial=tmp_path / "torch")
    sharded = tiny_train(engine=EngineConfig(zero_stage=stage), **changes)
    interrupt_after(4, train=sharded, inputs=inputs, trial=tmp_path / "ds")
    resumed = run_trial(train=sharded, inputs=inputs, trial=tmp_path / "ds")
    assert resumed == pytest.approx(expected[3:], abs=LOSS_TOLERANCE)
    assert largest_difference(weights_of(tmp_path / "ds"), weights_of(tmp_path / "torch")) < WEIGHT_TOLERANCE


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_trains_on_float32_masters(stage: int, inputs: TrialInputs, plain, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits: losses of 17 nats may differ by about 0.1; a resumed run still repeats the rest exactly."""
    train = tiny_train(engine=EngineConfig(zero_stage=stage, dtype="bfloat16"))
    losses = run_trial(train=train, inputs=inputs, trial=tmp_path / "a")
    assert losses == pytest.approx(plain[0], abs=0.2)
    interrupt_after(4, train=train, inputs=inputs, trial=tmp_path / "b")
    assert run_trial(train=train, inputs=inputs, trial=tmp_path / "b") == losses[3:]


def test_the_saved_adapter_loads_in_plain_peft(inputs: TrialInputs, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_trial(train=tiny_train(), inputs=inputs, trial=tmp_path)
    base = AutoModelForCausalLM.from_pretrained(inputs.target)
    ids = torch.arange(10)[None]
    untouched = base(ids).logits.detach().clone()
    adapted = PeftModel.from_pretrained(base, str(finished_checkpoints(tmp_path)[-1]))
    assert float((adapted(ids).logits - untouched).abs().max()) > 1e-3


def test_a_checkpoint_of_another_configuration_or_target_is_refused(inputs: TrialInputs, tmp_path: Path) -> None:
    interrupt_after(4, train=tiny_train(), inputs=inputs, trial=tmp_path)
    with pytest.raises(InputError, match="learning_rate"):
        run_trial(train=tiny_train(learning_rate=1e-3), inputs=inputs, trial=tmp_path)
    other = TrialInputs(**{**inputs.__dict__, "target_hash": "0" * 64})
    with pytest.raises(InputError, match="another target"):
        run_trial(train=tiny_train(), inputs=other, trial=tmp_path)


def test_a_damaged_checkpoint_is_refused(inputs: TrialInputs, tmp_path: Path) -> None:
    interrupt_after(4, train=tiny_train(), inputs=inputs, trial=tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = finished_checkpoints(tmp_path / "b")[-1] / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(InputError, match="do not match its manifest"):
        run_trial(train=tiny_train(), inputs=inputs, trial=tmp_path / "b")
