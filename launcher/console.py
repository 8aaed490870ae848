"""What a run prints: one clean line per change of state, a table at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

_ASCII = str.maketrans({"–": "-", "—": "-", "→": "->", "←": "<-", "…": "...", "•": "*", "≥": ">=", "≤": "<=", "Δ": "d", "×": "x",
                        "’": "'", "‘": "'", "“": '"', "”": '"', "−": "-", "\u00a0": " "})  # fmt: skip
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
_COLUMNS = (
    ("final_score", "final"),
    ("task_aggregate", "task agg."),
    ("mia_score", "MIA"),
    ("mia_auc", "AUC"),
    ("mmlu_average", "MMLU"),
    ("forget_regurgitation", "forget R-L"),
    ("retain_regurgitation", "retain R-L"),
)
_MAX_SUMMARY_MODELS = 8


def duration(seconds: float | None) -> str:
    """Seconds as people say them: ``8 s``, ``3 min 20 s``, ``6 h 12 min``; ``-`` for None."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: Any) -> str:
    """A score with three decimals, ``-`` where there is none."""
    return f"{value:.3f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else "-"


def setting(value: Any) -> str:
    """A configuration value in few characters: floats with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short(key: str) -> str:
    """The telling part of a dotted key: ``objective`` of ``train.objective.name``, else the last part."""
    parts = key.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "name" else parts[-1]


def settings(overrides: Mapping[str, Any]) -> str:
    """``learning_rate=0.001, objective=npo``: short names, the whole key where two would look alike."""
    shorts = [short(key) for key in overrides]
    names = [name if shorts.count(name) == 1 else key for key, name in zip(overrides, shorts, strict=True)]
    return ", ".join(f"{name}={setting(value)}" for name, value in zip(names, overrides.values(), strict=True))


@dataclass
class Eta:
    """Time left in a sweep, from the pace of the trials that have finished.

    Args:
        total: what all trials cost together; their number where all cost the same.
        concurrency: trials at the same time.
    """

    total: float
    concurrency: int = 1
    seconds: list[float] = field(default_factory=list)
    cost: float = 0.0

    def finished(self, seconds: float, *, cost: float = 1.0) -> None:
        """Count one finished trial, the seconds it took and what it was expected to cost."""
        self.seconds.append(seconds)
        self.cost += cost

    def remaining_s(self) -> float | None:
        """Expected seconds until the last trial ends; None before the first has finished."""
        if not self.cost:
            return None
        return sum(self.seconds) / self.cost * max(0.0, self.total - self.cost) / max(1, self.concurrency)


class Console:
    """Prints to a stream; colours only on a terminal without NO_COLOR, ASCII only where the stream is no terminal."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream if stream is not None else sys.stdout
        self.quiet = quiet
        self.is_terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        self.colour = self.is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def _write(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        if not self.is_terminal:
            text, encoding = text.translate(_ASCII), "ascii"
        # A character the stream cannot hold is spelled out, so that printing never fails a run.
        self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self.stream.flush()

    def _style(self, text: str, style: str) -> str:
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self.colour else text

    def line(self, text: str) -> None:
        """One line (or a few, for a text with line breaks)."""
        if not self.quiet:
            self._write(_printable(text))

    def stage(self, title: str) -> None:
        """The heading of a stage."""
        if not self.quiet:
            self._write(self._style(f"== {_one_line(title)}", "bold"))

    def warning(self, text: str) -> None:
        """One line that is shown even when quiet."""
        self._write(self._style("warning: ", "yellow") + _one_line(text))

    def trial_started(self, name: str, *, overrides: Mapping[str, Any], running: int, total: int) -> None:
        """A trial begins; ``running`` counts it."""
        if not self.quiet:
            self._write(f"  {name}  started   {_one_line(settings(overrides) or 'defaults')}  ({running} running, {total} in all)")

    def trial_finished(self, name: str, *, headline: str, seconds: float, done: int, total: int, eta_s: float | None = None) -> None:
        """A trial ends; ``headline`` is its verdict and its few most telling scores."""
        if not self.quiet:
            left = f", about {duration(eta_s)} left" if eta_s and done < total else ""
            word = self._style("finished", "green")
            self._write(f"  {name}  {word}  {_one_line(headline)}  {duration(seconds)}  ({done} of {total}{left})")

    def trial_again(self, name: str, *, reason: str, errors: int, preemptions: int) -> None:
        """A trial begins once more, after an error of its own or because its machine was lost."""
        if not self.quiet:
            self._write(f"  {name}  again     {_one_line(reason)}  ({errors} errors, {preemptions} preemptions so far)")

    def trial_stopped(self, name: str, *, reason: str, seconds: float, done: int, total: int, eta_s: float | None = None) -> None:
        """A trial was ended before its last step, as planned: pruned, out of budget, interrupted."""
        if not self.quiet:
            left = f", about {duration(eta_s)} left" if eta_s and done < total else ""
            word = self._style("stopped", "dim")
            self._write(f"  {name}  {word}   {_one_line(reason)}  {duration(seconds)}  ({done} of {total}{left})")

    def trial_failed(
        self,
        name: str,
        *,
        reason: str,
        log_path: Any = None,
        last_lines: Sequence[str] = (),
        done: int | None = None,
        total: int | None = None,
    ) -> None:
        """A trial fails: shown even when quiet, with the last three lines of its log and where to read the rest."""
        count = f"  ({done} of {total})" if done is not None and total is not None else ""
        self._write(f"  {name}  {self._style('FAILED', 'red')}    {_one_line(reason)}{count}")
        for text in [line for line in last_lines if line.strip()][-3:]:
            self._write(f"      | {_one_line(text)[:140]}")
        if log_path is not None:
            self._write(f"      log: {log_path}")

    def summary(self, results: Mapping[str, Any], *, paths: Mapping[str, Any] | None = None) -> None:
        """The final table, at most 20 lines: verdict, models with scores, difference, weakest term, where things are.

        Args:
            results: the content of ``results.json``.
            paths: what to point at on the last lines, name to path, for example ``{"report": ...}``.
        """
        for text in summary_lines(results, paths=paths):
            self._write(text)


@contextlib.contextmanager
def progress_lines(stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[str], None]]:
    """A function that shows how far a command has come: one line that is rewritten on a terminal, else a line every half minute.

    Args:
        stream: where to; default: standard error.
        clock: seconds.
    """
    out = stream or sys.stderr
    terminal = bool(getattr(out, "isatty", lambda: False)())
    every, shown, is_open = (0.2 if terminal else 30.0), clock(), False

    def show(text: str) -> None:
        nonlocal shown, is_open
        if clock() - shown < every:
            return
        shown, is_open = clock(), terminal
        width = shutil.get_terminal_size().columns - 1
        out.write(f"\r\x1b[K{text[:width]}" if terminal else f"{text}\n")
        out.flush()

    try:
        yield show
    finally:
        if is_open:
            out.write("\r\x1b[K")
            out.flush()


def summary_lines(results: Mapping[str, Any], *, paths: Mapping[str, Any] | None = None) -> list[str]:
    """The lines of `Console.summary`, without colour."""
    lines = [""]
    sentence = (results.get("verdict") or {}).get("sentence")
    if sentence:
        lines.append(_one_line(sentence))
    counts: dict[str, int] = {}
    for trial in results.get("trials") or []:
        counts[str(trial.get("status"))] = counts.get(str(trial.get("status")), 0) + 1
    if counts:
        seconds = sum(value for value in (results.get("timings") or {}).values() if isinstance(value, (int, float)))
        spent = f", {duration(seconds)}" if seconds else ""
        lines.append(f"{sum(counts.values())} trials: " + ", ".join(f"{n} {word}" for word, n in counts.items()) + spent)
    lines += _table(results)
    lines += _differences(results)
    for name, path in (paths or {}).items():
        lines.append(f"{name:<8} {path}")
    return lines[:20]


_EVALUATED = (
    ("final_score", "final score"),
    ("task_aggregate", "task aggregate"),
    ("mia_auc", "membership AUC"),
    ("mia_score", "MIA score"),
    ("mmlu_average", "MMLU"),
    ("forget_regurgitation", "forget regurgitation"),
    ("forget_knowledge", "forget knowledge"),
    ("retain_regurgitation", "retain regurgitation"),
    ("retain_knowledge", "retain knowledge"),
    ("degenerate_rate", "degenerate texts"),
)


def evaluation_lines(*, scores: Mapping[str, Any], intervals: Mapping[str, Sequence[float]], notes: Sequence[str]) -> list[str]:
    """What one evaluation found: a score per line with its interval, then what a reader has to know."""
    lines = []
    for name, label in _EVALUATED:
        if _is_number(scores.get(name)):
            limits = intervals.get(name)
            lines.append(f"  {label:<22}{number(scores[name]):>7}" + (f"   [{number(limits[0])}, {number(limits[1])}]" if limits else ""))
    return lines + [f"  note: {note}" for note in notes]


def _table(results: Mapping[str, Any]) -> list[str]:
    models = list(results.get("models") or [])
    if len(models) > _MAX_SUMMARY_MODELS:
        # Controls are the first to go: the table keeps the untouched target, both parents and the merge.
        keep = [model for model in models if model.get("role") != "control"]
        spare = max(0, _MAX_SUMMARY_MODELS - len(keep))
        controls = [model for model in models if model.get("role") == "control"][:spare]
        models = [model for model in models if model in keep or model in controls][:_MAX_SUMMARY_MODELS]
    if not models:
        return []
    names = [_name(model) for model in models]
    width = max(len(name) for name in names)
    # A column without a single number says nothing.
    columns = [(key, title) for key, title in _COLUMNS if any(_is_number((model.get("scores") or {}).get(key)) for model in models)]
    interval_key = next((key for key in ("final_score", "task_aggregate") if key in [key for key, _ in columns]), None)
    interval_title = {"final_score": "final", "task_aggregate": "task agg."}.get(interval_key or "", "")
    head = f"{'scores on the ' + str(results.get('fold', 'test')) + ' fold':<{width}}  " + "  ".join(
        f"{title:>{max(6, len(title))}}" for _, title in columns
    )
    lines = [head + (f"   95% interval ({interval_title})" if interval_key else "")]
    for name, model in zip(names, models, strict=True):
        scores = model.get("scores") or {}
        row = f"{name:<{width}}  " + "  ".join(f"{number(scores.get(key)):>{max(6, len(title))}}" for key, title in columns)
        pair = (model.get("intervals") or {}).get(interval_key) if interval_key else None
        lines.append(row + (f"   [{number(pair[0])}, {number(pair[1])}]" if pair else ""))
    return lines


def _name(model: Mapping[str, Any]) -> str:
    label, verdict = str(model.get("label") or model.get("name")), model.get("verdict")
    name = str(model.get("name"))
    if name not in label and model.get("role") in ("parent_over", "parent_under"):
        label = f"{name}: {label}"
    return _one_line(f"{label} ({verdict})" if verdict and verdict not in label else label)[:44]


def _differences(results: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    merged = next((model for model in results.get("models") or [] if model.get("role") == "merged"), None)
    if merged is None:
        return lines
    difference = merged.get("difference_to_best_parent") or {}
    for key, title in (("final_score", "final score"), ("task_aggregate", "task aggregate")):
        value = difference.get(key)
        if value and _is_number(value.get("difference")):
            bounds = (
                f" [{value['low']:+.3f}, {value['high']:+.3f}]" if _is_number(value.get("low")) and _is_number(value.get("high")) else ""
            )
            lines.append(f"merge minus better parent, {title}: {value['difference']:+.3f}{bounds}")
            break
    terms = [term for term in merged.get("terms") or [] if _is_number(term.get("value"))]
    if terms:
        weakest = min(terms, key=lambda term: term["value"])
        lines.append(f"weakest of the {len(terms)} terms: {weakest['name']} = {weakest['value']:.3f} (it caps the task aggregate)")
    return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _printable(text: str) -> str:
    """Control characters (a model's output may hold escape sequences) are shown, not sent to the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in str(text))


def _one_line(text: str) -> str:
    return _printable(" ".join(str(text).split()))
