"""Reading models and their attacks one by one, each kept as soon as it is there, and putting the audit together from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from eval.audit.attacks import Material, run_attack
from eval.audit.config import Attack, AuditConfig
from eval.audit.reading import Row, Subject, read
from eval.audit.recovery import Readings, Recovered, Resampling, membership_results, recover, remaining
from eval.audit.traces import FAMILIES
from eval.audit.verdict import AuditThresholds, Evidence, count_comparisons, decides, is_clear, is_mended, judge
from eval.degenerate import degenerate_rate
from eval.mmlu import MmluData
from eval.runner import evaluate
from trainers.data.types import AttackDocuments, Kind
from trainers.files import read_json, write_json

AS_IS = "as-is"
"""The reading without any attack."""
TRACES = (Attack.EXTRACTION, Attack.MEMBERSHIP)
"""Attacks that ask for nothing: they have no reading before and after."""

Say = Callable[[str], None]


class Role(StrEnum):
    """The models of an audit."""

    UNLEARNED = "unlearned"
    """The audited one."""
    BEFORE = "before"
    """The untouched target."""
    NEVER_SEEN = "never-seen"
    """A model that never saw the forget set: the control."""


@dataclass(frozen=True)
class Candidate:
    """A model that can be loaded.

    Args:
        role: what it is in the audit.
        name: its path, for reports.
        load: gives a fresh copy in the evaluation's dtype, on the device.
    """

    role: Role
    name: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class Store:
    """Finished readings as files of a folder, so that an interrupted audit goes on where it stopped."""

    folder: Path

    def path(self, role: Role, part: str) -> Path:
        """Where a reading lies."""
        return self.folder / f"{role.value}-{part}.json"

    def has(self, role: Role, part: str) -> bool:
        """Whether a reading is finished."""
        return self.path(role, part).exists()

    def get(self, role: Role, part: str) -> dict[str, Any]:
        """A finished reading."""
        return dict(read_json(self.path(role, part)))


def read_model(
    candidate: Candidate,
    *,
    tokenizer: Any,
    given: Material,
    attack: AttackDocuments | None,
    mmlu: MmluData | None,
    config: AuditConfig,
    device: str,
    store: Store,
    say: Say,
) -> None:
    """Every reading of one model that is not finished yet.

    Args:
        candidate: the model.
        tokenizer: the tokenizer of all models.
        given: what the attacks read.
        attack: members and non-members for the plain evaluation, or None.
        mmlu: questions, or None.
        config: settings.
        device: where models are.
        store: where readings go.
        say: told about each reading in a line.

    Raises:
        InputError: if a row or a document does not fit the model's context.
    """
    parts = [AS_IS, *(one.value for one in config.attacks)]
    missing = [part for part in parts if not store.has(candidate.role, part)]
    for part in parts:
        if part not in missing:
            say(f"{candidate.role.value}: {part} is there from an earlier start")
    if not missing:
        return
    model = candidate.load()
    subject = Subject(model, tokenizer, config.eval, device)
    for part in missing:
        started = time.perf_counter()
        if part == AS_IS:
            reading = _as_is(subject, name=candidate.name, given=given, attack=attack, mmlu=mmlu)
        elif not store.get(candidate.role, AS_IS)["finite"]:
            reading = {"rows": [], "settings": {}, "not_run": "the model's losses are not finite"}
        else:
            reading = asdict(run_attack(Attack(part), subject=subject, fresh=candidate.load, given=given, config=config))
        seconds = time.perf_counter() - started
        write_json(store.path(candidate.role, part), reading | {"seconds": round(seconds, 2)})
        note = reading.get("not_run")
        say(f"{candidate.role.value}: {part}" + (f" not run: {note}" if note else "") + f" ({seconds:.1f} s)")


def _as_is(subject: Subject, *, name: str, given: Material, attack: AttackDocuments | None, mmlu: MmluData | None) -> dict[str, Any]:
    report = evaluate(
        model=subject.model,
        tokenizer=subject.tokenizer,
        data=given.data,
        attack=attack,
        mmlu=mmlu,
        config=subject.config,
        fold="audit",
        model_name=name,
        device=subject.device,
    )
    rows = [row for row in report.rows if row["part"] == "task"]
    texts = {
        side: [row["output"] for row in rows if row["set"] == side and row["kind"] == Kind.COMPLETION] for side in ("forget", "retain")
    }
    finite = all(math.isfinite(row["answer_log_prob"]) for row in rows)
    return {
        "rows": rows + (read(subject, given.unseen, set_name="unseen") if finite else []),
        "scores": dict(report.scores),
        "intervals": dict(report.intervals),
        "degenerate": {side: degenerate_rate(outputs) if outputs else None for side, outputs in texts.items()},
        "notes": report.notes,
        "finite": finite,
    }


# ---- putting it together


@dataclass(frozen=True)
class Assembled:
    """A finished audit: its summary, and every row of every reading."""

    summary: dict[str, Any]
    rows: list[Row]


def assemble(*, roles: Sequence[Role], config: AuditConfig, thresholds: AuditThresholds, store: Store) -> Assembled:
    """Shares, intervals and the verdict, from readings that are all finished."""
    parts = [AS_IS, *(one.value for one in config.attacks)]
    found = {role: {part: store.get(role, part) for part in parts} for role in roles}
    plain = {role: found[role][AS_IS] for role in roles}
    not_run = {one.value: str(found[Role.UNLEARNED][one.value]["not_run"]) for one in config.attacks if _not_run(found, one.value)}
    membership: dict[str, Any] = {}
    if _ran(found, Attack.MEMBERSHIP, config):
        membership = membership_results(
            **{name: _rows(found, role, Attack.MEMBERSHIP) for name, role in _ARGUMENTS.items()},  # type: ignore[arg-type]
            families=FAMILIES,
            min_gap=thresholds.min_gap,
        )
    asked = [one for one in config.attacks if one not in TRACES and one.value not in not_run]
    never_seen = Role.NEVER_SEEN in roles
    comparisons = count_comparisons(
        attacks=len(asked), membership=membership, traces=int(_ran(found, Attack.EXTRACTION, config)), has_never_seen=never_seen
    )
    draw = Resampling(
        samples=config.eval.bootstrap_samples,
        seed=config.eval.bootstrap_seed,
        confidence=config.eval.confidence,
        comparisons=comparisons,
        min_gap=thresholds.min_gap,
    )
    attacks = {one.value: recover(_readings(found, one.value), draw=draw) for one in asked}
    still = remaining(**{name: _set(plain.get(role), "forget") for name, role in _ARGUMENTS.items()}, draw=draw)  # type: ignore[arg-type]
    if _ran(found, Attack.EXTRACTION, config):
        strengths = {name: _rows(found, role, Attack.EXTRACTION) for name, role in _ARGUMENTS.items()}
        strength = remaining(**strengths, draw=draw, names=("forget_regurgitation",))  # type: ignore[arg-type]
        still["extraction_strength"] = strength["forget_regurgitation"]
    evidence = Evidence(
        scores=plain[Role.UNLEARNED]["scores"],
        baseline=plain[Role.BEFORE]["scores"],
        attacks=attacks,
        remaining=still,
        membership=membership,
        not_run=not_run,
        skipped=tuple(one.value for one in Attack if one not in config.attacks),
        has_never_seen=never_seen,
        has_unseen=bool(_set(plain[Role.UNLEARNED], "unseen")),
        comparisons=comparisons,
        confidence=draw.confidence,
    )
    judgement = judge(evidence, thresholds=thresholds)
    summary = {
        "verdict": judgement.verdict.value,
        "reasons": list(judgement.reasons),
        "weaker": list(judgement.weaker),
        "models": {
            role.value: {key: plain[role][key] for key in ("scores", "intervals", "degenerate", "notes", "seconds")} for role in roles
        },
        "remaining": {name: asdict(result) for name, result in still.items()},
        "attacks": {name: _attack_summary(name, results, found=found, thresholds=thresholds) for name, results in attacks.items()},
        "membership": {task: {family: asdict(one) for family, one in by.items()} for task, by in membership.items()},
        "not_run": not_run,
        "skipped": list(evidence.skipped),
        "comparisons": comparisons,
    }
    rows = [{"model": role.value, "attack": part, **row} for role in roles for part in parts for row in found[role][part]["rows"]]
    return Assembled(summary, rows)


_ARGUMENTS = {"before": Role.BEFORE, "unlearned": Role.UNLEARNED, "control": Role.NEVER_SEEN}


def _attack_summary(
    name: str, results: Mapping[str, Recovered], *, found: Mapping[Role, Mapping[str, Any]], thresholds: AuditThresholds
) -> dict[str, Any]:
    return {
        "scores": {
            score: _judged(score, result, thresholds=thresholds, has_never_seen=Role.NEVER_SEEN in found)
            for score, result in results.items()
        },
        "settings": {role.value: parts[name]["settings"] for role, parts in found.items()},
        "seconds": {role.value: parts[name]["seconds"] for role, parts in found.items()},
        "target_under_attack": _levels(found[Role.BEFORE][name]["rows"]),
    }


def _judged(score: str, result: Recovered, *, thresholds: AuditThresholds, has_never_seen: bool) -> dict[str, Any]:
    clear = decides(score, has_never_seen=has_never_seen) and is_clear(result, thresholds=thresholds)
    return asdict(result) | {"clear": clear, "mended": is_mended(result, thresholds=thresholds)}


def _levels(rows: Sequence[Row]) -> dict[str, float | None]:
    """What the untouched target still scores under an attack: an attack that breaks it could not have brought anything out."""
    found: dict[str, float | None] = {}
    for name, kind in (("forget_regurgitation", Kind.COMPLETION), ("forget_knowledge", Kind.QUESTION)):
        scores = [row["score"] for row in rows if row["set"] == "forget" and row["kind"] == kind]
        found[name] = sum(scores) / len(scores) if scores else None
    return found


def _not_run(found: Mapping[Role, Mapping[str, Any]], part: str) -> bool:
    return found[Role.UNLEARNED][part]["not_run"] is not None


def _ran(found: Mapping[Role, Mapping[str, Any]], attack: Attack, config: AuditConfig) -> bool:
    return attack in config.attacks and all(parts[attack.value]["not_run"] is None for parts in found.values())


def _rows(found: Mapping[Role, Mapping[str, Any]], role: Role, attack: Attack) -> list[Row] | None:
    return list(found[role][attack.value]["rows"]) if role in found else None


def _set(reading: Mapping[str, Any] | None, name: str) -> list[Row] | None:
    return None if reading is None else [row for row in reading["rows"] if row["set"] == name]


def _readings(found: Mapping[Role, Mapping[str, Any]], part: str) -> Readings:
    def of(role: Role, which: str, name: str) -> list[Row] | None:
        # A control that could not be attacked is none.
        return (_set(found[role][which], name) or None) if role in found else None

    return Readings(
        before=of(Role.BEFORE, AS_IS, "forget") or [],
        unlearned=of(Role.UNLEARNED, AS_IS, "forget") or [],
        after=of(Role.UNLEARNED, part, "forget") or [],
        control=of(Role.NEVER_SEEN, AS_IS, "forget"),
        control_after=of(Role.NEVER_SEEN, part, "forget"),
        unseen=of(Role.UNLEARNED, AS_IS, "unseen"),
        unseen_after=of(Role.UNLEARNED, part, "unseen"),
    )
