"""The audit of the model that a run delivers, as a stage: it may fail without taking the run's results along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import elsewhere
from launcher.config import ExperimentConfig
from launcher.data import PreparedData, question_groups, unseen_texts
from trainers.errors import InputError, UserFacingError
from trainers.files import read_json

if TYPE_CHECKING:
    from eval.audit.config import AuditConfig
    from launcher.run_folder import Run

STAGE = "audit"
FILE = "audit.json"
AUDITED_FOLD = "test"
"""Selection saw no score of these documents."""
NEVER_SEEN = "never-seen"
"""Folder of the control that a run builds for itself."""
FAILED = "audit_failed"
"""The event of an audit that ended with an error; the stage's next start takes it back."""


def audit_delivered(
    run: Run, *, config: ExperimentConfig, data: PreparedData, target: Path, ahead: elsewhere.Ahead = elsewhere.not_ahead
) -> list[str]:
    """Audit ``merged/`` if the experiment asks for it, into ``audit.json`` and the files beside it.

    A finished audit is not repeated, and one that was stopped goes on. Whatever fails here is told and recorded as an event; the same
    command tries it again.

    Args:
        run: a run whose final scores are there.
        config: its experiment.
        data: its documents.
        target: what its trials started from.
        ahead: computes on a machine with a GPU, where this one has none.

    Returns:
        What the report must warn about.
    """
    if config.audit is None or not (run.folder / "merged" / "merge.json").exists():
        return []
    try:
        with run.stage(STAGE, "Audit: attacks on the delivered model"):
            ahead(elsewhere.audit_ahead, config=config, data=data)
            warnings = make_audit(run, config=config, data=data, target=target)
    except Exception as error:  # what went wrong in an attack does not change what was measured before it
        reason = in_one_line(error)
        run.events.emit(FAILED, error=reason)
        run.console.warning(f"the audit failed: {reason}")
        return [f"The audit failed, so nothing is known beyond the scores: {reason}. The same command tries it again."]
    for line in verdict_lines(read_json(run.folder / FILE)):
        run.console.line(f"  {line}")
    return warnings


def make_audit(run: Run, *, config: ExperimentConfig, data: PreparedData, target: Path) -> list[str]:
    """The audit itself; warnings about its control.

    Raises:
        UserFacingError: if models or texts are unusable.
    """
    from eval.audit.runner import Role
    from launcher.audit import AuditInputs, audit_models, check_alike, locate

    assert config.audit is not None, "asked before"

    def say(text: str) -> None:
        if not text.startswith("  "):  # a line per model; what single readings took is in the files
            run.console.line(f"  {text}")

    settings = audit_settings(config)
    models = {
        Role.UNLEARNED: locate("the delivered model", run.folder / "merged"),
        Role.BEFORE: locate("the target", target),
    }
    warnings: list[str] = []
    if config.audit.build_never_seen:
        folder, warnings = _build_never_seen(run, config=config, data=data)
        models[Role.NEVER_SEEN] = locate("the never-seen model", folder)
    elif config.audit.never_seen is not None:
        models[Role.NEVER_SEEN] = locate("audit.never_seen", Path(config.audit.never_seen).expanduser())
    tokenizer = check_alike(models)
    inputs = AuditInputs.of(
        data.folds[AUDITED_FOLD],
        source=Path(config.data.path or config.data.forget or ""),
        attack=data.attack_of(AUDITED_FOLD),
        questions=data.mmlu_of(AUDITED_FOLD),
        config=settings,
    )
    audit_models(models, tokenizer=tokenizer, inputs=inputs, config=settings, out=run.folder / FILE, say=say)
    return warnings


def audit_settings(config: ExperimentConfig) -> AuditConfig:
    """The settings of the audit that an experiment asks for."""
    from eval.audit.config import AttackSettings, AuditConfig

    assert config.audit is not None, "asked before"
    asked = {name: getattr(config.audit, name) for name in AttackSettings.model_fields}
    changes = {"max_new_tokens": config.audit.max_new_tokens} if config.audit.max_new_tokens else {}
    return AuditConfig(**asked, eval=config.eval.model_copy(update=changes))


def check_audit(config: ExperimentConfig) -> None:
    """Refuse a control that is not there before anything is trained.

    Raises:
        InputError: naming the setting and the folder.
    """
    from trainers.modeling import check_model_folder

    if config.audit is None or config.audit.never_seen is None:
        return
    try:
        check_model_folder(config.audit.never_seen)
    except InputError as error:
        raise InputError(
            error.what,
            where=f"audit.never_seen: {error.where or config.audit.never_seen}",
            why=error.why,
            fix="give the folder of a model that never saw the forget set, or leave audit.never_seen out",
        ) from None


def verdict_lines(audit: Mapping[str, Any]) -> list[str]:
    """The verdict and its reasons, for people."""
    return [f"verdict: {audit['verdict']}", *(str(reason) for reason in audit.get("reasons") or [])]


def audit_state(*, audit: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of a run's audit.

    Args:
        audit: the content of ``audit.json``; empty where there is none.
        events: of the run.

    Returns:
        ``verdict`` (or None), ``reasons``, ``never_seen`` (whether there was a control), and ``error`` (of the last start, or None).
    """
    error = None
    for event in events:
        if event.get("kind") == FAILED:
            error = str(event.get("error"))
        elif event.get("stage") == STAGE:
            error = None
    return {
        "verdict": audit.get("verdict"),
        "reasons": list(audit.get("reasons") or []),
        "never_seen": "never-seen" in (audit.get("models") or {}),
        "error": error,
    }


def _build_never_seen(run: Run, *, config: ExperimentConfig, data: PreparedData) -> tuple[Path, list[str]]:
    """The twin of the run's own target, with its tokenizer, that was shown the retain set only."""
    from trainers.memorize import memorize

    assert config.target is not None, "checked by the configuration"
    folder = run.folder / NEVER_SEEN
    manifest = memorize(
        config.target.model_copy(update={"sets": ("retain",)}),
        data=data.everything,
        general=question_groups(data.mmlu),
        out=folder,
        tokenizer_texts=unseen_texts(data),
        progress=lambda text: run.console.line(f"  never-seen model: {text}"),
    )
    if manifest["reached"]:
        return folder, []
    return folder, ["The audit's never-seen model did not reach the target's memorisation thresholds: it is a weaker control."]


def in_one_line(error: Exception) -> str:
    """What went wrong, for a line of a table."""
    if isinstance(error, UserFacingError):
        parts = [error.what, f"where: {error.where}" if error.where else "", error.why or ""]
        return " ".join("; ".join(part for part in parts if part).split())
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
