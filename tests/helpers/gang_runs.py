"""A small sweep of one trial on two ranks, and how its numbers are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.helpers.small_run import Command
from trainers.checkpoint import finished_checkpoints
from trainers.files import read_json, read_jsonl

NUM_STEPS = 32
LOSS_TOLERANCE = 2e-4
"""Nats. Losses of about 17 nats differ by at most 2e-5."""
WEIGHT_TOLERANCE = 5e-5
"""Adapter entries differ by at most 3e-6; the negative control is that eight steps more move them by ten times the tolerance."""
TRIAL = Path("trials") / "trial-00"


def gang(stage: int, **changes: Any) -> dict[str, Any]:
    """One trial on two ranks, gentle enough that rounding does not grow; half a core each, so that two such sweeps share two cores."""
    return {
        "sweep__num_trials": 1,
        "sweep__start_points": [],
        "sweep__cpus_per_rank": 0.5,
        "train__engine": {"name": "deepspeed", "zero_stage": stage, "ranks": 2},
        "train__per_device_train_batch_size": 2,
        "train__objective__forget_weight": 0.1,
        "train__learning_rate": 1e-3,
        "train__num_train_epochs": 8,
        "train__lora__lora_dropout": 0.0,
        "train__seed": 7,  # `unlearn train` and a sweep would derive different ones
        **changes,
    }


def status_of(run: Path) -> dict[str, Any]:
    """The trial's status; empty before it has one."""
    path = run / TRIAL / "status.json"
    return read_json(path) if path.exists() else {}


def starts_of(run: Path) -> list[bool]:
    """Of every start of a trial, whether it was one after the first of its sweep."""
    return [event["again"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "trial_started"]


def losses_of(trial: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in read_jsonl(trial / "metrics.jsonl")]


def weights_of(trial: Path) -> dict[str, torch.Tensor]:
    """The adapter of a trial's newest checkpoint."""
    return load_file(finished_checkpoints(trial)[-1] / "adapter_model.safetensors")


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Between entries of the same name."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - expected[name]).abs().max()) for name in expected)


def named(processes: set[psutil.Process] | list[psutil.Process], part: str) -> list[psutil.Process]:
    """Those of some processes whose command line has a part, in no order."""
    found = []
    for process in processes:
        try:
            if part in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def ranks_of(command: Command) -> list[psutil.Process]:
    """The processes of a command's ranks, in no order."""
    command.look()
    return named(command.seen, "RankActor")


def rank_of(command: Command, rank: int) -> psutil.Process:
    """The process of one rank, known by its log."""
    (found,) = [process for process in ranks_of(command) if any(file.path.endswith(f"rank-{rank}.log") for file in process.open_files())]
    return found
