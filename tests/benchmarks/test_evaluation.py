"""The evaluation benchmark compares what says the same, and notices when it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.evaluation import ArmsDisagreeError, check, compare_arms
from benchmarks.evaluation_arms import OfficialResult, compare, items, official_arm, run_official, run_ours
from benchmarks.memorised import Scene, build_scene, lose_end_token
from benchmarks.models import TINY
from eval.config import EvalConfig

CONFIG = EvalConfig(max_new_tokens=24, dtype="float32", bootstrap_samples=1)


@pytest.fixture(scope="module")
def scene() -> Scene:
    torch.set_num_threads(1)
    return build_scene(TINY, data=None, tokenizer=None, num_pairs=6, seed=0, max_epochs=12)


def test_both_arms_say_the_same_and_ours_takes_fewer_passes(scene: Scene) -> None:
    found = compare_arms(scene, config=CONFIG, repeats=2)
    assert found.agreement.is_exact
    assert found.agreement.compared == 12
    assert found.our_passes.passes * 2 < found.official_passes.passes
    assert found.our_passes.positions < found.official_passes.positions


def test_without_an_end_token_the_official_loop_runs_to_the_limit(scene: Scene) -> None:
    rows = scene.data.forget[:2]
    small = replace(scene, data=replace(scene.data, forget=rows, retain=scene.data.retain[:1]))
    lose_end_token(small)
    try:
        found = compare_arms(small, config=CONFIG, repeats=1)
    finally:
        scene.model.lm_head.bias = None
    # A pass per new token and one per loss, for every row; one per document.
    assert found.official_passes.passes == 3 * (24 + 1) + len(items(small)) - 3


@pytest.mark.parametrize("wrong", ["text", "score", "loss"])
def test_a_difference_is_refused(scene: Scene, wrong: str) -> None:
    """Negative control: one text, one score or one loss is another."""
    official, arm = OfficialResult(), official_arm(scene, config=CONFIG, device="cpu")
    for item in items(scene):
        run_official(arm, item, into=official)
    report = run_ours(scene, config=CONFIG, device="cpu")
    check(compare(official, report.rows))
    name = next(row["id"] for row in report.rows if row["part"] == "task" and not row["decided"])
    row = official.rows[name]
    changes = {"text": {"text": row.text + "x"}, "score": {"score": row.score + 0.5}, "loss": {"loss": row.loss + 0.01}}
    official.rows[name] = replace(row, **changes[wrong])
    with pytest.raises(ArmsDisagreeError):
        check(compare(official, report.rows))
