"""The settings of search, rungs and budget."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from launcher.config import ExperimentConfig
from launcher.run_folder import _without_place


def experiment(**changes: Any) -> ExperimentConfig:
    base = {"name": "tiny", "model": {"model_name_or_path": "target"}, "data": {"path": "data"}}
    return ExperimentConfig.model_validate(base | changes)


def test_rungs_need_signals() -> None:
    with pytest.raises(ValidationError, match=r"train\.signals = 0"):
        experiment(sweep={"rungs": {"epochs": [1]}}, train={"signals": 0})
    experiment(sweep={"rungs": {"epochs": [1]}}, train={"signals": 1})


@pytest.mark.parametrize(
    ("sweep", "same"), [({"budget": {"hours": 1}}, True), ({"rungs": {"epochs": [1]}}, False), ({"search": "sobol"}, False)]
)
def test_a_run_goes_on_with_another_budget_but_with_no_other_search(sweep: dict[str, Any], same: bool) -> None:
    known, wanted = (_without_place({"config": config.model_dump(mode="json")}) for config in (experiment(), experiment(sweep=sweep)))
    assert (known == wanted) is same
