"""Tasks of the Language Model Evaluation Harness on a written checkpoint, through the optional package lm-eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.errors import InputError, RunError, SetupError

INSTALL = 'pip install "unlearn-ties[eval]"'

_COPIED = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples", "lm_eval_version")
"""What is kept of lm-eval's own result; the rest describes the machine or repeats the tasks' definitions."""


def import_harness() -> Any:
    """The package lm-eval.

    Raises:
        SetupError: if it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise SetupError(
            "the package lm-eval is not installed" if error.name == "lm_eval" else f"the package lm-eval cannot be loaded: {error}",
            where="--lm-eval",
            why="it is an optional part of this project",
            fix=INSTALL,
        ) from None
    return lm_eval


def split_tasks(text: str) -> list[str]:
    """Task names of a list with commas: names, groups or tags that lm-eval knows, or YAML files of tasks.

    Raises:
        InputError: if there is none.
    """
    tasks = [name.strip() for name in text.split(",") if name.strip()]
    if not tasks:
        raise InputError("no task is named", where="--lm-eval", fix="name tasks, such as --lm-eval hellaswag,arc_easy")
    return tasks


def run_harness(*, model: Path, tasks: Sequence[str], dtype: str, device: str) -> dict[str, Any]:
    """Evaluate a model folder on tasks, with lm-eval's own defaults for everything else; needs network unless the data is cached.

    Args:
        model: folder of a whole model in Hugging Face layout.
        tasks: see ``split_tasks``.
        dtype: what the weights are loaded in.
        device: where the model runs.

    Returns:
        The tasks asked for, the settings, and lm-eval's results as it gives them.

    Raises:
        SetupError: if lm-eval is not installed, or a data set cannot be reached.
        InputError: if a task is unknown.
        RunError: if lm-eval fails otherwise.

    Source: https://github.com/EleutherAI/lm-evaluation-harness
    """
    harness = import_harness()
    settings: dict[str, Any] = {"model": "hf", "model_args": {"pretrained": str(model), "dtype": dtype}, "batch_size": 8, "device": device}
    try:
        found = harness.simple_evaluate(tasks=list(tasks), log_samples=False, **settings)
    except KeyError as error:
        raise InputError(
            f"lm-eval does not know a task: {error.args[0] if error.args else error}",
            where=f"--lm-eval {','.join(tasks)}",
            fix="list its tasks with `lm-eval ls tasks`",
        ) from error
    except ConnectionError as error:
        raise SetupError(
            f"lm-eval cannot get the data of a task: {str(error).splitlines()[0]}",
            where=f"--lm-eval {','.join(tasks)}",
            fix="run this where the network can be reached, or once there so that the data is cached",
        ) from error
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"lm-eval failed: {type(error).__name__}: {first}", where=f"--lm-eval {','.join(tasks)}") from error
    copied = {name: found[name] for name in _COPIED if name in found}
    # Numbers of other libraries become plain ones, anything else its text.
    plain = json.loads(json.dumps(copied, default=lambda value: value.item() if hasattr(value, "item") else str(value)))
    return {"tasks": list(tasks), "dtype": dtype, **plain}


def harness_lines(found: dict[str, Any]) -> list[str]:
    """The results as a table for people: every metric of every task."""
    lines = [f"lm-eval {found.get('lm_eval_version', '')}".rstrip()]
    for task, metrics in found.get("results", {}).items():
        for name, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = metrics.get(name.replace(",", "_stderr,", 1))
                lines.append(f"  {task:<24} {name:<20} {value:.4f}" + (f" +- {error:.4f}" if isinstance(error, float) else ""))
    return lines
