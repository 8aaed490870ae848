"""The validation signals are what a plain loop over rows computes, on one rank or several, padded or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.thread_ranks import Meeting, ThreadEngine, run_threads
from tests.helpers.tiny_trial import tiny_inputs, tiny_train
from trainers import signals
from trainers.data.encode import EncodedRow, PackedRow
from trainers.engine.local import LocalEngine
from trainers.loop import build_model
from trainers.scoring import ScoringModel
from trainers.signals import RowSums, SignalRows, loss_auc, measure_signals, row_sums
from trainers.trial_rows import EncodedTrial, encode_trial

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> tuple[ScoringModel, EncodedTrial]:
    """The tiny model with adapters that are not zero and dropout that must be off while measuring."""
    inputs = tiny_inputs(tmp_path_factory.mktemp("signals"))
    train = tiny_train(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.5})
    model = build_model(inputs, train=train)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for value in model.trainable().values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model, encode_trial(inputs, train=train)


def engine_of(model: ScoringModel) -> LocalEngine:
    return LocalEngine(model, weight_decay=0.0, max_grad_norm=1.0)


def plain_sums(model: ScoringModel, row: EncodedRow | PackedRow) -> RowSums:
    """One row at a time, all logits, one token after the other."""
    model.eval()
    with torch.no_grad():
        logits_TV = model.lm(torch.tensor([row.input_ids])).logits[0].double()
    model.train()
    log_prob, num_correct = 0.0, 0
    for position in row.scored:
        values = logits_TV[position - 1].tolist()
        highest = max(values)
        log_prob += values[row.input_ids[position]] - highest - math.log(sum(math.exp(value - highest) for value in values))
        num_correct += values.index(highest) == row.input_ids[position]
    return RowSums(log_prob, num_correct, len(row.scored))


def assert_same_sums(actual: Sequence[RowSums], expected: Sequence[RowSums]) -> None:
    """Float32 logits of another batch shape: log-probabilities of about 60 nats differ by less than 1e-4."""
    assert [(row.num_correct, row.num_tokens) for row in actual] == [(row.num_correct, row.num_tokens) for row in expected]
    assert [row.log_prob for row in actual] == pytest.approx([row.log_prob for row in expected], abs=1e-4)


def test_row_sums_equal_a_plain_loop(trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small budget makes several groups of different lengths; the rows come back in the order given."""
    monkeypatch.setattr(signals, "BATCH_TOKENS", 100)
    model, rows = trial
    packed = PackedRow("packed", (*rows.forget[0].input_ids, *rows.forget[1].input_ids), (3, 9, 10))
    given = [*rows.forget, packed, *rows.retain[::-1]]
    expected = [plain_sums(model, row) for row in given]
    assert_same_sums(row_sums(engine_of(model), rows=given, pad_token_id=rows.pad_token_id), expected)
    assert len({row.num_tokens for row in expected}) > 2


def test_some_argmax_hits_are_counted(trial) -> None:
    """Rows made of the model's own greedy choices are all correct; with one token changed, one less is."""
    model, _ = trial
    model.eval()
    ids = [5, 6, 7]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model.lm(torch.tensor([ids])).logits[0, -1].argmax()))
    model.train()
    greedy = EncodedRow("greedy", tuple(ids), 3)
    changed = EncodedRow("changed", (*ids[:-1], (ids[-1] + 1) % 320), 3)
    actual = row_sums(engine_of(model), rows=[greedy, changed], pad_token_id=1)
    assert [(row.num_correct, row.num_tokens) for row in actual] == [(6, 6), (5, 6)]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_rows_and_all_get_all_of_them(trial, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows in groups of a hundred tokens: some ranks have no group in the last round."""
    monkeypatch.setattr(signals, "BATCH_TOKENS", 100)
    model, rows = trial
    expected = [plain_sums(model, row) for row in rows.forget[:7]]

    def work(meeting: Meeting, rank: int) -> list[RowSums]:
        import copy

        return row_sums(
            ThreadEngine(copy.deepcopy(model), meeting=meeting, rank=rank), rows=rows.forget[:7], pad_token_id=rows.pad_token_id
        )

    results = run_threads(work, world_size=world_size)
    assert all(result == results[0] for result in results)
    assert_same_sums(results[0], expected)


def test_measuring_leaves_the_model_in_training_without_gradients(trial) -> None:
    model, rows = trial
    engine = engine_of(model)
    first = row_sums(engine, rows=rows.forget[:3], pad_token_id=rows.pad_token_id)
    assert model.training
    assert first == row_sums(engine, rows=rows.forget[:3], pad_token_id=rows.pad_token_id), "dropout is off"
    assert all(value.grad is None for value in model.parameters())
    assert row_sums(engine, rows=[], pad_token_id=0) == []


def test_the_signals_are_token_means_and_an_auc(trial) -> None:
    """Token means weigh long answers more: the mean of the rows' means would be another number."""
    model, rows = trial
    given = rows.signals
    actual = measure_signals(engine_of(model), rows=given, pad_token_id=rows.pad_token_id)
    assert set(actual) == {
        "forget_answer_log_prob",
        "forget_token_accuracy",
        "retain_answer_log_prob",
        "retain_token_accuracy",
        "mia_auc",
    }
    for name, side in (("forget", given.forget), ("retain", given.retain)):
        sums = [plain_sums(model, row) for row in side]
        tokens = sum(row.num_tokens for row in sums)
        expected = sum(row.log_prob for row in sums) / tokens
        assert actual[f"{name}_answer_log_prob"] == pytest.approx(expected, abs=1e-4)
        assert actual[f"{name}_token_accuracy"] == sum(row.num_correct for row in sums) / tokens
        mean_of_means = sum(row.log_prob / row.num_tokens for row in sums) / len(sums)
        assert abs(mean_of_means - expected) > 1e-3
    losses = [[-plain_sums(model, row).log_prob / row.num_scored for row in side] for side in (given.members, given.nonmembers)]
    wins = sum((member < other) + 0.5 * (member == other) for member in losses[0] for other in losses[1])
    assert actual["mia_auc"] == pytest.approx(wins / (len(losses[0]) * len(losses[1])), abs=1e-12)


def test_a_signal_without_rows_is_left_out(trial) -> None:
    model, rows = trial
    only = SignalRows(rows.forget[:2], [], rows.signals.members, [])
    assert set(measure_signals(engine_of(model), rows=only, pad_token_id=rows.pad_token_id)) == {
        "forget_answer_log_prob",
        "forget_token_accuracy",
    }


# --- the attack's AUC ---

LOSSES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, math.inf, math.nan]), min_size=1, max_size=8)


def test_the_auc_of_worked_losses() -> None:
    """Members 1, 2 and others 2, 3: of four pairs three are won and one is a tie: 3.5 / 4."""
    assert loss_auc(member_losses=[1.0, 2.0], nonmember_losses=[2.0, 3.0]) == 3.5 / 4
    assert loss_auc(member_losses=[0.0], nonmember_losses=[1.0]) == 1.0
    assert loss_auc(member_losses=[1.0], nonmember_losses=[0.0]) == 0.0
    assert loss_auc(member_losses=[1.0, 1.0], nonmember_losses=[1.0]) == 0.5


@settings(max_examples=60, deadline=None)
@given(members=LOSSES, nonmembers=LOSSES)
def test_swapping_members_and_strangers_maps_the_auc_to_its_complement(members: list[float], nonmembers: list[float]) -> None:
    forward = loss_auc(member_losses=members, nonmember_losses=nonmembers)
    backward = loss_auc(member_losses=nonmembers, nonmember_losses=members)
    assert forward == pytest.approx(1 - backward, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(members=LOSSES, nonmembers=LOSSES)
def test_the_auc_counts_pairs_won_and_half_the_ties(members: list[float], nonmembers: list[float]) -> None:
    finite = [[loss if math.isfinite(loss) else 1e300 for loss in side] for side in (members, nonmembers)]
    expected = sum((a < b) + 0.5 * (a == b) for a in finite[0] for b in finite[1]) / (len(members) * len(nonmembers))
    assert loss_auc(member_losses=members, nonmember_losses=nonmembers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_the_largest(bad: float) -> None:
    """A destroyed model is no longer attackable by it, and the AUC stays a number."""
    assert loss_auc(member_losses=[bad], nonmember_losses=[5.0]) == 0.0
    assert loss_auc(member_losses=[5.0], nonmember_losses=[bad]) == 1.0
    assert loss_auc(member_losses=[bad], nonmember_losses=[bad]) == 0.5


def test_whole_documents_are_attacked(tmp_path: Path) -> None:
    """Every token of a document but the first is scored, the prompt's too."""
    inputs = tiny_inputs(tmp_path)
    rows = encode_trial(inputs, train=tiny_train())
    assert [len(row.input_ids) - row.num_scored for row in (*rows.signals.members, *rows.signals.nonmembers)] == [1] * 8
