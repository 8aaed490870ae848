"""Configurations that cannot work are refused, with the setting named."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from trainers.config import EngineConfig, LoraConfig, ObjectiveConfig, ObjectiveName, Reduction, TrainConfig
from trainers.tiny import TinyOlmoConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineConfig(name="torch", ranks=2), r"engine.name = torch computes on one rank only; use deepspeed"),
        (lambda: EngineConfig(name="deepspeed", zero_stage=0, dtype="bfloat16"), r"no float32 master weights; use zero_stage: 1"),
        (lambda: TrainConfig(lora=None, engine={"name": "torch", "dtype": "bfloat16"}), r"without float32 masters"),
        (lambda: EngineConfig(zero_stage=4), "zero_stage"),
        (lambda: EngineConfig(dtype="float16"), "dtype"),
        (lambda: EngineConfig(ranks=0), "ranks"),
        (lambda: ObjectiveConfig(beta=0), "beta"),
        (lambda: ObjectiveConfig(beta=float("nan")), "beta"),
        (lambda: ObjectiveConfig(forget_weight=-1), "forget_weight"),
        (lambda: ObjectiveConfig(name="simple_npo"), "name"),
        (lambda: LoraConfig(r=0), "r"),
        (lambda: LoraConfig(lora_dropout=1.0), "lora_dropout"),
        (lambda: TrainConfig(learning_rate=0), "learning_rate"),
        (lambda: TrainConfig(learning_rate=float("inf")), "learning_rate"),
        (lambda: TrainConfig(num_train_epochs=0), "num_train_epochs"),
        (lambda: TrainConfig(warmup_ratio=1.1), "warmup_ratio"),
        (lambda: TrainConfig(max_length=4), "max_length"),
        (lambda: TrainConfig(lerning_rate=1e-4), "lerning_rate"),
        (lambda: TrainConfig(trainable={"last_layers": 2}), "lora and trainable together"),
        (lambda: TrainConfig(lora=None, trainable={"last_layers": 2, "layers": [0, 1]}), "either layers or last_layers"),
        (lambda: TrainConfig(objective={"kl_scope": "padded"}), "padded needs max_length"),
        (lambda: TrainConfig(adaptive_retain={"lowest": 3}), "lowest = 3 is above highest = 2.8"),
        (lambda: TinyOlmoConfig(hidden_size=33, num_attention_heads=3), r"hidden_size = 33 is no multiple of 2 \* num_attention_heads = 6"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(make, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: EngineConfig(name="torch", ranks=1, dtype="bfloat16"),
        lambda: EngineConfig(name="deepspeed", zero_stage=0, ranks=2),
        lambda: EngineConfig(name="deepspeed", zero_stage=1, dtype="bfloat16"),
        lambda: TrainConfig(engine={"name": "torch", "dtype": "bfloat16"}),
        lambda: TrainConfig(lora=None, engine={"name": "torch"}),
        lambda: TrainConfig(lora=None, engine={"name": "deepspeed", "zero_stage": 3, "dtype": "bfloat16"}),
        lambda: TinyOlmoConfig(hidden_size=36, num_attention_heads=3),
        lambda: TrainConfig(lora=None, trainable={"last_layers": 2}),
        lambda: TrainConfig(objective={"kl_scope": "padded"}, max_length=64),
        lambda: TrainConfig(adaptive_retain={"lowest": 2.8}),
    ],
)
def test_the_neighbours_of_refused_configurations_are_allowed(make) -> None:
    make()


def test_a_configuration_survives_its_own_json_and_cannot_be_changed() -> None:
    expected = TrainConfig(
        objective=ObjectiveConfig(name=ObjectiveName.NPO, reduction=Reduction.TOKEN_MEAN, retain_ce_weight=0.0),
        lora=LoraConfig(target_modules=("q_proj", "v_proj")),
        engine=EngineConfig(zero_stage=3, ranks=4),
        num_train_epochs=0.5,
    )
    assert TrainConfig.model_validate_json(expected.model_dump_json()) == expected
    with pytest.raises(ValidationError, match="frozen"):
        expected.seed = 1  # type: ignore[misc]
