"""A whole experiment in miniature: invented documents, a target of some thousand weights, a few trials of a few steps."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from trainers.data.synthetic import write_synthetic_benchmark
from trainers.files import read_json, read_jsonl, sha256_file

DOCUMENTS_PER_TASK = 3
LIMIT_S = 240.0
"""Seconds after which a command counts as hung; on two free cores the longest takes about 40."""


def write_small_data(folder: Path) -> Path:
    """An invented benchmark: three documents per task and set, eight strangers, two subjects."""
    write_synthetic_benchmark(folder, documents_per_task=DOCUMENTS_PER_TASK, subjects=2, questions_per_subject=4, seed=0)
    return folder


TARGET = {
    "tiny": {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "learning_rate": 1e-2,
    "num_train_epochs": 50,
    "train_batch_tokens": 256,
    "min_knowledge": 0.9,
    "min_regurgitation": 0.95,
    "min_general_knowledge": 0.0,
    "check_every_epochs": 10,
    "seed": 42,
}
"""Forty thousand weights that know the documents by heart after a few seconds."""

ABSURD = {"objective.forget_weight": 0.1, "learning_rate": 1e30, "num_train_epochs": 8}
"""Its second step is not finite."""
GENTLE = {"objective.forget_weight": 0.1, "learning_rate": 1e-2, "num_train_epochs": 8}
HARSH = {"objective.forget_weight": 0.4, "learning_rate": 2e-2, "num_train_epochs": 20}
HARSHER = {"objective.forget_weight": 0.5, "learning_rate": 2e-2, "num_train_epochs": 16}


def small_experiment(data: Path, *, storage: Path | str, target: Path | None = None, name: str = "small", **changes: Any) -> dict[str, Any]:
    """The values of a sweep of four trials: one forgets little, two forget much, the last does not survive its second step.

    Args:
        data: what ``write_small_data`` wrote.
        storage: folder of the run folder.
        target: a model that has memorised the data; without one the sweep builds it first.
        name: name of the run folder.
        changes: settings that replace these, with ``__`` for the dots of their paths, such as ``train__engine__ranks=2``.
    """
    values: dict[str, Any] = {
        "name": name,
        "seed": 42,
        "storage_path": str(storage),
        "model": {"model_name_or_path": None if target is None else str(target)},
        "target": copy.deepcopy(TARGET) if target is None else None,
        "data": {"path": str(data / "lume"), "mia": str(data / "mia"), "mmlu": str(data / "mmlu")},
        "train": {
            "objective": {
                "name": "grad_diff",
                "forget_weight": {"values": [0.1, 0.4, 0.5]},
                "retain_ce_weight": 1.0,
            },
            "forget_scope": "document",
            "learning_rate": {"values": [1e-2, 2e-2, 1e30]},
            "num_train_epochs": {"values": [8, 16, 20]},
            "train_batch_size": 8,
            "per_device_train_batch_size": 8,
            "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1},
            "engine": {"name": "torch"},
            "checkpoints": 4,
            "signals": 2,
        },
        "sweep": {"num_trials": 4, "start_points": [GENTLE, HARSH, HARSHER, ABSURD], "cpus_per_rank": 1.0, "max_concurrent": 2},
        "eval": {"dtype": "float32", "max_new_tokens": 24, "bootstrap_samples": 20, "mmlu_shots": 1},
        "pairs": {
            "densities": [0.8],
            "finalists": 1,
            "calibrated": 1,
            "scale_steps": 1,
            "min_mmlu_fraction": 0.0,
            "min_retention_fraction": 0.0,
        },
        "tracking": {"wandb": "off"},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return values


def write_small_experiment(file: Path, *, data: Path, storage: Path | str, **changes: Any) -> Path:
    """Write the experiment; JSON is YAML."""
    file.write_text(json.dumps(small_experiment(data, storage=storage, **changes), indent=2))
    return file


# ---- the command in a process of its own


@dataclass
class Command:
    """A running ``python -m launcher ...``, its output, and every process that it started."""

    process: subprocess.Popen[bytes]
    output: Path
    tag: str
    seen: set[psutil.Process] = field(default_factory=set)

    def look(self) -> None:
        """Remember the processes below the command: after its death their parent is another one."""
        with suppress(psutil.NoSuchProcess):
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))

    def others(self) -> list[psutil.Process]:
        """The live processes that the command started."""
        self.look()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != self.process.pid and process.environ().get("UNLEARN_TEST_TAG") == self.tag:
                    self.seen.add(process)
        return [process for process in self.seen if _is_alive(process)]

    def wait(self, *, limit_s: float = LIMIT_S) -> int:
        """The exit code.

        Raises:
            AssertionError: with the output, if the command does not end in time.
        """
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=limit_s)
        raise AssertionError(f"still running after {limit_s:g} s:\n{self.text()}")

    def until(self, condition: Callable[[], Any], *, what: str, limit_s: float = LIMIT_S) -> Any:
        """Wait for something to hold while the command runs; its value.

        Raises:
            AssertionError: with the output, if the command ends first or it takes too long.
        """
        deadline = time.monotonic() + limit_s
        while not (value := condition()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {what} after {limit_s:g} s:\n{self.text()}"
            time.sleep(0.01)
        return value

    def kill(self) -> None:
        """``kill -9`` of the command alone."""
        self.look()
        self.process.kill()
        self.process.wait()

    def text(self) -> str:
        """What the command has printed so far."""
        return self.output.read_text(errors="replace")


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for_end(command: Command, *, limit_s: float, but: Sequence[str] = ()) -> None:
    """Wait until every process that a command started is gone by itself, but for those with a part of a name.

    Raises:
        AssertionError: naming those that are not.
    """
    deadline = time.monotonic() + limit_s
    while left := [process for process in command.others() if not any(part in _name(process) for part in but)]:
        assert time.monotonic() < deadline, f"alive {limit_s:g} s after the command: {left}"
        time.sleep(0.2)


@contextmanager
def running(*arguments: str | Path, folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Command]:
    """Run a command of the launcher in the background; nothing of it outlives the block.

    Args:
        arguments: of the command line, such as ``"sweep", file``.
        folder: working folder, which also takes the output.
        environment: variables added to this process's.
    """
    tag = uuid.uuid4().hex
    output = folder / f"output-{tag[:8]}.txt"
    variables = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "RAY_ADDRESS")}
    variables |= {"UNLEARN_TEST_TAG": tag, "PYTHONUNBUFFERED": "1", **(environment or {})}
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher", *map(str, arguments)],
            cwd=folder,
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    command = Command(process, output, tag)
    try:
        yield command
    finally:
        others = command.others()
        if process.poll() is None:
            process.kill()
            process.wait()
        for other in others:
            with suppress(psutil.Error):
                other.send_signal(signal.SIGKILL)


def run_command(*arguments: str | Path, folder: Path, limit_s: float = LIMIT_S) -> tuple[int, str]:
    """Exit code and output of a command of the launcher."""
    with running(*arguments, folder=folder) as command:
        return command.wait(limit_s=limit_s), command.text()


# ---- what a run found


def facts(run: Path) -> dict[str, Any]:
    """Everything that two runs of one experiment must agree on: no times, no places, no counts of work saved.

    The target counts by what starts from it; it may lie elsewhere.
    """
    results = read_json(run / "results.json")
    results.pop("timings")
    results["target"].pop("path")
    for trial in results["trials"]:
        trial.pop("seconds")
    pairs = read_json(run / "pairs.json")
    pairs.pop("cost")
    for candidate in pairs["candidates"]:
        candidate.pop("checkpoint")
    found: dict[str, Any] = {"results": results, "pairs": pairs}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name in ("eval.json", "validation.json"):
            found[name] = {key: value for key, value in read_json(path).items() if key != "seconds"}
        elif path.name == "metrics.jsonl":
            found[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in read_jsonl(path)]
        elif not name.startswith("target") and (path.suffix == ".safetensors" or path.name.endswith("-rows.jsonl")):
            found[name] = sha256_file(path)
    return found


def assert_same_facts(actual: Path, expected: Path) -> None:
    """Fail with the first difference between two runs, in few words."""
    ours, theirs = facts(actual), facts(expected)
    assert sorted(ours) == sorted(theirs), f"only one of them has {sorted(set(ours) ^ set(theirs))}"
    for name in ours:
        assert ours[name] == theirs[name], f"{name} differs"


def stamps(run: Path) -> dict[str, int]:
    """When every file that costs computing was written."""
    kinds = (".safetensors", ".jsonl", "eval.json", "validation.json")
    return {
        str(path.relative_to(run)): path.stat().st_mtime_ns
        for path in run.rglob("*")
        if path.name.endswith(kinds) and path.name != "events.jsonl"
    }
