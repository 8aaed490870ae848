"""The report: complete, self-contained, safe to send, and built from whatever is there."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launcher.masking import mask_answer, mask_personal_data, mask_row_text, redact
from launcher.plots import BLUE, VERMILLION
from launcher.report import build_report, render
from launcher.report_data import pareto_names, read_run
from launcher.report_figures import report_figures
from launcher.report_pairs import pair_view
from launcher.report_rows import side_by_side
from launcher.report_scores import shade
from launcher.report_tables import report_tables
from launcher.report_text import number
from launcher.report_trials import trials_csv
from tests.helpers.run_folder import LOG_LINES, build_finished, build_running
from trainers.errors import InputError
from trainers.files import read_json, write_json, write_text

SECTIONS = (
    "verdict",
    "tradeoff",
    "scores",
    "verdicts",
    "terms",
    "pair",
    "audit",
    "curves",
    "generations",
    "trials",
    "failures",
    "provenance",
    "glossary",
)
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"


class Page(HTMLParser):
    """Ids, tags, everything that a browser would load, and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            # A link (a href) is followed only by a reader's click; everything else of this kind is fetched at once.
            if name in ("src", "srcset", "data", "poster") or (name in ("href", "xlink:href") and tag != "a"):
                self.loaded.append(str(value))
            elif name == "href":
                self.linked.append(str(value))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def template_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    answers = {"forget-task3-sc1": HOSTILE}
    return build_finished(tmp_path_factory.mktemp("template") / "run", answers=answers)


@pytest.fixture(scope="module")
def finished(template_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; only read by the tests."""
    run = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(template_run, run)
    build_report(run)
    return run


@pytest.fixture
def fresh(template_run: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a finished run that the test may change."""

    def make() -> Path:
        return Path(shutil.copytree(template_run, tmp_path / "run"))

    return make


def page_of(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_every_section_is_there_once(finished: Path) -> None:
    page = page_of(finished)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert "The TIES merge of trial-03 and trial-06 is delivered: final score 0.703 [0.663, 0.743]" in page.text
    assert "The TIES merge of trial-03 and trial-06 scores 0.703" in page.text
    assert "different test set, not comparable" in page.text
    assert "Without scores, so not drawn: trial-07 (failed)" in page.text


def test_ids_are_unique_although_several_drawings_share_the_page(finished: Path) -> None:
    ids = page_of(finished).ids
    assert len(ids) > 100
    assert len(ids) == len(set(ids))


def test_the_page_loads_nothing_and_is_small(finished: Path) -> None:
    page = page_of(finished)
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert [target for target in page.loaded if not target.startswith("#")] == []
    assert not {"link", "iframe", "object", "img"} & set(page.tags)
    assert "@import" not in text
    assert page.tags.count("script") == 1
    # Only references inside the page: markers and clip paths.
    assert text.count("url(") == text.count("url(#")


def test_the_reader_of_loaded_things_would_notice_one() -> None:
    """Negative control of the test above."""
    page = Page(
        '<img src="http://cdn.example/x.png"><link rel="stylesheet" href="https://cdn.example/x.css"><a href="https://ok.example">x</a>'
    )
    assert page.loaded == ["http://cdn.example/x.png", "https://cdn.example/x.css"]


def test_only_the_script_of_the_page_may_run(finished: Path) -> None:
    """The page's own rule names the hash of its script, so that a browser refuses any other, whatever slipped through."""
    raw = (finished / "report.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", raw, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in raw
    assert "default-src 'none'" in raw


def test_every_link_of_the_page_leads_to_a_section_or_a_file(finished: Path) -> None:
    page = page_of(finished)
    files = [link for link in page.linked if not link.startswith(("#", "https://"))]
    assert len(files) > 30
    assert [link for link in files if not (finished / link).is_file()] == []
    assert {link[1:] for link in page.linked if link.startswith("#")} <= set(page.ids)


def test_a_page_without_files_beside_it_links_to_none(finished: Path) -> None:
    page = Page(render(read_run(finished), plots={}))
    assert [link for link in page.linked if link.startswith("plots/")] == []


def test_hostile_text_is_shown_as_text(finished: Path) -> None:
    raw = (finished / "report.html").read_text(encoding="utf-8")
    assert raw.count("<script") == 1
    assert "<img" not in raw
    assert "&lt;script&gt;" in raw
    assert "<script>alert" in page_of(finished).text


def test_hostile_names_and_settings_are_escaped_everywhere(fresh: Callable[[], Path]) -> None:
    run = fresh()
    results = read_json(run / "results.json")
    results["verdict"]["sentence"] = results["warnings"][0] = HOSTILE
    results["models"][-1]["label"] = results["trials"][0]["verdict"] = HOSTILE
    results["trials"][0]["overrides"] = {HOSTILE: HOSTILE}
    results["trials"][1]["name"] = HOSTILE
    write_json(run / "results.json", results)
    write_json(run / "provenance.json", {"command": HOSTILE, HOSTILE: HOSTILE})
    raw = build_report(run).read_text(encoding="utf-8")
    page = Page(raw)
    assert raw.count("&lt;script&gt;") >= 7
    assert raw.count("<script") == 1
    assert page.loaded == [target for target in page.loaded if target.startswith("#")]


def test_the_trade_off_plot_names_every_model_on_hover(finished: Path) -> None:
    svg = (finished / "plots" / "tradeoff.svg").read_text(encoding="utf-8")
    for name in ("trial-03 (over-forgetting)", "trial-08", "merged (balanced), TIES merge, delivered", "linear", "before"):
        assert f"<title>{name}" in svg
    assert (finished / "plots" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert "<title>trial-07" not in svg


def test_a_failed_trial_shows_its_reason_and_the_end_of_its_log(finished: Path) -> None:
    text = page_of(finished).text
    assert "the loss is not finite at step 11" in text
    assert LOG_LINES[-1] in text


def test_the_weakest_term_is_named(finished: Path) -> None:
    """With retention 0.86 and forgetting 0.90, the lowest of the twelve is 0.86 - 0.06 = 0.80, on the first retain term."""
    assert "Weakest of TIES merge : retain Task1 regurgitation = 0.800" in page_of(finished).text


def test_personal_data_is_masked_by_default_and_only_by_default(fresh: Callable[[], Path]) -> None:
    run = fresh()
    secrets = ("900-12-3456", "900123456", "555-013-7788", "ann.vale@mail.example", "14 Elm")
    data = read_run(run)
    masked = render(data, plots={}) + json.dumps(report_tables(data)["generations"])
    assert [secret for secret in secrets if secret in masked] == []
    plain = render(read_run(run), plots={}, mask=False)
    assert [secret for secret in secrets if secret in plain] == list(secrets)


def test_the_rows_shown_do_not_depend_on_their_results(finished: Path) -> None:
    """Six rows per set: the first of each of three tasks times two kinds, forgotten or not."""
    shown = side_by_side(read_run(finished))
    assert {part: len(rows) for part, rows in shown["sets"].items()} == {"forget": 6, "retain": 6}
    same = [row["after"]["same"] for row in shown["sets"]["forget"]]
    assert True in same
    assert False in same


def test_numbers_in_csv_are_those_of_the_results(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "trials.csv").open(encoding="utf-8")))
    results = {trial["name"]: trial for trial in read_json(finished / "results.json")["trials"]}
    assert [row["name"] for row in rows] == sorted(results)
    third = next(row for row in rows if row["name"] == "trial-03")
    assert float(third["test.final_score"]) == results["trial-03"]["test"]["final_score"]
    assert float(third["validation.mia_auc"]) == results["trial-03"]["validation"]["mia_auc"]
    assert float(third["learning_rate"]) == pytest.approx(3e-4)
    failed = next(row for row in rows if row["name"] == "trial-07")
    assert failed["test.final_score"] == ""
    assert failed["error"] == "the loss is not finite at step 11"


def test_building_twice_gives_the_same_bytes(finished: Path) -> None:
    names = ("report.html", "trials.csv", "plots/tradeoff.svg", "plots/tradeoff.png", "plots/scores.json", "plots/curves.csv")
    first = {name: (finished / name).read_bytes() for name in names}
    build_report(finished)
    assert {name: (finished / name).read_bytes() for name in names} == first


def test_a_running_sweep_has_a_report_that_says_what_is_missing(tmp_path: Path) -> None:
    run = build_running(tmp_path / "run")
    page = Page(build_report(run).read_text(encoding="utf-8"))
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert "No verdict yet: the run is not complete (4 trials: 3 finished, 1 running)" in page.text
    assert "3 of 4 trials have ended (3 finished). Stage: running trials." in page.text
    assert "Running now: trial-04 (step 12 of 40)" in page.text
    assert "results.json is not there yet" in page.text
    assert "pairs.json is not there yet" in page.text
    assert (run / "plots" / "curves.svg").exists()


def test_settings_of_a_running_sweep_are_those_in_which_the_trials_differ(tmp_path: Path) -> None:
    data = read_run(build_running(tmp_path / "run"))
    first = next(trial for trial in data.trials if trial["name"] == "trial-01")
    assert first["overrides"] == {"learning_rate": 1e-4, "objective.name": "npo"}


@pytest.mark.parametrize(
    "gone",
    ["results.json", "pairs.json", "provenance.json", "target.json", "experiment.yaml", "baseline", "merged", "controls", "trials"],
)
def test_any_part_may_be_missing(fresh: Callable[[], Path], gone: str) -> None:
    run = fresh()
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    data = read_run(run)
    page = Page(render(data, plots=report_figures(data, files=False)))
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert report_tables(data)


@pytest.mark.parametrize("name", ["results.json", "pairs.json", "experiment.yaml", "trials/trial-02/status.json", "merged/merge.json"])
def test_a_broken_file_is_named_instead_of_stopping_the_report(fresh: Callable[[], Path], name: str) -> None:
    run = fresh()
    write_text(run / name, "{ broken: [")
    assert f"{name} could not be read" in Page(render(read_run(run), plots={})).text


def test_an_empty_run_has_a_report_too(tmp_path: Path) -> None:
    write_text(tmp_path / "experiment.yaml", "name: empty\n")
    assert "No trial has begun yet" in Page(build_report(tmp_path).read_text(encoding="utf-8")).text


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "notes.txt", "hello")
    with pytest.raises(InputError, match="not a run folder"):
        build_report(tmp_path)
    with pytest.raises(InputError, match="no such run folder"):
        build_report(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_missing_scores_are_dashes_not_zeros(fresh: Callable[[], Path]) -> None:
    run = fresh()
    results = read_json(run / "results.json")
    for model in results["models"]:
        model["scores"] = {**model["scores"], "mmlu_average": None, "final_score": None}
    write_json(run / "results.json", results)
    page = Page(render(read_run(run), plots={}))
    assert "Task aggregate before unlearning 0.000 → after 0.878" in page.text
    assert "Final score 0" not in page.text
    assert number(None) == "–"
    assert number(float("nan")) == "–"
    assert number(0.0) == "0.000"
    assert number(True) == "–"


def test_the_pair_view_reads_what_the_search_writes(finished: Path) -> None:
    """The fake run's pairs.json is written by the real search: its pair, its measured points and the crossing of 0.5 are found."""
    view = pair_view(read_run(finished))
    assert (view["pair"]["over"], view["pair"]["under"]) == ("trial-03", "trial-06")
    assert view["rows"][0]["chosen"]
    assert view["rows"][0]["outcome"].startswith("won")
    assert sum(row["chosen"] for row in view["rows"]) == 1
    assert [row["name"] for row in view["excluded"]] == ["trial-04"]
    scale = next(knob for knob in view["knobs"] if knob["name"] == "scale")
    aucs = [auc for curve in scale["curves"].values() for _, auc in curve]
    assert min(aucs) < 0.5 < max(aucs)
    assert scale["chosen"] is not None
    assert (finished / "plots" / "merge_scale.svg").exists()


def test_the_pair_section_shows_what_a_merge_is_compared_with(finished: Path) -> None:
    """Every control with its label, and what everything cost; the linear mean also has a final score on the test fold."""
    data = read_run(finished)
    view = pair_view(data)
    labels = [row["label"] for row in view["controls"]]
    assert {"linear mean of both parents", "trial-03 scaled to AUC 0.5", "trial-06 scaled to AUC 0.5"} < set(labels)
    text = render(data, plots={})
    assert all(label in text for label in labels)
    assert view["cost"] is not None
    assert view["cost"] in text
    linear = next(row for row in view["controls"] if row["label"].startswith("linear"))
    assert linear["final"] == next(model for model in data.models if model["name"] == "linear")["scores"]["final_score"]
    data.pairs.pop("controls")
    assert "linear mean of both parents" not in render(data, plots={}).partition("What a merge has to be better than")[2]


def test_secrets_never_reach_the_page(fresh: Callable[[], Path]) -> None:
    run = fresh()
    write_text(run / "experiment.yaml", "name: fake\ntracking: {wandb: {api_key: hush-hush}}\n")
    write_json(run / "provenance.json", {"environment": {"HF_TOKEN": "hush-hush"}, "max_new_tokens": 32})
    text = render(read_run(run), plots={})
    assert "hush-hush" not in text
    assert redact({"max_new_tokens": 32, "tokens": "a"}) == {"max_new_tokens": 32, "tokens": "a"}


def test_pareto_front_is_what_nothing_beats_in_both() -> None:
    """(0.5, 0.5) is beaten by (0.6, 0.6); equal points stay; order is by rising x."""
    points = [("a", 0.9, 0.1), ("b", 0.6, 0.6), ("c", 0.5, 0.5), ("d", 0.1, 0.9), ("e", 0.9, 0.05)]
    assert pareto_names(points) == ["d", "b", "a"]


def test_shades_follow_the_value() -> None:
    assert shade(0.5).endswith(",0.00)")
    assert shade(0.0).startswith("rgba(213,94,0")
    assert shade(1.0).startswith("rgba(0,114,178")
    assert shade(None) == "transparent"
    assert VERMILLION != BLUE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("call 721-625-3765 now", "call •••-•••-•••• now"),
        ("call +1 (721) 625-3765", "call +• (•••) •••-••••"),
        ("SSN 900-51-4344.", "SSN •••-••-••••."),
        ("SSN 900514344", "SSN •••••••••"),
        ("write to tiffi\\_magenta@me.com!", "write to •••••\\••••••••@••.•••!"),
        ("lives at 10175 West 58th Place, #505, Orange, CA, 92867.", "lives at ••••• West ••th Place, #•••, Orange, CA, •••••."),
        ("born 1984-12-31 in Rome", "born ••••-••-•• in Rome"),
    ],
)
def test_personal_data_is_dotted(text: str, expected: str) -> None:
    assert mask_personal_data(text) == expected


@pytest.mark.parametrize("text", ["She wrote 12 books in 1984.", "Ada Byron (1815-1852) was a writer", "1939 – 1945", "in 3 of 40 streets"])
def test_ordinary_numbers_stay(text: str) -> None:
    """Negative control of masking: years, spans of years and counts are not personal data."""
    assert mask_personal_data(text) == text


def test_answers_to_personal_questions_keep_their_first_letter_and_no_digit() -> None:
    assert mask_answer("  10175 West") == "••••• ••••"
    assert mask_answer("") == ""
    assert mask_row_text("Orange", task="Task2", kind="qa", is_answer=True) == "O•••••"
    assert mask_row_text("Orange", task="Task1", kind="qa", is_answer=True) == "Orange"
    assert mask_row_text("born May 3, 1981", task="Task2", kind="sc", is_answer=True) == "born May •, ••••"


def test_trials_csv_survives_commas_and_line_breaks(fresh: Callable[[], Path]) -> None:
    run = fresh()
    results = read_json(run / "results.json")
    results["trials"][0]["error"] = 'a, "b"\nc'
    write_json(run / "results.json", results)
    rows = list(csv.DictReader(trials_csv(read_run(run)).splitlines(keepends=True)))
    assert rows[0]["error"] == 'a, "b"\nc'
    assert json.loads((run / "results.json").read_text())["trials"][0]["error"] == rows[0]["error"]
