"""The whole story on a CPU: data, target, sweep, pair, merge, report."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from launcher.console import Console
from launcher.load import load_experiment
from launcher.stages import run_sweep
from trainers.errors import InputError

SYNTHETIC_DOCUMENTS = 32
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
    out = Path(out)
    settings = [f"storage_path={out.parent}", f"name={out.name}", f"seed={seed}", f"target.seed={seed}"]
    if data is None:
        folder = _synthetic(out / "data", documents=documents or SYNTHETIC_DOCUMENTS, seed=seed)
        settings += [f"data.path={folder / 'lume'}", f"data.mia={folder / 'mia'}", f"data.mmlu={folder / 'mmlu'}"]
    else:
        settings += [f"data.path={data}", f"data.documents={documents or REAL_DOCUMENTS}"]
        settings += ["data.mmlu_questions=48", "data.mmlu_max_words=40", "target.tiny.vocab_size=4096", "target.num_train_epochs=120"]
        settings += [f"data.mia={mia if mia is not None else 'null'}", f"data.mmlu={mmlu if mmlu is not None else 'null'}"]
    with resources.as_file(resources.files("launcher") / "recipes" / "quickstart.yaml") as recipe:
        experiment = load_experiment(recipe, settings)
    return run_sweep(experiment=experiment, resume=True, console=console)


def _synthetic(folder: Path, *, documents: int, seed: int) -> Path:
    from trainers.data.synthetic import write_synthetic_benchmark
    from trainers.files import read_json

    wanted = {"documents_per_task": documents, "seed": seed}
    if (folder / "manifest.json").exists():
        known = read_json(folder / "manifest.json")
        found = {key: known.get("parameters", known).get(key, known.get(key)) for key in wanted}
        if found != wanted:
            raise InputError(f"the run folder holds synthetic documents made with {found}, not {wanted}", where=str(folder),
                             fix="use the same options again, or another --out")  # fmt: skip
        return folder
    # Twice as many strangers as members: scoring them costs little and steadies the attack's AUC.
    write_synthetic_benchmark(folder, documents_per_task=documents, attack_documents=2 * documents, seed=seed)
    return folder
