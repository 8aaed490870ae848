"""One optimizer step is what plain loops over single rows and full logits say, for every objective; padding, micro-batches and ranks
change nothing of it; nothing waits for the device inside; a loss that is not finite stops it.

The steps run in float64, so that what is equal in theory is equal to 1e-12 here and nothing else is.

Shape suffixes: T positions of one row, V vocabulary, D hidden size.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import reference_objectives as loops
from tests.helpers.ranks import run_ranks
from tests.helpers.thread_ranks import Meeting, ThreadEngine, run_threads
from tests.helpers.tiny_trial import random_lm, tiny_inputs, tiny_train
from trainers import step
from trainers.config import Average, EngineConfig, KlScope, LoraConfig, ObjectiveConfig, ObjectiveName, Reduction, TrainConfig
from trainers.data.encode import EncodedRow, evaluated_row
from trainers.data.packing import Packed, pack
from trainers.distributed import Rank, start_process_group, stop_process_group
from trainers.engine.local import LocalEngine
from trainers.loop import TrialInputs, build_engine, build_model, prepare_reference, trial_reference
from trainers.lora import fuse_adapters
from trainers.modeling import add_lora, decoder_layers, layer_index
from trainers.objectives.table import Need, Weights, needs, resolve, resolve_weights
from trainers.objectives.terms import LossTerm, SideCounts, StepCounts, step_loss
from trainers.plan import MicroBatch, StepPlan, plan_trial, split_step
from trainers.reference import Part, Reference, compute_parts
from trainers.scoring import ScoringModel
from trainers.signals import SignalRows
from trainers.step import DivergedError, Recipe, build_recipe, reference_request, score_micro_batch, step_counts, task_means, train_step
from trainers.trial_rows import EncodedTrial, encode_trial

TOLERANCE = 1e-12
"""Of the size of gradient and loss. Measured over 220 steps: 1e-15. The negative controls differ by more than 1e-3."""

OBJECTIVE = ObjectiveConfig(name="npo_ce_kl", forget_weight=1.0, retain_ce_weight=0.5, retain_kl_weight=0.5)
PAD = 0
VOCABULARY = 40
MAX_LENGTH = 20

torch.set_num_threads(1)


# --- steps to look at ---


@cache
def models(trains_head: bool) -> tuple[ScoringModel, ScoringModel]:
    """A model, and the target that it has moved away from; the head with it where the head is trained."""
    model = random_lm(num_attention_heads=2, num_key_value_heads=1).requires_grad_(True)
    target = copy.deepcopy(model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, value in target.named_parameters():
            if trains_head or "lm_head" not in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    for lm in (model, target):
        lm.lm_head.weight.requires_grad_(trains_head)
    return ScoringModel(model), ScoringModel(target)


@dataclass(frozen=True)
class Case:
    """A step over the first rows of two sets, their reference and the objective."""

    model: ScoringModel
    target: ScoringModel
    rows: EncodedTrial
    reference: Reference
    recipe: Recipe
    train: TrainConfig
    num_forget: int
    num_retain: int

    @property
    def plan(self) -> StepPlan:
        """The rows in one step, the first of a cycle of ten."""
        return StepPlan(1, 1.0, tuple(range(self.num_forget)), tuple(range(self.num_retain)), cycle_step=1, cycle_steps=10)


def draw_rows(generator: torch.Generator, *, number: int, num_prompts: Sequence[int] = ()) -> list[EncodedRow]:
    """Random rows of 3 to 14 tokens, of which 1 to 9 are scored."""
    rows = []
    for index in range(number):
        num_prompt, num_scored = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 6), (1, 10)))
        num_prompt = num_prompts[index] if num_prompts else num_prompt
        ids = torch.randint(1, VOCABULARY, (num_prompt + num_scored,), generator=generator).tolist()
        rows.append(EncodedRow(f"row{index}", tuple(ids), num_prompt))
    return rows


def looked_at(rows: list[EncodedRow], *, scope: KlScope, max_length: int = MAX_LENGTH) -> list[EncodedRow]:
    """Retain rows with the tokens of a scope evaluated."""
    if scope is KlScope.ANSWER:
        return rows
    return [evaluated_row(row, pad_to=max_length if scope is KlScope.PADDED else 0, pad_token_id=PAD) for row in rows]


def case_of(
    objective: ObjectiveConfig,
    *,
    forget: list[EncodedRow],
    retain: list[EncodedRow],
    trains_head: bool = True,
    max_length: int = MAX_LENGTH,
    num_forget: int | None = None,
    num_retain: int | None = None,
) -> Case:
    """The step of an objective over given rows, or the first of them, with the reference that the target computes for them."""
    model, target = models(trains_head)
    train = TrainConfig(
        objective=objective,
        lora=None,
        engine=EngineConfig(name="torch"),
        learning_rate=1e-2,
        max_length=max_length,
        per_device_train_batch_size=99,
    )
    others = draw_rows(torch.Generator().manual_seed(9), number=len(forget)) if Need.ALTERNATIVE_ANSWERS in needs(objective) else []
    alternative = [
        EncodedRow(row.row_id, row.input_ids[: row.num_prompt] + other.input_ids[other.num_prompt :], row.num_prompt)
        for row, other in zip(forget, others, strict=False)
    ]
    if resolve_weights(objective).retain_kl > 0:
        retain = looked_at(retain, scope=objective.kl_scope, max_length=max_length)
    tasks = [f"Task{index % 2}" for index in range(len(forget))]
    rows = EncodedTrial(forget, retain, SignalRows((), (), (), ()), PAD, alternative, tasks)
    layer = layer_index(model.causal_lm, layer=objective.layer) if Need.ACTIVATIONS in needs(objective) else None
    request = reference_request(train, layer=layer, trains_head=trains_head)
    parts: dict[Part, Any] = {}
    for side, own in rows.by_side.items():
        wanted = {part for part in request.parts if part.side == side}
        if wanted:
            parts |= compute_parts(target, parts=wanted, request=request, rows=own, pad_token_id=PAD, device="cpu", batch_tokens=60)
    reference = Reference(parts, head_VD=target.head_weight.detach() if trains_head else None)
    recipe = build_recipe(train, rows=rows, reference=reference, layer=layer, hidden_size=model.head_weight.shape[1])
    sizes = (len(own) if number is None else number for number, own in ((num_forget, forget), (num_retain, retain)))
    return Case(model, target, rows, reference, recipe, train, *sizes)


def draw_case(
    objective: ObjectiveConfig = OBJECTIVE,
    *,
    num_forget: int = 4,
    num_retain: int = 3,
    seed: int = 0,
    trains_head: bool = True,
    **more: int,
) -> Case:
    """A step over random rows. A step may have none of a set, as annealing steps do, but the set itself is not empty."""
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (draw_rows(generator, number=max(1, number)) for number in (num_forget, num_retain))
    sizes = {"num_forget": num_forget, "num_retain": num_retain}
    return case_of(objective, forget=forget, retain=retain, trains_head=trains_head, **sizes, **more)


@dataclass(frozen=True)
class Update:
    """What one step did."""

    metrics: dict
    gradient: Tensor
    weights: Tensor


def update(
    case: Case, *, micro_batch_size: int = 99, world_size: int = 1, order: tuple[int, ...] | None = None, reference: Reference | None = None
) -> Update:
    """One step from a copy of the model, forget rows in the order given; threads as ranks, whose results must agree."""
    train = case.train.model_copy(update={"per_device_train_batch_size": micro_batch_size})
    plan = replace(case.plan, forget=order or case.plan.forget)

    def work(meeting: Meeting, rank: int) -> Update:
        RANK.value = rank
        engine = ThreadEngine(copy.deepcopy(case.model), meeting=meeting, rank=rank)
        metrics = train_step(plan, engine=engine, rows=case.rows, reference=reference or case.reference, recipe=case.recipe, train=train)
        return Update(metrics, flatten(engine.gradient), flatten(engine.model.trainable()))

    updates = run_threads(work, world_size=world_size)
    for other in updates[1:]:
        assert other.metrics == updates[0].metrics
        assert torch.equal(other.weights, updates[0].weights)
    return updates[0]


RANK = threading.local()
"""The rank that a thread stands for, for controls that must know it."""


def flatten(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in tensors.values()])


def assert_same_update(actual: Update, expected: Update) -> None:
    size = max(1.0, expected.metrics["grad_norm"], abs(expected.metrics["loss"]))
    torch.testing.assert_close(actual.gradient, expected.gradient, rtol=0, atol=size * TOLERANCE)
    # AdamW divides by the gradient's size, so entries near zero amplify what is left of rounding.
    torch.testing.assert_close(actual.weights, expected.weights, rtol=0, atol=1e-8)
    for name in ("loss", "terms", "grad_norm"):
        assert actual.metrics[name] == pytest.approx(expected.metrics[name], rel=TOLERANCE, abs=size * TOLERANCE)


def relative_error(actual: Update, expected: Update) -> float:
    return float((actual.gradient - expected.gradient).norm() / expected.gradient.norm())


def objectives(name: ObjectiveName) -> st.SearchStrategy[ObjectiveConfig]:
    """Every setting of an objective that changes what a step computes; those that it does not read are drawn in vain."""
    return st.builds(
        ObjectiveConfig,
        name=st.just(name),
        average=st.sampled_from(Average),
        kl_scope=st.sampled_from(KlScope),
        reduction=st.sampled_from(Reduction),
        skip_first_token=st.booleans(),
        retain_ce_weight=st.sampled_from([None, 0.0, 0.5]),
        retain_kl_weight=st.sampled_from([None, 0.7]),
        retain_activation_weight=st.sampled_from([None, 2.0]),
        beta=st.sampled_from([None, 0.5]),
        layer=st.sampled_from([None, 0, -1]),
    )


EVERY_OBJECTIVE = pytest.mark.parametrize("name", list(ObjectiveName))
SETS = {"num_forget": st.integers(0, 5), "num_retain": st.integers(0, 5), "seed": st.integers(0, 10**6), "trains_head": st.booleans()}


# --- what a step computes, once more by plain loops over single rows and full logits ---


class PlainStep:
    """Terms and gradient of a step from passes of the library's model over one row at a time, its logits whole."""

    def __init__(self, case: Case) -> None:
        self.case, self.model, self.target = case, case.model.causal_lm, case.target.causal_lm
        self.objective, self.weights = resolve(case.train.objective), resolve_weights(case.train.objective)
        self.by_sequence = self.objective.average is Average.SEQUENCE
        self.token_mean = self.objective.reduction is Reduction.TOKEN_MEAN
        self.forget = [case.rows.forget[index] for index in case.plan.forget]
        self.alternative = [case.rows.alternative[index] for index in case.plan.forget] if case.rows.alternative else []
        self.retain = [case.rows.retain[index] for index in case.plan.retain]
        self.terms: dict[str, float] = {}
        self._of_side: dict[str, Tensor | float] = {"forget": 0.0, "retain": 0.0}
        self._forget()
        self._retain()

    @cached_property
    def gradient(self) -> Tensor:
        """By every trainable parameter; that of a side has length 1 under NGDiff."""
        parameters = list(self.case.model.trainable().values())
        total = flatten({name: torch.zeros_like(value) for name, value in self.case.model.trainable().items()})
        for value in self._of_side.values():
            if not isinstance(value, Tensor):
                continue
            parts = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            flat = torch.cat([part.flatten() for part in parts])
            if self.objective.name is ObjectiveName.NG_DIFF and float(flat.norm()) > 0:
                flat = flat / flat.norm()
            total = total + flat
        return total

    def add(self, term: str, value: float, *gradients: tuple[list[Tensor], list[Any]], weight: float) -> None:
        """A term's value, and for each kind of output its gradient by hand, carried on to the parameters by autograd."""
        self.terms[term] = value
        side = term.partition("_")[0]
        for outputs, gradient in gradients:
            for one, by_hand in zip(outputs, gradient, strict=True):
                if len(one):
                    self._of_side[side] = self._of_side[side] + weight * (one * torch.tensor(by_hand, dtype=one.dtype)).sum()

    def logits(self, rows: Sequence[EncodedRow], *, positions: str) -> tuple[list[Tensor], list[loops.Sequence]]:
        """The model's logits that predict each row's tokens, and the same as lists beside the target's."""
        outputs, sequences = [], []
        for row in rows:
            chosen = list(getattr(row, positions))
            before = [position - 1 for position in chosen]
            ids = torch.tensor([row.input_ids])
            own_TV = self.model(input_ids=ids).logits[0, before]
            with torch.no_grad():
                target_TV = self.target(input_ids=ids).logits[0, before]
            labels = [row.input_ids[position] for position in chosen]
            outputs.append(own_TV)
            sequences.append([loops.Token(*token) for token in zip(own_TV.tolist(), target_TV.tolist(), labels, strict=True)])
        return outputs, sequences

    def activations(self, lm: Any, rows: Sequence[EncodedRow]) -> list[Tensor]:
        found: list[Tensor] = []
        handle = decoder_layers(lm)[self.case.recipe.layer].register_forward_hook(lambda *of: found.append(of[2]))
        for row in rows:
            lm(input_ids=torch.tensor([row.input_ids[: len(row.input_ids) - row.num_padding]]))
        handle.remove()
        return [value[0] for value in found]

    def _forget(self) -> None:
        name, weight, forget = self.objective.name, self.weights.forget, self.forget
        if not forget:
            return
        if name in (ObjectiveName.RMU, ObjectiveName.ADAPTIVE_RMU):
            self._steered_forget()
            return
        outputs, answers = self.logits(forget, positions="scored")
        beta = self.objective.beta
        if name in (ObjectiveName.DPO, ObjectiveName.IDK_DPO):
            other_outputs, others = self.logits(self.alternative, positions="scored")
            value, gradient, other_gradient = loops.dpo(answers, others, beta=beta, token_mean=self.token_mean)
            self.add("forget_dpo", value, (outputs, gradient), (other_outputs, other_gradient), weight=weight)
            return
        averaged = {"by_sequence": self.by_sequence}
        term, (value, gradient) = {
            ObjectiveName.NPO: lambda: ("forget_npo", loops.npo(answers, beta=beta, token_mean=self.token_mean)),
            ObjectiveName.NPO_CE_KL: lambda: ("forget_npo", loops.npo(answers, beta=beta, token_mean=self.token_mean)),
            ObjectiveName.SIMNPO: lambda: ("forget_simnpo", loops.simnpo(answers, beta=beta, margin=self.objective.margin)),
            ObjectiveName.UNDIAL: lambda: ("forget_undial", loops.undial(answers, beta=beta, **averaged)),
            ObjectiveName.WGA: lambda: ("forget_wga", loops.wga(answers, beta=beta, **averaged)),
            ObjectiveName.SATIMP: lambda: ("forget_satimp", loops.satimp(answers, beta_1=beta, beta_2=self.objective.beta_2, **averaged)),
            ObjectiveName.CE_U: lambda: ("forget_ce_u", loops.ce_u(answers, skip_first=self.objective.skip_first_token, **averaged)),
            ObjectiveName.TASK_VECTOR_NEGATION: lambda: ("forget_ce", loops.cross_entropy(answers, **averaged)),
        }.get(name, lambda: ("forget_grad_ascent", loops.grad_ascent(answers, **averaged)))()
        self.add(term, value, (outputs, gradient), weight=weight)

    def _steered_forget(self) -> None:
        recipe = self.case.recipe
        values = self.activations(self.model, self.forget)
        goals = [(length * recipe.direction_D).double() for length in recipe.steering_B[: len(values)]]
        targets = [goal.expand(len(value), -1).tolist() for value, goal in zip(values, goals, strict=True)]
        value, gradient = loops.squared_distance([one.tolist() for one in values], targets, by_sequence=self.by_sequence)
        self.add("forget_rmu", value, (values, gradient), weight=self.weights.forget)

    def _retain(self) -> None:
        retain, averaged = self.retain, {"by_sequence": self.by_sequence}
        if not retain:
            return
        if self.weights.retain_ce > 0:
            outputs, answers = self.logits(retain, positions="scored")
            value, gradient = loops.cross_entropy(answers, **averaged)
            self.add("retain_ce", value, (outputs, gradient), weight=self.weights.retain_ce)
        if self.weights.retain_kl > 0:
            outputs, tokens = self.logits(retain, positions="evaluated")
            value, gradient = loops.retain_kl(tokens, **averaged)
            self.add("retain_kl", value, (outputs, gradient), weight=self.weights.retain_kl)
        if self.weights.retain_activation > 0:
            values = self.activations(self.model, retain)
            with torch.no_grad():
                targets = [value.tolist() for value in self.activations(self.target, retain)]
            value, gradient = loops.squared_distance([one.tolist() for one in values], targets, **averaged)
            self.add("retain_activation", value, (values, gradient), weight=self.weights.retain_activation)


@EVERY_OBJECTIVE
@settings(max_examples=6, deadline=None)
@given(data=st.data(), **SETS)
def test_a_step_is_what_plain_loops_over_full_logits_say(
    name: ObjectiveName, data: st.DataObject, num_forget: int, num_retain: int, seed: int, trains_head: bool
) -> None:
    """Every term's value and the gradient by every parameter: packing, the chunked head, the cached reference and its one vector per
    token are all nothing but faster ways to the same numbers."""
    objective = data.draw(objectives(name))
    case = draw_case(objective, num_forget=num_forget, num_retain=num_retain, seed=seed, trains_head=trains_head)
    expected, actual = PlainStep(case), update(case, micro_batch_size=2)
    size = max(1.0, actual.metrics["grad_norm"])
    assert list(actual.metrics["terms"]) == list(expected.terms)
    assert actual.metrics["terms"] == pytest.approx(expected.terms, rel=1e2 * TOLERANCE, abs=1e2 * TOLERANCE)
    torch.testing.assert_close(actual.gradient, expected.gradient, rtol=0, atol=1e2 * size * TOLERANCE)
    assert actual.metrics["grad_norm"] == pytest.approx(float(expected.gradient.norm()), rel=1e-10)


# --- invariances, each with a control that breaks it ---


@EVERY_OBJECTIVE
@settings(max_examples=4, deadline=None)
@given(data=st.data(), **SETS, pad_to=st.integers(15, 40))
def test_padding_does_not_change_the_update(
    name: ObjectiveName, data: st.DataObject, num_forget: int, num_retain: int, seed: int, trains_head: bool, pad_to: int
) -> None:
    objective = data.draw(objectives(name))
    case = draw_case(objective, num_forget=num_forget, num_retain=num_retain, seed=seed, trains_head=trains_head)
    expected = update(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "pack", partial(pack, pad_to=pad_to))
        actual = update(case)
    assert_same_update(actual, expected)


def test_padding_that_is_scored_changes_the_update() -> None:
    """Negative control: padding tokens that enter the loss like an answer make it depend on their number."""
    case = draw_case(ObjectiveConfig(name="grad_diff"))

    def scored_padding(rows: list[EncodedRow], *, pad_token_id: int, max_groups: int) -> Packed:
        padded = [replace(row, input_ids=row.input_ids + (pad_token_id,) * (30 - len(row.input_ids))) for row in rows]
        return pack(padded, pad_token_id=pad_token_id, max_groups=max_groups)

    expected = update(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "pack", scored_padding)
        assert relative_error(update(case), expected) > 1e-3


@EVERY_OBJECTIVE
@settings(max_examples=4, deadline=None)
@given(data=st.data(), **SETS, micro_batch_size=st.integers(1, 4))
def test_the_micro_batch_split_does_not_change_the_update(
    name: ObjectiveName, data: st.DataObject, num_forget: int, num_retain: int, seed: int, trains_head: bool, micro_batch_size: int
) -> None:
    objective = data.draw(objectives(name))
    case = draw_case(objective, num_forget=num_forget, num_retain=num_retain, seed=seed, trains_head=trains_head)
    assert_same_update(update(case, micro_batch_size=micro_batch_size), update(case))


def counts_of(case: Case, micro: MicroBatch) -> StepCounts:
    return step_counts(replace(case.plan, forget=micro.forget, retain=micro.retain), rows=case.rows)


@pytest.mark.parametrize("name", ["npo_ce_kl", "grad_diff", "rmu", "simnpo"])
def test_a_mean_per_micro_batch_would_change_the_update(name: str) -> None:
    """Negative control: each micro-batch divided by its own counts, then averaged, as most trainers did for years."""
    case = draw_case(ObjectiveConfig(name=name), num_forget=5, num_retain=5)
    micro_batches = split_step(case.plan, rank=0, world_size=1, micro_batch_size=2)
    own = iter([counts_of(case, micro) for micro in micro_batches])

    def mean_of_means(terms: tuple[LossTerm, ...], *, counts: StepCounts) -> Tensor:
        return step_loss(terms, counts=next(own)) / len(micro_batches)

    expected = update(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "step_loss", mean_of_means)
        actual = update(case, micro_batch_size=2)
    assert next(own, None) is None, "the control replaced every micro-batch's loss"
    assert relative_error(actual, expected) > 1e-3


@EVERY_OBJECTIVE
@settings(max_examples=4, deadline=None)
@given(data=st.data(), **SETS, world_size=st.integers(2, 4), micro_batch_size=st.integers(1, 4))
def test_the_number_of_ranks_does_not_change_the_update(
    name: ObjectiveName,
    data: st.DataObject,
    num_forget: int,
    num_retain: int,
    seed: int,
    trains_head: bool,
    world_size: int,
    micro_batch_size: int,
) -> None:
    """Ranks without any row take part too: with one pair on four ranks, three of them compute empty batches."""
    objective = data.draw(objectives(name))
    case = draw_case(objective, num_forget=num_forget, num_retain=num_retain, seed=seed, trains_head=trains_head)
    assert_same_update(update(case, world_size=world_size, micro_batch_size=micro_batch_size), update(case))


@pytest.mark.parametrize("name", ["npo_ce_kl", "grad_diff", "rmu", "simnpo"])
def test_counts_of_one_rank_would_change_the_update(name: str) -> None:
    """Negative control: every rank divides by its own counts and the ranks are averaged."""
    case = draw_case(ObjectiveConfig(name=name), num_forget=5, num_retain=5)

    def own_counts(plan: StepPlan, *, rows: EncodedTrial) -> StepCounts:
        mine = replace(plan, forget=plan.forget[RANK.value :: 2], retain=plan.retain[RANK.value :: 2])
        counts = step_counts(mine, rows=rows)
        doubled = (SideCounts(**{unit: 2 * count for unit, count in vars(side).items()}) for side in (counts.forget, counts.retain))
        return StepCounts(*doubled)

    expected = update(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "step_counts", own_counts)
        assert relative_error(update(case, world_size=2), expected) > 1e-3
    assert relative_error(update(case, world_size=2), expected) < TOLERANCE


# --- which tokens and which reference a row meets ---


def test_counts_come_from_the_plan_alone() -> None:
    """Two forget rows and one retain row filled up to 20 tokens: scored tokens, rows, looked-at tokens, real tokens."""
    case = draw_case(ObjectiveConfig(name="kl_min", kl_scope="padded"), num_forget=3, num_retain=2)
    forget, retain = case.rows.forget, case.rows.retain
    counts = step_counts(replace(case.plan, forget=(2, 0), retain=(1,)), rows=case.rows)
    scored = forget[2].num_scored + forget[0].num_scored
    assert counts.forget == SideCounts(scored, 2, scored, len(forget[2].input_ids) + len(forget[0].input_ids))
    assert counts.forget.later_tokens == scored - 2
    assert counts.retain == SideCounts(retain[1].num_scored, 1, MAX_LENGTH - 1, MAX_LENGTH - retain[1].num_padding)
    assert step_counts(replace(case.plan, forget=(), retain=()), rows=case.rows) == StepCounts(SideCounts(), SideCounts())


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("name", ["npo_ce_kl", "undial", "dpo", "rmu"])
def test_each_row_meets_its_own_reference(name: str, trains_head: bool) -> None:
    """The order of rows within a step changes nothing, because what belongs to them follows them; another row's changes it."""
    case = draw_case(ObjectiveConfig(name=name), num_forget=4, num_retain=2, seed=3, trains_head=trains_head)
    expected = update(case)
    assert_same_update(update(case, order=(2, 0, 3, 1), micro_batch_size=3), expected)
    assert len(case.reference.parts) == {"npo_ce_kl": 2, "undial": 2, "dpo": 2, "rmu": 1}[name]
    for part, values in case.reference.parts.items():
        others = replace(values, tensors={key: value.flip(0) for key, value in values.tensors.items()})
        swapped = replace(case.reference, parts={**case.reference.parts, part: others})
        assert relative_error(update(case, reference=swapped), expected) > 1e-3, part


def test_each_row_is_steered_to_its_own_length() -> None:
    case = draw_case(ObjectiveConfig(name="adaptive_rmu", retain_activation_weight=1.0), num_forget=4, num_retain=2)
    case = replace(case, recipe=replace(case.recipe, steering_B=torch.tensor([1.0, 2.0, 3.0, 4.0])))
    expected = update(case)
    assert_same_update(update(case, order=(2, 0, 3, 1), micro_batch_size=3), expected)
    swapped = replace(case, recipe=replace(case.recipe, steering_B=torch.tensor([4.0, 3.0, 2.0, 1.0])))
    assert relative_error(update(swapped), expected) > 1e-3


@pytest.mark.parametrize("trains_head", [False, True])
def test_the_kl_scopes_agree_where_they_mean_the_same_tokens(trains_head: bool) -> None:
    """A prompt of one token is never predicted, so the whole row is its answer; rows as long as max_length have no padding.
    Controls: with longer prompts, or with pads to fill, the scopes are different losses."""
    generator = torch.Generator().manual_seed(4)
    short = draw_rows(generator, number=3, num_prompts=(1, 1, 1))
    longer = draw_rows(generator, number=3)
    forget = draw_rows(generator, number=2)

    def kl(retain: list[EncodedRow], scope: str, **more: Any) -> Update:
        return update(
            case_of(ObjectiveConfig(name="kl_min", kl_scope=scope), forget=forget, retain=retain, trains_head=trains_head, **more)
        )

    assert_same_update(kl(short, "real"), kl(short, "answer"))
    assert relative_error(kl(longer, "real"), kl(longer, "answer")) > 1e-3
    full = [EncodedRow(row.row_id, (*row.input_ids, *range(9, 17))[:8], 3) for row in longer]
    assert_same_update(kl(full, "padded", max_length=8), kl(full, "real"))
    assert relative_error(kl(full, "padded"), kl(full, "real")) > 1e-3


def test_the_padded_scope_counts_and_compares_pads() -> None:
    """Its loss is the mean over max_length - 1 tokens per row: pads enter the sum as well as the count, and more of them change it."""
    objective = ObjectiveConfig(name="kl_min", kl_scope="padded")
    values = [update(draw_case(objective, max_length=length)) for length in (20, 26)]
    assert relative_error(values[1], values[0]) > 1e-3
    case = draw_case(objective)
    _, tokens = PlainStep(case).logits(case.rows.retain, positions="evaluated")
    per_token = [loops.retain_kl([[token]])[0] for sequence in tokens for token in sequence]
    assert len(per_token) == 3 * (MAX_LENGTH - 1)
    assert values[0].metrics["terms"]["retain_kl"] == pytest.approx(sum(per_token) / len(per_token), rel=1e-10)


def test_a_model_that_is_its_own_reference_has_no_kl() -> None:
    """KL(p || p) = 0 with gradient zero, in the form for frozen heads and in the one for trained heads."""
    for trains_head in (False, True):
        case = draw_case(ObjectiveConfig(name="kl_min", forget_weight=0.0, kl_scope="real"), trains_head=trains_head)
        parts = compute_parts(
            case.model,
            parts=set(case.reference.parts),
            request=reference_request(case.train, layer=None, trains_head=trains_head),
            rows=case.rows.retain,
            pad_token_id=PAD,
            device="cpu",
        )
        own = Reference(parts, head_VD=case.model.head_weight.detach().clone())
        same, moved = update(case, reference=own), update(case)
        assert abs(same.metrics["terms"]["retain_kl"]) < TOLERANCE
        assert same.metrics["grad_norm"] < TOLERANCE
        assert moved.metrics["terms"]["retain_kl"] > 1e-2
        assert moved.metrics["grad_norm"] > 1e-2


def test_a_forward_pass_is_cut_into_its_sets() -> None:
    """Forget rows come first, then their alternatives, then retain rows; each set numbers its rows from zero and keeps its tokens in
    row order."""
    case = draw_case(ObjectiveConfig(name="dpo", retain_ce_weight=1.0, retain_kl_weight=1.0, kl_scope="padded"), num_forget=3, num_retain=2)
    micro = MicroBatch(forget=(2, 0), retain=(1, 0))
    engine = LocalEngine(case.model, weight_decay=0.0, max_grad_norm=1.0)
    forget, retain, link = score_micro_batch(micro, engine=engine, rows=case.rows, reference=case.reference, recipe=case.recipe)
    assert forget.alternative is not None
    assert retain.distributions is not None
    plain = PlainStep(case)
    for scored, chosen in (
        (forget, [case.rows.forget[2], case.rows.forget[0]]),
        (forget.alternative, [case.rows.alternative[2], case.rows.alternative[0]]),
        (retain, [case.rows.retain[1], case.rows.retain[0]]),
    ):
        assert scored.num_rows == 2
        assert scored.row_N.tolist() == [0] * chosen[0].num_scored + [1] * chosen[1].num_scored
        tokens = [token for sequence in plain.logits(chosen, positions="scored")[1] for token in sequence]
        assert scored.token_log_probs_N.tolist() == pytest.approx([loops.log_prob(token) for token in tokens], abs=1e-11)
        if scored is not retain:
            expected = [loops.log_softmax(token.reference_logits)[token.label] for token in tokens]
            assert scored.reference_token_log_probs_N.tolist() == pytest.approx(expected, abs=1e-11)
    assert retain.distributions.row_K.tolist() == [0] * (MAX_LENGTH - 1) + [1] * (MAX_LENGTH - 1)
    assert float(link.detach()) == 0.0
    assert not any(scored.token_log_probs_N.numel() == 0 for scored in (forget, retain))


# --- what a step reports ---


def test_the_metrics_are_those_of_the_whole_step() -> None:
    """loss = sum of weight * term; the rate is that of step 1 of 10; the norm is the one before clipping at 1."""
    actual = update(draw_case(num_forget=4, num_retain=3, seed=1), world_size=3, micro_batch_size=1)
    terms = actual.metrics["terms"]
    assert list(terms) == ["forget_npo", "retain_ce", "retain_kl"]
    assert actual.metrics["loss"] == pytest.approx(terms["forget_npo"] + 0.5 * terms["retain_ce"] + 0.5 * terms["retain_kl"], abs=1e-12)
    assert (actual.metrics["step"], actual.metrics["epoch"], actual.metrics["learning_rate"]) == (1, 1.0, 1e-2)
    assert actual.metrics["grad_norm"] == pytest.approx(float(actual.gradient.norm()), rel=1e-12)
    assert actual.metrics["grad_norm"] > 1


def test_ng_diff_adds_two_gradients_of_length_one() -> None:
    """Its update is that of neither weight: scaling a side's loss changes nothing, and with one side alone the norm is 1."""
    case = draw_case(ObjectiveConfig(name="ng_diff"))
    expected = update(case)
    for weights in (Weights(forget=7.0, retain_ce=1.0), Weights(forget=1.0, retain_ce=0.1)):
        actual = update(replace(case, recipe=replace(case.recipe, weights=weights)))
        torch.testing.assert_close(actual.gradient, expected.gradient, rtol=0, atol=1e-11)
    without = draw_case(ObjectiveConfig(name="ng_diff"), num_retain=0)
    assert update(without).metrics["grad_norm"] == pytest.approx(1.0, abs=1e-12)
    assert expected.metrics["grad_norm"] < 2
    control = update(draw_case(ObjectiveConfig(name="grad_diff")))
    assert relative_error(control, expected) > 1e-3, "negative control: without normalisation it is GradDiff"


def test_both_passes_of_ng_diff_drop_the_same_activations() -> None:
    """The norms are those of the gradient that is then taken: with dropout, and one side alone, its length is still 1."""
    lm = add_lora(random_lm(), lora=LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5), seed=0).double()
    fuse_adapters(lm)
    with torch.no_grad():
        for value in lm.parameters():
            if value.requires_grad:
                value.add_(0.1)
    case = draw_case(ObjectiveConfig(name="ng_diff"), num_forget=3, num_retain=0)
    engine = LocalEngine(ScoringModel(lm), weight_decay=0.0, max_grad_norm=1.0)
    train = case.train.model_copy(update={"per_device_train_batch_size": 2})
    given = {"engine": engine, "rows": case.rows, "reference": case.reference, "recipe": case.recipe, "train": train}
    torch.manual_seed(0)  # what was drawn before the step must not matter
    assert train_step(case.plan, **given)["grad_norm"] == pytest.approx(1.0, abs=1e-12)
    honest, seeds = step.set_step_seed, iter((1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "set_step_seed", lambda *, seed, step, rank: honest(seed=next(seeds), step=step, rank=rank))
        other = train_step(case.plan, **given)["grad_norm"]
    assert abs(other - 1.0) > 1e-3, "negative control: with other masks in the second pass it is not"


def test_adaptive_rmu_steers_each_task_by_its_own_mean_norm() -> None:
    """Norms 1, 2, 3, 6 of tasks a, b, a, b: means 2 and 4, in the order of the rows, times the steering."""
    norms_R = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert task_means(norms_R, tasks=["a", "b", "a", "b"]).tolist() == [2.0, 4.0, 2.0, 4.0]
    assert task_means(norms_R[:0], tasks=[]).shape == (0,)
    case = draw_case(ObjectiveConfig(name="adaptive_rmu", steering=3.0), num_forget=4)
    plain = PlainStep(case)
    with torch.no_grad():
        means = [float(value.norm(dim=1).mean()) for value in plain.activations(plain.target, case.rows.forget)]
    expected = [3 * (means[index % 2] + means[index % 2 + 2]) / 2 for index in range(4)]
    assert case.recipe.steering_B.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(case.recipe.direction_D.norm()) == pytest.approx(1.0, rel=1e-6)
    fixed = draw_case(ObjectiveConfig(name="rmu", steering=3.0), num_forget=4)
    assert fixed.recipe.steering_B.tolist() == [3.0] * 4


def test_a_cycles_first_step_forgets_the_optimizers_moments_and_no_other() -> None:
    case = draw_case(ObjectiveConfig(name="grad_diff"))
    engine = LocalEngine(copy.deepcopy(case.model), weight_decay=0.0, max_grad_norm=1.0)
    ages = []
    for number, cycle_step in ((1, 1), (2, 2), (3, 1), (4, 2)):
        plan = replace(case.plan, step=number, cycle_step=cycle_step)
        train_step(plan, engine=engine, rows=case.rows, reference=case.reference, recipe=case.recipe, train=case.train)
        ages.append((engine.state().optimizer_step, engine.state().optimizer_age))
    assert ages == [(1, 1), (2, 2), (3, 1), (4, 2)]


# --- the device is not waited for ---

WAITING = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "bincount",
    "equal",
    "repeat_interleave.Tensor",
)
"""Operations whose result, or its shape, must come back to the host before it can go on."""


class Waits(TorchDispatchMode):
    """Notes every operation that waits for the device, and where the passes of a step lie between them."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        is_mask = "index" in name and any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for argument in arguments if isinstance(argument, (list, tuple)) for one in argument
        )  # fmt: skip
        if is_mask or any(name.removeprefix("_").startswith(word.removeprefix("_")) for word in WAITING):
            self.events.append(name)
        return function(*arguments, **(keywords or {}))

    @property
    def inside(self) -> list[str]:
        """What happened between the first forward pass and the last backward pass."""
        last = len(self.events) - 1 - self.events[::-1].index("backward")
        return [event for event in self.events[self.events.index("forward") : last] if event not in ("forward", "backward")]

    @property
    def number(self) -> int:
        """How often the step waited."""
        return sum(event not in ("forward", "backward") for event in self.events)


def watched_step(case: Case, *, micro_batch_size: int) -> Waits:
    """One step under adapters with dropout, as trials have them."""
    waits = Waits()
    lm = add_lora(random_lm(), lora=LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5), seed=0)
    fuse_adapters(lm)

    class Watched(LocalEngine):
        def forward(self, *arguments: Any) -> Any:
            waits.events.append("forward")
            return super().forward(*arguments)

        def backward(self, loss: Tensor, *, last: bool) -> None:
            super().backward(loss, last=last)
            waits.events.append("backward")

    engine = Watched(ScoringModel(lm), weight_decay=0.0, max_grad_norm=1.0)
    train = case.train.model_copy(update={"per_device_train_batch_size": micro_batch_size})
    with waits:
        train_step(case.plan, engine=engine, rows=case.rows, reference=case.reference, recipe=case.recipe, train=train)
    return waits


@EVERY_OBJECTIVE
def test_nothing_waits_for_the_device_inside_a_step_and_a_step_waits_equally_often_however_it_is_split(name: ObjectiveName) -> None:
    """Only NGDiff waits before its update's passes: for the two norms. A hot loop that waits runs at the speed of the host."""
    objective = ObjectiveConfig(name=name, retain_ce_weight=0.5, retain_kl_weight=0.5, kl_scope="real")
    case = draw_case(objective, num_forget=4, num_retain=4, trains_head=False)
    whole, split = (watched_step(case, micro_batch_size=size) for size in (4, 1))
    assert len(split.inside) == (2 if name is ObjectiveName.NG_DIFF else 0)
    assert split.number == whole.number <= 6
    assert split.events.count("backward") == 4


def test_a_value_that_is_read_inside_a_step_is_noticed() -> None:
    """The negative control."""
    case = draw_case(ObjectiveConfig(name="grad_diff"), trains_head=False)

    def reading(terms: tuple[LossTerm, ...], *, counts: StepCounts) -> Tensor:
        loss = step_loss(terms, counts=counts)
        assert math.isfinite(float(loss.detach()))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "step_loss", reading)
        assert len(watched_step(case, micro_batch_size=1).inside) == 4


# --- a loss that is not finite ---


def poisoned(reference: Reference, *, row: int) -> Reference:
    """The same reference with one forget row's log-probabilities replaced by NaN."""
    values = reference.parts[Part.FORGET_LOG_PROBS]
    log_probs = values.tensors["log_prob"].clone()
    log_probs[values.start[row] : values.start[row + 1]] = math.nan
    return replace(reference, parts={**reference.parts, Part.FORGET_LOG_PROBS: replace(values, tensors={"log_prob": log_probs})})


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("row", [0, 1])
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_update(world_size: int, row: int) -> None:
    """Row 1 lies on rank 1 alone; the others have seen finite losses only and stop all the same."""
    case = draw_case(num_forget=3, num_retain=3, seed=4)
    plan = replace(case.plan, step=7, cycle_step=7)
    before = flatten(case.model.trainable())

    def work(meeting: Meeting, rank: int) -> tuple[str, bool, int]:
        engine = ThreadEngine(copy.deepcopy(case.model), meeting=meeting, rank=rank)
        with pytest.raises(DivergedError) as caught:
            train_step(
                plan,
                engine=engine,
                rows=case.rows,
                reference=poisoned(case.reference, row=row),
                recipe=case.recipe,
                train=case.train,
            )
        return str(caught.value), torch.equal(flatten(engine.model.trainable()), before), engine.state().optimizer_step

    results = run_threads(work, world_size=world_size)
    assert len(results) == world_size
    for message, is_unchanged, num_updates in results:
        assert "the loss is nan at step 7" in message
        assert "none was made" in message
        assert is_unchanged
        assert num_updates == 0


def test_a_gradient_of_ng_diff_that_is_not_finite_stops_before_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms are looked at first: one over infinity would silently drop a side."""
    case = draw_case(ObjectiveConfig(name="ng_diff"))
    honest = step.step_loss
    monkeypatch.setattr(step, "step_loss", lambda terms, *, counts: honest(terms, counts=counts) * math.inf)
    engine = LocalEngine(copy.deepcopy(case.model), weight_decay=0.0, max_grad_norm=1.0)
    with pytest.raises(DivergedError, match=r"the forget gradient's norm is (nan|inf) at step 1"):
        train_step(case.plan, engine=engine, rows=case.rows, reference=case.reference, recipe=case.recipe, train=case.train)
    assert engine.state().optimizer_step == 0


def clean_step_then_poisoned_step(*, rank: Rank, inputs: TrialInputs, train: TrainConfig, poisoned_rank: int) -> dict:
    """On one rank: a first step that updates, then one in which only ``poisoned_rank`` computes a NaN."""
    start_process_group(rank)
    rows = encode_trial(inputs, train=train)
    model = build_model(inputs, train=train)
    reference = trial_reference(model, inputs=inputs, rows=rows, train=train, device=rank.device)
    recipe = build_recipe(train, rows=rows, reference=reference, layer=None, hidden_size=model.head_weight.shape[1])
    engine = build_engine(model, train=train, device=rank.device)
    plans = plan_trial(train=train, num_forget=len(rows.forget), num_retain=len(rows.retain))
    given: dict[str, Any] = {"engine": engine, "rows": rows, "recipe": recipe, "train": train}
    try:
        start = engine.state().weights
        loss = train_step(plans[0], reference=reference, **given)["loss"]
        before = engine.state().weights
        if rank.rank == poisoned_rank:
            for row in range(len(rows.forget)):
                reference = poisoned(reference, row=row)
        error = ""
        try:
            train_step(plans[1], reference=reference, **given)
        except DivergedError as caught:
            error = str(caught)
        after = engine.state()
        return {
            "loss": loss,
            "first step changed": any(not torch.equal(before[name], start[name]) for name in start),
            "error": error,
            "second step changed": any(not torch.equal(after.weights[name], before[name]) for name in before),
            "updates": after.optimizer_step,
        }
    finally:
        engine.close()
        stop_process_group(rank)


@pytest.mark.ranks
def test_a_nan_on_one_of_two_processes_stops_both(tmp_path: Path) -> None:
    """With ZeRO 2, the rank that saw nothing wrong must not go on: it would wait for the other for ever."""
    inputs = tiny_inputs(tmp_path)
    train = tiny_train(engine=EngineConfig(name="deepspeed", zero_stage=2, ranks=2), per_device_train_batch_size=2)
    prepare_reference(inputs, train=train)
    results = run_ranks(clean_step_then_poisoned_step, world_size=2, inputs=inputs, train=train, poisoned_rank=1)
    assert results[0] == results[1]
    assert math.isfinite(results[0]["loss"])
    assert results[0]["first step changed"]
    assert "the loss is nan at step 2" in results[0]["error"]
    assert not results[0]["second step changed"]
    assert results[0]["updates"] == 1


def test_the_local_engine_clips_the_gradient_and_reports_the_norm_before() -> None:
    """AdamW hides a common factor, so the clipped gradient is read where the optimizer reads it."""
    case = draw_case(num_forget=2, num_retain=2, seed=5)
    engine = LocalEngine(copy.deepcopy(case.model), weight_decay=0.0, max_grad_norm=0.5)
    seen: list[float] = []
    read: Callable[..., None] = lambda *_: seen.append(  # noqa: E731
        math.sqrt(sum(float(value.grad.square().sum()) for value in engine.model.trainable().values()))
    )
    engine._optimizer.register_step_pre_hook(read)
    metrics = train_step(case.plan, engine=engine, rows=case.rows, reference=case.reference, recipe=case.recipe, train=case.train)
    assert seen == [pytest.approx(0.5, rel=1e-5)]
    assert metrics["grad_norm"] > 0.5
    assert all(value.grad is None for value in engine.model.trainable().values())
