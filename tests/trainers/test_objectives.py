"""What every objective computes: its value and its gradient, against loops in float64 and against worked numbers.

Shape suffixes: N scored tokens, K compared positions, M tokens, B rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import reference_objectives as loops
from trainers.config import Average, KlScope, ObjectiveConfig, ObjectiveName, Reduction
from trainers.data.encode import EncodedRow
from trainers.data.packing import pack
from trainers.objectives.ce_u import ce_u_term
from trainers.objectives.demoted_label import demoted_cross_entropy
from trainers.objectives.dpo import dpo_term
from trainers.objectives.grad_ascent import grad_ascent_term
from trainers.objectives.log_probs import sum_by_row, token_log_probs, tokens_by_row
from trainers.objectives.ng_diff import normalised_coefficients
from trainers.objectives.npo import npo_term
from trainers.objectives.retain_ce import retain_ce_term
from trainers.objectives.retain_kl import kl_reference_model
from trainers.objectives.rmu import activation_term, control_vector
from trainers.objectives.satimp import satimp_term
from trainers.objectives.simnpo import simnpo_term
from trainers.objectives.table import (
    OBJECTIVES,
    Need,
    Weights,
    needs,
    objective_terms,
    resolve,
    resolve_weights,
    unused_settings,
)
from trainers.objectives.terms import Activations, Distributions, LossTerm, Scored, Side, SideCounts, StepCounts, Unit, step_loss
from trainers.objectives.undial import undial_term
from trainers.objectives.wga import wga_term

FLOAT64_TOLERANCE = 1e-12
"""Relative, and absolute. Measured over 100 seeds: at most 5e-15; a wrong share, sign or factor is off in the first digits."""

FLOAT32_TOLERANCE = 1e-5
"""Relative, and absolute. Measured over 100 seeds: at most 2.3e-6 (CE-U, which divides by small remainders) and 8e-7 elsewhere;
log-softmax in bfloat16 errs by 1e-3 and more."""


# --- a step's data, as tensors and as lists ---


@dataclass(frozen=True)
class Tokens:
    """Tokens of some rows: logits of model and reference, and labels."""

    logits_NV: Tensor
    reference_NV: Tensor
    label_N: Tensor
    lengths: tuple[int, ...]

    @property
    def row_N(self) -> Tensor:
        return rows_of(self.lengths)

    @property
    def distributions(self) -> Distributions:
        q_NV = self.reference_NV.detach().softmax(dim=1)
        return Distributions(
            log_normaliser_K=self.logits_NV.logsumexp(dim=1),
            reference_mean_logit_K=(q_NV * self.logits_NV).sum(dim=1),
            reference_negative_entropy_K=(q_NV * self.reference_NV.log_softmax(dim=1)).sum(dim=1),
            row_K=self.row_N,
        )

    @property
    def scored(self) -> Scored:
        return Scored(
            token_log_probs_N=token_log_probs(self.logits_NV, label_N=self.label_N),
            row_N=self.row_N,
            num_rows=len(self.lengths),
            log_normaliser_N=self.logits_NV.logsumexp(dim=1),
            mean_logit_N=(self.logits_NV.softmax(dim=1).detach() * self.logits_NV).sum(dim=1),
            reference_token_log_probs_N=token_log_probs(self.reference_NV, label_N=self.label_N),
            distributions=self.distributions,
        )

    @property
    def sequences(self) -> list[loops.Sequence]:
        tokens = [
            loops.Token(logits, reference, label)
            for logits, reference, label in zip(self.logits_NV.tolist(), self.reference_NV.tolist(), self.label_N.tolist(), strict=True)
        ]
        return cut(tokens, self.lengths)

    def of_rows(self, order: list[int]) -> Tokens:
        """Some rows in some order, tied to the same logits."""
        index_N = torch.tensor(
            [place for row in order for place in cut(list(range(sum(self.lengths))), self.lengths)[row]], dtype=torch.int64
        )
        return Tokens(self.logits_NV[index_N], self.reference_NV[index_N], self.label_N[index_N], tuple(self.lengths[row] for row in order))

    def to(self, dtype: torch.dtype) -> Tokens:
        return replace(self, logits_NV=self.logits_NV.detach().to(dtype).requires_grad_(), reference_NV=self.reference_NV.to(dtype))


@dataclass(frozen=True)
class OneSet:
    """One set of a step: its answers, other answers to the same prompts, positions to compare, and activations at all tokens."""

    answers: Tokens
    alternatives: Tokens
    positions: Tokens
    activation_MD: Tensor
    target_MD: Tensor
    real_lengths: tuple[int, ...]

    def scored(self, side: Side) -> Scored:
        """What the loop provides: UNDIAL compares at the scored forget tokens, KL at positions of its own on the retain set."""
        return replace(
            self.answers.scored,
            distributions=(self.answers if side is Side.FORGET else self.positions).distributions,
            alternative=self.alternatives.scored,
            activations=Activations(self.activation_MD, self.target_MD, rows_of(self.real_lengths)),
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {
            "answers": self.answers.logits_NV,
            "alternatives": self.alternatives.logits_NV,
            "positions": self.positions.logits_NV,
            "activations": self.activation_MD,
        }

    @property
    def counts(self) -> SideCounts:
        return SideCounts(
            tokens=len(self.answers.label_N),
            sequences=len(self.answers.lengths),
            positions=len(self.positions.label_N),
            real_tokens=len(self.activation_MD),
        )

    def of_rows(self, order: list[int]) -> OneSet:
        index_M = torch.tensor(
            [m for row in order for m in cut(list(range(sum(self.real_lengths))), self.real_lengths)[row]], dtype=torch.int64
        )
        return OneSet(
            self.answers.of_rows(order),
            self.alternatives.of_rows(order),
            self.positions.of_rows(order),
            self.activation_MD[index_M],
            self.target_MD[index_M],
            tuple(self.real_lengths[row] for row in order),
        )

    def to(self, dtype: torch.dtype) -> OneSet:
        return OneSet(
            self.answers.to(dtype),
            self.alternatives.to(dtype),
            self.positions.to(dtype),
            self.activation_MD.detach().to(dtype).requires_grad_(),
            self.target_MD.to(dtype),
            self.real_lengths,
        )


def rows_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))


def cut(values: list, lengths: tuple[int, ...]) -> list[list]:
    """A list cut into rows."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [values[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def draw_tokens(*, seed: int, lengths: tuple[int, ...] = (5, 1, 3), vocabulary: int = 7) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), vocabulary)
    return Tokens(
        logits_NV=(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_(),
        reference_NV=2 * torch.randn(shape, generator=generator, dtype=torch.float64),
        label_N=torch.randint(vocabulary, shape[:1], generator=generator),
        lengths=lengths,
    )


def draw_side(*, seed: int, lengths: tuple[int, ...] = (5, 1, 3)) -> OneSet:
    generator = torch.Generator().manual_seed(seed + 1_000_000)
    real_lengths = tuple(length + 2 for length in lengths)
    activations = torch.randn(2, sum(real_lengths), 4, generator=generator, dtype=torch.float64)
    return OneSet(
        answers=draw_tokens(seed=seed, lengths=lengths),
        alternatives=draw_tokens(seed=seed + 2_000_000, lengths=tuple(5 - length % 4 for length in lengths)),
        positions=draw_tokens(seed=seed + 3_000_000, lengths=tuple(length + 1 for length in lengths)),
        activation_MD=activations[0].clone().requires_grad_(),
        target_MD=activations[1],
        real_lengths=real_lengths,
    )


def flat(gradient: loops.Gradient) -> Tensor:
    return torch.tensor([row for sequence in gradient for row in sequence], dtype=torch.float64)


Gradients = dict[str, Tensor]
"""By side and leaf, for instance ``forget.answers``."""


def by_loops(config: ObjectiveConfig, *, forget: OneSet, retain: OneSet) -> tuple[float, Gradients]:
    """Loss and gradients of an objective from the loops, with the weights and settings that the configuration resolves to."""
    weights, config = resolve_weights(config), resolve(config)
    by_sequence = config.average is Average.SEQUENCE
    found = {
        f"{side}.{leaf}": torch.zeros(tensor.shape, dtype=torch.float64)
        for side, one in (("forget", forget), ("retain", retain))
        for leaf, tensor in one.leaves.items()
    }
    loss = 0.0

    def add(weight: float, result: tuple, *leaves: str) -> None:
        nonlocal loss
        loss += weight * result[0]
        for leaf, gradient in zip(leaves, result[1:], strict=True):
            found[leaf] += weight * flat(gradient)

    def distance(side: OneSet) -> tuple:
        rows, targets = (cut(tensor.tolist(), side.real_lengths) for tensor in (side.activation_MD, side.target_MD))
        return loops.squared_distance(rows, targets, by_sequence=by_sequence)

    rows, beta, token_mean = forget.answers.sequences, config.beta, config.reduction is Reduction.TOKEN_MEAN
    forget_term: dict[ObjectiveName, Callable[[], tuple]] = {
        ObjectiveName.NPO: lambda: loops.npo(rows, beta=beta, token_mean=token_mean),
        ObjectiveName.NPO_CE_KL: lambda: loops.npo(rows, beta=beta, token_mean=token_mean),
        ObjectiveName.SIMNPO: lambda: loops.simnpo(rows, beta=beta, margin=config.margin),
        ObjectiveName.UNDIAL: lambda: loops.undial(rows, beta=beta, by_sequence=by_sequence),
        ObjectiveName.WGA: lambda: loops.wga(rows, beta=beta, by_sequence=by_sequence),
        ObjectiveName.SATIMP: lambda: loops.satimp(rows, beta_1=beta, beta_2=config.beta_2, by_sequence=by_sequence),
        ObjectiveName.CE_U: lambda: loops.ce_u(rows, skip_first=config.skip_first_token, by_sequence=by_sequence),
        ObjectiveName.TASK_VECTOR_NEGATION: lambda: loops.cross_entropy(rows, by_sequence=by_sequence),
    }
    if config.name in (ObjectiveName.DPO, ObjectiveName.IDK_DPO):
        pairs = loops.dpo(rows, forget.alternatives.sequences, beta=beta, token_mean=token_mean)
        add(weights.forget, pairs, "forget.answers", "forget.alternatives")
    elif config.name in (ObjectiveName.RMU, ObjectiveName.ADAPTIVE_RMU):
        add(weights.forget, distance(forget), "forget.activations")
    else:
        term = forget_term.get(config.name, lambda: loops.grad_ascent(rows, by_sequence=by_sequence))
        add(weights.forget, term(), "forget.answers")
    add(weights.retain_ce, loops.cross_entropy(retain.answers.sequences, by_sequence=by_sequence), "retain.answers")
    add(weights.retain_kl, loops.retain_kl(retain.positions.sequences, by_sequence=by_sequence), "retain.positions")
    add(weights.retain_activation, distance(retain), "retain.activations")
    return loss, found


def gradients_of(loss: Tensor, *, forget: OneSet, retain: OneSet) -> Gradients:
    leaves = {f"{side}.{leaf}": tensor for side, one in (("forget", forget), ("retain", retain)) for leaf, tensor in one.leaves.items()}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True), strict=True))


def loss_of(config: ObjectiveConfig, *, forget: OneSet, retain: OneSet, counts: StepCounts | None = None) -> Tensor:
    terms = objective_terms(config, forget=forget.scored(Side.FORGET), retain=retain.scored(Side.RETAIN))
    return step_loss(terms, counts=counts or StepCounts(forget.counts, retain.counts))


def by_terms(config: ObjectiveConfig, *, forget: OneSet, retain: OneSet) -> tuple[Tensor, Gradients]:
    """The same as ``by_loops`` through the code under test and autograd."""
    loss = loss_of(config, forget=forget, retain=retain)
    return loss.detach(), gradients_of(loss, forget=forget, retain=retain)


def forget_gradient(config: ObjectiveConfig, tokens: Tokens) -> Tensor:
    """Gradient by the forget answers' logits, for laws about these alone."""
    side = replace(draw_side(seed=0), answers=tokens)
    return by_terms(config, forget=side, retain=draw_side(seed=1))[1]["forget.answers"]


EVERY_OBJECTIVE = [
    *[ObjectiveConfig(name=name) for name in ObjectiveName],
    *[ObjectiveConfig(name=name, average=Average.SEQUENCE) for name in ObjectiveName],
    *[ObjectiveConfig(name=name, beta=0.7, reduction=Reduction.TOKEN_MEAN) for name in ("npo", "npo_ce_kl", "dpo", "idk_dpo")],
    ObjectiveConfig(name=ObjectiveName.NPO, beta=2.5),
    ObjectiveConfig(name=ObjectiveName.NPO_CE_KL, forget_weight=0.3, retain_ce_weight=1.7, retain_kl_weight=0.9),
    ObjectiveConfig(name=ObjectiveName.GRAD_DIFF, forget_weight=0.05, retain_kl_weight=2.0),
    ObjectiveConfig(name=ObjectiveName.SIMNPO, beta=0.5, margin=1.5),
    ObjectiveConfig(name=ObjectiveName.DPO, beta=0.9, retain_kl_weight=0.5),
    ObjectiveConfig(name=ObjectiveName.UNDIAL, beta=2.0),
    ObjectiveConfig(name=ObjectiveName.WGA, beta=0.3),
    ObjectiveConfig(name=ObjectiveName.SATIMP, beta=0.5, beta_2=2.0),
    ObjectiveConfig(name=ObjectiveName.CE_U, skip_first_token=False),
    ObjectiveConfig(name=ObjectiveName.CE_U, skip_first_token=False, average=Average.SEQUENCE, retain_ce_weight=0.3),
    ObjectiveConfig(name=ObjectiveName.RMU, retain_activation_weight=3.0, retain_ce_weight=0.4),
]


def objective_id(config: ObjectiveConfig) -> str:
    return "-".join(str(value) for value in config.model_dump(mode="json", exclude_unset=True).values())


every_objective = pytest.mark.parametrize("config", EVERY_OBJECTIVE, ids=objective_id)


# --- parity with the loops ---


def test_the_loops_gradients_are_those_of_their_values() -> None:
    """The reference itself is checked by central differences, so that a slip in it cannot bless one in the code.

    Factors and targets that an objective holds constant keep the logits that were not moved.
    """
    step = 1e-5
    tokens = draw_tokens(seed=0, lengths=(2, 1), vocabulary=4)
    other = draw_tokens(seed=1, lengths=(1, 2), vocabulary=4)
    fixed = tokens.sequences
    functions: dict[str, Callable[[list[loops.Sequence]], tuple]] = {
        "grad_ascent": loops.grad_ascent,
        "grad_ascent by sequence": lambda rows: loops.grad_ascent(rows, by_sequence=True),
        "cross_entropy": loops.cross_entropy,
        "retain_kl": loops.retain_kl,
        "wga": lambda rows: loops.wga(rows, beta=0.6, constant=fixed),
        "satimp": lambda rows: loops.satimp(rows, beta_1=0.6, beta_2=1.3, constant=fixed),
        "undial": lambda rows: loops.undial(rows, beta=1.5, by_sequence=True),
        "ce_u": lambda rows: loops.ce_u(rows, skip_first=False, constant=fixed),
        "ce_u, later tokens": lambda rows: loops.ce_u(rows, skip_first=True, constant=fixed, by_sequence=True),
        "npo": lambda rows: loops.npo(rows, beta=0.8, token_mean=False),
        "npo, token mean": lambda rows: loops.npo(rows, beta=0.8, token_mean=True),
        "simnpo": lambda rows: loops.simnpo(rows, beta=0.8, margin=0.4),
        "dpo, answers": lambda rows: loops.dpo(rows, other.sequences, beta=0.8, token_mean=False)[:2],
        "dpo, alternatives": lambda rows: loops.dpo(other.sequences, rows, beta=0.8, token_mean=True)[::2],
    }
    for name, function in functions.items():
        gradient = flat(function(fixed)[1])
        for token in range(3):
            for entry in range(4):
                values = []
                for sign in (1, -1):
                    moved = tokens.logits_NV.detach().clone()
                    moved[token, entry] += sign * step
                    values.append(function(replace(tokens, logits_NV=moved).sequences)[0])
                difference = (values[0] - values[1]) / (2 * step)
                assert float(gradient[token, entry]) == pytest.approx(difference, abs=1e-9), name


def test_the_loops_gradient_by_activations_is_that_of_their_distance() -> None:
    rows, targets = [[[0.5, -1.0], [2.0, 0.0]], [[1.0, 1.0]]], [[[0.0, 1.0], [1.0, 3.0]], [[-1.0, 2.0]]]
    for by_sequence in (False, True):
        gradient = loops.squared_distance(rows, targets, by_sequence=by_sequence)[1]
        for row, token, entry in ((0, 0, 1), (0, 1, 0), (1, 0, 1)):
            values = []
            for sign in (1, -1):
                moved = [[list(activation) for activation in tokens] for tokens in rows]
                moved[row][token][entry] += sign * 1e-5
                values.append(loops.squared_distance(moved, targets, by_sequence=by_sequence)[0])
            assert gradient[row][token][entry] == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-9)


@pytest.mark.parametrize("seed", range(2))
@every_objective
def test_every_objective_equals_the_loops_in_value_and_gradient(config: ObjectiveConfig, seed: int) -> None:
    forget, retain = draw_side(seed=seed), draw_side(seed=100 + seed, lengths=(2, 4))
    expected = by_loops(config, forget=forget, retain=retain)
    actual = by_terms(config, forget=forget, retain=retain)
    torch.testing.assert_close(float(actual[0]), expected[0], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)
    torch.testing.assert_close(actual[1], expected[1], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


@every_objective
def test_every_objective_equals_the_loops_in_float32(config: ObjectiveConfig) -> None:
    """Both read the same float32 numbers; only the arithmetic differs."""
    forget, retain = draw_side(seed=5).to(torch.float32), draw_side(seed=105, lengths=(2, 4)).to(torch.float32)
    expected = by_loops(config, forget=forget, retain=retain)
    actual = by_terms(config, forget=forget, retain=retain)
    assert actual[0].dtype == torch.float32
    assert float(actual[0]) == pytest.approx(expected[0], rel=FLOAT32_TOLERANCE, abs=FLOAT32_TOLERANCE)
    found = {leaf: gradient.double() for leaf, gradient in actual[1].items()}
    torch.testing.assert_close(found, expected[1], rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


def test_every_objective_moves_what_it_reads_and_nothing_else() -> None:
    """A gradient of zero on both sides would let parity pass for a term that never ran."""
    forget, retain = draw_side(seed=3), draw_side(seed=4)
    touched = {
        ObjectiveName.GRAD_ASCENT: {"forget.answers"},
        ObjectiveName.GRAD_DIFF: {"forget.answers", "retain.answers"},
        ObjectiveName.KL_MIN: {"forget.answers", "retain.positions"},
        ObjectiveName.NPO: {"forget.answers"},
        ObjectiveName.NPO_CE_KL: {"forget.answers", "retain.answers", "retain.positions"},
        ObjectiveName.SIMNPO: {"forget.answers", "retain.answers"},
        ObjectiveName.DPO: {"forget.answers", "forget.alternatives"},
        ObjectiveName.IDK_DPO: {"forget.answers", "forget.alternatives", "retain.answers"},
        ObjectiveName.RMU: {"forget.activations", "retain.activations"},
        ObjectiveName.ADAPTIVE_RMU: {"forget.activations", "retain.activations"},
        ObjectiveName.UNDIAL: {"forget.answers"},
        ObjectiveName.WGA: {"forget.answers", "retain.answers"},
        ObjectiveName.SATIMP: {"forget.answers", "retain.answers"},
        ObjectiveName.CE_U: {"forget.answers"},
        ObjectiveName.NG_DIFF: {"forget.answers", "retain.answers"},
        ObjectiveName.TASK_VECTOR_NEGATION: {"forget.answers"},
    }
    assert set(touched) == set(ObjectiveName)
    for name, leaves in touched.items():
        gradients = by_terms(ObjectiveConfig(name=name), forget=forget, retain=retain)[1]
        assert {leaf for leaf, gradient in gradients.items() if float(gradient.abs().max()) > 0} == leaves, name


def test_bfloat16_logits_and_activations_are_widened_before_any_arithmetic() -> None:
    """The result is that of the same rounded numbers in float32, exactly; bfloat16 arithmetic would be off in the third digit."""
    side = draw_side(seed=9)
    rounded, expected = side.to(torch.bfloat16), side.to(torch.bfloat16).to(torch.float32)
    actual_N = token_log_probs(rounded.answers.logits_NV, label_N=side.answers.label_N)
    assert actual_N.dtype == torch.float32
    assert torch.equal(actual_N, token_log_probs(expected.answers.logits_NV, label_N=side.answers.label_N))
    totals = [
        activation_term(
            activations=Activations(one.activation_MD, one.target_MD, rows_of(one.real_lengths)),
            num_rows=3,
            side=Side.FORGET,
            weight=1.0,
            average=Average.TOKEN,
        ).total
        for one in (rounded, expected)
    ]
    assert totals[0].dtype == torch.float32
    assert torch.equal(totals[0], totals[1])
    narrow = (rounded.activation_MD.detach() - rounded.target_MD).square().mean(dim=1).sum()
    assert abs(float(narrow - totals[1].detach())) > 1e-3


# --- the table ---


def test_default_weights_are_the_published_ones() -> None:
    """GradAscent, GradDiff and KL-min: 1, as in TOFU. NPO: alone, as in its paper. NPO + CE + KL: 0.4, 0.2, 0.4, as ZJUKLAB.

    SimNPO: its TOFU forget05 run. IdkDPO and WGA: retain 1, as open-unlearning. SatImp: forget to retain 10 to 1. RMU: Zephyr-7B.
    UNDIAL, CE-U and DPO have no retain term in their papers; task-vector negation can have none. NGDiff weighs both sides alike.
    """
    expected = {
        ObjectiveName.GRAD_ASCENT: Weights(forget=1.0),
        ObjectiveName.GRAD_DIFF: Weights(forget=1.0, retain_ce=1.0),
        ObjectiveName.KL_MIN: Weights(forget=1.0, retain_kl=1.0),
        ObjectiveName.NPO: Weights(forget=1.0),
        ObjectiveName.NPO_CE_KL: Weights(forget=0.4, retain_ce=0.2, retain_kl=0.4),
        ObjectiveName.SIMNPO: Weights(forget=0.1375, retain_ce=1.0),
        ObjectiveName.DPO: Weights(forget=1.0),
        ObjectiveName.IDK_DPO: Weights(forget=1.0, retain_ce=1.0),
        ObjectiveName.RMU: Weights(forget=1.0, retain_activation=1200.0),
        ObjectiveName.ADAPTIVE_RMU: Weights(forget=1.0, retain_activation=1200.0),
        ObjectiveName.UNDIAL: Weights(forget=1.0),
        ObjectiveName.WGA: Weights(forget=1.0, retain_ce=1.0),
        ObjectiveName.SATIMP: Weights(forget=1.0, retain_ce=0.1),
        ObjectiveName.CE_U: Weights(forget=1.0),
        ObjectiveName.NG_DIFF: Weights(forget=1.0, retain_ce=1.0),
        ObjectiveName.TASK_VECTOR_NEGATION: Weights(forget=1.0),
    }
    assert set(expected) == set(ObjectiveName) == set(OBJECTIVES)
    assert {name: resolve_weights(ObjectiveConfig(name=name)) for name in ObjectiveName} == expected


def test_default_settings_are_the_published_ones() -> None:
    """beta, beta_2, steering, negation_scale; null where the objective has no such setting."""
    settings_of = {
        ObjectiveName.NPO: (0.1, None, None, None),
        ObjectiveName.NPO_CE_KL: (0.1, None, None, None),
        ObjectiveName.SIMNPO: (2.5, None, None, None),
        ObjectiveName.DPO: (0.1, None, None, None),
        ObjectiveName.IDK_DPO: (0.1, None, None, None),
        ObjectiveName.RMU: (None, None, 6.5, None),
        ObjectiveName.ADAPTIVE_RMU: (None, None, 5.0, None),
        ObjectiveName.UNDIAL: (10.0, None, None, None),
        ObjectiveName.WGA: (1.0, None, None, None),
        ObjectiveName.SATIMP: (5.0, 1.0, None, None),
        ObjectiveName.TASK_VECTOR_NEGATION: (None, None, None, 1.0),
    }
    for name in ObjectiveName:
        resolved = resolve(ObjectiveConfig(name=name))
        actual = (resolved.beta, resolved.beta_2, resolved.steering, resolved.negation_scale)
        assert actual == settings_of.get(name, (None, None, None, None)), name
        assert OBJECTIVES[name].forget_term is not None


def test_resolving_keeps_what_is_configured_and_is_done_once() -> None:
    config = ObjectiveConfig(name="satimp", beta=2.0, average="sequence")
    resolved = resolve(config)
    assert (resolved.beta, resolved.beta_2, resolved.average) == (2.0, 1.0, Average.SEQUENCE)
    assert resolve(resolved) == resolved
    assert config.beta_2 is None


def test_every_objective_cites_its_source() -> None:
    assert len(OBJECTIVES) == 16
    for info in OBJECTIVES.values():
        assert info.source.startswith("https://arxiv.org/abs/")
    of_their_own = [info.source for name, info in OBJECTIVES.items() if name not in ("grad_ascent", "grad_diff", "kl_min", "idk_dpo")]
    assert len(set(of_their_own)) == len(of_their_own) == 12


def test_a_configured_weight_replaces_the_published_one_even_when_it_is_zero() -> None:
    assert resolve_weights(ObjectiveConfig(name="npo_ce_kl", retain_kl_weight=0.0)) == Weights(forget=0.4, retain_ce=0.2)
    assert resolve_weights(ObjectiveConfig(name="grad_ascent", retain_ce_weight=0.5)) == Weights(forget=1.0, retain_ce=0.5)
    rmu = resolve_weights(ObjectiveConfig(name="rmu", retain_activation_weight=100.0, retain_ce_weight=1.0))
    assert rmu == Weights(forget=1.0, retain_ce=1.0, retain_activation=100.0)


def test_a_weight_that_would_do_harm_or_nothing_is_not_taken() -> None:
    """What task-vector negation learns is subtracted, retain rows included; NGDiff normalises the forget gradient whatever its weight."""
    assert resolve_weights(ObjectiveConfig(name="task_vector_negation", retain_ce_weight=1.0, retain_kl_weight=1.0)) == Weights(forget=1.0)
    assert resolve_weights(ObjectiveConfig(name="ng_diff", forget_weight=7.0, retain_kl_weight=0.5)) == Weights(
        forget=1.0, retain_ce=1.0, retain_kl=0.5
    )
    assert resolve_weights(ObjectiveConfig(name="grad_diff", retain_activation_weight=9.0)) == Weights(forget=1.0, retain_ce=1.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ObjectiveConfig(name="grad_ascent", beta=0.3), ("beta",)),
        (ObjectiveConfig(name="npo", beta=0.3, reduction="token_mean", forget_weight=2.0), ()),
        (ObjectiveConfig(name="npo", average="sequence"), ("average",)),
        (ObjectiveConfig(name="npo", average="sequence", retain_ce_weight=1.0), ()),
        (ObjectiveConfig(name="npo_ce_kl", average="sequence", kl_scope="real"), ()),
        (ObjectiveConfig(name="npo_ce_kl", retain_kl_weight=0.0, kl_scope="real"), ("kl_scope",)),
        (ObjectiveConfig(name="simnpo", margin=0.5, reduction="token_mean", beta_2=1.0), ("beta_2", "reduction")),
        (ObjectiveConfig(name="rmu", layer=3, steering=20.0, retain_activation_weight=100.0, average="sequence"), ()),
        (
            ObjectiveConfig(name="grad_diff", layer=3, steering=20.0, retain_activation_weight=100.0),
            ("layer", "retain_activation_weight", "steering"),
        ),
        (ObjectiveConfig(name="ce_u", skip_first_token=False), ()),
        (ObjectiveConfig(name="undial", skip_first_token=False, beta=3.0), ("skip_first_token",)),
        (ObjectiveConfig(name="undial", skip_first_token=True, margin=0.0, retain_ce_weight=None), ()),
        (ObjectiveConfig(name="satimp", beta=3.0, beta_2=0.5), ()),
        (ObjectiveConfig(name="ng_diff", forget_weight=3.0, retain_ce_weight=0.5), ("forget_weight",)),
        (ObjectiveConfig(name="task_vector_negation", negation_scale=0.5, retain_ce_weight=1.0), ("retain_ce_weight",)),
        (ObjectiveConfig(name="dpo", negation_scale=0.5, margin=1.0, beta=0.2), ("margin", "negation_scale")),
        (resolve(ObjectiveConfig(name="satimp")), ()),
    ],
    ids=str,
)
def test_settings_without_effect_are_named(config: ObjectiveConfig, expected: tuple[str, ...]) -> None:
    """Only those that were given another value than their default: a file that spells out defaults is no mistake."""
    assert unused_settings(config) == expected


OTHER_VALUES = {
    "beta": 0.37,
    "beta_2": 0.6,
    "margin": 0.9,
    "reduction": Reduction.TOKEN_MEAN,
    "average": Average.SEQUENCE,
    "forget_weight": 0.77,
    "retain_ce_weight": 0.66,
    "retain_kl_weight": 0.55,
    "retain_activation_weight": 0.44,
    "skip_first_token": False,
}


@pytest.mark.parametrize("name", ObjectiveName)
def test_a_setting_is_named_as_unused_exactly_if_it_changes_no_loss(name: ObjectiveName) -> None:
    """Every setting in turn; those that act outside the loss (layer, steering, kl_scope, negation_scale) are looked at above.

    NGDiff's forget weight changes no loss here because it is not taken.
    """
    forget, retain = draw_side(seed=21), draw_side(seed=22, lengths=(2, 4))
    before = float(loss_of(ObjectiveConfig(name=name), forget=forget, retain=retain).detach())
    for setting, value in OTHER_VALUES.items():
        config = ObjectiveConfig(name=name, **{setting: value})
        after = float(loss_of(config, forget=forget, retain=retain).detach())
        assert (after != before) == (setting not in unused_settings(config)), setting


REFERENCE, PAIRS = Need.FORGET_REFERENCE_LOG_PROBS, Need.ALTERNATIVE_ANSWERS


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ObjectiveConfig(name="grad_ascent"), set()),
        (ObjectiveConfig(name="grad_diff"), set()),
        (ObjectiveConfig(name="kl_min"), {Need.RETAIN_DISTRIBUTIONS}),
        (ObjectiveConfig(name="npo"), {REFERENCE}),
        (ObjectiveConfig(name="npo_ce_kl"), {REFERENCE, Need.RETAIN_DISTRIBUTIONS}),
        (ObjectiveConfig(name="npo_ce_kl", retain_kl_weight=0.0), {REFERENCE}),
        (ObjectiveConfig(name="grad_ascent", retain_kl_weight=0.1), {Need.RETAIN_DISTRIBUTIONS}),
        (ObjectiveConfig(name="simnpo"), set()),
        (ObjectiveConfig(name="dpo"), {REFERENCE, PAIRS}),
        (ObjectiveConfig(name="idk_dpo"), {REFERENCE, PAIRS}),
        (ObjectiveConfig(name="rmu"), {Need.ACTIVATIONS}),
        (ObjectiveConfig(name="adaptive_rmu", retain_activation_weight=0.0), {Need.ACTIVATIONS}),
        (ObjectiveConfig(name="undial"), {REFERENCE, Need.FORGET_DISTRIBUTIONS}),
        (ObjectiveConfig(name="wga"), set()),
        (ObjectiveConfig(name="satimp"), set()),
        (ObjectiveConfig(name="ce_u"), {Need.MEAN_LOGITS}),
        (ObjectiveConfig(name="ng_diff"), {Need.SIDE_GRADIENTS}),
        (ObjectiveConfig(name="task_vector_negation", retain_kl_weight=1.0), set()),
    ],
    ids=lambda value: str(value) if isinstance(value, ObjectiveConfig) else "-".join(sorted(value)) or "nothing",
)
def test_an_objective_says_what_it_needs_from_the_loop(config: ObjectiveConfig, expected: set[Need]) -> None:
    assert needs(config) == expected


def test_what_an_objective_does_not_say_it_needs_it_does_not_touch() -> None:
    """Terms are computed with everything else taken away."""
    side = draw_side(seed=0)
    for config in EVERY_OBJECTIVE:
        wanted = needs(config)
        forget, retain = side.scored(Side.FORGET), side.scored(Side.RETAIN)
        activations = Need.ACTIVATIONS in wanted
        objective_terms(
            config,
            forget=replace(
                forget,
                log_normaliser_N=forget.log_normaliser_N if Need.MEAN_LOGITS in wanted else None,
                mean_logit_N=forget.mean_logit_N if Need.MEAN_LOGITS in wanted else None,
                reference_token_log_probs_N=forget.reference_token_log_probs_N if REFERENCE in wanted else None,
                distributions=forget.distributions if Need.FORGET_DISTRIBUTIONS in wanted else None,
                alternative=forget.alternative if PAIRS in wanted else None,
                activations=forget.activations if activations else None,
            ),
            retain=Scored(
                retain.token_log_probs_N,
                retain.row_N,
                retain.num_rows,
                distributions=retain.distributions if Need.RETAIN_DISTRIBUTIONS in wanted else None,
                activations=retain.activations if activations else None,
            ),
        )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("grad_ascent", [("forget_grad_ascent", Unit.TOKEN)]),
        ("grad_diff", [("forget_grad_ascent", Unit.TOKEN), ("retain_ce", Unit.TOKEN)]),
        ("kl_min", [("forget_grad_ascent", Unit.TOKEN), ("retain_kl", Unit.POSITION)]),
        ("npo", [("forget_npo", Unit.SEQUENCE)]),
        ("npo_ce_kl", [("forget_npo", Unit.SEQUENCE), ("retain_ce", Unit.TOKEN), ("retain_kl", Unit.POSITION)]),
        ("simnpo", [("forget_simnpo", Unit.SEQUENCE), ("retain_ce", Unit.TOKEN)]),
        ("dpo", [("forget_dpo", Unit.SEQUENCE)]),
        ("idk_dpo", [("forget_dpo", Unit.SEQUENCE), ("retain_ce", Unit.TOKEN)]),
        ("rmu", [("forget_rmu", Unit.REAL_TOKEN), ("retain_activation", Unit.REAL_TOKEN)]),
        ("adaptive_rmu", [("forget_rmu", Unit.REAL_TOKEN), ("retain_activation", Unit.REAL_TOKEN)]),
        ("undial", [("forget_undial", Unit.TOKEN)]),
        ("wga", [("forget_wga", Unit.TOKEN), ("retain_ce", Unit.TOKEN)]),
        ("satimp", [("forget_satimp", Unit.TOKEN), ("retain_ce", Unit.TOKEN)]),
        ("ce_u", [("forget_ce_u", Unit.LATER_TOKEN)]),
        ("ng_diff", [("forget_grad_ascent", Unit.TOKEN), ("retain_ce", Unit.TOKEN)]),
        ("task_vector_negation", [("forget_ce", Unit.TOKEN)]),
    ],
)
def test_terms_name_their_unit_and_their_set(config: str, expected: list[tuple[str, Unit]]) -> None:
    """Averaged over sequences, all of them count sequences."""
    side = draw_side(seed=0)
    forget, retain = side.scored(Side.FORGET), side.scored(Side.RETAIN)
    terms = objective_terms(ObjectiveConfig(name=config), forget=forget, retain=retain)
    assert [(term.name, term.unit) for term in terms] == expected
    assert all(term.name.startswith(term.side.value) for term in terms)
    weights = resolve_weights(ObjectiveConfig(name=config))
    weight_of = {"retain_ce": weights.retain_ce, "retain_kl": weights.retain_kl, "retain_activation": weights.retain_activation}
    assert [term.weight for term in terms] == [weight_of.get(term.name, weights.forget) for term in terms]
    by_sequence = objective_terms(ObjectiveConfig(name=config, average="sequence"), forget=forget, retain=retain)
    assert {term.unit for term in by_sequence} == {Unit.SEQUENCE}


def test_weights_given_to_the_terms_replace_the_configured_ones() -> None:
    """What an adaptive schedule does. A retain weight of zero leaves its term out; the forget term stays whatever its weight."""
    side = draw_side(seed=0)
    forget, retain = side.scored(Side.FORGET), side.scored(Side.RETAIN)
    given = Weights(forget=0.0, retain_ce=2.5, retain_kl=0.0)
    terms = objective_terms(ObjectiveConfig(name="npo_ce_kl"), forget=forget, retain=retain, weights=given)
    assert [(term.name, term.weight) for term in terms] == [("forget_npo", 0.0), ("retain_ce", 2.5)]


# --- laws: how objectives relate ---


def test_grad_diff_with_retain_weight_zero_is_gradient_ascent() -> None:
    forget, retain = draw_side(seed=1), draw_side(seed=2)
    expected = by_terms(ObjectiveConfig(name="grad_ascent"), forget=forget, retain=retain)
    actual = by_terms(ObjectiveConfig(name="grad_diff", retain_ce_weight=0.0), forget=forget, retain=retain)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(actual[1][leaf], expected[1][leaf]) for leaf in expected[1])
    control = by_terms(ObjectiveConfig(name="grad_diff"), forget=forget, retain=retain)
    assert abs(float(control[0] - expected[0])) > 0.1
    assert float(control[1]["retain.answers"].abs().max()) > 0.01


@pytest.mark.parametrize("name", ObjectiveName)
def test_a_small_step_forgets_and_rehearses(name: ObjectiveName) -> None:
    """Against the gradient forget answers become less likely (activations nearer their target), and retain answers likelier.

    The model starts as the reference. Task-vector negation goes the other way, for its update is subtracted.
    """
    forget, retain = draw_side(seed=1), draw_side(seed=2)
    forget = replace(forget, answers=replace(forget.answers, reference_NV=forget.answers.logits_NV.detach()))
    gradients = by_terms(ObjectiveConfig(name=name), forget=forget, retain=retain)[1]

    def rise(tokens: Tokens, gradient: Tensor) -> float:
        """Change of the answers' log-probability in a step against the gradient."""
        before, after = (
            token_log_probs(z.detach(), label_N=tokens.label_N).sum() for z in (tokens.logits_NV, tokens.logits_NV - 1e-3 * gradient)
        )
        return float(after - before)

    change = rise(forget.answers, gradients["forget.answers"])
    if name in (ObjectiveName.RMU, ObjectiveName.ADAPTIVE_RMU):
        distances = [
            float((forget.activation_MD - step * gradients["forget.activations"] - forget.target_MD).detach().square().sum())
            for step in (0.0, 1e-3)
        ]
        assert distances[1] < distances[0]
        assert change == 0.0
    elif name is ObjectiveName.TASK_VECTOR_NEGATION:
        assert change > 0
    else:
        assert change < 0
    if resolve_weights(ObjectiveConfig(name=name)).retain_ce > 0:
        assert rise(retain.answers, gradients["retain.answers"]) > 0


def test_the_term_of_task_vector_negation_is_gradient_ascent_with_the_other_sign() -> None:
    side = draw_side(seed=1)
    ascent, descent = (by_terms(ObjectiveConfig(name=name), forget=side, retain=side) for name in ("grad_ascent", "task_vector_negation"))
    assert float(descent[0]) == -float(ascent[0]) > 0
    torch.testing.assert_close(descent[1]["forget.answers"], -ascent[1]["forget.answers"], rtol=0, atol=0)


def test_dpo_and_idk_dpo_differ_in_their_retain_weight_alone() -> None:
    side = draw_side(seed=1)
    dpo, idk = (by_terms(ObjectiveConfig(name=name, retain_ce_weight=0.5), forget=side, retain=side)[0] for name in ("dpo", "idk_dpo"))
    assert torch.equal(dpo, idk)


def shifted_pair(*, lengths: tuple[int, ...], ratio_B: list[float]) -> Tokens:
    """Two-symbol sequences with log p = -6 per token and the given log-ratios to the reference, spread evenly over their tokens."""
    label_N = draw_tokens(seed=3, lengths=lengths, vocabulary=2).label_N
    model_N = torch.full((sum(lengths),), -6.0, dtype=torch.float64)
    each_B = torch.tensor(ratio_B, dtype=torch.float64) / torch.tensor(lengths, dtype=torch.float64)
    ratio_N = each_B.repeat_interleave(torch.tensor(lengths))

    def logits_of(log_prob_N: Tensor) -> Tensor:
        other_N = torch.log1p(-log_prob_N.exp())
        pairs = torch.stack([log_prob_N, other_N], dim=1)
        return torch.where(label_N[:, None] == 0, pairs, pairs.flip(1))

    return Tokens(logits_of(model_N).requires_grad_(), logits_of(model_N - ratio_N), label_N, lengths)


def test_npo_tends_to_gradient_ascent_as_beta_goes_to_zero() -> None:
    """d(2/beta log(1 + e^(beta d)))/dd = 2 sigmoid(beta d) = 1 + tanh(beta d / 2), per sequence; gradient ascent has 1.

    Gradient ascent divides by the 6 tokens, NPO by the 3 sequences: its gradient is 6 / 3 times as large in the limit.
    With log-ratios of 2, -1 and -5 nats the largest relative deviation is tanh(2.5 beta): 0.987 at beta = 1, 0.245 at 0.1,
    0.0025 at 0.001.
    """
    tokens = shifted_pair(lengths=(1, 3, 2), ratio_B=[2.0, -1.0, -5.0])
    ascent = forget_gradient(ObjectiveConfig(name="grad_ascent"), tokens) * (6 / 3)
    for beta, expected in ((1.0, 0.987), (0.1, 0.245), (0.001, 0.0025)):
        actual = forget_gradient(ObjectiveConfig(name="npo", beta=beta), tokens)
        deviation = ((actual - ascent) / ascent).abs().max()
        assert float(deviation) == pytest.approx(expected, abs=1e-3)


def test_simnpo_without_margin_is_token_mean_npo_against_a_reference_of_probability_one() -> None:
    scored = draw_tokens(seed=5).scored
    certain = replace(scored, reference_token_log_probs_N=torch.zeros_like(scored.token_log_probs_N))
    simnpo = simnpo_term(forget=scored, beta=0.8, margin=0.0, weight=1.0).total
    npo = npo_term(forget=certain, beta=0.8, reduction=Reduction.TOKEN_MEAN, weight=1.0).total
    torch.testing.assert_close(simnpo, npo, rtol=1e-14, atol=0)
    for control in (
        simnpo_term(forget=scored, beta=0.8, margin=0.3, weight=1.0).total,
        npo_term(forget=scored, beta=0.8, reduction=Reduction.TOKEN_MEAN, weight=1.0).total,
        npo_term(forget=certain, beta=0.8, reduction=Reduction.SEQUENCE_SUM, weight=1.0).total,
    ):
        assert abs(float((control - npo).detach())) > 0.1


def test_simnpo_of_worked_numbers() -> None:
    """One sequence of two tokens with p = e^-1 and e^-3: NLL / length = 2, margin 1, beta 1.

    2 log(1 + e^-(2 - 1)) = 0.62652 nats. A margin above the cross-entropy pushes harder: margin 4 gives 2 log(1 + e^2) = 4.25386.
    """
    scored = Scored(torch.tensor([-1.0, -3.0]), torch.tensor([0, 0]), 1)
    for margin, expected in ((1.0, 0.62652), (4.0, 4.25386)):
        assert float(simnpo_term(forget=scored, beta=1.0, margin=margin, weight=1.0).total) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("average", Average)
def test_wga_and_satimp_with_exponents_of_zero_are_gradient_ascent(average: Average) -> None:
    scored = draw_tokens(seed=6).scored
    expected = grad_ascent_term(forget=scored, weight=1.0, average=average)
    for term in (
        wga_term(forget=scored, beta=0.0, weight=1.0, average=average),
        satimp_term(forget=scored, beta_1=0.0, beta_2=0.0, weight=1.0, average=average),
    ):
        assert torch.equal(term.total, expected.total)
        assert term.unit is expected.unit
    for control in (
        wga_term(forget=scored, beta=0.1, weight=1.0, average=average),
        satimp_term(forget=scored, beta_1=0.0, beta_2=0.1, weight=1.0, average=average),
    ):
        assert abs(float((control.total - expected.total).detach())) > 0.05


def test_wga_tends_to_gradient_ascent_as_beta_goes_to_zero() -> None:
    """p^beta = 1 + beta log p + ...: with log p = -6 everywhere the gradient is e^(-6 beta) times that of gradient ascent."""
    tokens = shifted_pair(lengths=(2, 1), ratio_B=[0.0, 0.0])
    ascent = forget_gradient(ObjectiveConfig(name="grad_ascent"), tokens)
    for beta in (1.0, 0.01, 1e-6):
        torch.testing.assert_close(
            forget_gradient(ObjectiveConfig(name="wga", beta=beta), tokens), math.exp(-6 * beta) * ascent, rtol=1e-12, atol=0
        )


def test_satimp_without_its_second_exponent_is_wga_and_spares_the_certain_and_the_forgotten() -> None:
    """With the defaults the factor p^5 (1 - p) is largest at p = 5/6, and zero where p = 1 although 0^0 = 1 leaves ascent alone."""
    scored = draw_tokens(seed=6).scored
    wga = wga_term(forget=scored, beta=0.7, weight=1.0, average=Average.TOKEN).total
    assert torch.equal(satimp_term(forget=scored, beta_1=0.7, beta_2=0.0, weight=1.0, average=Average.TOKEN).total, wga)

    def slope(p: float) -> float:
        log_prob = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
        one = Scored(log_prob, torch.tensor([0]), 1)
        (gradient,) = torch.autograd.grad(
            satimp_term(forget=one, beta_1=5.0, beta_2=1.0, weight=1.0, average=Average.TOKEN).total, log_prob
        )
        return float(gradient)

    assert slope(5 / 6) == pytest.approx((5 / 6) ** 5 / 6)
    assert max(slope(0.8), slope(0.87), slope(1e-3), slope(1.0)) < slope(5 / 6)
    assert slope(1.0) == 0.0


def test_satimp_takes_a_log_probability_that_rounding_put_above_zero_for_certainty() -> None:
    """1 - p would be negative, and its square root not a number."""
    scored = Scored(torch.tensor([1e-7, -1.0]), torch.tensor([0, 0]), 1)
    total = satimp_term(forget=scored, beta_1=5.0, beta_2=0.5, weight=1.0, average=Average.TOKEN).total
    assert float(total) == pytest.approx(-math.exp(-5.0) * math.sqrt(1 - math.exp(-1.0)), rel=1e-6)


def test_dpo_with_the_answer_as_its_own_alternative_moves_nothing() -> None:
    """The lead of one over the other is 0 whatever the logits: 2 / beta log 2 per pair, gradient zero."""
    for reduction in Reduction:
        config = ObjectiveConfig(name="dpo", reduction=reduction)
        side = draw_side(seed=3)
        value, gradients = by_terms(config, forget=replace(side, alternatives=side.answers), retain=side)
        assert float(value) == pytest.approx(2 / 0.1 * math.log(2), rel=1e-12)
        assert float(gradients["forget.answers"].abs().max()) < 1e-15
        control = by_terms(config, forget=side, retain=side)[1]
        assert float(control["forget.answers"].abs().max()) > 0.05


def test_dpo_raises_the_alternative_and_lowers_the_answer() -> None:
    side = draw_side(seed=4)
    gradients = by_terms(ObjectiveConfig(name="dpo"), forget=side, retain=side)[1]
    for tokens, gradient, sign in (
        (side.answers, gradients["forget.answers"], -1),
        (side.alternatives, gradients["forget.alternatives"], 1),
    ):
        before, after = (
            token_log_probs(z.detach(), label_N=tokens.label_N).sum() for z in (tokens.logits_NV, tokens.logits_NV - 1e-3 * gradient)
        )
        assert sign * float(after - before) > 0


def test_dpo_with_a_hopeless_alternative_has_twice_the_slope_of_gradient_ascent() -> None:
    """-(2 / beta) log sigmoid(beta lead) has slope -2 as lead -> -infinity: the factor 2 / beta takes beta out. TOFU's code has beta."""
    log_probs_N = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    row_N, zero_N = torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.float64)
    hopeless = Scored(zero_N - 900.0, row_N, 2, reference_token_log_probs_N=zero_N)
    forget = Scored(log_probs_N, row_N, 2, reference_token_log_probs_N=zero_N, alternative=hopeless)
    for beta in (0.1, 1.0):
        total = dpo_term(forget=forget, beta=beta, reduction=Reduction.SEQUENCE_SUM, weight=1.0).total
        (gradient,) = torch.autograd.grad(total, log_probs_N)
        torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0), rtol=1e-12, atol=0)


def test_undial_without_penalty_has_the_gradient_of_kl_to_the_reference() -> None:
    """Cross-entropy and KL differ by the target's entropy, which no logit moves. The gradient's distance is of the order of beta."""
    side = draw_side(seed=5)
    same = replace(side, positions=side.answers)
    kl = by_terms(ObjectiveConfig(name="kl_min", forget_weight=0.0), forget=same, retain=same)[1]["retain.positions"]
    for beta in (1e-3, 1e-6, 1e-9):
        undial = by_terms(ObjectiveConfig(name="undial", beta=beta), forget=same, retain=same)[1]["forget.answers"]
        assert float((undial - kl).abs().max()) < 0.3 * beta
    control = by_terms(ObjectiveConfig(name="undial", beta=1.0), forget=same, retain=same)[1]["forget.answers"]
    assert float((control - kl).abs().max()) > 0.01


def test_undial_is_at_rest_once_the_model_is_its_target() -> None:
    """Forgetting has an end: softmax(reference's logits - beta * onehot(label))."""
    tokens = draw_tokens(seed=7)
    target_NV = tokens.reference_NV - 10.0 * torch.nn.functional.one_hot(tokens.label_N, 7).double()
    there = replace(tokens, logits_NV=target_NV.clone().requires_grad_())
    assert float(forget_gradient(ObjectiveConfig(name="undial"), there).abs().max()) < 1e-14
    before = replace(tokens, logits_NV=tokens.reference_NV.clone().requires_grad_())
    assert float(forget_gradient(ObjectiveConfig(name="undial"), before).abs().max()) > 0.05


@pytest.mark.parametrize("average", Average)
def test_ce_u_is_cross_entropy_to_the_models_own_distribution_without_the_label(average: Average) -> None:
    """Value and gradient, against torch's cross-entropy with a detached soft target."""
    tokens = draw_tokens(seed=8)
    term = ce_u_term(forget=tokens.scored, skip_first_token=False, weight=1.0, average=average)
    target_NV = tokens.logits_NV.detach().scatter(1, tokens.label_N[:, None], -math.inf).softmax(dim=1)
    each_N = torch.nn.functional.cross_entropy(tokens.logits_NV, target_NV, reduction="none")
    share_of = {Average.TOKEN: [1.0] * 9, Average.SEQUENCE: [1 / 5] * 5 + [1.0] + [1 / 3] * 3}
    share_N = torch.tensor(share_of[average], dtype=torch.float64)
    expected = (each_N * share_N).sum()
    torch.testing.assert_close(term.total, expected, rtol=1e-12, atol=0)
    actual_gradient, expected_gradient = (torch.autograd.grad(value, tokens.logits_NV)[0] for value in (term.total, expected))
    torch.testing.assert_close(actual_gradient, expected_gradient, rtol=0, atol=1e-13)


def test_ce_u_is_undial_with_the_model_as_its_own_teacher_and_an_endless_penalty() -> None:
    tokens = draw_tokens(seed=8)
    own = replace(tokens, reference_NV=tokens.logits_NV.detach())
    ce_u = forget_gradient(ObjectiveConfig(name="ce_u", skip_first_token=False), own)
    torch.testing.assert_close(forget_gradient(ObjectiveConfig(name="undial", beta=50.0), own), ce_u, rtol=0, atol=1e-14)
    assert float((forget_gradient(ObjectiveConfig(name="undial", beta=3.0), own) - ce_u).abs().max()) > 1e-3


def test_ce_u_leaves_first_tokens_out_of_the_sum_and_of_the_count() -> None:
    """Lengths 5, 1, 3: six later tokens. The answer of one token contributes nothing; over sequences it still counts as one."""
    tokens = draw_tokens(seed=8)
    each_N = torch.tensor(
        [
            float(ce_u_term(forget=one.scored, skip_first_token=False, weight=1.0, average=Average.TOKEN).total.detach())
            for one in single(tokens)
        ]
    )
    side = replace(draw_side(seed=0), answers=tokens)
    counts = StepCounts(side.counts, SideCounts())
    assert counts.forget.later_tokens == 6
    for average, expected in (
        (Average.TOKEN, (each_N[1:5].sum() + each_N[7:9].sum()) / 6),
        (Average.SEQUENCE, (each_N[1:5].mean() + 0 + each_N[7:9].mean()) / 3),
    ):
        term = ce_u_term(forget=tokens.scored, skip_first_token=True, weight=1.0, average=average)
        assert float(step_loss((term,), counts=counts).detach()) == pytest.approx(float(expected), rel=1e-6)
    gradient = forget_gradient(ObjectiveConfig(name="ce_u"), tokens)
    assert (gradient.abs().sum(dim=1) == 0).tolist() == [True, False, False, False, False, True, True, False, False]


def single(tokens: Tokens) -> list[Tokens]:
    """Every token as a row of its own."""
    return [
        Tokens(tokens.logits_NV[i : i + 1], tokens.reference_NV[i : i + 1], tokens.label_N[i : i + 1], (1,))
        for i in range(len(tokens.label_N))
    ]


def nearly_certain(remainder: float, *, dtype: torch.dtype, scale: float = 16.0) -> Tokens:
    """One token whose label has probability 1 - remainder under model and reference; the rest falls off over six others."""
    rest = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125], dtype=torch.float64) * remainder
    logits_NV = torch.cat([torch.tensor([1.0 - remainder], dtype=torch.float64), rest]).log()[None] + scale
    return Tokens(logits_NV.to(dtype).clone().requires_grad_(), logits_NV.to(dtype), torch.tensor([0]), (1,))


@pytest.mark.parametrize(("remainder", "tolerance"), [(1e-1, 1e-4), (1e-2, 1e-3), (1e-3, 1e-2), (1e-4, 1e-1)])
def test_ce_u_pulls_in_full_at_labels_that_are_almost_certain(remainder: float, tolerance: float) -> None:
    """p - u: 1 at the label, and minus what remains of p, spread over 1, elsewhere; in float32, where log p is rounded to 1e-6."""
    tokens = nearly_certain(remainder, dtype=torch.float32)
    gradient = forget_gradient(ObjectiveConfig(name="ce_u", skip_first_token=False), tokens).double()
    others = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125], dtype=torch.float64)
    expected = (1 - remainder) * torch.cat([torch.ones(1, dtype=torch.float64), -others])[None]
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=0)


def test_the_remainder_of_a_near_certainty_is_taken_from_its_logarithm() -> None:
    """log q = -4e-5, all other logits 10 below: -log p + 10 r / r = 4e-5 + 10. In float32 1 - exp(-4e-5) is off in the fourth digit."""
    log_prob = torch.tensor([-4e-5])
    remainder = -math.expm1(float(log_prob))
    value = demoted_cross_entropy(
        token_log_probs_N=log_prob,
        log_normaliser_N=-log_prob,
        mean_logit_N=torch.tensor([-10.0 * remainder]),
        teacher_log_probs_N=log_prob,
        penalty=math.inf,
    )
    assert float(value) == pytest.approx(10.00004, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["ce_u", "undial"])
def test_a_demoted_label_stays_finite_as_its_probability_goes_to_one(name: str, dtype: torch.dtype) -> None:
    """Below 256 machine epsilons the remainder counts as that much: the pull shrinks with it and ends at none, in any direction."""
    config = ObjectiveConfig(name=name, skip_first_token=False, **({"beta": 200.0} if name == "undial" else {}))
    smallest = 256 * torch.finfo(dtype).eps
    for remainder in (10 * smallest, smallest, smallest / 10, smallest / 1e4, 1e-30):
        tokens = nearly_certain(remainder, dtype=dtype)
        side = replace(draw_side(seed=0), answers=tokens, alternatives=tokens)
        value, gradients = by_terms(config, forget=side, retain=draw_side(seed=1))
        size = float(gradients["forget.answers"].abs().max())
        assert math.isfinite(float(value))
        assert size < 1.2
        if remainder <= smallest / 10:
            assert size < 0.2
        if remainder >= 10 * smallest:
            assert size > 0.8
    assert size < 1e-12


def test_an_undial_penalty_is_limited_where_it_would_drown_in_rounding() -> None:
    """Remainder r under an endless penalty, smallest s > r: the target keeps the label with 1 - r / s, and the others with r / s."""
    smallest = 256 * torch.finfo(torch.float64).eps
    tokens = nearly_certain(smallest / 4, dtype=torch.float64, scale=0.0)
    gradient = forget_gradient(ObjectiveConfig(name="undial", beta=300.0), tokens)
    assert float(gradient[0, 0]) == pytest.approx(1 - (1 - 0.25), abs=0.02)
    assert float(gradient[0, 1:].sum()) == pytest.approx(-0.25, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), penalty=st.floats(0, 12), shift=st.floats(-20, 20))
def test_a_demoted_cross_entropy_is_that_of_the_softmax_it_stands_for(seed: int, penalty: float, shift: float) -> None:
    """For any logits, penalties and constants added to the logits, against the target written out."""
    tokens = draw_tokens(seed=seed)
    scored = tokens.scored
    assert scored.distributions is not None
    assert scored.reference_token_log_probs_N is not None
    actual = demoted_cross_entropy(
        token_log_probs_N=scored.token_log_probs_N,
        log_normaliser_N=scored.distributions.log_normaliser_K + shift,
        mean_logit_N=scored.distributions.reference_mean_logit_K + shift,
        teacher_log_probs_N=scored.reference_token_log_probs_N,
        penalty=penalty,
    )
    target_NV = (tokens.reference_NV - penalty * torch.nn.functional.one_hot(tokens.label_N, 7).double()).softmax(dim=1)
    expected = -(target_NV * tokens.logits_NV.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_npo_at_the_reference_is_two_over_beta_log_two_per_sequence() -> None:
    """Ratio 1: (2 / beta) log(1 + 1), whatever the length; beta = 0.1 gives 13.8629 nats."""
    tokens = draw_tokens(seed=4, lengths=(4, 1))
    other = draw_side(seed=4, lengths=(4, 1))
    same = replace(other, answers=replace(tokens, reference_NV=tokens.logits_NV.detach()))
    for beta, expected in ((0.1, 13.862943611198906), (1.0, 1.3862943611198906)):
        for reduction in Reduction:
            actual = by_terms(ObjectiveConfig(name="npo", beta=beta, reduction=reduction), forget=same, retain=same)[0]
            assert float(actual) == pytest.approx(expected, abs=1e-12)
    assert float(by_terms(ObjectiveConfig(name="npo"), forget=other, retain=other)[0]) != pytest.approx(13.8629, abs=0.1)


def test_summed_npo_stops_pushing_where_token_mean_npo_goes_on() -> None:
    """40 tokens, each 5 nats below the reference, beta = 0.1.

    Sum: slope 2 sigmoid(-0.1 * 200) = 4.1e-9, nothing is left to forget. Mean: 2 sigmoid(-0.1 * 5) = 0.755, shared by 40 tokens.
    """
    tokens = shifted_pair(lengths=(40,), ratio_B=[-200.0])
    token_gradient = torch.autograd.grad(token_log_probs(tokens.logits_NV, label_N=tokens.label_N).sum(), tokens.logits_NV)[0]
    for reduction, slope in ((Reduction.SEQUENCE_SUM, 2 / (1 + math.exp(20.0))), (Reduction.TOKEN_MEAN, 2 / (1 + math.exp(0.5)) / 40)):
        terms = (npo_term(forget=tokens.scored, beta=0.1, reduction=reduction, weight=1.0),)
        loss = step_loss(terms, counts=StepCounts(SideCounts(tokens=40, sequences=1), SideCounts()))
        (actual,) = torch.autograd.grad(loss, tokens.logits_NV)
        torch.testing.assert_close(actual, slope * token_gradient, rtol=1e-9, atol=0)


def test_npo_stays_finite_for_ratios_that_overflow_the_exponential() -> None:
    """A sequence 5,000 nats likelier than under the reference: (2 / beta) log(1 + e^500) = 2 * 5000."""
    one = torch.full((5000,), -1.0)
    scored = Scored(one, torch.zeros(5000, dtype=torch.int64), 1, reference_token_log_probs_N=one - 1)
    total = npo_term(forget=scored, beta=0.1, reduction=Reduction.SEQUENCE_SUM, weight=1.0).total
    assert float(total) == pytest.approx(10_000.0, rel=1e-6)


def test_no_gradient_flows_into_the_reference_or_the_targets() -> None:
    side = draw_side(seed=6)
    fixed = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in {
            "log_probs": side.answers.scored.reference_token_log_probs_N,
            "alternative": side.alternatives.scored.reference_token_log_probs_N,
            "entropy": side.positions.distributions.reference_negative_entropy_K,
            "target": side.target_MD,
        }.items()
        if tensor is not None
    }
    forget = replace(
        side.scored(Side.FORGET),
        reference_token_log_probs_N=fixed["log_probs"],
        alternative=replace(side.alternatives.scored, reference_token_log_probs_N=fixed["alternative"]),
        activations=Activations(side.activation_MD, fixed["target"], rows_of(side.real_lengths)),
    )
    retain = replace(
        side.scored(Side.RETAIN), distributions=replace(side.positions.distributions, reference_negative_entropy_K=fixed["entropy"])
    )
    for config in EVERY_OBJECTIVE:
        loss = step_loss(objective_terms(config, forget=forget, retain=retain), counts=StepCounts(side.counts, side.counts))
        for name, gradient in zip(
            fixed, torch.autograd.grad(loss, list(fixed.values()), allow_unused=True, retain_graph=True), strict=True
        ):
            assert gradient is None, (config.name, name)


# --- laws: KL ---


def test_kl_of_a_model_with_itself_is_zero_with_zero_gradient() -> None:
    tokens = draw_tokens(seed=7)
    value = kl_reference_model(replace(tokens, reference_NV=tokens.logits_NV.detach()).distributions).sum()
    (gradient,) = torch.autograd.grad(value, tokens.logits_NV)
    assert abs(float(value.detach())) < 1e-14
    assert float(gradient.abs().max()) < 1e-15
    control = kl_reference_model(tokens.distributions).sum()
    assert float(control.detach()) > 1.0


def test_kl_takes_its_expectation_under_the_reference() -> None:
    """Two symbols, reference (1/2, 1/2), model (1/4, 3/4).

    KL(reference || model) = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3 = 0.14384 nats.
    KL(model || reference) = 1/4 log 1/2 + 3/4 log 3/2 = 0.13081 nats would be the other direction.
    """
    model, reference = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    actual = kl_reference_model(Tokens(model, reference, torch.tensor([0]), (1,)).distributions)
    assert float(actual) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    other = kl_reference_model(Tokens(reference, model, torch.tensor([0]), (1,)).distributions)
    assert float(other) == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50))
def test_kl_is_never_negative_and_ignores_a_constant_added_to_the_logits(seed: int, shift: float) -> None:
    tokens = draw_tokens(seed=seed)
    values = kl_reference_model(tokens.distributions).detach()
    shifted = replace(tokens, logits_NV=tokens.logits_NV + shift, reference_NV=tokens.reference_NV - shift)
    assert float(values.min()) >= -1e-14
    torch.testing.assert_close(kl_reference_model(shifted.distributions).detach(), values, rtol=0, atol=1e-9)


def test_kl_is_divided_by_the_positions_it_was_taken_at() -> None:
    """Twelve compared positions, nine scored tokens: the mean is over the twelve, or per sequence first."""
    side = draw_side(seed=4)
    each = kl_reference_model(side.positions.distributions).detach()
    assert len(each) == 12
    for average, expected in ((Average.TOKEN, each.mean()), (Average.SEQUENCE, (each[:6].mean() + each[6:8].mean() + each[8:].mean()) / 3)):
        config = ObjectiveConfig(name="kl_min", forget_weight=0.0, average=average, kl_scope=KlScope.REAL)
        assert float(by_terms(config, forget=side, retain=side)[0]) == pytest.approx(float(expected), rel=1e-12)


# --- laws: RMU and NGDiff ---


def test_rmu_of_worked_numbers() -> None:
    """Two tokens in two dimensions: distances (1 + 9) / 2 = 5 and (4 + 0) / 2 = 2, total 7; the mean over tokens is 3.5."""
    activations = Activations(torch.tensor([[1.0, 3.0], [2.0, 5.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0]))
    term = activation_term(activations=activations, num_rows=1, side=Side.RETAIN, weight=2.0, average=Average.TOKEN)
    assert float(term.total) == 7.0
    assert float(step_loss((term,), counts=StepCounts(SideCounts(), SideCounts(tokens=1, sequences=1, real_tokens=2)))) == 2 * 3.5


def test_a_control_vector_is_a_unit_vector_of_the_positive_orthant_drawn_from_its_seed() -> None:
    vector = control_vector(64, seed=3)
    assert (vector.dtype, vector.shape, vector.device.type) == (torch.float32, (64,), "cpu")
    assert float(vector.norm()) == pytest.approx(1.0, abs=1e-6)
    assert float(vector.min()) >= 0
    assert float(vector.std()) > 0.01
    torch.manual_seed(999)
    assert torch.equal(control_vector(64, seed=3), vector), "no other generator has a say"
    assert not torch.equal(control_vector(64, seed=4), vector)


def test_ng_diff_gives_both_gradients_length_one() -> None:
    """Forget (3, 4) of length 5 and retain (0, 0.1): coefficients 1/5 and 10; the sum of a side's gradient is not its length."""
    coefficients = normalised_coefficients(forget_norm=5.0, retain_norm=0.1)
    assert coefficients.forget == 0.2
    assert coefficients.retain == pytest.approx(10.0)
    forget, retain = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.1])
    update = coefficients.retain * retain + coefficients.forget * forget
    torch.testing.assert_close(update, torch.tensor([0.6, 1.8]))


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_the_scale_of_a_side_is_lost_under_ng_diff(factor: float) -> None:
    one, other = (
        normalised_coefficients(forget_norm=2.0, retain_norm=3.0),
        normalised_coefficients(forget_norm=2.0 * factor, retain_norm=3.0),
    )
    assert other.forget * factor == pytest.approx(one.forget)
    assert other.retain == one.retain


def test_a_side_without_gradient_stays_out_of_ng_diff_and_a_broken_one_stops_it() -> None:
    assert normalised_coefficients(forget_norm=0.0, retain_norm=4.0) == (0.0, 0.25)
    assert normalised_coefficients(forget_norm=4.0, retain_norm=0.0) == (0.25, 0.0)
    for bad in (math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match=r"forget_norm = .*must be finite"):
            normalised_coefficients(forget_norm=bad, retain_norm=1.0)
        with pytest.raises(ValueError, match=r"retain_norm = .*must be finite"):
            normalised_coefficients(forget_norm=1.0, retain_norm=bad)


# --- laws: rows and micro-batches ---


def test_ids_at_unscored_positions_are_never_labels() -> None:
    """With the logits held fixed, other prompt ids change nothing; another answer id does.

    The gradient by the full logits is zero at every position that predicts no answer token.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [EncodedRow("a", (1, 2, 3, 4, 5), 2), EncodedRow("b", (6, 7, 8), 1)]
    logits_SV = torch.randn(8, 9, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(rows: list[EncodedRow]) -> Tensor:
        batch = pack(rows, pad_token_id=0)
        scored = Scored(token_log_probs(logits_SV[batch.source_N], label_N=batch.label_N), batch.row_N, 2)
        term = grad_ascent_term(forget=scored, weight=1.0, average=Average.TOKEN)
        return step_loss((term,), counts=StepCounts(SideCounts(tokens=5, sequences=2), SideCounts()))

    expected = loss(rows)
    assert torch.equal(loss([EncodedRow("a", (8, 8, 3, 4, 5), 2), EncodedRow("b", (0, 7, 8), 1)]), expected)
    assert not torch.equal(loss([EncodedRow("a", (1, 2, 3, 4, 6), 2), rows[1]]), expected)
    (gradient,) = torch.autograd.grad(expected, logits_SV)
    batch = pack(rows, pad_token_id=0)
    moved = {(int(batch.row_S[s]), int(batch.position_ids_S[s])) for s in range(8) if float(gradient[s].abs().sum()) > 0}
    # Row a: tokens 2, 3, 4 are predicted at 1, 2, 3. Row b: tokens 1, 2 at 0, 1.
    assert moved == {(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}


@every_objective
def test_the_order_of_rows_changes_no_loss(config: ObjectiveConfig) -> None:
    """Alternatives move along. Control: with the alternatives left behind, a preference compares other pairs."""
    forget, retain = draw_side(seed=8), draw_side(seed=9)
    expected = loss_of(config, forget=forget, retain=retain)
    actual = loss_of(config, forget=forget.of_rows([2, 0, 1]), retain=retain.of_rows([1, 2, 0]))
    assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-12, abs=1e-12)
    if config.name in (ObjectiveName.DPO, ObjectiveName.IDK_DPO):
        mixed = replace(forget.of_rows([2, 0, 1]), alternatives=forget.alternatives)
        control = loss_of(config, forget=mixed, retain=retain)
        assert abs(float((control - expected).detach())) > 1e-3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 4), max_size=3), data=st.data())
def test_micro_batches_add_up_to_the_step(seed: int, cuts: list[int], data: st.DataObject) -> None:
    """However a step's rows are cut, pieces without rows included: values and gradients add up, divided by the counts of the step."""
    config = data.draw(st.sampled_from(EVERY_OBJECTIVE))
    forget, retain = draw_side(seed=seed, lengths=(5, 1, 3, 2)), draw_side(seed=seed + 1, lengths=(2, 4, 1, 1))
    counts = StepCounts(forget.counts, retain.counts)
    whole = loss_of(config, forget=forget, retain=retain)
    bounds = [0, *sorted(cuts), 4]
    pieces = [list(range(low, high)) for low, high in itertools.pairwise(bounds)]
    summed = sum(
        (loss_of(config, forget=forget.of_rows(rows), retain=retain.of_rows(rows), counts=counts) for rows in pieces), start=torch.zeros(())
    )
    torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-12)
    expected, actual = (gradients_of(loss, forget=forget, retain=retain) for loss in (whole, summed))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_objective
def test_micro_batches_with_counts_of_their_own_do_not_add_up(config: ObjectiveConfig) -> None:
    """Negative control. Rows of length 5 | 1 and 3: the mean of the micro-batches' means is something else."""
    forget, retain = draw_side(seed=8, lengths=(5, 1, 3)), draw_side(seed=9, lengths=(5, 1, 3))
    whole = loss_of(config, forget=forget, retain=retain)
    pieces = [loss_of(config, forget=forget.of_rows(rows), retain=retain.of_rows(rows)) for rows in ([0], [1, 2])]
    assert abs(float(((sum(pieces) / 2 - whole) / whole).detach())) > 1e-4


@every_objective
def test_a_side_without_rows_contributes_zero(config: ObjectiveConfig) -> None:
    empty = draw_side(seed=0).of_rows([])
    loss = loss_of(config, forget=empty, retain=empty)
    assert float(loss.detach()) == 0.0
    assert loss.requires_grad or loss.grad_fn is not None


@pytest.mark.parametrize("name", ["npo", "simnpo", "dpo"])
def test_a_row_without_scored_tokens_is_no_sequence(name: str) -> None:
    """Its log-ratio would be 0 and its loss (2 / beta) log 2, though the step does not count it."""
    side = draw_side(seed=0, lengths=(3, 2))
    whole = objective_terms(ObjectiveConfig(name=name), forget=side.scored(Side.FORGET), retain=side.scored(Side.RETAIN))[0]
    stretched = replace(side.answers, lengths=(3, 2, 0))
    longer = replace(side.alternatives, lengths=(*side.alternatives.lengths, 0))
    forget = replace(stretched.scored, alternative=longer.scored)
    actual = objective_terms(ObjectiveConfig(name=name), forget=forget, retain=side.scored(Side.RETAIN))[0]
    assert forget.num_rows == 3
    assert torch.equal(actual.total, whole.total)


# --- wrong input ---


@pytest.mark.parametrize(
    ("name", "side", "missing", "message"),
    [
        ("npo", Side.FORGET, "reference_token_log_probs_N", "forget_npo needs forget.reference_token_log_probs_N, which is missing"),
        ("dpo", Side.FORGET, "alternative", "forget_dpo needs forget.alternative, which is missing"),
        ("idk_dpo", Side.FORGET, "reference_token_log_probs_N", "forget_dpo needs forget.reference_token_log_probs_N, which is missing"),
        ("undial", Side.FORGET, "distributions", "forget_undial needs forget.distributions, which is missing"),
        ("undial", Side.FORGET, "reference_token_log_probs_N", "forget_undial needs forget.reference_token_log_probs_N"),
        ("ce_u", Side.FORGET, "mean_logit_N", "forget_ce_u needs forget.mean_logit_N, which is missing"),
        ("ce_u", Side.FORGET, "log_normaliser_N", "forget_ce_u needs forget.log_normaliser_N, which is missing"),
        ("rmu", Side.FORGET, "activations", "forget_rmu needs forget.activations, which is missing"),
        ("rmu", Side.RETAIN, "activations", "retain_activation needs retain.activations, which is missing"),
        ("kl_min", Side.RETAIN, "distributions", "retain_kl needs retain.distributions, which is missing"),
    ],
)
def test_a_missing_input_is_named(name: str, side: Side, missing: str, message: str) -> None:
    one = draw_side(seed=0)
    given = {which: one.scored(which) for which in Side}
    given[side] = replace(given[side], **{missing: None})
    with pytest.raises(ValueError, match=message):
        objective_terms(ObjectiveConfig(name=name), forget=given[Side.FORGET], retain=given[Side.RETAIN])


def test_a_mis_shaped_input_is_named_with_both_shapes() -> None:
    one = draw_side(seed=0)
    forget, retain = one.scored(Side.FORGET), one.scored(Side.RETAIN)
    short = torch.zeros(2)
    assert forget.distributions is not None
    assert forget.activations is not None
    assert retain.distributions is not None
    assert forget.alternative is not None
    wrong: list[tuple[str, Scored, Scored, str]] = [
        ("npo", replace(forget, reference_token_log_probs_N=short), retain, r"reference_token_log_probs_N of shape \(9,\), but got \(2,\)"),
        ("undial", replace(forget, distributions=retain.distributions), retain, r"reference_mean_logit_K of shape \(9,\), but got \(12,\)"),
        ("ce_u", replace(forget, mean_logit_N=short), retain, r"mean_logit_N of shape \(9,\), but got \(2,\)"),
        (
            "dpo",
            replace(forget, alternative=replace(forget.alternative, num_rows=2)),
            retain,
            "one alternative per forget row, but got 2 for 3",
        ),
        (
            "dpo",
            replace(forget, alternative=replace(forget.alternative, reference_token_log_probs_N=short)),
            retain,
            r"forget.alternative.reference_token_log_probs_N of shape",
        ),
        (
            "kl_min",
            forget,
            replace(retain, distributions=replace(retain.distributions, reference_negative_entropy_K=short)),
            r"retain.distributions.reference_negative_entropy_K of shape \(12,\), but got \(2,\)",
        ),
        (
            "rmu",
            replace(forget, activations=replace(forget.activations, target_MD=torch.zeros(4))),
            retain,
            r"forget_rmu needs one target and one row per activation, but activations are \(15, 4\), targets \(4,\)",
        ),
    ]
    for name, wrong_forget, wrong_retain, message in wrong:
        with pytest.raises(ValueError, match=message):
            objective_terms(ObjectiveConfig(name=name), forget=wrong_forget, retain=wrong_retain)
    with pytest.raises(ValueError, match="do not fit together"):
        token_log_probs(torch.zeros(2, 3), label_N=torch.zeros(3, dtype=torch.int64))


def test_settings_outside_their_range_are_refused() -> None:
    scored = draw_side(seed=0).scored(Side.FORGET)
    for call in (
        lambda: npo_term(forget=scored, beta=0.0, reduction=Reduction.SEQUENCE_SUM, weight=1.0),
        lambda: dpo_term(forget=scored, beta=0.0, reduction=Reduction.SEQUENCE_SUM, weight=1.0),
        lambda: simnpo_term(forget=scored, beta=0.0, margin=0.0, weight=1.0),
        lambda: undial_term(forget=scored, beta=0.0, weight=1.0, average=Average.TOKEN),
    ):
        with pytest.raises(ValueError, match=r"beta = 0.0, must be > 0"):
            call()
    with pytest.raises(ValueError, match=r"beta = -1.0, must be >= 0"):
        wga_term(forget=scored, beta=-1.0, weight=1.0, average=Average.TOKEN)
    with pytest.raises(ValueError, match=r"beta_2 = -1.0, must be >= 0"):
        satimp_term(forget=scored, beta_1=1.0, beta_2=-1.0, weight=1.0, average=Average.TOKEN)


# --- small pieces ---


def test_rows_are_summed_and_counted_apart() -> None:
    """Row 1 has no token: sum 0, count 0."""
    row_N = torch.tensor([0, 2, 2])
    assert sum_by_row(torch.tensor([1.0, 2.0, 4.0]), row_N=row_N, num_rows=3).tolist() == [1.0, 0.0, 6.0]
    assert tokens_by_row(row_N, num_rows=3).tolist() == [1, 0, 2]


def test_retain_terms_of_worked_numbers() -> None:
    """Two tokens with probabilities 1/2 and 1/8: the total is log 2 + log 8 = 4 log 2, divided by 2 tokens it is 2 log 2.

    With a third token of probability 1/4 in a row of its own: over tokens 6 log 2 / 3, over sequences (2 log 2 + 2 log 2) / 2, and a
    row of probability 1/2 instead gives 5/3 log 2 and 3/2 log 2.
    """
    scored = Scored(torch.tensor([0.5, 0.125]).log(), torch.tensor([0, 0]), 1)
    term: LossTerm = retain_ce_term(retain=scored, weight=3.0, average=Average.TOKEN)
    assert float(term.total) == pytest.approx(4 * math.log(2))
    assert float(step_loss((term,), counts=StepCounts(SideCounts(), SideCounts(tokens=2, sequences=1)))) == pytest.approx(6 * math.log(2))
    two = Scored(torch.tensor([0.5, 0.125, 0.5]).log(), torch.tensor([0, 0, 1]), 2)
    counts = StepCounts(SideCounts(), SideCounts(tokens=3, sequences=2))
    for average, expected in ((Average.TOKEN, 5 / 3), (Average.SEQUENCE, 3 / 2)):
        loss = step_loss((retain_ce_term(retain=two, weight=1.0, average=average),), counts=counts)
        assert float(loss) == pytest.approx(expected * math.log(2))
