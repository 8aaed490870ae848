"""One forward pass over packed rows gives what full logits give, at evaluated tokens only; heads that do more are refused.

Shape suffixes: S tokens of all rows, N evaluated tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tiny_trial import random_lm, random_rows
from trainers import scoring
from trainers.config import LoraConfig
from trainers.data.encode import EncodedRow, evaluated_row
from trainers.data.packing import pack
from trainers.errors import InputError
from trainers.modeling import add_lora, decoder_layers, enable_activation_checkpointing
from trainers.scoring import Request, ScoringModel, Segment, measuring, scores_of, set_step_seed
from trainers.vocabulary import ReferenceDistributions

TOLERANCE = 1e-12
"""Float64: what is equal in theory is equal to rounding; a wrong token or a missing row differs by more than 0.1."""

LAYERS = 4
ROWS = random_rows(5, 9, 2, 9, 30)

torch.set_num_threads(1)


@pytest.fixture
def model() -> ScoringModel:
    return ScoringModel(random_lm(num_hidden_layers=LAYERS).requires_grad_(True))


def full_logits(model: ScoringModel, rows: list[EncodedRow]) -> Tensor:
    """Logits that predict the evaluated tokens, from plain passes over one row each, shape (N, V)."""
    passes = [model.causal_lm(input_ids=torch.tensor([row.input_ids])).logits[0] for row in rows]
    return torch.cat([logits_TV[[position - 1 for position in row.evaluated]] for logits_TV, row in zip(passes, rows, strict=True)])


def score(model: ScoringModel, rows: list[EncodedRow], request: Request) -> scoring.Scores:
    return scores_of(model(pack(rows, pad_token_id=0), request), request=request)


# --- values ---


def test_the_segments_of_a_pass_are_what_full_logits_say_of_their_tokens(model: ScoringModel) -> None:
    """Three runs of tokens, each with wishes of its own: nothing, its own mean logit, the logits' mean under a reference."""
    rows = [*ROWS[:3], *(evaluated_row(row) for row in ROWS[3:])]
    batch = pack(rows, pad_token_id=0)
    logits_NV = full_logits(model, rows)
    cuts = [batch.first_evaluated[row] for row in (0, 2, 3, 5)]
    q_KV = torch.randn(cuts[3] - cuts[2], 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(dim=1)
    reference = ReferenceDistributions((q_KV * q_KV.log()).sum(dim=1), mean_embedding_ND=q_KV @ model.head_weight.detach())
    request = Request((Segment(cuts[0], cuts[1]), Segment(cuts[1], cuts[2], mean_logit=True), Segment(cuts[2], cuts[3], reference)))
    scores = score(model, rows, request)
    for found, start, stop in zip(scores.segments, cuts, cuts[1:], strict=False):
        own_NV = logits_NV[start:stop]
        expected_N = own_NV.log_softmax(dim=1).gather(1, batch.label_N[start:stop, None]).squeeze(1)
        torch.testing.assert_close(found.log_prob_N, expected_N, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(found.log_normaliser_N, own_NV.logsumexp(dim=1), rtol=0, atol=TOLERANCE)
    middle_NV, last_NV = logits_NV[cuts[1] : cuts[2]], logits_NV[cuts[2] :]
    torch.testing.assert_close(scores.segments[1].mean_logit_N, (middle_NV.softmax(dim=1) * middle_NV).sum(dim=1), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(scores.segments[2].reference_mean_logit_N, (q_KV * last_NV).sum(dim=1), rtol=0, atol=TOLERANCE)
    assert scores.segments[0].mean_logit_N is scores.segments[0].reference_mean_logit_N is scores.segments[2].mean_logit_N is None
    assert scores.activations_SD is None
    assert float(scores.link.detach()) == 0.0


def test_gradients_of_a_pass_are_those_of_full_logits(model: ScoringModel) -> None:
    request = Request((Segment(0, sum(row.num_scored for row in ROWS)),))
    labels_N = torch.tensor([row.input_ids[position] for row in ROWS for position in row.scored])
    expected = full_logits(model, ROWS).log_softmax(dim=1).gather(1, labels_N[:, None]).sum()
    actual = score(model, ROWS, request).segments[0].log_prob_N.sum()
    parameters = list(model.trainable().values())
    assert len(parameters) == 2 + 7 * LAYERS
    torch.testing.assert_close(
        torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters), rtol=0, atol=1e2 * TOLERANCE
    )


def test_the_head_sees_evaluated_tokens_only(model: ScoringModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt tokens never reach it: 2 + 4 + 1 of 16 tokens are scored here."""
    seen: list[int] = []
    honest = scoring.score_vocabulary

    def spy(hidden_ND: Tensor, **keywords: Any) -> Any:
        seen.append(len(hidden_ND))
        return honest(hidden_ND, **keywords)

    monkeypatch.setattr(scoring, "score_vocabulary", spy)
    rows = [EncodedRow("a", (3, 4, 5, 6, 7), 3), EncodedRow("b", tuple(range(3, 12)), 5), EncodedRow("c", (8, 9), 1)]
    score(model, rows, Request((Segment(0, 6), Segment(6, 7))))
    assert seen == [6, 1]


def test_the_last_mlp_sees_only_tokens_whose_state_is_read(model: ScoringModel) -> None:
    """The layers below see all 16 tokens, the last MLP those that predict the 7 scored ones; with recomputation it sees all again."""
    seen: list[tuple[int, int]] = []
    layers = decoder_layers(model.causal_lm)
    for index, layer in enumerate(layers):
        layer.mlp.gate_proj.register_forward_hook(lambda module, arguments, output, index=index: seen.append((index, output.shape[1])))
    rows = [EncodedRow("a", (3, 4, 5, 6, 7), 3), EncodedRow("b", tuple(range(3, 12)), 5), EncodedRow("c", (8, 9), 1)]
    request = Request((Segment(0, 7),))
    score(model, rows, request)
    assert seen == [(0, 16), (1, 16), (2, 16), (3, 7)]
    seen.clear()
    enable_activation_checkpointing(model.lm)
    score(model.train(), rows, request)
    assert seen == [(0, 16), (1, 16), (2, 16), (3, 16)]


def test_measuring_gives_log_probs_normalisers_and_hits_without_a_gradient(model: ScoringModel) -> None:
    logits_NV = full_logits(model, ROWS).detach()
    likeliest = iter(logits_NV.argmax(dim=1).tolist())
    first = ROWS[0]
    hit = EncodedRow("hit", (*first.input_ids[: first.num_prompt], next(likeliest)), first.num_prompt)
    rows = [hit, *ROWS[1:]]
    log_prob_N, normaliser_N, is_argmax_N = model(pack(rows, pad_token_id=0))
    expected_NV = full_logits(model, rows).detach()
    labels_N = torch.tensor([row.input_ids[position] for row in rows for position in row.scored])
    torch.testing.assert_close(log_prob_N, expected_NV.log_softmax(dim=1).gather(1, labels_N[:, None]).squeeze(1), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(normaliser_N, expected_NV.logsumexp(dim=1), rtol=0, atol=TOLERANCE)
    assert torch.equal(is_argmax_N, expected_NV.argmax(dim=1) == labels_N)
    assert bool(is_argmax_N[0])
    assert not bool(is_argmax_N.all())
    assert not log_prob_N.requires_grad


def test_observing_gives_everything_a_reference_may_be_asked_for(model: ScoringModel) -> None:
    batch = pack(ROWS, pad_token_id=0)
    observed = model.observe(batch, layer=1)
    logits_NV = full_logits(model, ROWS).detach()
    torch.testing.assert_close(observed.hidden_ND @ model.head_weight.detach().T, logits_NV, rtol=0, atol=TOLERANCE)
    expected_ND = logits_NV.softmax(dim=1) @ model.head_weight.detach()
    torch.testing.assert_close(observed.measured.mean_embedding_ND, expected_ND, rtol=0, atol=TOLERANCE)
    assert observed.activations_SD is not None
    assert observed.activations_SD.shape == (len(batch.input_ids_S), 16)
    assert model.observe(batch).activations_SD is None
    assert not observed.hidden_ND.requires_grad


@pytest.mark.parametrize("kind", ["olmo", "llama"])
@pytest.mark.parametrize("segments", [0, 1, 2])
@pytest.mark.parametrize("layer", [None, 1])
def test_an_empty_batch_is_tied_with_gradient_zero_to_the_parameters_that_rows_would_reach(
    kind: str, segments: int, layer: int | None
) -> None:
    """A rank without rows must run the same backward hooks as the others, no more and no fewer: neither the layers above a steered one
    nor Llama's last norm, where nothing is scored."""
    model = ScoringModel(random_lm(kind, num_hidden_layers=LAYERS).requires_grad_(True))

    def reached(rows: list[EncodedRow], num_scored: int) -> dict[str, Tensor]:
        request = Request((Segment(0, num_scored),) * segments, layer=layer)
        scores = score(model, rows, request)
        loss = scores.link + sum(segment.log_prob_N.sum() for segment in scores.segments)
        if scores.activations_SD is not None:
            loss = loss + scores.activations_SD[: None if rows else 0].sum()
        model.zero_grad()
        loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    if segments == 0 and layer is None:
        return
    expected, actual = reached(ROWS, 3), reached([], 0)
    assert set(actual) == set(expected)
    assert all(value.any() for value in expected.values())
    assert not any(value.any() for value in actual.values())
    assert len(expected) == (
        len(list(model.parameters())) if segments else 1 + 2 * len(list(decoder_layers(model.causal_lm)[0].parameters()))
    )


def test_without_a_wish_for_scores_an_empty_batch_is_tied_by_its_link_alone() -> None:
    """Objectives may ignore a set without rows; the link keeps its pass in the loss."""
    model = ScoringModel(random_lm().requires_grad_(True))
    link = score(model, [], Request((Segment(0, 0),))).link
    assert float(link.detach()) == 0.0
    link.backward()
    assert all(value.grad is not None and not value.grad.any() for value in model.parameters())


# --- one layer's output ---


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("with_segments", [False, True])
def test_a_layers_output_is_the_librarys_and_nothing_above_it_runs_without_need(
    model: ScoringModel, layer: int, with_segments: bool
) -> None:
    """Calls are counted: a pass that only steers layer l runs layers 0 to l; one that also scores runs all."""
    calls: list[int] = []
    handles = [
        module.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, module in enumerate(decoder_layers(model.causal_lm))
    ]
    batch = pack(ROWS, pad_token_id=0)
    request = Request((Segment(0, 3),) if with_segments else (), layer=layer)
    scores = scores_of(model(batch, request), request=request)
    assert calls == list(range(LAYERS if with_segments else layer + 1))
    for handle in handles:
        handle.remove()
    assert scores.activations_SD is not None
    for index, row in enumerate(ROWS):
        states = model.causal_lm.base_model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
        first, length = batch.row_spans[index]
        # The library norms its last hidden state, so the last layer's output is compared after the norm.
        actual = scores.activations_SD[first : first + length]
        if layer == LAYERS - 1:
            actual = model.causal_lm.model.norm(actual)
        torch.testing.assert_close(actual, states.hidden_states[layer + 1][0], rtol=0, atol=TOLERANCE)


def test_the_model_is_whole_again_after_a_steered_pass_even_one_that_failed(model: ScoringModel) -> None:
    config = model.causal_lm.config
    request = Request(layer=0)
    before = full_logits(model, ROWS)
    score(model, ROWS, request)
    assert config.num_hidden_layers == LAYERS

    class Failed(Exception):
        pass

    def fail(*_: object) -> None:
        assert config.num_hidden_layers == 1, "the control: the pass is a short one"
        raise Failed

    handle = decoder_layers(model.causal_lm)[0].register_forward_pre_hook(fail)
    with pytest.raises(Failed):
        score(model, ROWS, request)
    handle.remove()
    assert config.num_hidden_layers == LAYERS
    assert not any(layer._forward_hooks for layer in decoder_layers(model.causal_lm))
    assert torch.equal(full_logits(model, ROWS), before)


def test_a_steered_layer_has_the_same_gradients_under_activation_checkpointing(model: ScoringModel) -> None:
    """The layer runs a second time in the backward pass, when nothing listens to it any more and the model is whole again."""
    parameters = list(decoder_layers(model.causal_lm)[:2].parameters())

    def gradients() -> tuple[Tensor, ...]:
        activations_SD = score(model.train(), ROWS, Request(layer=1)).activations_SD
        assert activations_SD is not None
        return torch.autograd.grad(activations_SD.square().sum(), parameters)

    expected = gradients()
    enable_activation_checkpointing(model.lm)
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=1e2 * TOLERANCE)


# --- heads that do more than multiply ---


def biased(kind: str) -> Any:
    """An architecture whose head has a bias, as a trained one would have it."""
    model = random_lm(kind, dtype=torch.float32)
    assert model.get_output_embeddings().bias is not None
    return model


REFUSED: dict[str, Callable[[], Any]] = {
    "cohere scales": lambda: random_lm("cohere", dtype=torch.float32),
    "granite scales": lambda: random_lm("granite", dtype=torch.float32, logits_scaling=8.0),
    "gemma2 caps": lambda: random_lm("gemma2", dtype=torch.float32, num_key_value_heads=1, head_dim=8),
    "gemma2 caps in float64": lambda: random_lm("gemma2", num_key_value_heads=1, head_dim=8),
    "phi adds a bias": lambda: biased("phi"),
    "gptj adds a bias": lambda: random_lm("gptj", dtype=torch.float32, rotary_dim=8),
}


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED)
def test_a_head_that_does_more_than_multiply_is_refused(build: Callable[[], Any]) -> None:
    """Losses computed without the scale, the cap or the bias would be another model's."""
    with pytest.raises(InputError, match=r"does more to its logits than multiply by the head(.|\n)*where: model\n(.|\n)*such as OLMo"):
        ScoringModel(build())


@pytest.mark.parametrize("kind", ["granite", "phi"])
def test_the_same_architecture_is_taken_where_its_scale_is_one_or_its_bias_zero(kind: str) -> None:
    lm = random_lm(kind, dtype=torch.float32)
    head = lm.get_output_embeddings()
    if head.bias is not None:
        with torch.no_grad():
            head.bias.zero_()
    assert ScoringModel(lm).packs


def test_adapters_on_the_head_are_refused() -> None:
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "lm_head"))
    with pytest.raises(InputError, match=r"adapters on the output head\n.*where: train.lora.target_modules(.|\n)*leave the head out"):
        ScoringModel(add_lora(random_lm(), lora=lora, seed=0))
    everywhere = ScoringModel(add_lora(random_lm(), lora=LoraConfig(r=2, lora_alpha=4), seed=0))
    assert not everywhere.trains_head, "all-linear leaves the head out"


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(InputError, match="LlamaModel has no output head with a weight"):
        ScoringModel(random_lm("llama").base_model)


def test_the_check_leaves_mode_and_random_numbers_as_they_were() -> None:
    for training in (True, False):
        lm = random_lm().train(training)
        state = torch.random.get_rng_state()
        ScoringModel(lm)
        assert lm.training is training
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_trained_with_its_embedding(tied: bool) -> None:
    model = ScoringModel(random_lm(tie_word_embeddings=tied).requires_grad_(False))
    assert not model.trains_head
    model.causal_lm.get_input_embeddings().weight.requires_grad_(True)
    assert model.trains_head is tied


# --- modes and seeds ---


@pytest.mark.parametrize("training", [True, False])
def test_measuring_mode_is_left_again_even_by_an_error(training: bool) -> None:
    module = nn.Linear(1, 1).train(training)
    seen: list[tuple[bool, bool]] = []

    def measure() -> None:
        with measuring(module):
            seen.append((module.training, torch.is_grad_enabled()))
            raise KeyError

    with pytest.raises(KeyError):
        measure()
    assert seen == [(False, False)]
    assert (module.training, torch.is_grad_enabled()) == (training, True)


def test_the_dropout_of_a_step_follows_from_seed_step_and_rank() -> None:
    def draw(**changes: int) -> float:
        set_step_seed(**{"seed": 1, "step": 2, "rank": 0, **changes})
        return float(torch.rand(()))

    assert draw() == draw()
    assert len({draw(), draw(seed=2), draw(step=3), draw(rank=1)}) == 4
