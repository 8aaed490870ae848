"""``unlearn eval`` on whatever a data folder holds: LUME, TOFU, MUSE; and tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.logs import quiet_libraries
from trainers.errors import InputError
from trainers.files import check_output_file, read_json, write_json


def evaluate_anything(
    *,
    model: Path,
    data: Path | None,
    out: Path,
    layout: str | None,
    split: str | None,
    retained_model: Path | None,
    prompt: str | None,
    max_new_tokens: int | None,
    lm_eval: str | None,
    lume: Callable[[Path], None],
    lume_only: Mapping[str, Any],
) -> None:
    """Find out what the folder holds, evaluate the model on it, and add lm-eval's results if asked for.

    Args:
        model: model folder, or trial checkpoint.
        data: data folder; None with ``lm_eval`` only.
        out: JSON file to write.
        layout: the benchmark; None: told from the folder.
        split: TOFU's forget set.
        retained_model: model trained without the forget set, for TOFU and MUSE.
        prompt: how a question of TOFU becomes a prompt.
        max_new_tokens: limit per row; None: the benchmark's own.
        lm_eval: tasks with commas between them.
        lume: evaluates on a folder in LUME layout and writes ``out``.
        lume_only: options that mean something to LUME only, by name; a false value is one that was not given.

    Raises:
        InputError: before anything is computed, if model, data, options or output are unusable.
        SetupError: before anything is computed, if lm-eval is asked for, but not installed.
    """
    from eval.suites.harness import import_harness, split_tasks
    from eval.suites.layout import Layout, recognise

    if data is None and lm_eval is None:
        raise InputError("there is nothing to evaluate on", where="unlearn eval", fix="give --data DIR, or --lm-eval TASKS")
    check_output_file(out)
    tasks = split_tasks(lm_eval) if lm_eval is not None else []
    if tasks:
        _check_whole_model(model)
        quiet_libraries()
        import_harness()
    found = None
    if data is not None:
        data = Path(data).expanduser()
        found = Layout(layout) if layout else recognise(data) if data.is_dir() else Layout.LUME
    _check_options(
        found,
        options={
            "--layout": (layout, (Layout.LUME, Layout.TOFU, Layout.MUSE)),
            "--split": (split, (Layout.TOFU,)),
            "--retained-model": (retained_model, (Layout.TOFU, Layout.MUSE)),
            "--prompt": (prompt, (Layout.TOFU,)),
            "--max-new-tokens": (max_new_tokens, (Layout.LUME, Layout.TOFU, Layout.MUSE)),
            **{name: (value, (Layout.LUME,)) for name, value in lume_only.items()},
        },
    )
    if data is not None and found is Layout.LUME:
        lume(data)
    elif data is not None and found is not None:
        evaluate_suite(
            model=model,
            data=data,
            out=out,
            layout=found.value,
            split=split,
            retained_model=retained_model,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
        )
    if tasks:
        add_harness(model=model, tasks=tasks, out=out, has_report=found is not None)


def _check_options(found: Any, *, options: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Refuse options that the benchmark does not read: a setting without effect would look as if it had one."""
    for name, (value, benchmarks) in options.items():
        if value and found not in benchmarks:
            what = f"the data is {found.value.upper()}" if found is not None else "there is no --data"
            raise InputError(
                f"{name} has no meaning here: {what}",
                where=name,
                why=f"it is read for {' and '.join(one.value.upper() for one in benchmarks)}",
                fix="leave it out",
            )


def _check_whole_model(model: Path) -> None:
    """Refuse adapters: lm-eval reads what a user of the model would."""
    from launcher.stages import locate_model

    base, checkpoint = locate_model(model)
    if base != checkpoint and (checkpoint / "adapter_config.json").exists():
        raise InputError(
            "lm-eval evaluates whole models, but this is an adapter",
            where=str(checkpoint),
            fix=f"write the adapted model first: unlearn merge --method linear --base {base} --trial {checkpoint} --out DIR",
        )


def evaluate_suite(
    *,
    model: Path,
    data: Path,
    out: Path,
    layout: str,
    split: str | None = None,
    retained_model: Path | None = None,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] = print,
) -> None:
    """Evaluate a checkpoint on a TOFU or MUSE folder; write the report and print it as a table.

    Raises:
        InputError: before weights are loaded, if model, data or options are unusable.
    """
    from eval.suites.config import SuiteConfig
    from eval.suites.report import report_lines, write_suite_report
    from launcher.stages import locate_model
    from trainers.distributed import Rank
    from trainers.modeling import load_adapted_model, load_model_config, load_tokenizer

    quiet_libraries()
    check_output_file(out)
    settings = {"prompt": prompt, "max_new_tokens": max_new_tokens, "dtype": dtype}
    config = SuiteConfig.model_validate({name: value for name, value in settings.items() if value is not None})
    load, prepare, measure_retained, evaluate = _suite(layout, split=split)
    records = load(data)
    device = Rank().device
    opened = {}
    for role, path in (("model", model), ("retained", retained_model)):
        if path is not None:
            base, checkpoint = locate_model(path)
            tokenizer = load_tokenizer(base)
            rows = prepare(records, tokenizer=tokenizer, model_config=load_model_config(base), config=config)
            opened[role] = (base, checkpoint, tokenizer, rows)
    retained = None
    if retained_model is not None:
        base, checkpoint, tokenizer, rows = opened["retained"]
        # Gone before the other model is loaded: one of them may fill the device.
        retained = measure_retained(
            rows,
            model=load_adapted_model(base, checkpoint, dtype=config.dtype, device=device),
            tokenizer=tokenizer,
            config=config,
            name=str(retained_model),
            device=device,
        )
        progress(f"retained model: {retained_model}")
    base, checkpoint, tokenizer, rows = opened["model"]
    report = evaluate(
        rows,
        model=load_adapted_model(base, checkpoint, dtype=config.dtype, device=device),
        tokenizer=tokenizer,
        config=config,
        model_name=str(model),
        retained=retained,
        device=device,
        progress=progress,
    )
    write_suite_report(report, out)
    for line in report_lines(report):
        progress(line)


def _suite(layout: str, *, split: str | None) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """How a benchmark's data is loaded and encoded, and how a retained model and a model are measured on it."""
    if layout == "tofu":
        from eval.suites.tofu import evaluate_tofu, measure_retained, prepare_tofu
        from eval.suites.tofu_data import load_tofu

        return lambda folder: load_tofu(folder, split=split), prepare_tofu, measure_retained, evaluate_tofu
    from eval.suites.muse import evaluate_muse, measure_retained_attack, prepare_muse
    from eval.suites.muse_data import load_muse

    return load_muse, prepare_muse, measure_retained_attack, evaluate_muse


def add_harness(*, model: Path, tasks: list[str], out: Path, has_report: bool, progress: Callable[[str], None] = print) -> None:
    """Run lm-eval's tasks and put its results under ``lm_eval`` in the report, or in a file of their own.

    Raises:
        InputError, SetupError, RunError: see ``run_harness``; a report that was there stays as it was.
    """
    from eval.suites.harness import harness_lines, run_harness
    from eval.suites.report import SCHEMA_VERSION
    from launcher.stages import locate_model
    from trainers.distributed import Rank

    found = run_harness(model=locate_model(model)[1], tasks=tasks, dtype="bfloat16", device=Rank().device)
    report = read_json(out) if has_report else {"schema_version": SCHEMA_VERSION, "benchmark": "lm-eval", "model": str(model)}
    write_json(out, {**report, "lm_eval": found})
    for line in harness_lines(found):
        progress(line)
