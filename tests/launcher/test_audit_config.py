"""The `audit` section of an experiment: off unless it is there, refused where it cannot work, and free to change on a finished run."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from eval.audit.config import Attack
from launcher.config import ExperimentConfig
from launcher.load import load_experiment
from launcher.run_folder import _without_place
from launcher.templates import RECIPES
from trainers.errors import InputError


def experiment(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"name": "x", "data": {"path": "d"}, "model": {"model_name_or_path": "m"}, **changes})


def test_an_audit_is_off_by_default_and_a_mapping_turns_it_on() -> None:
    assert experiment().audit is None
    assert experiment(audit=None).audit is None
    audit = experiment(audit={}).audit
    assert audit is not None
    assert (audit.attacks, audit.documents, audit.never_seen, audit.build_never_seen) == (tuple(Attack), 10, None, False)


@pytest.mark.parametrize("name", ["olmo-1b", "olmo-1b-16", "olmo-7b", "olmo-7b-16", "olmo-7b-full-zero3"])
def test_templates_of_large_models_leave_it_out_and_say_how_to_turn_it_on(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    assert load_experiment(path).config.audit is None
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("# audit: ")]
    settings = line.removeprefix("# audit: ").partition("#")[0].strip()
    assert load_experiment(path, [f"audit={settings}"]).config.audit is not None


def test_the_quickstart_audits_with_a_twin_of_its_own_target() -> None:
    audit = load_experiment(RECIPES / "quickstart.yaml").config.audit
    assert audit is not None
    assert audit.build_never_seen
    assert Attack.RELEARN_FORGET in audit.attacks


def test_a_twin_is_built_only_where_the_run_built_the_target() -> None:
    tiny = {"target": {}, "model": {}}
    assert experiment(**tiny, audit={"build_never_seen": True}).audit is not None
    with pytest.raises(ValidationError, match="did not build its target"):
        experiment(audit={"build_never_seen": True})
    with pytest.raises(ValidationError, match="leave out one of the two"):
        experiment(**tiny, audit={"build_never_seen": True, "never_seen": "twin"})


def test_a_mistyped_attack_or_key_is_answered_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"audit\.documants.*documents"):
        load_experiment(RECIPES / "olmo-1b.yaml", ["audit={documants: 4}"])
    with pytest.raises(InputError, match=r"audit\.attacks\[0\].*relearn-forget"):
        load_experiment(RECIPES / "olmo-1b.yaml", ["audit={attacks: [relearn]}"])


def test_what_only_the_audit_and_the_card_read_may_change_on_a_finished_run() -> None:
    """The negative control is a setting that numbers depend on."""

    def kept(**changes: Any) -> dict[str, Any]:
        return _without_place({"config": experiment(**changes).model_dump(mode="json")})

    card = {"model": {"model_name_or_path": "m", "license": "mit", "base_model": "a/b"}, "data": {"path": "d", "license": "cc0-1.0"}}
    assert kept() == kept(audit={"documents": 4}) == kept(**card)
    assert kept() != kept(seed=1)
