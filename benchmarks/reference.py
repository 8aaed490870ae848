"""What the frozen reference costs a sweep: a forward pass with every batch of every trial, or one pass that all trials read.

python benchmarks/reference.py --data DIR --tokenizer DIR --write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms.ours import reference_pass, train_config
from benchmarks.arms.recipe import ReferencePasses
from benchmarks.flops import Volume, forward_flops
from benchmarks.measure import time_interleaved
from benchmarks.models import BENCH, OLMO_1B, OLMO_7B, Shape, build_base, freeze
from benchmarks.options import add_workload_options, shown_command
from benchmarks.results import Result, Table, described, publish
from benchmarks.workload import Settings, build_workload, whole_set
from trainers.data.encode import EncodedRow
from trainers.scoring import ScoringModel


def flops_table(rows: Sequence[EncodedRow], *, settings: Settings, trials: int, epochs: int) -> Table:
    """Reference FLOPs of a sweep over whole sets, by formula."""
    lines = []
    for shape in (BENCH, OLMO_1B, OLMO_7B):
        padded = forward_flops(shape, Volume.of(rows, padded_to=settings.padded_length)) * trials * epochs
        once = one_pass_flops(shape, rows)
        ratio = padded / once
        lines.append((shape.name, f"{padded / 1e15:,.2f}", f"{once / 1e15:,.4f}", f"{ratio:.0f}", f"{ratio / (trials * epochs):.2f}"))
    columns = ("model", "recipe, PFLOP", "ours, PFLOP", "÷", "÷ per trial and epoch")
    return Table(columns, lines, title=f"By formula, whole sets, {trials} trials of {epochs} epochs.")


def one_pass_flops(shape: Shape, rows: Sequence[EncodedRow]) -> int:
    """The cached pass: real tokens, and at answer tokens the head twice, the second time for the mean embedding."""
    volume = Volume.of(rows)
    return forward_flops(shape, volume) + volume.scored * shape.head_flops


def main() -> None:
    """Count over the whole sets, time over some pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, num_pairs=32)
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions (default 5)")
    parser.add_argument("--trials", type=int, default=16, help="trials of the sweep (default 16)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each trial (default 5)")
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
    )
    base = build_base(BENCH, seed=options.seed)
    recipe = ReferencePasses(freeze(base), workload=workload, settings=settings)
    model = ScoringModel(freeze(base))
    train = train_config(settings)

    def once() -> None:
        reference_pass(model, forget=workload.forget, retain=workload.retain, train=train)

    def epoch() -> None:
        for pair in range(workload.num_pairs):
            recipe.run(pair)

    timings = time_interleaved({"recipe": [epoch], "ours": [once]}, repeats=options.repeats, units=workload.num_pairs)
    per_epoch = timings["recipe"].median / timings["ours"].median
    sweep = options.trials * options.epochs
    forget, retain = whole_set(options.data, tokenizer=options.tokenizer, vocabulary=BENCH.vocabulary, seed=options.seed)
    measured = Table(
        ("what", "CPU-s per pair, median", "range", f"CPU-s per pair and sweep ({options.trials} x {options.epochs})", "÷ ours"),
        [
            ("recipe, every epoch of every trial", f"{timings['recipe'].median:.4f}", timings["recipe"].spread,
             f"{timings['recipe'].median * sweep:.3f}", f"{per_epoch * sweep:.0f}"),
            ("ours, once", f"{timings['ours'].median:.4f}", timings["ours"].spread, f"{timings['ours'].median:.3f}", "1"),
        ],
        title=f"Measured on {BENCH.name}: {per_epoch:.2f} per trial and epoch.",
    )  # fmt: skip
    publish(
        Result(
            theme="reference",
            title="The frozen reference in a sweep",
            question="What does the frozen reference cost a sweep?",
            command=shown_command("benchmarks/reference.py", parser=parser, options=options),
            settings={
                "model": f"{described(BENCH)}, float32, random weights",
                "rows": f"{workload.source}; tokens per pair: {workload.tokens_per_pair:.1f} real, {2 * settings.padded_length} padded",
                "runs": f"{options.repeats} repetitions over {workload.num_pairs} pairs, interleaved, after one that is not counted",
                "seed": options.seed,
            },
            tables=[measured, flops_table([*forget, *retain], settings=settings, trials=options.trials, epochs=options.epochs)],
            reading=[
                "The recipe's reference passes are measured as its step makes them, with labels; the sweep's number is that times trials "
                "and epochs, because every step makes them anew.",
                "Ours is the pass as a sweep makes it, without writing its file.",
                "By formula rows longer than the recipe's length count in full for ours and cut for the recipe.",
            ],
        ),
        write=options.write,
    )


if __name__ == "__main__":
    main()
