"""A source of trials and rungs in the forms that Ray Tune asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.search.rungs import RungBook
from launcher.search.source import TrialSource, outcome_of
from launcher.search_space import TrialSpec
from launcher.storage import run_address
from launcher.trial_home import fetch_trial

SIGNALS = "signals/"


def tune_searcher(
    source: TrialSource,
    *,
    run: Path,
    settings: Mapping[str, Any],
    prepare: Callable[[TrialSpec], object],
    is_over: Callable[[], bool],
    concurrency: int,
) -> Any:
    """What Tune asks for trials.

    Args:
        source: of the trials.
        run: the run folder.
        settings: that every trial's process is given beside its task.
        prepare: called with each trial before it starts.
        is_over: whether no other trial may start.
        concurrency: trials at the same time.
    """
    from ray.tune.search import ConcurrencyLimiter, Searcher

    names: dict[str, str] = {}

    class SourceSearcher(Searcher):
        def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            spec = None if is_over() else source.ask()
            if spec is None:
                return Searcher.FINISHED
            prepare(spec)
            names[trial_id] = spec.name
            return {"task": {"run": run_address(run), "name": spec.name}, **settings}

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
            fetch_trial(run, names[trial_id])
            source.tell(names[trial_id], outcome_of(Path(run) / "trials" / names[trial_id]))

        # Tune's records of a sweep are thrown away: sources keep their own, and a console is not always something that can be written.
        def __reduce__(self) -> tuple[Any, ...]:
            return dict, ()

        def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

    return ConcurrencyLimiter(SourceSearcher(), max_concurrent=concurrency)


def tune_scheduler(book: RungBook | None, *, stop: Callable[[str], object], may_win: Callable[[str], bool]) -> Any:
    """First come, first served; with rungs, a trial that others beat is asked to stop.

    It is asked, not killed: its ranks end at the same step and it writes its own status. Tune's own counts of iterations begin anew
    when a trial is started again, so trials are compared at epochs.

    Args:
        book: judges trials at rungs; None if there are none.
        stop: called with the name of a trial that must stop.
        may_win: whether a trial can still become a parent of a pair.
    """
    from ray.tune.schedulers import FIFOScheduler

    class RungScheduler(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
            # Schedulers see a result's nested values as `signals/NAME`.
            signals = {key.removeprefix(SIGNALS): value for key, value in result.items() if key.startswith(SIGNALS)}
            if book is not None and signals:
                name, step = trial.config["task"]["name"], result["step"]
                is_last = step >= result["num_steps"]
                if book.judge(name, epoch=result["epoch"], step=step, is_last=is_last, signals=signals, may_win=may_win):
                    stop(name)
            return FIFOScheduler.CONTINUE

    return RungScheduler()
