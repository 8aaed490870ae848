"""Greedy decoding, in batches with a key-value cache.

Shape suffixes: B rows, T positions, S new tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.cleanup import clean_up
from eval.drafts import Guesses
from eval.forward import SplitModel, pad_token_id, split_model
from eval.row_cache import KeptStates, RowCache, RowStates
from trainers.data.encode import EncodedRow
from trainers.data.packing import MAX_GROUPS, pack
from trainers.errors import InputError
from trainers.modeling import context_length
from trainers.scoring import measuring

Stop = Callable[[int, list[int]], bool]
"""(row index, ids generated so far) -> whether the row needs no more tokens."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "penalty_alpha": (),
    "dola_layers": (),
    "guidance_scale": (1.0,),
    "stop_strings": (),
    "max_time": (),
    "watermarking_config": (),
}


def altered_generation(model: Any) -> list[str]:
    """Settings of the checkpoint's generation configuration that make its greedy decoding more than an argmax, as ``name = value``."""
    settings = getattr(model, "generation_config", None)
    found = {name: getattr(settings, name, None) for name in _NEUTRAL}
    return [f"{name} = {value}" for name, value in found.items() if value is not None and value not in _NEUTRAL[name]]


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a generation: those of the checkpoint's generation configuration and the tokenizer's end token."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated ids without special tokens, cleaned up once as the benchmark does."""
    return clean_up(raw_text(tokenizer, ids))


def raw_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated ids without special tokens, as the tokenizer writes it."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def greedy(
    *,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    batch_tokens: int,
    device: str,
    stop: Stop | None = None,
) -> list[list[int]]:
    """Greedy continuations in the order given: the same ids as decoding each prompt alone, up to rounding.

    A row ends with its stop id (which is part of the result), after ``max_new_tokens``, where the model's context is full, or
    where ``stop`` says so.

    Args:
        model: a causal language model, or a peft model around one.
        tokenizer: gives the padding id and the end token.
        prompts: token ids, at least one each.
        max_new_tokens: one limit, or one per prompt; 0 gives an empty row.
        batch_tokens: positions held in the cache at the same time, padding included (at least one row is taken).
        device: where the model is.
        stop: asked after every token.

    Raises:
        InputError: if a prompt is longer than the model's context.
    """
    context = context_length(model.config)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    for index, prompt in enumerate(prompts):
        if len(prompt) > context:
            raise InputError(f"prompt {index} has {len(prompt)} tokens, but the model's context holds {context}")
        limits[index] = min(limits[index], context - len(prompt))
    results: list[list[int]] = [[] for _ in prompts]
    ends = stop_ids(model, tokenizer)
    split = split_model(model, device=device)
    pad = pad_token_id(tokenizer)
    with measuring(model):
        for group in decode_groups([len(prompt) for prompt in prompts], limits, batch_tokens=batch_tokens):
            if not split.packs:
                decode_padded(split, prompts, limits, results, group=group, ends=ends, pad=pad, device=device, stop=stop)
                continue
            rows = _read_prompts(split, [prompts[index] for index in group], pad=pad, device=device)
            rows = [replace(row, index=group[row.index], limit=limits[group[row.index]]) for row in rows]
            for index, ids in continue_rows(split, rows, ends=ends, device=device, stop=stop).items():
                results[index] = ids
    return results


@dataclass(frozen=True)
class OpenRow:
    """A row that is to be continued.

    Args:
        index: what the caller calls it.
        ids: prompt and the tokens of the continuation that are known; all but the last have keys and values.
        num_known: how many of them are the continuation's.
        limit: tokens of the continuation at most, the known ones among them.
        states: keys and values.
        hint: tokens that are likely to appear, such as the gold answer; they save time and change nothing.
    """

    index: int
    ids: Sequence[int]
    num_known: int
    limit: int
    states: RowStates
    hint: Sequence[int] = ()


def _read_prompts(split: SplitModel, prompts: Sequence[Sequence[int]], *, pad: int, device: str) -> list[OpenRow]:
    """Run prompts in one pass; each row then knows its first token, which stop rules have not seen."""
    batch = pack(
        [EncodedRow("", tuple(prompt), len(prompt)) for prompt in prompts],
        pad_token_id=pad,
        max_groups=MAX_GROUPS.get(torch.device(device).type, 3),
    ).to(device)
    kept = KeptStates()
    last_B = torch.tensor([first + length - 1 for first, length in batch.row_spans], device=device)
    with split.packing():
        states_BD = split.run_packed(batch, wanted_N=last_B, kept=kept)
    first_B = split.logits(states_BD).argmax(-1).tolist()
    states = kept.rows(batch, wanted=[(row, len(prompt)) for row, prompt in enumerate(prompts)])
    return [OpenRow(index=row, ids=(*prompt, first_B[row]), num_known=1, limit=1, states=states[row]) for row, prompt in enumerate(prompts)]


class _Growing:
    """A row while it is continued."""

    def __init__(self, row: OpenRow, *, guessing: bool) -> None:
        self.row = row
        self.ids = list(row.ids[len(row.ids) - row.num_known :])
        self.last = row.ids[-1]
        self.guesses = Guesses(row.ids, hint=row.hint) if guessing else None

    def is_done(self, *, ends: frozenset[int], stop: Stop | None) -> bool:
        """Whether the row ends with its latest token."""
        return self.last in ends or len(self.ids) >= self.row.limit or (stop is not None and stop(self.row.index, self.ids))

    def next_ids(self) -> list[int]:
        """The latest token, which has no keys and values yet, and guesses of those after it."""
        # The token that follows the last guess is found as well, so the guesses leave room for it.
        room = self.row.limit - len(self.ids) - 1
        return [self.last, *(self.guesses.guess(limit=room) if self.guesses and room > 0 else ())]

    def take(self, given: list[int], said: list[int], *, ends: frozenset[int], stop: Stop | None) -> bool:
        """Append what greedy decoding said after each given token, up to the first wrong guess; whether the row is done."""
        right = 0
        while right < len(given) - 1 and given[right + 1] == said[right]:
            right += 1
        if self.guesses:
            self.guesses.learn(guessed=len(given) - 1, right=right)
        for token in said[: right + 1]:
            self.ids.append(token)
            self.last = token
            if self.is_done(ends=ends, stop=stop):
                return True
        if self.guesses:
            self.guesses.extend(said[: right + 1])
        return False


def continue_rows(
    split: SplitModel, rows: Sequence[OpenRow], *, ends: frozenset[int], device: str, stop: Stop | None = None, guessing: bool = True
) -> dict[int, list[int]]:
    """Continue rows together, greedily; all tokens of each continuation by the rows' ``index``.

    Called inside ``measuring``. ``stop`` is asked after every token but one that ends its row anyway, the last known one included.

    Args:
        split: a model that packs.
        rows: at least one token each.
        ends: ids that end a row; they are part of its continuation.
        device: where the model is.
        stop: given a row's ``index`` and its continuation.
        guessing: whether several tokens of a row may be checked in one pass.
    """
    growing = [_Growing(row, guessing=guessing) for row in rows]
    alive = [one for one in growing if not one.is_done(ends=ends, stop=stop)]
    if alive:
        cache = RowCache([one.row.states for one in alive])
        members: list[_Growing | None] = list(alive)
        with split.packing():
            while any(members):
                members = _step(split, cache, members, ends=ends, device=device, stop=stop)
    return {one.row.index: one.ids for one in growing}


def _step(
    split: SplitModel, cache: RowCache, members: list[_Growing | None], *, ends: frozenset[int], device: str, stop: Stop | None
) -> list[_Growing | None]:
    """One forward pass for the next tokens of all rows; finished rows leave once half of the cache is theirs."""
    if 2 * sum(one is not None for one in members) <= len(members):
        cache.keep([index for index, one in enumerate(members) if one is not None])
        members = [one for one in members if one is not None]
    given = [[] if one is None else one.next_ids() for one in members]
    cache.begin([len(ids) for ids in given])
    ids_S = torch.tensor([token for ids in given for token in ids]).to(device, non_blocking=True)
    said_S = split.logits(split.run_cached(ids_S, cache=cache)).argmax(-1).tolist()
    start = 0
    for index, one in enumerate(members):
        said = said_S[start : start + len(given[index])]
        start += len(given[index])
        if one is None:
            continue
        before = len(one.ids)
        if one.take(given[index], said, ends=ends, stop=stop):
            members[index] = None
        else:
            cache.lengths[index] += len(one.ids) - before
    return members


def decode_groups(lengths: list[int], limits: list[int], *, batch_tokens: int) -> list[list[int]]:
    """Rows of similar length together, while prompt and continuation of all of them, padded, fit the budget."""
    order = sorted((index for index, limit in enumerate(limits) if limit > 0), key=lambda index: (lengths[index], limits[index], index))
    groups: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, limits[index]) if groups else limits[index]
        if groups and (len(groups[-1]) + 1) * (lengths[index] + longest) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = limits[index]
    return groups


def _pad_left(prompts: list[Sequence[int]], *, pad: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of shape (B, T): the last token of every prompt stands in the last column."""
    length = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), length), pad, dtype=torch.int64)
    mask_BT = torch.zeros((len(prompts), length), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, length - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        mask_BT[row, length - len(prompt) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def _positions(mask_BT: Tensor) -> Tensor:
    """Positions that start at 0 with the first real token of each row, shape (B, T)."""
    return (mask_BT.cumsum(-1) - 1).clamp(min=0)


def decode_padded(
    split: SplitModel,
    prompts: Sequence[Sequence[int]],
    limits: list[int],
    results: list[list[int]],
    *,
    group: list[int],
    ends: frozenset[int],
    pad: int,
    device: str,
    stop: Stop | None,
) -> None:
    """Decode the rows of a group into ``results``: the way for architectures that cannot attend to packed rows."""
    ids_BT, mask_BT = _pad_left([prompts[index] for index in group], pad=pad, device=device)
    states, cache = split.run(ids_BT=ids_BT, mask_BT=mask_BT, positions_BT=_positions(mask_BT), use_cache=True)
    rows, done = list(group), [False] * len(group)
    while True:
        next_B = split.logits(states[:, -1]).argmax(-1)
        for position, token in enumerate(next_B.tolist()):
            if done[position]:
                continue
            result = results[rows[position]]
            result.append(token)
            done[position] = token in ends or len(result) >= limits[rows[position]] or (stop is not None and stop(rows[position], result))
        if all(done):
            return
        if 2 * sum(done) >= len(done):
            keep = torch.tensor([position for position, finished in enumerate(done) if not finished], device=device)
            cache.batch_select_indices(keep)
            mask_BT, next_B = mask_BT[keep], next_B[keep]
            rows, done = [rows[position] for position in keep.tolist()], [False] * len(keep)
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
        states, cache = split.run(
            ids_BT=next_B[:, None], mask_BT=mask_BT, positions_BT=_positions(mask_BT)[:, -1:], cache=cache, use_cache=True
        )


def generate_alone(*, model: Any, tokenizer: Any, prompt: Sequence[int], max_new_tokens: int, device: str) -> list[int]:
    """One prompt by the model's own ``generate``, as the benchmark calls it: greedy, with whatever the checkpoint's generation
    configuration adds (a repetition penalty or further stop ids take effect)."""
    ids_BT = torch.tensor([list(prompt)], device=device)
    with measuring(model):
        output = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )
    return output[0, len(prompt) :].tolist()
