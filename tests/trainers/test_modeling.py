"""Loading, building and adapting models: what is accepted, what is refused, and that nothing depends on luck."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tiny_trial import tiny_records, write_tiny_target
from trainers.config import LoraConfig, TrainableConfig
from trainers.data.encode import EncodedRow
from trainers.data.packing import pack
from trainers.engine.local import adapters_off
from trainers.errors import InputError
from trainers.files import read_json, write_json
from trainers.modeling import (
    add_lora,
    check_model_folder,
    context_length,
    decoder_layers,
    enable_activation_checkpointing,
    layer_index,
    load_adapted_model,
    load_model,
    load_tokenizer,
    model_skeleton,
    scaled_adapters,
    select_trainable,
    torch_dtype,
)
from trainers.scoring import Request, ScoringModel, Segment, scores_of
from trainers.tiny import TinyOlmoConfig, build_tiny_olmo, train_tokenizer

torch.set_num_threads(1)

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("modeling") / "target")


# --- folders ---


def test_a_model_loads_in_evaluation_mode_and_in_the_dtype_asked_for(target: Path) -> None:
    model = load_model(target)
    assert not model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert {value.dtype for value in load_model(target, dtype="bfloat16").parameters()} == {torch.bfloat16}
    assert torch_dtype("float16") == torch.float16


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"no config.json in the model folder(.|\n)*found: .*model.safetensors"),
        ("model.safetensors", "no .safetensors weights in the model folder"),
        ("tokenizer", "no tokenizer in the model folder"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(target: Path, tmp_path: Path, missing: str, message: str) -> None:
    import shutil

    shutil.copytree(target, tmp_path / "model")
    assert check_model_folder(tmp_path / "model") == tmp_path / "model"
    for file in (tmp_path / "model").glob(f"{missing}*"):
        file.unlink()
    with pytest.raises(InputError, match=message):
        check_model_folder(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "model")


def test_missing_and_unreadable_models_are_named(tmp_path: Path, target: Path) -> None:
    import shutil

    with pytest.raises(InputError, match=r"model folder not found\n  where: .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path / "nowhere")
    shutil.copytree(target, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"the checkpoint cannot be read(.|\n)*where: .*torn"):
        load_model(tmp_path / "torn")


def test_a_tokenizer_without_padding_pads_with_its_end_token(target: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(target)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.pad_token = None
    tokenizer.save_pretrained(str(tmp_path / "bare"))
    bare = load_tokenizer(tmp_path / "bare")
    assert bare.pad_token_id == bare.eos_token_id == tokenizer.eos_token_id
    bare.eos_token = None
    bare.save_pretrained(str(tmp_path / "endless"))
    with pytest.raises(InputError, match="the tokenizer has no end token"):
        load_tokenizer(tmp_path / "endless")


def test_the_context_is_read_from_the_configuration(target: Path) -> None:
    assert context_length(load_model(target).config) == 128
    assert context_length(object()) == 2048


# --- adapters ---


def test_adapters_start_as_the_identity_and_follow_from_the_seed(target: Path) -> None:
    ids = torch.arange(8)[None]
    plain = load_model(target)(ids).logits
    random_state = torch.random.get_rng_state()
    models = [add_lora(load_model(target), lora=LORA, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), random_state), "the caller's random stream is left alone"
    assert torch.equal(models[0].eval()(ids).logits, plain)
    first, same, other = (torch.cat([value.flatten() for value in model.parameters() if value.requires_grad]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_adapters_train_and_in_float32(target: Path, dtype: str) -> None:
    """All seven linear modules of a layer, two factors each; the head and the embedding stay frozen."""
    model = ScoringModel(add_lora(load_model(target, dtype=dtype), lora=LORA, seed=0))
    trainable = model.trainable()
    assert len(trainable) == 2 * 7 * 2
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in trainable)
    assert {value.dtype for value in trainable.values()} == {torch.float32}
    assert not [name for name in trainable if "lm_head" in name or "embed" in name]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("no_such_proj",), r"adapters cannot be added: Target modules .*no_such_proj(.|\n)*where: train.lora.target_modules"),
        (("embed_tokens",), r"base_model.model.model.embed_tokens is no linear module"),
        (("q_proj", "embed_tokens"), r"embed_tokens is no linear module(.|\n)*of linear modules only"),
    ],
)
def test_target_modules_that_cannot_be_adapted_are_refused(target: Path, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_lora(load_model(target), lora=LoraConfig(r=2, target_modules=targets), seed=0)


def test_a_folder_that_is_neither_adapter_nor_model_is_refused(target: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        load_adapted_model(target, tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    write_json(tmp_path / "broken" / "adapter_config.json", {"peft_type": "LORA", "r": 4})
    with pytest.raises(InputError, match=r"the adapter cannot be read(.|\n)*where: .*broken"):
        load_adapted_model(target, tmp_path / "broken")


def test_an_adapter_is_added_in_float32_before_it_is_cast(target: Path, tmp_path: Path) -> None:
    """W + BA rounded once; adding BA to weights that are already rounded would differ."""
    model = add_lora(load_model(target), lora=LORA, seed=0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.003, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(str(tmp_path / "adapter"))
    wide = load_adapted_model(target, tmp_path / "adapter").state_dict()
    narrow = load_adapted_model(target, tmp_path / "adapter", dtype="bfloat16").state_dict()
    assert all(torch.equal(narrow[name], value.bfloat16()) for name, value in wide.items())
    plain = load_model(target, dtype="bfloat16").state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    twice = (plain[name].float() + (wide[name] - load_model(target).state_dict()[name])).bfloat16()
    assert not torch.equal(twice, narrow[name]), "negative control: rounding twice is seen"


@pytest.mark.parametrize("layers", ["1", "0|2"])
def test_a_regular_expression_places_adapters_in_chosen_layers(layers: str) -> None:
    model = add_lora(small_llama(), lora=LoraConfig(r=2, target_modules=rf".*layers\.({layers})\.mlp\.down_proj"), seed=0)
    found = {name.split(".lora_")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert found == {f"base_model.model.model.layers.{layer}.mlp.down_proj" for layer in layers.split("|")}


@pytest.mark.parametrize(("pattern", "message"), [(r".*layers\.9\.mlp", "adapters cannot be added: "), ("(", "adapters cannot be added: ")])
def test_a_pattern_that_is_wrong_or_matches_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"{message}(.|\n)*target_modules = {re.escape(repr(pattern))}(.|\n)*a regular expression"):
        add_lora(small_llama(), lora=LoraConfig(r=2, target_modules=pattern), seed=0)


def test_adapters_are_scaled_inside_and_restored_after_a_failure() -> None:
    """W + s * BA is what the factors A and s * B would give; s = 0 is the base, s = 1 changes nothing."""
    model = add_lora(small_llama(), lora=LORA, seed=0).eval()
    move(model, only="lora_B")
    flipped = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in flipped.named_parameters():
            value.mul_(-2.0 if "lora_B" in name else 1.0)
    before = logits_of(model)
    with scaled_adapters(model, scale=-2.0):
        torch.testing.assert_close(logits_of(model), logits_of(flipped), rtol=0, atol=1e-5)
    with scaled_adapters(model, scale=0.0), model.disable_adapter():
        base = logits_of(model)
    assert float((before - base).abs().max()) > 1e-2, "negative control: the adapters do something"
    with scaled_adapters(model, scale=0.0):
        torch.testing.assert_close(logits_of(model), base, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="stop"), scaled_adapters(model, scale=3.0):
        raise RuntimeError("stop")
    assert torch.equal(logits_of(model), before)


def test_a_model_without_adapters_is_not_scaled() -> None:
    model = small_llama().eval()
    before = logits_of(model)
    with scaled_adapters(model, scale=-1.0):
        assert torch.equal(logits_of(model), before)


# --- what is trained without adapters ---


def small_llama(*, tied: bool = False, layers: int = 4, seed: int = 0, **settings) -> Any:
    """A random Llama: its norms have weights, unlike those of the tiny OLMo."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, tie_word_embeddings=tied,
        max_position_embeddings=64, **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def move(model: Any, *, only: str = "") -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if only in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))


def trained(model: Any) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({}, r".*"),
        ({"modules": ("down_proj",)}, r"model\.layers\.\d\.mlp\.down_proj\.weight"),
        ({"modules": ("down_proj", "o_proj"), "last_layers": 2}, r"model\.layers\.[23]\.(mlp\.down_proj|self_attn\.o_proj)\.weight"),
        ({"layers": (1, 2)}, r"model\.layers\.[12]\..*"),
        ({"layers": (-3, -2)}, r"model\.layers\.[12]\..*"),
        ({"layers": (2, -1)}, r"model\.layers\.[23]\..*"),
        ({"layers": (0, 0), "modules": ("mlp",)}, r"model\.layers\.0\.mlp\..*"),
        ({"last_layers": 4}, r"model\.layers\..*"),
        ({"last_layers": 1, "embeddings": True}, r"model\.layers\.3\..*|model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.weight"),
        ({"modules": ("q_proj",), "layers": (3, 3), "embeddings": True}, r"model\.layers\.3\..*q_proj.*|(?!model\.layers).*"),
        ({"modules": ("lm_head", "norm")}, r"lm_head\.weight|model\.norm\.weight"),
    ],
    ids=str,
)
def test_exactly_the_named_parameters_are_trained(settings: dict, pattern: str) -> None:
    """Said a second time as a pattern over all of the model's names; what was chosen before does not matter."""
    model = small_llama()
    expected = {name for name, _ in model.named_parameters() if re.fullmatch(pattern, name)}
    assert expected
    for earlier in (True, False):
        model.requires_grad_(earlier)
        select_trainable(model, trainable=TrainableConfig(**settings))
        assert trained(model) == expected


@pytest.mark.parametrize("settings", [{"modules": ("lm_head",)}, {"modules": ("embed_tokens",)}])
def test_an_embedding_tied_to_the_head_is_one_parameter_with_it(settings: dict) -> None:
    model = small_llama(tied=True)
    select_trainable(model, trainable=TrainableConfig(**settings))
    assert trained(model) == {"model.embed_tokens.weight"}
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modules": ("donw_proj",)},
            r"no module of the model is called 'donw_proj'(.|\n)*train.trainable.modules(.|\n)*did you mean 'down_proj'",
        ),
        ({"modules": ("xyz",)}, r"called 'xyz'(.|\n)*why: there are down_proj, embed_tokens, (.|\n)*name some of these"),
        ({"modules": ("down_proj", "act_fn")}, r"called 'act_fn' have no parameters(.|\n)*leave it out"),
        ({"modules": ("lm_head",), "last_layers": 2}, r"no module called 'lm_head' lies in decoder layers 2 to 3(.|\n)*embeddings: true"),
        ({"last_layers": 5}, r"last 5 decoder layers do not exist(.|\n)*last_layers = 5(.|\n)*the model has 4 (.|\n)*up to 4"),
        ({"layers": (1, 4)}, r"decoder layer 4 does not exist(.|\n)*train.trainable.layers: \[1, 4\](.|\n)*0 to 3, or -4 to -1"),
        ({"layers": (-5, 2)}, r"decoder layer -5 does not exist"),
        ({"layers": (2, 1)}, r"decoder layers 2 to 1 are none(.|\n)*the model has 4(.|\n)*use \[1, 2\]"),
        ({"layers": (-1, 0)}, r"decoder layers 3 to 0 are none(.|\n)*use \[0, 3\]"),
    ],
    ids=str,
)
def test_a_set_that_does_not_exist_is_refused_before_anything_changes(settings: dict, message: str) -> None:
    model = small_llama()
    before = trained(model)
    with pytest.raises(InputError, match=message):
        select_trainable(model, trainable=TrainableConfig(**settings))
    assert trained(model) == before


def test_the_decoder_layers_are_the_outermost_list_of_their_number() -> None:
    """Experts of a layer may be as many as the layers; a model without a list says so."""

    def layer() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})

    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(2, 2)]), "layers": nn.ModuleList([layer(), layer()])})
    model.config = SimpleNamespace(num_hidden_layers=2)
    assert decoder_layers(model) is model["layers"]
    llama = small_llama()
    assert decoder_layers(llama) is llama.model.layers
    adapted = add_lora(llama, lora=LORA, seed=0)
    assert decoder_layers(adapted) is llama.model.layers
    model.config.num_hidden_layers = 3
    with pytest.raises(InputError, match=r"layers of ModuleDict were not found(.|\n)*num_hidden_layers = 3"):
        decoder_layers(model)


@pytest.mark.parametrize(
    ("count", "layer", "expected"),
    [(32, None, 7), (16, None, 3), (4, None, 0), (2, None, 0), (1, None, 0), (32, 0, 0), (32, 31, 31), (32, -1, 31), (32, -32, 0)],
)
def test_a_layer_is_counted_from_either_end_and_lies_a_quarter_up_by_default(count: int, layer: int | None, expected: int) -> None:
    assert layer_index(count, layer=layer) == expected


def test_a_layer_outside_the_model_is_refused() -> None:
    model = small_llama()
    assert layer_index(model, layer=-2) == 2
    for layer in (4, -5):
        with pytest.raises(
            InputError, match=rf"layer {layer} does not exist(.|\n)*train.objective.layer = {layer}\n(.|\n)*4 decoder layers"
        ):
            layer_index(model, layer=layer)


def test_a_skeleton_has_the_names_shapes_and_ties_of_the_model_but_no_weights(tmp_path: Path) -> None:
    small_llama(tied=True).save_pretrained(str(tmp_path))
    skeleton = model_skeleton(tmp_path)
    shapes = {name: value.shape for name, value in small_llama(tied=True).named_parameters()}
    assert {name: value.shape for name, value in skeleton.named_parameters()} == shapes
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    assert all(value.is_meta for value in skeleton.parameters())


# --- recomputed activations ---


def loss_gradients_and_saved_bytes(model: Any, *, seed: int = 0) -> tuple[float, dict[str, Tensor | None], int]:
    """One training pass, and the bytes that autograd keeps for its way back."""
    saved = 0

    def count(value: Tensor) -> Tensor:
        nonlocal saved
        saved += value.numel() * value.element_size()
        return value

    torch.manual_seed(seed)
    model.train().zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        loss = model(torch.arange(32)[None] % 50, use_cache=False).logits.square().mean()
        kept = saved
    loss.backward()
    return float(loss.detach()), {name: value.grad for name, value in model.named_parameters() if value.requires_grad}, kept


def trainee(kind: str) -> Any:
    if kind == "all":
        return small_llama()
    if kind == "last layer":
        model = small_llama()
        select_trainable(model, trainable=TrainableConfig(last_layers=1))
        return model
    model = add_lora(small_llama(), lora=LoraConfig(r=2, lora_dropout=float(kind.split()[-1])), seed=0)
    move(model, only="lora_B")
    return model


@pytest.mark.parametrize("kind", ["all", "last layer", "lora 0.0", "lora 0.3"])
def test_recomputing_activations_keeps_less_and_changes_neither_loss_nor_gradient(kind: str) -> None:
    loss, gradients, kept = loss_gradients_and_saved_bytes(trainee(kind))
    model = trainee(kind)
    enable_activation_checkpointing(model)
    actual, actual_gradients, actual_kept = loss_gradients_and_saved_bytes(model)
    assert actual == loss
    assert gradients.keys() == actual_gradients.keys()
    for name, value in gradients.items():
        assert value is not None, name
        assert float(value.abs().max()) > 0, name
        torch.testing.assert_close(actual_gradients[name], value, rtol=1e-6, atol=0)
    assert actual_kept < (0.8 if kind == "last layer" else 0.5) * kept
    if kind == "lora 0.3":
        other = loss_gradients_and_saved_bytes(model, seed=1)
        assert other[0] != loss, "negative control: dropout is on"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_with_reentry_and_frozen_inputs_adapters_would_not_train() -> None:
    """Negative control: the known failure of adapters under checkpointing, which enabling it our way does not have."""
    model = trainee("lora 0.0")
    inner = model.get_base_model()
    enable_activation_checkpointing(model)
    for module in inner.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=True
            )
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss_gradients_and_saved_bytes(model)


@pytest.mark.parametrize("ask_for_input_gradients", [False, True])
def test_frozen_layers_below_the_trained_ones_are_not_recomputed(ask_for_input_gradients: bool) -> None:
    """With gradients of the embedding's output, as transformers sets it up, they would be."""
    model = trainee("last layer")
    enable_activation_checkpointing(model)
    if ask_for_input_gradients:
        model.enable_input_require_grads()
    passes = [0] * 4
    for index, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: passes.__setitem__(index, passes[index] + 1))
    loss_gradients_and_saved_bytes(model)
    assert passes == ([2, 2, 2, 2] if ask_for_input_gradients else [1, 1, 1, 2])


def test_measuring_recomputes_nothing_and_an_architecture_without_support_is_refused() -> None:
    model = small_llama().eval()
    before = logits_of(model)
    enable_activation_checkpointing(model)
    assert torch.equal(logits_of(model), before)
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot recompute activations(.|\n)*train.activation_checkpointing"):
        enable_activation_checkpointing(model)


# --- scored positions ---


def test_the_head_runs_on_scored_positions_with_the_same_logits_as_a_full_forward(target: Path) -> None:
    model = ScoringModel(add_lora(load_model(target), lora=LORA, seed=0).eval())
    rows = [EncodedRow("a", (5, 6, 7, 8, 9), 3), EncodedRow("b", (10, 11, 12), 1)]
    with torch.no_grad():
        log_prob_N = model(pack(rows, pad_token_id=1))[0]
        full = [model.lm(torch.tensor([row.input_ids])).logits[0].log_softmax(dim=-1) for row in rows]
    expected = torch.stack([full[0][2, 8], full[0][3, 9], full[1][0, 11], full[1][1, 12]])
    torch.testing.assert_close(log_prob_N, expected, rtol=0, atol=1e-6)
    later = torch.stack([full[0][3, 8], full[0][4, 9], full[1][1, 11], full[1][2, 12]])
    assert float((log_prob_N - later).abs().max()) > 1e-2, "negative control: one position later"


def test_switching_adapters_off_gives_the_target_and_switches_back(target: Path) -> None:
    model = ScoringModel(add_lora(load_model(target), lora=LORA, seed=0)).train()
    with torch.no_grad():
        for value in model.trainable().values():
            value.add_(0.3)
    batch = pack([EncodedRow("a", (5, 6, 7), 1)], pad_token_id=1)
    with torch.no_grad():
        plain = ScoringModel(load_model(target))(batch)[0]
        adapted = model(batch)[0]
    with adapters_off(model):
        off = model(batch)[0]
    assert torch.equal(off, plain)
    assert not off.requires_grad
    assert model.training
    assert torch.equal(model(batch)[0].detach(), adapted)
    assert not torch.equal(adapted, plain)


def test_an_empty_batch_still_reaches_every_parameter_with_gradient_zero(target: Path) -> None:
    """A rank without rows must run the same backward hooks as the others."""
    model = ScoringModel(load_model(target).requires_grad_(True))
    request = Request((Segment(0, 0),))
    scores = scores_of(model(pack([], pad_token_id=1), request), request=request)
    assert len(scores.segments[0].log_prob_N) == 0
    assert float(scores.link.detach()) == 0.0
    scores.link.backward()
    for name, value in model.trainable().items():
        assert value.grad is not None, name
        assert float(value.grad.abs().max()) == 0.0


# --- the tiny model ---


def test_the_tiny_model_and_its_tokenizer_follow_from_seed_and_texts() -> None:
    texts = [record.text for record in tiny_records("f", count=4)]
    tokenizers = [train_tokenizer(texts, vocab_size=320) for _ in range(2)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    config = TinyOlmoConfig(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    random_state = torch.random.get_rng_state()
    models = [build_tiny_olmo(config, tokenizer=tokenizers[0], seed=seed).state_dict() for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert any(not torch.equal(value, models[2][name]) for name, value in models[0].items())


def test_the_tiny_tokenizer_is_lossless_and_adds_nothing() -> None:
    tokenizer = train_tokenizer(["only these words"], vocab_size=300)
    for text in ("words never seen: Žluťoučký 漢字 \n\t", " leading space", ""):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer("only")["input_ids"] + tokenizer(" these")["input_ids"] == tokenizer("only these")["input_ids"]


def test_the_tiny_model_has_the_shape_asked_for(target: Path) -> None:
    config = read_json(target / "config.json")
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"], config["clip_qkv"]) == ("olmo", 2, 32, 8.0)
    assert config["vocab_size"] % 64 == 0
    tokenizer = load_tokenizer(target)
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
