"""Numbers, intervals and paths as the report writes them, and the templates it fills."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from launcher.console import duration, setting, short
from launcher.report_data import is_number

_PATH = re.compile(r"(?<![\w.:/~-])~?(?:\.{1,2})?/(?:[^\s/'\"<>:,;()\[\]]+/)+([^\s/'\"<>:,;()\[\]]*)")


def number(value: Any, *, signed: bool = False) -> str:
    """A score with three decimals, or ``–`` where there is none."""
    if not is_number(value):
        return "–"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def interval(pair: Any, *, signed: bool = False) -> str:
    """``[0.120, 0.340]``, or nothing where there are no two numbers."""
    if isinstance(pair, Sequence) and len(pair) == 2 and all(is_number(bound) for bound in pair):
        return f"[{number(pair[0], signed=signed)}, {number(pair[1], signed=signed)}]"
    return ""


def without_paths(text: Any) -> str:
    """The same words with the last part only of every absolute path: the rest tells about a machine and its user."""
    return _PATH.sub(lambda match: f"…/{match.group(1)}", str(text))


def asset(name: str) -> str:
    """The text of a file of ``launcher/assets``."""
    return (resources.files("launcher") / "assets" / name).read_text(encoding="utf-8")


def template(name: str, *, autoescape: bool) -> Any:
    """A Jinja template of ``launcher/assets``, with the filters that the templates use; it may include others from there."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=autoescape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FunctionLoader(asset)
    )
    environment.filters.update(
        number=number,
        signed=lambda value: number(value, signed=True),
        duration=lambda value: duration(value) if is_number(value) else "–",
        setting=setting,
        short=short,
        public=without_paths,
    )
    return environment.get_template(name)
