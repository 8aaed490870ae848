"""Evaluating a model: on the folds of an experiment, into the files that every later stage reads, or from folders of its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config import EvalConfig
from launcher.config import ExperimentConfig
from launcher.data import PreparedData

if TYPE_CHECKING:
    from eval.mmlu import MmluData
    from eval.parts import UnitStore
    from eval.progress import Meter
    from eval.report import EvalReport
    from trainers.data.types import AttackDocuments, ForgetRetain

log = logging.getLogger(__name__)

FOLD_FILES = {"validation": "validation.json", "test": "eval.json"}
"""Selection reads the first, final numbers come from the second."""


def evaluate_fold(
    model: Any,
    *,
    tokenizer: Any,
    config: ExperimentConfig,
    data: PreparedData,
    fold: str,
    name: str,
    device: str = "cpu",
    meter: Meter | None = None,
) -> EvalReport:
    """Everything that an experiment measures of a model, on one fold; ``meter`` is told how far it has come."""
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
        meter=meter,
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
    meter: Meter | None = None,
) -> None:
    """Score a model on each fold and write its report; a fold that already has one is left alone."""
    from eval.report import write_report

    for fold in folds:
        path = Path(folder) / FOLD_FILES[fold]
        if path.exists():
            continue
        report = evaluate_fold(model, tokenizer=tokenizer, config=config, data=data, fold=fold, name=name, device=device, meter=meter)
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


@dataclass(frozen=True)
class FolderJob:
    """One written model to be scored on folds: what ``evaluate_folder`` is called with."""

    model_folder: Path
    config: ExperimentConfig
    data: PreparedData
    folder: Path
    name: str
    folds: Sequence[str] = ("validation", "test")


def run_job(job: FolderJob) -> None:
    """Score the job's model; what has its report already is left alone."""
    evaluate_folder(job.model_folder, config=job.config, data=job.data, folder=job.folder, name=job.name, folds=job.folds)


def evaluate_folders(
    jobs: Sequence[FolderJob], *, execute: Callable[[Callable[[FolderJob], None], Sequence[FolderJob]], Iterable[Any]] = map
) -> None:
    """Score several models, side by side if the executor says so.

    Args:
        jobs: models with folders of their own.
        execute: like ``map``, such as that of a process pool; default: one after the other.
    """
    for _ in execute(run_job, jobs):
        pass


@dataclass(frozen=True)
class LoadedInputs:
    """What an evaluation reads, but for the model."""

    base: Path
    checkpoint: Path
    config: EvalConfig
    tokenizer: Any
    data: ForgetRetain
    attack: AttackDocuments | None
    mmlu: MmluData | None

    def load_model(self, device: str) -> Any:
        """The model on a device.

        Raises:
            InputError: if a weight is no number.
        """
        from launcher.preflight import check_weights_finite
        from trainers.modeling import load_adapted_model

        model = load_adapted_model(self.base, self.checkpoint, dtype=self.config.dtype, device=device)
        check_weights_finite(model, where=self.checkpoint)
        return model


@dataclass(frozen=True)
class EvaluationInputs:
    """Where an evaluation's inputs lie; small enough to be handed to another process.

    Args:
        base: model folder.
        checkpoint: adapter or weights on it; the base itself where there are none.
        data: folder in LUME layout.
        mia: folder of the membership attack, or None.
        mmlu: folder of MMLU, or None.
        config: limits and mode.
        plugins: files of the metrics that are measured beside the protocol's.
    """

    base: Path
    checkpoint: Path
    data: Path
    mia: Path | None
    mmlu: Path | None
    config: EvalConfig
    plugins: tuple[str, ...] = ()

    def load(self) -> LoadedInputs:
        """Read and check everything but the weights.

        Raises:
            InputError: if rows, documents or questions are unusable, or do not fit the model's context.
        """
        from eval.mmlu import load_mmlu
        from launcher.data import check_kinds
        from launcher.preflight import check_fit, check_vocabulary
        from trainers.data.records import load_attack_documents, load_forget_retain
        from trainers.modeling import context_length, load_model_config, load_tokenizer

        records = load_forget_retain(self.data)
        for name, rows in (("forget", records.forget), ("retain", records.retain)):
            check_kinds(rows, where=f"{self.data}, the {name} set")
        attack = load_attack_documents(self.mia) if self.mia else None
        questions = load_mmlu(self.mmlu.expanduser()) if self.mmlu else None
        model_config = load_model_config(self.base)
        context, tokenizer = context_length(model_config), load_tokenizer(self.base)
        check_vocabulary(tokenizer, model_config=model_config, where=self.base)
        check_fit(
            tokenizer=tokenizer,
            context=context,
            rows=(*records.forget, *records.retain),
            attack=(attack,) if attack else (),
            mmlu=(questions,) if questions else (),
            max_prompt_tokens=self.config.mmlu_max_prompt_tokens,
        )
        return LoadedInputs(self.base, self.checkpoint, self.config, tokenizer, records, attack, questions)

    def identity(self) -> dict[str, str]:
        """Hashes of weights, tokenizer and configuration, adapter included."""
        from trainers.files import sha256_folder

        return {str(place): sha256_folder(folder) for place, folder in (("base", self.base), ("checkpoint", self.checkpoint))}

    def to_json(self) -> str:
        """As text for another process's command line."""
        places = {
            name: None if (path := getattr(self, name)) is None else str(path) for name in ("base", "checkpoint", "data", "mia", "mmlu")
        }
        return json.dumps({**places, "config": self.config.model_dump(mode="json"), "plugins": list(self.plugins)})

    @classmethod
    def from_json(cls, text: str) -> EvaluationInputs:
        """What ``to_json`` wrote."""
        values = json.loads(text)
        return cls(
            base=Path(values["base"]),
            checkpoint=Path(values["checkpoint"]),
            data=Path(values["data"]),
            mia=Path(values["mia"]) if values["mia"] else None,
            mmlu=Path(values["mmlu"]) if values["mmlu"] else None,
            config=EvalConfig.model_validate(values["config"]),
            plugins=tuple(values["plugins"]),
        )


def share_threads(processes: int) -> int:
    """Give this process its share of the CPU's threads, and say how many that is."""
    import torch

    threads = max(1, torch.get_num_threads() // processes)
    if processes > 1:
        torch.set_num_threads(threads)
    return threads


class EvaluationProcesses:
    """Processes that compute shards of this process's evaluation; it computes the first one itself.

    Args:
        inputs: what they read.
        store: where results meet; it has a folder.
        count: processes, this one included.
        threads: of each on a CPU.
    """

    def __init__(self, inputs: EvaluationInputs, *, store: UnitStore, count: int, threads: int) -> None:
        self.count = count
        self._inputs, self._store, self._threads = inputs, store, threads
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the others; each ends by itself when this process is gone."""
        for index in range(1, self.count):
            words = [self._inputs.to_json(), str(self._store.folder), json.dumps(self._store.identity)]
            numbers = [str(number) for number in (index, self.count, self._threads, os.getpid())]
            self._processes.append(subprocess.Popen([sys.executable, "-m", "launcher.evaluation_process", *words, *numbers]))

    def wait(self, meanwhile: Callable[[], None], *, poll_s: float = 0.2) -> None:
        """Until they have ended. A failure is told; what it left undone remains for the caller."""
        while any(process.poll() is None for process in self._processes):
            meanwhile()
            time.sleep(poll_s)
        failed = [process.returncode for process in self._processes if process.returncode]
        if failed:
            log.warning(
                "%d of %d evaluation processes failed (exit code %s): their rows are computed here", len(failed), self.count, failed[0]
            )

    def stop(self) -> None:
        """End what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            process.wait()
