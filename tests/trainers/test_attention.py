"""Packed rows attend as each of them would alone: in hidden states and gradients, on every architecture, however they are grouped.

The models run in float64, so that what is equal in theory is equal to 1e-12 here and nothing else is.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.tiny_trial import random_lm, random_rows
from trainers import attention
from trainers.attention import supports_packing, use_packed_attention
from trainers.data.encode import EncodedRow
from trainers.data.packing import MAX_GROUPS, AttentionGroup, Packed, pack
from trainers.files import read_json
from trainers.scoring import ScoringModel

TOLERANCE = 1e-12
"""Measured over 6 seeds: hidden states differ by at most 3e-15, gradients by 2e-13. Rows that see each other change them by 0.1."""

PACKING = {
    "olmo": {"num_attention_heads": 4, "num_key_value_heads": 2, "clip_qkv": 8.0},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "gpt_neox": {},
    "granite": {"attention_multiplier": 0.2},
}
"""Architectures that attend to packed rows; in the first two several query heads share a key head, the last has a scale of its own."""

PADDING = {
    "falcon": {"alibi": True},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 3},
}
"""Architectures that do not: their attention is their own, or looks back over a window."""

torch.set_num_threads(1)


@cache
def plain_model(kind: str) -> Any:
    """The library's model, never handed to ours."""
    return random_lm(kind, **{**PACKING, **PADDING}[kind]).requires_grad_(True)


@cache
def scoring_model(kind: str) -> ScoringModel:
    return ScoringModel(copy.deepcopy(plain_model(kind)))


def row_by_row(kind: str, rows: list[EncodedRow]) -> list[Tensor]:
    """Hidden states of each row alone, without padding or mask."""
    return [plain_model(kind).base_model(input_ids=torch.tensor([row.input_ids])).last_hidden_state[0] for row in rows]


def by_row(hidden_SD: Tensor, *, batch: Packed) -> list[Tensor]:
    return [hidden_SD[first : first + length] for first, length in batch.row_spans]


def gradients(model: Any, hidden: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random combination of the hidden states, by every parameter below the head."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in hidden]
    total = sum((one * other).sum() for one, other in zip(weights, hidden, strict=True))
    return list(torch.autograd.grad(total, list(model.base_model.parameters())))


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((one - other).detach().abs().max()) for one, other in zip(left, right, strict=True))


# --- packed rows equal rows alone ---


@pytest.mark.parametrize("kind", [*PACKING, *PADDING])
def test_packed_rows_have_the_hidden_states_and_gradients_of_rows_alone(kind: str) -> None:
    """Lengths in several groups, equal ones and single tokens among them."""
    model = scoring_model(kind)
    assert model.packs == (kind in PACKING)
    rows = random_rows(5, 30, 2, 9, 1, 3, 60, 3, 31)
    batch = pack(rows, pad_token_id=0)
    assert len(batch.groups) > 1
    expected = row_by_row(kind, rows)
    actual = by_row(model.hidden(batch, everywhere=True), batch=batch)
    assert largest_difference(actual, expected) < TOLERANCE
    difference = largest_difference(gradients(model.causal_lm, actual), gradients(plain_model(kind), expected))
    assert difference < TOLERANCE


@pytest.mark.parametrize("kind", [*PACKING, *PADDING])
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    pad_to=st.integers(0, 60),
    max_groups=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_neither_padding_nor_grouping_changes_a_row(kind: str, lengths: list[int], pad_to: int, max_groups: int, seed: int) -> None:
    rows = random_rows(*lengths, seed=seed)
    batch = pack(rows, pad_token_id=0, pad_to=pad_to, max_groups=max_groups)
    with torch.no_grad():
        actual, expected = by_row(scoring_model(kind).hidden(batch, everywhere=True), batch=batch), row_by_row(kind, rows)
    assert largest_difference(actual, expected) < TOLERANCE


@pytest.mark.parametrize("kind", list(PACKING))
def test_tokens_that_attend_across_rows_change(kind: str) -> None:
    """The negative control: the same tokens as one long row. Only the first row, which has nothing before it, stays."""
    rows = random_rows(4, 6, 9)
    batch = pack(rows, pad_token_id=0)
    one_row = replace(batch, groups=(AttentionGroup(1, len(batch.input_ids_S)),), spread_X=None, restore_S=None)
    with torch.no_grad():
        actual, expected = by_row(scoring_model(kind).hidden(one_row, everywhere=True), batch=batch), row_by_row(kind, rows)
    assert largest_difference(actual[:1], expected[:1]) < TOLERANCE
    assert all(largest_difference([actual[index]], [expected[index]]) > 0.1 for index in (1, 2))


def test_positions_count_from_the_start_of_each_row() -> None:
    """The other negative control: positions that go on from row to row are other positions (rotary ones differ by rounding only)."""
    rows = random_rows(4, 6, 9)
    batch = pack(rows, pad_token_id=0)
    shuffled = replace(batch, position_ids_S=batch.position_ids_S.flip(0))
    with torch.no_grad():
        hidden = by_row(scoring_model("llama").hidden(shuffled, everywhere=True), batch=batch)
        assert largest_difference(hidden, row_by_row("llama", rows)) > 0.1


def test_each_group_is_attended_to_once_per_layer_and_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask would keep torch from its flash kernels."""
    calls: list[tuple[tuple[int, ...], dict[str, Any]]] = []
    honest = attention.scaled_dot_product_attention

    def spy(query: Tensor, *others: Tensor, **keywords: Any) -> Tensor:
        calls.append((tuple(query.shape), keywords))
        return honest(query, *others, **keywords)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    batch = pack(random_rows(3, 3, 60), pad_token_id=0)
    with torch.no_grad():
        scoring_model("olmo").hidden(batch, everywhere=True)
    assert [shape for shape, _ in calls] == [(2, 4, 3, 4), (1, 4, 60, 4)] * 2
    assert all(keywords["is_causal"] and "attn_mask" not in keywords for _, keywords in calls)


# --- who packs ---


def test_a_model_with_an_attention_of_its_own_is_padded_to_one_group() -> None:
    """Each group is a pass of its own there, and all ranks must make equally many."""
    falcon, olmo = scoring_model("falcon"), scoring_model("olmo")
    assert not falcon.causal_lm._supports_attention_backend
    assert (falcon.max_groups, olmo.max_groups) == (1, MAX_GROUPS["cpu"])
    batch = pack(random_rows(3, 60, 5), pad_token_id=0, max_groups=falcon.max_groups)
    assert batch.groups == (AttentionGroup(3, 60),)


def test_a_window_keeps_a_model_from_packing_because_it_matters() -> None:
    """A row longer than the window differs from the same row without one; with the window off the model packs."""
    rows = random_rows(9)
    wide = random_lm("mistral", **{**PADDING["mistral"], "sliding_window": None})
    assert supports_packing(wide)
    assert not supports_packing(plain_model("mistral"))
    with torch.no_grad():
        without = wide.base_model(input_ids=torch.tensor([rows[0].input_ids])).last_hidden_state[0]
    assert largest_difference([without], row_by_row("mistral", rows)) > 0.1


def test_the_pad_token_of_a_padded_pass_is_never_seen() -> None:
    """Padding repeats a row's last token; the model is given the pad token instead, under a mask, and either changes nothing."""
    rows = random_rows(3, 9, 1)
    batch = pack(rows, pad_token_id=0, max_groups=1)
    with torch.no_grad():
        first = scoring_model("falcon").hidden(batch, everywhere=True)
        second = scoring_model("falcon").hidden(replace(batch, pad_token_id=11), everywhere=True)
    assert torch.equal(first, second)


# --- the model goes on working without packed rows ---


@pytest.fixture(params=list(PACKING))
def patched_pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A plain model, and a copy that knows packed attention."""
    patched = copy.deepcopy(plain_model(request.param))
    use_packed_attention(patched)
    return plain_model(request.param), patched


def test_padded_batches_with_a_mask_give_what_they_gave(patched_pair: tuple[Any, Any]) -> None:
    plain, patched = patched_pair
    ids_BT = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(2))
    for side in ("left", "right"):
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[1, :3], mask_BT[2, :5] = 0, 0
        if side == "right":
            mask_BT = mask_BT.flip(1)
        with torch.no_grad():
            expected, actual = (model(input_ids=ids_BT, attention_mask=mask_BT).logits[mask_BT.bool()] for model in (plain, patched))
            unmasked = patched(input_ids=ids_BT).logits[mask_BT.bool()]
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
        if side == "left":
            assert float((unmasked - expected).abs().max()) > 0.1, "negative control: the mask is looked at"


def test_generation_with_a_cache_gives_what_it_gave(patched_pair: tuple[Any, Any]) -> None:
    """Left-padded prompts and a growing cache: the same tokens, and the same as without a cache."""
    ids_BT = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(3))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :2] = 0
    given = {"input_ids": ids_BT, "attention_mask": mask_BT, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected, actual = (model.generate(**given) for model in patched_pair)
    assert torch.equal(actual, expected)
    assert torch.equal(patched_pair[1].generate(**given, use_cache=False), expected)


def test_a_saved_model_has_no_trace_of_it(patched_pair: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain, patched = patched_pair
    for name, model in (("plain", plain), ("patched", patched)):
        model.save_pretrained(str(tmp_path / name))
    assert read_json(tmp_path / "patched" / "config.json") == read_json(tmp_path / "plain" / "config.json")
    assert not [file for file in (tmp_path / "patched").glob("*.json") if attention.NAME in file.read_text()]
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "patched"))
    assert loaded.config._attn_implementation != attention.NAME
