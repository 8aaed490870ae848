"""One optimizer step: count, forward and backward for each micro-batch, check, update.

Shape suffixes: S tokens of all rows, N evaluated or scored tokens, M tokens of one set, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainers.config import ObjectiveConfig, ObjectiveName, TrainConfig
from trainers.data.encode import EncodedRow
from trainers.data.packing import Packed, pack
from trainers.engine.base import Engine, TrainingState
from trainers.errors import RunError
from trainers.objectives.ng_diff import normalised_coefficients
from trainers.objectives.rmu import control_vector
from trainers.objectives.table import Need, Weights, needs, objective_terms, resolve, resolve_weights
from trainers.objectives.terms import Activations, Distributions, LossTerm, Scored, Side, SideCounts, StepCounts, step_loss
from trainers.plan import MicroBatch, StepPlan, split_step
from trainers.reference import Part, Reference, ReferenceRequest
from trainers.schedule import learning_rate
from trainers.scoring import Request, Scores, Segment, set_step_seed
from trainers.trial_rows import EncodedTrial
from trainers.vocabulary import VocabularyScores


class DivergedError(RunError):
    """The loss stopped being finite; no update was made with it."""


@dataclass(frozen=True)
class Recipe:
    """An objective in the form that steps read: published defaults filled in, its needs looked up, its layer counted out.

    Args:
        objective: without nulls.
        weights: of its terms.
        needs: what it needs beside log-probabilities.
        layer: decoder layer whose activations it steers, from 0; None without that need.
        steering_B: target norm of each forget row's activations; None without that need.
        direction_D: unit vector that they are pulled to.
    """

    objective: ObjectiveConfig
    weights: Weights
    needs: frozenset[Need]
    layer: int | None = None
    steering_B: Tensor | None = None
    direction_D: Tensor | None = None


def reference_request(train: TrainConfig, *, layer: int | None, trains_head: bool) -> ReferenceRequest:
    """The parts of the reference that a trial reads."""
    wanted = needs(train.objective)
    parts: set[Part] = set()
    if Need.FORGET_REFERENCE_LOG_PROBS in wanted:
        parts.add(Part.FORGET_LOG_PROBS)
    if Need.ALTERNATIVE_ANSWERS in wanted:
        parts.add(Part.ALTERNATIVE_LOG_PROBS)
    if Need.FORGET_DISTRIBUTIONS in wanted:
        parts.add(Part.FORGET_DISTRIBUTIONS)
    if Need.RETAIN_DISTRIBUTIONS in wanted:
        parts.add(Part.RETAIN_DISTRIBUTIONS)
    if Need.ACTIVATIONS in wanted:
        if resolve_weights(train.objective).retain_activation > 0:
            parts.add(Part.RETAIN_ACTIVATIONS)
        if train.objective.name is ObjectiveName.ADAPTIVE_RMU:
            parts.add(Part.FORGET_NORMS)
    return ReferenceRequest(frozenset(parts), trains_head=trains_head, layer=layer)


def build_recipe(train: TrainConfig, *, rows: EncodedTrial, reference: Reference, layer: int | None, hidden_size: int) -> Recipe:
    """The objective of a trial, ready for its steps."""
    objective = resolve(train.objective)
    recipe = Recipe(objective, resolve_weights(objective), needs(objective), layer)
    if Need.ACTIVATIONS not in recipe.needs:
        return recipe
    assert objective.steering is not None, "resolved"
    norms_B = torch.ones(len(rows.forget))
    if objective.name is ObjectiveName.ADAPTIVE_RMU:
        norms_B = task_means(reference.forget_norms(), tasks=rows.forget_tasks)
    return replace(recipe, steering_B=objective.steering * norms_B, direction_D=control_vector(hidden_size, seed=train.seed))


def task_means(norms_R: Tensor, *, tasks: Sequence[str]) -> Tensor:
    """For each row the mean over the rows of its task, shape (R,): adaptive RMU steers each task by its own norm.

    The published code measures the norm on the first batch of a task; here it is the mean over all of the task's rows, which
    depends on neither order nor batch size.
    """
    means = {task: norms_R[[index for index, other in enumerate(tasks) if other == task]].float().mean() for task in dict.fromkeys(tasks)}
    return torch.stack([means[task] for task in tasks]) if tasks else norms_R


def step_counts(plan: StepPlan, *, rows: EncodedTrial) -> StepCounts:
    """Tokens, sequences and positions of the whole step, over all ranks and micro-batches.

    Every rank knows every row of the plan, so the sums need no communication and cannot differ between ranks.
    """

    def side(chosen: Sequence[EncodedRow]) -> SideCounts:
        return SideCounts(
            tokens=sum(row.num_scored for row in chosen),
            sequences=len(chosen),
            positions=sum(len(row.evaluated) for row in chosen),
            real_tokens=sum(len(row.input_ids) - row.num_padding for row in chosen),
        )

    return StepCounts(side([rows.forget[index] for index in plan.forget]), side([rows.retain[index] for index in plan.retain]))


def score_micro_batch(
    micro: MicroBatch, *, engine: Engine, rows: EncodedTrial, reference: Reference, recipe: Recipe, look: bool = False
) -> tuple[Scored, Scored, Tensor]:
    """One forward pass over a micro-batch's rows, cut into its two sets, each with its reference; and a zero tied to all parameters.

    Args:
        look: take the pass whose gradients are only looked at.
    """
    forget = [rows.forget[index] for index in micro.forget]
    alternative = [rows.alternative[index] for index in micro.forget] if Need.ALTERNATIVE_ANSWERS in recipe.needs else []
    retain = [rows.retain[index] for index in micro.retain]
    ends = (len(forget), len(forget) + len(alternative), len(forget) + len(alternative) + len(retain))
    batch = pack([*forget, *alternative, *retain], pad_token_id=rows.pad_token_id, max_groups=engine.model.max_groups)
    host, batch = batch, batch.to(engine.device)
    device = engine.device
    steers = Need.ACTIVATIONS in recipe.needs

    def distributions(part: Part, chosen: Sequence[int], *, wanted: bool) -> Any:
        return reference.distributions(part, chosen, device=device) if wanted else None

    compares = Need.RETAIN_DISTRIBUTIONS in recipe.needs
    segments: dict[str, Segment] = {}
    if not steers:
        undial = distributions(Part.FORGET_DISTRIBUTIONS, micro.forget, wanted=Need.FORGET_DISTRIBUTIONS in recipe.needs)
        segments["forget"] = Segment(0, host.first_evaluated[ends[0]], undial, mean_logit=Need.MEAN_LOGITS in recipe.needs)
    if Need.ALTERNATIVE_ANSWERS in recipe.needs:
        segments["alternative"] = Segment(host.first_evaluated[ends[0]], host.first_evaluated[ends[1]])
    if compares or recipe.weights.retain_ce > 0:
        kept = distributions(Part.RETAIN_DISTRIBUTIONS, micro.retain, wanted=compares)
        segments["retain"] = Segment(host.first_evaluated[ends[1]], host.first_evaluated[ends[2]], kept)
    request = Request(tuple(segments.values()), layer=recipe.layer if steers else None)
    scores = engine.look(batch, request) if look else engine.forward(batch, request)
    by_side = dict(zip(segments, scores.segments, strict=True))

    def log_probs(part: Part) -> Tensor | None:
        return reference.log_probs(part, micro.forget, device=device) if part in reference.parts else None

    def side(name: str, start: int, stop: int, **more: Any) -> Scored:
        return _side(by_side.get(name), segment=segments.get(name), batch=batch, start=start, stop=stop, **more)

    forget_steered = retain_steered = None
    if steers:
        assert scores.activations_SD is not None
        forget_steered = _forget_activations(scores.activations_SD, host=host, micro=micro, recipe=recipe)
        if recipe.weights.retain_activation > 0:
            retain_steered = _activations(
                scores.activations_SD, host=host, start=ends[1], stop=ends[2], target_MD=reference.activations(micro.retain, device=device)
            )
    other = None
    if "alternative" in segments:
        other = side("alternative", ends[0], ends[1], reference_N=log_probs(Part.ALTERNATIVE_LOG_PROBS))
    return (
        side("forget", 0, ends[0], reference_N=log_probs(Part.FORGET_LOG_PROBS), alternative=other, activations=forget_steered),
        side("retain", ends[1], ends[2], activations=retain_steered),
        _link(scores),
    )


def _link(scores: Scores) -> Tensor:
    return scores.link if scores.activations_SD is None else scores.link + scores.activations_SD[:0].sum()


def _side(
    scores: VocabularyScores | None,
    *,
    segment: Segment | None,
    batch: Packed,
    start: int,
    stop: int,
    reference_N: Tensor | None = None,
    alternative: Scored | None = None,
    activations: Activations | None = None,
) -> Scored:
    """One set's part of a forward pass; rows are counted from the set's first."""
    if scores is None or segment is None:
        nothing = batch.source_N[:0]
        return Scored(nothing.float(), nothing, stop - start, activations=activations)
    row_K = batch.row_N[segment.start : segment.stop] - start
    scored = batch.scored_of(start, stop)

    def choose(values: Tensor | None) -> Any:
        return values if values is None or scored is None else values.index_select(0, scored)

    distributions = None
    if segment.reference is not None:
        assert scores.reference_mean_logit_N is not None
        distributions = Distributions(scores.log_normaliser_N, scores.reference_mean_logit_N, segment.reference.negative_entropy_N, row_K)
    return Scored(
        token_log_probs_N=choose(scores.log_prob_N),
        row_N=choose(row_K),
        num_rows=stop - start,
        log_normaliser_N=choose(scores.log_normaliser_N),
        mean_logit_N=choose(scores.mean_logit_N),
        reference_token_log_probs_N=reference_N,
        distributions=distributions,
        alternative=alternative,
        activations=activations,
    )


def _activations(activations_SD: Tensor, *, host: Packed, start: int, stop: int, target_MD: Tensor) -> Activations:
    tokens, row_M = host.tokens_of(start, stop)
    values_MD = activations_SD.index_select(0, tokens.to(activations_SD.device, non_blocking=True))
    return Activations(values_MD, target_MD, row_M.to(activations_SD.device, non_blocking=True))


def _forget_activations(activations_SD: Tensor, *, host: Packed, micro: MicroBatch, recipe: Recipe) -> Activations:
    """Activations at the forget rows' tokens, and the control vector scaled for each row."""
    assert recipe.steering_B is not None
    assert recipe.direction_D is not None
    _, row_M = host.tokens_of(0, len(micro.forget))
    length_M = recipe.steering_B[torch.tensor(micro.forget, dtype=torch.int64)].index_select(0, row_M)
    target_MD = (length_M[:, None] * recipe.direction_D).to(activations_SD.device, non_blocking=True)
    return _activations(activations_SD, host=host, start=0, stop=len(micro.forget), target_MD=target_MD)


def side_norms(
    micro_batches: Sequence[MicroBatch],
    *,
    engine: Engine,
    rows: EncodedTrial,
    reference: Reference,
    recipe: Recipe,
    counts: StepCounts,
) -> tuple[float, float]:
    """Euclidean norms of the step's forget gradient and of its retain gradient, over all ranks; collective.

    It costs a forward pass and two backward passes beside the update's own.
    """
    parameters = list(engine.model.trainable().values())
    gradients: dict[Side, list[Tensor]] = {}
    for micro in micro_batches:
        forget, retain, link = score_micro_batch(micro, engine=engine, rows=rows, reference=reference, recipe=recipe, look=True)
        terms = objective_terms(recipe.objective, forget=forget, retain=retain, weights=recipe.weights)
        for side in Side:
            own = tuple(term for term in terms if term.side is side)
            if not own:
                continue  # no term of this side has a weight, on any rank
            loss = step_loss(own, counts=counts) + link
            found = torch.autograd.grad(loss, parameters, retain_graph=side is Side.FORGET, allow_unused=True, materialize_grads=True)
            wide = [part if part.dtype == torch.float64 else part.float() for part in found]
            gradients[side] = [one.add_(two) for one, two in zip(gradients[side], wide, strict=True)] if side in gradients else wide
    for parts in gradients.values():
        engine.sum_tensors(parts)
    norms = {side: float(torch.stack([part.norm() for part in parts]).norm()) for side, parts in gradients.items()}
    return norms.get(Side.FORGET, 0.0), norms.get(Side.RETAIN, 0.0)


def train_step(
    plan: StepPlan,
    *,
    engine: Engine,
    rows: EncodedTrial,
    reference: Reference,
    recipe: Recipe,
    train: TrainConfig,
) -> dict[str, Any]:
    """One optimizer step; collective. The metrics are those of the whole step, the same on every rank.

    Nothing waits for the device between the first forward pass and the last backward pass.

    Raises:
        DivergedError: on every rank, before the update, if the step's loss is not finite.
    """
    micro_batches = split_step(plan, rank=engine.rank, world_size=engine.world_size, micro_batch_size=train.micro_batch_size)
    counts = step_counts(plan, rows=rows)
    if plan.fresh_optimizer:
        engine.reset_optimizer()
    weights = recipe.weights
    if Need.SIDE_GRADIENTS in recipe.needs:
        set_step_seed(seed=train.seed, step=plan.step, rank=engine.rank)
        weights = _normalised(
            side_norms(micro_batches, engine=engine, rows=rows, reference=reference, recipe=recipe, counts=counts),
            weights=weights,
            step=plan.step,
        )
    set_step_seed(seed=train.seed, step=plan.step, rank=engine.rank)
    names: list[tuple[str, Side]] = []
    totals: Tensor | None = None
    for position, micro in enumerate(micro_batches):
        forget, retain, link = score_micro_batch(micro, engine=engine, rows=rows, reference=reference, recipe=recipe)
        terms = objective_terms(recipe.objective, forget=forget, retain=retain, weights=weights)
        loss = step_loss(terms, counts=counts) + link
        engine.backward(loss, last=position == len(micro_batches) - 1)
        values = torch.stack([loss.detach().double(), *_shares(terms, counts=counts)])
        names, totals = [(term.name, term.side) for term in terms], values if totals is None else totals + values
    assert totals is not None, "a step has at least one micro-batch"
    loss_value, *term_values = engine.sum(totals)
    _check_finite("loss", loss_value, step=plan.step, why="the update would have destroyed the model; none was made")
    rate = learning_rate(train, cycle_step=plan.cycle_step, cycle_steps=plan.cycle_steps)
    norm = engine.step(learning_rate=rate)
    _check_finite("gradient norm", norm, step=plan.step, why="the update would have destroyed the model; none was made")
    return {
        "step": plan.step,
        "epoch": round(plan.epoch, 4),
        "loss": loss_value,
        # A set without rows has no loss, which is something else than a loss of zero.
        "terms": {name: value for (name, side), value in zip(names, term_values, strict=True) if getattr(plan, side.value)},
        "learning_rate": rate,
        "grad_norm": norm,
    }


def _shares(terms: Sequence[LossTerm], *, counts: StepCounts) -> list[Tensor]:
    """Each term's share of its mean over the step, without its weight."""
    return [term.total.detach().double() / counts.of(term) for term in terms]


def _normalised(norms: tuple[float, float], *, weights: Weights, step: int) -> Weights:
    for name, norm in zip(("forget gradient's norm", "retain gradient's norm"), norms, strict=True):
        _check_finite(name, norm, step=step, why="no update was made with it")
    factors = normalised_coefficients(forget_norm=norms[0], retain_norm=norms[1])
    return replace(
        weights,
        forget=weights.forget * factors.forget,
        retain_ce=weights.retain_ce * factors.retain,
        retain_kl=weights.retain_kl * factors.retain,
        retain_activation=weights.retain_activation * factors.retain,
    )


def _check_finite(name: str, value: float, *, step: int, why: str) -> None:
    if not math.isfinite(value):
        raise DivergedError(f"the {name} is {value} at step {step}", why=why, fix="lower train.learning_rate or add a retain term")


def check_finite_weights(state: TrainingState) -> None:
    """Refuse weights that the last update made infinite or undefined: the loss of a next step would tell, but there may be none.

    Raises:
        DivergedError: on every rank, because all of them hold the same state.
    """
    broken = [name for name, value in state.weights.items() if not bool(value.isfinite().all())]
    if broken:
        raise DivergedError(
            f"{len(broken)} of {len(state.weights)} trained tensors are not finite after step {state.optimizer_step}, "
            f"the first is {broken[0]}",
            why="the update has destroyed the model; no checkpoint holds it",
            fix="lower train.learning_rate or add a retain term",
        )


def history_of(metrics: Sequence[Mapping[str, Any]], *, term: str) -> list[float]:
    """A term's values in the order of the steps that had it."""
    return [line["terms"][term] for line in metrics if term in line["terms"]]
