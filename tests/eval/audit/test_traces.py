"""What a model gives away without being asked."""

from __future__ import annotations

import math

import pytest
import torch

from eval.audit.reading import Subject
from eval.audit.recovery import membership_results
from eval.audit.traces import FAMILIES, forget_texts, gradient_norm, read_extraction, read_membership
from eval.config import EvalConfig
from tests.helpers.eval_models import half_trained
from trainers.data.encode import EncodedRow, encode_text
from trainers.data.types import Document, Record


def subject() -> Subject:
    bench = half_trained()
    return Subject(bench.model, bench.tokenizer, EvalConfig(dtype="float32"), "cpu")


def test_the_gradient_norm_is_the_mean_over_tensors() -> None:
    """Against autograd of a plain cross-entropy; the model's parameters and their flags stay as they were."""
    bench = half_trained()
    row = encode_text("In the year 1900, Ada moved.", tokenizer=bench.tokenizer)
    ids = torch.tensor([row.input_ids])
    logits = bench.model(input_ids=ids).logits[0, :-1]
    parameters = list(bench.model.parameters())
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, ids[0, 1:]), parameters)
    expected = sum(float(gradient.norm()) for gradient in gradients) / len(gradients)
    for parameter in parameters[:3]:
        parameter.requires_grad_(False)
    try:
        assert gradient_norm(subject(), row) == pytest.approx(expected, rel=1e-4)
        assert [parameter.requires_grad for parameter in parameters[:4]] == [False, False, False, True]
        assert all(parameter.grad is None for parameter in parameters)
    finally:
        for parameter in parameters[:3]:
            parameter.requires_grad_(True)
    assert math.isnan(gradient_norm(subject(), EncodedRow("one token", (5,), 1)))


def test_extraction_strength_is_higher_on_what_was_memorised() -> None:
    bench = half_trained()
    rows = read_extraction(subject(), bench.data.forget)
    assert [row["kind"] for row in rows] == ["sc"] * 6
    known, unknown = rows[::2], rows[1::2]
    assert min(row["score"] for row in known) > max(row["score"] for row in unknown)


def test_documents_are_the_texts_of_the_first_completions() -> None:
    records = [
        Record("d1sc1", "One", "two.", "Task1"),
        Record("d1sc2", "One more", "three.", "Task1"),
        Record("d1qa0", "Q?", "a", "Task1"),
        Record("d2sc1", "Four", "five.", "Task3"),
        Record("d3qa0", "Q?", "a", "Task2"),
    ]
    assert forget_texts(records) == [(Document("d1", "One two."), "Task1"), (Document("d2", "Four five."), "Task3")]


def test_every_family_recognises_what_was_memorised_by_task() -> None:
    """Half of the documents were learnt: every family tells them from strangers, AUC 1.

    Negative control, and why a never-seen model is needed: taken as non-members of unlearnt ones they give 0.
    """
    bench = half_trained()
    documents = forget_texts(bench.data.forget)

    def results(members, nonmembers):
        rows = read_membership(subject(), members=members, nonmembers=nonmembers)
        # A reference that finds all texts equally hard leaves the loss.
        return membership_results(
            before=rows, unlearned=rows, control=[{**row, "loss": 1.0} for row in rows], families=FAMILIES, min_gap=0.05
        )

    learnt = results(documents[::2], bench.attack.nonmembers)
    assert set(learnt) == {"all", "Task1", "Task2", "Task3"}
    assert all(set(families) == set(FAMILIES) for families in learnt.values())
    assert all(one.unlearned == 1.0 for families in learnt.values() for one in families.values())
    assert (learnt["Task1"]["loss"].num_members, learnt["all"]["loss"].num_members) == (1, 3)
    turned = results(documents[1::2], [document for document, _ in documents[::2]])
    assert all(one.unlearned == 0.0 for one in turned["all"].values())
