"""Every command line of README.md and docs/*.md: run where that takes seconds on a CPU, parsed where it does not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.templates import cluster_files
from tests.documents.blocks import find_blocks, page_name, pages
from tests.documents.commands import (
    NOT_RUN,
    SHELL,
    Command,
    all_commands,
    inline_problems,
    is_setting,
    link_problems,
    parse_ours,
    problems_of,
    reason_not_run,
    split_line,
)
from tests.documents.scene import Page, Prototypes, inside
from tests.helpers.data import REPOSITORY
from trainers.errors import InputError

PAGES = pages()
pytestmark = pytest.mark.skipif(not (REPOSITORY / "docs").is_dir(), reason="the guides are part of the repository, not of the package")


def commands_on(path: Path) -> list[Command]:
    return all_commands(among=[path])


def run(command: Command, *, page: Page) -> None:
    """Run one command in the folder of its page."""
    if command.ours is not None:
        page.run(command.ours)
        if command.output:
            (page.folder / command.output).parent.mkdir(parents=True, exist_ok=True)
            (page.folder / command.output).touch()
        return
    assert command.words[0] in SHELL, f"{command.place}: {command.words[0]} is neither run nor listed in NOT_RUN with a reason"
    done = subprocess.run(["bash", "-c", command.shell], cwd=page.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the pages


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_command_can_be_read(path: Path) -> None:
    """Programs, options, values, files, and the settings that a command replaces in a shipped recipe."""
    assert [(command.place, problems) for command in commands_on(path) if (problems := problems_of(command))] == []


_runnable = [path for path in PAGES if any(reason_not_run(command) is None for command in commands_on(path))]


@pytest.mark.parametrize("path", _runnable, ids=page_name)
def test_every_command_of_a_page_runs_in_order(path: Path, prototypes: Prototypes, tmp_path: Path) -> None:
    """What a command names and nothing has made yet is a tiny model, or invented data. Sweeps are planned only."""
    blocks = find_blocks(path.read_text(encoding="utf-8"), page=page_name(path))
    page = Page(tmp_path / "page", prototypes, blocks)
    page.folder.mkdir()
    for command in commands_on(path):
        if reason_not_run(command) is None:
            try:
                run(command, page=page)
            except (AssertionError, InputError) as error:
                pytest.fail(f"{command.place}: {command.text}\n{error}")


def test_what_is_not_run_is_listed_and_still_in_a_guide() -> None:
    used = {reason_not_run(command) for command in all_commands()}
    assert [entry for entry in NOT_RUN if entry not in used] == []


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_what_stands_between_backticks_exists(path: Path) -> None:
    assert inline_problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_lead_somewhere(path: Path) -> None:
    assert link_problems(path.read_text(encoding="utf-8"), page=path) == []


def test_every_guide_can_be_reached_from_the_index() -> None:
    index = REPOSITORY / "docs" / "README.md"
    text = index.read_text(encoding="utf-8")
    guides = {path.name for path in PAGES if path.parent == index.parent and path != index}
    assert {name for name in guides if f"]({name})" not in text} == set()


def test_the_cluster_guide_names_every_cluster_file() -> None:
    text = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert [kind for kind in cluster_files() if f"cluster-{kind}" not in text] == []


# ---- what these checks refuse


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("unlearn sweep olmo-1b.yaml --no-such", "--no-such"),
        ("unlearn swep olmo-1b.yaml", 'no command "swep"'),
        ("unlearn merge --base TARGET --out M", "Missing option '--trial'"),
        ("unlearn sweep olmo-1b.yaml train.lora.rank=16", "unknown key"),
        ("unlearn sweep olmo-1b.yaml train.learning_rate=fast", "train.learning_rate"),
        ("make quickstrat", "no goal"),
        ('pip install "unlearn-ties[no-such]"', "no extra"),
        ("ray sumbit cluster-aws.yaml", "no command"),
        ("ray submit cluster-aws.yaml submit.py --tmxu -- sweep olmo-1b", "--tmxu"),
        ("ray submit cluster-aws.yaml submit.py -- sweep olmo-1b train.lora.rank=16", "unknown key"),
        ("ray exec cluster-aws.yaml 'unlearn doctor --cluser'", "--cluser"),
        ("kubectl apply -f cluster-kubernetes.yaml", "nothing writes"),
    ],
)
def test_a_wrong_command_is_refused(line: str, says: str) -> None:
    (command,) = split_line(line, page="page", line=1)
    assert says in " ".join(problems_of(command))


@pytest.mark.parametrize(
    "line",
    [
        "unlearn status runs/olmo-1b extra",
        "unlearn train olmo-1b.yaml",  # searched settings without a value
        "unlearn eval --model MODEL --data tofu --mia mia --out e.json",  # an option that the benchmark does not read
    ],
)
def test_a_command_that_fails_is_noticed(line: str, prototypes: Prototypes, tmp_path: Path) -> None:
    (command,) = split_line(line, page="page", line=1)
    with pytest.raises((AssertionError, InputError)):
        run(command, page=Page(tmp_path, prototypes))


def test_an_unlisted_program_is_noticed(prototypes: Prototypes, tmp_path: Path) -> None:
    (command,) = split_line("helm install unlearn", page="page", line=1)
    assert reason_not_run(command) is None
    with pytest.raises(AssertionError, match="neither run nor listed"):
        run(command, page=Page(tmp_path, prototypes))


def test_a_line_is_split_as_a_shell_does() -> None:
    found = split_line("A=1 unlearn validate x.yaml 'k={values: [1, 2]}' > full.yaml && unlearn init # why", page="page", line=1)
    assert [command.words for command in found] == [("unlearn", "validate", "x.yaml", "k={values: [1, 2]}"), ("unlearn", "init")]
    assert found[0].output == "full.yaml"


def test_wrong_words_between_backticks_are_refused() -> None:
    text = "Use `unlearn sweep --dry-run`, `train.lora.r=16`, `merge.json`, `eval.mmlu_shots` and `unlearn.py`."
    assert inline_problems(text) == []
    for wrong in ("unlearn sweep --dry", "unlearn swep", "train.lora.rank", "sweep.stall: 60"):
        assert inline_problems(f"Use `{wrong}`.") != [], wrong
    assert is_setting("data.columns.input")
    assert not is_setting("train.no_such")
    assert parse_ours(["sweep", "olmo-1b"]) == []


def test_dead_links_are_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# Its `title`, twice\n\n```\n# no heading\n```\n")
    good = "# Here\n[a](other.md) [b](other.md#its-title-twice) [c](#here) [d](https://example.org/x)"
    assert link_problems(good, page=page) == []
    for wrong in ("[a](missing.md)", "[a](other.md#no-heading)", "[a](#there)"):
        assert len(link_problems(f"# Here\n{wrong}", page=page)) == 1, wrong


def test_commands_work_in_their_own_folder(tmp_path: Path) -> None:
    before = Path.cwd()
    with inside(tmp_path / "new"):
        assert Path.cwd().name == "new"
    assert Path.cwd() == before
