"""What one optimizer step costs: the published recipe's, a careful script's and this framework's, computing the same numbers.

python benchmarks/step.py --data DIR --tokenizer DIR --write
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms.base import Arm
from benchmarks.arms.dynamic import DynamicArm
from benchmarks.arms.ours import OursArm
from benchmarks.arms.recipe import RecipeArm
from benchmarks.counters import count_operations, peak_bytes
from benchmarks.gate import Difference, check_arms_agree
from benchmarks.measure import Timing, time_interleaved
from benchmarks.models import BENCH, Shape, build_base, build_policy, freeze
from benchmarks.options import add_workload_options, shown_command
from benchmarks.results import Result, Table, described, publish
from benchmarks.workload import Settings, Workload, build_workload

OURS = OursArm.name


def build_arms(shape: Shape, *, workload: Workload, settings: Settings, seed: int) -> list[Arm]:
    """All arms, from the same base and the same adapters; the recipe comes first, so the others are compared with it."""
    base = build_base(shape, seed=seed)

    def policy() -> object:
        return build_policy(base, settings=settings, seed=seed)

    return [
        RecipeArm(policy=policy(), reference=freeze(base), workload=workload, settings=settings),
        DynamicArm(policy=policy(), reference=freeze(base), workload=workload, settings=settings),
        DynamicArm(policy=policy(), reference=freeze(base), workload=workload, settings=settings, as_trainers_do=True),
        OursArm(policy=policy(), workload=workload, settings=settings),
    ]


def run_pass(arm: Arm, *, steps: Sequence[Sequence[int]]) -> None:
    """One optimizer step after the other over all pairs."""
    for pairs in steps:
        arm.step(pairs)


def table(timings: dict[str, Timing], *, operations: dict[str, float], peaks: dict[str, int], differences: Sequence[Difference]) -> Table:
    """One line per arm."""
    apart = {one.arm: f"{one.loss:.0e} / {one.gradient:.0e}" for one in differences}
    lines = [
        (
            name,
            f"{timing.median:.4f}",
            timing.spread,
            f"{timing.median / timings[OURS].median:.1f}",
            f"{operations[name]:,.0f}",
            f"{operations[name] / operations[OURS]:.1f}",
            f"{peaks[name] / 1e6:.0f}",
            apart.get(name, "the first"),
        )
        for name, timing in timings.items()
    ]
    columns = (
        "arm", "CPU-s per pair, median", "range", "÷ ours", "operations per pair", "÷ ours", "peak live MB", "loss / gradient difference",
    )  # fmt: skip
    return Table(columns, lines)


def main() -> None:
    """Check that all arms agree, then count, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, num_pairs=16)
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions of a pass over all pairs (default 5)")
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="LoRA dropout of the timed arms (default 0; the recipe trains with 0.05)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)

    settings = Settings()
    workload = build_workload(
        options.data,
        tokenizer=options.tokenizer,
        num_pairs=options.pairs,
        vocabulary=BENCH.vocabulary,
        max_tokens=settings.padded_length,
        seed=options.seed,
        group=settings.pairs_per_step,
    )
    steps = workload.steps(pairs_per_step=settings.pairs_per_step)
    arms = build_arms(BENCH, workload=workload, settings=settings, seed=options.seed)
    differences = check_arms_agree(arms, pairs=steps[0])
    if options.dropout:
        settings = dataclasses.replace(settings, lora_dropout=options.dropout)
        arms = build_arms(BENCH, workload=workload, settings=settings, seed=options.seed)
    operations, peaks = {}, {}
    for arm in arms:
        arm.step(steps[0])  # the optimizer's state is made in its first step
        operations[arm.name] = count_operations(lambda arm=arm: run_pass(arm, steps=steps)).total / workload.num_pairs
        peaks[arm.name] = max(peak_bytes(lambda arm=arm, pairs=pairs: arm.step(pairs), tensors=arm.tensors()) for pairs in steps)
    work = {arm.name: [lambda arm=arm, pairs=pairs: arm.step(pairs) for pairs in steps] for arm in arms}
    timings = time_interleaved(work, repeats=options.repeats, units=workload.num_pairs)
    padded = workload.padded_per_pair(group=settings.pairs_per_step)
    publish(
        Result(
            theme="step" if not options.dropout else "step_dropout",
            title="One unlearning step on a CPU",
            question="How much processor time, how many operations and how much memory does one unlearning step take, per pair of rows?",
            command=shown_command("benchmarks/step.py", parser=parser, options=options),
            settings={
                "model": f"{described(BENCH)}, float32, random weights",
                "step": described(settings),
                "rows": f"{workload.source}; tokens per pair: {workload.tokens_per_pair:.1f} real, {workload.scored_per_pair:.1f} of them "
                f"in answers; {padded:.1f} filled to the longest of {settings.pairs_per_step}; {2 * settings.padded_length} as published",
                "runs": f"{options.repeats} passes over {workload.num_pairs} pairs per arm, interleaved, after one that is not counted",
                "seed": options.seed,
            },
            tables=[table(timings, operations=operations, peaks=peaks, differences=differences)],
            reading=[
                "CPU-s are processor seconds of one thread; the arms take turns step by step.",
                "Operations are dispatched aten operations that compute something (no views); on a GPU each is at least one launch.",
                "Peak live bytes are those of all tensors, weights, optimizer state and reference included, in the costliest step.",
                "Differences are relative to the recipe's first step, before anything was timed.",
                "The reference of our arm was computed before: benchmarks/reference.py measures it.",
            ],
        ),
        write=options.write,
    )


if __name__ == "__main__":
    main()
