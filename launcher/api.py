"""The positional contract of the benchmark: one call that unlearns within a time limit.

Source: SemEval-2025 Task 4, https://arxiv.org/abs/2502.15097
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainers.errors import InputError, RunError
from trainers.files import check_writable, read_json

TIME_LIMIT = "UNLEARN_TIME_LIMIT_S"
DEFAULT_LIMIT_S = 3600.0
END_SHARE, LONGEST_END_S = 0.04, 20.0
"""What is kept back of the time limit to end every process: a share, at most so many seconds."""
POLL_S = 0.2


def unlearn(
    model_path: str | Path, output_path: str | Path, forget_path: str | Path, retain_path: str | Path, *, settings: Sequence[str] = ()
) -> Path:
    """Make a model forget, and leave the result in a folder, within ``UNLEARN_TIME_LIMIT_S`` seconds (default one hour).

    Sweeps trials on the GPUs of this machine (or its CPU), searches a pair and merges it, judged on documents of its own validation fold.
    From the first valid trial on the output folder holds one complete model, the best so far, whatever happens: each better one takes its
    place in one step. Everything else lies in the folder ``OUTPUT.work`` beside it, the report and the logs among it.

    Args:
        model_path: folder of the model, in Hugging Face layout.
        output_path: folder of the unlearned model; it must be empty, missing, or of an earlier call.
        forget_path: folder with ``forget.jsonl`` or ``forget.parquet`` (fields id, input, output, task).
        retain_path: folder with ``retain.jsonl`` or ``retain.parquet``.
        settings: overrides of the experiment such as ``train.learning_rate=2e-4``, as for ``unlearn sweep``.

    Returns:
        The output folder.

    Raises:
        InputError: at once, for folders that cannot be used; later, if the sweep finds the model or the rows unusable.
        RunError: if the time ran out, or the sweep failed, before there was any model.
    """
    from launcher.contest import Job, find_set
    from trainers.modeling import check_model_folder

    started, limit_s = time.time(), _time_limit(os.environ.get(TIME_LIMIT))
    output = Path(output_path).expanduser().absolute()
    model = check_model_folder(Path(model_path).expanduser())
    sets = {name: find_set(Path(path), name=name).absolute() for name, path in (("forget", forget_path), ("retain", retain_path))}
    work = output.with_name(f"{output.name}.work")
    _check_output(output)
    for leftover in (work, *output.parent.glob(f".{output.name}.*.new"), *output.parent.glob(f".{output.name}.*.old")):
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir(parents=True)
    job = Job(
        model=str(model.absolute()),
        output=str(output),
        forget=str(sets["forget"]),
        retain=str(sets["retain"]),
        work=str(work),
        started=started,
        limit_s=limit_s,
        settings=tuple(settings),
    )
    _run_processes(job.write(), work=work, deadline=started + limit_s)
    if _is_published(output):
        return output
    raise _why_nothing(work, limit_s=limit_s)


def _time_limit(text: str | None) -> float:
    if text is None:
        return DEFAULT_LIMIT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"{text!r} is no number of seconds above 0", where=f"environment variable {TIME_LIMIT}", fix="for instance 3600")
    return seconds


def _is_published(output: Path) -> bool:
    from launcher.contest import RECORD

    return (output / RECORD).exists()


def _check_output(output: Path) -> None:
    """Refuse a folder that holds something else; a model of an earlier call goes."""
    if output.exists() and not output.is_dir():
        raise InputError("the output folder is a file", where=str(output), fix="name a folder")
    check_writable(output)
    if not output.exists():
        return
    if not _is_published(output):
        found = sorted(entry.name for entry in output.iterdir())
        if found:
            raise InputError(
                "the output folder is not empty",
                where=str(output),
                why=f"found: {', '.join(found[:6])}; a better model replaces the whole folder",
                fix="name an empty or a new folder",
            )
    shutil.rmtree(output)


def _run_processes(job: Path, *, work: Path, deadline: float) -> None:
    """Run sweep and publisher until both have ended, or the time is over; none of their processes is left behind."""
    from launcher.contest import ENDED

    grace = min(LONGEST_END_S, END_SHARE * (deadline - time.time()))
    family = Family()
    try:
        sweep = family.start("sweep", job=job, log=work / "sweep.log")
        publisher = family.start("publish", job=job, log=work / "publish.log")
        while time.time() < deadline - grace and (sweep.poll() is None or publisher.poll() is None):
            family.look()
            if sweep.poll() is not None and not (work / ENDED).exists():
                (work / ENDED).touch()
            if publisher.poll() is not None and sweep.poll() is None:
                publisher = family.start("publish", job=job, log=work / "publish.log")
            time.sleep(POLL_S)
    finally:
        family.end()


class Family:
    """Processes with everything that they start, so that all of it can be ended."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._seen: set[Any] = set()

    def start(self, role: str, *, job: Path, log: Path) -> subprocess.Popen[bytes]:
        """One of the two processes, which dies with this one."""
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "launcher.contest", role, str(job)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                # A cluster that happens to be known is not part of the machine that the caller offers.
                env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": path},
            )
        self._children.append(process)
        return process

    def look(self) -> None:
        """Remember what the processes have started: what loses its parent cannot be found later."""
        import psutil

        for child in self._children:
            with suppress(psutil.NoSuchProcess):
                self._seen |= set(psutil.Process(child.pid).children(recursive=True))

    def end(self) -> None:
        """Kill everything and wait for it."""
        import psutil

        self.look()
        for child in self._children:
            with suppress(ProcessLookupError):
                child.kill()
        for process in self._seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for child in self._children:
            child.wait()


def _die_with_parent() -> None:
    """Linux kills this process when the one that started it dies."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: https://man7.org/linux/man-pages/man2/prctl.2.html


def _why_nothing(work: Path, *, limit_s: float) -> Exception:
    for name in ("sweep", "publish"):
        record = work / f"{name}-error.json"
        if record.exists():
            told = read_json(record)
            kind = InputError if told["exit_code"] == 2 else RunError
            return kind(str(told["what"]), where=str(work))
    return RunError(
        f"no model within {limit_s:g} s", where=str(work / "sweep.log"), fix=f"see the log, or raise {TIME_LIMIT}; nothing was written"
    )
