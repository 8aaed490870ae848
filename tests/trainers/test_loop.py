"""A whole trial in one process: what it logs and writes, how it stops, and that one which was stopped goes on as if it had not been."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny_trial import random_lm, tiny_inputs, tiny_train, write_tiny_target
from trainers import loop, step
from trainers.adaptive_retain import adaptive_retain_weight
from trainers.checkpoint import finished_checkpoints
from trainers.config import AdaptiveRetainConfig, LoraConfig, ObjectiveConfig, ObjectiveName, ScheduleConfig, TrainConfig
from trainers.data.types import ForgetRetain
from trainers.engine.local import LocalEngine
from trainers.errors import InputError
from trainers.files import read_json, read_jsonl, weights_hash
from trainers.loop import DivergedError, TrialInputs, build_model, evenly_spaced, prepare_reference, train_worker
from trainers.modeling import load_adapted_model, load_tokenizer
from trainers.objectives.terms import LossTerm, StepCounts
from trainers.plan import plan_trial
from trainers.scoring import ScoringModel
from trainers.signals import measure_signals
from trainers.step import reference_request
from trainers.trial_rows import encode_trial

torch.set_num_threads(1)

DROPOUT = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrialInputs:
    return tiny_inputs(tmp_path_factory.mktemp("loop"))


def run(trial: Path, *, train: TrainConfig, inputs: TrialInputs, steps: int | None = None) -> list[dict[str, Any]]:
    """The metrics of the steps that a worker does, to the end or until it is stopped after some."""
    worker = train_worker(train=train, inputs=inputs, trial=trial)
    lines = list(worker) if steps is None else [next(worker) for _ in range(steps)]
    worker.close()
    return lines


def logged(trial: Path) -> list[dict[str, Any]]:
    """What a trial's log says, without what the clock said."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_jsonl(trial / "metrics.jsonl")]


def files(trial: Path) -> dict[str, bytes]:
    """Weights and optimizer state of the last checkpoint."""
    return {file.name: file.read_bytes() for file in finished_checkpoints(trial)[-1].glob("*.safetensors")}


def ages(trial: Path) -> list[tuple[int, int]]:
    """Updates done, and done since the optimizer last began anew, at every checkpoint."""
    manifests = [read_json(folder / "manifest.json") for folder in finished_checkpoints(trial)]
    return [(manifest["optimizer_step"], manifest["optimizer_age"]) for manifest in manifests]


# --- what a trial logs ---


def test_a_trial_yields_one_line_of_metrics_per_step_and_logs_the_same(inputs: TrialInputs, tmp_path: Path) -> None:
    """12 forget rows in batches of 4 for 2 epochs: 6 steps; signals once, at the end."""
    metrics = run(tmp_path / "trial", train=tiny_train(), inputs=inputs)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert {line["num_steps"] for line in metrics} == {6}
    assert ["signals" in line for line in metrics] == [False] * 5 + [True]
    assert [{**line, "num_steps": 6} for line in read_jsonl(tmp_path / "trial" / "metrics.jsonl")] == metrics
    assert [folder.name for folder in finished_checkpoints(tmp_path / "trial")] == ["step-000003", "step-000006"]


@pytest.mark.parametrize(
    ("count", "num_steps", "expected"), [(1, 7, {7}), (2, 7, {4, 7}), (3, 9, {3, 6, 9}), (5, 2, {1, 2}), (0, 9, set()), (1, 1, {1})]
)
def test_checkpoints_and_signals_are_evenly_spaced_and_end_with_the_last_step(count: int, num_steps: int, expected: set[int]) -> None:
    """Two of seven: 3.5 rounds to the even 4, then 7."""
    assert evenly_spaced(count, num_steps=num_steps) == expected


@pytest.mark.parametrize("name", list(ObjectiveName))
def test_every_objective_trains_a_trial_from_its_files(name: ObjectiveName, inputs: TrialInputs, tmp_path: Path) -> None:
    """Two steps: losses are finite, the adapters move, and the terms are those of both sets or of the forget set alone."""
    forget = tuple(replace(record, alternative="nothing of the kind") for record in inputs.train.forget)
    given = replace(inputs, train=ForgetRetain(forget, inputs.train.retain))
    train = tiny_train(objective=ObjectiveConfig(name=name), num_train_epochs=1, train_batch_size=6, signals=0, checkpoints=2)
    lines = run(tmp_path / "trial", train=train, inputs=given)
    assert len(lines) == 2
    for line in lines:
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert sum(term.startswith("forget_") for term in line["terms"]) == 1
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in finished_checkpoints(tmp_path / "trial"))
    assert any(not torch.equal(first[key], last[key]) for key in first)


def test_a_setting_without_effect_is_said(inputs: TrialInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "a", train=tiny_train(objective=ObjectiveConfig(name="grad_diff", margin=0.5)), inputs=inputs, steps=1)
    assert [record.message for record in caplog.records if "no effect" in record.message] == [
        "train.objective.margin has no effect on grad_diff"
    ]


# --- how it stops ---


def test_a_diverged_trial_logs_no_step_and_writes_no_checkpoint(
    inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of six steps diverges: two steps are logged, and the checkpoint of step 3 is not written."""
    honest = step.objective_terms
    passes: list[int] = []

    def breaking(*arguments: Any, **keywords: Any) -> tuple[LossTerm, ...]:
        passes.append(1)
        terms = honest(*arguments, **keywords)
        return terms if len(passes) < 3 else tuple(replace(term, total=term.total * math.nan) for term in terms)

    monkeypatch.setattr(step, "objective_terms", breaking)
    with pytest.raises(DivergedError, match="at step 3"):
        run(tmp_path / "trial", train=tiny_train(), inputs=inputs)
    assert [line["step"] for line in read_jsonl(tmp_path / "trial" / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "trial" / "checkpoints").exists()


def test_a_gradient_that_is_not_finite_ends_the_trial_even_if_the_loss_is(
    inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The square root's gradient at zero is infinite where its value is zero; plain torch makes no update with it."""
    honest = step.step_loss

    def broken(terms: tuple[LossTerm, ...], *, counts: StepCounts) -> torch.Tensor:
        loss = honest(terms, counts=counts)
        return loss + ((loss - loss.detach()) ** 2).sqrt()

    monkeypatch.setattr(step, "step_loss", broken)
    with pytest.raises(DivergedError, match="gradient norm is nan at step 1"):
        run(tmp_path / "trial", train=tiny_train(), inputs=inputs)
    assert not (tmp_path / "trial" / "checkpoints").exists()


def test_an_empty_forget_set_and_a_row_that_is_too_long_stop_before_training(inputs: TrialInputs, tmp_path: Path) -> None:
    def start(**changes: Any) -> Callable[[], Iterator[dict[str, Any]]]:
        given = replace(inputs, reference_root=tmp_path / "reference", **changes)
        return lambda: next(train_worker(train=tiny_train(), inputs=given, trial=tmp_path / "trial"))

    with pytest.raises(InputError, match="the forget set is empty"):
        start(train=ForgetRetain((), inputs.train.retain))()
    long = replace(inputs.train.forget[0], output="word " * 200)
    with pytest.raises(InputError, match="row 'f0sc1'"):
        start(train=ForgetRetain((long,), inputs.train.retain))()
    assert not (tmp_path / "trial").exists()


def test_dpo_without_alternative_answers_stops_before_training(inputs: TrialInputs, tmp_path: Path) -> None:
    for start in (prepare_reference, lambda *arguments, **keywords: run(tmp_path / "trial", inputs=arguments[0], **keywords)):
        with pytest.raises(InputError, match=r"12 of 12 forget rows have no alternative answer(.|\n)*where: (.|\n)*fix: .*idk_dpo"):
            start(inputs, train=tiny_train(objective=ObjectiveConfig(name="dpo")))
    assert not (tmp_path / "trial").exists()


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_the_model_does_not_have_is_named_before_training(inputs: TrialInputs, tmp_path: Path, layer: int) -> None:
    train = tiny_train(objective=ObjectiveConfig(name="rmu", layer=layer))
    expected = rf"decoder layer {layer} does not exist(.|\n)*where: train.objective.layer = {layer}\n(.|\n)*0 to 1(.|\n)*fix: "
    with pytest.raises(InputError, match=expected):
        prepare_reference(inputs, train=train)
    with pytest.raises(InputError, match=expected):
        run(tmp_path / "trial", train=train, inputs=inputs)
    assert not (tmp_path / "trial").exists()
    run(tmp_path / "trial", train=tiny_train(objective=ObjectiveConfig(name="rmu", layer=-2)), inputs=inputs, steps=1)


def test_steering_an_architecture_that_does_not_show_its_layers_is_refused(tmp_path: Path) -> None:
    """Its attention is its own, so its rows are padded, not packed; every other objective works on it all the same."""
    folder = write_tiny_target(tmp_path / "olmo")
    random_lm("falcon", dtype=torch.float32, vocab_size=320, max_position_embeddings=128).save_pretrained(str(tmp_path / "falcon"))
    load_tokenizer(folder).save_pretrained(str(tmp_path / "falcon"))
    inputs = tiny_inputs(tmp_path, target=tmp_path / "falcon")
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=("query_key_value",))
    for name in ("rmu", "adaptive_rmu"):
        with pytest.raises(
            InputError, match=rf"FalconForCausalLM does not give its activations\n.*where: train.objective.name = {name}\n.*fix: "
        ):
            prepare_reference(inputs, train=tiny_train(objective=ObjectiveConfig(name=name), lora=lora))
    (line,) = run(tmp_path / "trial", train=tiny_train(lora=lora), inputs=inputs, steps=1)
    assert math.isfinite(line["loss"])


# --- a trial that was stopped goes on as if it had not been ---

CASES: dict[str, tuple[TrainConfig, int]] = {
    # Steps of the three chunks: 6, 6, 2; checkpoints at every second one.
    "in the middle of the second chunk": (
        tiny_train(schedule=ScheduleConfig(name="chunked", chunk_size=5), train_batch_size=2, checkpoints=7, lora=DROPOUT),
        9,
    ),
    "between two chunks, where the optimizer begins anew": (
        tiny_train(schedule=ScheduleConfig(name="chunked", chunk_size=5), train_batch_size=2, checkpoints=7, lora=DROPOUT),
        7,
    ),
    # Two chunks of 4 steps, each with annealing of 1, and a last annealing of 4.
    "in an annealing phase": (
        tiny_train(
            objective=ObjectiveConfig(name="grad_diff"),
            schedule=ScheduleConfig(name="alternating", chunk_size=6),
            train_batch_size=3,
            checkpoints=7,
            lora=DROPOUT,
        ),
        13,
    ),
    "with an adaptive weight": (
        tiny_train(
            objective=ObjectiveConfig(name="grad_diff"), adaptive_retain=AdaptiveRetainConfig(lowest=0.0), num_train_epochs=3, checkpoints=4
        ),
        6,
    ),
    "with an adaptive weight and annealing": (
        tiny_train(
            objective=ObjectiveConfig(name="npo"),
            schedule=ScheduleConfig(name="alternating", chunk_size=6),
            adaptive_retain=AdaptiveRetainConfig(lowest=0.0),
            train_batch_size=3,
            checkpoints=7,
        ),
        13,
    ),
    "of all parameters": (tiny_train(lora=None, learning_rate=1e-3, checkpoints=3), 5),
    "of steered activations": (tiny_train(objective=ObjectiveConfig(name="rmu"), lora=DROPOUT, checkpoints=3), 5),
    "of normalised gradients": (tiny_train(objective=ObjectiveConfig(name="ng_diff"), lora=DROPOUT, checkpoints=3), 5),
    "of a negated update": (tiny_train(objective=ObjectiveConfig(name="task_vector_negation"), lora=DROPOUT, checkpoints=3, signals=3), 5),
    "of a negated update of all parameters": (
        tiny_train(objective=ObjectiveConfig(name="task_vector_negation"), lora=None, learning_rate=1e-3, checkpoints=3),
        5,
    ),
}


@pytest.mark.parametrize(("train", "stop_after"), CASES.values(), ids=CASES)
def test_a_trial_stopped_and_resumed_is_bit_equal_to_an_undisturbed_one(
    inputs: TrialInputs, tmp_path: Path, train: TrainConfig, stop_after: int
) -> None:
    """It stops between two checkpoints, so some steps are done twice; log, weights and moments end up the same to the last bit."""
    run(tmp_path / "whole", train=train, inputs=inputs)
    run(tmp_path / "stopped", train=train, inputs=inputs, steps=stop_after)
    resumed_from = int(finished_checkpoints(tmp_path / "stopped")[-1].name.removeprefix("step-"))
    assert resumed_from < stop_after, "the control: something is lost by stopping"
    again = run(tmp_path / "stopped", train=train, inputs=inputs)
    assert [line["step"] for line in again] == list(range(resumed_from + 1, again[-1]["num_steps"] + 1))
    assert len(again) > 1
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert ages(tmp_path / "stopped") == ages(tmp_path / "whole")


def test_without_its_optimizer_state_a_resumed_trial_would_differ(inputs: TrialInputs, tmp_path: Path) -> None:
    """The negative control: moments set to zero change the next steps, and the comparison sees it."""
    train, stop_after = CASES["of steered activations"]
    run(tmp_path / "whole", train=train, inputs=inputs)
    run(tmp_path / "stopped", train=train, inputs=inputs, steps=stop_after)
    honest = loop.load_checkpoint

    def forgetful(*arguments: Any, **keywords: Any) -> Any:
        state = honest(*arguments, **keywords)
        return replace(state, exp_avg={name: torch.zeros_like(value) for name, value in state.exp_avg.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_checkpoint", forgetful)
        run(tmp_path / "stopped", train=train, inputs=inputs)
    assert files(tmp_path / "stopped") != files(tmp_path / "whole")


def test_a_finished_trial_does_nothing_more(inputs: TrialInputs, tmp_path: Path) -> None:
    train = tiny_train(num_train_epochs=1, signals=0)
    run(tmp_path / "trial", train=train, inputs=inputs)
    before = logged(tmp_path / "trial")
    assert run(tmp_path / "trial", train=train, inputs=inputs) == []
    assert logged(tmp_path / "trial") == before


def test_the_log_of_a_trial_without_a_checkpoint_begins_anew(inputs: TrialInputs, tmp_path: Path) -> None:
    train = tiny_train(num_train_epochs=1, signals=0, checkpoints=1)
    run(tmp_path / "trial", train=train, inputs=inputs, steps=2)
    assert len(logged(tmp_path / "trial")) == 2
    run(tmp_path / "trial", train=train, inputs=inputs)
    assert [line["step"] for line in logged(tmp_path / "trial")] == [1, 2, 3]


# --- an adaptive weight ---


@pytest.mark.parametrize("name", ["grad_diff", "grad_ascent"])
def test_the_adaptive_weight_of_a_step_follows_from_the_steps_before_it(inputs: TrialInputs, tmp_path: Path, name: str) -> None:
    """An objective without cross-entropy gets it this way. The first epoch, three steps, has rise 0, hence weight 0.3 + 0.8."""
    config = AdaptiveRetainConfig(lowest=0.0, highest=9.0)
    train = tiny_train(objective=ObjectiveConfig(name=name), adaptive_retain=config, num_train_epochs=3, learning_rate=2e-2, signals=0)
    lines = run(tmp_path / "trial", train=train, inputs=inputs)
    losses = [line["terms"]["retain_ce"] for line in lines]
    expected = [adaptive_retain_weight(config, history=losses[:done], steps_per_epoch=3) for done in range(9)]
    actual = [line["retain_ce_weight"] for line in lines]
    assert actual == expected
    assert actual[:3] == [pytest.approx(1.1)] * 3
    assert len(set(actual)) > 5, "it does move"
    for line in lines:
        ascent, retain = line["terms"]["forget_grad_ascent"], line["terms"]["retain_ce"]
        assert line["loss"] == pytest.approx(ascent + line["retain_ce_weight"] * retain, rel=1e-5)


def test_steps_without_retain_rows_do_not_enter_the_adaptive_weight(inputs: TrialInputs, tmp_path: Path) -> None:
    """Forgetting steps have no retain loss, which is not a loss of zero: only annealing steps make up the first epoch's mean."""
    train, _ = CASES["with an adaptive weight and annealing"]
    plans = plan_trial(train=train, num_forget=12, num_retain=12)
    lines = run(tmp_path / "trial", train=train, inputs=inputs)
    with_retain = [bool(plan.retain) for plan in plans]
    assert [("retain_ce" in line["terms"], "forget_npo" in line["terms"]) for line in lines] == [(own, not own) for own in with_retain]
    first_epoch = sum(1 for plan in plans if plan.retain and plan.epoch <= 1 + 1e-9)
    history: list[float] = []
    for line, has_retain in zip(lines, with_retain, strict=True):
        expected = adaptive_retain_weight(train.adaptive_retain, history=history, steps_per_epoch=first_epoch)
        assert line["retain_ce_weight"] == expected
        if has_retain:
            assert line["terms"]["retain_ce"] > 1
            history.append(line["terms"]["retain_ce"])
    assert len({line["retain_ce_weight"] for line in lines}) > 2


# --- a negated update ---


@pytest.mark.parametrize("scale", [None, 2.5])
def test_a_negated_checkpoint_holds_minus_scale_times_what_was_trained(inputs: TrialInputs, tmp_path: Path, scale: float | None) -> None:
    """The adapter that others load is -scale * B @ A; what goes on training lies with the optimizer, positive."""
    objective = ObjectiveConfig(name="task_vector_negation", negation_scale=scale)
    run(tmp_path / "trial", train=tiny_train(objective=objective), inputs=inputs)
    folder = finished_checkpoints(tmp_path / "trial")[-1]
    published, kept = load_file(folder / "adapter_model.safetensors"), load_file(folder / "optimizer.safetensors")
    trained = {key.removeprefix("weights/").replace(".default.", "."): value for key, value in kept.items() if key.startswith("weights/")}
    assert set(trained) == set(published)
    assert len(published) == 2 * 14
    for key, value in trained.items():
        factor = -(scale or 1.0) if ".lora_B." in key else 1.0
        assert torch.equal(published[key], factor * value)
    assert any(value.any() for key, value in trained.items() if ".lora_B." in key)
    assert read_json(folder / "manifest.json")["export"] == {"method": "task_vector_negation", "scale": scale or 1.0}


def test_the_signals_of_a_negating_trial_are_those_of_its_checkpoint(inputs: TrialInputs, tmp_path: Path) -> None:
    """Training fits the forget set better, so the negated model fits it worse than the target; the signals say so."""
    train = tiny_train(objective=ObjectiveConfig(name="task_vector_negation", negation_scale=1.5), num_train_epochs=4)
    lines = run(tmp_path / "trial", train=train, inputs=inputs)
    rows = encode_trial(inputs, train=train)

    def signals(model: Any) -> dict[str, float]:
        engine = LocalEngine(ScoringModel(model.requires_grad_(True)), weight_decay=0.0, max_grad_norm=1.0)
        return measure_signals(engine, rows=rows.signals, pad_token_id=rows.pad_token_id)

    folder = finished_checkpoints(tmp_path / "trial")[-1]
    negated = signals(load_adapted_model(inputs.target, folder))
    assert lines[-1]["signals"] == pytest.approx(negated, abs=1e-5)
    target = signals(build_model(inputs, train=train).lm.unload())
    assert negated["forget_answer_log_prob"] < target["forget_answer_log_prob"] - 0.03
    assert lines[-1]["terms"]["forget_ce"] < lines[0]["terms"]["forget_ce"] - 0.1, "while training itself learns the set"


def test_a_negating_trial_of_all_parameters_measures_nothing_and_publishes_the_target_minus_its_update(
    inputs: TrialInputs, tmp_path: Path
) -> None:
    """The negated weights exist in checkpoints only: target - scale * (trained - target)."""
    objective = ObjectiveConfig(name="task_vector_negation", negation_scale=2.0)
    lines = run(tmp_path / "trial", train=tiny_train(objective=objective, lora=None, learning_rate=1e-3), inputs=inputs)
    assert all("signals" not in line for line in lines)
    folder = finished_checkpoints(tmp_path / "trial")[-1]
    target, published = load_file(inputs.target / "model.safetensors"), load_file(folder / "model.safetensors")
    kept = load_file(folder / "optimizer.safetensors")
    for key, value in target.items():
        torch.testing.assert_close(published[key], value - 2.0 * (kept[f"weights/{key}"] - value), rtol=0, atol=1e-6)
    assert any(not torch.equal(published[key], value) for key, value in target.items())


# --- the cache of a sweep is shared, its target is not touched ---


def test_a_reference_that_is_there_costs_no_loading_of_the_target(
    inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed sweep only reads the target's configuration to see that nothing is missing."""
    given = replace(inputs, reference_root=tmp_path / "reference")

    class Loaded(Exception):
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise Loaded

    full = tiny_train(lora=None)
    prepare_reference(given, train=tiny_train())
    monkeypatch.setattr(loop, "load_model", fail)
    prepare_reference(given, train=tiny_train(seed=3, lora=DROPOUT))
    prepare_reference(given, train=tiny_train(objective=ObjectiveConfig(name="grad_diff")))
    for other in (full, tiny_train(objective=ObjectiveConfig(name="rmu"))):
        with pytest.raises(Loaded):
            prepare_reference(given, train=other)


def test_trials_with_the_same_reference_setting_need_the_same_parts_of_the_same_rows(inputs: TrialInputs) -> None:
    """So a sweep prepares one of them and all of them find what they need; the setting may tell apart more than it has to."""
    asked: dict[str, set[frozenset[Any]]] = {}
    forget = tuple(replace(record, alternative="nothing of the kind") for record in inputs.train.forget)
    given = replace(inputs, train=ForgetRetain(forget, inputs.train.retain), attack=None)
    weights = [{"retain_ce_weight": ce, "retain_kl_weight": kl, "retain_activation_weight": activation}
               for ce in (None, 0.0, 1.0) for kl in (None, 1.0) for activation in (None, 0.0)]  # fmt: skip
    for name in ObjectiveName:
        for weight in weights:
            for lora in (LoraConfig(), None):
                train = tiny_train(objective=ObjectiveConfig(name=name, **weight), lora=lora)
                request = reference_request(train, layer=0, trains_head=lora is None)
                asked.setdefault(loop.reference_setting(train), set()).add(request.parts)
    assert len(asked) > 40
    assert [parts for parts in asked.values() if len(parts) > 1] == []
    changes: list[dict[str, Any]] = [
        {"forget_scope": "document"},
        {"objective": ObjectiveConfig(name="npo_ce_kl", kl_scope="real")},
        {"objective": ObjectiveConfig(name="npo_ce_kl", kl_scope="padded"), "max_length": 100},
        {"objective": ObjectiveConfig(name="npo_ce_kl", kl_scope="padded"), "max_length": 110},
        {"objective": ObjectiveConfig(name="dpo")},
        {"objective": ObjectiveConfig(name="idk_dpo")},
        {"objective": ObjectiveConfig(name="idk_dpo"), "seed": 1},
        {"objective": ObjectiveConfig(name="idk_dpo"), "lora": None, "learning_rate": 1e-3},
        {},
        {"seed": 1, "learning_rate": 1e-3, "num_train_epochs": 7},
    ]
    rows_of: dict[str, list[Any]] = {}
    for change in changes:
        train = tiny_train(**change)
        rows_of.setdefault(loop.reference_setting(train), []).append(encode_trial(given, train=train).by_side)
    assert len(rows_of) == len(changes) - 1, "the last two are the same"
    assert all(one == alike[0] for alike in rows_of.values() for one in alike)


def test_a_trial_leaves_its_target_as_it_was(inputs: TrialInputs, tmp_path: Path) -> None:
    """Full training moves weights in memory only; another trial of the sweep starts from the same target."""
    shutil.copytree(inputs.target, tmp_path / "target")
    given = replace(inputs, target=tmp_path / "target", reference_root=tmp_path / "reference")
    run(tmp_path / "trial", train=tiny_train(lora=None, num_train_epochs=1), inputs=given)
    assert weights_hash(tmp_path / "target") == inputs.target_hash
