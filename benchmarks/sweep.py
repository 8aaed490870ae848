"""What a sweep costs beside its trials, and whether it leaks or loses anything.

python benchmarks/sweep.py overhead --write      real trials on two slots, and their durations replayed on more
python benchmarks/sweep.py many --write          200 tiny trials: processes, file handles, memory, disk
python benchmarks/sweep.py kills --write         random processes killed, twenty times; then the numbers of an undisturbed run
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.options import shown_command
from benchmarks.results import Result, Table, publish
from tests.helpers.small_run import Command, assert_same_facts, run_command, running, small_experiment, write_small_data
from trainers.files import read_json, read_jsonl

LOOK_S = 0.05
"""Seconds between two looks at the files of a run."""
GOAL = 1.15


@dataclass(frozen=True)
class Span:
    """When a trial began, made its first step, and ended; unix seconds."""

    name: str
    started: float
    first_step: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.started


def overhead(spans: Sequence[Span], *, slots: int) -> float:
    """Makespan over the shortest that is possible: all work evenly on the slots, or the longest trial."""
    makespan = max(span.ended for span in spans) - min(span.started for span in spans)
    return makespan / max(sum(span.seconds for span in spans) / slots, max(span.seconds for span in spans))


def handovers(spans: Sequence[Span], *, slots: int) -> list[float]:
    """Seconds from one trial's end to the first step of the one that took its slot."""
    free: list[float] = []
    found = []
    ends = sorted(span.ended for span in spans)
    for span in sorted(spans, key=lambda one: one.started)[slots:]:
        free = [end for end in ends if end <= span.started]
        if free:
            latest = free[-1]
            ends.remove(latest)
            found.append(span.first_step - latest)
    return found


def watch(command: Command, run: Path, *, limit_s: float) -> list[Span]:
    """The spans of all trials of a sweep that runs; a first step is seen within a look."""
    first: dict[str, float] = {}
    deadline = time.monotonic() + limit_s
    while command.process.poll() is None:
        assert time.monotonic() < deadline, command.text()
        for file in run.glob("trials/*/metrics.jsonl"):
            first.setdefault(file.parent.name, time.time())
        time.sleep(LOOK_S)
    assert command.process.returncode == 0, command.text()
    spans = []
    for name, seen in sorted(first.items()):
        status = read_json(run / "trials" / name / "status.json")
        assert status["state"] == "finished", status
        spans.append(Span(name, float(status["started"]), seen, float(status["ended"])))
    return spans


def write_experiment(folder: Path, **changes: Any) -> Path:
    """A small experiment with its data; JSON is YAML."""
    data = write_small_data(folder / "data")
    file = folder / "small.yaml"
    file.write_text(json.dumps(small_experiment(data, storage=folder, **changes), indent=2))
    return file


def run_overhead(folder: Path, *, trials: int, epochs: int, slots: int) -> list[Span]:
    """A sweep of real trials of differing length."""
    file = write_experiment(
        folder,
        train__num_train_epochs={"values": [epochs, epochs * 3 // 2, epochs * 2]},
        train__learning_rate={"min": 1e-4, "max": 1e-3, "distribution": "log_uniform"},
        sweep={"num_trials": trials, "cpus_per_rank": 1.0, "max_concurrent": slots},
    )
    with running("sweep", file, folder=folder) as command:
        return watch(command, folder / "small", limit_s=3000)


def replay(folder: Path, *, durations: Sequence[float], slots: int, rounds: int) -> list[Span]:
    """Trials that last as long as logged ones, on so many slots of a pretended machine."""
    import launcher.sweep
    from benchmarks.arms.replayed_trial import replay_trial
    from launcher.config import ExperimentConfig
    from launcher.console import Console
    from launcher.events import EventLog
    from launcher.load import load_experiment
    from launcher.nodes import Node
    from launcher.ray_session import start_ray, stop_ray
    from launcher.resources import plan_resources
    from launcher.search.source import FixedSource
    from launcher.search_space import TrialSpec
    from trainers.files import write_json

    file = write_experiment(folder, sweep={"num_trials": 4, "cpus_per_rank": 1.0})
    config: ExperimentConfig = load_experiment(file).config
    names = [f"trial-{index:03d}" for index in range(slots * rounds)]
    lengths = dict(zip(names, (durations[index % len(durations)] for index in range(len(names))), strict=True))
    run = folder / "replay"
    for name, seconds in lengths.items():
        (run / "trials" / name).mkdir(parents=True)
        write_json(run / "trials" / name / "seconds.json", {"seconds": seconds})
        (run / "trials" / name / "config.yaml").write_text("{}\n")
    # The trial's learning rate carries its length, so that the longest is started first as in a real sweep.
    specs = tuple(TrialSpec(name, {}, config.train.model_copy(update={"learning_rate": seconds})) for name, seconds in lengths.items())
    node = Node("pretended", "", cpus=float(slots), gpus=0.0)
    plan = plan_resources(nodes=[node], sweep=config.sweep, train=config.train, num_trials=len(specs))
    original = launcher.sweep.tune_trial
    launcher.sweep.tune_trial = replay_trial
    start_ray(cpus=slots)
    try:
        launcher.sweep.run_sweep_trials(
            FixedSource(specs, cost=lambda train: train.learning_rate),
            run=run,
            config=config,
            plan=plan,
            console=Console(io.StringIO()),
            events=EventLog(run),
            prepare=lambda known: None,
            cost=lambda train: train.learning_rate,
        )
    finally:
        launcher.sweep.tune_trial = original
        stop_ray()
    statuses = {name: read_json(run / "trials" / name / "status.json") for name in names}
    return [Span(name, status["started"], status["started"], status["ended"]) for name, status in statuses.items()]


def overhead_result(options: argparse.Namespace, *, command: str, root: Path) -> Result:
    """Real trials, then replays."""
    spans = run_overhead(root / "real", trials=options.trials, epochs=options.epochs, slots=2)
    gaps = handovers(spans, slots=2)
    durations = [span.seconds for span in spans]
    lines = [_line("real trials", spans, slots=2)]
    scale = options.mean / statistics.mean(durations)
    for slots in options.slots:
        replayed = replay(root / f"replay-{slots}", durations=[scale * one for one in durations], slots=slots, rounds=options.rounds)
        lines.append(_line(f"replay, durations times {scale:.2g}", replayed, slots=slots))
    found = overhead(spans, slots=2)
    return Result(
        theme="sweep_overhead",
        title="What a sweep takes beside its trials",
        question="How much longer than its trials does a sweep take, after the start of its first trial?",
        command=command,
        settings={
            "trials": f"{len(spans)} of a model of forty thousand weights, one rank and one core each, {min(durations):.1f} to "
            f"{max(durations):.1f} s with their evaluation",
            "goal": f"real trials on two slots at most {GOAL}: {'reached' if found <= GOAL else 'missed'} ({found:.3f})",
            "from a trial's end to the first step of the next": f"{statistics.median(gaps):.2f} s median, {max(gaps):.2f} s most, "
            f"of {len(gaps)}",
        },
        tables=[Table(("trials", "slots", "number", "work s", "longest s", "makespan s", "makespan ÷ max(work ÷ slots, longest)"), lines)],
        reading=[
            "Work counts a trial from its process's first line to its last. Replayed trials sleep: on two cores sixty-four processes "
            "cannot compute at once, but scheduler, placement and processes are real, and the starts of all processes share two cores.",
            "Even a scheduler without any cost has a last trial that does not end with the others: the ratio includes that.",
        ],
    )


def _line(name: str, spans: Sequence[Span], *, slots: int) -> tuple[str, ...]:
    makespan = max(span.ended for span in spans) - min(span.started for span in spans)
    work, longest = sum(span.seconds for span in spans), max(span.seconds for span in spans)
    return (name, str(slots), str(len(spans)), f"{work:.1f}", f"{longest:.1f}", f"{makespan:.1f}", f"{overhead(spans, slots=slots):.3f}")


@dataclass(frozen=True)
class Held:
    """What a sweep holds at a moment: ended trials, processes below it, file handles and resident MiB of the driver, KiB on disk that are
    not the trials' own."""

    ended: int
    processes: int
    handles: int
    memory_mib: float
    children_mib: float
    scratch_kib: float


def hold_of(command: Command, run: Path) -> Held | None:
    """What is held now; None if the command has just ended."""
    try:
        driver = psutil.Process(command.process.pid)
        children = driver.children(recursive=True)
        memory = 0.0
        for child in children:
            with suppress(psutil.Error):
                memory += child.memory_info().rss / 2**20
        events = read_jsonl(run / "events.jsonl") if (run / "events.jsonl").exists() else []
        scratch = 0
        for file in (run / ".tune").rglob("*"):
            with suppress(OSError):
                scratch += file.stat().st_size
        ended = sum(event["kind"] == "trial_ended" for event in events)
        return Held(ended, len(children), driver.num_fds(), driver.memory_info().rss / 2**20, memory, scratch / 1024)
    except psutil.Error:
        return None


def many_result(options: argparse.Namespace, *, command: str, root: Path) -> Result:
    """A sweep of many tiny trials, looked at ten times."""
    file = write_experiment(
        root,
        train__num_train_epochs=1,
        train__learning_rate={"min": 1e-5, "max": 1e-3, "distribution": "log_uniform"},
        train__objective={"name": "grad_diff", "forget_weight": 0.1, "retain_ce_weight": 1.0},
        train__checkpoints=1,
        train__signals=1,
        sweep={"num_trials": options.trials, "cpus_per_rank": 1.0, "max_concurrent": 2},
        eval__max_new_tokens=4,
        pairs={"candidates": "last", "max_pairs": 1, "finalists": 1, "calibrated": 0, "densities": [0.8]},
    )
    run, seen = root / "small", [Held(-1, 0, 0, 0.0, 0.0, 0.0)]
    started = time.monotonic()
    with running("sweep", file, folder=root) as running_command:
        while running_command.process.poll() is None:
            held = hold_of(running_command, run)
            if held and held.ended >= seen[-1].ended + max(1, options.trials // 10) and held.ended < options.trials:
                seen.append(held)
            time.sleep(0.5)
        code, text = running_command.process.returncode, running_command.text()
    seconds = time.monotonic() - started
    states = [read_json(path)["state"] for path in run.glob("trials/*/status.json")]
    assert states.count("finished") == options.trials, text[-2000:]
    assert code == 0 or "no trial is alive" in text, text[-2000:]
    left = [name for name in (".tune", ".stop") if (run / name).exists()]
    lines = [
        (str(one.ended), str(one.processes), str(one.handles), f"{one.memory_mib:.0f}", f"{one.children_mib:.0f}", f"{one.scratch_kib:.0f}")
        for one in seen[1:]
    ]
    return Result(
        theme="sweep_many",
        title="A sweep of many trials",
        question="Do processes, file handles, memory or files that are not results grow with the number of trials?",
        command=command,
        settings={
            "trials": f"{options.trials} of one epoch, a model of forty thousand weights, two at a time; {seconds:.0f} s in all",
            "end": f"exit code {code}; of scratch files left: {', '.join(left) or 'none'}",
        },
        tables=[Table(("trials ended", "processes", "driver's file handles", "driver MiB", "other processes MiB", "scratch KiB"), lines)],
        reading=[
            "Processes are Ray's and the trials' together. An exit code of 1 says that no trial is alive after one epoch and four new "
            "tokens, as was checked, not that one failed."
        ],
    )


def kills_result(options: argparse.Namespace, *, command: str, root: Path) -> Result:
    """Kill random processes of a sweep, start it again where it was the driver, and compare the end with an undisturbed run."""
    draws = random.Random(options.seed)
    target_file = write_experiment(root / "calm")
    code, text = run_command("sweep", target_file, folder=root / "calm", limit_s=900)
    assert code == 0, text
    calm = root / "calm" / "small"
    file, stormy = root / "stormy.yaml", root / "stormy" / "small"
    values = small_experiment(root / "calm" / "data", storage=stormy.parent, target=calm / "target", sweep__max_failures=50)
    file.write_text(json.dumps(values, indent=2))
    killed: dict[str, int] = {}
    starts = 0
    while sum(killed.values()) < options.kills:
        starts += 1
        with running("sweep", file, folder=root) as running_command:
            for victim, kind in _victims(running_command, draws=draws):
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
                    killed[kind] = killed.get(kind, 0) + 1
                if kind == "driver" or sum(killed.values()) >= options.kills:
                    break
            if running_command.process.poll() == 0:
                # It got through: another run from nothing, so that kills go on falling everywhere.
                _forget(stormy)
    code, text = run_command("sweep", file, folder=root, limit_s=900)
    assert code == 0, text
    assert_same_facts(calm, stormy)
    return Result(
        theme="sweep_kills",
        title="A sweep whose processes are killed",
        question="Does a sweep end with the same numbers whatever is killed, and when?",
        command=command,
        settings={
            "killed": ", ".join(f"{kind} {number}" for kind, number in sorted(killed.items())),
            "starts": f"{starts}, and one to the end",
            "seed": options.seed,
        },
        tables=[Table(("compared with the undisturbed run", "result"), [("trials, scores, pairs, merged weights", "equal")])],
        reading=["Equal: every score, verdict, pair and stored tensor, to the last bit; times and places may differ."],
    )


def _victims(command: Command, *, draws: random.Random) -> Iterator[tuple[psutil.Process, str]]:
    """At random moments a random process: the driver, a process that computes, or one of Ray's."""
    while command.process.poll() is None:
        end = time.monotonic() + draws.uniform(2, 14)
        while time.monotonic() < end and command.process.poll() is None:
            time.sleep(0.05)
        if command.process.poll() is not None:
            return
        computing = []
        for process in command.others():
            with suppress(psutil.Error):
                if "ray::" in " ".join(process.cmdline()):
                    computing.append(process)
        if computing and draws.random() < 0.5:
            yield draws.choice(sorted(computing, key=lambda process: process.pid)), "trial"
        else:
            yield psutil.Process(command.process.pid), "driver"


def _forget(run: Path) -> None:
    import shutil

    shutil.rmtree(run, ignore_errors=True)


def main() -> None:
    """One of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("overhead", "many", "kills"))
    parser.add_argument("--trials", type=int, default=None, help="overhead: default 12; many: default 200")
    parser.add_argument("--epochs", type=int, default=60, help="overhead: epochs of the shortest trial (default 60)")
    parser.add_argument("--slots", type=int, nargs="+", default=[4, 8, 64], help="overhead: slots of the replays (default 4 8 64)")
    parser.add_argument("--rounds", type=int, default=3, help="overhead: trials per slot in a replay (default 3)")
    parser.add_argument("--mean", type=float, default=60.0, help="overhead: mean seconds of a replayed trial (default 60)")
    parser.add_argument("--kills", type=int, default=20, help="kills: how many (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="kills: of moments and victims (default 0)")
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results")
    options = parser.parse_args()
    command = "python benchmarks/sweep.py " + options.part
    command += shown_command("", parser=parser, options=options).removeprefix("python ").replace(f" --part {options.part}", "")
    options.trials = options.trials or (200 if options.part == "many" else 12)
    parts = {"overhead": overhead_result, "many": many_result, "kills": kills_result}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in ("real", "calm"):
            (root / name).mkdir()
        for slots in options.slots:
            (root / f"replay-{slots}").mkdir()
        publish(parts[options.part](options, command=command, root=root), write=options.write)


if __name__ == "__main__":
    main()
