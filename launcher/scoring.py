"""Evaluating a model on the folds of an experiment, into the files that every later stage reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import ExperimentConfig
from launcher.data import PreparedData

if TYPE_CHECKING:
    from eval.report import EvalReport

FOLD_FILES = {"validation": "validation.json", "test": "eval.json"}
"""Selection reads the first, final numbers come from the second."""


def evaluate_fold(
    model: Any, *, tokenizer: Any, config: ExperimentConfig, data: PreparedData, fold: str, name: str, device: str = "cpu"
) -> EvalReport:
    """Everything that an experiment measures of a model, on one fold."""
    from eval.runner import evaluate

    return evaluate(
        model=model,
        tokenizer=tokenizer,
        data=data.folds[fold],
        attack=data.attack_of(fold),
        mmlu=data.mmlu_of(fold),
        config=config.eval,
        fold=fold,
        model_name=name,
        device=device,
    )


def evaluate_folds(
    model: Any,
    *,
    tokenizer: Any,
    config: ExperimentConfig,
    data: PreparedData,
    folder: Path,
    name: str,
    device: str = "cpu",
    folds: Sequence[str] = ("validation", "test"),
) -> None:
    """Score a model on each fold and write its report; a fold that already has one is left alone."""
    from eval.report import write_report

    for fold in folds:
        path = Path(folder) / FOLD_FILES[fold]
        if path.exists():
            continue
        report = evaluate_fold(model, tokenizer=tokenizer, config=config, data=data, fold=fold, name=name, device=device)
        write_report(report, path)


def evaluate_folder(
    model_folder: Path,
    *,
    config: ExperimentConfig,
    data: PreparedData,
    folder: Path,
    name: str,
    folds: Sequence[str] = ("validation", "test"),
) -> None:
    """Load a written model again and score it: what counts is what was saved."""
    from trainers.distributed import Rank
    from trainers.modeling import load_model, load_tokenizer

    if all((Path(folder) / FOLD_FILES[fold]).exists() for fold in folds):
        return
    model = load_model(model_folder, dtype=config.eval.dtype, device=Rank().device)
    evaluate_folds(
        model, tokenizer=load_tokenizer(model_folder), config=config, data=data, folder=folder, name=name, device=Rank().device, folds=folds
    )
