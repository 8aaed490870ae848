"""Operations of a trial: those of the benchmarks' formula, which is written for OLMo, and a schedule's rows as often as it reads them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import OlmoConfig

from benchmarks.flops import Volume as BenchVolume
from benchmarks.flops import needed_flops
from benchmarks.models import OLMO_1B, OLMO_7B, TINY, Shape, olmo_config
from tests.helpers.tiny_trial import random_rows
from trainers.config import LoraConfig, ObjectiveConfig, ScheduleConfig, TrainableConfig, TrainConfig
from trainers.flops import Volume, training_flops, trial_volume
from trainers.model_shape import shape_of, trained_of
from trainers.signals import SignalRows
from trainers.trial_rows import EncodedTrial

VOLUME = Volume(tokens=1000, evaluated=300, squares=90_000)


def flops(config: Any, *, volume: Volume = VOLUME, recomputes: bool = False, **settings: Any) -> int:
    train = TrainConfig(**settings)
    return training_flops(shape_of(config), train=train, trained=trained_of(config, train=train), volume=volume, recomputes=recomputes)


@pytest.mark.parametrize("shape", [TINY, OLMO_1B, OLMO_7B], ids=lambda shape: shape.name)
@pytest.mark.parametrize("r", [None, 8, 32])
def test_adapters_and_whole_models_cost_what_the_benchmarks_count(shape: Shape, r: int | None) -> None:
    expected = needed_flops(shape, BenchVolume(VOLUME.tokens, VOLUME.evaluated, VOLUME.squares), lora_r=r)
    assert flops(olmo_config(shape), lora=None if r is None else LoraConfig(r=r)) == expected


def test_recomputation_is_one_more_forward_pass_through_the_layers() -> None:
    """Of OLMo-7B's decoder layers: 2 (4 D D + 3 D F) L per token, and 4 D L per squared length."""
    more = flops(OlmoConfig(), recomputes=True, lora=None) - flops(OlmoConfig(), lora=None)
    assert more == OLMO_7B.body_flops * VOLUME.tokens + 4 * 4096 * 32 * VOLUME.squares


def test_layers_below_the_lowest_trained_one_run_forward_only() -> None:
    """The last 8 of 32 layers: forward 32, by inputs 8, by weights 8 layers."""
    body = OLMO_7B.body_flops * VOLUME.tokens
    attention = 4 * 4096 * 32 * VOLUME.squares
    head = OLMO_7B.head_flops * VOLUME.evaluated
    expected = body * (1 + 8 / 32 + 8 / 32) + attention * (1 + 2 * 8 / 32) + 2 * head
    assert flops(OlmoConfig(), lora=None, trainable=TrainableConfig(last_layers=8)) == pytest.approx(expected)


def test_gradients_of_each_set_alone_cost_twice() -> None:
    plain = flops(OlmoConfig(), lora=None, objective=ObjectiveConfig(name="grad_diff"))
    assert flops(OlmoConfig(), lora=None, objective=ObjectiveConfig(name="ng_diff")) == 2 * plain


def test_a_schedule_reads_its_rows_as_often_as_it_says() -> None:
    """Two passes over three forget rows of 4 + 6 + 8 tokens, half of them scored, each with two of the two retain rows of 10: 36 tokens and
    12 times 10."""
    rows = EncodedTrial(forget=random_rows(4, 6, 8), retain=random_rows(10, 10), signals=SignalRows([], [], [], []), pad_token_id=0)
    train = TrainConfig(num_train_epochs=2, train_batch_size=3, schedule=ScheduleConfig(retain_per_forget=2))
    assert trial_volume(rows, train=train) == Volume(tokens=36 + 120, evaluated=18 + 60, squares=2 * (16 + 36 + 64) + 12 * 100)
    without = train.model_copy(update={"objective": ObjectiveConfig(name="grad_ascent")})
    assert trial_volume(rows, train=without) == Volume(tokens=36, evaluated=18, squares=232)


def test_other_answers_are_read_beside_the_rows_they_belong_to() -> None:
    rows = EncodedTrial(
        forget=random_rows(4, 6), retain=(), signals=SignalRows([], [], [], []), pad_token_id=0, alternative=random_rows(10, 20)
    )
    train = TrainConfig(num_train_epochs=1, train_batch_size=2, objective=ObjectiveConfig(name="idk_dpo", retain_ce_weight=0))
    assert trial_volume(rows, train=train).tokens == 4 + 6 + 10 + 20
