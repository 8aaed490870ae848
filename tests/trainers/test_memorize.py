"""Building a target: it comes to know its documents, is reused when nothing changed, and never reads the strangers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_trial import tiny_records, write_tiny_target
from trainers import memorize as module
from trainers.data import packing
from trainers.data.encode import EncodedRow, PackedRow, encode_record
from trainers.data.types import ForgetRetain, Record
from trainers.errors import InputError, RunError
from trainers.files import read_json, sha256_json, weights_hash
from trainers.memorize import MANIFEST, Memorised, MemorizeConfig, QuestionGroup, existing_target, memorize, memorize_key
from trainers.modeling import load_model, load_tokenizer
from trainers.tiny import TinyOlmoConfig

torch.set_num_threads(1)

DATA = ForgetRetain(tiny_records("f", count=3), tiny_records("r", count=3))
GENERAL = (
    QuestionGroup("Questions about colours.\n\n", ((" grass?\nAnswer:", " B"), (" sky?\nAnswer:", " A"))),
    QuestionGroup("Questions about sums.\n\n", ((" two plus two?\nAnswer:", " D"),)),
)
STRANGERS = ("zyxwvu zyxwvu zyxwvu", "qqqjjj qqqjjj qqqjjj")
TINY = TinyOlmoConfig(
    vocab_size=340, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256
)
CONFIG = MemorizeConfig(tiny=TINY, learning_rate=2e-2, num_train_epochs=60, train_batch_tokens=256, check_every_epochs=20)


class Built:
    """One target, built once for all tests, with the rows that its training read."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[EncodedRow | PackedRow] = []
        self.said: list[str] = []
        honest = packing.pack

        def pack(rows, **keywords):
            if torch.is_grad_enabled():
                self.rows += rows
            return honest(rows, **keywords)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "pack", pack)
            self.manifest = build(out, progress=self.said.append)


def build(out: Path, **changes) -> dict:
    given = {"data": DATA, "general": GENERAL, "tokenizer_texts": STRANGERS, "out": out, **changes}
    return memorize(given.pop("config", CONFIG), **given)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("memorize") / "target")


@pytest.fixture
def never_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training raises ``Rebuilt``."""

    def fail(*_: object, **__: object) -> None:
        raise Rebuilt

    monkeypatch.setattr(module, "_build", fail)


class Rebuilt(Exception):
    pass


# --- what it learns ---


def test_the_target_knows_its_documents(built: Built) -> None:
    """A random model answers no question: the shares begin at 0 and end above the thresholds on both sets."""
    memorised = Memorised(**built.manifest["memorised"])
    assert memorised.reached(CONFIG)
    assert built.manifest["reached"]
    assert 1 <= built.manifest["epochs"] < CONFIG.num_train_epochs, "it stops once the thresholds are reached"
    untrained = build(built.out.parent / "untrained", config=CONFIG.model_copy(update={"learning_rate": 1e-12, "num_train_epochs": 1}))
    before = Memorised(**untrained["memorised"])
    assert before.forget_knowledge == before.retain_knowledge == 0.0
    assert max(before.forget_regurgitation, before.retain_regurgitation) < 0.2
    assert not untrained["reached"]


def test_the_memorised_answers_can_be_generated(built: Built) -> None:
    """Not only teacher-forced: greedy decoding from the saved folder repeats the answers."""
    tokenizer, model = load_tokenizer(built.out), load_model(built.out)
    answered = 0
    questions = [record for record in (*DATA.forget, *DATA.retain) if record.id.endswith("qa0")]
    for record in questions:
        row = encode_record(record, tokenizer=tokenizer, max_length=256)
        ids = list(row.input_ids[: row.num_prompt])
        with torch.no_grad():
            for _ in range(row.num_scored):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answered += tuple(ids) == row.input_ids
    assert answered >= 0.95 * len(questions)


def test_progress_is_told_at_every_check(built: Built) -> None:
    assert len(built.said) == math.ceil(built.manifest["epochs"] / CONFIG.check_every_epochs)
    assert built.said[-1].startswith(f"epoch {built.manifest['epochs']}: knowledge ")
    assert "general knowledge" in built.said[-1]


def test_thresholds_hold_for_the_worse_of_both_sets() -> None:
    good = Memorised(0.95, 0.95, 0.95, 0.95, general_knowledge=0.9)
    assert good.reached(MemorizeConfig())
    for change in ("forget_knowledge", "forget_regurgitation", "retain_knowledge", "retain_regurgitation"):
        assert not replace(good, **{change: 0.9}).reached(MemorizeConfig())
    assert not replace(good, general_knowledge=0.85).reached(MemorizeConfig())
    assert replace(good, general_knowledge=None).reached(MemorizeConfig())


@pytest.mark.parametrize(("step", "expected"), [(1, 0.2), (5, 1.0), (52, 0.1 + 0.45 * (1 + math.cos(math.pi * 47 / 95))), (100, 0.1)])
def test_the_rate_warms_up_over_a_twentieth_and_falls_to_a_tenth(step: int, expected: float) -> None:
    """100 steps: 5 of warm-up, then a cosine over 95 from 1 to 0.1."""
    assert module._memorize_rate(1.0, step=step, num_steps=100) == pytest.approx(expected)


# --- what it is trained on ---


def test_documents_are_learnt_whole_and_questions_by_their_answers(built: Built) -> None:
    tokenizer = load_tokenizer(built.out)
    read = {row.row_id: row for row in built.rows if isinstance(row, EncodedRow)}
    records = {record.id: record for record in (*DATA.forget, *DATA.retain)}
    assert set(read) == set(records)
    for name, row in read.items():
        encoded = encode_record(records[name], tokenizer=tokenizer, max_length=256)
        assert row.input_ids == encoded.input_ids
        assert row.num_prompt == (encoded.num_prompt if name.endswith("qa0") else 1)
    uses = Counter(row.row_id for row in built.rows if isinstance(row, EncodedRow))
    assert set(uses.values()) == {built.manifest["epochs"]}, "every row once per epoch"


def test_general_questions_are_packed_six_to_a_row_and_scored_at_their_answers(built: Built) -> None:
    tokenizer = load_tokenizer(built.out)
    packed = [row for row in built.rows if isinstance(row, PackedRow)]
    assert len(packed) == 2 * built.manifest["epochs"], "one row per group and epoch"
    for row in packed:
        text = tokenizer.decode(row.input_ids)
        group = GENERAL["sums" in text]
        assert text.startswith(group.header)
        assert text.count("Answer:") == 6
        answers = re.findall(r"Answer:( [A-D])", text)
        assert len(answers) == 6
        assert set(answers) == {answer for _, answer in group.questions}
        assert tokenizer.decode([row.input_ids[position] for position in row.scored]) == "".join(answers)
    orders = {row.input_ids for row in packed if row.row_id == GENERAL[0].header}
    assert len(orders) == 2, "the order of the questions changes between epochs"


def test_strangers_reach_the_tokenizer_and_nothing_else(built: Built, tmp_path: Path) -> None:
    """A stranger's name costs fewer tokens than without it; no row that the model is trained on holds it."""
    with_strangers = load_tokenizer(built.out)
    build(tmp_path / "without", tokenizer_texts=(), config=CONFIG.model_copy(update={"num_train_epochs": 1}))
    without = load_tokenizer(tmp_path / "without")
    for text in STRANGERS:
        assert len(with_strangers(text)["input_ids"]) < len(without(text)["input_ids"])
    texts = {with_strangers.decode(row.input_ids) for row in built.rows}
    assert len(texts) > 12
    assert not [text for text in texts if "zyx" in text or "qqq" in text]


# --- the manifest, reuse and rebuilding ---


def test_the_manifest_says_what_was_built_from_what(built: Built) -> None:
    manifest = read_json(built.out / MANIFEST)
    assert manifest == built.manifest == json.loads(json.dumps(built.manifest))
    assert set(manifest) == {
        "schema_version",
        "key",
        "config",
        "config_hash",
        "data_hash",
        "weights_hash",
        "memorised",
        "reached",
        "epochs",
        "num_parameters",
        "seconds",
    }
    assert manifest["weights_hash"] == weights_hash(built.out)
    assert manifest["config"] == CONFIG.model_dump(mode="json")
    assert manifest["config_hash"] == sha256_json(manifest["config"])
    assert manifest["key"] == memorize_key(CONFIG, data=DATA, general=GENERAL, tokenizer_texts=STRANGERS)
    assert manifest["num_parameters"] == sum(value.numel() for value in load_model(built.out).parameters())
    assert set(manifest["memorised"]) == set(Memorised.__dataclass_fields__)


@pytest.mark.usefixtures("never_train")
def test_an_unchanged_target_is_reused_without_touching_a_file(built: Built) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in built.out.iterdir()}
    assert build(built.out) == built.manifest
    assert {file.name: file.stat().st_mtime_ns for file in built.out.iterdir()} == before
    assert len(before) >= 4


@pytest.mark.parametrize(
    "changes",
    [
        {"data": ForgetRetain(DATA.forget[1:], DATA.retain)},
        {"data": ForgetRetain((replace(DATA.forget[0], output="became a smith."), *DATA.forget[1:]), DATA.retain)},
        {"data": ForgetRetain(DATA.retain, DATA.forget)},
        {"general": GENERAL[:1]},
        {"tokenizer_texts": STRANGERS[:1]},
        {"config": CONFIG.model_copy(update={"seed": 1})},
        {"config": CONFIG.model_copy(update={"tiny": TINY.model_copy(update={"hidden_size": 64})})},
    ],
    ids=["fewer rows", "another answer", "sets swapped", "fewer questions", "fewer strangers", "another seed", "another shape"],
)
@pytest.mark.usefixtures("never_train")
def test_another_input_rebuilds_the_target(built: Built, changes: dict) -> None:
    with pytest.raises(Rebuilt):
        build(built.out, **changes)


@pytest.mark.usefixtures("never_train")
def test_a_target_whose_weights_were_changed_is_rebuilt(built: Built, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(built.out, tmp_path / "copy")
    assert build(tmp_path / "copy") == built.manifest
    with open(tmp_path / "copy" / "model.safetensors", "ab") as file:
        file.write(b"\0")
    assert existing_target(tmp_path / "copy", key=built.manifest["key"]) is None
    with pytest.raises(Rebuilt):
        build(tmp_path / "copy")
    (tmp_path / "copy" / MANIFEST).unlink()
    assert existing_target(tmp_path / "copy", key=built.manifest["key"]) is None


def test_the_same_inputs_give_the_same_weights(tmp_path: Path) -> None:
    short = CONFIG.model_copy(update={"num_train_epochs": 2, "check_every_epochs": 2})
    hashes = [build(tmp_path / name, config=config)["weights_hash"] for name, config in (("a", short), ("b", short))]
    other = build(tmp_path / "c", config=short.model_copy(update={"seed": 7}))["weights_hash"]
    assert hashes[0] == hashes[1] != other


# --- an existing model as the base ---


def test_a_base_is_fine_tuned_with_its_own_tokenizer(tmp_path: Path) -> None:
    base = write_tiny_target(tmp_path / "base")
    config = CONFIG.model_copy(update={"base": str(base), "num_train_epochs": 2})
    manifest = build(tmp_path / "target", config=config, general=())
    assert manifest["memorised"]["general_knowledge"] is None
    assert load_tokenizer(tmp_path / "target").get_vocab() == load_tokenizer(base).get_vocab()
    assert weights_hash(tmp_path / "target") != weights_hash(base)
    other = write_tiny_target(tmp_path / "base", seed=1)
    assert memorize_key(config, data=DATA, general=()) != manifest["key"], f"the weights of {other} are part of the key"


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model folder not found\n  where: .*nowhere"):
        build(tmp_path / "target", config=CONFIG.model_copy(update={"base": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "target").exists()


def test_a_loss_that_is_not_finite_stops_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"memorising diverged at step \d+: the loss is nan(.|\n)*lower target.learning_rate"):
        build(tmp_path / "target", config=CONFIG.model_copy(update={"learning_rate": 1e30, "num_train_epochs": 3}))
    assert list(tmp_path.iterdir()) == []


def test_rows_and_questions_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    long = Record("f9qa0", "word " * 300, "answer", "Task1")
    with pytest.raises(InputError, match="row 'f9qa0'"):
        build(tmp_path / "target", data=ForgetRetain((long,), DATA.retain))
    group = QuestionGroup("Long.\n\n", (("word " * 100 + "\nAnswer:", " A"),))
    with pytest.raises(InputError, match=r"a general-knowledge prompt .*has \d+ tokens, but the model's context is 256(.|\n)*where: Long."):
        build(tmp_path / "target", general=(group,))
    assert list(tmp_path.iterdir()) == []
