"""Measuring merges of a run's checkpoints on a resident model: the work that a pair search hands out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import ExperimentConfig
from launcher.data import PreparedData
from launcher.plugins import use_run_plugins
from launcher.scoring import FOLD_FILES, evaluate_folds
from launcher.storage import RESUME_ONLY, TRIAL_INPUTS, run_address, run_folder, storage_of
from launcher.storage_place import is_uri
from merging.ledger import Merge, Task

if TYPE_CHECKING:
    from merging.examples import FoldExamples
    from merging.in_memory import MergeSession

FOLD = "validation"
"""The fold that selection reads."""


@dataclass
class MergeScorer:
    """Builds merges in memory and measures them; the model is loaded at the first of them.

    Sent to another process it loads a model of its own there; on another machine it works on a copy of the run.

    Args:
        run: the run folder; full evaluations are written to ``pairs/`` below it.
        config: of the experiment.
        data: of the experiment.
        target: the model that the checkpoints started from.
        checkpoints: folder of each checkpoint by name.
    """

    run: Path
    config: ExperimentConfig
    data: PreparedData
    target: Path
    checkpoints: Mapping[str, Path]

    def __getstate__(self) -> dict[str, Any]:
        kept = ("run", "config", "data", "target", "checkpoints")
        return {name: self.__dict__[name] for name in kept} | {"address": run_address(self.run)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        address, there = state.pop("address"), Path(state["run"])
        self.__dict__.update(state)
        if not is_uri(address):
            use_run_plugins(self.run)
            return
        storage_of(address).pull(*TRIAL_INPUTS, "trials", skip=RESUME_ONLY)
        self.run = run_folder(address)
        use_run_plugins(self.run)

        def here(path: Path) -> Path:
            return self.run / path.relative_to(there) if path.is_relative_to(there) else path

        self.target = here(self.target)
        self.checkpoints = {name: here(path) for name, path in self.checkpoints.items()}

    def __call__(self, task: Task) -> Any:
        """A list of results, or the scores of a full evaluation, whose report it leaves under the task's key."""
        if task.start is None:
            folder = report_folder(self.run, task.key)
            scores = self.evaluate(task.merge, folder=folder, name=task.name, folds=(FOLD,))
            storage_of(self.run).push(folder.relative_to(self.run).as_posix())
            return scores
        self._apply(task.merge)
        settings = self.config.eval
        return self.examples.score(
            self._model,
            start=task.start,
            stop=task.stop,
            batch_tokens=settings.batch_tokens,
            shots=settings.mmlu_shots,
            max_prompt_tokens=settings.mmlu_max_prompt_tokens,
            device=self._device,
        )

    def evaluate(self, merge: Merge, *, folder: Path, name: str, folds: Sequence[str]) -> dict[str, Any]:
        """Score a merge in full; a fold that already has its report is left alone.

        Returns:
            ``scores`` and ``rows_generated`` of the last fold.
        """
        from eval.report import read_report

        if any(not (folder / FOLD_FILES[fold]).exists() for fold in folds):
            self._apply(merge)
            evaluate_folds(
                self._model,
                tokenizer=self._tokenizer,
                config=self.config,
                data=self.data,
                folder=folder,
                name=name,
                device=self._device,
                folds=folds,
            )
        report = read_report(folder / FOLD_FILES[folds[-1]])
        return {"scores": dict(report.scores), "rows_generated": report.counts.get("decoded_rows", 0)}

    def hashes(self) -> dict[str, str]:
        """What each checkpoint holds."""
        from merging.task_vectors import checkpoint_hash

        return {name: checkpoint_hash(folder) for name, folder in self.checkpoints.items()}

    @cached_property
    def examples(self) -> FoldExamples:
        """The examples of the validation fold in the order that all merges share."""
        from merging.examples import FoldExamples
        from trainers.modeling import context_length, load_model_config

        return FoldExamples(
            tokenizer=self._tokenizer,
            data=self.data.folds[FOLD],
            attack=self.data.attack_of(FOLD),
            mmlu=self.data.mmlu_of(FOLD),
            seed=self.config.seed,
            context=context_length(load_model_config(self.target)),
        )

    @cached_property
    def _tokenizer(self) -> Any:
        from trainers.modeling import load_tokenizer

        return load_tokenizer(self.target)

    @cached_property
    def _device(self) -> str:
        from trainers.distributed import Rank

        return Rank().device

    @cached_property
    def _model(self) -> Any:
        from launcher.stages import use_reserved_cores
        from trainers.modeling import load_model

        use_reserved_cores(self.config)  # in whatever process this is
        return load_model(self.target, dtype=self.config.eval.dtype, device=self._device)

    @cached_property
    def _session(self) -> MergeSession:
        from merging.in_memory import MergeSession
        from merging.task_vectors import open_task_vector

        vectors = [open_task_vector(base=self.target, trial=folder, name=name) for name, folder in self.checkpoints.items()]
        return MergeSession(model=self._model, base=self.target, vectors=vectors)

    def _apply(self, merge: Merge) -> None:
        self._session.apply(merge.trials, merge.config)


def report_folder(run: Path, key: str) -> Path:
    """Where the full evaluation of a key lies."""
    return Path(run) / "pairs" / key[:16]
