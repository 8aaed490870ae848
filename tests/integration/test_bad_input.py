"""Bad input ends with exit code 2 and one message that says what, where and how to mend it; nothing is written."""

from __future__ import annotations

import os
import socket
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from eval.forgetting import Verdict, classify
from launcher.cli import main
from tests.helpers.bad_commands import Case, also, evaluate, in_used_run, merge, run, validate, with_mia, with_mmlu, with_splits
from tests.helpers.bad_input import Place, World, edit_tensors, make_world, rows, snapshot
from tests.integration.bad_configuration import CONFIGURATION, RESOURCES, USAGE
from tests.integration.bad_data import BENCHMARKS, DATA, F
from tests.integration.bad_evaluations import EVALUATIONS
from tests.integration.bad_folders import QUICKSTART, RUN_FOLDERS
from tests.integration.bad_models import MERGE, MODELS
from trainers.files import read_json

CASES = [*CONFIGURATION, *RESOURCES, *USAGE, *DATA, *BENCHMARKS, *QUICKSTART, *RUN_FOLDERS, *MODELS, *EVALUATIONS, *MERGE]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, world=world)


def unlearn(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, captured.out, captured.err


def check(case: Case, *, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(argument) for argument in case.arrange(place)]
    before = snapshot(place.folder), snapshot(place.world.target.parent)
    code, out, err = unlearn(capsys, *arguments)
    assert code == case.code, out + err
    assert out == ""
    for part in case.says:
        assert part in err, err
    assert not case.never or case.never not in err
    assert "Traceback" not in err
    assert "internal error" not in err
    # One message, not two: the label of each kind of message stands at the beginning of its first line.
    assert sum(err.count(label) for label in ("input error:", "environment error:", "run failed:", "Error:")) == 1, err
    assert (snapshot(place.folder), snapshot(place.world.target.parent)) == before
    assert not [path for path in before[0] if path.endswith(".tmp")]


def test_the_table_is_complete() -> None:
    """At least 45 cases, each of its own name; the wording of a fix is part of most of them."""
    assert len(CASES) >= 45
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_before_anything_is_written(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check(case, place=place, capsys=capsys)


@pytest.mark.parametrize(
    ("arrange", "says"),
    [
        (lambda p: run(p, "sweep", storage_path="locked/runs"), "locked"),
        (lambda p: also(p.lume(), ["quickstart", "--out", "locked/run", "--data", "lume", "--documents", "4"]), "locked"),
        (lambda p: ["quickstart", "--out", "locked/run"], "locked"),
        (lambda p: merge(p, p.world.over, out="locked/out"), "locked"),
        (lambda p: evaluate(p, p.world.target, out="locked/e.json"), "locked"),
    ],
    ids=["sweep", "quickstart on data", "quickstart", "merge", "eval"],
)
def test_a_folder_without_write_permission_is_named(
    arrange: Callable[[Place], Sequence[str]], says: str, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The permission is asked of the system, which grants an administrator everything: its answer is replaced."""
    (place.folder / "locked").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **rest: Path(path).name != "locked" and allowed(path, mode, **rest))
    check(Case("locked", arrange, ("the folder cannot be written to", says, "fix:")), place=place, capsys=capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="an administrator may write everywhere")
def test_a_folder_that_is_really_locked_is_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.folder / "locked").mkdir(mode=0o500)
    case = Case("locked", lambda p: ["quickstart", "--out", "locked/run"], ("the folder cannot be written to", "locked"))
    check(case, place=place, capsys=capsys)


def test_a_full_disk_is_an_environment_error(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a mistake in the input: exit code 3."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 0))
    case = Case("full", lambda p: merge(p, p.world.over), ("the disk has 0.0 GiB free", "fix: free space"), code=3)
    check(case, place=place, capsys=capsys)


def test_what_could_be_a_hub_id_is_told_at_once_without_a_network(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's libraries would try six times, and say so each time."""
    import datasets
    import huggingface_hub

    def no_name(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    says = ("path not found, and no data set of that name can be reached on the hub: no/where", "fix: check the path")
    started = time.monotonic()
    check(Case("hub", lambda p: validate(p, "data.path=no/where"), says), place=place, capsys=capsys)
    assert time.monotonic() - started < 10


# ---- what looks odd and is not wrong


def test_rows_of_unknown_kind_among_others_are_counted_and_told(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """``sc10`` has two digits: the benchmark's rule reads neither sc nor qa in it."""
    odd = [row | {"id": f"odd{number}sc10", "task": "Task1"} for number, row in enumerate(rows("x")[:3])]
    place.lume(forget=[*rows("f"), *odd])
    out = place.folder / "eval.json"
    code, _, err = unlearn(capsys, "eval", "--model", str(place.world.target), "--data", "lume", "--out", str(out), "--max-new-tokens", "2")
    assert (code, "input error" in err) == (0, False)
    report = read_json(out)
    assert report["counts"]["skipped_rows"] == 3
    assert any(note.startswith("3 rows are neither completions nor questions") for note in report["notes"])
    assert report["official"]["aggregate-score"] == -1
    assert sum("the official aggregate-score is -1" in note for note in report["notes"]) == 2


@pytest.mark.parametrize("options", [(), ("--official",)], ids=["default", "official"])
def test_a_model_that_diverged_with_finite_weights_has_a_result(
    options: tuple[str, ...], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of 1e30 overflow in the first layer: no loss is a number. The benchmark's script stops; here the report says so."""
    model = place.model(change=lambda m: edit_tensors(m / "model.safetensors", lambda t: [value.fill_(1e30) for value in t.values()]))
    place.lume()
    place.mia()
    place.mmlu()
    out = place.folder / "eval.json"
    arguments = ["--model", model, "--data", "lume", "--mia", "mia", "--mmlu", "mmlu", "--out", str(out), "--max-new-tokens", "2"]
    code, _, err = unlearn(capsys, "eval", *arguments, *options)
    assert code == 0, err
    report = read_json(out)
    assert (report["scores"]["forget_answer_log_prob"], report["scores"]["retain_answer_log_prob"]) == (None, None)
    assert (report["official"]["mia_loss_acc"], report["attack"]["not_finite"]) == (0.5, 8), "all documents tie"
    assert isinstance(report["official"]["aggregate-score"], float)
    assert any("the script stops there and writes no result" in text for text in report["deviations"])
    assert any("log-probability that is not finite" in note for note in report["notes"])
    assert classify(scores=report["scores"], baseline={"forget_answer_log_prob": -1.0}).verdict is Verdict.DEAD


ODD_IDS = [
    'quote"',
    "apostrophe'",
    "comma,semi;",
    "späte Ähre ☂ 雨",
    "a/b\\c",
    "line\nbreak\r",
    "tab\t",
    "${braces}",
    "{0} %s",
    "..",
    " ",
    "\u2028",
    "-x",
    "#",
]


def test_odd_ids_are_fine(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids are names, whatever they hold; each of these documents has a completion and a question."""
    values = {
        prefix: [{**row, "id": prefix + odd + row["id"][len(prefix) + 1 :]} for odd, row in zip(
            [odd for odd in ODD_IDS for _ in range(2)], rows(prefix, count=len(ODD_IDS)), strict=True)]
        for prefix in ("f", "r")
    }  # fmt: skip
    for prefix, sets in values.items():
        assert len({row["id"] for row in sets}) == 2 * len(ODD_IDS), prefix
    place.lume(forget=values["f"], retain=values["r"])
    code, out, err = unlearn(capsys, "validate", place.config())
    assert (code, err) == (0, "")
    assert out.endswith("valid\n")
    assert f"{2 * len(ODD_IDS)} forget rows" in out


def good_bom(place: Place) -> list[str]:
    place.lume()
    path = place.folder / "lume" / "forget.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return ["validate", place.config()]


def good_spaces(place: Place) -> list[str]:
    place.lume()
    (place.folder / "lume").rename(place.folder / "my data: 100 % [real] ${x}")
    return ["validate", place.config(data={"path": "my data: 100 % [real] \\${x}"}, storage_path="my runs")]


GOOD: list[tuple[str, Callable[[Place], Sequence[str]]]] = [
    ("plain", lambda p: validate(p)),
    ("a byte order mark", good_bom),
    (
        "Windows line ends",
        lambda p: also(
            p.lume(),
            also(
                (p.folder / "lume/retain.jsonl").write_bytes((p.folder / "lume/retain.jsonl").read_bytes().replace(b"\n", b"\r\n")),
                ["validate", p.config()],
            ),
        ),
    ),
    ("odd folder names", good_spaces),
    ("more documents wanted than there are", lambda p: validate(p, "data.documents=1000")),
    ("membership attack", lambda p: with_mia(p)),
    ("MMLU", lambda p: with_mmlu(p)),
    ("fixed splits", lambda p: with_splits(p, train=F[:2], validation=F[2:6], test=F[6:8], other=F[8:])),
    ("a sweep that is only planned", lambda p: run(p, "sweep", "--dry-run")),
    ("a run folder of its own", lambda p: in_used_run(p, "--dry-run")),
    ("a target that is to be built", lambda p: also(p.mmlu(), run(p, "validate", "data.mmlu=mmlu", model=None, target={}))),
]


@pytest.mark.parametrize("arrange", [case[1] for case in GOOD], ids=[case[0] for case in GOOD])
def test_good_input_passes_and_writes_nothing(
    arrange: Callable[[Place], Sequence[str]], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control beside the table: the same folder, not spoilt."""
    arguments = arrange(place)
    before = snapshot(place.folder)
    code, out, err = unlearn(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "trial-00" in out
    assert snapshot(place.folder) == before


# ---- what is no input error


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Every command that reads data fails there."""

    def prepare(*_, **__):
        raise error

    monkeypatch.setattr("launcher.stages.prepare_data", prepare)


def test_ctrl_c_is_one_line_and_130(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    code, out, err = unlearn(capsys, *run(place, "sweep"))
    assert (code, out, err.split("\n")) == (130, "", ["interrupted", ""])


def test_a_mistake_of_ours_is_one_line_and_a_hint(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, KeyError("loss"))
    arguments = run(place, "sweep")
    code, _, err = unlearn(capsys, *arguments)
    assert code == 1
    assert err.startswith("internal error: KeyError: 'loss'\n")
    assert "--debug" in err
    assert "Traceback" not in err
    code, _, err = unlearn(capsys, *arguments, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "run the command again" not in err


def test_an_input_error_has_a_traceback_only_on_demand(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Traceback" in unlearn(capsys, "--debug", *validate(place, forget=""))[2]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/disk/file"),
        PermissionError(13, "Permission denied", "/disk/file"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["full disk", "permission", "full disk told by safetensors"],
)
def test_a_machine_that_gives_out_is_an_environment_error(
    error: Exception, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, error)
    code, _, err = unlearn(capsys, *run(place, "sweep"))
    assert code == 3
    assert err.startswith("environment error: ")
    assert "fix:" in err
    assert isinstance(error, ValueError) or "/disk/file" in err
