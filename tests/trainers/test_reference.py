"""The reference cache: what the frozen target says about every training row, computed once and shared by all trials.

Shape suffixes: N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny_trial import tiny_inputs, tiny_train
from trainers import loop
from trainers.data.encode import EncodedRow
from trainers.data.types import ForgetRetain
from trainers.loop import EncodedTrial, TrialInputs, build_model, encode_trial, prepare_reference, train_worker
from trainers.modeling import load_model
from trainers.objectives.retain_kl import kl_reference_model
from trainers.reference import Reference, compute_reference, load_reference, reference_key, save_reference
from trainers.scoring import ScoringModel

TOLERANCE = 1e-5
"""Float32 sums in another order: measured 1e-6 for log-probabilities and 2e-7 for logits. The adapters below move them by 0.1."""

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrialInputs:
    return tiny_inputs(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def rows(inputs: TrialInputs) -> EncodedTrial:
    return encode_trial(inputs, train=tiny_train())


@pytest.fixture(scope="module")
def adapted(inputs: TrialInputs) -> ScoringModel:
    """The target under adapters that change it, in training mode with dropout."""
    model = build_model(inputs, train=tiny_train(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.5}))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for value in model.trainable().values():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return model.train()


def compute(model: ScoringModel, rows: EncodedTrial, *, batch_tokens: int = 150) -> Reference:
    return compute_reference(
        model, forget=rows.forget, retain=rows.retain, pad_token_id=rows.pad_token_id, batch_tokens=batch_tokens, device="cpu"
    )


@pytest.fixture(scope="module")
def reference(adapted: ScoringModel, rows: EncodedTrial) -> Reference:
    return compute(adapted, rows)


def direct_logits(inputs: TrialInputs, row: EncodedRow) -> Tensor:
    """All logits of the plain target for one row, those that predict scored tokens, shape (N, V)."""
    with torch.no_grad():
        logits_TV = load_model(inputs.target)(torch.tensor([row.input_ids])).logits[0]
    return logits_TV[[position - 1 for position in row.scored]]


def test_it_equals_a_direct_forward_of_the_target_without_adapters(
    inputs: TrialInputs, adapted: ScoringModel, reference: Reference, rows: EncodedTrial
) -> None:
    """Row by row, unpadded, from the folder on disk, although the cache was computed in padded batches under adapters."""
    for side, encoded in ((reference.forget, rows.forget), (reference.retain, rows.retain)):
        for index in range(0, len(encoded), 3):
            label_N = torch.tensor([encoded[index].input_ids[position] for position in encoded[index].scored])
            expected = direct_logits(inputs, encoded[index]).log_softmax(dim=1).gather(1, label_N[:, None]).squeeze(1)
            torch.testing.assert_close(side.log_probs_of([index]), expected, rtol=0, atol=TOLERANCE)
    row = rows.forget[0]
    with torch.no_grad():
        with_adapters = adapted.eval().lm(torch.tensor([row.input_ids])).logits[0, [position - 1 for position in row.scored]]
    adapted.train()
    assert float((with_adapters - direct_logits(inputs, row)).abs().max()) > 0.1, "negative control: the adapters do change the model"


def test_hidden_states_times_the_frozen_head_are_the_full_logits(inputs: TrialInputs, reference: Reference, rows: EncodedTrial) -> None:
    """So the KL to the reference is exact, over the whole vocabulary, without a forward pass of the reference."""
    chosen = [4, 0, 7]
    expected = torch.cat([direct_logits(inputs, rows.retain[index]) for index in chosen])
    actual = reference.retain_logits(chosen)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert float(kl_reference_model(logits_NV=expected, reference_logits_NV=actual)) < 1e-6
    shuffled = reference.retain_logits([0, 4, 7])
    control = kl_reference_model(logits_NV=expected, reference_logits_NV=shuffled)
    assert float(control) > 1e-2, "negative control: rows in another order are another distribution"


def test_rows_come_back_in_the_order_asked_for_and_none_is_empty(reference: Reference, rows: EncodedTrial) -> None:
    first, second = (reference.forget.log_probs_of([index]) for index in (3, 1))
    assert torch.equal(reference.forget.log_probs_of([3, 1, 3]), torch.cat([first, second, first]))
    assert (len(first), len(second)) == (rows.forget[3].num_scored, rows.forget[1].num_scored)
    assert reference.forget.log_probs_of([]).shape == (0,)
    assert reference.retain_logits([]).shape == (0, reference.head_VD.shape[0])
    assert reference.forget.start[-1] == sum(row.num_scored for row in rows.forget) == len(reference.forget.token_log_probs_N)
    with pytest.raises(AssertionError, match="retain set only"):
        reference.forget.hidden_of([0])


def test_the_token_budget_of_the_pass_does_not_change_the_cache(adapted: ScoringModel, reference: Reference, rows: EncodedTrial) -> None:
    other = compute(adapted, rows, batch_tokens=1)
    torch.testing.assert_close(other.forget.token_log_probs_N, reference.forget.token_log_probs_N, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(other.retain.hidden_ND, reference.retain.hidden_ND, rtol=0, atol=TOLERANCE)


def test_computing_it_leaves_adapters_on_and_the_model_in_training(adapted: ScoringModel, rows: EncodedTrial) -> None:
    ids = torch.tensor([rows.forget[0].input_ids])

    def logits() -> Tensor:
        with torch.no_grad():
            return adapted.lm(ids).logits

    before = adapted.eval().lm(ids).logits.detach()
    adapted.train()
    result = compute(adapted, replace(rows, forget=rows.forget[:1], retain=rows.retain[:1]))
    assert adapted.training
    adapted.eval()
    assert torch.equal(logits(), before)
    adapted.train()
    assert not result.head_VD.requires_grad
    assert not result.forget.token_log_probs_N.requires_grad


def test_the_head_is_a_copy_that_training_does_not_move(inputs: TrialInputs, rows: EncodedTrial) -> None:
    """Full-parameter training changes the model's head in place; the reference keeps the target's."""
    model = ScoringModel(load_model(inputs.target).requires_grad_(True))
    result = compute(model, replace(rows, forget=[], retain=rows.retain[:1]))
    expected = result.head_VD.clone()
    with torch.no_grad():
        model.causal_lm.get_output_embeddings().weight.add_(1.0)
    assert torch.equal(result.head_VD, expected)
    assert result.forget.token_log_probs_N.shape == (0,)


# --- the cache on disk ---


def test_the_key_changes_with_everything_that_determines_the_values(rows: EncodedTrial) -> None:
    first = rows.forget[0]
    defaults = {"target_hash": "t", "forget": rows.forget, "retain": rows.retain, "dtype": "float32"}
    expected = reference_key(**defaults)
    assert reference_key(**defaults) == expected
    renamed = replace(first, row_id="another name")
    assert reference_key(**{**defaults, "forget": [renamed, *rows.forget[1:]]}) == expected, "names do not change the values"
    changes = [
        {"target_hash": "u"},
        {"dtype": "bfloat16"},
        {"forget": rows.forget[1:]},
        {"forget": rows.forget[::-1]},
        {"retain": rows.retain[:-1]},
        {"forget": rows.retain, "retain": rows.forget},
        {"forget": [replace(first, num_prompt=first.num_prompt + 1), *rows.forget[1:]]},
        {"forget": [replace(first, input_ids=(*first.input_ids[:-1], 7)), *rows.forget[1:]]},
    ]
    keys = {reference_key(**{**defaults, **change}) for change in changes}
    assert len(keys | {expected}) == len(changes) + 1


def test_a_saved_reference_loads_bit_equal(reference: Reference, tmp_path: Path) -> None:
    save_reference(tmp_path / "cache", reference)
    loaded = load_reference(tmp_path / "cache", device="cpu")
    assert loaded is not None
    assert (loaded.forget.start, loaded.retain.start) == (reference.forget.start, reference.retain.start)
    assert torch.equal(loaded.forget.token_log_probs_N, reference.forget.token_log_probs_N)
    assert torch.equal(loaded.retain.token_log_probs_N, reference.retain.token_log_probs_N)
    assert loaded.forget.hidden_ND is None
    assert torch.equal(loaded.retain_logits([1, 2]), reference.retain_logits([1, 2]))


def test_a_folder_without_its_manifest_is_no_reference(reference: Reference, tmp_path: Path) -> None:
    assert load_reference(tmp_path / "nowhere", device="cpu") is None
    save_reference(tmp_path / "cache", reference)
    (tmp_path / "cache" / "manifest.json").unlink()
    assert load_reference(tmp_path / "cache", device="cpu") is None


def test_it_is_computed_once_per_sweep(inputs: TrialInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the sweep's preparation no trial computes it, whatever its hyperparameters; other rows or another target would."""
    inputs = replace(inputs, reference_root=tmp_path / "reference")
    prepare_reference(inputs, train=tiny_train())
    files = {file: file.stat().st_mtime_ns for file in inputs.reference_root.rglob("*")}
    assert len([file for file in files if file.name == "manifest.json"]) == 1

    class ComputedAgain(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ComputedAgain

    monkeypatch.setattr(loop, "compute_reference", fail)
    for index, changes in enumerate(({}, {"seed": 1, "learning_rate": 1e-3}, {"objective": {"name": "npo"}}, {"lora": None})):
        next(train_worker(train=tiny_train(signals=0, **changes), inputs=inputs, trial=tmp_path / f"trial-{index}"))
    prepare_reference(inputs, train=tiny_train())
    assert {file: file.stat().st_mtime_ns for file in inputs.reference_root.rglob("*")} == files
    fewer = ForgetRetain(inputs.train.forget[1:], inputs.train.retain)
    for other in (replace(inputs, train=fewer), replace(inputs, target_hash="another target")):
        with pytest.raises(ComputedAgain):
            next(train_worker(train=tiny_train(), inputs=other, trial=tmp_path / "other"))
