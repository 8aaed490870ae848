"""Steps of OLMo's real shapes on a GPU: the published recipe beside this framework, adapters and all parameters.

    python benchmarks/gpu_step.py --data DIR --tokenizer DIR --write

Weights are random and made on the device: nothing is downloaded. Without a GPU the script says so and ends well; ``--device cpu
--models tiny`` tries it out.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms.base import Arm
from benchmarks.arms.ours import OursArm, train_config
from benchmarks.arms.recipe import RecipeArm
from benchmarks.flops import Volume, needed_flops, recipe_flops
from benchmarks.gate import check_arms_agree
from benchmarks.models import BENCH, OLMO_1B, OLMO_7B, TINY, Shape, adapt, build_base, build_policy, freeze
from benchmarks.options import add_workload_options, shown_command
from benchmarks.planner import planned_gib
from benchmarks.results import Result, Table, described, hardware, publish
from benchmarks.workload import Settings, Workload, build_workload
from trainers.distributed import Rank, file_init_method, start_process_group, stop_process_group

SHAPES = {"olmo-1b": OLMO_1B, "olmo-7b": OLMO_7B, "tiny": TINY}
PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}
"""Dense bfloat16 peaks of data sheets; the first name that the device's name contains counts."""


@dataclass(frozen=True)
class Case:
    """One line of the result.

    Args:
        shape: of the model.
        lora: whether adapters are trained, or all parameters.
        arm: recipe or ours.
    """

    shape: Shape
    lora: bool
    arm: str


@dataclass(frozen=True)
class Measured:
    """What a case took.

    Args:
        seconds: wall seconds per pair in each pass over the workload.
        first_loss: of the first step, to be compared between the arms.
        peak_gib: most memory allocated while steps run, or None where the device does not count it.
    """

    seconds: tuple[float, ...]
    first_loss: float
    peak_gib: float | None


def build_arm(case: Case, *, workload: Workload, settings: Settings, device: str, dtype: torch.dtype, seed: int) -> Arm:
    """The arm of a case, alone on the device.

    Without adapters the recipe updates its bfloat16 weights directly, which needs the least memory; ours keeps float32 masters.
    """
    model = build_base(case.shape, seed=seed, dtype=dtype, device=device)
    policy = adapt(model, settings=settings, seed=seed) if case.lora else model.requires_grad_(True)
    if case.arm == RecipeArm.name:
        reference = build_base(case.shape, seed=seed, dtype=dtype, device=device).requires_grad_(False)
        return RecipeArm(policy=policy, reference=reference, workload=workload, settings=settings)
    return OursArm(policy=policy, workload=workload, settings=settings, train=case_config(case, settings=settings, dtype=dtype))


def case_config(case: Case, *, settings: Settings, dtype: torch.dtype) -> Any:
    """Our configuration of a case: the plain engine for adapters, DeepSpeed for all parameters."""
    name = str(dtype).removeprefix("torch.")
    return train_config(settings, lora=case.lora, dtype=name, engine="torch" if case.lora else "deepspeed")


def measure(case: Case, *, workload: Workload, settings: Settings, options: argparse.Namespace, dtype: torch.dtype) -> Measured:
    """Build the case's arm, run what is not counted, then time passes.

    Ours runs over all pairs. The recipe takes a pair at a time and fills every row to the same length, so that a few pairs tell its time:
    after the first step, which shows that both arms compute the same loss.
    """
    device = options.device
    on_gpu = device.startswith("cuda")
    arm = build_arm(case, workload=workload, settings=settings, device=device, dtype=dtype, seed=options.seed)
    steps = workload.steps(pairs_per_step=settings.pairs_per_step)
    losses = [arm.step(pairs) for pairs in (steps[:1] if case.arm == RecipeArm.name else steps)]
    if case.arm == RecipeArm.name:
        steps = [range(min(options.recipe_pairs, workload.num_pairs))]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.passes):
        _wait(device)
        started = time.perf_counter()
        for pairs in steps:
            arm.step(pairs)
        _wait(device)
        seconds.append((time.perf_counter() - started) / sum(map(len, steps)))
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    if isinstance(arm, OursArm):
        arm.close()
    return Measured(tuple(seconds), losses[0], peak)


def check_on_device(*, settings: Settings, data: argparse.Namespace, device: str) -> str:
    """Both arms of the small model in float32 on this device: the same loss and gradient, or an error."""
    small = dataclasses.replace(settings, lora_r=4, pairs_per_step=Settings().pairs_per_step)
    workload = _workload(data, vocabulary=BENCH.vocabulary, settings=small)
    base = build_base(BENCH, seed=data.seed, device=device)
    arms: list[Arm] = [
        RecipeArm(policy=build_policy(base, settings=small, seed=data.seed), reference=freeze(base), workload=workload, settings=small),
        OursArm(policy=build_policy(base, settings=small, seed=data.seed), workload=workload, settings=small),
    ]
    (apart,) = check_arms_agree(arms, pairs=range(min(small.pairs_per_step, workload.num_pairs)))
    return f"loss {apart.loss:.0e}, gradient {apart.gradient:.0e}"


def line(case: Case, measured: Measured | None, *, workload: Workload, settings: Settings, dtype: torch.dtype, peak: float) -> list[str]:
    """A case as a row of the table; None stands for a case that did not fit."""
    trained = f"LoRA r={settings.lora_r}" if case.lora else "all parameters"
    name = [case.shape.name, trained, case.arm]
    planned = "–"
    if case.arm == OursArm.name:
        planned = f"{planned_gib(shape=case.shape, train=case_config(case, settings=settings, dtype=dtype), workload=workload):.1f}"
    if measured is None:
        return [*name, "out of memory", *["–"] * 5, planned, "–"]
    rows, pairs = workload.forget + workload.retain, workload.num_pairs
    lora_r = settings.lora_r if case.lora else None
    seconds = statistics.median(measured.seconds)
    needed = needed_flops(case.shape, Volume.of(rows), lora_r=lora_r) / pairs
    executed = recipe_flops(case.shape, Volume.of(rows, padded_to=settings.padded_length), lora_r=lora_r) / pairs
    return [
        *name,
        f"{1e3 * seconds:.2f}",
        f"{1e3 * min(measured.seconds):.2f} to {1e3 * max(measured.seconds):.2f}",
        f"{workload.tokens_per_pair / seconds:,.0f}",
        f"{100 * needed / seconds / 1e12 / peak:.1f} %",
        f"{executed / seconds / 1e12:.0f}" if case.arm == RecipeArm.name else f"{needed / seconds / 1e12:.0f}",
        "–" if measured.peak_gib is None else f"{measured.peak_gib:.1f}",
        planned,
        f"{measured.first_loss:.4f}",
    ]


def run_cases(
    cases: Sequence[Case], *, options: argparse.Namespace, settings: Settings, dtype: torch.dtype, peak: float
) -> Iterator[Table]:
    """All cases, one after the other, each on an empty device; after each the table of what is known so far."""
    lines = []
    columns = (
        "model", "trained", "arm", "ms per pair, median", "range", "real tokens/s", "MFU", "TFLOP/s executed", "peak GiB", "planned GiB",
        "first loss",
    )  # fmt: skip
    for case in cases:
        workload = _workload(options, vocabulary=case.shape.vocabulary, settings=settings)
        try:
            measured: Measured | None = measure(case, workload=workload, settings=settings, options=options, dtype=dtype)
        except torch.OutOfMemoryError:
            measured = None
        gc.collect()
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
        lines.append(line(case, measured, workload=workload, settings=settings, dtype=dtype, peak=peak))
        print(" | ".join(lines[-1]), file=sys.stderr)
        yield Table(columns, lines)


def _workload(options: argparse.Namespace, *, vocabulary: int, settings: Settings) -> Workload:
    return build_workload(
        options.data,
        tokenizer=options.tokenizer,
        num_pairs=options.pairs,
        vocabulary=vocabulary,
        max_tokens=settings.padded_length,
        seed=options.seed,
        group=settings.pairs_per_step,
    )


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def device_peak(name: str) -> float:
    """Dense bfloat16 peak of a device, TFLOP/s; 989 (H100, H200) for one that is not listed."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 989.0)


def main() -> None:
    """Check that the arms agree on this device, then measure each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser, num_pairs=64)
    parser.add_argument("--pairs-per-step", type=int, default=32, help="pairs in one pass and one optimizer step (default 32)")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["olmo-1b", "olmo-7b"])
    parser.add_argument("--trained", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--recipe-pairs", type=int, default=8, help="pairs that the recipe is timed on (default 8)")
    parser.add_argument("--passes", type=int, default=5, help="timed passes over all pairs (default 5)")
    parser.add_argument("--device", default="cuda", help="default cuda")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("skipped: no CUDA device; --device cpu --models tiny tries the script out")
        return
    settings = dataclasses.replace(Settings(), lora_r=32, pairs_per_step=options.pairs_per_step)
    dtype = torch.bfloat16
    peak = device_peak(hardware())
    agreement = check_on_device(settings=settings, data=options, device=options.device)
    cases = [
        Case(SHAPES[model], lora=trained == "lora", arm=arm)
        for model in options.models
        for trained in options.trained
        for arm in (RecipeArm.name, OursArm.name)
    ]
    workload = _workload(options, vocabulary=OLMO_1B.vocabulary, settings=settings)
    result = Result(
        theme="gpu_step",
        title="One unlearning step on a GPU",
        question="How fast is one unlearning step of OLMo's real shapes on one GPU, and how much of the device does it use?",
        command=shown_command("benchmarks/gpu_step.py", parser=parser, options=options),
        settings={
            "models": f"random weights made on the device, {str(dtype).removeprefix('torch.')}; adapters in float32",
            "step": described(settings),
            "rows": f"{workload.source}; {workload.tokens_per_pair:.1f} real tokens per pair, {2 * settings.padded_length} when padded",
            "peak": f"{peak:.0f} TFLOP/s, dense bfloat16 by the data sheet",
            "agreement": f"{BENCH.name} in float32 on this device: {agreement}",
            "runs": f"{options.passes} timed passes, ours over {options.pairs} pairs, the recipe over {options.recipe_pairs}, after steps "
            "that are not counted; wall time",
            "seed": options.seed,
        },
        tables=[],
        reading=[
            "MFU counts what the mathematics needs: forward and backward of real tokens, the head at answer tokens.",
            "Executed are the recipe's padded, recomputed and reference FLOPs; for ours what is needed.",
            "The recipe runs as published, one pair at a time with accumulated gradients, and mostly waits for kernels to be launched.",
            "Peaks are those of steps; planned is what the planner's formulas say for the rows at hand.",
            "Without adapters the recipe has no float32 masters and ours has them, so the peaks are not of equal exactness.",
            "First losses of two arms differ by bfloat16 rounding: the recipe takes its logarithms in bfloat16.",
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        start_process_group(Rank(init_method=file_init_method(Path(folder) / "meeting")))
        try:
            # A run that is cut off leaves the cases that it finished.
            for table in run_cases(cases, options=options, settings=settings, dtype=dtype, peak=peak):
                publish(dataclasses.replace(result, tables=[table]), write=options.write)
        finally:
            stop_process_group(Rank())


if __name__ == "__main__":
    main()
