"""A merge of two trials into one checkpoint: this framework's command, mergekit's, and the published recipe's calls.

    python benchmarks/merge.py --mergekit PATH/TO/mergekit-yaml --write

Every arm is a process of its own, from its start to its end, imports included. mergekit needs an environment of its own (its versions do
not agree with this project's); without ``--mergekit`` that arm is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import OLMO_1B, OLMO_7B, TINY, Shape, adapt, build_base
from benchmarks.options import shown_command
from benchmarks.results import Result, Table, described, publish
from benchmarks.workload import Settings
from merging.tensor_store import open_base
from merging.ties import ties

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"olmo-1b": OLMO_1B, "olmo-7b": OLMO_7B, "tiny": TINY}
TRIALS = ("trial-01", "trial-02")
ARMS = ("ours", "ours, whole checkpoints", "recipe", "mergekit")


@dataclass(frozen=True)
class Spent:
    """What one process took.

    Args:
        cpu_seconds: user and system time.
        wall_seconds: from start to end.
        peak_bytes: largest resident memory.
        read_bytes, written_bytes: through system calls, page cache or not.
    """

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int


def run_counted(command: Sequence[str], *, python: str = sys.executable) -> Spent:
    """Run a Python program alone and count what it takes.

    Args:
        command: script or ``-m`` and module, with arguments.
        python: interpreter.
    """
    with tempfile.NamedTemporaryFile(suffix=".io") as counters:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        started = time.perf_counter()
        process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "arms" / "counted.py"), counters.name, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        errors = process.stderr.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-3000:]}")
        counted = dict(line.split(":") for line in Path(counters.name).read_text(encoding="ascii").splitlines())
    return Spent(
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        wall_seconds=wall,
        peak_bytes=int(counted["VmHWM"].split()[0]) * 1024,
        read_bytes=int(counted["rchar"]),
        written_bytes=int(counted["wchar"]),
    )


def write_inputs(folder: Path, *, shape: Shape, lora_r: int, seed: int, whole_checkpoints: bool) -> None:
    """A bfloat16 base, two adapters, and for programs that read whole models the same trials as float32 checkpoints."""
    base = folder / "base"
    if (folder / "complete").exists():
        return
    model = build_base(shape, seed=seed, dtype=torch.bfloat16)
    model.config.bos_token_id = None
    model.save_pretrained(str(base))
    # An empty tokenizer: both programs only copy it.
    from trainers.tiny import train_tokenizer

    train_tokenizer(["the river runs past the old mill"], vocab_size=300).save_pretrained(str(base))
    settings = dataclasses.replace(Settings(), lora_r=lora_r)
    for number, name in enumerate(TRIALS):
        policy = adapt(build_base(shape, seed=seed, dtype=torch.float32), settings=settings, seed=seed + 1 + number)
        with torch.no_grad():
            for parameter_name, parameter in policy.named_parameters():
                if ".lora_B." in parameter_name:
                    parameter *= 0.02  # updates about a hundredth of the weights, as trained ones are
        policy.save_pretrained(str(folder / name))
        if not whole_checkpoints:
            continue
        # The base of the whole checkpoints is the stored one, rounded to bfloat16.
        stored, whole = open_base(base), policy.merge_and_unload()
        with torch.no_grad():
            for tensor, parameter in whole.named_parameters():
                parameter.copy_(stored.read(tensor).float())
                if _is_adapted(tensor):
                    parameter += _update(folder / name, tensor)
        whole.save_pretrained(str(folder / f"{name}-float32"))
        del policy, whole
    (folder / "complete").touch()


def _is_adapted(tensor: str) -> bool:
    return tensor.endswith("_proj.weight")


def _update(trial: Path, tensor: str) -> torch.Tensor:
    from merging.tensor_store import open_file

    factors = open_file(trial / "adapter_model.safetensors")
    config = json.loads((trial / "adapter_config.json").read_text())
    prefix = f"base_model.model.{tensor.removesuffix('.weight')}"
    a, b = factors.read(f"{prefix}.lora_A.weight"), factors.read(f"{prefix}.lora_B.weight")
    return (b.float() @ a.float()) * (config["lora_alpha"] / config["r"])


def mergekit_config(folder: Path, *, density: float) -> str:
    """mergekit's description of the same merge; JSON is YAML."""
    return json.dumps(
        {
            "merge_method": "ties",
            "base_model": str(folder / "base"),
            "models": [{"model": str(folder / f"{name}-float32"), "parameters": {"density": density, "weight": 1.0}} for name in TRIALS],
            "parameters": {"normalize": True},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
    )


def arms(folder: Path, *, density: float, mergekit: Path | None) -> dict[str, tuple[list[str], str]]:
    """Command and interpreter of each arm; an arm writes into ``folder / "out" / its name``."""
    base, out = str(folder / "base"), folder / "out"
    ours = ["-m", "launcher", "merge", "--base", base, "--density", str(density)]
    found: dict[str, tuple[list[str], str]] = {
        "ours": ([*ours, *_named("--trial", folder, ""), "--out", str(out / "ours")], sys.executable),
        "ours, whole checkpoints": (
            [*ours, *_named("--trial", folder, "-float32"), "--out", str(out / "ours, whole checkpoints")],
            sys.executable,
        ),
        "recipe": (
            [
                str(ROOT / "benchmarks" / "arms" / "merge_recipe.py"),
                base,
                *(str(folder / name) for name in TRIALS),
                str(out / "recipe"),
                str(density),
            ],
            sys.executable,
        ),
    }
    if mergekit is not None:
        config = folder / "mergekit.json"
        config.write_text(mergekit_config(folder, density=density), encoding="utf-8")
        found["mergekit"] = ([str(mergekit), str(config), str(out / "mergekit")], str(mergekit.with_name("python")))
    return found


def _named(option: str, folder: Path, suffix: str) -> list[str]:
    return [word for name in TRIALS for word in (option, str(folder / f"{name}{suffix}"))]


def differing(first: Path, second: Path) -> float:
    """Share of the stored weights of two checkpoints that are not equal.

    Raises:
        SystemExit: if a tensor is missing or of another type.
    """
    one, other = open_base(first), open_base(second)
    if set(one.tensors) != set(other.tensors):
        raise SystemExit(f"{first} and {second} hold different tensors: {sorted(set(one.tensors) ^ set(other.tensors))[:3]}")
    different = total = 0
    for name in one.tensors:
        a, b = one.read(name), other.read(name)
        if a.dtype != b.dtype:
            raise SystemExit(f"{name} is {a.dtype} in {first} and {b.dtype} in {second}")
        different += int((a != b).sum())
        total += a.numel()
    return different / total


def check_dense(folder: Path, *, density: float) -> int:
    """One tensor per kind of our merge against TIES computed whole, to the bit; returns how many were compared."""
    base, ours = open_base(folder / "base"), open_base(folder / "out" / "ours")
    names = [name for name in base.tensors if ".layers.0." in name and _is_adapted(name)]
    for name in names:
        merged = ties(updates=[_update(folder / trial, name) for trial in TRIALS], density=density)
        expected = (base.read(name).float() + merged).to(torch.bfloat16)
        found = ours.read(name)
        if not torch.equal(expected, found) and (not torch.cuda.is_available() or int((expected != found).sum()) > 1e-5 * found.numel()):
            raise SystemExit(f"{name} is not the TIES merge of the two updates")
    return len(names)


def table(spent: Mapping[str, Sequence[Spent]], *, needed_bytes: int) -> Table:
    """Medians of each arm, and each beside ours."""

    def median(name: str, field: str) -> float:
        return statistics.median(getattr(one, field) for one in spent[name])

    lines = []
    for name, runs in spent.items():
        cpu, peak = median(name, "cpu_seconds"), median(name, "peak_bytes")
        moved = median(name, "read_bytes") + median(name, "written_bytes")
        lines.append(
            (
                name,
                f"{cpu:.2f}",
                f"{min(one.cpu_seconds for one in runs):.2f} to {max(one.cpu_seconds for one in runs):.2f}",
                f"{cpu / median('ours', 'cpu_seconds'):.1f}",
                f"{median(name, 'wall_seconds'):.1f}",
                f"{peak / 2**30:.2f}",
                f"{peak / median('ours', 'peak_bytes'):.1f}",
                f"{median(name, 'read_bytes') / 2**30:.2f}",
                f"{median(name, 'written_bytes') / 2**30:.2f}",
                f"{moved / needed_bytes:.2f}",
            )
        )
    columns = (
        "arm", "CPU-s, median", "range", "÷ ours", "wall s", "peak GiB", "÷ ours", "read GiB", "written GiB", "moved ÷ (base + output)",
    )  # fmt: skip
    return Table(columns, lines)


def main() -> None:
    """Write the inputs, run every arm in turn, compare the outputs, show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="olmo-1b", help="whose layers (default olmo-1b)")
    parser.add_argument("--layers", type=int, default=2, help="how many of them (default 2)")
    parser.add_argument("--lora-r", type=int, default=32, help="rank of the adapters (default 32)")
    parser.add_argument("--density", type=float, default=0.8, help="share of each update that is kept (default 0.8)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which of them run (default all); ours always does")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each arm (default 3; mergekit runs once)")
    parser.add_argument("--mergekit", type=Path, metavar="PATH", help="mergekit's program mergekit-yaml, in its own environment")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where inputs and outputs lie; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0, help="of weights and factors (default 0)")
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        print("skipped: bytes and memory are counted on Linux only")
        return
    shape = dataclasses.replace(SHAPES[options.shape], layers=options.layers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {"ours", *options.arms}
        whole_checkpoints = not wanted.isdisjoint(("ours, whole checkpoints", "mergekit"))
        write_inputs(folder, shape=shape, lora_r=options.lora_r, seed=options.seed, whole_checkpoints=whole_checkpoints)
        programs = arms(folder, density=options.density, mergekit=options.mergekit)
        programs = {name: program for name, program in programs.items() if name in wanted}
        spent: dict[str, list[Spent]] = {name: [] for name in programs}
        for repeat in range(options.repeats):
            for name, (command, python) in programs.items():
                if name == "mergekit" and repeat:
                    continue
                shutil.rmtree(folder / "out" / name, ignore_errors=True)
                spent[name].append(run_counted(command, python=python))
                print(f"{name}: {spent[name][-1]}", file=sys.stderr)
        outputs = folder / "out"
        size = open_base(folder / "base").num_bytes
        compared = check_dense(folder, density=options.density)
        reading = [f"{compared} tensors of ours were compared with TIES on the whole updates: equal to the bit on a CPU."]
        if "recipe" in spent:
            share = differing(outputs / "ours", outputs / "recipe")
            reading.append(
                f"The recipe trims, elects and averages the factors, another merge: {share:.0%} of its weights differ from ours."
            )
        if "ours, whole checkpoints" in spent:
            share = differing(outputs / "ours", outputs / "ours, whole checkpoints")
            reading.append(f"From whole checkpoints {share:.1e} of our weights differ: a float32 checkpoint has rounded its update.")
        if {"mergekit", "ours, whole checkpoints"} <= set(spent):
            share = differing(outputs / "ours, whole checkpoints", outputs / "mergekit")
            reading.append(f"On the same whole checkpoints mergekit and ours differ in {share:.1e} of the weights.")
            reading.append("Making the whole checkpoints that mergekit reads is not counted.")
        publish(
            Result(
                theme="merge" if options.layers == 2 and options.shape == "olmo-1b" else f"merge_{options.shape}-{options.layers}",
                title="A TIES merge of two adapters into one checkpoint",
                question="What do processor, memory and disk spend on one merge, from the command's start to its end?",
                command=shown_command("benchmarks/merge.py", parser=parser, options=options),
                settings={
                    "model": f"{described(shape)}; {size / 2**30:.2f} GiB in bfloat16",
                    "trials": f"two adapters of rank {options.lora_r} on every linear layer, random factors; density {options.density:g}",
                    "threads": f"one per library, {len(os.sched_getaffinity(0))} cores; {resource.getpagesize()} bytes per page",
                    "runs": f"{options.repeats} of each arm in turn, of mergekit one",
                    "seed": options.seed,
                },
                tables=[table(spent, needed_bytes=2 * size)],
                reading=reading,
            ),
            write=options.write,
        )


if __name__ == "__main__":
    main()
