"""A trial that only lasts as long as a logged one did, for replays of sweeps on more slots than this machine has."""

from __future__ import annotations

import time
from typing import Any

from launcher.trial import TrialTask, write_status


def replay_trial(config: dict[str, Any]) -> None:
    """Sleep in the place of a trial; its learning rate says for how many seconds."""
    from ray import tune

    from trainers.files import read_json

    task = TrialTask(**config["task"])
    seconds = float(read_json(task.folder / "seconds.json")["seconds"])
    started = time.time()
    write_status(task.folder, name=task.name, state="running", started=started, ended=None)
    time.sleep(seconds)
    write_status(task.folder, state="finished", ended=time.time(), seconds=seconds)
    tune.report({"step": 1, "state": "finished"})
