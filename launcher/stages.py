"""The stages of a run, in order, as plain calls; each one reads files and writes files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.config import ExperimentConfig
from launcher.console import Console, duration
from launcher.data import PreparedData, prepare_data, question_groups
from launcher.events import EventLog
from launcher.load import LoadedExperiment, dump_yaml
from launcher.logs import quiet_libraries
from launcher.resources import ResourcePlan, plan_resources
from launcher.scoring import evaluate_folder
from launcher.search_space import TrialSpec, draw_trials
from launcher.trial import trial_inputs, write_plan
from trainers.checkpoint import changed_keys
from trainers.errors import InputError, RunError
from trainers.files import read_json, sha256_json, write_json, write_text
from trainers.memorize import MANIFEST as TARGET_MANIFEST
from trainers.memorize import memorize, weights_hash

EXPERIMENT = "experiment.yaml"
RESOLVED = "experiment.json"


class Run:
    """A run folder with its console and its event log."""

    def __init__(self, folder: Path, *, console: Console | None = None) -> None:
        self.folder = Path(folder)
        self.console = console or Console()
        self.events = EventLog(self.folder)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Record a stage's start and end, and print its heading and time."""
        self.console.stage(title)
        self.events.started(name)
        started = time.time()
        yield
        self.events.finish(name, seconds=round(time.time() - started, 2))

    def timings(self) -> dict[str, float]:
        """Seconds spent per stage, over all starts of the run."""
        total: dict[str, float] = {}
        for event in self.events.events():
            if event["kind"] == "stage_finished":
                total[event["stage"]] = round(total.get(event["stage"], 0.0) + float(event.get("seconds") or 0.0), 2)
        return total


def claim_run(config: ExperimentConfig, *, space: dict[str, Any], data: PreparedData, resume: bool) -> Run:
    """The run folder of an experiment: a new one, or the same experiment's again.

    Raises:
        InputError: if the folder belongs to a different experiment, or resuming was refused.
    """
    run = Run(config.run_folder)
    resolved = {"config": config.model_dump(mode="json"), "space": space, "data_hash": data.hash}
    path = run.folder / RESOLVED
    if path.exists():
        if not resume:
            raise InputError("the run folder is already in use", where=str(run.folder), fix="choose another name, or leave out --no-resume")
        changed = changed_keys(_without_place(read_json(path)), _without_place(resolved))
        if changed:
            names = ", ".join(key.removeprefix("config.") for key in changed[:8])
            raise InputError(
                f"the run folder belongs to another configuration; changed: {names}",
                where=str(run.folder),
                why="its finished trials would not fit",
                fix="undo the change, or choose another name",
            )
        return run
    if run.folder.exists() and any(entry for entry in run.folder.iterdir() if entry.name not in ("data", "events.jsonl")):
        raise InputError("the folder holds something that is not a run", where=str(run.folder), fix="choose an empty or a new folder")
    write_text(run.folder / EXPERIMENT, dump_yaml(config))
    write_json(path, resolved)
    return run


def _without_place(resolved: dict[str, Any]) -> dict[str, Any]:
    """Where a run lies, and how much of a machine it may use, does not change what it computes."""
    config = {key: value for key, value in resolved["config"].items() if key not in ("storage_path", "name")}
    free = ("cpus_per_rank", "gpus_per_rank", "max_concurrent", "max_failures", "trial_timeout_s", "stall_s")
    config["sweep"] = {key: value for key, value in config["sweep"].items() if key not in free}
    return resolved | {"config": config}


def space_facts(experiment: LoadedExperiment) -> dict[str, Any]:
    """The search space as plain values, for comparing two starts of a run."""
    return {path: domain.spec() for path, domain in experiment.space.domains.items()}


def plan_sweep(experiment: LoadedExperiment) -> tuple[tuple[TrialSpec, ...], ResourcePlan]:
    """The trials of a sweep and how many run at once on this machine; pure but for counting cores and GPUs."""
    import torch

    config = experiment.config
    specs = draw_trials(
        base=config.train,
        space=experiment.space,
        start_points=config.sweep.start_points,
        num_trials=config.sweep.num_trials,
        search=config.sweep.search,
        seed=config.seed,
    )
    plan = plan_resources(
        cpus=float(os.cpu_count() or 1),
        gpus=float(torch.cuda.device_count()),
        sweep=config.sweep,
        train=config.train,
        num_trials=len(specs),
    )
    return specs, plan


def obtain_target(run: Run, *, config: ExperimentConfig, data: PreparedData) -> Path:
    """The target model that trials start from: the one given, or the memorised one of this run.

    Writes ``target.json``.
    """
    from trainers.modeling import check_model_folder

    if config.model.model_name_or_path is not None:
        folder = check_model_folder(config.model.model_name_or_path)
        manifest = read_json(folder / TARGET_MANIFEST) if (folder / TARGET_MANIFEST).exists() else {}
        run.console.line(f"  given: {folder}")
    else:
        assert config.target is not None, "checked by the configuration"
        folder = run.folder / "target"
        manifest = memorize(
            config.target,
            data=data.everything,
            general=question_groups(data.mmlu),
            out=folder,
            tokenizer_texts=_unseen_texts(data),
            progress=lambda text: run.console.line(f"  {text}"),
        )
        if not manifest["reached"]:
            run.console.warning("the target did not reach its memorisation thresholds: train it for more epochs (target.num_train_epochs)")
    known = manifest.get("memorised")
    write_json(
        run.folder / "target.json",
        {
            "schema_version": 1,
            "path": str(folder),
            "weights_hash": weights_hash(folder),
            "memorised": None
            if known is None
            else {
                side: {"knowledge": known[f"{side}_knowledge"], "regurgitation": known[f"{side}_regurgitation"]}
                for side in ("forget", "retain")
            }
            | {"general_knowledge": known["general_knowledge"]},
            "reached": manifest.get("reached"),
            "config_hash": manifest.get("config_hash"),
            "data_hash": manifest.get("data_hash"),
            "epochs": manifest.get("epochs"),
            "num_parameters": manifest.get("num_parameters"),
        },
    )
    return folder


def _unseen_texts(data: PreparedData) -> list[str]:
    return [document.text for fold in (data.attack or {}).values() for document in fold.nonmembers]


def run_memorize(*, experiment: LoadedExperiment) -> None:
    """``unlearn memorize``: build the target model of an experiment."""
    quiet_libraries()
    config = experiment.config
    if config.target is None:
        raise InputError(
            "the configuration has no target section", where=str(experiment.source), fix="say under target: how to build the model"
        )
    data = prepare_data(config)
    run = Run(config.run_folder)
    with run.stage("target", "Target: memorise the documents"):
        folder = obtain_target(
            run, config=config.model_copy(update={"model": config.model.model_copy(update={"model_name_or_path": None})}), data=data
        )
    run.console.line(f"target   {folder}")


def prepare_trials(run: Run, *, config: ExperimentConfig, data: PreparedData, specs: tuple[TrialSpec, ...], target: Path) -> None:
    """Write what trials read: their configurations, the plan, and the reference of the target."""
    import yaml

    from trainers.loop import prepare_reference

    target_hash = weights_hash(target)
    for spec in specs:
        path = run.folder / "trials" / spec.name / "config.yaml"
        if not path.exists():
            write_text(path, yaml.safe_dump({"overrides": spec.overrides, "train": spec.config.model_dump(mode="json")}, sort_keys=False))
    write_plan(
        run.folder,
        config=config,
        trials={spec.name: {"train": spec.config.model_dump(mode="json")} for spec in specs},
        target=target,
        target_hash=target_hash,
    )
    inputs = trial_inputs(run=run.folder, data=data, target=target, target_hash=target_hash)
    for train in {spec.config.engine.dtype: spec.config for spec in specs}.values():
        prepare_reference(inputs, train=train)


def run_sweep(*, experiment: LoadedExperiment, resume: bool = True, dry_run: bool = False, console: Console | None = None) -> Path:
    """``unlearn sweep``: target, trials, pair, merge, evaluation, report. The same call again goes on where it stopped.

    Raises:
        InputError: before anything is written, if configuration or data are unusable.
        RunError: after the report, if no trial is alive.
    """
    from launcher.finish import finish_run
    from launcher.provenance import record_provenance
    from launcher.sweep import run_sweep_trials, start_ray, stop_ray

    quiet_libraries()
    config = experiment.config
    data = prepare_data(config)
    specs, plan = plan_sweep(experiment)
    check_lengths(config, data=data)
    if dry_run:
        print_plan(experiment, data=data, specs=specs, plan=plan, console=console or Console())
        return config.run_folder
    run = claim_run(config, space=space_facts(experiment), data=data, resume=resume)
    run.console = console or run.console
    record_provenance(run.folder, seed=config.seed, hashes={"data": data.hash, "config": sha256_json(config.model_dump(mode="json"))})
    run.console.line(f"run      {run.folder}")
    with run.stage("target", "Target: the model that has memorised the documents"):
        target = obtain_target(run, config=config, data=data)
    with run.stage("baseline", "Baseline: scores before unlearning, and the reference for all trials"):
        evaluate_folder(target, config=config, data=data, folder=run.folder / "baseline", name="baseline")
        prepare_trials(run, config=config, data=data, specs=specs, target=target)
        print_baseline(run)
    with run.stage("trials", f"Trials: {len(specs)}, {plan.why}"):
        start_ray(cpus=os.cpu_count() or 1)
        try:
            run_sweep_trials(specs, run=run.folder, config=config, plan=plan, console=run.console, events=run.events)
        finally:
            stop_ray()
    finish_run(run, config=config, data=data, specs=specs, target=target)
    return run.folder


def check_lengths(config: ExperimentConfig, *, data: PreparedData) -> None:
    """Refuse rows that are longer than a given target's context before anything is written."""
    if config.model.model_name_or_path is None:
        return
    from trainers.loop import encode_trial
    from trainers.modeling import check_model_folder

    folder = check_model_folder(config.model.model_name_or_path)
    inputs = trial_inputs(run=config.run_folder, data=data, target=folder, target_hash="")
    encode_trial(inputs, train=config.train)


def print_baseline(run: Run) -> None:
    """One line with what the untouched target knows."""
    from eval.report import read_report

    scores = read_report(run.folder / "baseline" / "eval.json").scores
    names = {"forget_knowledge": "forget knowledge", "forget_regurgitation": "forget regurgitation", "retain_knowledge": "retain knowledge",
             "retain_regurgitation": "retain regurgitation", "mia_auc": "AUC", "mmlu_average": "MMLU"}  # fmt: skip
    known = [f"{label} {scores[name]:.2f}" for name, label in names.items() if scores.get(name) is not None]
    run.console.line("  " + ", ".join(known))


def print_plan(
    experiment: LoadedExperiment, *, data: PreparedData, specs: tuple[TrialSpec, ...], plan: ResourcePlan, console: Console
) -> None:
    """What a sweep would do; trains nothing."""
    from launcher.console import settings

    config = experiment.config
    console.stage(f"Plan of {config.name}")
    console.line(f"  run folder   {config.run_folder}")
    for name, fold in data.folds.items():
        console.line(f"  {name:<12} {len(fold.forget)} forget rows, {len(fold.retain)} retain rows")
    console.line(f"  trained on   {len(data.training.forget)} forget rows, {len(data.training.retain)} retain rows")
    engine = config.train.engine
    console.line(
        f"  engine       {engine.name}" + (f" ZeRO {engine.zero_stage}" if engine.name == "deepspeed" else "") + f", {engine.dtype}"
    )
    console.line(f"  resources    {plan.why}")
    for spec in specs:
        console.line(f"  {spec.name}     {settings(spec.overrides) or 'defaults'}")


def validate_experiment(*, experiment: LoadedExperiment, resolved: bool = False) -> None:
    """``unlearn validate``: check configuration, data, model and resources; print the plan; train nothing."""
    quiet_libraries()
    config = experiment.config
    if resolved:
        print(dump_yaml(config), end="")
        return
    data = prepare_data(config)
    specs, plan = plan_sweep(experiment)
    check_lengths(config, data=data)
    print_plan(experiment, data=data, specs=specs, plan=plan, console=Console())
    print("valid")


def run_train(*, experiment: LoadedExperiment, out: Path | None = None) -> None:
    """``unlearn train``: one trial in this process, in its own run folder."""
    from launcher.trial import TrialTask, read_status, run_trial

    quiet_libraries()
    config = experiment.config
    if config.train.engine.ranks > 1:
        raise InputError(
            f"train.engine.ranks = {config.train.engine.ranks}, but `unlearn train` computes in one process",
            where=str(experiment.source),
            fix="use `unlearn sweep` with sweep.num_trials: 1, or train.engine.ranks=1",
        )
    if out is not None:
        config = config.model_copy(update={"storage_path": str(Path(out).parent), "name": Path(out).name})
    data = prepare_data(config)
    check_lengths(config, data=data)
    run = claim_run(config, space={}, data=data, resume=True)
    spec = TrialSpec(name="trial-00", overrides={}, config=config.train)
    with run.stage("target", "Target"):
        target = obtain_target(run, config=config, data=data)
    with run.stage("baseline", "Baseline"):
        evaluate_folder(target, config=config, data=data, folder=run.folder / "baseline", name="baseline")
        prepare_trials(run, config=config, data=data, specs=(spec,), target=target)
    task = TrialTask(run=str(run.folder.resolve()), name=spec.name)
    with run.stage("trials", "Trial"):
        if read_status(task.folder)["state"] != "finished":
            _print_steps(run_trial(task), console=run.console)
    status = read_status(task.folder)
    if status["state"] != "finished":
        raise RunError(f"the trial {status['state']}: {status.get('error')}", where=str(task.folder))
    run.console.line(f"trial    {task.folder}  ({duration(status['seconds'])})")


def _print_steps(steps: Iterator[dict[str, Any]], *, console: Console) -> None:
    for metrics in steps:
        signals: dict[str, float] = metrics.get("signals", {})
        if signals or metrics["step"] == 1:
            known = ", ".join(f"{name} {value:.3f}" for name, value in signals.items())
            console.line(
                f"  step {metrics['step']} of {metrics['num_steps']}: loss {metrics['loss']:.4f}" + (f", {known}" if known else "")
            )


def evaluate_model(
    *,
    model: Path,
    data: Path,
    mia: Path | None,
    mmlu: Path | None,
    max_new_tokens: int | None,
    official: bool,
    out: Path,
    progress: Callable[[str], None] | None = None,
) -> None:
    """``unlearn eval``: the official protocol on any checkpoint, over all rows of a folder."""
    from eval.config import EvalConfig
    from eval.mmlu import load_mmlu
    from eval.report import write_report
    from eval.runner import evaluate
    from trainers.data.records import load_attack_documents, load_forget_retain
    from trainers.distributed import Rank
    from trainers.modeling import load_model, load_tokenizer

    quiet_libraries()
    config = EvalConfig(official=official, **({"max_new_tokens": max_new_tokens} if max_new_tokens else {}))
    records = load_forget_retain(data)
    attack = load_attack_documents(mia) if mia else None
    questions = load_mmlu(mmlu) if mmlu else None
    loaded = load_model(model, dtype=config.dtype, device=Rank().device)
    report = evaluate(
        model=loaded,
        tokenizer=load_tokenizer(model),
        data=records,
        attack=attack,
        mmlu=questions,
        config=config,
        fold="all",
        model_name=str(model),
        device=Rank().device,
        progress=progress or print,
    )
    write_report(report, out)
