"""One chunked sweep equals logits held whole: every value and every gradient, for frozen and trained heads.

Shape suffixes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainers import vocabulary
from trainers.vocabulary import ReferenceDistributions, measure_vocabulary, score_vocabulary

N, D, V = 11, 6, 29
TOLERANCE = 1e-12
"""Float64: what is equal in theory is equal to rounding; a dropped term or chunk differs by more than 1e-3."""


class Case:
    """Random states, head, labels and a reference, with the logits that the sweep avoids."""

    def __init__(self, *, seed: int = 0, num: int = N, trained: bool = True, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden_ND = draw(num, D).requires_grad_()
        self.head_VD = draw(V, D).requires_grad_(trained)
        self.label_N = torch.randint(V, (num,), generator=generator)
        self.reference_hidden_ND, self.reference_head_VD = draw(num, D), draw(V, D)
        self.weights = torch.rand(4, num, generator=generator, dtype=torch.float64).to(dtype) - 0.3

    def reference(self, *, frozen: bool) -> ReferenceDistributions:
        q_NV = (self.reference_hidden_ND @ self.reference_head_VD.T).softmax(dim=1)
        entropy_N = (q_NV * q_NV.log()).sum(dim=1)
        if frozen:
            return ReferenceDistributions(entropy_N, mean_embedding_ND=q_NV @ self.head_VD.detach())
        return ReferenceDistributions(entropy_N, hidden_ND=self.reference_hidden_ND, head_VD=self.reference_head_VD)

    def whole(self) -> list[Tensor]:
        """The four values from full logits, by autograd."""
        logits_NV = self.hidden_ND @ self.head_VD.T
        q_NV = (self.reference_hidden_ND @ self.reference_head_VD.T).softmax(dim=1)
        return [
            logits_NV.log_softmax(dim=1).gather(1, self.label_N[:, None]).squeeze(1),
            logits_NV.logsumexp(dim=1),
            (logits_NV.softmax(dim=1).detach() * logits_NV).sum(dim=1),
            (q_NV * logits_NV).sum(dim=1),
        ]

    def swept(self, *, chunk_rows: int, frozen_form: bool = False) -> list[Tensor]:
        scores = score_vocabulary(
            self.hidden_ND,
            head_VD=self.head_VD,
            label_N=self.label_N,
            reference=self.reference(frozen=frozen_form),
            mean_logit=True,
            chunk_rows=chunk_rows,
        )
        assert scores.mean_logit_N is not None
        assert scores.reference_mean_logit_N is not None
        return [scores.log_prob_N, scores.log_normaliser_N, scores.mean_logit_N, scores.reference_mean_logit_N]

    def gradients(self, values: list[Tensor]) -> list[Tensor]:
        inputs = [value for value in (self.hidden_ND, self.head_VD) if value.requires_grad]
        return list(torch.autograd.grad(sum((w * v).sum() for w, v in zip(self.weights, values, strict=True)), inputs))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), chunk_rows=st.integers(1, 15), num=st.integers(0, 13), trained=st.booleans())
def test_a_chunked_sweep_equals_full_logits_in_value_and_gradient(seed: int, chunk_rows: int, num: int, trained: bool) -> None:
    case = Case(seed=seed, num=num, trained=trained)
    expected, actual = case.whole(), case.swept(chunk_rows=chunk_rows)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(case.gradients(actual), case.gradients(expected), rtol=0, atol=TOLERANCE)


def test_one_vector_per_position_replaces_the_reference_of_a_frozen_head() -> None:
    case = Case(trained=False)
    expected, actual = case.whole(), case.swept(chunk_rows=4, frozen_form=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(case.gradients(actual), case.gradients(expected), rtol=0, atol=TOLERANCE)


def test_the_one_vector_form_has_the_wrong_gradient_for_a_trained_head() -> None:
    """The negative control: c does not move with W, so its gradient by W is missing."""
    case = Case(trained=True)
    hidden, head = case.gradients(case.swept(chunk_rows=4, frozen_form=True))
    expected_hidden, expected_head = case.gradients(case.whole())
    torch.testing.assert_close(hidden, expected_hidden, rtol=0, atol=TOLERANCE)
    assert float((head - expected_head).abs().max()) > 1e-2


@pytest.mark.parametrize("which", range(4))
def test_each_value_alone_has_its_own_gradient(which: int) -> None:
    case = Case(seed=which)
    gradients = [
        torch.autograd.grad((case.weights[which] * values[which]).sum(), [case.hidden_ND, case.head_VD])
        for values in (case.swept(chunk_rows=3), case.whole())
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=TOLERANCE)


def test_nothing_of_vocabulary_size_is_kept_for_the_backward_pass_of_a_frozen_head() -> None:
    case = Case(trained=False)
    kept: list[tuple[int, ...]] = []

    def note(value: Tensor) -> Tensor:
        kept.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        case.swept(chunk_rows=3, frozen_form=True)
    assert kept
    assert not [shape for shape in kept if V in shape]


def test_float32_errs_by_rounding_only() -> None:
    """Measured over 20 seeds: values differ by at most 4e-6 and gradients by 3e-6; bfloat16 arithmetic would err by 1e-2."""
    for seed in range(5):
        wide, narrow = Case(seed=seed), Case(seed=seed, dtype=torch.float32)
        expected, actual = wide.whole(), narrow.swept(chunk_rows=4)
        torch.testing.assert_close([value.double() for value in actual], expected, rtol=0, atol=4e-5)
        found = [value.double() for value in narrow.gradients(actual)]
        torch.testing.assert_close(found, wide.gradients(expected), rtol=0, atol=4e-5)


def test_bfloat16_states_are_widened_before_any_arithmetic() -> None:
    """The values are those of the rounded states in float64; only the returned gradient is bfloat16 again."""
    narrow = Case(dtype=torch.bfloat16)
    actual = narrow.swept(chunk_rows=4)
    wide = Case()
    for name in ("hidden_ND", "head_VD", "reference_hidden_ND", "reference_head_VD"):
        value = getattr(narrow, name)
        setattr(wide, name, value.detach().double().requires_grad_(value.requires_grad))
    assert all(value.dtype == torch.float32 for value in actual)
    torch.testing.assert_close([value.double() for value in actual], wide.whole(), rtol=0, atol=1e-5)
    assert all(value.dtype == torch.bfloat16 for value in narrow.gradients(actual))


@pytest.mark.parametrize("certainty", [0.9, 0.999])
def test_a_head_that_stays_narrow_keeps_what_is_left_beside_a_likely_label(certainty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """CE-U divides sum_{v != y} p_v W_v by 1 - p_y, so rounding p_y to bfloat16 must not reach it.

    Measured: relative errors of 3e-3 at both; with p_y rounded like the rest 0.02 and 1.
    """
    monkeypatch.setattr(vocabulary, "WIDENING_DEVICES", set())
    # What a GPU does with narrow factors: exact products, summed in float32.
    monkeypatch.setattr(vocabulary, "_product", lambda left, right: left.float() @ right.float())
    generator = torch.Generator().manual_seed(0)
    head_VD = (0.3 * torch.randn(200, 64, generator=generator)).bfloat16()
    label_N = torch.arange(16)
    hidden_ND = head_VD[label_N].float()
    for _ in range(60):  # scale each state until its label has about the wanted probability
        p_N = (hidden_ND @ head_VD.float().T).softmax(dim=1).gather(1, label_N[:, None])
        hidden_ND = hidden_ND * torch.where(p_N < certainty, 1.05, 0.97)
    hidden_ND = hidden_ND.bfloat16()
    wide_VD = head_VD.double()
    p_NV = (hidden_ND.double() @ wide_VD.T).softmax(dim=1)
    expected_ND = p_NV.scatter(1, label_N[:, None], 0.0) @ wide_VD

    def error(mean_embedding_ND: Tensor) -> float:
        rest_ND = mean_embedding_ND.double() - p_NV.gather(1, label_N[:, None]) * wide_VD[label_N]
        return float(((rest_ND - expected_ND).norm(dim=1) / expected_ND.norm(dim=1)).max())

    measured = measure_vocabulary(hidden_ND, head_VD=head_VD, label_N=label_N, mean_embedding=True, chunk_rows=5)
    assert measured.mean_embedding_ND is not None
    assert error(measured.mean_embedding_ND) < 0.01
    assert error(p_NV.bfloat16().float() @ head_VD.float()) > 0.012


def test_logits_that_overflow_the_exponential_stay_finite() -> None:
    case = Case()
    with torch.no_grad():
        case.hidden_ND *= 1e4
    values = case.swept(chunk_rows=4)
    assert all(bool(value.isfinite().all()) for value in (*values, *case.gradients(values)))


def test_measuring_gives_the_same_numbers_the_first_of_equals_and_the_mean_embedding() -> None:
    case = Case()
    with torch.no_grad():
        case.head_VD[7] = case.head_VD[3]  # two tokens that are always equally likely
    case.label_N[:] = (case.hidden_ND @ case.head_VD.T).argmax(dim=1)
    measured = measure_vocabulary(case.hidden_ND, head_VD=case.head_VD, label_N=case.label_N, mean_embedding=True, chunk_rows=4)
    torch.testing.assert_close(measured.log_prob_N, case.whole()[0].detach(), rtol=0, atol=TOLERANCE)
    assert bool(measured.is_argmax_N.all())
    expected_ND = (case.hidden_ND @ case.head_VD.T).softmax(dim=1) @ case.head_VD
    torch.testing.assert_close(measured.mean_embedding_ND, expected_ND.detach(), rtol=0, atol=TOLERANCE)
    second = torch.where(case.label_N == 3, 7, (case.label_N + 1) % V)
    assert not bool(measure_vocabulary(case.hidden_ND, head_VD=case.head_VD, label_N=second).is_argmax_N.any())


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = Case()
    for changes in ({"label_N": case.label_N[:3]}, {"head_VD": case.head_VD[:, :2]}):
        arguments = {"head_VD": case.head_VD, "label_N": case.label_N, **changes}
        for function in (score_vocabulary, measure_vocabulary):
            with pytest.raises(ValueError, match="do not fit together"):
                function(case.hidden_ND, **arguments)
