"""Where the commands of the guides run: tiny models and invented data stand in for whatever a command names and nothing has made yet."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from launcher.cli import main
from launcher.load import LoadedExperiment, load_experiment
from launcher.templates import RECIPES, template_names
from tests.documents.blocks import COMMANDS, Block, command_lines
from tests.helpers.run_folder import build_finished
from tests.helpers.small_run import small_experiment, write_small_data
from tests.helpers.suite_data import write_muse, write_tofu

MODELS = {"--model", "--base", "--never-seen", "--retained-model"}
INPUTS = {*MODELS, "--trial", "--data", "--mia", "--mmlu"}
WITH_CONFIG = {"validate", "memorize", "train", "sweep"}
WITH_RUN = {"report", "status", "sync", "push"}

SMALL = {
    "sweep": ["--dry-run"],
    "push": ["--dry-run"],
    "eval": ["--max-new-tokens", "4"],
    "audit": ["--max-new-tokens", "4", "--attacks", "int8", "--documents", "2"],
}
"""Options added to a command where it has none of that name, so that it ends in a second. A sweep is planned and not run."""

SMALL_SETTINGS = (
    "model.dtype=float32",
    "train.engine={name: torch}",
    "train.num_train_epochs=1",
    "train.train_batch_size=4",
    "train.per_device_train_batch_size=2",
    "train.checkpoints=1",
    "train.signals=1",
    "train.schedule={}",
    "train.trainable={}",
    "train.objective.layer=null",
    "sweep.cpus_per_rank=1",
    "sweep.gpus_per_rank=null",
    "sweep.rungs=null",
    "eval.dtype=float32",
    "eval.max_new_tokens=4",
    "eval.bootstrap_samples=20",
    "eval.mmlu_shots=1",
)
"""Added to the settings of a command that computes: the models here have one layer."""
SMALL_TARGET = ("target.num_train_epochs=2", "target.min_knowledge=0", "target.min_regurgitation=0", "target.min_general_knowledge=0")


@dataclass
class Prototypes:
    """What stands in for models, trials, data and runs; made once."""

    root: Path
    made: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path) -> Prototypes:
        """Build everything in ``root``: a target of two epochs, two trials of one, their merge, data of each layout, a run with reports."""
        data = write_small_data(root / "data")
        values = small_experiment(data, storage=str(root / "built"), name="quickstart", sweep__num_trials=1, sweep__start_points=[])
        values["target"] |= {"num_train_epochs": 2, "min_knowledge": 0.0, "min_regurgitation": 0.0}
        values["target"]["tiny"] |= {"max_position_embeddings": 1024}
        values["train"] |= {"learning_rate": 1e-2, "num_train_epochs": 1, "checkpoints": 1, "signals": 1}
        values["train"]["objective"]["forget_weight"] = 0.1
        config = root / "small.yaml"
        config.write_text(yaml.safe_dump(values))
        target = root / "built" / "quickstart" / "target"
        _run("memorize", str(config))
        for name, rate in (("over", "3e-2"), ("under", "1e-2")):
            given = (f"model.model_name_or_path={target}", f"train.learning_rate={rate}")
            _run("train", str(config), *given, "--out", str(root / "single" / name))
        trials = [root / "single" / name / "trials" / "trial-00" for name in ("over", "under")]
        _run("merge", "--base", str(target), "--trial", str(trials[0]), "--trial", str(trials[1]), "--out", str(root / "merged"))
        run = build_finished(root / "run")
        shutil.copytree(root / "merged", run / "merged", dirs_exist_ok=True)
        shutil.copytree(target, run / "target")
        shutil.copytree(data, run / "data")
        shutil.copy(config, run / "experiment.yaml")
        for number, folder in enumerate(sorted((run / "trials").iterdir())):
            shutil.copytree(trials[number % 2] / "checkpoints", folder / "checkpoints")
        (checkpoint,) = (trials[0] / "checkpoints").iterdir()
        made = {"model": target, "trial 0": trials[0], "trial 1": trials[1], "run": run, "config": config, "checkpoint": checkpoint}
        made |= {name: data / name for name in ("lume", "mia", "mmlu")}
        made |= {"tofu": write_tofu(root / "tofu"), "muse": write_muse(root / "muse")}
        return cls(root, made)

    def kind(self, option: str, value: str, *, number: int = 0) -> Path:
        """The prototype of what an option names; data of TOFU and MUSE have it in their names."""
        if option == "--trial":
            return self.made["checkpoint" if "step-" in value else f"trial {number % 2}"]
        if option == "--data":
            layout = next((name for name in ("tofu", "muse") if name in value.lower()), "lume")
            return self.made[layout]
        return self.made["model" if option in MODELS else option.removeprefix("--")]


def _run(*arguments: str) -> None:
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"unlearn {' '.join(arguments)}: exit code {end.code}") from None


@dataclass
class Page:
    """The working folder of one page, in which its commands are run in order."""

    folder: Path
    prototypes: Prototypes
    blocks: Sequence[Block] = ()

    def run(self, words: Sequence[str]) -> None:
        """Run ``unlearn WORDS`` on stand-ins for what is not there.

        Raises:
            InputError: for a configuration or an override that is wrong.
            AssertionError: if the command fails.
        """
        words = list(words)
        name = words[0] if words else ""
        with inside(self.folder), self._stand_ins(words, name=name):
            if name in WITH_CONFIG:
                words = self._small(words, name=name)
            elif name == "init":
                for option in ("--template", "--cluster"):
                    if option in words:
                        value = words[words.index(option) + 1]
                        for file in (f"{value}.yaml", f"cluster-{value}.yaml", f"cluster-{value}.sh"):
                            Path(file).unlink(missing_ok=True)
            for option, value in zip(*[iter(_pairs(SMALL.get(name, [])))] * 2, strict=True):
                if option not in words:
                    words += [option, value] if value else [option]
            _run(*words)

    @contextmanager
    def _stand_ins(self, words: Sequence[str], *, name: str) -> Iterator[None]:
        """Whatever the command reads and nothing has made; it goes when the command has ended."""
        made: list[Path] = []
        try:
            trials = 0
            for option, value in pairwise(words):
                if option in INPUTS:
                    self._put(value, self.prototypes.kind(option, value, number=trials), made)
                    trials += option == "--trial"
            if name in WITH_RUN:
                self._put(words[1], self.prototypes.made["run"], made)
            if name in WITH_CONFIG:
                self._put_config(config_of(words), made)
            yield
        finally:
            for path in made:
                path.unlink(missing_ok=True)

    def _put(self, value: str, prototype: Path, made: list[Path]) -> None:
        path = Path(value)
        if path.is_absolute() or "://" in value:
            raise AssertionError(f"{value}: the guides' commands name folders below the working folder")
        # A run that is named as a whole or in part.
        if len(path.parts) > 2 and path.parts[0] == "runs" and not Path(*path.parts[:2]).exists():
            self._link(Path(*path.parts[:2]), self.prototypes.made["run"], made)
        if not path.exists():
            self._link(path, prototype, made)

    def _link(self, path: Path, prototype: Path, made: list[Path]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(prototype)
        made.append(path)

    def _put_config(self, value: str, made: list[Path]) -> None:
        path = Path(value)
        if path.exists() or value in template_names():
            return
        if path.name == "experiment.yaml":
            self._put(value, self.prototypes.made["config"], made)
        elif path.stem in template_names():
            self._link(path, RECIPES / path.name, made)
        else:
            text = next((block.text for block in self.blocks if is_experiment(block) and f"name: {path.stem}" in block.text), None)
            if text is None:
                self._link(path, self.prototypes.made["config"], made)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                made.append(path)

    def _small(self, words: list[str], *, name: str) -> list[str]:
        """The words with settings that make the command small, after a look at what the guide itself wrote."""
        experiment = load_words(words)
        if name == "validate" and "--gpus-per-node" not in words:
            words = [*words, "--gpus-per-node", "8", "--gpu-memory", "80"]  # where the guide's reader has GPUs
        extra = [f"{key}={value}" for key, value in self._absent(experiment)]
        if name in ("train", "memorize", "sweep"):
            # What is searched stays so, where a trial is only planned.
            searched = {f"train.{path}" for path in experiment.space.domains}
            extra += [setting for setting in SMALL_SETTINGS if setting.partition("=")[0] not in searched]
        if name in ("train", "memorize") and experiment.config.target is not None:
            extra += SMALL_TARGET
        return [*words, *extra]

    def _absent(self, experiment: LoadedExperiment) -> Iterator[tuple[str, Path]]:
        """Settings that name models or data that are not here, with what stands in."""
        config, made = experiment.config, self.prototypes.made
        given: dict[str, tuple[str | None, Path]] = {
            "model.model_name_or_path": (config.model.model_name_or_path, made["model"]),
            "data.path": (config.data.path, made["lume"]),
            "data.mia": (config.data.mia, made["mia"]),
            "data.mmlu": (config.data.mmlu, made["mmlu"]),
            "data.forget": (config.data.forget, made["tofu"] / "forget10_perturbed.jsonl"),
            "data.retain": (config.data.retain, made["tofu"] / "retain_perturbed.jsonl"),
        }
        if config.target is not None:
            given["target.base"] = (config.target.base, made["model"])
        for key, (value, prototype) in given.items():
            if value is not None and not Path(value).expanduser().exists():
                yield key, prototype


def _pairs(options: Sequence[str]) -> list[str]:
    """Options and values in turn, "" where an option takes none."""
    result: list[str] = []
    for index, word in enumerate(options):
        result.append(word)
        if word.startswith("--") and (index + 1 == len(options) or options[index + 1].startswith("--")):
            result.append("")
    return result


def is_experiment(block: Block) -> bool:
    """Whether a YAML block is a whole experiment: it has a name and data."""
    if block.language != "yaml":
        return False
    values = yaml.safe_load(block.text)
    return isinstance(values, dict) and {"name", "data"} <= set(values)


def config_of(words: Sequence[str]) -> str:
    """The configuration that a command names, as an argument or by --config."""
    for option in ("--config", "-c"):
        if option in words:
            return words[words.index(option) + 1]
    return words[1]


def overrides_of(words: Sequence[str]) -> list[str]:
    """The ``k=v`` of a command."""
    return [word for word in words[1:] if "=" in word and not word.startswith("-")]


def load_words(words: Sequence[str]) -> LoadedExperiment:
    """The experiment that a command reads, with what it replaces.

    Raises:
        InputError: for a setting that does not exist or has a wrong value.
    """
    path = Path(config_of(words))
    if not path.exists() and path.stem in template_names():
        path = RECIPES / f"{path.stem}.yaml"
    return load_experiment(path, overrides_of(words))


def commands_of(blocks: Sequence[Block]) -> list[tuple[Block, int, str]]:
    """Every command of the blocks of commands among these."""
    return [(block, line, text) for block in blocks if block.language in COMMANDS for line, text in command_lines(block)]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder; cluster and tracking of this machine are not seen."""
    before, hidden = Path.cwd(), {key: os.environ.pop(key) for key in ("RAY_ADDRESS", "WANDB_API_KEY") if key in os.environ}
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.update(hidden)


def values_of(block: Block) -> Any:
    """The values of a YAML block."""
    return yaml.safe_load(block.text)
