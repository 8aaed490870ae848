"""What happens behind ``launcher.api.unlearn``: a sweep in one process, and another that keeps the best model so far in the output folder.

    python -m launcher.contest sweep JOB
    python -m launcher.contest publish JOB

JOB is a JSON file of ``Job``. Both processes may be killed at any moment.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.exchange import replace_folder
from launcher.results import FILE as RESULTS
from launcher.trial import read_status
from trainers.errors import InputError
from trainers.files import read_json, write_json

log = logging.getLogger(__name__)
RECORD = "unlearn.json"
"""Says, beside the model, which one it is."""
RUN_NAME = "run"
TRIALS_SHARE = 0.5
"""Share of the time limit for trials; the rest is for the target's scores, the pair search, and the last evaluation."""
LAST_CALL_SHARE = 0.8
"""Share of the time limit after which a model that was not scored is better than none."""
SET_FILES = (".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class Job:
    """What both processes need to know.

    Args:
        model: folder of the target.
        output: folder of the best model so far.
        forget, retain: files of the two sets.
        work: folder of everything else.
        started: unix seconds.
        limit_s: seconds from then.
        settings: overrides of the experiment, as on the command line.
    """

    model: str
    output: str
    forget: str
    retain: str
    work: str
    started: float
    limit_s: float
    settings: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        """The run folder of the sweep."""
        return Path(self.work) / RUN_NAME

    def write(self) -> Path:
        """Write the job file."""
        path = Path(self.work) / "job.json"
        write_json(path, asdict(self))
        return path


def read_job(path: Path) -> Job:
    """The job of a file."""
    values = read_json(path)
    return Job(**{**values, "settings": tuple(values["settings"])})


def find_set(folder: Path, *, name: str) -> Path:
    """``NAME.jsonl``, ``NAME.parquet`` or ``NAME.csv`` in a folder; a file of the set itself is taken, too.

    Raises:
        InputError: if there is none.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        return folder
    for ending in SET_FILES:
        if (folder / f"{name}{ending}").is_file():
            return folder / f"{name}{ending}"
    raise InputError(
        f"no {name} set",
        where=str(folder),
        why="the folder does not exist" if not folder.is_dir() else f"it has no {name}.jsonl, {name}.parquet or {name}.csv",
        fix=f"give the folder that holds {name}.jsonl or {name}.parquet",
    )


def experiment_values(job: Job, *, num_gpus: int) -> dict[str, Any]:
    """The experiment of a job: both runs of ZJUKLAB's system first, then draws around them, as many as the time allows.

    Source of the two runs: https://arxiv.org/abs/2503.21088
    """
    on_gpu = num_gpus > 0
    over = {"forget_weight": 0.4, "retain_kl_weight": 0.4, "retain_ce_weight": 0.2}
    under = {"forget_weight": 0.3, "retain_kl_weight": 0.3, "retain_ce_weight": 0.4}
    engine: dict[str, Any] = {"name": "deepspeed", "ranks": None, "zero_stage": None, "dtype": "bfloat16"} if on_gpu else {"name": "torch"}
    return {
        "name": RUN_NAME,
        "storage_path": job.work,
        "model": {"model_name_or_path": job.model, "dtype": "bfloat16" if on_gpu else "float32"},
        "data": {"forget": job.forget, "retain": job.retain, "folds": {"train": 0.2, "validation": 0.4, "test": 0.4}},
        "train": {
            "objective": {
                "name": "npo_ce_kl",
                "beta": 0.1,
                "reduction": "token_mean",
                "average": "sequence",
                "forget_weight": {"values": [0.3, 0.4, 0.6]},
                "retain_kl_weight": {"values": [0.3, 0.4]},
                "retain_ce_weight": {"values": [0.2, 0.4]},
            },
            "learning_rate": {"min": 5e-5, "max": 4e-4, "distribution": "log_uniform"},
            "num_train_epochs": 5,
            "train_batch_size": {"values": [4, 8]},
            "per_device_train_batch_size": None,
            "warmup_ratio": 0.2,
            "lora": {"r": 32, "lora_alpha": 32, "lora_dropout": 0.05},
            "engine": engine,
            "seed": 42,
            "checkpoints": 5,
            "signals": 5,
        },
        "sweep": {
            "num_trials": 16,
            "search": "sobol",
            "start_points": [
                {"objective": over, "train_batch_size": 4, "learning_rate": 1e-4},
                {"objective": under, "train_batch_size": 8, "learning_rate": 1e-4},
            ],
            "budget": {"hours": TRIALS_SHARE * job.limit_s / 3600, "finish_running": False},
        },
        "eval": {"dtype": "bfloat16" if on_gpu else "float32", "max_new_tokens": 128},
        "pairs": {"max_pairs": 8, "calibrated": 2, "finalists": 2, "max_passes": 12, "min_mmlu_fraction": 0.0},
        "tracking": {"wandb": "off", "tensorboard": False},
    }


def run_job(job: Job) -> None:
    """The whole sweep of a job."""
    import torch

    from launcher.load import load_experiment
    from launcher.stages import run_sweep

    file = Path(job.work) / "experiment.yaml"
    # JSON is YAML.
    file.write_text(json.dumps(experiment_values(job, num_gpus=torch.cuda.device_count()), indent=2), encoding="utf-8")
    run_sweep(experiment=load_experiment(file, job.settings))


@dataclass(frozen=True)
class Candidate:
    """A model that may be published.

    Args:
        name: of the trial, or ``merged``.
        key: larger is better.
        source: checkpoint of a trial, or the folder of the sweep's own choice.
        facts: for the record beside the model.
    """

    name: str
    key: tuple[float, ...]
    source: Path
    facts: dict[str, Any]


def best_candidate(run: Path, *, unscored_too: bool) -> Candidate | None:
    """The best model that a run has so far: what its end delivered, else the best living trial by its validation scores.

    Args:
        run: the run folder, at any moment of the run.
        unscored_too: whether the newest checkpoint of a trial may stand in where none is scored.
    """
    from eval.forgetting import alive, classify, rank_key
    from trainers.checkpoint import finished_checkpoints

    results = _read(run / RESULTS)
    if results is not None and results.get("run_finished") and (run / "merged" / "merge.json").exists():
        return Candidate("merged", (2.0,), run / "merged", {"verdict": results["verdict"]["sentence"]})
    found: list[Candidate] = []
    baseline = _read(run / "baseline" / "validation.json")
    for folder in sorted((run / "trials").glob("*")):
        checkpoints = finished_checkpoints(folder)
        scores = _read(folder / "validation.json")
        if not checkpoints or read_status(folder)["state"] == "failed":
            continue
        if baseline is not None and scores is not None:
            verdict = classify(scores=scores["scores"], baseline=baseline["scores"]).verdict
            if alive(verdict):
                _, *key = rank_key(verdict=verdict, scores=scores["scores"])
                facts = {"verdict": str(verdict), "scores": scores["scores"]}
                found.append(Candidate(folder.name, (1.0, *key), checkpoints[-1], facts))
        elif unscored_too and scores is None:
            step = int(checkpoints[-1].name.rpartition("-")[2])
            found.append(Candidate(folder.name, (0.0, step), checkpoints[-1], {"verdict": "not scored"}))
    return max(found, key=lambda one: one.key, default=None)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, ValueError, InputError):
        return None


def publish(candidate: Candidate, *, job: Job) -> None:
    """Write a candidate as a whole model, and put it in the place of the output folder in one step."""
    from merging.config import MergeConfig
    from merging.merge import merge_checkpoint

    output = Path(job.output)
    made = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        if candidate.name == "merged":
            shutil.copytree(candidate.source, made, copy_function=_link)
        else:
            merge_checkpoint(base=Path(job.model), trials=[candidate.source], out=made, config=MergeConfig(method="task_arithmetic"))
        record = {"schema_version": 1, "model": candidate.name, "after_s": round(time.time() - job.started, 1), **candidate.facts}
        write_json(made / RECORD, record)
        replace_folder(made, output)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def keep_publishing(job: Job, *, sweep_runs: Iterator[bool]) -> None:
    """Publish whatever is better than what is published, until the sweep has ended.

    Args:
        job: the job.
        sweep_runs: asked before every look; at its first False there is a last one.
    """
    published: Candidate | None = None
    runs = True
    while runs:
        runs = next(sweep_runs)
        late = not runs or time.time() - job.started > LAST_CALL_SHARE * job.limit_s
        found = best_candidate(job.run, unscored_too=late and published is None)
        if found is not None and (published is None or found.key > published.key):
            try:
                publish(found, job=job)
                published = found
            except Exception:
                # The next look tries again: a model that is better than none must not be lost to one bad moment.
                log.exception("%s could not be published", found.name)


def _parent_lives(job: Job, *, every_s: float = 0.5) -> Iterator[bool]:
    """Whether the sweep still runs; ends this process where the caller is gone."""
    parent = os.getppid()
    while True:
        if os.getppid() != parent:
            raise SystemExit("the caller has gone")
        yield not (Path(job.work) / ENDED).exists()
        time.sleep(every_s)


ENDED = "sweep-ended"
"""The caller writes it into the work folder when the sweep's process has ended."""


def main(arguments: Sequence[str]) -> int:
    """One of the two processes."""
    from trainers.errors import UserFacingError

    role, file = arguments
    job = read_job(Path(file))
    try:
        if role == "sweep":
            run_job(job)
        else:
            keep_publishing(job, sweep_runs=_parent_lives(job))
    except UserFacingError as error:
        print(f"{error.label}: {error}", file=sys.stderr)
        with suppress(OSError):
            write_json(Path(job.work) / f"{role}-error.json", {"what": str(error), "exit_code": error.exit_code})
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
