"""A folder of good input that a test spoils in one place: data, target, two trials, configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.helpers.tiny_trial import tiny_inputs, tiny_records, tiny_train, write_tiny_target

Rows = Sequence[Mapping[str, Any]]
QUESTIONS = "1+1?,1,2,3,4,B\n2+1?,1,2,3,4,C\n3+1?,1,2,3,4,D\n0+1?,1,2,3,4,A\n"


@dataclass(frozen=True)
class World:
    """What is expensive to make, and only read: a target and two trials of it."""

    target: Path
    over: Path
    under: Path


def make_world(root: Path) -> World:
    """A random target of one layer, and two trials of two steps."""
    from trainers.loop import train_worker

    inputs = tiny_inputs(root, target=write_tiny_target(root / "target", layers=1))
    for name, rate in (("over", 5e-3), ("under", 1e-3)):
        train = tiny_train(learning_rate=rate, num_train_epochs=0.5, checkpoints=1, signals=0)
        list(train_worker(train=train, inputs=inputs, trial=root / "trials" / name))
    return World(inputs.target, root / "trials" / "over", root / "trials" / "under")


def rows(prefix: str, *, count: int = 5) -> list[dict[str, Any]]:
    """Rows of ``count`` documents, two each, as they stand in a file."""
    return [asdict(record) for record in tiny_records(prefix, count=count)]


class Place:
    """A working folder with good input; every method takes what is to be different."""

    def __init__(self, folder: Path, *, world: World) -> None:
        self.folder, self.world = folder, world

    def write(self, name: str, content: str | bytes) -> Path:
        """One file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def lines(self, name: str, values: Rows) -> Path:
        """A file of one JSON object per line."""
        return self.write(name, "".join(json.dumps(value) + "\n" for value in values))

    def lume(self, **sets: Rows | str | bytes | None) -> Path:
        """``lume/``: forget and retain rows, as values or as the file's content; None leaves the file out."""
        for name, values in ({"forget": rows("f"), "retain": rows("r")} | sets).items():
            if isinstance(values, str | bytes):
                self.write(f"lume/{name}.jsonl", values)
            elif values is not None:
                self.lines(f"lume/{name}.jsonl", values)
        return self.folder / "lume"

    def edited(self, index: int, **fields: Any) -> list[dict[str, Any]]:
        """The forget rows with other fields in one of them."""
        values = rows("f")
        values[index] = values[index] | fields
        return values

    def mia(self, **sides: Rows | None) -> Path:
        """``mia/``: four members and four strangers."""
        texts = {"member": rows("f")[:8:2], "nonmember": rows("x")[:8:2]}
        good: dict[str, Rows | None] = {
            side: [{"id": row["id"], "document": f"{row['input']} {row['output']}"} for row in values] for side, values in texts.items()
        }
        for side, values in (good | sides).items():
            if values is not None:
                self.lines(f"mia/{side}.jsonl", values)
        return self.folder / "mia"

    def mmlu(self, *, dev: str | None = QUESTIONS, test: str | None = QUESTIONS) -> Path:
        """``mmlu/``: one subject."""
        for part, text in (("dev", dev), ("test", test)):
            if text is not None:
                self.write(f"mmlu/{part}/sums_{part}.csv", text)
        return self.folder / "mmlu"

    def config(self, text: str = "", **changes: Any) -> str:
        """``exp.yaml`` with changed sections (dots as ``__``), and lines of YAML after them; its name."""
        values: dict[str, Any] = {
            "name": "run",
            "storage_path": "runs",
            "data": {"path": "lume"},
            "model": {"model_name_or_path": str(self.world.target)},
            "train": {"engine": {"name": "torch"}, "lora": {"r": 4}},
            "eval": {"dtype": "float32", "max_new_tokens": 4},
            "sweep": {"num_trials": 2},
        }
        for path, value in changes.items():
            *parents, last = path.split("__")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
            if value is None:
                del section[last]
        self.write("exp.yaml", "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()) + text)
        return "exp.yaml"

    def model(self, *, without: Sequence[str] = (), change: Callable[[Path], Any] | None = None) -> str:
        """``model/``: a copy of the target, without some files or with something changed; its name."""
        return self._copy(self.world.target, "model", without=without, change=change)

    def trial(self, *, without: Sequence[str] = (), change: Callable[[Path], Any] | None = None) -> str:
        """``trial/``: a copy of a trial's last checkpoint, spoilt; its name."""
        (checkpoint,) = (self.world.over / "checkpoints").iterdir()
        return self._copy(checkpoint, "trial", without=without, change=change)

    def _copy(self, source: Path, name: str, *, without: Sequence[str], change: Callable[[Path], Any] | None) -> str:
        shutil.copytree(source, self.folder / name)
        for file in without:
            (self.folder / name / file).unlink()
        if change is not None:
            change(self.folder / name)
        return name

    def used_run(self, config: str, *overrides: str) -> None:
        """The run folder of a configuration, as a sweep that was stopped right away leaves it."""
        from launcher.data import prepare_data
        from launcher.load import load_experiment
        from launcher.run_folder import claim_run

        experiment = load_experiment(self.folder / config, overrides)
        claim_run(experiment.config, space=experiment.space, data=prepare_data(experiment.config), resume=True)


def cut(file: Path, *, keep: float = 0.5) -> None:
    """Cut a file off."""
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


def flip(file: Path, *, back: int = 5) -> None:
    """Change one bit near the end of a file."""
    data = bytearray(file.read_bytes())
    data[-back] ^= 1
    file.write_bytes(bytes(data))


def edit_json(file: Path, **changes: Any) -> None:
    """Other values in a JSON file; None removes a key."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_tensors(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Other tensors in a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with size and time of the last change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return found
