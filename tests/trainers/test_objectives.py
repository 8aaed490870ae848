"""What every objective computes: its value and its gradient, against loops in float64 and against worked numbers.

Shape suffixes: N scored tokens, B rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import reference_objectives as loops
from trainers.config import ObjectiveConfig, ObjectiveName, Reduction
from trainers.data.batches import collate
from trainers.data.encode import EncodedRow
from trainers.objectives.grad_ascent import grad_ascent_term
from trainers.objectives.log_probs import sum_by_row, token_log_probs, tokens_by_row
from trainers.objectives.npo import npo_term
from trainers.objectives.retain_ce import retain_ce_term
from trainers.objectives.retain_kl import kl_reference_model, retain_kl_term
from trainers.objectives.table import OBJECTIVES, Need, Weights, needs, objective_terms, resolve_weights
from trainers.objectives.terms import LossTerm, Scored, Side, StepCounts, Unit, step_loss

FLOAT64_TOLERANCE = 1e-12
"""Values are below 100 nats: 1e-12 leaves two digits to the order of sums and rejects everything else."""

FLOAT32_TOLERANCE = 1e-5
"""Relative. Measured over 20 seeds: at most 9e-7; log-softmax in bfloat16 errs by 1e-3 and more."""


@dataclass(frozen=True)
class OneSet:
    """One set of a step as tensors, and the same as lists for the loops."""

    logits_NV: Tensor
    reference_NV: Tensor
    label_N: Tensor
    lengths: tuple[int, ...]

    @property
    def row_N(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.int64))

    @property
    def scored(self) -> Scored:
        return Scored(
            token_log_probs_N=token_log_probs(self.logits_NV, label_N=self.label_N),
            row_N=self.row_N,
            num_rows=len(self.lengths),
            logits_NV=self.logits_NV,
            reference_token_log_probs_N=token_log_probs(self.reference_NV, label_N=self.label_N),
            reference_logits_NV=self.reference_NV,
        )

    @property
    def sequences(self) -> list[loops.Sequence]:
        tokens = [
            loops.Token(self.logits_NV[i].tolist(), self.reference_NV[i].tolist(), int(self.label_N[i])) for i in range(len(self.label_N))
        ]
        starts = [sum(self.lengths[:index]) for index in range(len(self.lengths))]
        return [tokens[start : start + length] for start, length in zip(starts, self.lengths, strict=True)]

    def to(self, dtype: torch.dtype) -> OneSet:
        return OneSet(self.logits_NV.detach().to(dtype).requires_grad_(), self.reference_NV.to(dtype), self.label_N, self.lengths)


def draw_side(*, seed: int, lengths: tuple[int, ...] = (5, 1, 3), vocabulary: int = 7) -> OneSet:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), vocabulary)
    return OneSet(
        logits_NV=(3 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_(),
        reference_NV=3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        label_N=torch.randint(vocabulary, shape[:1], generator=generator),
        lengths=lengths,
    )


def flat(gradient: loops.Gradient) -> Tensor:
    return torch.tensor([row for sequence in gradient for row in sequence], dtype=torch.float64)


def own_counts(forget: OneSet, retain: OneSet) -> StepCounts:
    return StepCounts(len(forget.label_N), len(forget.lengths), len(retain.label_N), len(retain.lengths))


def by_loops(config: ObjectiveConfig, *, forget: OneSet, retain: OneSet) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients of an objective from the loops, with the weights that the configuration names."""
    weights = resolve_weights(config)
    if config.name in (ObjectiveName.NPO, ObjectiveName.NPO_CE_KL):
        value, gradient = loops.npo(forget.sequences, beta=config.beta, token_mean=config.reduction is Reduction.TOKEN_MEAN)
    else:
        value, gradient = loops.grad_ascent(forget.sequences)
    ce, ce_gradient = loops.retain_ce(retain.sequences)
    kl, kl_gradient = loops.retain_kl(retain.sequences)
    loss = weights.forget * value + weights.retain_ce * ce + weights.retain_kl * kl
    return loss, weights.forget * flat(gradient), weights.retain_ce * flat(ce_gradient) + weights.retain_kl * flat(kl_gradient)


def by_terms(config: ObjectiveConfig, *, forget: OneSet, retain: OneSet) -> tuple[Tensor, Tensor, Tensor]:
    """The same through the code under test and autograd."""
    terms = objective_terms(config, forget=forget.scored, retain=retain.scored)
    loss = step_loss(terms, counts=own_counts(forget, retain))
    gradients = torch.autograd.grad(loss, [forget.logits_NV, retain.logits_NV], allow_unused=True, materialize_grads=True)
    return loss.detach(), gradients[0], gradients[1]


EVERY_OBJECTIVE = [
    *[ObjectiveConfig(name=name) for name in ObjectiveName],
    *[ObjectiveConfig(name=name, beta=0.7, reduction=Reduction.TOKEN_MEAN) for name in (ObjectiveName.NPO, ObjectiveName.NPO_CE_KL)],
    ObjectiveConfig(name=ObjectiveName.NPO, beta=2.5),
    ObjectiveConfig(name=ObjectiveName.NPO_CE_KL, forget_weight=0.3, retain_ce_weight=1.7, retain_kl_weight=0.9),
    ObjectiveConfig(name=ObjectiveName.GRAD_DIFF, forget_weight=0.05, retain_kl_weight=2.0),
]


def objective_id(config: ObjectiveConfig) -> str:
    return "-".join(str(value) for value in config.model_dump(mode="json", exclude_unset=True).values())


# --- parity with the loops ---


def test_the_loops_gradients_are_those_of_their_values() -> None:
    """The reference itself is checked by central differences, so that a slip in it cannot bless one in the code."""
    step = 1e-5
    functions = {
        "grad_ascent": loops.grad_ascent,
        "retain_ce": loops.retain_ce,
        "retain_kl": loops.retain_kl,
        "npo": lambda rows: loops.npo(rows, beta=0.8, token_mean=False),
        "npo_token_mean": lambda rows: loops.npo(rows, beta=0.8, token_mean=True),
    }
    side = draw_side(seed=0, lengths=(2, 1), vocabulary=4)
    for name, function in functions.items():
        gradient = flat(function(side.sequences)[1])
        for token in range(3):
            for entry in range(4):
                values = []
                for sign in (1, -1):
                    moved = side.logits_NV.detach().clone()
                    moved[token, entry] += sign * step
                    values.append(function(OneSet(moved, side.reference_NV, side.label_N, side.lengths).sequences)[0])
                difference = (values[0] - values[1]) / (2 * step)
                assert float(gradient[token, entry]) == pytest.approx(difference, abs=1e-9), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", EVERY_OBJECTIVE, ids=objective_id)
def test_every_objective_equals_the_loops_in_value_and_gradient(config: ObjectiveConfig, seed: int) -> None:
    forget, retain = draw_side(seed=seed), draw_side(seed=100 + seed, lengths=(2, 4))
    expected = by_loops(config, forget=forget, retain=retain)
    actual = by_terms(config, forget=forget, retain=retain)
    torch.testing.assert_close(float(actual[0]), expected[0], rtol=0, atol=FLOAT64_TOLERANCE)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=FLOAT64_TOLERANCE)
    torch.testing.assert_close(actual[2], expected[2], rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("config", EVERY_OBJECTIVE, ids=objective_id)
def test_every_objective_equals_the_loops_in_float32(config: ObjectiveConfig) -> None:
    """Both read the same float32 logits; only the arithmetic differs."""
    forget, retain = draw_side(seed=5).to(torch.float32), draw_side(seed=105, lengths=(2, 4)).to(torch.float32)
    expected = by_loops(config, forget=forget, retain=retain)
    actual = by_terms(config, forget=forget, retain=retain)
    assert actual[0].dtype == torch.float32
    assert float(actual[0]) == pytest.approx(expected[0], rel=FLOAT32_TOLERANCE, abs=FLOAT32_TOLERANCE)
    for side in (1, 2):
        torch.testing.assert_close(actual[side].double(), expected[side], rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


def test_bfloat16_logits_are_widened_before_any_arithmetic() -> None:
    """The result is that of the same rounded logits in float32, exactly; bfloat16 arithmetic would be off in the third digit."""
    side = draw_side(seed=9)
    rounded = side.to(torch.bfloat16)
    expected = side.to(torch.bfloat16).to(torch.float32)
    for config in (ObjectiveConfig(name="npo"), ObjectiveConfig(name="kl_min"), ObjectiveConfig(name="grad_diff")):
        actual_terms = objective_terms(config, forget=rounded.scored, retain=rounded.scored)
        expected_terms = objective_terms(config, forget=expected.scored, retain=expected.scored)
        for actual, wide in zip(actual_terms, expected_terms, strict=True):
            assert actual.total.dtype == torch.float32
            assert torch.equal(actual.total, wide.total)
    narrow = side.logits_NV.detach().bfloat16().log_softmax(dim=1)
    assert float((narrow - expected.logits_NV.detach().log_softmax(dim=1)).abs().max()) > 1e-3


# --- the table ---


def test_default_weights_are_the_published_ones() -> None:
    """GradAscent, GradDiff and KL-min: 1, as in TOFU. NPO: alone, as in its paper. NPO + CE + KL: 0.4, 0.2, 0.4, as ZJUKLAB."""
    expected = {
        ObjectiveName.GRAD_ASCENT: Weights(1.0, 0.0, 0.0),
        ObjectiveName.GRAD_DIFF: Weights(1.0, 1.0, 0.0),
        ObjectiveName.KL_MIN: Weights(1.0, 0.0, 1.0),
        ObjectiveName.NPO: Weights(1.0, 0.0, 0.0),
        ObjectiveName.NPO_CE_KL: Weights(forget=0.4, retain_ce=0.2, retain_kl=0.4),
    }
    assert set(expected) == set(ObjectiveName) == set(OBJECTIVES)
    assert {name: resolve_weights(ObjectiveConfig(name=name)) for name in ObjectiveName} == expected


def test_every_objective_cites_its_source() -> None:
    assert len(OBJECTIVES) == 5
    for info in OBJECTIVES.values():
        assert info.source.startswith("https://arxiv.org/abs/")


def test_a_configured_weight_replaces_the_published_one_even_when_it_is_zero() -> None:
    assert resolve_weights(ObjectiveConfig(name="npo_ce_kl", retain_kl_weight=0.0)) == Weights(0.4, 0.2, 0.0)
    assert resolve_weights(ObjectiveConfig(name="grad_ascent", retain_ce_weight=0.5)) == Weights(1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ObjectiveConfig(name="grad_ascent"), set()),
        (ObjectiveConfig(name="grad_diff"), set()),
        (ObjectiveConfig(name="kl_min"), {Need.RETAIN_REFERENCE_LOGITS}),
        (ObjectiveConfig(name="npo"), {Need.FORGET_REFERENCE_LOG_PROBS}),
        (ObjectiveConfig(name="npo_ce_kl"), {Need.FORGET_REFERENCE_LOG_PROBS, Need.RETAIN_REFERENCE_LOGITS}),
        (ObjectiveConfig(name="npo_ce_kl", retain_kl_weight=0.0), {Need.FORGET_REFERENCE_LOG_PROBS}),
        (ObjectiveConfig(name="grad_ascent", retain_kl_weight=0.1), {Need.RETAIN_REFERENCE_LOGITS}),
    ],
    ids=str,
)
def test_an_objective_says_what_it_needs_from_the_loop(config: ObjectiveConfig, expected: set[Need]) -> None:
    assert needs(config) == expected


def test_terms_name_their_unit_and_their_set() -> None:
    """NPO counts sequences, everything else counts tokens."""
    side = draw_side(seed=0).scored
    terms = [
        *objective_terms(ObjectiveConfig(name="npo_ce_kl"), forget=side, retain=side),
        *objective_terms(ObjectiveConfig(name="grad_ascent"), forget=side, retain=side),
    ]
    assert [(term.name, term.unit, term.side, term.weight) for term in terms] == [
        ("forget_npo", Unit.SEQUENCE, Side.FORGET, 0.4),
        ("retain_ce", Unit.TOKEN, Side.RETAIN, 0.2),
        ("retain_kl", Unit.TOKEN, Side.RETAIN, 0.4),
        ("forget_grad_ascent", Unit.TOKEN, Side.FORGET, 1.0),
    ]


# --- laws ---


def test_grad_diff_with_retain_weight_zero_is_gradient_ascent() -> None:
    forget, retain = draw_side(seed=1), draw_side(seed=2)
    expected = by_terms(ObjectiveConfig(name="grad_ascent"), forget=forget, retain=retain)
    actual = by_terms(ObjectiveConfig(name="grad_diff", retain_ce_weight=0.0), forget=forget, retain=retain)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    control = by_terms(ObjectiveConfig(name="grad_diff"), forget=forget, retain=retain)
    assert abs(float(control[0] - expected[0])) > 0.1
    assert float(control[2].abs().max()) > 0.01


def test_gradient_ascent_lowers_the_answers_and_rehearsal_raises_them() -> None:
    """A small step against the gradient: forget answers become less likely, retain answers more."""
    forget, retain = draw_side(seed=1), draw_side(seed=2)
    for name in ("grad_diff", "npo_ce_kl"):
        _, forget_gradient, retain_gradient = by_terms(
            ObjectiveConfig(name=name, retain_ce_weight=1.0, retain_kl_weight=0.0), forget=forget, retain=retain
        )
        for side, gradient, sign in ((forget, forget_gradient, -1), (retain, retain_gradient, 1)):
            before = token_log_probs(side.logits_NV.detach(), label_N=side.label_N).sum()
            after = token_log_probs(side.logits_NV.detach() - 1e-2 * gradient, label_N=side.label_N).sum()
            assert sign * float(after - before) > 0, name


def shifted_pair(*, lengths: tuple[int, ...], ratio_B: list[float]) -> OneSet:
    """Two-symbol sequences with log p = -6 per token and the given log-ratios to the reference, spread evenly over their tokens."""
    label_N = draw_side(seed=3, lengths=lengths, vocabulary=2).label_N
    model_N = torch.full((sum(lengths),), -6.0, dtype=torch.float64)
    each_B = torch.tensor(ratio_B, dtype=torch.float64) / torch.tensor(lengths, dtype=torch.float64)
    ratio_N = each_B.repeat_interleave(torch.tensor(lengths))

    def logits_of(log_prob_N: Tensor) -> Tensor:
        other_N = torch.log1p(-log_prob_N.exp())
        pairs = torch.stack([log_prob_N, other_N], dim=1)
        return torch.where(label_N[:, None] == 0, pairs, pairs.flip(1))

    return OneSet(logits_of(model_N).requires_grad_(), logits_of(model_N - ratio_N), label_N, lengths)


def test_npo_tends_to_gradient_ascent_as_beta_goes_to_zero() -> None:
    """d(2/beta log(1 + e^(beta d)))/dd = 2 sigmoid(beta d) = 1 + tanh(beta d / 2), per sequence; gradient ascent has 1.

    Gradient ascent divides by the 6 tokens, NPO by the 3 sequences: its gradient is 6 / 3 times as large in the limit.
    With log-ratios of 2, -1 and -5 nats the largest relative deviation is tanh(2.5 beta): 0.987 at beta = 1, 0.245 at 0.1,
    0.0025 at 0.001.
    """
    side = shifted_pair(lengths=(1, 3, 2), ratio_B=[2.0, -1.0, -5.0])
    ascent = by_terms(ObjectiveConfig(name="grad_ascent"), forget=side, retain=side)[1] * (6 / 3)
    for beta, expected in ((1.0, 0.987), (0.1, 0.245), (0.001, 0.0025)):
        actual = by_terms(ObjectiveConfig(name="npo", beta=beta), forget=side, retain=side)[1]
        deviation = ((actual - ascent) / ascent).abs().max()
        assert float(deviation) == pytest.approx(expected, abs=1e-3)


def test_npo_at_the_reference_is_two_over_beta_log_two_per_sequence() -> None:
    """Ratio 1: (2 / beta) log(1 + 1), whatever the length; beta = 0.1 gives 13.8629 nats."""
    side = draw_side(seed=4, lengths=(4, 1))
    same = OneSet(side.logits_NV, side.logits_NV.detach(), side.label_N, side.lengths)
    for beta, expected in ((0.1, 13.862943611198906), (1.0, 1.3862943611198906)):
        for reduction in Reduction:
            actual = by_terms(ObjectiveConfig(name="npo", beta=beta, reduction=reduction), forget=same, retain=same)[0]
            assert float(actual) == pytest.approx(expected, abs=1e-12)
    assert float(by_terms(ObjectiveConfig(name="npo"), forget=side, retain=side)[0]) != pytest.approx(13.8629, abs=0.1)


def test_summed_npo_stops_pushing_where_token_mean_npo_goes_on() -> None:
    """40 tokens, each 5 nats below the reference, beta = 0.1.

    Sum: slope 2 sigmoid(-0.1 * 200) = 4.1e-9, nothing is left to forget. Mean: 2 sigmoid(-0.1 * 5) = 0.755, shared by 40 tokens.
    """
    side = shifted_pair(lengths=(40,), ratio_B=[-200.0])
    token_gradient = torch.autograd.grad(token_log_probs(side.logits_NV, label_N=side.label_N).sum(), side.logits_NV)[0]
    for reduction, slope in ((Reduction.SEQUENCE_SUM, 2 / (1 + math.exp(20.0))), (Reduction.TOKEN_MEAN, 2 / (1 + math.exp(0.5)) / 40)):
        actual = by_terms(ObjectiveConfig(name="npo", reduction=reduction), forget=side, retain=side)[1]
        torch.testing.assert_close(actual, slope * token_gradient, rtol=1e-9, atol=0)


def test_npo_stays_finite_for_ratios_that_overflow_the_exponential() -> None:
    """A sequence 5,000 nats likelier than under the reference: (2 / beta) log(1 + e^500) = 2 * 5000."""
    one = torch.full((5000,), -1.0)
    scored = Scored(one, torch.zeros(5000, dtype=torch.int64), 1, reference_token_log_probs_N=one - 1)
    total = npo_term(forget=scored, beta=0.1, reduction=Reduction.SEQUENCE_SUM, weight=1.0).total
    assert float(total) == pytest.approx(10_000.0, rel=1e-6)


def test_no_gradient_flows_into_the_reference() -> None:
    side = draw_side(seed=6)
    reference = side.reference_NV.clone().requires_grad_()
    scored = OneSet(side.logits_NV, reference, side.label_N, side.lengths).scored
    terms = objective_terms(ObjectiveConfig(name="npo_ce_kl"), forget=scored, retain=scored)
    step_loss(terms, counts=StepCounts(1, 1, 1, 1)).backward()
    assert reference.grad is None or float(reference.grad.abs().max()) == 0.0
    assert side.logits_NV.grad is not None
    assert float(side.logits_NV.grad.abs().max()) > 0


def test_kl_of_a_model_with_itself_is_zero_with_zero_gradient() -> None:
    side = draw_side(seed=7)
    value = kl_reference_model(logits_NV=side.logits_NV, reference_logits_NV=side.logits_NV.detach())
    (gradient,) = torch.autograd.grad(value, side.logits_NV)
    assert float(value.detach()) == 0.0
    assert float(gradient.abs().max()) < 1e-15
    control = kl_reference_model(logits_NV=side.logits_NV, reference_logits_NV=side.reference_NV)
    assert float(control.detach()) > 1.0


def test_kl_takes_its_expectation_under_the_reference() -> None:
    """Two symbols, reference (1/2, 1/2), model (1/4, 3/4).

    KL(reference || model) = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3 = 0.14384 nats.
    KL(model || reference) = 1/4 log 1/2 + 3/4 log 3/2 = 0.13081 nats would be the other direction.
    """
    model, reference = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    actual = kl_reference_model(logits_NV=model, reference_logits_NV=reference)
    assert float(actual) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    other = kl_reference_model(logits_NV=reference, reference_logits_NV=model)
    assert float(other) == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50))
def test_kl_is_never_negative_and_ignores_a_constant_added_to_the_logits(seed: int, shift: float) -> None:
    side = draw_side(seed=seed)
    value = float(kl_reference_model(logits_NV=side.logits_NV, reference_logits_NV=side.reference_NV).detach())
    shifted = float(kl_reference_model(logits_NV=side.logits_NV + shift, reference_logits_NV=side.reference_NV - shift).detach())
    assert value >= 0
    assert shifted == pytest.approx(value, abs=1e-9)


def test_ids_at_unscored_positions_are_never_labels() -> None:
    """With the logits held fixed, other prompt and padding ids change nothing; another answer id does.

    The gradient by the full logits is zero at every position that predicts no answer token.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [EncodedRow("a", (1, 2, 3, 4, 5), 2), EncodedRow("b", (6, 7, 8), 1)]
    logits_BTV = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(rows: list[EncodedRow], *, pad_token_id: int) -> Tensor:
        batch = collate(rows, pad_token_id=pad_token_id)
        logits_NV = logits_BTV[batch.row_N, batch.position_N]
        scored = Scored(token_log_probs(logits_NV, label_N=batch.label_N), batch.row_N, 2)
        return step_loss((grad_ascent_term(forget=scored, weight=1.0),), counts=StepCounts(5, 2, 0, 0))

    expected = loss(rows, pad_token_id=0)
    same_answers = [EncodedRow("a", (8, 8, 3, 4, 5), 2), EncodedRow("b", (0, 7, 8), 1)]
    assert torch.equal(loss(same_answers, pad_token_id=5), expected)
    other_answer = [EncodedRow("a", (1, 2, 3, 4, 6), 2), rows[1]]
    assert not torch.equal(loss(other_answer, pad_token_id=0), expected)
    (gradient,) = torch.autograd.grad(expected, logits_BTV)
    # Row a: tokens 2, 3, 4 are predicted at 1, 2, 3. Row b: tokens 1, 2 at 0, 1.
    assert (gradient.abs().sum(dim=2) > 0).tolist() == [[False, True, True, True, False], [True, True, False, False, False]]


def test_the_order_of_rows_changes_no_term() -> None:
    side, order = draw_side(seed=8, lengths=(2, 2, 2)), [4, 5, 0, 1, 2, 3]
    moved = OneSet(side.logits_NV[order], side.reference_NV[order], side.label_N[order], side.lengths)
    for config in EVERY_OBJECTIVE:
        expected = step_loss(objective_terms(config, forget=side.scored, retain=side.scored), counts=StepCounts(6, 3, 6, 3))
        actual = step_loss(objective_terms(config, forget=moved.scored, retain=moved.scored), counts=StepCounts(6, 3, 6, 3))
        assert float(actual.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)


# --- empty and wrong input ---


def test_a_side_without_rows_contributes_zero() -> None:
    empty = Scored(
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int64),
        0,
        logits_NV=torch.zeros(0, 7),
        reference_token_log_probs_N=torch.zeros(0),
        reference_logits_NV=torch.zeros(0, 7),
    )
    for config in EVERY_OBJECTIVE:
        terms = objective_terms(config, forget=empty, retain=empty)
        assert float(step_loss(terms, counts=StepCounts(0, 0, 0, 0))) == 0.0


def test_missing_or_mis_shaped_input_is_refused() -> None:
    side = draw_side(seed=0).scored
    bare = Scored(side.token_log_probs_N, side.row_N, side.num_rows)
    short = Scored(side.token_log_probs_N, side.row_N, side.num_rows, reference_token_log_probs_N=torch.zeros(2))
    for forget in (bare, short):
        with pytest.raises(ValueError, match="npo needs one reference log-probability per scored forget token"):
            npo_term(forget=forget, beta=0.1, reduction=Reduction.SEQUENCE_SUM, weight=1.0)
    with pytest.raises(ValueError, match=r"beta = 0.0, must be > 0"):
        npo_term(forget=side, beta=0.0, reduction=Reduction.SEQUENCE_SUM, weight=1.0)
    with pytest.raises(ValueError, match="retain_kl needs the logits"):
        retain_kl_term(retain=bare, weight=1.0)
    with pytest.raises(ValueError, match="differ in shape"):
        kl_reference_model(logits_NV=torch.zeros(2, 3), reference_logits_NV=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="do not fit together"):
        token_log_probs(torch.zeros(2, 3), label_N=torch.zeros(3, dtype=torch.int64))


def test_rows_are_summed_and_counted_apart() -> None:
    """Row 1 has no token: sum 0, count 0."""
    row_N = torch.tensor([0, 2, 2])
    assert sum_by_row(torch.tensor([1.0, 2.0, 4.0]), row_N=row_N, num_rows=3).tolist() == [1.0, 0.0, 6.0]
    assert tokens_by_row(row_N, num_rows=3).tolist() == [1, 0, 2]


def test_retain_terms_of_worked_numbers() -> None:
    """Two tokens with probabilities 1/2 and 1/8: the total is log 2 + log 8 = 4 log 2, divided by 2 tokens it is 2 log 2."""
    scored = Scored(torch.tensor([0.5, 0.125]).log(), torch.tensor([0, 0]), 1)
    term: LossTerm = retain_ce_term(retain=scored, weight=3.0)
    assert float(term.total) == pytest.approx(4 * math.log(2))
    assert float(step_loss((term,), counts=StepCounts(0, 0, 2, 1))) == pytest.approx(3 * 2 * math.log(2))
