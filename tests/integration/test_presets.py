"""Every published preset and every objective, through `unlearn train` on a tiny memorised target, moves the scores as published.

The presets' own settings stay, but for those of the table below: a model of a quarter of a million weights needs other learning rates,
has four layers instead of 32 and no time for a hundred epochs. What is asserted is a direction with a margin: a docstring or a comment
beside a number says what was measured, on four targets that differ in documents or weights.

Log-probabilities are means per answer token, in nats; accuracies are shares of answer tokens that are the likeliest one. Both are those of
the validation fold, teacher-forced. The target starts at a log-probability of -0.02 to -0.1 and an accuracy above 0.97 on both sets.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.forgetting import Verdict, classify
from eval.measure import score_set
from launcher.cli import main
from launcher.load import load_experiment
from launcher.stages import run_train
from launcher.templates import RECIPES, template_descriptions
from tests.helpers.memorised_target import FOLDS, NUM_LAYERS, MemorisedTarget, build_memorised_target
from trainers.checkpoint import finished_checkpoints
from trainers.config import AdaptiveRetainConfig, ObjectiveName, TrainConfig
from trainers.data.encode import encode_records
from trainers.data.records import load_forget_retain
from trainers.data.refusals import refusal
from trainers.data.types import Record
from trainers.files import read_json, read_jsonl
from trainers.modeling import load_adapted_model, load_model, load_tokenizer
from trainers.objectives.table import resolve_weights

pytestmark = pytest.mark.slow

PUBLISHED = sorted(template_descriptions(published=True))
LONGEST_ROW = 160
"""Tokens; what rows are filled up to where KL reads padding. The longest row has 136."""
PROJECTIONS = r"(self_attn|mlp)\.\w+_proj"
"""Every linear module of a decoder layer."""


@dataclass(frozen=True)
class Case:
    """A preset on the tiny target.

    Args:
        rate: learning rate.
        scaled: the other settings that are scaled down, as overrides.
        trained: pattern of the names of exactly those tensors that may change (for adapters: that have one).
        forget_accuracy: the final one is below this.
        retain_accuracy: the final one is above this.
        signals: times the signals are measured.
    """

    rate: float
    scaled: tuple[str, ...]
    trained: str
    forget_accuracy: float
    retain_accuracy: float
    signals: int = 2


PADDED = (f"train.max_length={LONGEST_ROW}",)
CASES = {
    # Published: the last 8 of 32 layers, chunks of 32 rows, 7 epochs, 1e-5. Measured: 0.72, 0.97.
    "ails-ntua": Case(
        5e-3,
        ("train.trainable.last_layers=1", "train.schedule.chunk_size=10", "train.num_train_epochs=2"),
        rf"model\.layers\.{NUM_LAYERS - 1}\..*|model\.embed_tokens\.weight|lm_head\.weight",
        0.85, 0.9,
    ),
    # Published: chunks of 64 rows, batch 16, 5e-5. Measured: 0.81, 0.98. Signals after every phase.
    "ails-ntua-agad": Case(
        1.3e-2,
        ("train.schedule.chunk_size=10", "train.train_batch_size=5", "train.per_device_train_batch_size=5"),
        r"model\.layers\.\d\.(self_attn\.[qv]_proj|mlp\.(up|down)_proj)\.weight",
        0.92, 0.9,
        signals=12,
    ),
    # Published: 20 epochs, 1e-4. Measured: 0.70, 0.88.
    "atyaephyra": Case(2e-2, ("train.num_train_epochs=3",), r"model\.layers\.\d\.self_attn\.[qv]_proj\.weight", 0.85, 0.75),
    # Published (TOFU's): 1e-5, here and in the four baselines. Measured: 0.49, 0.98.
    "global-weight-modification": Case(5e-3, (), r".*", 0.75, 0.9),
    # Published: layers 24 to 26 of 32, 100 epochs, 5e-5, retain weight 900. Both sets' texts share most of their tokens here, and 900 holds
    # forget activations in place, too: they moved by 0.034, retain activations by 0.039. Measured with 5: 0.48, 0.69.
    "mr-snuffleupagus": Case(
        2e-2,
        ("train.objective.layer=2", "train.trainable.layers=[0,2]", "train.num_train_epochs=10",
         "train.objective.retain_activation_weight=5"),
        r"model\.layers\.[012]\.mlp\.down_proj\.weight",
        0.7, 0.45,
    ),
    # Measured: 0.11, 0.05 to 0.18.
    "semeval-ga": Case(2e-3, (), r".*", 0.3, 0.0),
    # Measured: 0.50, 0.91.
    "semeval-gd": Case(2e-3, (), r".*", 0.7, 0.8),
    # Published: rows filled up to 500 tokens. Measured: 0.80, 0.67.
    "semeval-kl": Case(2e-3, PADDED, r".*", 0.92, 0.5),
    # Measured: 0.41, 0.36.
    "semeval-npo": Case(2e-3, (), r".*", 0.6, 0.2),
    # Published: layers 0 to 5 of 32, batch 60, 1.5e-5. Measured: 0.32, 0.91.
    "sha256": Case(
        1e-2,
        ("train.trainable.layers=[0,1]", "train.train_batch_size=10", "train.per_device_train_batch_size=10"),
        r"model\.layers\.[01]\.mlp\.(gate|up|down)_proj\.weight",
        0.6, 0.8,
    ),
    # Published: 1e-4, rows filled up to 256 tokens (424 in the preset). Measured: 0.48, 0.73; the second run 0.91, 0.98.
    "zjuklab": Case(1e-2, PADDED, rf"model\.layers\.\d\.{PROJECTIONS}\.weight", 0.7, 0.5),
    "zjuklab-over": Case(1e-2, PADDED, rf"model\.layers\.\d\.{PROJECTIONS}\.weight", 0.7, 0.5),
    "zjuklab-under": Case(1e-2, PADDED, rf"model\.layers\.\d\.{PROJECTIONS}\.weight", 0.97, 0.9),
}  # fmt: skip
"""What is scaled down, and final accuracies: the largest of the forget set's and the smallest of the retain set's over the four targets.

Learning rates were chosen once: large enough to move the forget set well beyond noise within a few dozen steps, small enough for methods
with a retain term to keep the retain set.
"""

OBJECTIVE_RATE = 1e-2
OBJECTIVES = dict.fromkeys(ObjectiveName, (OBJECTIVE_RATE, "")) | {
    # The steered layer and its weights as in `mr-snuffleupagus`: with the published ones everything stays in its place, see there.
    ObjectiveName.RMU: (2e-2, ", layer: 2, steering: 100, retain_activation_weight: 5"),
    ObjectiveName.ADAPTIVE_RMU: (2e-2, ", layer: 2, retain_activation_weight: 5"),
    # What is known by heart has little left to learn: its update is small.
    ObjectiveName.TASK_VECTOR_NEGATION: (3e-2, ""),
}
"""Learning rate and further settings of each objective, all with the same adapters, twenty steps of 32 rows."""


# ---- trials


@dataclass(frozen=True)
class Trial:
    """What one trial wrote."""

    run: Path

    @property
    def folder(self) -> Path:
        return self.run / "trials" / "trial-00"

    @property
    def checkpoint(self) -> Path:
        return finished_checkpoints(self.folder)[-1]

    @cached_property
    def status(self) -> dict[str, Any]:
        return read_json(self.folder / "status.json")

    @cached_property
    def train(self) -> TrainConfig:
        return TrainConfig.model_validate(read_json(self.run / "sweep.json")["trials"]["trial-00"]["train"])

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "metrics.jsonl")

    @cached_property
    def signals(self) -> list[dict[str, float]]:
        return [line["signals"] for line in self.metrics if "signals" in line]

    @cached_property
    def scores(self) -> dict[str, Any]:
        return read_json(self.folder / "validation.json")["scores"]

    @cached_property
    def baseline(self) -> dict[str, Any]:
        return read_json(self.run / "baseline" / "validation.json")["scores"]

    @property
    def verdict(self) -> Verdict:
        return classify(scores=self.scores, baseline=self.baseline).verdict

    def log_prob(self, side: str) -> float:
        return self.scores[f"{side}_answer_log_prob"]

    def accuracy(self, side: str) -> float:
        return self.scores[f"{side}_token_accuracy"]

    def lost(self, side: str) -> float:
        """Log-probability lost since the start, nats per answer token."""
        return self.baseline[f"{side}_answer_log_prob"] - self.log_prob(side)

    def series(self, term: str) -> list[float | None]:
        """A term of the loss, step by step; None in steps without its rows."""
        return [line["terms"].get(term) for line in self.metrics]

    def passes(self, term: str) -> list[float]:
        """A term's mean over each pass of the forget set: forty rows in a step of 32 and one of eight."""
        values = [line["terms"][term] for line in self.metrics]
        return [0.8 * large + 0.2 * small for large, small in zip(values[::2], values[1::2], strict=True)]


def override(key: str, value: Any) -> str:
    """An override as it stands on the command line; JSON is YAML."""
    return f"{key}={json.dumps(value)}"


class Laboratory:
    """Trials of one target, each trained when it is first asked for."""

    def __init__(self, target: MemorisedTarget, *, root: Path) -> None:
        self.target, self.root = target, root
        self._trials: dict[tuple[str, ...], Trial] = {}

    def settings(self, *, signals: int = 2) -> list[str]:
        """What every trial has in place of its recipe's settings: model, data, a plain engine in float32, little to measure."""
        return [
            override("model", {"model_name_or_path": str(self.target.model)}),
            override("data", self.target.data | {"folds": FOLDS}),
            override("train.engine", {"name": "torch", "dtype": "float32"}),
            override("train.checkpoints", 1),
            override("train.signals", signals),
            override("eval", {"dtype": "float32", "max_new_tokens": 32, "mmlu_shots": 0, "bootstrap_samples": 1}),
            override("sweep.cpus_per_rank", 1),
        ]

    def train(self, recipe: str, *overrides: str, signals: int = 2) -> Trial:
        """The trial of `unlearn train RECIPE.yaml OVERRIDES`."""
        key = (recipe, *overrides)
        if key not in self._trials:
            experiment = load_experiment(RECIPES / f"{recipe}.yaml", [*self.settings(signals=signals), *overrides], require="one_trial")
            trial = Trial(self.root / f"{recipe}-{len(self._trials)}")
            run_train(experiment=experiment, out=trial.run)
            self._trials[key] = trial
        return self._trials[key]

    def preset(self, name: str) -> Trial:
        """A preset as the table has it. Micro-batches of 16 rows change no number, see the tests of the training step."""
        case = CASES[name]
        batch = () if any("per_device" in setting for setting in case.scaled) else _micro_batch(name)
        return self.train(name, override("train.learning_rate", case.rate), *batch, *case.scaled, signals=case.signals)

    def objective(self, name: ObjectiveName, more: str = "") -> Trial:
        """An objective on adapters of rank 8, in the place of that of `semeval-gd`."""
        rate, settings = OBJECTIVES[name]
        return self.train(
            "semeval-gd",
            f"train.objective={{name: {name.value}{settings}{more}}}",
            "train.lora={r: 8, lora_alpha: 16, lora_dropout: 0.0}",
            override("train.learning_rate", rate),
            override("train.per_device_train_batch_size", 16),
        )


def _micro_batch(name: str) -> tuple[str, ...]:
    batch = load_experiment(RECIPES / f"{name}.yaml").config.train.train_batch_size
    return (override("train.per_device_train_batch_size", min(16, batch)),)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    root = tmp_path_factory.mktemp("presets")
    return Laboratory(build_memorised_target(root / "memorised"), root=root)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: value for file in sorted(folder.glob("*.safetensors")) if file.stem != "optimizer" for name, value in load_file(file).items()
    }


def before_and_after(trial: Trial, *, target: MemorisedTarget) -> tuple[Any, Any]:
    """The target, and what the trial's last checkpoint made of it."""
    return load_model(target.model), load_adapted_model(target.model, trial.checkpoint)


def activation_change(trial: Trial, *, target: MemorisedTarget, layer: int) -> dict[str, float]:
    """Mean square of what a trial changed at a layer's output, over all tokens of each set."""
    data, tokenizer = load_forget_retain(target.data["path"]), load_tokenizer(target.model)
    models = before_and_after(trial, target=target)

    @torch.no_grad()
    def change(ids: Sequence[int]) -> Tensor:
        before, after = (model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0] for model in models)
        return (after - before).square().mean(dim=1)

    def mean(records: Sequence[Record]) -> float:
        rows = encode_records(records, tokenizer=tokenizer, max_length=LONGEST_ROW)
        return float(torch.cat([change(row.input_ids) for row in rows]).mean())

    return {"forget": mean(data.forget), "retain": mean(data.retain)}


def preferences(trial: Trial, *, target: MemorisedTarget, others: Sequence[str]) -> tuple[float, float]:
    """By how much target and trial prefer other answers to the forget answers: log p(other) - log p(answer), nats, mean over rows."""
    tokenizer, records = load_tokenizer(target.model), load_forget_retain(target.data["path"]).forget

    def log_prob(model: Any, rows: Sequence[Record]) -> float:
        scores = score_set(model=model, tokenizer=tokenizer, records=rows, batch_tokens=4096, device="cpu").scores
        return sum(score.answer_log_prob for score in scores) / len(scores)

    replaced = [replace(record, output=other) for record, other in zip(records, others, strict=True)]
    before, after = (log_prob(model, replaced) - log_prob(model, records) for model in before_and_after(trial, target=target))
    return before, after


def test_the_target_knows_both_sets(laboratory: Laboratory) -> None:
    """Otherwise nothing below would be forgetting. Measured: at least 98 % of the completions' tokens and 75 % of the questions."""
    for side in ("forget", "retain"):
        assert laboratory.target.memorised[f"{side}_regurgitation"] > 0.97
        assert laboratory.target.memorised[f"{side}_knowledge"] > 0.6


# ---- presets


def test_every_published_preset_has_a_case() -> None:
    assert sorted(CASES) == PUBLISHED
    assert len(PUBLISHED) >= 13


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_runs_to_its_end_and_forgets_what_it_should(laboratory: Laboratory, name: str) -> None:
    """It finishes, its files agree with each other, and both sets end on the right side of the table's bounds.

    Least measured: zjuklab-under lost 0.5 nats of the forget set and 0.05 of the retain set.
    """
    trial, case = laboratory.preset(name), CASES[name]
    steps = [line["step"] for line in trial.metrics]
    assert (trial.status["state"], trial.status["error"]) == ("finished", None)
    assert steps == list(range(1, trial.status["num_steps"] + 1))
    assert all(math.isfinite(value) for line in trial.metrics for value in (line["loss"], line["grad_norm"], *line["terms"].values()))
    # The last signals were measured on the model in memory, the report on its checkpoint.
    for side in ("forget", "retain"):
        assert trial.signals[-1][f"{side}_answer_log_prob"] == pytest.approx(trial.log_prob(side), rel=1e-3, abs=1e-4)
        assert trial.signals[-1][f"{side}_token_accuracy"] == pytest.approx(trial.accuracy(side), abs=5e-3)
    assert read_json(trial.folder / "eval.json")["fold"] == "test"
    assert trial.lost("forget") > 0.2
    assert trial.lost("forget") > trial.lost("retain")
    assert trial.accuracy("forget") < case.forget_accuracy < trial.baseline["forget_token_accuracy"]
    assert trial.accuracy("retain") > case.retain_accuracy


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_changes_what_it_trains_and_nothing_else(laboratory: Laboratory, name: str) -> None:
    """Bit by bit, over every tensor of the target. Adapters change the tensors that have one whose update is not zero."""
    trial, before = laboratory.preset(name), tensors_of(laboratory.target.model)
    after = tensors_of(trial.checkpoint)
    assert all(value.isfinite().all() for value in after.values())
    if trial.train.lora is not None:
        modules = {key.removeprefix("base_model.model.").rpartition(".lora_B.")[0]: key for key in after if ".lora_B." in key}
        assert all(after[key].shape[1] == trial.train.lora.r for key in modules.values())
        changed = {f"{module}.weight" for module, key in modules.items() if after[key].any()}
    else:
        assert after.keys() == before.keys()
        changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed == {key for key in before if re.fullmatch(CASES[name].trained, key)}
    assert changed


def test_gradient_ascent_over_forgets(laboratory: Laboratory) -> None:
    """The organisers' baseline ends near guessing. Measured: dead; accuracies of at most 0.18, log-probabilities of at most -6.1."""
    trial = laboratory.preset("semeval-ga")
    assert trial.verdict in (Verdict.DEAD, Verdict.OVER_FORGETTING)
    for side in ("forget", "retain"):
        assert trial.accuracy(side) < 0.3
        assert trial.log_prob(side) < -4


def test_the_baselines_keep_more_than_gradient_ascent(laboratory: Laboratory) -> None:
    """Same steps, rows, order and learning rate; only the objective differs.

    Retain accuracy measured: GA 0.05 to 0.18, GradDiff 0.91 to 0.95, KL 0.67 to 0.92. NPO, 0.36 to 0.54, has no retain term but fades out.
    """
    ascent, *others = (laboratory.preset(f"semeval-{name}") for name in ("ga", "gd", "kl", "npo"))
    diff, kl, npo = others
    for trial in others:
        assert [line["learning_rate"] for line in trial.metrics] == [line["learning_rate"] for line in ascent.metrics]
        assert trial.log_prob("forget") > ascent.log_prob("forget") + 2
    assert min(diff.accuracy("retain"), kl.accuracy("retain")) > ascent.accuracy("retain") + 0.3
    assert npo.accuracy("retain") > ascent.accuracy("retain") + 0.15


def test_zjuklab_over_forgets_more_than_zjuklab_under(laboratory: Laboratory) -> None:
    """And retains less. Differences measured: 2.6 to 4.2 nats of the forget set, 0.6 to 1.1 of the retain set."""
    over, under = laboratory.preset("zjuklab-over"), laboratory.preset("zjuklab-under")
    assert over.log_prob("forget") < under.log_prob("forget") - 1
    assert over.log_prob("retain") < under.log_prob("retain") - 0.2
    assert len(over.metrics) == 2 * len(under.metrics)


def test_zjuklab_as_one_trial_is_its_over_forgetting_run(laboratory: Laboratory) -> None:
    """`unlearn train` has no use for the start points; step by step the same numbers."""
    ours, theirs = (
        [{key: value for key, value in line.items() if key != "seconds"} for line in laboratory.preset(name).metrics]
        for name in ("zjuklab", "zjuklab-over")
    )
    assert ours == theirs


def test_ails_ntua_starts_anew_for_each_chunk(laboratory: Laboratory) -> None:
    """Forty rows in chunks of ten, one row per step, two passes: four cycles of twenty steps.

    In each the learning rate falls in a straight line from its peak, and the last optimizer has seen the last cycle only.
    """
    trial = laboratory.preset("ails-ntua")
    rates = [line["learning_rate"] for line in trial.metrics]
    assert len(rates) == 80
    assert [step for step in range(1, 80) if rates[step] > rates[step - 1]] == [20, 40, 60]
    assert rates[:20] == rates[20:40] == rates[40:60] == rates[60:]
    assert rates[0] == CASES["ails-ntua"].rate
    assert rates[19] < 0.1 * rates[0]
    manifest = read_json(trial.checkpoint / "manifest.json")
    assert (manifest["optimizer_step"], manifest["optimizer_age"]) == (80, 20)


def test_agad_forgets_and_anneals_by_turns(laboratory: Laboratory) -> None:
    """Four chunks, two steps per pass, three passes: six forgetting steps, then as many on a quarter of the retain set; 24 on all of it.

    Forgetting takes from the forget set, 0.5 nats at least, and annealing gives to the retain set, 0.2 nats at least.
    """
    trial = laboratory.preset("ails-ntua-agad")
    forgets = [bool(value) for value in trial.series("forget_grad_ascent")]
    anneals = [bool(value) for value in trial.series("retain_ce")]
    expected = ([True] * 6 + [False] * 6) * 4 + [False] * 24
    assert forgets == expected
    assert anneals == [not forgetting for forgetting in expected]
    start = [{f"{side}_answer_log_prob": trial.baseline[f"{side}_answer_log_prob"] for side in ("forget", "retain")}]
    phases = [*start, *trial.signals]
    assert len(phases) == 13
    for turn in range(4):
        before, forgotten, annealed = phases[2 * turn : 2 * turn + 3]
        assert forgotten["forget_answer_log_prob"] < before["forget_answer_log_prob"] - 0.2
        assert annealed["retain_answer_log_prob"] > forgotten["retain_answer_log_prob"] + 0.05


def test_sha256_raises_the_retain_weight_when_retention_falls(laboratory: Laboratory) -> None:
    """clip(0.3 * 6 ** rise + 0.8, 1.2, 2.8): the lowest in the first epoch (four steps), then by the formula. Measured: up to 1.7."""
    trial, limits = laboratory.preset("sha256"), AdaptiveRetainConfig()
    weights = [line["retain_ce_weight"] for line in trial.metrics]
    losses = [line["terms"]["retain_ce"] for line in trial.metrics]
    level = sum(losses[:4]) / 4
    expected = [1.2] * 4 + [min(max(0.3 * 6 ** (loss - level) + 0.8, 1.2), 2.8) for loss in losses[3:-1]]
    assert weights == pytest.approx(expected, rel=1e-9)
    assert limits.lowest == min(weights) < 1.25 < max(weights) <= limits.highest


def test_mr_snuffleupagus_moves_forget_activations_away(laboratory: Laboratory) -> None:
    """Mean square of the change at the steered layer, where the target's own mean square is 8. Measured: forget 43 to 57, retain 5."""
    change = activation_change(laboratory.preset("mr-snuffleupagus"), target=laboratory.target, layer=2)
    assert change["forget"] > 15
    assert change["forget"] > 3 * change["retain"]


# ---- objectives


@pytest.mark.parametrize("name", ObjectiveName)
def test_an_objective_forgets(laboratory: Laboratory, name: ObjectiveName) -> None:
    """And one with a retain term loses less of the retain set. Least measured: simnpo lost 0.4 nats of the forget set, idk_dpo 0.46.

    Closest accuracies: idk_dpo 0.90 and 0.97, simnpo 0.89 and 0.998.
    """
    trial = laboratory.objective(name)
    assert trial.status["state"] == "finished"
    assert trial.lost("forget") > 0.2
    assert trial.accuracy("forget") < 0.95
    weights = resolve_weights(trial.train.objective)
    if max(weights.retain_ce, weights.retain_kl, weights.retain_activation) > 0:
        assert trial.accuracy("retain") > trial.accuracy("forget") + 0.03
        assert trial.lost("retain") < trial.lost("forget")


@pytest.mark.parametrize("name", [ObjectiveName.RMU, ObjectiveName.ADAPTIVE_RMU])
def test_rmu_moves_forget_activations_and_holds_retain_activations(laboratory: Laboratory, name: ObjectiveName) -> None:
    """Towards the control vector, so that the term falls. Mean square of the change measured: forget 78 to 110, retain 4 to 6."""
    trial = laboratory.objective(name)
    change = activation_change(trial, target=laboratory.target, layer=2)
    assert change["forget"] > 30
    assert change["forget"] > 5 * change["retain"]
    first, *_, last = trial.passes("forget_rmu")
    assert last < 0.5 * first


@pytest.mark.parametrize("name", [ObjectiveName.DPO, ObjectiveName.IDK_DPO])
def test_dpo_comes_to_prefer_the_other_answer(laboratory: Laboratory, name: ObjectiveName) -> None:
    """Measured: with plausible answers by 37 to 40 nats more than the target does, with refusals by 80 to 95.

    Without a preference the term is 2 / beta * log 2 = 13.86. Least measured at the end: 1.9.
    """
    trial, records = laboratory.objective(name), load_forget_retain(laboratory.target.data["path"]).forget
    refused = name is ObjectiveName.IDK_DPO
    others = [refusal(record.id, seed=trial.train.seed) if refused else record.alternative or "" for record in records]
    before, after = preferences(trial, target=laboratory.target, others=others)
    assert after > before + 20
    first, *_, last = (line["terms"]["forget_dpo"] for line in trial.metrics)
    assert first == pytest.approx(20 * math.log(2), rel=1e-4)
    assert last < 5


def test_task_vector_negation_learns_and_delivers_the_opposite(laboratory: Laboratory) -> None:
    """Cross-entropy on the forget set ends 0.01 to 0.05 nats lower in training, and at least 0.9 nats higher in the delivered model."""
    trial = laboratory.objective(ObjectiveName.TASK_VECTOR_NEGATION)
    first, *_, last = trial.passes("forget_ce")
    assert last < 0.9 * first
    assert trial.lost("forget") > 0.3


def test_undial_and_ce_u_approach_their_targets(laboratory: Laboratory) -> None:
    """Both are cross-entropies against a distribution without the answer. Least measured: UNDIAL from 6.2 to 4.0, CE-U from 7.1 to 3.6.

    CE-U's distribution is that of the model itself: it can rise again once the answer is gone, so its lowest pass counts.
    """
    for name, term in ((ObjectiveName.UNDIAL, "forget_undial"), (ObjectiveName.CE_U, "forget_ce_u")):
        first, *others = laboratory.objective(name).passes(term)
        assert min(others) < 0.8 * first


@pytest.mark.parametrize(
    ("alone", "accompanied"),
    [
        (ObjectiveName.GRAD_ASCENT, (ObjectiveName.GRAD_DIFF, "")),
        (ObjectiveName.GRAD_ASCENT, (ObjectiveName.KL_MIN, "")),
        (ObjectiveName.NPO, (ObjectiveName.NPO, ", retain_ce_weight: 1")),
        (ObjectiveName.NPO, (ObjectiveName.NPO, ", retain_kl_weight: 1")),
    ],
    ids=["ga + CE", "ga + KL", "npo + CE", "npo + KL"],
)
def test_a_retain_term_raises_retention(laboratory: Laboratory, alone: ObjectiveName, accompanied: tuple[ObjectiveName, str]) -> None:
    """Everything else alike. Retain accuracy measured: ga 0.02 alone, at least 0.73 with CE, 0.59 with KL; npo 0.04, 0.66, 0.63."""
    without, within = laboratory.objective(alone), laboratory.objective(*accompanied)
    assert len(without.metrics) == len(within.metrics)
    assert within.accuracy("retain") > without.accuracy("retain") + 0.35
    assert within.log_prob("retain") > without.log_prob("retain") + 2


# ---- trials that cannot end well


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and error output of a command in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("rate", "epochs"),
    [(1e3, 10), (1e39, 0.5)],
    ids=["the loss explodes", "the only update leaves no finite weight"],
)
def test_an_absurd_learning_rate_stops_the_trial(
    laboratory: Laboratory, tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: float, epochs: float
) -> None:
    """Exit code 1, a message that says what was not finite and when, and no weights that are not finite, in any checkpoint."""
    changes = {"learning_rate": rate, "num_train_epochs": epochs, "warmup_ratio": 0, "per_device_train_batch_size": 16, "checkpoints": 20}
    overrides = [*laboratory.settings(), *(override(f"train.{key}", value) for key, value in changes.items())]
    code, err = command("train", str(RECIPES / "semeval-ga.yaml"), *overrides, "--out", str(tmp_path / "absurd"), capsys=capsys)
    trial = Trial(tmp_path / "absurd")
    assert code == 1
    assert "run failed: the trial stopped" in err
    assert "Traceback" not in err
    assert trial.status["state"] == "stopped"
    assert re.search(r"\b(is|are) (nan|inf|-inf|not finite)\b.* step \d+", trial.status["error"])
    assert trial.status["error"] in err
    assert not (trial.folder / "validation.json").exists()
    for checkpoint in finished_checkpoints(trial.folder):
        assert [name for name, value in tensors_of(checkpoint).items() if not value.isfinite().all()] == []


def test_a_target_that_is_not_finite_is_named_as_the_cause(
    laboratory: Laboratory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One value of one tensor is no number: nothing is trained, and the message names the tensor, not the architecture."""
    broken, name = tmp_path / "target", "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(laboratory.target.model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors[name][0, 0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    overrides = [*laboratory.settings(), override("model.model_name_or_path", str(broken))]
    code, err = command("train", str(RECIPES / "semeval-gd.yaml"), *overrides, "--out", str(tmp_path / "run"), capsys=capsys)
    assert code in (1, 2)
    assert name in err
    assert "not finite" in err
    assert "Traceback" not in err
    assert not Trial(tmp_path / "run").folder.joinpath("metrics.jsonl").exists()
