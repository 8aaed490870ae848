"""Loading, building and adapting models: what is accepted, what is refused, and that nothing depends on luck."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_trial import tiny_records, write_tiny_target
from trainers.config import LoraConfig
from trainers.data.batches import collate
from trainers.data.encode import EncodedRow
from trainers.engine.local import adapters_off
from trainers.errors import InputError
from trainers.files import read_json, write_json
from trainers.modeling import add_lora, check_model_folder, context_length, load_adapted_model, load_model, load_tokenizer, torch_dtype
from trainers.scoring import ScoringModel, connect_to_graph
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


# --- scored positions ---


def test_the_head_runs_on_scored_positions_with_the_same_logits_as_a_full_forward(target: Path) -> None:
    model = ScoringModel(add_lora(load_model(target), lora=LORA, seed=0).eval())
    rows = [EncodedRow("a", (5, 6, 7, 8, 9), 3), EncodedRow("b", (10, 11, 12), 1)]
    batch = collate(rows, pad_token_id=1)
    with torch.no_grad():
        hidden_ND, logits_NV = model(batch)
        full = [model.lm(torch.tensor([row.input_ids])).logits[0] for row in rows]
    assert hidden_ND.shape == (4, 32)
    expected = torch.cat([full[0][[2, 3]], full[1][[0, 1]]])
    torch.testing.assert_close(logits_NV, expected, rtol=0, atol=1e-6)
    assert float((logits_NV - torch.cat([full[0][[3, 4]], full[1][[1, 2]]])).abs().max()) > 1e-2, "negative control: one position later"


def test_switching_adapters_off_gives_the_target_and_switches_back(target: Path) -> None:
    model = ScoringModel(add_lora(load_model(target), lora=LORA, seed=0)).train()
    with torch.no_grad():
        for value in model.trainable().values():
            value.add_(0.3)
    batch = collate([EncodedRow("a", (5, 6, 7), 1)], pad_token_id=1)
    with torch.no_grad():
        plain = ScoringModel(load_model(target))(batch)[1]
        adapted = model(batch)[1]
    with adapters_off(model):
        off = model(batch)[1]
    assert torch.equal(off, plain)
    assert not off.requires_grad
    assert model.training
    assert torch.equal(model(batch)[1].detach(), adapted)
    assert not torch.equal(adapted, plain)


def test_an_empty_batch_still_reaches_every_parameter_with_gradient_zero(target: Path) -> None:
    """A rank without rows must run the same backward hooks as the others."""
    model = ScoringModel(load_model(target).requires_grad_(True))
    hidden_ND, logits_NV = model(collate([], pad_token_id=1))
    assert (hidden_ND.shape[0], logits_NV.shape[0]) == (0, 0)
    loss = connect_to_graph(torch.tensor(2.5), hidden_ND=hidden_ND, logits_NV=logits_NV)
    assert float(loss.detach()) == 2.5
    loss.backward()
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
