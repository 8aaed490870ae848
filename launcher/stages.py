"""The stages of a run, in order, as plain calls; each one reads files and writes files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.audit_stage import check_audit
from launcher.config import ExperimentConfig
from launcher.console import Console, duration, evaluation_lines
from launcher.data import PreparedData, prepare_data, question_groups, unseen_texts
from launcher.load import LoadedExperiment, dump_yaml
from launcher.lock import hold
from launcher.logs import quiet_libraries
from launcher.nodes import Node
from launcher.plugins import plugin_hashes, use_named
from launcher.preflight import check_texts
from launcher.report_live import live_report
from launcher.run_folder import Run, check_run_place, check_same_target, claim_run, open_run, run_place
from launcher.scoring import evaluate_folder
from launcher.search_space import SearchSpace, TrialSpec, draw_trials, possible_trials
from launcher.sweep_plan import NodesWanted, SweepPlan, imagined_nodes, make_plan, plan_disk, resolve_alone
from launcher.tracking.mode import resolve_mode
from launcher.tracking.process import following
from launcher.trial import trial_inputs, write_plan
from trainers.errors import InputError, RunError
from trainers.files import check_output_file, read_json, sha256_json, weights_hash, write_json, write_text
from trainers.memorize import MANIFEST as TARGET_MANIFEST
from trainers.memorize import memorize


def plan_sweep(experiment: LoadedExperiment, *, data: PreparedData, nodes: Sequence[Node] | None = None) -> SweepPlan:
    """Draw the trials of a sweep, refuse what cannot work, and plan the rest; loads no weights.

    Args:
        experiment: the sweep.
        data: its rows.
        nodes: where it may run; null: this machine, or the cluster in RAY_ADDRESS.

    Raises:
        InputError: if texts, modules or resources do not fit.
    """
    config = experiment.config
    check_audit(config)
    specs = draw_trials(
        base=config.train,
        space=experiment.space,
        start_points=config.sweep.start_points,
        num_trials=config.sweep.num_trials,
        search=config.sweep.search,
        startup_trials=config.sweep.startup_trials,
        seed=config.seed,
    )
    possible = possible_trials(config, space=experiment.space, known=specs)
    check_texts(config, data=data, trains=[spec.config for spec in possible])
    return make_plan(specs, config=config, data=data, nodes=nodes, possible=possible)


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
    run = open_run(config)
    check_run_place(run.folder)
    check_same_target(run.folder, config=config, data=data)
    with run.stage("target", "Target: memorise the documents"):
        folder = obtain_target(run, config=config, data=data)
    run.console.line(f"target   {folder}")


def prepare_trials(
    run: Run,
    *,
    config: ExperimentConfig,
    data: PreparedData,
    specs: tuple[TrialSpec, ...],
    target: Path,
    possible: Sequence[TrialSpec] | None = None,
) -> None:
    """Write what trials read: their configurations, the plan, and the reference of the target.

    Args:
        run: the run.
        config: the experiment.
        data: its documents.
        specs: the trials that exist.
        target: what they start from.
        possible: trials that may be proposed, whose reference is prepared as well; a trial that needs another one computes it.
    """
    write_trials(run, config=config, specs=specs, target=target)
    prepare_references(run, data=data, specs=(*specs, *(possible or ())), target=target)


def prepare_references(run: Run, *, data: PreparedData, specs: Sequence[TrialSpec], target: Path) -> None:
    """Compute what trials read of the target, once for all that read the same."""
    from trainers.loop import prepare_reference, reference_setting

    inputs = trial_inputs(run=run.folder, data=data, target=target, target_hash=weights_hash(target))
    for train in {reference_setting(spec.config): spec.config for spec in specs}.values():
        prepare_reference(inputs, train=train)


def write_trials(run: Run, *, config: ExperimentConfig, specs: tuple[TrialSpec, ...], target: Path) -> None:
    """Write the configurations of trials, and the plan that their processes read."""
    import yaml

    for spec in specs:
        path = run.folder / "trials" / spec.name / "config.yaml"
        if not path.exists():
            write_text(path, yaml.safe_dump({"overrides": spec.overrides, "train": spec.config.model_dump(mode="json")}, sort_keys=False))
    write_plan(
        run.folder,
        config=config,
        trials={spec.name: {"train": spec.config.model_dump(mode="json")} for spec in specs},
        target=target,
        target_hash=weights_hash(target),
    )
    run.storage.push()


def run_sweep(*, experiment: LoadedExperiment, resume: bool = True, dry_run: bool = False, console: Console | None = None) -> Path:
    """``unlearn sweep``: target, trials, pair, merge, evaluation, report. The same call again goes on where it stopped.

    Raises:
        InputError: before anything is written, if configuration or data are unusable.
        RunError: after the report, if no trial is alive.
    """
    quiet_libraries()
    config = experiment.config
    use_reserved_cores(config)
    tracking_mode = resolve_mode(config.tracking, environment=os.environ)
    data = prepare_data(config)
    plan = plan_sweep(experiment, data=data)
    if dry_run:
        print_plan(plan, config=config, data=data, console=console or Console())
        return config.run_folder
    run = claim_run(config, space=experiment.space, data=data, resume=resume)
    run.console = console or run.console
    with (
        hold(run.folder / ".lock"),
        run.kept_home(),
        following(run.folder, tracking=config.tracking, mode=tracking_mode, console=run.console),
        live_report(run.folder),
    ):
        _sweep(run, config=config, space=experiment.space, data=data, plan=plan)
    return run.folder


def _sweep(run: Run, *, config: ExperimentConfig, space: SearchSpace, data: PreparedData, plan: SweepPlan) -> None:
    from launcher import elsewhere
    from launcher.faults import stoppable
    from launcher.finish import finish_run
    from launcher.provenance import record_provenance
    from launcher.ray_session import start_ray, stop_ray
    from launcher.storage_probe import probe_before_sweep
    from launcher.sweep import has_work, run_sweep_trials, trial_source

    hashes = {"data": data.hash, "config": sha256_json(config.model_dump(mode="json")), "plugins": plugin_hashes(config.plugins)}
    record_provenance(run.folder, seed=config.seed, hashes=hashes)
    run.console.line(f"run      {run.folder}")
    for warning in probe_before_sweep(config):
        run.console.warning(warning)
    planner = plan.planner
    with elsewhere.computed_ahead(run, nodes=planner.nodes, cpus=config.sweep.cpus_per_rank) as ahead:
        with run.stage("target", "Target: the model that has memorised the documents"):
            ahead(elsewhere.build_target_ahead, config=config, data=data)
            target = obtain_target(run, config=config, data=data)
        with run.stage("baseline", "Baseline: scores before unlearning, and the reference for all trials"):
            ahead(elsewhere.score_baseline_ahead, config=config, data=data)
            evaluate_folder(target, config=config, data=data, folder=run.folder / "baseline", name="baseline")
            source = trial_source(plan.specs, run=run.folder, config=config, space=space, cost=planner.cost)
            possible = possible_trials(config, space=space, known=plan.specs)
            specs = planner.resolve(source.specs)
            ahead(elsewhere.prepare_references_ahead, config=config, data=data, specs=(*specs, *possible))
            prepare_trials(run, config=config, data=data, specs=specs, target=target, possible=possible)
            print_baseline(run)
    with run.stage("trials", f"Trials: {source.total}, {plan.resources.why}"):
        if has_work(source, run=run.folder):
            start_ray(cpus=os.cpu_count() or 1)
            try:
                with stoppable(run.folder):
                    run_sweep_trials(
                        source,
                        run=run.folder,
                        config=config,
                        plan=plan.resources,
                        console=run.console,
                        events=run.events,
                        prepare=lambda known: write_trials(run, config=config, specs=planner.resolve(known), target=target),
                        cost=planner.cost,
                    )
            finally:
                stop_ray()
    with elsewhere.computed_ahead(run, nodes=planner.nodes, cpus=config.sweep.cpus_per_rank) as ahead:
        finish_run(run, config=config, data=data, specs=source.specs, target=target, ahead=ahead)


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


def print_plan(plan: SweepPlan, *, config: ExperimentConfig, data: PreparedData, console: Console, elsewhere: bool = False) -> None:
    """What a sweep would do, here or on other machines; trains nothing."""
    from launcher.plan_text import plan_lines, plan_warnings

    disk = plan_disk(plan, config=config, elsewhere=elsewhere)
    console.stage(f"Plan of {config.name}")
    for line in plan_lines(plan, config=config, data=data, disk=disk):
        console.line(line)
    for warning in plan_warnings(plan, disk=disk, config=config):
        console.warning(warning)


def validate_experiment(*, experiment: LoadedExperiment, resolved: bool = False, nodes: NodesWanted | None = None) -> None:
    """``unlearn validate``: check configuration, data, model and resources; print the plan; train nothing.

    Args:
        experiment: the sweep.
        resolved: print every setting instead.
        nodes: plan for such nodes; null: for this machine, or the cluster in RAY_ADDRESS.
    """
    quiet_libraries()
    config = experiment.config
    if resolved:
        print(dump_yaml(config, space=experiment.space), end="")
        return
    data = prepare_data(config)
    plan = plan_sweep(experiment, data=data, nodes=imagined_nodes(nodes, sweep=config.sweep) if nodes else None)
    print_plan(plan, config=config, data=data, console=Console(), elsewhere=nodes is not None)
    print("valid")


def run_train(*, experiment: LoadedExperiment, out: Path | None = None) -> None:
    """``unlearn train``: one trial in this process, in its own run folder."""
    from launcher.trial import TrialTask, read_status, run_trial
    from launcher.trial_home import carried

    quiet_libraries()
    config = experiment.config
    use_reserved_cores(config)
    if config.train.engine.num_ranks > 1:
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
    spec = TrialSpec(name="trial-00", overrides={}, config=resolve_alone(config, data=data))
    with run.stage("target", "Target"):
        target = obtain_target(run, config=config, data=data)
    with run.stage("baseline", "Baseline"):
        evaluate_folder(target, config=config, data=data, folder=run.folder / "baseline", name="baseline")
        prepare_trials(run, config=config, data=data, specs=(spec,), target=target)
    task = TrialTask(run=str(run.folder.resolve()), name=spec.name)
    with run.stage("trials", "Trial"):
        if read_status(task.folder)["state"] != "finished":
            _print_steps(carried(task, run_trial(task)), console=run.console)
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
    plugins: Sequence[Path | str] = (),
) -> None:
    """``unlearn eval``: the official protocol on any checkpoint, over all rows of a folder, and the metrics of plugins.

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
    files = tuple(str(plugin.file) for plugin in use_named(plugins))
    inputs = EvaluationInputs(
        *locate_model(model),
        data=data,
        mia=mia,
        mmlu=mmlu,
        config=EvalConfig(official=official, **({"max_new_tokens": max_new_tokens} if max_new_tokens else {})),
        plugins=files,
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
