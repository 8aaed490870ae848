"""Parameters are counted without weights, and what a trial trains is what peft adapts or ``select_trainable`` selects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, OlmoConfig

from trainers.config import LoraConfig, TrainableConfig, TrainConfig
from trainers.errors import InputError
from trainers.model_shape import shape_of, trained_of
from trainers.modeling import add_lora, decoder_layers, select_trainable

OLMO_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
OLMO_7B: dict[str, Any] = {}
SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.mark.parametrize(("sizes", "tied", "expected"), [(OLMO_1B, True, 1_176_764_416), (OLMO_7B, False, 6_888_095_744)], ids=["1B", "7B"])
def test_olmo_has_four_projections_and_three_of_its_mlp_per_layer(sizes: dict[str, Any], tied: bool, expected: int) -> None:
    """V D once or twice, and per layer 4 D D + 3 D F: its norms have no weights."""
    shape = shape_of(OlmoConfig(**sizes))
    hidden, inner = shape.hidden, shape.intermediate
    assert shape.parameters == expected == (1 if tied else 2) * 50_304 * hidden + shape.layers * (4 * hidden**2 + 3 * hidden * inner)
    assert (shape.vocabulary, shape.head, shape.norms) == (50_304, 50_304 * hidden, 2 * hidden)


@pytest.mark.parametrize(("sizes", "expected"), [(OLMO_1B, 24_117_248), (OLMO_7B, 79_953_920)], ids=["1B", "7B"])
def test_adapters_on_all_linear_layers_of_olmo(sizes: dict[str, Any], expected: int) -> None:
    """R (in + out): per layer 4 (D + D) + 3 (D + F), times R = 32."""
    config = OlmoConfig(**sizes)
    shape, trained = shape_of(config), trained_of(config, train=TrainConfig(lora=LoraConfig(r=32)))
    assert trained.parameters == expected == 32 * shape.layers * (8 * shape.hidden + 3 * (shape.hidden + shape.intermediate))
    assert not trained.head
    assert not trained.embedding


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ("q_proj", "v_proj"), ("layers.1.self_attn.q_proj",), r".*layers\.(1|2)\.mlp\.(up|down)_proj"],
    ids=str,
)
@pytest.mark.parametrize("kind", [OlmoConfig, LlamaConfig])
def test_adapters_are_counted_as_peft_makes_them(kind: Any, targets: Any) -> None:
    config, lora = kind(**SMALL), LoraConfig(r=4, target_modules=targets)
    found = trained_of(config, train=TrainConfig(lora=lora))
    model = add_lora(AutoModelForCausalLM.from_config(config), lora=lora, seed=0)
    assert found.parameters == sum(value.numel() for value in model.parameters() if value.requires_grad)
    layers = decoder_layers(model.get_base_model())
    adapted = [{name.rpartition(".")[2] for name, module in layer.named_modules() if hasattr(module, "lora_A")} for layer in layers]
    assert [set(names) for names in found.layers] == adapted


@pytest.mark.parametrize(
    ("trainable", "layers"),
    [
        (TrainableConfig(), [0, 1, 2, 3]),
        (TrainableConfig(last_layers=2), [2, 3]),
        (TrainableConfig(modules=("down_proj", "embed_tokens")), [0, 1, 2, 3]),
        (TrainableConfig(layers=(1, -2), embeddings=True), [1, 2]),
    ],
    ids=["everything", "the last two layers", "down projections and embedding", "two layers in the middle and all outside"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [OlmoConfig, LlamaConfig])
def test_chosen_parameters_are_counted_as_they_are_selected(kind: Any, tied: bool, trainable: TrainableConfig, layers: list[int]) -> None:
    config = kind(**SMALL, tie_word_embeddings=tied)
    found = trained_of(config, train=TrainConfig(lora=None, trainable=trainable))
    model: Any = AutoModelForCausalLM.from_config(config)
    select_trainable(model, trainable=trainable)
    assert found.parameters == sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert found.head == model.get_output_embeddings().weight.requires_grad
    assert found.embedding == model.get_input_embeddings().weight.requires_grad
    assert [index for index, names in enumerate(found.layers) if names] == layers
    assert all(names["down_proj"] == SMALL["intermediate_size"] for names in found.layers if names)


def test_no_weight_is_made_and_skeletons_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B model's shape takes milliseconds once transformers is there; building it a second time would fail here."""
    config = OlmoConfig()
    before = shape_of(config)
    monkeypatch.setattr(torch.nn, "Linear", None)
    assert shape_of(config) == before
    assert trained_of(config, train=TrainConfig(lora=None)).parameters == before.parameters


def test_what_an_architecture_lacks_is_said() -> None:
    with pytest.raises(InputError, match="shape of MambaForCausalLM is not understood"):
        shape_of(MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64))
    with pytest.raises(InputError, match="no module of the model is called 'gate'"):
        trained_of(OlmoConfig(**SMALL), train=TrainConfig(lora=None, trainable=TrainableConfig(modules=("gate",))))
