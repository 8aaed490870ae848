"""The rows and the settings that every arm of a benchmark computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trainers.data.encode import EncodedRow

PAD_TOKEN_ID = 1


@dataclass(frozen=True)
class Settings:
    """What all arms share: the published recipe's values, with the KL on answer tokens.

    Source: ZJUKLAB's first run, https://arxiv.org/abs/2503.21088

    Args:
        forget_weight, retain_ce_weight, retain_kl_weight: coefficients of NPO, cross-entropy and KL(reference || model).
        beta: NPO's inverse temperature; its log-ratio is a mean over each answer's tokens.
        pairs_per_step: (forget, retain) pairs per optimizer step.
        padded_length: tokens that the recipe fills every row up to, and the longest row of the workload.
        learning_rate, weight_decay, max_grad_norm: of AdamW, constant.
        lora_r: rank, and alpha alike.
        lora_dropout: 0 makes the arms comparable to the last digit; the recipe trains with 0.05.
    """

    forget_weight: float = 0.4
    retain_ce_weight: float = 0.2
    retain_kl_weight: float = 0.4
    beta: float = 0.1
    pairs_per_step: int = 4
    padded_length: int = 256
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    lora_r: int = 4
    lora_dropout: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Forget and retain rows, and where they come from.

    Args:
        forget, retain: equally many rows; pair i is forget[i] with retain[i].
        source: one sentence for the result file.
    """

    forget: tuple[EncodedRow, ...]
    retain: tuple[EncodedRow, ...]
    source: str

    @property
    def num_pairs(self) -> int:
        """(forget, retain) pairs."""
        return len(self.forget)

    @property
    def tokens_per_pair(self) -> float:
        """Real tokens of a forget and a retain row, on average."""
        return sum(len(row.input_ids) for row in self.forget + self.retain) / self.num_pairs

    def padded_per_pair(self, *, group: int) -> float:
        """Tokens of a forget and a retain row, on average, where each side of a step is filled up to its longest row."""
        steps = self.steps(pairs_per_step=group)
        longest = [max(len(side[pair].input_ids) for pair in pairs) * len(pairs) for pairs in steps for side in (self.forget, self.retain)]
        return sum(longest) / self.num_pairs

    @property
    def scored_per_pair(self) -> float:
        """Answer tokens of a forget and a retain row, end tokens included, on average."""
        return sum(row.num_scored for row in self.forget + self.retain) / self.num_pairs

    def steps(self, *, pairs_per_step: int) -> list[Sequence[int]]:
        """The pairs of each optimizer step of one pass, in order."""
        return [range(start, min(start + pairs_per_step, self.num_pairs)) for start in range(0, self.num_pairs, pairs_per_step)]


def build_workload(
    data: Path | None, *, tokenizer: Path | None, num_pairs: int, vocabulary: int, max_tokens: int, seed: int, group: int = 4
) -> Workload:
    """Rows of a LUME folder, or synthetic ones of the same lengths where no folder is given.

    Args:
        data: folder with forget.jsonl and retain.jsonl, or None.
        tokenizer: folder of the tokenizer; needed with ``data``.
        num_pairs: pairs to draw. The draw is stratified by length, so that few pairs represent the whole set.
        vocabulary: token ids are taken modulo this.
        max_tokens: longer rows lose the beginning of their prompt; a row is never dropped.
        seed: of the draw, of the pairing and of synthetic rows.
        group: pairs per step. The order is drawn such that filling each step's rows up to their longest costs what it costs on
            average; with few steps chance alone would move it by a tenth.
    """
    generator = np.random.default_rng(seed)
    if data is None:
        sides = [
            synthetic_rows(name, number=2048, vocabulary=vocabulary, seed=seed + side) for side, name in enumerate(("forget", "retain"))
        ]
        source = f"synthetic rows with the lengths of LUME, seed {seed}"
    else:
        sides = _lume_rows(data, tokenizer=tokenizer, vocabulary=vocabulary)
        source = f"LUME ({len(sides[0]):,} forget and {len(sides[1]):,} retain rows), {num_pairs} of each drawn by length, seed {seed}"
    drawn = []
    for rows in sides:
        cut = [cut_row(row, max_tokens=max_tokens) for row in rows]
        some = _draw(cut, number=num_pairs, generator=generator)
        drawn.append(_typical_order(some, like=cut, group=min(group, num_pairs), generator=generator))
    return Workload(forget=drawn[0], retain=drawn[1], source=source)


def whole_set(data: Path | None, *, tokenizer: Path | None, vocabulary: int, seed: int) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """All forget and all retain rows at their full lengths; 2,732 synthetic ones of each without a folder."""
    if data is None:
        forget, retain = (
            synthetic_rows(name, number=2732, vocabulary=vocabulary, seed=seed + side) for side, name in enumerate(("f", "r"))
        )
    else:
        forget, retain = _lume_rows(data, tokenizer=tokenizer, vocabulary=vocabulary)
    return forget, retain


def cut_row(row: EncodedRow, *, max_tokens: int) -> EncodedRow:
    """The row without the beginning of its prompt where it is too long; one prompt token always stays."""
    surplus = max(0, min(len(row.input_ids) - max_tokens, row.num_prompt - 1))
    cut = replace(row, input_ids=row.input_ids[surplus:][:max_tokens], num_prompt=row.num_prompt - surplus)
    assert cut.num_scored > 0, "max_tokens leaves no answer"
    return cut


def synthetic_rows(name: str, *, number: int, vocabulary: int, seed: int) -> list[EncodedRow]:
    """Random token ids with the lengths of LUME: about two thirds short questions, one third completions of three kinds.

    Measured on LUME with OLMo's tokenizer: 68 % questions of 19 to 24 tokens with answers of 5 to 9; completions of
    223, 86 and 225 tokens (tasks 1, 2, 3) with answers of 43 to 53; answers are 28 % of all tokens.
    """
    generator = np.random.default_rng([seed, number])
    rows = []
    for index in range(number):
        if generator.random() < 0.68:
            length, scored = generator.integers(17, 28), generator.integers(5, 10)
        else:
            mean = generator.choice([223, 86, 225], p=[0.28, 0.29, 0.43])
            length, scored = np.rint(generator.normal(mean, 0.1 * mean)), generator.integers(43, 54)
        ids = generator.integers(2, vocabulary, size=int(length))
        rows.append(EncodedRow(f"{name}{index}", tuple(int(value) for value in ids), int(length - scored)))
    return rows


def _lume_rows(data: Path, *, tokenizer: Path | None, vocabulary: int) -> list[list[EncodedRow]]:
    from trainers.data.encode import encode_records
    from trainers.data.records import load_forget_retain
    from trainers.modeling import load_tokenizer

    if tokenizer is None:
        raise ValueError("--data needs --tokenizer: the folder of the tokenizer that turns its text into tokens")
    records = load_forget_retain(data)
    words: Any = load_tokenizer(tokenizer)

    def side(rows: Sequence[Any]) -> list[EncodedRow]:
        encoded = encode_records(rows, tokenizer=words, max_length=1 << 20)
        return [replace(row, input_ids=tuple(value % vocabulary for value in row.input_ids)) for row in encoded]

    return [side(records.forget), side(records.retain)]


def _typical_order(
    drawn: Sequence[EncodedRow], *, like: Sequence[EncodedRow], group: int, generator: np.random.Generator, tries: int = 400
) -> tuple[EncodedRow, ...]:
    """Of many random orders of the drawn rows the one that, filled up to the longest row of each group, is as large as the whole set is."""

    def volume(lengths: np.ndarray) -> float:
        """Positions per row."""
        return float(np.mean([lengths[start : start + group].max() for start in range(0, len(lengths) - group + 1, group)]))

    own, all_of = (np.array([len(row.input_ids) for row in rows]) for rows in (drawn, like))
    expected = np.mean([volume(generator.permutation(all_of)) for _ in range(20)])
    orders = [generator.permutation(len(own)) for _ in range(tries)]
    best = min(orders, key=lambda order: abs(volume(own[order]) - expected))
    return tuple(drawn[index] for index in best)


def _draw(rows: list[EncodedRow], *, number: int, generator: np.random.Generator) -> tuple[EncodedRow, ...]:
    """One row out of each of ``number`` equally large groups of similar length, shortest first."""
    by_length = sorted(rows, key=lambda row: (len(row.input_ids), row.row_id))
    edges = np.linspace(0, len(rows), number + 1).astype(int)
    return tuple(by_length[int(generator.integers(low, high))] for low, high in pairwise(edges))
