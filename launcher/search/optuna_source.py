"""Trials that Optuna proposes, with their study in a database that a killed sweep goes on from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import ExperimentConfig
from launcher.search.proposal import Tried, proposal_seed, propose, to_params, to_trial
from launcher.search.source import Outcome
from launcher.search.surrogates import Surrogates, surrogates_of
from launcher.search_space import SearchSpace, TrialSpec, draw_trials, random_overrides, trial_spec
from trainers.errors import InputError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study

log = logging.getLogger(__name__)
FILE = "optuna.db"
LEAST_RESULTS = 2
"""Finished trials that a proposal needs; where there are fewer, trials are drawn at random."""
_PROPOSALS = 20
"""Proposals that repeat earlier trials before one is drawn at random."""
_DRAWS = 1000
"""Random draws that repeat earlier trials before the space counts as exhausted."""


class OptunaSource:
    """Start points, then a Sobol start, then proposals that follow what earlier trials forgot and retained.

    The study in ``RUN/optuna.db`` bears the run's name and is the record of the trials that exist: each is written to it, in
    one transaction, before anything else is. Only this process opens it, as SQLite on a shared mount wants.

    Each proposal is a function of the trials told before it: one trial at a time, the same seed gives the same trials however often
    the sweep was killed.

    Raises:
        InputError: if the database is damaged or of another run.
    """

    def __init__(self, run: Path, *, config: ExperimentConfig, space: SearchSpace) -> None:
        self.config, self.space = config, space
        self.first = draw_trials(
            base=config.train,
            space=space,
            start_points=config.sweep.start_points,
            num_trials=config.sweep.num_trials,
            search="optuna",
            startup_trials=config.sweep.startup_trials,
            seed=config.seed,
        )
        self.storage, self.study = open_study(Path(run) / FILE, name=config.name)
        self._specs: dict[str, TrialSpec] = {}
        self._results: dict[str, Surrogates | str] = {}
        for trial in self.study.get_trials(deepcopy=False):
            name = trial.user_attrs["trial"]
            index = len(self._specs) if name not in self._specs else list(self._specs).index(name)
            self._specs[name] = trial_spec(config.train, json.loads(trial.user_attrs["overrides"]), index=index, seed=config.seed)
            assert self._specs[name].name == name, "the study lists trials in the order of their names"
            self._results[name] = Surrogates(*trial.values) if trial.values else trial.state.name.lower()
        # What was not told, or failed, is asked for again.
        self._waiting = [name for name, result in self._results.items() if result in ("running", "fail")]

    @property
    def specs(self) -> tuple[TrialSpec, ...]:
        """The trials that exist so far."""
        return tuple(self._specs.values())

    @property
    def total(self) -> int:
        """How many trials there will be at most."""
        return self.config.sweep.num_trials

    def ask(self) -> TrialSpec | None:
        """The next trial: one of an earlier start that has not ended, or a new one; None if there are enough, or no others."""
        if self._waiting:
            name = self._waiting.pop(0)
            if self._results[name] == "fail":
                self._record(self._specs[name])
            return self._specs[name]
        if len(self._specs) >= self.total:
            return None
        spec = self._next()
        if spec is not None:
            self._record(spec)
        return spec

    def tell(self, name: str, outcome: Outcome) -> None:
        """A finished trial counts with its measures, a pruned or diverged one as worse than all of those, a failed one not at all.

        One that goes on when the sweep does stays open.
        """
        from optuna.trial import TrialState

        if self._results.get(name) != "running" or not (outcome.over or outcome.state == "failed"):
            return
        found = surrogates_of(outcome.signals) if outcome.state == "finished" else None
        number = max(trial.number for trial in self.study.get_trials(deepcopy=False) if trial.user_attrs["trial"] == name)
        if found is not None:
            self.study.tell(number, values=[found.forgetting, found.retention])
            self._results[name] = found
        else:
            state = TrialState.PRUNED if outcome.state == "stopped" else TrialState.FAIL
            self.study.tell(number, state=state)
            self._results[name] = state.name.lower()
        self._waiting = [other for other in self._waiting if other != name]

    def close(self) -> None:
        """Let go of the database."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def _record(self, spec: TrialSpec) -> None:
        params = to_params(spec.overrides, space=self.space) or {}
        attributes = {"trial": spec.name, "overrides": json.dumps(spec.overrides)}
        self.study.add_trial(to_trial(Tried(spec.overrides, "running"), params=params, space=self.space, attributes=attributes))
        self._specs[spec.name] = spec
        self._results[spec.name] = "running"

    def _next(self) -> TrialSpec | None:
        index = len(self._specs)
        if index < len(self.first):
            return self.first[index]
        known = {spec.key for spec in self._specs.values()}
        for overrides in self._candidates(index):
            try:
                spec = trial_spec(self.config.train, overrides, index=index, seed=self.config.seed)
            except InputError as error:
                # The corners of the space were checked before the sweep began; this combination is not one of them.
                log.warning("%s is drawn anew: %s", f"trial-{index:02d}", error.what)
                continue
            if spec.key not in known:
                return spec
        return None

    def _candidates(self, index: int) -> Iterator[dict[str, Any]]:
        seed, history = self.config.seed, self._history()
        if sum(isinstance(tried.result, Surrogates) for tried in history) >= LEAST_RESULTS:
            for attempt in range(_PROPOSALS):
                yield propose(history, space=self.space, seed=proposal_seed(seed, index=index, attempt=attempt))
        for attempt in range(_DRAWS):
            yield random_overrides(self.space, seed=seed, stream=f"{index}/{attempt}")

    def _history(self) -> list[Tried]:
        learned: Mapping[str, Any] = {name: result for name, result in self._results.items() if result != "fail"}
        return [Tried(self._specs[name].overrides, result) for name, result in learned.items()]


def open_study(path: Path, *, name: str) -> tuple[RDBStorage, Study]:
    """The study in a database file, made first if there is none; a file that is there is complete.

    Raises:
        InputError: if it cannot be read.
    """
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = Path(path)
    try:
        if not path.exists():
            temporary = path.with_name(f".{path.name}.tmp")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            storage = _storage(temporary)
            study = optuna.create_study(study_name=name, storage=storage, directions=["maximize", "maximize"])
            with warnings.catch_warnings():
                # Naming what the dashboard shows is marked as experimental, since Optuna 3.2.
                warnings.simplefilter("ignore")
                study.set_metric_names(["forgetting", "retention"])
            storage.remove_session()
            storage.engine.dispose()
            os.replace(temporary, path)
        storage = _storage(path)
        # The folder of a run may have been renamed, and its run with it.
        (summary,) = optuna.get_all_study_names(storage=storage)
        return storage, optuna.load_study(study_name=summary, storage=storage)
    except Exception as error:
        raise InputError(
            f"the record of the search cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=str(path),
            fix="move it away: trials that have ended are kept, and the search begins anew with the same first trials",
        ) from error


def _storage(path: Path) -> RDBStorage:
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import URL

    url = URL.create("sqlite", database=str(path.resolve())).render_as_string()
    return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
