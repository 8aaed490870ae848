"""The arms of the benchmarks compute the same step, and the instruments read what they say.

A comparison of speed means something only if what is compared gives the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from benchmarks.arms.base import Arm, Gradient
from benchmarks.arms.dynamic import DynamicArm
from benchmarks.arms.ours import OursArm
from benchmarks.arms.recipe import RecipeArm
from benchmarks.counters import OperationCounter, peak_bytes
from benchmarks.flops import Volume, forward_flops, needed_flops, recipe_flops
from benchmarks.gate import GRADIENT_TOLERANCE, ArmsDisagreeError, check_arms_agree, difference
from benchmarks.models import OLMO_1B, TINY, build_base, build_policy, freeze
from benchmarks.workload import Settings, Workload, build_workload, cut_row
from trainers.data.encode import EncodedRow

SETTINGS = Settings(padded_length=64)
PAIRS = range(4)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return build_workload(None, tokenizer=None, num_pairs=4, vocabulary=TINY.vocabulary, max_tokens=SETTINGS.padded_length, seed=0)


@pytest.fixture(scope="module")
def arms(workload: Workload) -> dict[str, Arm]:
    """All arms on the same base with the same adapters."""
    base = build_base(TINY, seed=0)

    def baseline(settings: Settings = SETTINGS) -> dict:
        return {
            "policy": build_policy(base, settings=settings, seed=0),
            "reference": freeze(base),
            "workload": workload,
            "settings": settings,
        }

    built: Sequence[Arm] = (
        RecipeArm(**baseline()),
        DynamicArm(**baseline()),
        DynamicArm(**baseline(), as_trainers_do=True),
        OursArm(policy=build_policy(base, settings=SETTINGS, seed=0), workload=workload, settings=SETTINGS),
    )
    changed = DynamicArm(**baseline(dataclasses.replace(SETTINGS, retain_kl_weight=0.0)))
    return {arm.name: arm for arm in built} | {"without KL": changed}


def test_all_arms_give_the_same_loss_and_adapter_gradients(arms: dict[str, Arm]) -> None:
    """Padding to a fixed length, padding to the longest row and no padding at all are the same step."""
    chosen = [arm for name, arm in arms.items() if name != "without KL"]
    assert len(chosen) == 4
    found = check_arms_agree(chosen, pairs=PAIRS)
    assert [one.arm for one in found] == [arm.name for arm in chosen[1:]]


def test_every_adapter_has_a_gradient(arms: dict[str, Arm]) -> None:
    """Otherwise the comparison above would look away from half of the parameters: with B = 0 every gradient of A is zero."""
    gradient = arms["recipe"].gradient(PAIRS)
    assert len(gradient.by_name) == 2 * 7 * TINY.layers
    assert all(float(value.abs().max()) > 0 for value in gradient.by_name.values())


def test_the_gate_refuses_a_missing_term(arms: dict[str, Arm]) -> None:
    """Negative control: KL is the smallest term, and without it the gradient is off by far more than the tolerance."""
    with pytest.raises(ArmsDisagreeError, match="differs from recipe"):
        check_arms_agree([arms["recipe"], arms["without KL"]], pairs=PAIRS)


def test_the_gate_sees_one_wrong_gradient(arms: dict[str, Arm]) -> None:
    """Negative control: a single adapter whose gradient is a tenth too large."""
    right = arms["recipe"].gradient(PAIRS)
    name = max(right.by_name, key=lambda one: float(right.by_name[one].norm()))
    wrong = Gradient(right.loss, right.by_name | {name: 1.1 * right.by_name[name]})
    assert difference(right, wrong, arm="wrong").gradient > 100 * GRADIENT_TOLERANCE
    with pytest.raises(ArmsDisagreeError, match="other parameters"):
        difference(right, Gradient(right.loss, {}), arm="empty")


def test_reading_a_gradient_changes_nothing_and_a_step_does(arms: dict[str, Arm]) -> None:
    """The gate leaves the arms as they were; afterwards all arms make the same update."""
    before = {name: arms[name].gradient(PAIRS).loss for name in ("recipe", "ours")}
    again = {name: arms[name].gradient(PAIRS).loss for name in ("recipe", "ours")}
    assert again == before
    for name in before:
        arms[name].step(PAIRS)
    after = check_arms_agree([arms["recipe"], arms["ours"]], pairs=PAIRS)
    assert arms["recipe"].gradient(PAIRS).loss != before["recipe"]
    assert after[0].arm == "ours"


def test_operations_are_counted_without_views() -> None:
    """A product and a sum count; a transposition, a slice and a reshape do not."""
    x = torch.ones(4, 4)
    with OperationCounter() as counter:
        (x @ x.t()[:, :2]).reshape(8).sum()
    assert counter.by_name == {"mm": 1, "sum": 1}


def test_live_bytes_follow_what_is_freed() -> None:
    """Three vectors of 1,000 numbers one after the other need two at a time, the operand and the result; kept, they need three."""
    start = torch.ones(1000)

    def freed() -> None:
        x = start + 1
        x = x + 1
        x = x + 1

    def kept() -> list[torch.Tensor]:
        return [start + 1, start + 1, start + 1]

    assert peak_bytes(freed) == 2 * 4000
    assert peak_bytes(kept) == 3 * 4000
    assert peak_bytes(kept, tensors=[start]) == 4 * 4000


def test_live_bytes_see_what_a_backward_pass_holds() -> None:
    """exp keeps its result for the backward pass although no variable does."""
    x = torch.ones(1000, requires_grad=True)

    def work() -> None:
        x.exp().exp().exp().sum().backward()

    # Three results of exp, and while the last is differentiated its gradient (an expanded scalar) and the product.
    assert 4 * 4000 <= peak_bytes(work) <= 5 * 4000 + 100


def test_flops_of_the_published_recipe() -> None:
    """One pair of OLMo-1B at rank 32 over 2 x 256 positions: 512 (4B + 3H + 4L + 5a) = 4.90 TFLOP.

    B = 2.147 G, H = 0.206 G, L = 0.048 G, a = 4 * 256 * 2048 * 16 = 0.034 G: 512 * (8.590 + 0.618 + 0.193 + 0.168) G = 4.899 T.
    """
    row = EncodedRow("row", tuple(range(100)), 80)
    padded = Volume.of([row, row], padded_to=256)
    assert recipe_flops(OLMO_1B, padded, lora_r=32) == pytest.approx(4.899e12, rel=1e-3)
    assert forward_flops(OLMO_1B, padded) == pytest.approx(512 * (2.1475e9 + 0.2061e9 + 0.03355e9), rel=1e-3)


def test_needed_flops_grow_with_real_tokens_only() -> None:
    """Twice the rows need twice as much; a longer prompt costs no head; all parameters cost one more product per weight."""
    row = EncodedRow("row", tuple(range(100)), 80)
    longer = EncodedRow("longer", tuple(range(150)), 130)
    one, two = (needed_flops(OLMO_1B, Volume.of([row] * number), lora_r=32) for number in (1, 2))
    assert two == 2 * one
    assert Volume.of([longer]).scored == Volume.of([row]).scored
    full = needed_flops(OLMO_1B, Volume.of([row]), lora_r=None)
    assert full > needed_flops(OLMO_1B, Volume.of([row]), lora_r=0) * 1.4


def test_long_rows_lose_the_beginning_of_their_prompt() -> None:
    """The answer and the end token stay whole."""
    row = EncodedRow("row", tuple(range(100)), 80)
    cut = cut_row(row, max_tokens=64)
    assert cut.input_ids == tuple(range(36, 100))
    assert cut.num_scored == row.num_scored == 20
    assert cut_row(row, max_tokens=100) == row
