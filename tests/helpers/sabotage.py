"""Faults in the processes of a real sweep, without any switch in the product: a module that Python imports at every start.

``sabotaged`` writes a ``sitecustomize.py`` for PYTHONPATH, which wraps ``trainers.loop.train_step`` as soon as that is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOOK = """
import importlib.abc
import importlib.util
import json
import pathlib
import sys
import time

FAULT = json.loads({fault!r})
MARK = pathlib.Path({mark!r})


class Watching(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "trainers.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            module.train_step = wrapped(module.train_step)

        spec.loader.exec_module = execute_and_wrap
        return spec


def wrapped(train_step):
    def step(plan, *, engine, train, **more):
        if engine.rank == FAULT["rank"]:
            if FAULT["kind"] == "memory" and train.per_device_train_batch_size > FAULT["largest"]:
                import torch

                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if FAULT["kind"] == "sleep" and plan.step == FAULT["step"]:
                MARK.write_text("asleep")
                time.sleep(3600)
        return train_step(plan, engine=engine, train=train, **more)

    return step


sys.meta_path.insert(0, Watching())
"""


def sabotaged(folder: Path, *, fault: Mapping[str, Any]) -> dict[str, str]:
    """Variables for a command whose trials suffer a fault.

    Args:
        folder: takes the module, and the file ``asleep`` once a rank sleeps.
        fault: ``kind``: memory (a step with a micro-batch above ``largest`` finds no memory) or sleep (at step ``step``); and the ``rank``.
    """
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(HOOK.format(fault=json.dumps(dict(fault)), mark=str(folder / "asleep")))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
