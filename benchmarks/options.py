"""Command-line options that the scripts share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_workload_options(parser: argparse.ArgumentParser, *, num_pairs: int) -> None:
    """Where rows come from, how many, and whether the result is written."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="LUME folder with forget.jsonl and retain.jsonl; default: synthetic rows")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of OLMo's tokenizer; needed with --data")
    parser.add_argument("--pairs", type=int, default=num_pairs, help=f"pairs of rows to measure on (default {num_pairs})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, rows and their order (default 0)")
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results")


def shown_command(script: str, *, parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command that repeats a run elsewhere: every option that is not at its default, folders as DIR."""
    words = ["python", script]
    for name, value in vars(options).items():
        if value == parser.get_default(name):
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, Path):
            words += [flag, "DIR"]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)
