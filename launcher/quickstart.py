"""The whole story on a CPU: data, target, sweep, pair, merge, report."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from launcher.console import Console
from launcher.load import escape_text, load_experiment
from launcher.run_folder import RESOLVED, check_run_place, run_place
from launcher.stages import run_sweep
from launcher.yaml_text import dump_values
from trainers.errors import InputError
from trainers.files import read_json

SYNTHETIC_DOCUMENTS = 24
"""Synthetic documents per task and set, where no number is asked for."""
REAL_DOCUMENTS = 12
"""Real documents per task and set, where no number is asked for: they are several times longer."""


def run_quickstart(
    *, out: Path, data: Path | None, mia: Path | None, mmlu: Path | None, documents: int | None, seed: int, console: Console | None = None
) -> Path:
    """Run the recipe ``quickstart.yaml`` in ``out``; the same call again goes on where it stopped.

    Without ``data`` a synthetic benchmark is written to ``out/data`` first; with it, a document-wise subset of a folder in LUME layout is
    used, and ``mia`` and ``mmlu`` add the membership attack and general knowledge.

    Raises:
        InputError: for options that do not fit together, or unusable data.
    """
    if data is None and (mia is not None or mmlu is not None):
        raise InputError("--mia and --mmlu go with --data", why="the synthetic benchmark has documents and questions of its own",
                         fix="give --data, or leave them out")  # fmt: skip
    storage_path, name = run_place(out)
    run = Path(storage_path) / name
    check_run_place(run)
    settings = [_setting("storage_path", storage_path), _setting("name", name), f"seed={seed}", f"target.seed={seed}", f"train.seed={seed}"]
    if data is None:
        folder = _synthetic(run, documents=SYNTHETIC_DOCUMENTS if documents is None else documents, seed=seed)
        settings += [_setting(f"data.{key}", folder / part) for key, part in (("path", "lume"), ("mia", "mia"), ("mmlu", "mmlu"))]
    else:
        settings += [_setting("data.path", data), f"data.documents={documents or REAL_DOCUMENTS}"]
        settings += ["data.mmlu_questions=48", "data.mmlu_max_words=40", "target.tiny.vocab_size=4096", "target.num_train_epochs=80"]
        # One wrong token in the middle of a long completion spoils the rest of it when it is generated.
        settings += ["target.min_regurgitation=0.995", "eval.max_new_tokens=128"]
        settings += [_setting("data.mia", mia), _setting("data.mmlu", mmlu)]
    with resources.as_file(resources.files("launcher") / "recipes" / "quickstart.yaml") as recipe:
        experiment = load_experiment(recipe, settings)
    return run_sweep(experiment=experiment, resume=True, console=console)


def _setting(key: str, value: Path | str | None) -> str:
    """An override with exactly this text, whatever YAML or an interpolation would make of it."""
    return f"{key}={dump_values(None if value is None else escape_text(str(value)))}"


def _synthetic(run: Path, *, documents: int, seed: int) -> Path:
    from trainers.data.synthetic import MAX_DOCUMENTS, MIN_DOCUMENTS, write_synthetic_benchmark

    if not MIN_DOCUMENTS <= documents <= MAX_DOCUMENTS:
        raise InputError(
            f"{documents} synthetic documents per task and set",
            where="--documents",
            why="three folds need three documents" if documents < MIN_DOCUMENTS else "there are names for that many only",
            fix=f"give a number from {MIN_DOCUMENTS} to {MAX_DOCUMENTS}",
        )
    folder = run / "data"
    wanted = {"documents_per_task": documents, "seed": seed}
    if (folder / "manifest.json").exists():
        known = read_json(folder / "manifest.json")
        found = {key: known.get("parameters", known).get(key, known.get(key)) for key in wanted}
        if found != wanted:
            raise InputError(f"the run folder holds synthetic documents made with {found}, not {wanted}", where=str(folder),
                             fix="use the same options again, or another --out")  # fmt: skip
        return folder
    if (run / RESOLVED).exists():
        raise InputError("the run folder belongs to a run on other data", where=str(run), fix="give its --data again, or another --out")
    # Twice as many strangers as members: scoring them costs little and steadies the attack's AUC.
    write_synthetic_benchmark(folder, documents_per_task=documents, attack_documents=2 * documents, seed=seed)
    return folder
