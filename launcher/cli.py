"""The command line: reads arguments, calls one stage, turns failures into messages and exit codes.

Nothing heavy is imported here before a command needs it: `unlearn --help` answers at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from merging.methods.table import CONVENTIONS, METHODS
from trainers.errors import InputError, UserFacingError

if TYPE_CHECKING:
    from launcher.load import LoadedExperiment
    from merging.config import MergeConfig

app = typer.Typer(
    name="unlearn",
    help="Unlearn documents from a language model: sweep trials, merge an over- and an under-forgetting one, measure, report.",
    epilog="Example: unlearn quickstart        Exit codes: 0 ok, 1 the run failed, 2 bad input, 3 environment, 130 interrupted.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


class Cluster(str, Enum):  # noqa: UP042  (typer shows the values of a str enum)
    """Kinds of machines that a cluster file exists for."""

    aws = "aws"
    onprem = "onprem"
    k8s = "k8s"
    slurm = "slurm"
    skypilot = "skypilot"


class Benchmark(str, Enum):  # noqa: UP042
    """Benchmarks whose folders `unlearn eval` reads."""

    lume = "lume"
    tofu = "tofu"
    muse = "muse"


class Prompt(str, Enum):  # noqa: UP042
    """How a question of TOFU becomes a prompt."""

    plain = "plain"
    bare = "bare"
    chat = "chat"


class Output(str, Enum):  # noqa: UP042
    """What a merge is written as."""

    model = "model"
    adapter = "adapter"


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the experiment.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="k=v", help="Settings that replace the file's, such as train.lora.r=16.", show_default=False)
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder, such as runs/quickstart, or s3://BUCKET/runs/NAME.", show_default=False)
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Python file that adds methods or metrics (docs/extending.md).", show_default=False),
]


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"unlearn-ties {version('unlearn-ties')}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. Works anywhere on the line.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command(epilog="Example: unlearn quickstart --out runs/first --documents 4")
def quickstart(
    out: Annotated[Path, typer.Option(metavar="RUN", help="Run folder to write.")] = Path("runs/quickstart"),
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="LUME-layout folder; without it synthetic documents are written.")
    ] = None,
    mia: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with member.jsonl and nonmember.jsonl.")] = None,
    mmlu: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with dev/ and test/ of MMLU.")] = None,
    documents: Annotated[int | None, typer.Option(metavar="N", min=1, help="Documents per task and set.")] = None,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Seed of everything.")] = 42,
) -> None:
    """The whole story on a CPU: build a tiny model that memorised its data, sweep, merge, evaluate, report."""
    from launcher.quickstart import run_quickstart

    run_quickstart(out=out, data=data, mia=mia, mmlu=mmlu, documents=documents, seed=seed)


@app.command(epilog="Example: unlearn doctor --cluster --storage /shared/runs")
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="Look at the Ray cluster as well.")] = False,
    storage: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write and read there, from every node if --cluster.", show_default=False)
    ] = None,
) -> None:
    """Say what this machine or cluster can run, with one fix for whatever is missing."""
    from launcher.doctor import run_doctor

    raise typer.Exit(run_doctor(cluster=cluster, storage=storage))


@app.command(epilog="Example: unlearn init --template olmo-1b --cluster slurm")
def init(
    template: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Template, such as olmo-1b or zjuklab; without it all are listed.", show_default=False),
    ] = None,
    cluster: Annotated[Cluster | None, typer.Option(help="Write a cluster file of this kind, too.")] = None,
) -> None:
    """Write a commented YAML file, and if asked a cluster file, to start from. Existing files are left alone."""
    from launcher.templates import template_listing, write_template

    if template is None and cluster is None:
        print(template_listing())
        return
    for path in write_template(template, cluster=cluster.value if cluster else None, folder=Path()):
        print(f"wrote {path}")


@app.command(epilog="Example: unlearn validate olmo-7b-16.yaml --nodes 2 --gpus-per-node 8 --gpu-memory 80")
def validate(
    config: Config,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print every setting with its value.")] = False,
    nodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="Plan for so many machines instead of this one.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(metavar="N", min=1, help="GPUs of each of these machines.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(metavar="GIB", min=1, help="Memory of each of these GPUs, GiB.")] = None,
    gpu_name: Annotated[str | None, typer.Option(metavar="NAME", help="Kind of these GPUs, such as H100: hours are told, too.")] = None,
) -> None:
    """Check settings, data, tokenizer and resources, and print the plan. Trains nothing."""
    if (gpus_per_node is None) != (gpu_memory is None) or (gpus_per_node is None and (nodes or gpu_name) is not None):
        raise InputError(
            "a plan for other machines needs --gpus-per-node and --gpu-memory",
            where="unlearn validate",
            fix="for instance --nodes 2 --gpus-per-node 8 --gpu-memory 80",
        )
    experiment = _experiment(config, overrides)
    from launcher.stages import validate_experiment

    wanted = None
    if gpus_per_node is not None and gpu_memory is not None:
        from launcher.sweep_plan import NodesWanted

        wanted = NodesWanted(number=nodes or 1, gpus=gpus_per_node, gpu_memory_gib=gpu_memory, gpu_name=gpu_name)
    validate_experiment(experiment=experiment, resolved=resolved, nodes=wanted)


@app.command(epilog="Example: unlearn memorize quickstart.yaml target.num_train_epochs=40")
def memorize(config: Config, overrides: Overrides = None) -> None:
    """Build the target model: fine-tune a base, or a tiny OLMo from random weights, on all documents."""
    experiment = _experiment(config, overrides, require="target")
    from launcher.stages import run_memorize

    run_memorize(experiment=experiment)


@app.command(epilog="Example: unlearn train olmo-1b.yaml train.learning_rate=1e-4 --out runs/single")
def train(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Trial folder to write; default: inside the run folder.")] = None,
) -> None:
    """Run one trial. Searched settings must be given a value."""
    experiment = _experiment(config, overrides, require="one_trial")
    from launcher.stages import run_train

    run_train(experiment=experiment, out=out)


@app.command(epilog="Example: unlearn sweep olmo-1b.yaml sweep.num_trials=4 --dry-run")
def sweep(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file of the experiment.", show_default=False)] = None,
    overrides: Overrides = None,
    config_option: Annotated[
        str | None, typer.Option("--config", "-c", metavar="CONFIG", help="The same as CONFIG.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the trials, run none.")] = False,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Keep what an earlier start of this run finished.")] = True,
) -> None:
    """Sweep trials, pick a pair, merge it, evaluate everything, write the report."""
    if config_option is not None:  # then the first argument is an override
        config, overrides = config_option, [*([config] if config else []), *(overrides or [])]
    if config is None:
        raise InputError("Missing argument CONFIG", where="unlearn sweep", fix="name a YAML file, such as one that `unlearn init` writes")
    experiment = _experiment(Path(config), overrides)
    from launcher.stages import run_sweep

    run_sweep(experiment=experiment, resume=resume, dry_run=dry_run)


@app.command(epilog="Example: unlearn merge --base target --trial trial-03 --trial trial-06 --out merged --density 0.8 --weights 1 1")
def merge(
    base: Annotated[Path, typer.Option(metavar="DIR", help="Model that every trial started from.", show_default=False)],
    trial: Annotated[list[Path], typer.Option(metavar="DIR", help="Adapter, checkpoint or trial folder; repeat it.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the merged model or adapter.", show_default=False)],
    method: Annotated[str, typer.Option(metavar="NAME", help=f"One of: {', '.join(METHODS)}.")] = "ties",
    convention: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Whose reading of TIES, at once: {', '.join(CONVENTIONS)}.", show_default=False)
    ] = None,
    density: Annotated[float | None, typer.Option(metavar="D", help="Fraction of each task vector kept, in (0, 1].")] = None,
    scale: Annotated[float | None, typer.Option(metavar="L", help="Factor on the merged task vector.")] = None,
    weights: Annotated[list[float] | None, typer.Option(metavar="W...", help="One factor per trial.", show_default=False)] = None,
    trim_scope: Annotated[str | None, typer.Option(metavar="tensor|model", help="ties: where the density holds.")] = None,
    trim_count: Annotated[str | None, typer.Option(metavar="floor|floor_plus_one", help="ties: elements kept of a whole model.")] = None,
    equal_magnitudes: Annotated[str | None, typer.Option(metavar="first|topk", help="ties: which of equal ones stay at a border.")] = None,
    elect: Annotated[str | None, typer.Option(metavar="unweighted|weighted", help="Signs elected before or after the weights.")] = None,
    divisor: Annotated[str | None, typer.Option(metavar="count|weight", help="What the mean of agreeing trials divides by.")] = None,
    zero_sum: Annotated[str | None, typer.Option(metavar="positive|drop|majority", help="The sign where values sum to zero.")] = None,
    epsilon: Annotated[float | None, typer.Option(metavar="E", help="della: half the range of keep probabilities.")] = None,
    gamma: Annotated[float | None, typer.Option(metavar="G", help="breadcrumbs: fraction dropped at the top.")] = None,
    rescale: Annotated[str | None, typer.Option(metavar="density|l1|none", help="dare, della: what makes up for the drop.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="dare, della: seed of the random masks.")] = None,
    output: Annotated[Output, typer.Option(help="Write a whole model, or a LoRA adapter of the base.")] = Output.model,
    rank: Annotated[
        int | None, typer.Option(metavar="R", min=1, help="--output adapter: highest rank; default: no loss if possible.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Merge adapters or full checkpoints onto their base, without a sweep. docs/merging.md describes the methods."""
    if plugin:
        from launcher.plugins import use_named

        use_named(plugin)
    config = _merge_config(
        method=method, convention=convention, density=density, scale=scale, weights=weights or None, trim_scope=trim_scope,
        trim_count=trim_count, equal_magnitudes=equal_magnitudes, elect=elect, divisor=divisor, zero_sum=zero_sum, epsilon=epsilon,
        gamma=gamma, rescale=rescale, seed=seed,
    )  # fmt: skip
    if weights and len(weights) != len(trial):
        raise InputError(f"{len(weights)} weights for {len(trial)} trials", where="--weights", fix="give one number per --trial")
    if output is Output.adapter:
        from launcher.console import progress_lines
        from merging.adapter_output import merge_adapter

        with progress_lines() as progress:
            record = merge_adapter(base=base, trials=trial, out=out, config=config, rank=rank, progress=progress)
        ranks = sorted({tensor["rank"] for tensor in record["tensors"].values()})
        text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        print(f"wrote {out}  ({config.formula()})")
        print(f"  adapter of {text}; {record['lost_energy']:.2%} of the merged update's squared norm is lost")
        return
    if rank is not None:
        raise InputError("--rank is read with --output adapter only", where="--rank", fix="leave it out, or add --output adapter")
    from launcher.allocation import reuse_freed_memory
    from launcher.console import progress_lines
    from merging.merge import merge_checkpoint

    reuse_freed_memory()
    with progress_lines() as progress:
        merge_checkpoint(base=base, trials=trial, out=out, config=config, progress=progress)
    print(f"wrote {out}  ({config.formula()})")


@app.command(epilog="Example: unlearn eval --model runs/quickstart/merged --data lume --mia mia --mmlu mmlu --out eval.json")
def eval(
    model: Annotated[Path, typer.Option(metavar="DIR", help="Model folder, or trial checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON file to write.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder in LUME, TOFU or MUSE layout, told by its files.", show_default=False)
    ] = None,
    mia: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with member.jsonl and nonmember.jsonl.")] = None,
    mmlu: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with dev/ and test/ of MMLU.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens generated per row; default: the benchmark's own.")
    ] = None,
    official: Annotated[bool, typer.Option("--official", help="The benchmark's exact settings, one row at a time (slow).")] = False,
    layout: Annotated[Benchmark | None, typer.Option(help="Say what the folder holds.")] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="TOFU: the forget set, such as forget10.")] = None,
    retained_model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="TOFU, MUSE: model trained without the forget set, to compare with.")
    ] = None,
    prompt: Annotated[
        Prompt | None, typer.Option(help="TOFU: plain (default: Question, Answer), bare, or the model's chat template.")
    ] = None,
    lm_eval: Annotated[str | None, typer.Option(metavar="TASKS", help="Tasks of lm-eval, such as hellaswag,arc_easy.")] = None,
    processes: Annotated[
        int, typer.Option(metavar="N", min=1, help="LUME: processes that share the rows; one GPU each, or the CPU's threads divided.")
    ] = 1,
    plugin: Plugins = None,
) -> None:
    """Score any checkpoint: by the official protocol (LUME), on TOFU or MUSE, on tasks of lm-eval."""
    from launcher.suites import evaluate_anything

    def lume(folder: Path) -> None:
        from launcher.stages import evaluate_model

        evaluate_model(model=model, data=folder, mia=mia, mmlu=mmlu, max_new_tokens=max_new_tokens, official=official, out=out,
                       processes=processes, plugins=plugin or ())  # fmt: skip

    evaluate_anything(
        model=model,
        data=data,
        out=out,
        layout=layout.value if layout else None,
        split=split,
        retained_model=retained_model,
        prompt=prompt.value if prompt else None,
        max_new_tokens=max_new_tokens,
        lm_eval=lm_eval,
        lume=lume,
        lume_only={"--mia": mia, "--mmlu": mmlu, "--official": official, "--processes": processes > 1, "--plugin": bool(plugin)},
    )


@app.command(epilog="Example: unlearn audit --model runs/quickstart/merged --base runs/quickstart/target --data lume --out audit.json")
def audit(
    model: Annotated[Path, typer.Option(metavar="DIR", help="Model folder, or trial checkpoint.", show_default=False)],
    base: Annotated[Path, typer.Option(metavar="DIR", help="The untouched target: the model before unlearning.", show_default=False)],
    data: Annotated[Path, typer.Option(metavar="DIR", help="LUME-layout folder.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON file to write; table and figure go beside it.", show_default=False)],
    never_seen: Annotated[
        Path | None, typer.Option("--never-seen", metavar="DIR", help="A model that never saw the forget set: the control.")
    ] = None,
    mia: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with member.jsonl and nonmember.jsonl.")] = None,
    mmlu: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with dev/ and test/ of MMLU.")] = None,
    attacks: Annotated[str | None, typer.Option(metavar="LIST", help="Attacks with commas between; default all.")] = None,
    documents: Annotated[int | None, typer.Option(metavar="N", min=2, help="Documents per task and set; default 10.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tokens generated per row; default 256.")] = None,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Seed of the sample and of the attacks.")] = 0,
) -> None:
    """Attack an unlearned model, and say whether the knowledge is gone or only hidden."""
    from launcher.audit import run_audit

    run_audit(
        model=model,
        base=base,
        data=data,
        out=out,
        never_seen=never_seen,
        mia=mia,
        mmlu=mmlu,
        attacks=attacks,
        documents=documents,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )


@app.command(epilog="Example: unlearn report runs/quickstart")
def report(run: RunFolder) -> None:
    """Rebuild the report of a run and the card of its model from its files."""
    from launcher.model_card import refresh_model_card
    from launcher.report import build_report
    from launcher.storage import bring_report

    folder = _run_folder(run)
    refresh_model_card(folder)
    print(f"wrote {bring_report(build_report(folder))}")


@app.command(epilog="Example: unlearn push runs/quickstart --repo my-team/olmo-1b-unlearned --dry-run")
def push(
    run: RunFolder,
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the Hugging Face hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; without it the repository is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, send nothing. Needs no key.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to send to; default: main.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Even a model that is judged dead.")] = False,
) -> None:
    """Upload a run's model with its card to the hub. The key comes from HF_TOKEN or `hf auth login`."""
    from launcher.push import push_run

    push_run(_run_folder(run), repo=repo, public=public, dry_run=dry_run, revision=revision, force=force)


@app.command(epilog="Example: unlearn status runs/quickstart")
def status(run: RunFolder) -> None:
    """Show how far a sweep has come, from its files."""
    from launcher.status import print_status

    print_status(_run_folder(run))


@app.command(epilog="Example: unlearn sync runs/olmo-1b")
def sync(run: RunFolder) -> None:
    """Upload what a run has written to Weights & Biases offline."""
    from launcher.tracking.sync import sync_run

    print(sync_run(_run_folder(run), environment=os.environ))


def _experiment(
    config: Path, overrides: Sequence[str] | None, *, require: Literal["one_trial", "target"] | None = None
) -> LoadedExperiment:
    """The checked experiment, before the stage's libraries are imported: a typo is told in a fraction of a second."""
    from launcher.load import load_experiment

    return load_experiment(config, overrides or (), require=require)


def _run_folder(run: Path) -> Path:
    from launcher.storage_place import given_uri, is_uri

    if is_uri(given_uri(run)):
        from launcher.storage import fetch_run

        return fetch_run(given_uri(run))
    if not run.is_dir():
        raise InputError("run folder not found", where=str(run), fix="give the folder that a sweep wrote, such as runs/quickstart")
    return run


def _merge_config(**options: Any) -> MergeConfig:
    from pydantic import ValidationError

    from launcher.problems import findings
    from merging.config import MergeConfig

    values = {name: value for name, value in options.items() if value is not None}
    try:
        return MergeConfig.model_validate(values)
    except ValidationError as error:
        problems = [problem for one in findings(error, root=MergeConfig, values=values, prefix="--") for problem in one.problems]
        raise InputError(
            "; ".join(f"{problem.left()} {problem.message}".removeprefix("--(root) ") for problem in problems),
            fix="see `unlearn merge --help`",
        ) from None


def expand_weights(arguments: Sequence[str]) -> list[str]:
    """``--weights 1 0.5`` as ``--weights 1 --weights 0.5``, which is how the parser takes several values."""
    result: list[str] = []
    inside = first = False
    for argument in arguments:
        if argument == "--weights":
            inside = first = True
            result.append(argument)
        elif inside and _is_number(argument):
            result += [argument] if first else ["--weights", argument]
            first = False
        else:
            inside = False
            result.append(argument)
    return result


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    # Threads that spin while they wait make small models ten times slower on a busy machine. Read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = expand_weights([argument for argument in arguments if argument != "--debug"])
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="unlearn", standalone_mode=False)
        if code == 130:  # the parser has already turned Ctrl-C into its exit code
            _tell_interrupted()
    except (KeyboardInterrupt, typer.Abort):
        code = _tell_interrupted()
    except UserFacingError as error:
        if debug:
            traceback.print_exc()
        code = _tell(f"{error.label}: {error}", error.exit_code)
    except typer.TyperException as error:
        # Wrong usage: the parser's own message, with the line that says how the command is called.
        error.show() if hasattr(error, "show") else _tell(f"input error: {error}", 2)
        code = error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = _tell_unexpected(error, debug=debug)
    sys.exit(code if isinstance(code, int) else 0)


def _tell_interrupted() -> int:
    # An interrupt that passes through text which a library evaluates is marked as unhandled by CPython, and the process would end
    # by a signal whatever its exit code (run_eval_code_obj in Python/pythonrun.c). Running any text takes the mark away.
    exec("")
    return _tell("interrupted", 130)


def _tell_unexpected(error: Exception, *, debug: bool) -> int:
    """A machine that gave out (exit code 3), or a mistake of ours (1)."""
    # The safetensors library reports the system's error numbers in words only.
    number = error.errno if isinstance(error, OSError) else errno.ENOSPC if "(os error 28)" in str(error) else None
    if number in _MACHINE_ERRORS:
        name = getattr(error, "filename", None)
        where = f"\n  where: {name}" if name else ""
        return _tell(f"environment error: {os.strerror(number)}{where}\n  fix: {_MACHINE_ERRORS[number]}", 3)
    first = (str(error).strip().splitlines() or [""])[0]
    hint = "" if debug else "\n  fix: run the command again with --debug to see where it comes from"
    return _tell(f"internal error: {type(error).__name__}: {first}{hint}", 1)


_MACHINE_ERRORS = {
    errno.ENOSPC: "free space on the disk, then run the same command again",
    errno.EDQUOT: "free space within the quota, then run the same command again",
    errno.EROFS: "write to a file system that is not read-only",
    errno.EACCES: "change the permissions, or write to another folder",
    errno.EPERM: "change the permissions, or write to another folder",
    errno.EMFILE: "raise the limit on open files: ulimit -n 65536",
    errno.ENFILE: "raise the machine's limit on open files",
    errno.EIO: "look at the disk: the system log says more",
    **dict.fromkeys(
        (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
        "bring the file system back, then run the same command again",
    ),
}
"""What to do about errors of the operating system that no input causes."""


def _tell(message: str, code: int) -> int:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    return code
