"""Both arms of the evaluation benchmarks on one scene, what they cost, and whether they say the same."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.arms.official import OfficialArm, OfficialRow
from benchmarks.memorised import Scene
from eval.config import EvalConfig
from eval.report import EvalReport
from eval.runner import evaluate
from trainers.data.types import Document, Record

LOSS_TOLERANCE = 1e-4
"""Largest difference of a mean loss in float32, nats: batches add in another order. Measured: below 1e-5."""


@dataclass
class Passes:
    """Forward passes of the decoder and the token positions in them."""

    passes: int = 0
    positions: int = 0

    @contextmanager
    def count(self, model: Any) -> Iterator[None]:
        """Count inside the block."""

        def note(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            ids = named.get("input_ids", arguments[0] if arguments else None)
            self.passes += 1
            self.positions += ids.numel() if ids is not None else 0

        hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@dataclass
class OfficialResult:
    """What the official loop has found so far, by the rows' and documents' ids."""

    rows: dict[str, OfficialRow] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def run_ours(scene: Scene, *, config: EvalConfig, device: str) -> EvalReport:
    """Our evaluation of everything in the scene, from the model in memory to the finished report."""
    return evaluate(
        model=scene.model,
        tokenizer=scene.tokenizer,
        data=scene.data,
        attack=scene.attack,
        mmlu=None,
        config=config,
        fold="all",
        model_name="bench",
        device=device,
    )


def official_arm(scene: Scene, *, config: EvalConfig, device: str) -> OfficialArm:
    """The official loop on the same model."""
    return OfficialArm(model=scene.model, tokenizer=scene.tokenizer, max_new_tokens=config.max_new_tokens, device=device)


def items(scene: Scene) -> list[Record | Document]:
    """Everything that the official loop takes one by one."""
    return [*scene.data.forget, *scene.data.retain, *scene.attack.members, *scene.attack.nonmembers]


def run_official(arm: OfficialArm, item: Record | Document, *, into: OfficialResult) -> None:
    """One row or document."""
    if isinstance(item, Record):
        into.rows[item.id] = arm.row(item)
    else:
        into.losses[item.id] = arm.document(item)


@dataclass(frozen=True)
class Agreement:
    """How the arms' outputs compare, over the rows that both have.

    Args:
        compared: rows.
        decided: of them, those whose text ours cut short because their score was decided; their texts are prefixes.
        texts_equal: of the others, those with the same text.
        scores_equal: rows with the same score.
        largest_loss_difference: of any row or document, nats.
        typical_loss_difference: the median.
    """

    compared: int
    decided: int
    texts_equal: int
    scores_equal: int
    largest_loss_difference: float
    typical_loss_difference: float

    @property
    def is_exact(self) -> bool:
        """Whether every text and every score is the same, and no loss differs by more than rounding."""
        return (
            self.compared > 0
            and self.texts_equal == self.compared - self.decided
            and self.scores_equal == self.compared
            and self.largest_loss_difference <= LOSS_TOLERANCE
        )

    @property
    def sentence(self) -> str:
        """For the result file."""
        whole = self.compared - self.decided
        return (
            f"{self.texts_equal} of {whole} whole texts and {self.scores_equal} of {self.compared} scores are equal, {self.decided} texts "
            f"were cut short; losses differ by {self.typical_loss_difference:.0e} (median) and {self.largest_loss_difference:.0e} (most)"
        )


def compare(official: OfficialResult, ours: Sequence[dict[str, Any]]) -> Agreement:
    """Compare every row that the official loop has reached."""
    tasks = {row["id"]: row for row in ours if row["part"] == "task"}
    documents = {row["id"]: row for row in ours if row["part"] in ("member", "nonmember")}
    apart = [abs(loss - documents[name]["loss"]) for name, loss in official.losses.items()]
    equal = scores = decided = 0
    for name, row in official.rows.items():
        own = tasks[name]
        apart.append(abs(row.loss + own["answer_log_prob"] / own["num_tokens"]))
        scores += row.score == own["score"]
        decided += own["decided"]
        equal += not own["decided"] and row.text == own["output"]
    return Agreement(len(official.rows), decided, equal, scores, max(apart), statistics.median(apart))


def mixture(rows: Sequence[dict[str, Any]]) -> str:
    """How much of each set the model still knows, for the result file."""
    found = []
    for name in ("forget", "retain"):
        own = [row for row in rows if row["part"] == "task" and row["set"] == name]
        whole = sum(row["matched_fraction"] == 1 for row in own) / len(own)
        part = sum(0 < row["matched_fraction"] < 1 for row in own) / len(own)
        found.append(f"{name}: {100 * whole:.0f} % of the rows are known to the end, {100 * part:.0f} % in part")
    return "; ".join(found)
