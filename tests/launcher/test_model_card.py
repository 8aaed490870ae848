"""The model card: valid front matter, what was forgotten and how that was checked, and limits in plain words. No text, key or place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.model_card import refresh_model_card, render_card, write_model_card
from launcher.report_data import read_run
from tests.helpers.run_folder import build_finished
from trainers.errors import InputError
from trainers.files import append_jsonl, read_json, write_json, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_finished(tmp_path_factory.mktemp("card") / "run")


def parts(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card."""
    empty, matter, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(matter), body


def configured(folder: Path, text: str) -> tuple[dict[str, Any], str]:
    """The card of a run with this configuration."""
    run = build_finished(folder / "run")
    write_text(run / "experiment.yaml", text)
    return parts(render_card(read_run(run)))


# ---- front matter


def test_front_matter_is_yaml_and_names_library_base_and_tags(run: Path) -> None:
    matter, _ = parts(render_card(read_run(run)))
    assert matter["library_name"] == "transformers"
    assert matter["pipeline_tag"] == "text-generation"
    assert matter["base_model"] == "fake/base"
    assert {"unlearning", "merge", "ties"} <= set(matter["tags"])
    assert "license" not in matter


def test_the_hub_reads_the_scores_of_the_delivered_model(run: Path) -> None:
    """The hub's own reader finds a number per metric, and they are the delivered model's, not those of the one before unlearning."""
    from huggingface_hub import ModelCard

    data = ModelCard(render_card(read_run(run))).data
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    models = {model["name"]: model["scores"] for model in read_json(run / "results.json")["models"]}
    assert set(found) == {"final_score", "task_aggregate", "mia_auc", "mia_score", "mmlu_average", "forgetting", "retention"}
    assert found == {name: pytest.approx(models["merged"][name], abs=1e-4) for name in found}
    assert found["final_score"] != pytest.approx(models["baseline"]["final_score"], abs=0.1)
    assert {result.dataset_split for result in data.eval_results} == {"test"}


def test_a_run_without_scores_claims_none(tmp_path: Path) -> None:
    run = build_finished(tmp_path / "run")
    (run / "results.json").unlink()
    for report in run.rglob("eval.json"):
        report.unlink()
    matter, body = parts(render_card(read_run(run)))
    assert "model-index" not in matter
    assert "Not scored yet." in body


def test_a_single_checkpoint_is_not_called_a_merge(tmp_path: Path) -> None:
    run = build_finished(tmp_path / "run")
    record = read_json(run / "merged" / "merge.json")
    write_json(run / "merged" / "merge.json", record | {"trials": record["trials"][:1], "config": {"method": "linear", "scale": 0.9}})
    matter, _ = parts(render_card(read_run(run)))
    assert "merge" not in matter["tags"]
    assert "linear" not in matter["tags"]


# ---- licences: repeated, never invented


@pytest.mark.parametrize(
    ("configuration", "fields", "sentences"),
    [
        ("name: fake\n", {}, ("made from: not stated.", "Documents: not stated.", "no licence of this model can be concluded")),
        ("model: {license: Apache-2.0}\n", {"license": "apache-2.0"}, ("Apache-2.0 (as stated", "Documents: not stated.")),
        (
            "model: {license: Our Own 1.0}\ndata: {license: cc-by-4.0}\n",
            {"license": "other", "license_name": "Our Own 1.0"},
            ("Our Own 1.0 (as stated", "Documents: cc-by-4.0 (as stated"),
        ),
        ("data: {license: cc-by-4.0}\n", {}, ("made from: not stated.", "Documents: cc-by-4.0 (as stated")),
    ],
)
def test_licences_are_repeated_where_they_are_stated(
    tmp_path: Path, configuration: str, fields: dict[str, str], sentences: tuple[str, ...]
) -> None:
    """The documents' licence is never made the model's."""
    matter, body = configured(tmp_path, configuration)
    assert {key: value for key, value in matter.items() if key.startswith("license")} == fields
    assert all(sentence in body for sentence in sentences)
    assert ("no licence of this model can be concluded" in body) is ("not stated." in body)


# ---- places, keys and texts


def test_no_place_of_the_machine_and_no_key_is_on_the_card(tmp_path: Path) -> None:
    """The last part of a path stays, so that a reader can tell one thing from another."""
    run = build_finished(tmp_path / "run")
    write_text(
        run / "experiment.yaml",
        "name: fake\nmodel: {model_name_or_path: /home/me/secret-project/target-7b}\ndata: {path: ~/lume, mia: /mnt/team/mia}\n"
        "tracking: {api_key: abcdef123456}\n",
    )
    write_json(run / "target.json", {"path": "/home/me/secret-project/target-7b"})
    record = read_json(run / "merged" / "merge.json")
    record["trials"][0]["path"] = "/home/me/secret-project/runs/x/checkpoints/step-000040"
    write_json(run / "merged" / "merge.json", record)
    provenance = read_json(run / "provenance.json")
    write_json(
        run / "provenance.json", provenance | {"command": ["unlearn", "sweep", "/home/me/secret-project/x.yaml"], "folder": "/home/me"}
    )
    append_jsonl(run / "events.jsonl", {"time": 1.0, "kind": "audit_failed", "error": "file not found; where: /home/me/secret-project/t"})
    text = render_card(read_run(run))
    for secret in ("/home", "secret-project", "/mnt/team", "abcdef123456", str(tmp_path)):
        assert secret not in text
    assert "…/target-7b" in text
    assert "checkpoint of step 40" in text
    assert "base_model" not in parts(text)[0]


def test_no_text_of_a_row_is_on_the_card(run: Path) -> None:
    text = render_card(read_run(run))
    rows = (run / "merged" / "eval-rows.jsonl").read_text()
    for words in ("clockmaker", "900-12-3456", "900123456", "Elm Street", "first published program"):
        assert words in rows
        assert words not in text


@pytest.mark.parametrize(
    ("name", "exists", "base"),
    [("allenai/OLMo-1B-hf", False, "allenai/OLMo-1B-hf"), ("models/target", True, None), ("target", False, None)],
)
def test_a_folder_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, exists: bool, base: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    if exists:
        (tmp_path / name).mkdir(parents=True)
    matter, _ = configured(tmp_path, f"model: {{model_name_or_path: {name}}}\n")
    assert matter.get("base_model") == base
    stated, _ = configured(tmp_path / "stated", f"model: {{model_name_or_path: {name}, base_model: allenai/OLMo-7B}}\n")
    assert stated["base_model"] == "allenai/OLMo-7B"


# ---- what it says


def test_the_card_states_scores_recipe_limits_and_command(run: Path) -> None:
    _, body = parts(render_card(read_run(run)))
    assert "| **TIES merge (merged, balanced)** | 0.703 [0.663, 0.743] |" in body
    assert "| before unlearning (baseline, untouched) | 0.090 [" in body
    assert "Made of: trial-03 (over-forgetting parent)" in body
    assert "over-forgetting: trial-03 with learning_rate = 0.0003" in body
    assert "Merge: method ties, density 0.2, scale 1.342" in body
    assert "no proof" in body
    assert "Where proof is needed" in body
    assert "train again without the documents" in body
    assert "No audit was made" in body
    assert "`unlearn audit --model RUN/merged" in body
    assert "unlearn sweep RUN/experiment.yaml" in body
    assert "torch 2.13.0" in body


def test_the_reading_of_ties_is_told(tmp_path: Path) -> None:
    """Everything that ``merge.json`` says of the method, because several algorithms are called TIES."""
    run = build_finished(tmp_path / "run")
    record = read_json(run / "merged" / "merge.json")
    config = record["config"] | {"trim_scope": "tensor", "elect": "unweighted", "divisor": "count", "weights": None}
    write_json(run / "merged" / "merge.json", record | {"config": config})
    assert "method ties, density 0.2, scale 1.342, trim_scope tensor, elect unweighted, divisor count\n" in render_card(read_run(run))


def test_the_counts_of_both_sets_are_told_by_task(tmp_path: Path) -> None:
    run = build_finished(tmp_path / "run")
    counts = {"documents": 9, "rows": 20, "rows_by_task": {"Task1": 8, "Task2": 12}}
    write_json(run / "results.json", read_json(run / "results.json") | {"data": {"forget": counts, "retain": counts | {"rows": 21}}})
    text = render_card(read_run(run))
    assert "To be forgotten, the forget set: 9 documents, 20 rows (Task1 8, Task2 12)" in text
    assert "To be kept, the retain set: 9 documents, 21 rows (Task1 8, Task2 12)" in text


def test_a_tokenizer_made_of_the_documents_is_told(tmp_path: Path) -> None:
    sentence = "words of theirs, names among them, stand in `tokenizer.json`"
    assert sentence in configured(tmp_path / "tiny", "target: {base: null}\n")[1]
    assert sentence not in configured(tmp_path / "given", "target: {base: null}\nmodel: {model_name_or_path: a/b}\n")[1]
    assert sentence not in configured(tmp_path / "based", "target: {base: models/olmo}\n")[1]


def test_the_table_has_as_many_cells_in_every_row(run: Path) -> None:
    lines = [line for line in render_card(read_run(run)).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    assert {line.count("|") for line in lines} == {9}


def test_a_losing_merge_is_called_so(tmp_path: Path) -> None:
    run = build_finished(tmp_path / "run")
    results = read_json(run / "results.json")
    winning = render_card(read_run(run))
    results["verdict"]["merge_beats_parents"] = False
    results["verdict"]["sentence"] = "a <b>|</b> sentence\n---\nwith traps"
    write_json(run / "results.json", results)
    losing = render_card(read_run(run))
    assert "does not score above its better parent" in losing
    assert "does not score above its better parent" not in winning
    assert "a &lt;b>|&lt;/b> sentence --- with traps" in losing


# ---- files


def test_the_card_is_written_beside_the_weights(run: Path, tmp_path: Path) -> None:
    card = write_model_card(run, tmp_path / "merged")
    assert card == tmp_path / "merged" / "README.md"
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["README.md"]
    with pytest.raises(InputError, match="no such run folder"):
        write_model_card(tmp_path / "nowhere", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_that_delivered_nothing_gets_no_card(tmp_path: Path) -> None:
    run = build_finished(tmp_path / "run")
    assert refresh_model_card(run) == run / "merged" / "README.md"
    (run / "merged" / "merge.json").unlink()
    (run / "merged" / "README.md").unlink()
    assert refresh_model_card(run) is None
    assert not (run / "merged" / "README.md").exists()
