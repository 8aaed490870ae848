"""The stages of a run, in order, as plain calls; each one reads files and writes files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.config import ExperimentConfig
from launcher.console import Console, duration, evaluation_lines
from launcher.data import PreparedData, prepare_data, question_groups, unseen_texts
from launcher.load import LoadedExperiment, dump_yaml
from launcher.lock import hold
from launcher.logs import quiet_libraries
from launcher.preflight import check_texts
from launcher.resources import ResourcePlan, plan_resources
from launcher.run_folder import Run, check_run_place, check_same_target, claim_run, run_place
from launcher.scoring import evaluate_folder
from launcher.search_space import SearchSpace, TrialSpec, draw_trials
from launcher.trial import trial_inputs, write_plan
from trainers.errors import InputError, RunError
from trainers.files import check_output_file, read_json, sha256_json, weights_hash, write_json, write_text
from trainers.memorize import MANIFEST as TARGET_MANIFEST
from trainers.memorize import memorize


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

    Raises:
        InputError: if the model is not the one that an earlier start of the run went out from.
    """
    from trainers.checkpoint import check_finite
    from trainers.modeling import check_model_folder

    if config.model.model_name_or_path is not None:
        folder = check_model_folder(config.model.model_name_or_path)
        check_finite(folder)
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
            tokenizer_texts=unseen_texts(data),
            progress=lambda text: run.console.line(f"  {text}"),
        )
        if not manifest["reached"]:
            run.console.warning("the target did not reach its memorisation thresholds: train it for more epochs (target.num_train_epochs)")
    found = weights_hash(folder)
    if (run.folder / "baseline").exists() and found != read_json(run.folder / "target.json")["weights_hash"]:
        raise InputError(
            "the target model's weights are not those that this run started from",
            where=str(folder),
            why="its baseline and its trials would not fit",
            fix="put the model back, or choose another name",
        )
    known = manifest.get("memorised")
    write_json(
        run.folder / "target.json",
        {
            "schema_version": 1,
            "path": str(folder),
            "weights_hash": found,
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


def run_memorize(*, experiment: LoadedExperiment) -> None:
    """``unlearn memorize``: build the target model of an experiment."""
    quiet_libraries()
    config = experiment.config
    use_reserved_cores(config)
    if config.target is None:
        raise InputError(
            "the configuration has no target section", where=str(experiment.source), fix="say under target: how to build the model"
        )
    config = config.model_copy(update={"model": config.model.model_copy(update={"model_name_or_path": None})})
    data = prepare_data(config)
    check_texts(config, data=data, trains=())
    run = Run(config.run_folder)
    check_run_place(run.folder)
    check_same_target(run.folder, config=config, data=data)
    with run.stage("target", "Target: memorise the documents"):
        folder = obtain_target(run, config=config, data=data)
    run.console.line(f"target   {folder}")


def prepare_trials(run: Run, *, config: ExperimentConfig, data: PreparedData, specs: tuple[TrialSpec, ...], target: Path) -> None:
    """Write what trials read: their configurations, the plan, and the reference of the target."""
    import yaml

    from trainers.loop import prepare_reference, reference_setting

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
    for train in {reference_setting(spec.config): spec.config for spec in specs}.values():
        prepare_reference(inputs, train=train)


def run_sweep(*, experiment: LoadedExperiment, resume: bool = True, dry_run: bool = False, console: Console | None = None) -> Path:
    """``unlearn sweep``: target, trials, pair, merge, evaluation, report. The same call again goes on where it stopped.

    Raises:
        InputError: before anything is written, if configuration or data are unusable.
        RunError: after the report, if no trial is alive.
    """
    quiet_libraries()
    config = experiment.config
    use_reserved_cores(config)
    data = prepare_data(config)
    specs, plan = plan_sweep(experiment)
    check_texts(config, data=data, trains=[spec.config for spec in specs])
    if dry_run:
        print_plan(experiment, data=data, specs=specs, plan=plan, console=console or Console())
        return config.run_folder
    run = claim_run(config, space=experiment.space, data=data, resume=resume)
    run.console = console or run.console
    with hold(run.folder / ".lock"):
        _sweep(run, config=config, data=data, specs=specs, plan=plan)
    return run.folder


def _sweep(run: Run, *, config: ExperimentConfig, data: PreparedData, specs: tuple[TrialSpec, ...], plan: ResourcePlan) -> None:
    from launcher.finish import finish_run
    from launcher.provenance import record_provenance
    from launcher.sweep import run_sweep_trials, start_ray, stop_ray, waiting_tasks

    record_provenance(run.folder, seed=config.seed, hashes={"data": data.hash, "config": sha256_json(config.model_dump(mode="json"))})
    run.console.line(f"run      {run.folder}")
    with run.stage("target", "Target: the model that has memorised the documents"):
        target = obtain_target(run, config=config, data=data)
    with run.stage("baseline", "Baseline: scores before unlearning, and the reference for all trials"):
        evaluate_folder(target, config=config, data=data, folder=run.folder / "baseline", name="baseline")
        prepare_trials(run, config=config, data=data, specs=specs, target=target)
        print_baseline(run)
    with run.stage("trials", f"Trials: {len(specs)}, {plan.why}"):
        if waiting_tasks(specs, run=run.folder):
            start_ray(cpus=os.cpu_count() or 1)
            try:
                run_sweep_trials(specs, run=run.folder, config=config, plan=plan, console=run.console, events=run.events)
            finally:
                stop_ray()
    finish_run(run, config=config, data=data, specs=specs, target=target)


def use_reserved_cores(config: ExperimentConfig) -> None:
    """Compute with as many threads as a rank of a trial, whatever the machine and its environment say.

    Sums in another order end in other last digits, so a run that is resumed from another shell or machine must go on with the same
    number of threads; and a tiny model on shared cores is several times slower with two threads that wait for each other.
    """
    import torch

    torch.set_num_threads(max(1, int(config.sweep.cpus_per_rank)))


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
    for memory in predict_trials(config, data=data, specs=specs, on_gpu=plan.gpus_per_trial > 0):
        console.line(f"  memory       {memory}")
    for spec in specs:
        console.line(f"  {spec.name}     {settings(spec.overrides) or 'defaults'}")


def predict_trials(config: ExperimentConfig, *, data: PreparedData, specs: tuple[TrialSpec, ...], on_gpu: bool) -> list[str]:
    """What the trials are expected to take of each rank's device, one line where all take the same; no weights are loaded.

    Nothing is said of a target that is still to be built from scratch: there is no tokenizer yet.
    """
    import torch

    from trainers.memory_plan import memory_setting, predict_memory

    target = config.model.model_name_or_path or (config.target.base if config.target else None)
    if target is None:
        return []
    inputs = trial_inputs(run=config.run_folder, data=data, target=Path(target).expanduser(), target_hash="")
    capacity = torch.cuda.mem_get_info()[1] if on_gpu else None
    alike = {memory_setting(spec.config): spec.config for spec in specs}
    found: dict[str, list[str]] = {}
    for setting, train in alike.items():
        try:
            text = str(predict_memory(inputs, train=train, device="cuda" if on_gpu else "cpu", capacity_bytes=capacity))
        except InputError as error:
            text = f"not predicted: {error.what}"
        found.setdefault(text, []).extend(spec.name for spec in specs if memory_setting(spec.config) == setting)
    return list(found) if len(found) == 1 else [f"{', '.join(sorted(names))}: {text}" for text, names in found.items()]


def validate_experiment(*, experiment: LoadedExperiment, resolved: bool = False) -> None:
    """``unlearn validate``: check configuration, data, model and resources; print the plan; train nothing."""
    quiet_libraries()
    config = experiment.config
    if resolved:
        print(dump_yaml(config, space=experiment.space), end="")
        return
    data = prepare_data(config)
    specs, plan = plan_sweep(experiment)
    check_texts(config, data=data, trains=[spec.config for spec in specs])
    print_plan(experiment, data=data, specs=specs, plan=plan, console=Console())
    print("valid")


def run_train(*, experiment: LoadedExperiment, out: Path | None = None) -> None:
    """``unlearn train``: one trial in this process, in its own run folder."""
    from launcher.trial import TrialTask, read_status, run_trial

    quiet_libraries()
    config = experiment.config
    use_reserved_cores(config)
    if config.train.engine.ranks > 1:
        raise InputError(
            f"train.engine.ranks = {config.train.engine.ranks}, but `unlearn train` computes in one process",
            where=str(experiment.source),
            fix="use `unlearn sweep` with sweep.num_trials: 1, or train.engine.ranks=1",
        )
    if out is not None:
        storage_path, name = run_place(out)
        config = config.model_copy(update={"storage_path": storage_path, "name": name})
    data = prepare_data(config)
    check_texts(config, data=data, trains=[config.train])
    run = claim_run(config, space=SearchSpace(), data=data, resume=True)
    if config.sweep.start_points:
        run.console.warning("one trial is trained, with the settings under train: sweep.start_points count for `unlearn sweep` only")
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
        if signals or (metrics["step"] == 1 and "state" not in metrics):
            known = ", ".join(f"{name} {value:.3f}" for name, value in signals.items())
            console.line(
                f"  step {metrics['step']} of {metrics['num_steps']}: loss {metrics['loss']:.4f}" + (f", {known}" if known else "")
            )


def locate_model(path: Path) -> tuple[Path, Path]:
    """The base and the checkpoint that a path stands for: a model folder (which is its own base), a trial, or one of its checkpoints.

    Raises:
        InputError: if it is none of these, or an adapter whose base is not where it was.
    """
    from merging.task_vectors import open_task_vector, resolve_checkpoint
    from trainers.modeling import check_model_folder

    path = Path(path).expanduser()
    inside = ("adapter_config.json", "checkpoints", "trials")
    if (path / "config.json").exists() or not any((path / name).exists() for name in inside):
        return check_model_folder(path), path
    checkpoint = resolve_checkpoint(path)
    if not (checkpoint / "adapter_config.json").exists():
        return check_model_folder(checkpoint), checkpoint
    recorded = read_json(checkpoint / "adapter_config.json").get("base_model_name_or_path")
    if not recorded or not Path(recorded).is_dir():
        raise InputError(
            f"the adapter's base model is not there: {recorded}",
            where=f"{checkpoint / 'adapter_config.json'}, key 'base_model_name_or_path'",
            fix="correct the path, or write the adapted model with `unlearn merge --method linear` and evaluate that",
        )
    base = check_model_folder(recorded)
    # Opening it checks what a plain load does not: another base, shapes, damaged bytes.
    open_task_vector(base=base, trial=checkpoint)
    return base, checkpoint


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
    processes: int = 1,
) -> None:
    """``unlearn eval``: the official protocol on any checkpoint, over all rows of a folder.

    What an earlier call with the same arguments finished before it was ended is not computed again.

    Raises:
        InputError: before anything is computed, if model, data or output are unusable.
    """
    from eval.config import EvalConfig
    from eval.parts import UnitStore, partial_folder
    from eval.progress import Meter
    from eval.report import write_report
    from eval.runner import evaluate
    from launcher.scoring import EvaluationInputs, EvaluationProcesses, share_threads
    from trainers.distributed import Rank

    quiet_libraries()
    check_output_file(out)
    inputs = EvaluationInputs(
        *locate_model(model),
        data=data,
        mia=mia,
        mmlu=mmlu,
        config=EvalConfig(official=official, **({"max_new_tokens": max_new_tokens} if max_new_tokens else {})),
    )
    loaded = inputs.load()
    # Before anything is written: an unusable model leaves no folder behind.
    ready = loaded.load_model(Rank().device)
    store = UnitStore(partial_folder(out), identity=inputs.identity())
    threads = share_threads(processes)
    # Two calls for the same report would write into each other's unfinished results.
    with hold(partial_folder(out) / ".lock"):
        report = evaluate(
            model=ready,
            tokenizer=loaded.tokenizer,
            data=loaded.data,
            attack=loaded.attack,
            mmlu=loaded.mmlu,
            config=inputs.config,
            fold="all",
            model_name=str(model),
            device=Rank().device,
            progress=progress or print,
            store=store,
            meter=Meter(),
            helpers=EvaluationProcesses(inputs, store=store, count=processes, threads=threads) if processes > 1 else None,
        )
        write_report(report, out)
        store.remove()
    for line in evaluation_lines(scores=report.scores, intervals=report.intervals, notes=report.notes):
        (progress or print)(line)
    (progress or print)(f"wrote {out}")
