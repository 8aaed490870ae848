"""The process that follows a run, against the files that Weights & Biases and TensorBoard really write."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.console import Console
from launcher.events import EventLog
from launcher.report import build_report
from launcher.tracking import process
from launcher.tracking.config import TrackingConfig
from launcher.tracking.content import MERGE, REPORT, facts_of, step_values
from launcher.tracking.files import TrackingFiles, Written, run_id, run_identity
from launcher.tracking.process import catch_up, following
from launcher.tracking.wandb_log import read_payloads, written_in
from tests.helpers.run_folder import build_finished, build_running
from tests.helpers.tracked import LoggedRun, event_scalars, logged_runs
from trainers.files import append_jsonl, read_json, read_jsonl, write_json, write_text

LIMIT_S = 60.0
"""Seconds after which a process counts as hung; it takes about two."""
TRACKING = TrackingConfig(wandb="offline", tags=("drill",))
BOTH = TRACKING.model_copy(update={"tensorboard": True})
SECRET = "hush-hush-hush-hush"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no server, and no settings of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def follow_once(run: Path, *, tracking: TrackingConfig = TRACKING) -> None:
    """One start of the following process that sees the run folder as it is, and ends."""
    files = TrackingFiles(run)
    files.write_settings(tracking, mode="offline")
    assert catch_up(files, limit_s=LIMIT_S), files.log.read_text()


def expected_rows(run: Path, name: str) -> list[dict[str, Any]]:
    """What W&B must hold of a trial: every line once, at its optimizer step."""
    rows = [step_values(line) for line in read_jsonl(run / "trials" / name / "metrics.jsonl")]
    return [{**row, "_step": row["step"]} for row in rows]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was followed."""
    run = build_finished(tmp_path_factory.mktemp("followed") / "run")
    write_text(
        run / "experiment.yaml",
        f"name: fake\nseed: 42\nmodel: {{model_name_or_path: /home/someone/models/base, token: {SECRET}}}\ndata: {{path: d/e/lume}}\n",
    )
    build_report(run)
    # A curve that fills more than one block of W&B's log.
    for step in range(41, 161):
        append_jsonl(run / "trials" / "trial-02" / "metrics.jsonl", {"step": step, "loss": 1 / step, "terms": {"forget_npo": 2 / step}})
    follow_once(run, tracking=BOTH)
    return run


def test_every_part_of_a_sweep_is_one_run_of_its_group(followed: Path) -> None:
    runs = logged_runs(followed)
    kinds = {title: one.job_type for title, one in runs.items()}
    trials = {f"trial-{number:02d}": "trial" for number in range(1, 9)}
    assert {title.split()[0]: kind for title, kind in kinds.items()} == {
        "before": "baseline", **trials, "merge": "merge", "report": "report",
    }  # fmt: skip
    assert {one.group for one in runs.values()} == {"fake"}
    assert all("drill" in one.tags for one in runs.values())


def test_curves_are_the_metrics_by_optimizer_step(followed: Path) -> None:
    trial = one_run(followed, "trial-03")
    assert len(trial.curves) == 40
    assert trial.curves == expected_rows(followed, "trial-03")
    assert ("*", "step") in trial.step_metrics
    assert {"loss", "terms/forget_npo", "signals/mia_auc"} <= set(trial.curves[9])


def test_a_trial_ends_with_its_scores_and_its_verdict(followed: Path) -> None:
    trial = one_run(followed, "trial-03")
    report = read_json(followed / "trials" / "trial-03" / "validation.json")
    assert trial.summary["validation/mia_auc"] == report["scores"]["mia_auc"]
    assert (trial.summary["verdict"], trial.summary["state"]) == ("over-forgetting", "finished")
    assert trial.exit_codes == [0]
    failed = one_run(followed, "trial-07")
    assert (failed.summary["state"], failed.exit_codes) == ("failed", [1])
    stopped = one_run(followed, "trial-08")
    assert (stopped.summary["state"], stopped.exit_codes) == ("stopped", [0])


def test_the_report_run_holds_table_plots_and_page(followed: Path) -> None:
    report = one_run(followed, "report")
    assert len(report.rows) == 1
    kinds = {name.rpartition("/")[0]: value for name, value in report.rows[0].items() if name.endswith("/_type")}
    assert kinds == {"models": "table-file", "trials": "table-file", "tradeoff": "image-file", "curves": "image-file",
                     "merge_scale": "image-file", "merge_density": "image-file", "terms": "image-file", "report": "html-file"}  # fmt: skip
    (folder,) = report.folders
    table = read_json(folder / "files" / report.rows[0]["models/path"])
    results = read_json(followed / "results.json")
    assert [row[table["columns"].index("name")] for row in table["data"]] == [model["name"] for model in results["models"]]
    scores = [row[table["columns"].index("final_score")] for row in table["data"]]
    assert scores == [model["scores"]["final_score"] for model in results["models"]]
    page = (folder / "files" / report.rows[0]["report/path"]).read_text()
    assert page == (followed / "report.html").read_text()
    assert {"results.json", "trials.csv"} <= {path.name for path in (folder / "files").iterdir()}
    assert report.summary["verdict"] == results["verdict"]["sentence"]


def test_settings_go_out_without_keys_and_places(followed: Path) -> None:
    trial = one_run(followed, "trial-03")
    assert trial.config["experiment"]["model"]["model_name_or_path"] == "…/base"
    assert trial.config["experiment"]["data"]["path"] == "…/lume"
    tracked = [path for path in (followed / "tracking").rglob("*") if path.is_file()]
    assert [path for path in tracked if SECRET.encode() in path.read_bytes()] == []
    logs = [path for path in tracked if path.suffix in (".wandb", ".log") or "tfevents" in path.name]
    assert len(logs) > 20
    assert [path for path in logs if b"/home/someone" in path.read_bytes()] == []
    for word in (SECRET, "/home/someone"):
        assert word in (followed / "experiment.yaml").read_text(), "the control: it is there to be found"


def test_tensorboard_holds_the_same_curves(followed: Path) -> None:
    curves = event_scalars(followed, "trial-03")
    rows = expected_rows(followed, "trial-03")
    assert [step for step, _ in curves["loss"]] == [row["step"] for row in rows]
    assert [value for _, value in curves["loss"]] == pytest.approx([row["loss"] for row in rows])
    assert [step for step, _ in curves["signals/mia_auc"]] == [10, 20, 30, 40]
    report = read_json(followed / "trials" / "trial-03" / "validation.json")
    assert curves["scores/validation/mia_auc"] == [(40, pytest.approx(report["scores"]["mia_auc"]))]


def test_following_again_writes_nothing_twice(followed: Path) -> None:
    before = {path: path.read_bytes() for path in (followed / "tracking").rglob("*.wandb")}
    follow_once(followed)
    assert {path: path.read_bytes() for path in (followed / "tracking").rglob("*.wandb")} == before
    # What is lost of the memory of it is read from W&B's own files.
    (followed / "tracking" / "state.json").unlink()
    follow_once(followed)
    trial, report = one_run(followed, "trial-03"), one_run(followed, "report")
    assert (len(trial.folders), trial.curves) == (2, expected_rows(followed, "trial-03"))
    assert (len(report.folders), len(report.rows)) == (2, 1)
    assert report.exit_codes == [0, 0]


def test_a_resumed_trial_goes_on_in_the_same_run(tmp_path: Path) -> None:
    """Its last steps since a checkpoint are repeated in the metrics, and its id is that of this run folder only."""
    run = build_running(tmp_path / "run")
    for step in range(1, 13):
        append_jsonl(run / "trials" / "trial-04" / "metrics.jsonl", {"step": step, "loss": 1 / step})
    write_text(run / "trials" / "trial-04" / "config.yaml", "train: {objective: {name: npo}, learning_rate: 0.001}\n")
    follow_once(run)
    first = one_run(run, "trial-04")
    assert first.exit_codes == [1], "it was interrupted"

    moved = run.rename(tmp_path / "moved")
    lines = read_jsonl(moved / "trials" / "trial-04" / "metrics.jsonl")[:8]
    write_text(moved / "trials" / "trial-04" / "metrics.jsonl", "")
    for line in [*lines, *({"step": step, "loss": 1 / step} for step in range(9, 21))]:
        append_jsonl(moved / "trials" / "trial-04" / "metrics.jsonl", line)
    write_json(moved / "trials" / "trial-04" / "status.json", {"name": "trial-04", "state": "finished", "step": 20, "num_steps": 20})
    follow_once(moved)
    second = one_run(moved, "trial-04")
    assert second.id == first.id
    assert len(second.folders) == 2
    assert second.curves == expected_rows(moved, "trial-04")
    assert [row["step"] for row in second.curves] == list(range(1, 21))
    assert second.exit_codes == [1, 0]

    other = shutil.copytree(moved, tmp_path / "other", ignore=shutil.ignore_patterns("tracking", "events.jsonl"))
    EventLog(other).started("trials")
    follow_once(other)
    assert one_run(other, "trial-04").id != first.id, "the control: another run of the same experiment"


def test_without_a_pair_the_merge_run_tells_of_what_was_delivered(tmp_path: Path) -> None:
    run = build_finished(tmp_path / "run")
    results = read_json(run / "results.json")
    facts = facts_of(run, MERGE, over=True)
    assert facts is not None
    assert facts.summary["model"] == "TIES merge"
    results["models"] = [model for model in results["models"] if model["role"] != "merged"]
    results["verdict"]["winner"] = "trial-06"
    write_json(run / "results.json", results)
    facts = facts_of(run, MERGE, over=True)
    assert facts is not None
    assert (facts.summary["model"], facts.summary["delivered"]) == ("keeps more", "trial-06")
    results["verdict"]["winner"] = None
    write_json(run / "results.json", results)
    assert facts_of(run, MERGE, over=True) is None
    report = facts_of(run, REPORT, over=True)
    assert report is not None
    assert not report.succeeded


def test_results_count_once_the_run_is_finished_and_its_page_is_built(tmp_path: Path) -> None:
    run = build_finished(tmp_path / "run")
    assert facts_of(run, REPORT, over=False) is None
    build_report(run)
    assert facts_of(run, REPORT, over=False) is not None
    write_json(run / "results.json", {**read_json(run / "results.json"), "run_finished": False})
    assert facts_of(run, REPORT, over=True) is None


def test_a_failed_trial_may_still_be_started_again(tmp_path: Path) -> None:
    """Until it ended for good, or the sweep did."""
    run = build_running(tmp_path / "run")
    status = run / "trials" / "trial-04" / "status.json"
    write_json(status, {"name": "trial-04", "state": "failed"})
    assert facts_of(run, "trial-04", over=False) is None
    assert facts_of(run, "trial-04", over=True) is not None
    write_json(status, {"name": "trial-04", "state": "failed", "retry": False, "reason": "out_of_memory", "errors": 2})
    facts = facts_of(run, "trial-04", over=False)
    assert facts is not None
    assert (facts.summary["reason"], facts.summary["errors"], facts.succeeded) == ("out_of_memory", 2, False)


def test_ids_are_those_of_run_and_trial() -> None:
    assert run_id("a", "trial-00") == run_id("a", "trial-00")
    assert len({run_id("a", "trial-00"), run_id("a", "trial-01"), run_id("b", "trial-00")}) == 3


def test_a_follower_that_is_killed_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """W&B keeps rows in memory for a while, so that the file ends in the middle of what it was told."""
    run, name = build_running(tmp_path / "run"), "trial-04"
    write_text(run / "trials" / name / "config.yaml", "train: {}\n")
    metrics = run / "trials" / name / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}, "loss": {step / 7}}}\n' for step in range(1, 601)))
    files = TrackingFiles(run)
    files.write_settings(BOTH, mode="offline")
    logs = files.offline_logs
    identifier = run_id(str(run_identity(run)), name)

    with started(files) as follower:
        wait_for(lambda: written_in(logs(identifier)).last_step > 0, what="the first rows")
        with open(metrics, "a") as file:
            file.writelines(f'{{"step": {step}, "loss": {step / 7}}}\n' for step in range(601, 1201))
        wait_for(lambda: written_in(logs(identifier)).last_step > 600, what="some of the new rows")
        follower.kill()
        follower.wait()
    held = written_in(logs(identifier)).last_step
    with open(metrics, "a") as file:
        file.writelines(f'{{"step": {step}, "loss": {step / 7}}}\n' for step in range(1201, 1301))
    write_json(run / "trials" / name / "status.json", {"name": name, "state": "finished", "step": 1300, "num_steps": 1300})
    follow_once(run, tracking=BOTH)

    trial = one_run(run, name)
    assert 600 < held < 1300
    assert len(trial.folders) == 2
    assert trial.curves == expected_rows(run, name)
    assert [step for step, _ in event_scalars(run, name)["loss"]] == list(range(1, 1301))
    assert wandb_cores(files) == [], "nothing of the killed process is left"


@pytest.mark.parametrize("cut", [0, 3, 7, 10, 500, 32_768, 32_775, -1, -100])
def test_a_torn_log_holds_its_first_records(followed: Path, cut: int) -> None:
    data = max((path.read_bytes() for path in (followed / "tracking").rglob("*.wandb")), key=len)
    assert len(data) > 2**15 + 100, "more than a block"
    whole, part = list(read_payloads(data)), list(read_payloads(data[:cut]))
    assert part == whole[: len(part)]
    assert len(part) < len(whole)


def test_a_torn_log_is_continued_where_it_ends(tmp_path: Path) -> None:
    """As after a kill, when the state file says nothing of a run that was still open."""
    run = build_running(tmp_path / "run")
    follow_once(run)
    files = TrackingFiles(run)
    kept = files.read_kept()
    assert kept["wandb"]["trial-01"].last_step == 40
    (path,) = files.offline_logs(run_id(str(run_identity(run)), "trial-01"))
    path.write_bytes(path.read_bytes()[:6000])
    assert -1 < written_in([path]).last_step < 40
    files.write_kept({"wandb": {**kept["wandb"], "trial-01": Written()}})
    follow_once(run)
    assert one_run(run, "trial-01").curves == expected_rows(run, "trial-01")


def test_nothing_that_happens_to_the_follower_reaches_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_running(tmp_path / "run")
    monkeypatch.setattr(process, "FINISH_S", 1.0)
    for sign in (signal.SIGKILL, signal.SIGSTOP):
        output = io.StringIO()
        with following(run, tracking=TRACKING, mode="offline", console=Console(output)):
            (follower,) = [child for child in psutil.Process().children() if "launcher.tracking.follow" in child.cmdline()]
            follower.send_signal(sign)
        assert f"unlearn sync {run}" in output.getvalue()
        assert not follower.is_running()


def test_the_follower_ends_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    """And writes what is there first."""
    run = build_running(tmp_path / "run")
    sweep = f"""
import os, pathlib, signal
from launcher.console import Console
from launcher.tracking.config import TrackingConfig
from launcher.tracking.process import following
with following(pathlib.Path({str(run)!r}), tracking=TrackingConfig(), mode="offline", console=Console()):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", sweep]).returncode == -signal.SIGKILL

    def followers() -> list[int]:
        return [one.pid for one in psutil.process_iter(["cmdline"]) if str(run.resolve()) in (one.info["cmdline"] or [])]

    wait_for(lambda: not followers(), what="end of the follower")
    assert one_run(run, "trial-01").curves == expected_rows(run, "trial-01")


def test_a_finished_sweep_says_how_to_upload(tmp_path: Path) -> None:
    run, output = build_running(tmp_path / "run"), io.StringIO()
    with following(run, tracking=TrackingConfig(), mode="offline", console=Console(output)):
        pass
    assert output.getvalue().count(f"unlearn sync {run}") == 1
    assert not (run / "tracking" / "tensorboard").exists()


def test_off_leaves_no_trace(tmp_path: Path) -> None:
    run = build_running(tmp_path / "run")
    with following(run, tracking=TrackingConfig(wandb="off"), mode="off", console=Console(io.StringIO())):
        pass
    assert not (run / "tracking").exists()


def test_a_server_that_cannot_be_reached_costs_nothing_but_the_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, output = build_running(tmp_path / "run"), io.StringIO()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with following(run, tracking=TrackingConfig(), mode="online", console=Console(output)):
        pass
    assert "cannot be reached" in (run / "tracking" / "follow.log").read_text()
    assert f"unlearn sync {run}" in output.getvalue()
    assert one_run(run, "trial-01").curves == expected_rows(run, "trial-01")


def one_run(run: Path, name: str) -> LoggedRun:
    (found,) = [one for title, one in logged_runs(run).items() if title.split()[0] == name]
    return found


@contextmanager
def started(files: TrackingFiles) -> Iterator[psutil.Process]:
    """The following process, which does not outlive the block."""
    popen = process.spawn(files)
    try:
        yield psutil.Process(popen.pid)
    finally:
        popen.kill()
        popen.wait()
        assert popen.stdin is not None
        popen.stdin.close()


def wait_for(condition: Any, *, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {LIMIT_S:g} s"
        time.sleep(0.05)


def wandb_cores(files: TrackingFiles) -> list[psutil.Process]:
    """W&B's own processes that still have a file of this run open."""
    found = []
    for one in psutil.process_iter(["name"]):
        try:
            if one.info["name"] == "wandb-core" and any(str(files.folder) in file.path for file in one.open_files()):
                found.append(one)
        except psutil.Error:
            continue
    return found
