"""The arithmetic of the sweep's drill, by hand, and that its GPU part skips cleanly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.sweep import Span, handovers, overhead

ROOT = Path(__file__).resolve().parents[2]


def _span(name: str, started: float, ended: float, *, wait: float = 0.5) -> Span:
    return Span(name, started, started + wait, ended)


def test_a_sweep_without_gaps_has_no_overhead():
    assert overhead([_span("a", 0, 10), _span("b", 0, 4), _span("c", 4, 10)], slots=2) == 1


def test_gaps_and_an_uneven_end_count():
    """Twenty seconds of work on two slots take ten at least; here eleven, because the third waits a second."""
    assert overhead([_span("a", 0, 10), _span("b", 0, 4), _span("c", 5, 11)], slots=2) == pytest.approx(1.1)


def test_the_longest_trial_bounds_what_is_possible():
    assert overhead([_span("a", 0, 10), _span("b", 0, 1), _span("c", 1, 2)], slots=2) == 1


def test_each_trial_is_measured_from_the_end_that_freed_its_slot():
    """c takes b's slot at 4 and steps at 4.7; d takes a's at 10 and steps at 10.6."""
    spans = [_span("a", 0, 10), _span("b", 0, 4), _span("c", 4.2, 12), _span("d", 10.1, 12)]
    assert handovers(spans, slots=2) == pytest.approx([0.7, 0.6])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_sweep_on_one_is_skipped():
    done = subprocess.run([sys.executable, "benchmarks/gpu_sweep.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.startswith("skipped: no CUDA device")) == (0, True), done.stderr
