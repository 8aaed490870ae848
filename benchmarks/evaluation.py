"""What an evaluation costs on a CPU: the benchmark's official loop and this framework, saying the same of every row.

python benchmarks/evaluation.py --data DIR --tokenizer DIR --write
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms.official import OfficialArm
from benchmarks.evaluation_arms import Agreement, OfficialResult, Passes, compare, items, mixture, official_arm, run_official, run_ours
from benchmarks.measure import Timing
from benchmarks.memorised import Scene, build_scene, lose_end_token
from benchmarks.models import TINY, Shape
from benchmarks.options import add_workload_options, shown_command
from benchmarks.results import Result, Table, described, publish
from eval.config import EvalConfig

EVALUATED = Shape("evaluated", hidden=256, layers=4, heads=4, intermediate=1024, vocabulary=4736, tied=False)
"""Large enough that a batch of one is not all Python, small enough to memorise rows in a minute or two; MLP to attention as in OLMo-1B."""
SMALL = Shape("small", hidden=128, layers=4, heads=4, intermediate=512, vocabulary=4736, tied=False)
"""A quarter of the arithmetic: here the official loop mostly waits for its own small operations."""
SHAPES = {"evaluated": EVALUATED, "small": SMALL, "tiny": TINY}
GOAL = 8.0


class ArmsDisagreeError(AssertionError):
    """The arms do not say the same: a comparison of their speed would mean nothing."""


def check(agreement: Agreement) -> None:
    """Refuse arms whose texts, scores or losses differ.

    Raises:
        ArmsDisagreeError: saying how far.
    """
    if not agreement.is_exact:
        raise ArmsDisagreeError(agreement.sentence)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor seconds of this process."""
    gc.collect()
    started = time.process_time()
    work()
    return time.process_time() - started


@dataclass(frozen=True)
class Comparison:
    """Both arms on one state of the model.

    Args:
        official: processor seconds of the official loop.
        ours: processor seconds of each of our evaluations.
        official_passes, our_passes: what they ran through the decoder.
        agreement: of their outputs.
        known: how much of each set the model knows.
    """

    official: float
    ours: Timing
    official_passes: Passes
    our_passes: Passes
    agreement: Agreement
    known: str

    @property
    def ratio(self) -> float:
        """Official ÷ ours."""
        return self.official / self.ours.median

    def lines(self, state: str) -> list[tuple[str, ...]]:
        """Two rows of the table."""
        return [
            (state, OfficialArm.name, f"{self.official:.1f}", "one run", f"{self.ratio:.1f}", str(self.official_passes.passes),
             f"{self.official_passes.passes / self.our_passes.passes:.0f}", str(self.official_passes.positions)),
            (state, "ours", f"{self.ours.median:.2f}", self.ours.spread, "1.0", str(self.our_passes.passes), "1",
             str(self.our_passes.positions)),
        ]  # fmt: skip


def compare_arms(scene: Scene, *, config: EvalConfig, repeats: int) -> Comparison:
    """The official loop once, in equal parts with an evaluation by ours after each; refused if their outputs differ.

    Raises:
        ArmsDisagreeError: saying how far.
    """
    everything, arm = items(scene), official_arm(scene, config=config, device="cpu")
    ours, theirs, found = Passes(), Passes(), OfficialResult()
    with ours.count(scene.model):
        report = run_ours(scene, config=config, device="cpu")
    run_official(arm, everything[0], into=OfficialResult())
    own_seconds, official_seconds = [], 0.0

    def part_of_official(part: int) -> None:
        for item in everything[part::repeats]:
            run_official(arm, item, into=found)

    for part in range(repeats):
        with theirs.count(scene.model):
            official_seconds += cpu_seconds(lambda part=part: part_of_official(part))  # type: ignore[misc]
        own_seconds.append(cpu_seconds(lambda: run_ours(scene, config=config, device="cpu")))
    agreement = compare(found, report.rows)
    check(agreement)
    return Comparison(official_seconds, Timing(tuple(own_seconds)), theirs, ours, agreement, mixture(report.rows))


def main() -> None:
    """Build the scene, compare the arms on it, take the model's end token away and compare them again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, num_pairs=32)
    parser.add_argument("--model", choices=SHAPES, default="evaluated")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default 256, the benchmark's")
    parser.add_argument("--repeats", type=int, default=3, help="evaluations by ours, between equal parts of the official loop (default 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES[options.model]
    # The official loop has no intervals, so ours draws none to speak of.
    config = EvalConfig(max_new_tokens=options.max_new_tokens, dtype="float32", bootstrap_samples=1)
    scene = build_scene(shape, data=options.data, tokenizer=options.tokenizer, num_pairs=options.pairs, seed=options.seed)
    print(scene.history, file=sys.stderr)
    found = {"as unlearned": compare_arms(scene, config=config, repeats=options.repeats)}
    lose_end_token(scene)
    found["end token lost"] = compare_arms(scene, config=config, repeats=options.repeats)
    goals = ", ".join(f"{state}: {'reached' if one.ratio >= GOAL else 'missed'} ({one.ratio:.1f})" for state, one in found.items())
    publish(
        Result(
            theme="evaluation" if options.model == "evaluated" else f"evaluation_{options.model}",
            title="Evaluating a memorised and unlearned model on a CPU",
            question="How much processor time does the benchmark's evaluation take, by the official loop and by this framework?",
            command=shown_command("benchmarks/evaluation.py", parser=parser, options=options),
            settings={
                "model": f"{described(shape)}, float32; {scene.history}",
                "rows": f"{scene.source}; {len(scene.attack.members)} members and {len(scene.attack.nonmembers)} non-members; "
                f"{len(items(scene))} in all",
                **{f"known, {state}": one.known for state, one in found.items()},
                **{f"agreement, {state}": one.agreement.sentence for state, one in found.items()},
                "limits": f"{config.max_new_tokens} new tokens",
                "runs": f"the official loop once, in {options.repeats} parts, ours after each part and once before, uncounted",
                "goal": f"official ÷ ours at least {GOAL:.0f}; {goals}",
                "seed": options.seed,
            },
            tables=[
                Table(
                    ("model", "arm", "CPU-s", "range", "÷ ours", "forward passes", "÷ ours", "token positions"),
                    [line for state, one in found.items() for line in one.lines(state)],
                )
            ],
            reading=[
                "CPU-s are processor seconds of one thread, for everything; both include ROUGE, ours the report, but no intervals.",
                "Whole texts, all scores and (to 1e-4) all losses are the same in both arms; else nothing is reported.",
                "Forward passes and positions do not wobble; a pass of ours holds many rows.",
                "The teacher-forced pass costs both arms the same arithmetic: the fewer tokens a model generates, the smaller the ratio.",
                "Models unlearned by pushing whole answers away lose their end token and generate to the limit: the second state.",
            ],
        ),
        write=options.write,
    )


if __name__ == "__main__":
    main()
