"""Reading the command lines of the guides: which are run, which only parsed, and what is wrong with one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

from launcher.cli import app, expand_weights
from launcher.templates import cluster_files, template_names
from tests.documents.blocks import COMMANDS, Block, find_blocks, page_name, pages, prose
from tests.helpers.data import REPOSITORY

NOT_RUN = {
    "unlearn quickstart": "takes two minutes; its recipe is run on smaller documents in tests/integration",
    "unlearn doctor --cluster": "needs a Ray cluster; tests/integration starts one",
    "unlearn eval --lm-eval": "needs the optional extra, and data sets from the network",
    "python benchmarks/real_text.py": "takes two hours and the published data",
    "make": "builds an environment, or runs this very suite",
    "export": "changes the reader's shell",
    "ray up": "starts machines",
    "ray down": "ends machines",
    "ray exec": "needs machines that ray up started",
    "ray attach": "needs machines that ray up started",
    "ray submit": "needs machines that ray up started; tests/integration submits to this machine",
    "ray rsync-down": "needs machines that ray up started",
    "ray job submit": "needs a Ray cluster; tests/integration starts one",
    "ray job logs": "needs a Ray cluster",
    "ray job stop": "needs a Ray cluster",
    "ray get-auth-token": "writes into the home folder",
    "kubectl": "needs Kubernetes",
    "squeue": "needs Slurm",
    "scancel": "needs Slurm",
    "tail -f": "never ends",
    "sbatch": "needs Slurm; tests/integration runs the script with stand-ins for its commands",
    "sky": "needs SkyPilot and a cloud",
    "docker": "needs a Docker engine",
    "git tag": "changes the repository",
    "twine upload": "publishes",
}
"""Beginnings of the commands that are parsed and not run, with the reason. Each must occur in a guide, and every other command is run."""

SHELL = ("cat", "cp", "head", "ls", "mkdir", "wc")
"""Harmless commands, run by a shell."""
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_SETTING = re.compile(r"(train|sweep|data|model|target|eval|merge|pairs|tracking|audit)(\.[a-z_][a-z0-9_]*)+")
_FILES = ("json", "jsonl", "py", "yaml", "md", "html", "csv", "png", "safetensors", "parquet", "txt", "log", "sh", "j2")


@dataclass(frozen=True)
class Command:
    """A command line of a guide: its words without comment, redirection and leading assignments, the file that takes its output, and the
    text as it stands where a shell is to read it."""

    page: str
    line: int
    words: tuple[str, ...]
    output: str | None = None
    shell: str = ""

    @property
    def text(self) -> str:
        """The words as one line."""
        return " ".join(self.words)

    @property
    def place(self) -> str:
        """``docs/sweeps.md:12``, for messages."""
        return f"{self.page}:{self.line}"

    @property
    def ours(self) -> tuple[str, ...] | None:
        """The arguments of ``unlearn``, or None for another program."""
        return self.words[1:] if self.words[0] == "unlearn" else None


def split_line(text: str, *, page: str, line: int) -> list[Command]:
    """The commands of a line; ``a && b`` are two.

    Raises:
        ValueError: for quotes that do not close.
    """
    if "<<" in text:
        return [Command(page, line, tuple(shlex.split(text.partition("<<")[0])), shell=text)]
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        tokens = list(lexer)
    except ValueError as error:
        raise ValueError(f"{page}:{line}: {error}: {text}") from None
    found, words, output = [], list[str](), None
    index = 0
    while index <= len(tokens):
        token = tokens[index] if index < len(tokens) else ";"
        if set(token) <= set("|&;"):
            while words and _ASSIGNMENT.match(words[0]) and len(words) > 1:
                words.pop(0)
            if words:
                found.append(Command(page, line, tuple(words), output, shell=shlex.join(words)))
            words, output = [], None
            if token == "|":  # what reads the output is not looked at
                break
        elif set(token) <= set("<>"):
            output = tokens[index + 1]
            index += 1
        else:
            words.append(token)
        index += 1
    return found


def reason_not_run(command: Command) -> str | None:
    """The entry of NOT_RUN that a command falls under: the longest whose words it has, the first one or two of them in front."""
    fitting = [entry for entry in NOT_RUN if _falls_under(command.words, entry.split())]
    return max(fitting, key=len, default=None)


def _falls_under(words: Sequence[str], entry: Sequence[str]) -> bool:
    front = [word for word in entry if not word.startswith("--") and "://" not in word]
    rest = [word for word in entry if word not in front]
    return list(words[: len(front)]) == front and all(any(one.startswith(word) for one in words) for word in rest)


# ---- what is wrong with a command that is only parsed


def problems_of(command: Command) -> list[str]:
    """Why a command cannot work, as far as can be told without running it."""
    if command.ours is not None:
        return parse_ours(command.ours)
    program, *rest = command.words
    check: Callable[[list[str]], list[str]] | None = {
        "make": _make, "pip": _pip, "ray": _ray, "kubectl": _files, "sbatch": _files, "sky": _files, "docker": _files,
    }.get(program)  # fmt: skip
    problems = check(rest) if check else []
    for inner in _inner(command.words):
        problems += parse_ours(inner)
    return problems


def parse_ours(words: Sequence[str]) -> list[str]:
    """Let the real command line read the arguments, and the real loader what they replace."""
    if not words:
        return []
    group = typer.main.get_command(app)
    commands: dict[str, Any] = group.commands  # type: ignore[attr-defined]
    name, *rest = expand_weights([word for word in words if word != "--debug"])
    if name in ("--version", "--help", "-h"):
        return []
    if name not in commands:
        return [f'there is no command "{name}"']
    try:
        commands[name].make_context(name, list(rest))
    except Exception as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        return [] if type(error).__name__ == "Exit" else [f"{name}: {text}"]
    return _settings_of(words)


def _settings_of(words: Sequence[str]) -> list[str]:
    """What the loader says about the settings that a command replaces in a shipped recipe."""
    from tests.documents.scene import WITH_CONFIG, config_of, load_words
    from trainers.errors import InputError

    if words[0] not in WITH_CONFIG or Path(config_of(words)).stem not in template_names():
        return []
    try:
        load_words(words)
    except InputError as error:
        return [str(error)]
    return []


def _inner(words: Sequence[str]) -> list[list[str]]:
    """Commands of ours inside another's: behind ``--``, and in quotes."""
    found = []
    for index, word in enumerate(words):
        if word == "--":
            rest = list(words[index + 1 :])
            ours = rest[1:] if rest and rest[0] == "unlearn" else rest
            return [*found, ours] if rest and (rest[0] == "unlearn" or any("submit.py" in one for one in words[:index])) else found
        if word.startswith("unlearn "):
            found.append(shlex.split(word)[1:])
    return found


def _make(words: Sequence[str]) -> list[str]:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    goals = [word for word in words if "=" not in word and not word.startswith("-")]
    problems = [f'the Makefile has no goal "{goal}"' for goal in goals if not re.search(rf"^{re.escape(goal)}:", text, re.MULTILINE)]
    names = [word.partition("=")[0] for word in words if "=" in word and not word.startswith("-")]
    return problems + [f"the Makefile does not read {name}" for name in names if f"$({name})" not in text]


def _pip(words: Sequence[str]) -> list[str]:
    text = (REPOSITORY / "setup.cfg").read_text(encoding="utf-8")
    extras = [extra for word in words for part in re.findall(r"unlearn-ties\[([^\]]+)\]", word) for extra in part.split(",")]
    return [f'there is no extra "{extra}"' for extra in extras if not re.search(rf"^{re.escape(extra)} =", text, re.MULTILINE)]


def _ray(words: Sequence[str]) -> list[str]:
    """Verb, and options in front of ``--`` or the first quoted command, as Ray's own command line knows them."""
    group = _ray_commands()
    verb, *rest = words
    if verb == "job" and rest:
        group, verb, rest = group.commands["job"], rest[0], rest[1:]
    if verb not in group.commands:
        return [f'ray has no command "{verb}"']
    known = {option for parameter in group.commands[verb].params for option in parameter.opts}
    before = rest[: rest.index("--")] if "--" in rest else rest
    problems = [f"ray {verb} has no option {word}" for word in before if word.startswith("--") and word.partition("=")[0] not in known]
    return problems + _files(before)


@cache
def _ray_commands() -> Any:
    from ray.scripts.scripts import cli

    return cli


def _files(words: Sequence[str]) -> list[str]:
    """Files that a command names must be among those that ``unlearn init`` writes, or part of the repository."""
    written = {path.name for path in cluster_files().values()} | {"submit.py", *(f"{name}.yaml" for name in template_names())}
    named = [word for word in words if re.fullmatch(r"[\w./-]+\.(ya?ml|sh|py)|[\w./-]*Dockerfile[\w.]*", word)]
    return [f"nothing writes {word}" for word in named if Path(word).name not in written and not (REPOSITORY / word).exists()]


# ---- the running text


def inline_problems(text: str) -> list[str]:
    """What stands between backticks and does not exist: commands and options after ``unlearn``, and settings."""
    problems = []
    for number, line in enumerate(prose(text).splitlines(), start=1):
        for code in _INLINE.findall(line):
            problems += [f"line {number}: `{code}`: {problem}" for problem in _inline(code)]
    return problems


def _inline(code: str) -> list[str]:
    if code == "unlearn" or not code.startswith("unlearn "):
        return [f"there is no setting {name}" for name in _settings_in(code) if not is_setting(name)]
    words = code.split()[1:]
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if words[0].startswith("-"):
        return []
    if words[0] not in commands:
        return [] if not re.fullmatch(r"[a-z-]+", words[0]) else [f'there is no command "{words[0]}"']
    known = {option for parameter in commands[words[0]].params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help",
        "-h",
    }
    names = [re.split(r"[=|\]/]", word.strip("[]"))[0] for word in words if word.strip("[").startswith("--")]
    problems = [f"{words[0]} has no option {name}" for name in names if name not in known]
    return problems + [f"there is no setting {name}" for word in words for name in _settings_in(word) if not is_setting(name)]


def _settings_in(code: str) -> list[str]:
    """A setting at the beginning of a piece of code: ``train.lora.r``, ``train.lora.r=16``, ``sweep.stall_s: 60``."""
    found = _SETTING.match(code)
    if found is None or found[0].rsplit(".", 1)[1] in _FILES or code[found.end() :][:1] not in ("", "=", ":", " ", "[", "."):
        return []
    return [found[0]] if not code[found.end() :].startswith((".", "/")) and "(" not in code else []


def is_setting(name: str) -> bool:
    """Whether a dotted path is a setting of an experiment, a mapping's own keys included."""
    from launcher.config import ExperimentConfig
    from launcher.problems import field_at

    if field_at(ExperimentConfig, name) is not None:
        return True
    parent = name.rpartition(".")[0]
    field = field_at(ExperimentConfig, parent) if parent else None
    return field is not None and "dict" in str(field.annotation)


# ---- links


def link_problems(text: str, *, page: Path) -> list[str]:
    """Relative links whose file is not there, or whose heading is not in it."""
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name)
        if name and not file.exists():
            problems.append(f"no file {target}")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8") if name else text):
            problems.append(f"no heading {target}")
    return problems


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub writes them: https://docs.github.com/en/get-started/writing-on-github"""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*#*\s*$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = found.get(anchor, 0)
        found[anchor] = count + 1
        result.add(f"{anchor}-{count}" if count else anchor)
    return result


def all_commands(*, among: Sequence[Path] | None = None) -> list[Command]:
    """Every command of every page."""
    found = []
    for path in pages() if among is None else among:
        for block in find_blocks(path.read_text(encoding="utf-8"), page=page_name(path)):
            found += block_commands(block)
    return found


def block_commands(block: Block) -> list[Command]:
    """The commands of one block."""
    from tests.documents.blocks import command_lines

    if block.language not in COMMANDS:
        return []
    return [command for line, text in command_lines(block) for command in split_line(text, page=block.page, line=line)]
