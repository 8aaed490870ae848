"""What only a GPU can show; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.arms.ours import OursArm
from benchmarks.models import TINY, build_base, build_policy
from benchmarks.workload import Settings, build_workload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SETTINGS = Settings(padded_length=64)
PAIRS = range(4)


@pytest.fixture
def arm() -> Iterator[OursArm]:
    workload = build_workload(None, tokenizer=None, num_pairs=4, vocabulary=TINY.vocabulary, max_tokens=SETTINGS.padded_length, seed=0)
    policy = build_policy(build_base(TINY, seed=0, device="cuda"), settings=SETTINGS, seed=0)
    arm = OursArm(policy=policy, workload=workload, settings=SETTINGS)
    arm.step(PAIRS)  # libraries may wait when they are first used
    yield arm
    torch.cuda.set_sync_debug_mode("default")
    arm.close()


def watch(arm: OursArm, monkeypatch: pytest.MonkeyPatch, *, wait: bool) -> None:
    """Make every wait for the device an error from the first forward pass to the last backward pass; ``wait`` adds one."""
    engine: Any = arm._engine
    forward, backward = engine.forward, engine.backward

    def watched_forward(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        return forward(*arguments)

    def watched_backward(loss: torch.Tensor, *, last: bool) -> None:
        if wait:
            loss.item()
        backward(loss, last=last)
        if last:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine, "forward", watched_forward)
    monkeypatch.setattr(engine, "backward", watched_backward)


def test_a_step_does_not_wait_for_the_device(arm: OursArm, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(arm, monkeypatch, wait=False)
    assert arm.step(PAIRS) == pytest.approx(arm.step(PAIRS), rel=0.5)


def test_a_wait_would_be_noticed(arm: OursArm, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(arm, monkeypatch, wait=True)
    with pytest.raises(RuntimeError, match="synchroniz"):
        arm.step(PAIRS)
