"""What a run prints: few, plain lines."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from launcher.console import Console, Eta, duration, evaluation_lines, number, progress_lines, settings, summary_lines
from tests.helpers.run_folder import build_finished
from trainers.files import read_json


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read_json(build_finished(tmp_path_factory.mktemp("console") / "run") / "results.json")


def play(console: Console) -> None:
    """A small sweep."""
    console.stage("sweep – 8 trials")
    console.line("target memorised: forget 0.97 → retain 0.98")
    console.trial_started("trial-01", overrides={"train.learning_rate": 1e-3, "train.objective.name": "npo"}, running=1, total=8)
    console.trial_finished("trial-01", headline="over-forgetting, AUC 0.07", seconds=20.0, done=1, total=8, eta_s=140.0)
    console.trial_failed(
        "trial-02", reason="loss is not finite", log_path=Path("trials/trial-02/logs/rank-0.log"), last_lines=["a", "b", "c", "d"]
    )


def test_a_pipe_gets_plain_ascii_without_escape_codes() -> None:
    stream = io.StringIO()
    play(Console(stream))
    text = stream.getvalue()
    assert text.isascii()
    assert "\x1b" not in text
    assert text.splitlines()[0] == "== sweep - 8 trials"
    assert "  trial-01  started   learning_rate=0.001, objective=npo  (1 running, 8 in all)" in text
    assert "over-forgetting, AUC 0.07  20 s  (1 of 8, about 2 min 20 s left)" in text


def test_a_terminal_gets_colours_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = Terminal(), Terminal()
    play(Console(coloured))
    monkeypatch.setenv("NO_COLOR", "1")
    play(Console(plain))
    assert "\x1b[" in coloured.getvalue()
    assert "\x1b[" not in plain.getvalue()
    assert "→" in plain.getvalue()


def test_a_failure_shows_three_lines_of_its_log_and_where_the_rest_is() -> None:
    stream = io.StringIO()
    Console(stream, quiet=True).trial_failed("trial-02", reason="loss is\nnot finite", log_path="x/rank-0.log", last_lines=list("abcd"))
    assert stream.getvalue().splitlines() == [
        "  trial-02  FAILED    loss is not finite",
        "      | b",
        "      | c",
        "      | d",
        "      log: x/rank-0.log",
    ]


def test_quiet_keeps_only_failures_warnings_and_the_summary(results: dict[str, Any]) -> None:
    stream = io.StringIO()
    console = Console(stream, quiet=True)
    play(console)
    console.warning("disk is nearly full")
    console.summary(results)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("  trial-02  FAILED")
    assert "warning: disk is nearly full" in lines
    assert not any("started" in line for line in lines)


def test_text_from_a_model_cannot_send_escape_codes() -> None:
    stream = Terminal()
    Console(stream).line("evil \x1b[2J text")
    assert "\x1b[2J" not in stream.getvalue()


def test_the_summary_fits_in_twenty_lines_and_names_what_matters(results: dict[str, Any]) -> None:
    lines = summary_lines(results, paths={"model": "runs/x/merged", "report": "runs/x/report.html"})
    text = "\n".join(lines)
    assert len(lines) <= 20
    assert results["verdict"]["sentence"] in text
    assert "8 trials: 6 finished, 1 failed, 1 stopped" in text
    assert "0.703" in next(line for line in lines if line.startswith("TIES merge"))
    assert "merge minus better parent, final score: +0.231 [+0.180, +0.290]" in text
    assert "weakest of the 12 terms: retain Task1 regurgitation = 0.800" in text
    assert lines[-1] == "report   runs/x/report.html"


def test_the_summary_keeps_its_paths_however_many_controls_there_are(results: dict[str, Any]) -> None:
    control = next(model for model in results["models"] if model["role"] == "control")
    many = {**results, "models": results["models"] + [{**control, "name": f"control-{index}"} for index in range(20)]}
    lines = summary_lines(many, paths={"model": "m", "report": "r"})
    assert len(lines) <= 20
    assert lines[-1] == "report   r"
    assert any(line.startswith("TIES merge") for line in lines)


def test_a_column_without_numbers_is_left_out_and_missing_numbers_are_dashes(results: dict[str, Any]) -> None:
    models = [{**model, "scores": {**model["scores"], "mmlu_average": None}} for model in results["models"]]
    models[0]["scores"]["mia_auc"] = None
    lines = summary_lines({**results, "models": models})
    head = next(line for line in lines if "95% interval" in line)
    assert "MMLU" not in head
    assert "MMLU" in next(line for line in summary_lines(results) if "95% interval" in line)
    assert " - " in next(line for line in lines if line.startswith("before unlearning"))


def test_an_empty_summary_is_no_failure() -> None:
    assert summary_lines({}) == [""]


def test_time_left_is_the_mean_of_the_finished_over_the_concurrency() -> None:
    """Two of eight done in 10 s and 20 s, two at a time: 15 s x 6 / 2 = 45 s."""
    eta = Eta(total=8, concurrency=2)
    assert eta.remaining_s() is None
    eta.finished(10.0)
    eta.finished(20.0)
    assert eta.remaining_s() == 45.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.04, "0.0 s"), (8.25, "8.2 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (22320, "6 h 12 min")],
)
def test_durations_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_settings_use_short_names_unless_they_would_clash() -> None:
    assert settings({"train.learning_rate": 1e-4, "train.objective.name": "npo"}) == "learning_rate=0.0001, objective=npo"
    assert settings({"a.seed": 1, "b.seed": 2}) == "a.seed=1, b.seed=2"
    assert number(None) == "-"
    assert number(0.12345) == "0.123"


@pytest.mark.parametrize(
    ("stream", "expected"),
    [(io.StringIO(), "third\n"), (Terminal(), "\r\x1b[Ksecond\r\x1b[Kthird\r\x1b[K")],
    ids=["log: a line every half minute", "terminal: one line, rewritten and removed"],
)
def test_progress_is_shown_now_and_then(stream: io.StringIO, expected: str) -> None:
    """Told after 0.1, 1 and 31 s."""
    times = iter((0.0, 0.1, 1.0, 1.0, 31.0, 31.0) if stream.isatty() else (0.0, 0.1, 1.0, 31.0, 31.0))
    with progress_lines(stream, clock=lambda: next(times)) as show:
        for text in ("first", "second", "third"):
            show(text)
    assert stream.getvalue() == expected


def test_an_evaluation_is_told_score_by_score() -> None:
    """What was not measured has no line, and a score without an interval has none beside it."""
    lines = evaluation_lines(
        scores={"final_score": None, "task_aggregate": 0.5, "mia_auc": 0.25, "unknown": 1.0},
        intervals={"mia_auc": [0.125, 0.5]},
        notes=["MMLU was not run: there is no final score."],
    )
    assert lines == [
        "  task aggregate          0.500",
        "  membership AUC          0.250   [0.125, 0.500]",
        "  note: MMLU was not run: there is no final score.",
    ]
