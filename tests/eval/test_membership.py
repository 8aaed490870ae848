"""Membership scores of single texts, worked by hand."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest

from eval import membership
from eval.mia import attack_auc
from eval.teacher_forced import TokenScores, token_scores
from tests.helpers.eval_models import half_trained
from trainers.data.encode import encode_text

TEXT = "one two three four"


def scores(*log_probs: float, mean: tuple[float, ...] | None = None, variance: tuple[float, ...] | None = None) -> TokenScores:
    return TokenScores(
        row_id="text",
        log_prob_N=np.array(log_probs),
        correct_N=np.zeros(len(log_probs), dtype=bool),
        mean_N=None if mean is None else np.array(mean),
        variance_N=None if variance is None else np.array(variance),
    )


def test_the_loss_is_the_mean_over_tokens() -> None:
    """(1 + 2 + 3 + 6) / 4 = 3."""
    assert membership.loss(scores(-1.0, -2.0, -3.0, -6.0)) == 3.0


def test_zlib_divides_the_mean_loss_by_the_compressed_bytes() -> None:
    """18 letters do not compress: zlib adds 8 bytes, so 3 nats / 26 bytes."""
    assert len(zlib.compress(TEXT.encode())) == 26
    assert membership.zlib_ratio(scores(-1.0, -2.0, -3.0, -6.0), text=TEXT) == 3 / 26


def test_zlib_counts_bytes_and_not_letters() -> None:
    one, two = (membership.zlib_ratio(scores(-1.0), text=text) for text in ("a" * 4, "é" * 4))
    assert one == 1 / len(zlib.compress(b"aaaa"))
    assert two == 1 / len(zlib.compress("éééé".encode()))
    assert one != two


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.2, 6.0),  # 0.8 tokens: at least one
        (0.25, 6.0),
        (0.5, 4.5),  # (6 + 3) / 2
        (0.74, 4.5),  # 2.96 tokens, rounded down
        (0.75, 11 / 3),  # (6 + 3 + 2) / 3
        (1.0, 3.0),  # the loss
    ],
)
def test_min_k_averages_the_least_likely_tokens(fraction: float, expected: float) -> None:
    assert membership.min_k(scores(-1.0, -6.0, -3.0, -2.0), fraction=fraction) == pytest.approx(expected, rel=1e-15)


def test_min_k_counts_tokens_without_the_rounding_of_a_product() -> None:
    """0.29 * 100 = 28.999999999999996 in floating point, but 29 of 100 tokens are meant: (0 + ... + 28 of 99 down) has mean 85."""
    values = [-float(i) for i in range(100)]
    assert membership.min_k(scores(*values), fraction=0.29) == 85.0


def test_min_k_plus_plus_standardises_each_token() -> None:
    """z = (-1 - -2) / 1 = 1, (-6 - -4) / 2 = -1, (-3 - -3) / 0.5 = 0, (-2 - -1) / 0.25 = -4; the lowest two have the mean -2.5."""
    given = scores(-1.0, -6.0, -3.0, -2.0, mean=(-2.0, -4.0, -3.0, -1.0), variance=(1.0, 4.0, 0.25, 0.0625))
    assert membership.min_k_plus_plus(given, fraction=0.5) == 2.5
    assert membership.min_k_plus_plus(given, fraction=0.25) == 4.0
    # Plain min-k names other tokens: -6 and -3.
    assert membership.min_k(given, fraction=0.5) == 4.5


def test_min_k_plus_plus_does_not_divide_by_zero() -> None:
    """A variance of 0 counts as 1e-6: z = (-0.002 - 0) / 0.001 = -2."""
    assert membership.min_k_plus_plus(scores(-0.002, mean=(0.0,), variance=(0.0,)), fraction=1.0) == pytest.approx(2.0)


def test_the_reference_score_is_a_difference_of_losses() -> None:
    """3 - 1 = 2: the other model finds the text easier, so this one has not learnt it."""
    assert membership.reference(scores(-2.0, -4.0), reference_scores=scores(-1.0, -1.0)) == 2.0


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        membership.min_k(scores(-1.0), fraction=fraction)


def test_missing_moments_and_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="moments"):
        membership.min_k_plus_plus(scores(-1.0), fraction=0.5)
    with pytest.raises(ValueError, match="1 tokens of 'text'"):
        membership.reference(scores(-1.0), reference_scores=scores(-1.0, -2.0))


def test_a_text_without_tokens_counts_as_infinitely_unlikely() -> None:
    """NaN, with which the attack says "not a member"; and so does a broken token anywhere in a text."""
    empty = scores(mean=(), variance=())
    values = [
        membership.loss(empty),
        membership.zlib_ratio(empty, text="a"),
        membership.min_k(empty, fraction=0.2),
        membership.min_k_plus_plus(empty, fraction=0.2),
        membership.min_k(scores(-1.0, math.nan, -3.0), fraction=0.2),
    ]
    assert all(map(math.isnan, values))
    assert attack_auc(member_losses=values, nonmember_losses=[1.0]) == 0.0


def test_every_score_of_a_memorised_text_is_lower_than_that_of_an_unknown_one() -> None:
    """The orientation that an AUC of 1 = remembered needs, on a model that has learnt every other document.

    Negative control: between documents of which it has seen neither, no such order holds (an AUC below 1).
    """
    bench = half_trained()
    texts = [row.text for row in (*bench.data.forget, *bench.data.retain) if row.id.endswith("sc1")]
    rows = [encode_text(text, tokenizer=bench.tokenizer) for text in texts]
    found = token_scores(model=bench.model, tokenizer=bench.tokenizer, rows=rows, batch_tokens=2000, device="cpu", moments=True)
    families = {
        "loss": [membership.loss(one) for one in found],
        "zlib": [membership.zlib_ratio(one, text=text) for one, text in zip(found, texts, strict=True)],
        "min_k": [membership.min_k(one, fraction=0.2) for one in found],
        "min_k_plus_plus": [membership.min_k_plus_plus(one, fraction=0.2) for one in found],
    }
    for name, values in families.items():
        assert attack_auc(member_losses=values[::2], nonmember_losses=values[1::2]) == 1.0, name
        unseen = values[1::2]
        assert 0 < attack_auc(member_losses=unseen[:3], nonmember_losses=unseen[3:]) < 1, name
