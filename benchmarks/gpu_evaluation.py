"""Evaluating a model of OLMo-1B's shape on a GPU: the official loop on a sample of rows, this framework on all of them.

    python benchmarks/gpu_evaluation.py --data DIR --tokenizer DIR --write

The model learns the rows by heart and unlearns half of them on the device: nothing is downloaded. Without a GPU the script says so
and ends well; ``--device cpu --model tiny`` tries it out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms.official import OfficialArm
from benchmarks.evaluation_arms import OfficialResult, Passes, compare, items, mixture, official_arm, run_official, run_ours
from benchmarks.memorised import Scene, build_scene
from benchmarks.models import OLMO_1B, TINY
from benchmarks.options import add_workload_options, shown_command
from benchmarks.results import Result, Table, publish
from eval.config import EvalConfig
from eval.report import EvalReport
from trainers.data.types import Record

SHAPES = {"olmo-1b": OLMO_1B, "tiny": TINY}


PUBLISH_EVERY_S = 10.0


@dataclass
class Ours:
    """What our evaluation took, and its report."""

    wall: list[float]
    passes: Passes
    report: EvalReport
    peak_gib: float | None


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_ours(scene: Scene, *, config: EvalConfig, device: str, runs: int) -> Ours:
    """One evaluation that is counted and not timed, then timed ones."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    counted, wall = Passes(), []
    with counted.count(scene.model):
        report = run_ours(scene, config=config, device=device)
    for _ in range(runs):
        wait(device)
        started = time.perf_counter()
        report = run_ours(scene, config=config, device=device)
        wait(device)
        wall.append(time.perf_counter() - started)
        print(f"ours: {wall[-1]:.2f} s for {len(items(scene))} rows and documents", file=sys.stderr)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else None
    return Ours(wall, counted, report, peak)


def time_official(scene: Scene, *, config: EvalConfig, device: str, seconds: float) -> Iterator[tuple[OfficialResult, Passes]]:
    """The official loop on rows spread over sets and lengths, until the seconds are spent; what it has found, now and then."""
    arm, found, counted = official_arm(scene, config=config, device=device), OfficialResult(), Passes()
    everything = items(scene)
    stride = max(1, len(everything) // 16)
    order = [index for start in range(stride) for index in range(start, len(everything), stride)]
    run_official(arm, everything[order[0]], into=OfficialResult())  # libraries may take their time when they are first used
    begun = shown = time.perf_counter()
    with counted.count(scene.model):
        for index in order:
            item = everything[index]
            wait(device)
            started = time.perf_counter()
            run_official(arm, item, into=found)
            wait(device)
            now = time.perf_counter()
            found.seconds[f"{type(item).__name__} {item.id}"] = now - started
            if now - begun > seconds:
                break
            if now - shown > PUBLISH_EVERY_S:
                shown = now
                yield found, counted
    yield found, counted


def describe(
    scene: Scene, *, ours: Ours, official: OfficialResult, counted: Passes, options: argparse.Namespace, command: str, config: EvalConfig
) -> Result:
    """The result of what has been measured so far."""
    number, sampled = len(items(scene)), len(official.seconds)
    per_ours, per_official = statistics.median(ours.wall) / number, statistics.mean(official.seconds.values())
    agreement = compare(official, ours.report.rows)
    slowest = max((seconds for name, seconds in official.seconds.items() if name.startswith(Record.__name__)), default=0.0)
    columns = ("arm", "rows and documents timed", "ms each", "forward passes each", "positions each", "÷ ours", "peak GiB")
    lines = [
        (OfficialArm.name, str(sampled), f"{1e3 * per_official:.1f}", f"{counted.passes / sampled:.2f}",
         f"{counted.positions / sampled:.0f}", f"{per_official / per_ours:.0f}", "–"),
        ("ours", str(number), f"{1e3 * per_ours:.2f}", f"{ours.passes.passes / number:.3f}", f"{ours.passes.positions / number:.0f}", "1",
         "–" if ours.peak_gib is None else f"{ours.peak_gib:.1f}"),
    ]  # fmt: skip
    return Result(
        theme="gpu_evaluation",
        title="Evaluating a memorised and unlearned model on a GPU",
        question="How long does the benchmark's evaluation take per row or document, by the official loop and by this framework?",
        command=command,
        settings={
            "model": f"{options.model}, {config.dtype}; {scene.history}",
            "rows": f"{scene.source}; {len(scene.attack.members)} members and {len(scene.attack.nonmembers)} non-members",
            "mixture": mixture(ours.report.rows),
            "limits": f"{config.max_new_tokens} new tokens, {config.batch_tokens} positions per pass of ours",
            "agreement": agreement.sentence,
            "runs": f"ours: {', '.join(f'{seconds:.2f}' for seconds in ours.wall)} s for everything, after one run that is not timed; "
            f"official: {sampled} rows and documents spread over the sets, the slowest row {slowest:.1f} s",
            "seed": options.seed,
        },
        tables=[Table(columns, lines)],
        reading=[
            "Wall time; ours includes ROUGE, intervals and the report.",
            "The official loop is timed on a sample, and its mean is compared with ours over everything.",
            "In bfloat16 a batch rounds differently from a row alone: near ties may fall the other way, as the agreement shows.",
        ],
    )


def main() -> None:
    """Build the scene, time ours on everything, then the official loop row by row; the result is published as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, num_pairs=192)
    parser.add_argument("--model", choices=SHAPES, default="olmo-1b")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default 256, the benchmark's")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="positions per forward pass of ours (default 16384)")
    parser.add_argument("--runs", type=int, default=2, help="timed evaluations by ours (default 2)")
    parser.add_argument("--build-seconds", type=float, default=40.0, help="for memorising, at most (default 40)")
    parser.add_argument("--official-seconds", type=float, default=30.0, help="for the official loop (default 30)")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("skipped: no CUDA device; --device cpu --model tiny tries the script out")
        return
    device, tiny = options.device, options.model == "tiny"
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    name: Any = str(dtype).removeprefix("torch.")
    config = EvalConfig(max_new_tokens=options.max_new_tokens, batch_tokens=options.batch_tokens, dtype=name)
    scene = build_scene(
        SHAPES[options.model],
        data=options.data,
        tokenizer=options.tokenizer,
        num_pairs=options.pairs,
        seed=options.seed,
        device=device,
        dtype=dtype,
        cut_vocabulary=tiny,
        learning_rate=2e-3 if tiny else 3e-4,
        batch_rows=16 if tiny else 48,
        max_seconds=options.build_seconds,
    )
    print(scene.history, file=sys.stderr)
    command = shown_command("benchmarks/gpu_evaluation.py", parser=parser, options=options)
    ours = time_ours(scene, config=config, device=device, runs=options.runs)
    for official, counted in time_official(scene, config=config, device=device, seconds=options.official_seconds):
        result = describe(scene, ours=ours, official=official, counted=counted, options=options, command=command, config=config)
        publish(result, write=options.write)


if __name__ == "__main__":
    main()
