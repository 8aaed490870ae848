"""What an experiment is: every setting of a sweep, with its default, unit and check, without reading any file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from eval.audit.config import AttackSettings
from eval.config import EvalConfig
from launcher.storage_place import is_uri, join_uri, uri_problem, working_copy
from launcher.tracking.config import TrackingConfig
from merging.config import MergeConfig, PairConfig
from trainers.config import Frozen, TrainConfig
from trainers.memorize import MemorizeConfig

Fold = Literal["train", "validation", "test"]
Search = Literal["random", "grid", "sobol", "optuna"]
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class Relation(NamedTuple):
    """A broken rule between settings: the setting to change, what is wrong, and the settings it was read from."""

    path: str
    message: str
    depends: tuple[str, ...]


class ModelConfig(Frozen):
    """The target model that trials start from."""

    model_name_or_path: str | None = Field(
        None, description="folder of the target model in Hugging Face layout; null where `target` builds it; wins over `target`"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="number format of the frozen weights in memory")
    base_model: str | None = Field(
        None, min_length=1, description="name on the hub of the model that the target was made from, for the model card; changes no number"
    )
    license: str | None = Field(None, min_length=1, description="licence of the target, for the model card; null: not stated")


class FoldFractions(Frozen):
    """Shares of the documents that go to each fold when the data folder has no splits.json."""

    train: float = Field(0.4, ge=0, le=1, description="share of the documents for rehearsal")
    validation: float = Field(0.3, gt=0, le=1, description="share of the documents that selection reads")
    test: float = Field(0.3, gt=0, le=1, description="share of the documents of the final numbers")

    @model_validator(mode="after")
    def _sum_to_one(self) -> FoldFractions:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test must sum to 1, here to {total:g}")
        return self


class DataConfig(Frozen):
    """Where the documents come from, and which of them are used for what."""

    path: str | None = Field(None, description="folder in LUME layout: forget.jsonl, retain.jsonl (or parquet, CSV), optional splits.json")
    forget: str | None = Field(None, description="file of the forget set, where there is no folder")
    retain: str | None = Field(None, description="file of the retain set, where there is no folder")
    columns: dict[Literal["id", "input", "output", "task", "alternative"], str] = Field(
        default_factory=dict, description="the file's column for each of id, input, output, task, alternative, where it is named otherwise"
    )
    mia: str | None = Field(None, description="folder with member.jsonl and nonmember.jsonl; null leaves the membership attack out")
    mmlu: str | None = Field(None, description="folder with dev/*_dev.csv and test/*_test.csv; null leaves MMLU out")
    folds: FoldFractions = FoldFractions()
    rehearse: tuple[Fold, ...] = Field(
        ("train", "validation", "test"),
        min_length=1,
        description="folds of the retain set that trials train on; all of them, as the benchmark does, or [train] to measure retention on "
        "documents that no trial rehearsed",
    )
    documents: int | None = Field(None, ge=1, description="documents kept per task and set; null keeps all")
    mmlu_questions: int | None = Field(None, ge=1, description="MMLU questions kept; null keeps all")
    mmlu_max_words: int | None = Field(
        None, ge=5, description="longest MMLU question kept, with its choices, where mmlu_questions cuts the set down; null: any length"
    )
    license: str | None = Field(None, min_length=1, description="licence of the documents, for the model card; null: not stated")

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.path is not None and (self.forget is not None or self.retain is not None):
            raise ValueError("give either data.path (a folder) or data.forget and data.retain (two files), not both")
        if self.path is None and (self.forget is None or self.retain is None):
            missing = [f"data.{name}" for name in ("forget", "retain") if getattr(self, name) is None]
            raise ValueError(
                f"no source for {' and '.join(missing)}: give data.path (a folder), or data.forget and data.retain (two files)"
            )
        if len(set(self.rehearse)) < len(self.rehearse):
            raise ValueError("data.rehearse names a fold twice")
        return self


class RungsConfig(Frozen):
    """When trials that others beat are stopped early."""

    epochs: tuple[float, ...] = Field(
        min_length=1, description="epochs of a rung, ascending; a trial is judged by its first signals at or after each (train.signals)"
    )
    keep: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of the trials on one side of the pair that goes on: a trial is stopped where at least this share of them "
        "beats it in forgetting and in retention; 1 stops none",
    )

    @model_validator(mode="after")
    def _ascending(self) -> RungsConfig:
        if self.epochs[0] <= 0 or any(later <= earlier for earlier, later in zip(self.epochs, self.epochs[1:], strict=False)):
            raise ValueError("epochs must be above 0 and ascend")
        return self


class BudgetConfig(Frozen):
    """What the trials of a sweep may take, over all its starts; num_trials limits their number."""

    gpu_hours: float | None = Field(
        None, gt=0, description="hours times GPUs (times ranks where there are no GPUs) of all trials together; null: no limit"
    )
    hours: float | None = Field(None, gt=0, description="hours of wall-clock time of the trials' stage; null: no limit")
    finish_running: bool = Field(
        True, description="whether trials that run when the budget is used up go on to their end; else they stop with a checkpoint"
    )


class SweepConfig(Frozen):
    """How many trials are drawn, and what each of them may use."""

    num_trials: int = Field(8, ge=1, description="trials, start points included")
    search: Search = Field(
        "random",
        description="random draws; grid: every combination of the `values`; sobol: draws that fill the space evenly; "
        "optuna: proposals that follow what earlier trials forgot and retained",
    )
    startup_trials: int | None = Field(
        None,
        ge=1,
        description="search: optuna only: trials before the first proposal, start points included, the others even draws; "
        "null: twice as many as searched settings, at least 4",
    )
    rungs: RungsConfig | None = Field(None, description="stop trials early that others beat; null: every trial runs to its end")
    budget: BudgetConfig = BudgetConfig()
    start_points: tuple[dict[str, Any], ...] = Field(
        (),
        description="settings under `train` tried before any draw; a searched key they leave out takes the first of its values "
        "or the middle of its range",
    )
    max_failures: int = Field(1, ge=0, description="times a failed trial is started again")
    max_preemptions: int = Field(10, ge=0, description="times a trial is started again after a machine it ran on was lost")
    cpus_per_rank: float = Field(1.0, gt=0, description="CPU cores reserved for each rank of a trial")
    gpus_per_rank: float | None = Field(
        None, ge=0, le=1, description="GPUs reserved for each rank; below 1 several trials share a GPU; null: 1 if there are GPUs, else 0"
    )
    max_concurrent: int | None = Field(None, ge=1, description="trials at the same time; null: as many as fit")
    trial_timeout_s: float | None = Field(None, gt=0, description="seconds after which a trial is stopped; null: no limit")
    stall_s: float = Field(
        600,
        gt=0,
        description="seconds without a sign of life after which a trial counts as stuck; before its first step, ten minutes or more",
    )


class AuditStageConfig(AttackSettings):
    """The audit of the delivered model at the end of a run, on documents of the test fold."""

    max_new_tokens: int | None = Field(None, ge=1, description="tokens generated per row at most; null: eval.max_new_tokens")
    never_seen: str | None = Field(None, description="folder of a model that never saw the forget set: the control; null: none is given")
    build_never_seen: bool = Field(
        False, description="build that model as the run built its target, from the retain set alone; needs a `target` section"
    )


class ExperimentConfig(Frozen):
    """One sweep from target model to report. Relative paths count from the folder in which the command is run."""

    name: str = Field(pattern=RUN_NAME, description="name of the run folder: letters, digits and . _ -")
    seed: int = Field(42, ge=0, description="every trial's own seed follows from it")
    storage_path: str = Field(
        "runs",
        min_length=1,
        description="folder that holds the run folder: of this machine, of a mount that all machines share, or a URI such as s3://BUCKET/runs",
    )
    model: ModelConfig = ModelConfig()
    target: MemorizeConfig | None = Field(None, description="how `unlearn memorize` builds the target model")
    data: DataConfig
    train: TrainConfig = TrainConfig()
    sweep: SweepConfig = SweepConfig()
    eval: EvalConfig = EvalConfig()
    merge: MergeConfig = MergeConfig()
    pairs: PairConfig = PairConfig()
    audit: AuditStageConfig | None = Field(None, description="attack the delivered model after its final scores; null: no audit")
    tracking: TrackingConfig = TrackingConfig()
    plugins: tuple[str, ...] = Field(
        (),
        description="files of your own that add objectives, merge methods or metrics: paths that end in .py, from the folder of this file, "
        "or names of modules",
    )

    @property
    def run_uri(self) -> str | None:
        """Where the run lives, if that is no folder."""
        return join_uri(self.storage_path, self.name) if is_uri(self.storage_path) else None

    @property
    def run_folder(self) -> Path:
        """RUN: everything that the experiment writes lies below it; this machine's working copy of a run that lives at a URI."""
        return working_copy(self.run_uri) if self.run_uri else Path(self.storage_path).expanduser() / self.name

    @model_validator(mode="after")
    def _relations(self) -> ExperimentConfig:
        broken = experiment_relations(self)
        if broken:
            text = "; ".join(f"{relation.path}: {relation.message}" for relation in broken)
            raise PydanticCustomError("relations", "{text}", {"text": text, "relations": tuple(broken)})
        return self


def experiment_relations(config: ExperimentConfig) -> list[Relation]:
    """The rules between settings that an experiment breaks; empty if none."""
    broken = train_relations(config.train)
    sweep, ranks = config.sweep, config.train.engine.num_ranks
    if config.model.model_name_or_path is None and config.target is None:
        broken.append(
            Relation(
                "model.model_name_or_path",
                "no target model: give its folder, or a `target` section from which `unlearn memorize` builds one",
                ("model", "target"),
            )
        )
    audit = config.audit
    if audit is not None and audit.build_never_seen and audit.never_seen is not None:
        broken.append(
            Relation(
                "audit.build_never_seen",
                "audit.never_seen already gives the control: leave out one of the two",
                ("audit.build_never_seen", "audit.never_seen"),
            )
        )
    elif audit is not None and audit.build_never_seen and (config.target is None or config.model.model_name_or_path is not None):
        broken.append(
            Relation(
                "audit.build_never_seen",
                "the run did not build its target (model.model_name_or_path is given), so it cannot build one without the forget set: "
                "give a folder in audit.never_seen, or leave the control out",
                ("audit.build_never_seen", "model", "target"),
            )
        )
    problem = uri_problem(config.storage_path) if is_uri(config.storage_path) else None
    if problem is not None:
        broken.append(Relation("storage_path", problem, ("storage_path",)))
    if len(sweep.start_points) > sweep.num_trials:
        broken.append(
            Relation(
                "sweep.num_trials",
                f"{len(sweep.start_points)} start points do not fit into {sweep.num_trials} trials: raise num_trials, or drop start points",
                ("sweep.num_trials", "sweep.start_points"),
            )
        )
    if sweep.rungs is not None and config.train.signals == 0:
        broken.append(
            Relation(
                "sweep.rungs",
                "rungs compare signals, but train.signals = 0: measure some, or drop sweep.rungs",
                ("sweep.rungs", "train.signals"),
            )
        )
    if ranks > 1 and sweep.gpus_per_rank is not None and 0 < sweep.gpus_per_rank < 1:
        broken.append(
            Relation(
                "sweep.gpus_per_rank",
                f"{sweep.gpus_per_rank:g} of a GPU per rank with train.engine.ranks = {ranks}: ranks of one trial cannot share a GPU; "
                "use 1, or train.engine.ranks: 1",
                ("sweep.gpus_per_rank", "train.engine"),
            )
        )
    return broken


def train_relations(train: TrainConfig) -> list[Relation]:
    """The rules between the settings of one trial that it breaks; empty if none. Paths start with ``train.``."""
    broken = []
    batch, micro, ranks = train.train_batch_size, train.micro_batch_size, train.engine.num_ranks
    if micro > batch:
        broken.append(
            Relation(
                "train.per_device_train_batch_size",
                f"{micro} pairs per pass, but train.train_batch_size = {batch} per step: use at most {batch}, or raise train_batch_size",
                ("train.per_device_train_batch_size", "train.train_batch_size"),
            )
        )
    if ranks > batch:
        broken.append(
            Relation(
                "train.train_batch_size",
                f"{batch} pairs per step leave ranks without work (train.engine.ranks = {ranks}): use at least {ranks}, or fewer ranks",
                ("train.engine", "train.train_batch_size"),
            )
        )
    return broken
