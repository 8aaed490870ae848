"""The model card: valid front matter, scores with intervals, and limits in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.model_card import render_card, write_model_card
from launcher.report_data import read_run
from tests.helpers.run_folder import build_finished
from trainers.errors import InputError
from trainers.files import read_json, write_json, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_finished(tmp_path_factory.mktemp("card") / "run")


def parts(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card."""
    empty, matter, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(matter), body


def test_front_matter_is_yaml_and_names_library_base_and_tags(run: Path) -> None:
    matter, _ = parts(render_card(read_run(run)))
    assert matter["library_name"] == "transformers"
    assert matter["base_model"] == "fake/base"
    assert {"unlearning", "merge", "ties"} <= set(matter["tags"])
    assert "license" not in matter


def test_the_card_states_scores_recipe_limits_and_command(run: Path) -> None:
    _, body = parts(render_card(read_run(run)))
    assert "| TIES merge (merged, balanced) | 0.703 [0.663, 0.743] |" in body
    assert "| before unlearning (baseline, untouched) | 0.090 [" in body
    assert "Parent: trial-03 (over-forgetting): learning_rate = 0.0003" in body
    assert "method ties, density 0.2, scale 1.342" in body
    assert "no proof" in body
    assert "No audit has been run" in body
    assert "they are unknown to this card" in body
    assert "unlearn sweep experiment.yaml" in body


def test_the_table_has_as_many_cells_in_every_row(run: Path) -> None:
    lines = [line for line in render_card(read_run(run)).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    assert {line.count("|") for line in lines} == {9}


def test_a_licence_is_repeated_only_where_it_is_stated(tmp_path: Path) -> None:
    run = build_finished(tmp_path / "run")
    write_text(run / "experiment.yaml", "name: fake\nlicense: apache-2.0\n")
    matter, body = parts(render_card(read_run(run)))
    assert matter["license"] == "apache-2.0"
    assert "apache-2.0 (as stated in the configuration)" in body
    assert "base_model" not in matter


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


def test_the_card_is_written_beside_the_weights(run: Path, tmp_path: Path) -> None:
    card = write_model_card(run, tmp_path / "merged")
    assert card == tmp_path / "merged" / "README.md"
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["README.md"]
    with pytest.raises(InputError, match="no such run folder"):
        write_model_card(tmp_path / "nowhere", tmp_path / "other")
    assert not (tmp_path / "other").exists()
