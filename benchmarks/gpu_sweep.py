"""A sweep of OLMo-1B's shape from random weights through the whole pipeline, and one trial of OLMo-7B's shape, on GPUs.

    python benchmarks/gpu_sweep.py --data DIR --tokenizer DIR --write

What the planner expects of a GPU stands beside what a trial held of it. Skips without a GPU; ``--device cpu --model tiny`` tries it out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import OLMO_1B, OLMO_7B, TINY, Shape, build_base
from benchmarks.options import shown_command
from benchmarks.results import Result, Table, described, publish
from launcher.data import prepare_data
from launcher.load import load_experiment
from launcher.results import FILE as RESULTS
from launcher.stages import plan_sweep, run_sweep
from trainers.files import read_json, read_jsonl
from trainers.memory import GIB

SHAPES = {"olmo-1b": OLMO_1B, "tiny": TINY}


def write_base(folder: Path, *, shape: Shape, tokenizer: Path | None, texts: list[str], seed: int, dtype: torch.dtype) -> Path:
    """A model folder with random weights and a tokenizer."""
    from trainers.modeling import load_tokenizer
    from trainers.tiny import train_tokenizer

    words = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(texts, vocab_size=min(shape.vocabulary, 300))
    model = build_base(shape, seed=seed, dtype=dtype)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, words.eos_token_id, words.pad_token_id
    model.save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


def experiment_values(
    name: str, *, root: Path, data: Mapping[str, Any], model: Mapping[str, Any], trials: int, on_gpu: bool
) -> dict[str, Any]:
    """A sweep of LoRA trials whose sharding the planner chooses."""
    dtype = "bfloat16" if on_gpu else "float32"
    return {
        "name": name,
        "storage_path": str(root),
        "model": {"model_name_or_path": None, "dtype": dtype, **{key: value for key, value in model.items() if key != "target"}},
        "target": model.get("target"),
        "data": dict(data),
        "train": {
            "objective": {"name": "npo_ce_kl", "forget_weight": {"values": [0.3, 0.6]}},
            "learning_rate": {"min": 1e-4, "max": 1e-3, "distribution": "log_uniform"},
            "num_train_epochs": 3,
            "train_batch_size": 8,
            "per_device_train_batch_size": None,
            "forget_scope": "document",
            "lora": {"r": 32, "lora_alpha": 32},
            "engine": {"name": "deepspeed", "zero_stage": None, "ranks": None, "dtype": dtype},
            "checkpoints": 2,
            "signals": 2,
        },
        "sweep": {"num_trials": trials, "search": "sobol", "cpus_per_rank": 2 if on_gpu else 1},
        "eval": {"dtype": dtype, "max_new_tokens": 64, "bootstrap_samples": 200},
        "pairs": {"max_pairs": 4, "calibrated": 1, "finalists": 1, "min_mmlu_fraction": 0.0},
        "tracking": {"wandb": "off"},
    }


def sweep(values: Mapping[str, Any], *, root: Path) -> tuple[list[tuple[str, ...]], dict[str, float], str]:
    """Run a sweep to its report; a line per trial, seconds per stage, and the verdict."""
    file = root / f"{values['name']}.json"
    file.write_text(json.dumps(values, indent=2), encoding="utf-8")
    experiment = load_experiment(file)
    run = experiment.config.run_folder
    try:
        run_sweep(experiment=experiment)
    except Exception as error:
        # A sweep whose trials are all dead or untouched still is one: its report says so.
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    # The target exists now, so that the planner knows its shape.
    plan = plan_sweep(
        load_experiment(file, [f"model.model_name_or_path={read_json(run / 'target.json')['path']}"]), data=prepare_data(experiment.config)
    )
    lines = []
    for spec in plan.specs:
        status, sharding = read_json(run / "trials" / spec.name / "status.json"), plan.trials[spec.name].sharding
        steps = read_jsonl(run / "trials" / spec.name / "metrics.jsonl")
        peak = status.get("peak_gpu_bytes")
        lines.append(
            (
                f"{values['name']} {spec.name}",
                str(status["state"]),
                str(spec.config.engine.ranks),
                str(spec.config.per_device_train_batch_size),
                "–" if sharding is None else f"{sharding.estimate.total / GIB:.1f}",
                "–" if peak is None else f"{peak / GIB:.1f}",
                str(len(steps)),
                f"{1e3 * sorted(step['seconds'] for step in steps)[len(steps) // 2]:.0f}" if steps else "–",
                f"{status.get('seconds') or 0:.0f}",
            )
        )
    results = read_json(run / RESULTS)
    return lines, results["timings"], str(results["verdict"]["sentence"])


def main() -> None:
    """Write the models, run both sweeps, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="LUME folder; default: synthetic rows")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of OLMo's tokenizer; needed with --data")
    parser.add_argument("--model", choices=SHAPES, default="olmo-1b")
    parser.add_argument("--trials", type=int, default=4, help="of the sweep (default 4)")
    parser.add_argument("--documents", type=int, default=12, help="per task and set (default 12)")
    parser.add_argument("--target-epochs", type=int, default=30, help="of memorising, at most (default 30)")
    parser.add_argument("--no-7b", action="store_true", help="leave the trial of OLMo-7B's shape out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("skipped: no CUDA device; --device cpu --model tiny --no-7b tries the script out")
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data, texts = _data(options, root=root)
        dtype = torch.bfloat16 if on_gpu else torch.float32
        shape = SHAPES[options.model]
        base = write_base(root / "base", shape=shape, tokenizer=options.tokenizer, texts=texts, seed=options.seed, dtype=dtype)
        target = {"base": str(base), "num_train_epochs": options.target_epochs, "learning_rate": 3e-4 if on_gpu else 1e-2,
                  "min_general_knowledge": 0.0, "seed": options.seed}  # fmt: skip
        values = experiment_values("sweep", root=root, data=data, model={"target": target}, trials=options.trials, on_gpu=on_gpu)
        lines, timings, verdict = sweep(values, root=root)
        if not options.no_7b:
            large = write_base(root / "large", shape=OLMO_7B, tokenizer=options.tokenizer, texts=texts, seed=options.seed, dtype=dtype)
            one = experiment_values("7b", root=root, data=data | {"documents": 3}, model={"model_name_or_path": str(large)}, trials=1,
                                    on_gpu=on_gpu)  # fmt: skip
            one["train"] |= {"num_train_epochs": 1, "checkpoints": 1, "signals": 1}
            one["eval"] |= {"max_new_tokens": 8}
            more, _, _ = sweep(one, root=root)
            lines += more
        publish(
            Result(
                theme="gpu_sweep",
                title="A sweep of OLMo-1B's shape from random weights, and a trial of OLMo-7B's",
                question="Does the whole pipeline run on a GPU, and does a trial take of it what the planner expects?",
                command=shown_command("benchmarks/gpu_sweep.py", parser=parser, options=options),
                settings={
                    "models": f"{described(shape)}" + ("" if options.no_7b else f"; {described(OLMO_7B)}"),
                    "rows": f"{'LUME' if options.data else 'synthetic'}, {options.documents} documents per task and set",
                    "stages": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in timings.items()),
                    "verdict": verdict,
                    "all": f"{time.perf_counter() - started:.0f} s",
                    "seed": options.seed,
                },
                tables=[
                    Table(
                        ("trial", "state", "ranks", "micro-batch", "planned GiB", "measured peak GiB", "steps", "ms per step", "s"), lines
                    )
                ],
                reading=["Measured is what torch's allocator held at most while the trial trained; the planner counts the same."],
            ),
            write=options.write,
        )


def _data(options: argparse.Namespace, *, root: Path) -> tuple[dict[str, Any], list[str]]:
    if options.data is not None:
        return {"path": str(options.data), "documents": options.documents}, []
    from trainers.data.records import load_forget_retain
    from trainers.data.synthetic import write_synthetic_benchmark

    write_synthetic_benchmark(root / "rows", documents_per_task=options.documents, seed=options.seed)
    found = load_forget_retain(root / "rows" / "lume")
    texts = [row.text for row in (*found.forget, *found.retain)]
    return {"path": str(root / "rows" / "lume"), "mia": str(root / "rows" / "mia"), "mmlu": str(root / "rows" / "mmlu")}, texts


if __name__ == "__main__":
    main()
