"""The twin that never saw the forget set: memorising one of the two sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.helpers.data import make_data
from trainers.memorize import Memorised, MemorizeConfig, memorize, memorize_key

TINY = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SHORT = {"tiny": TINY, "num_train_epochs": 1, "min_knowledge": 0, "min_regurgitation": 0, "min_general_knowledge": 0}
TWIN = MemorizeConfig.model_validate(SHORT | {"sets": ["retain"]})
BOTH = MemorizeConfig.model_validate(SHORT)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_the_twin_does_not_depend_on_the_forget_answers_but_on_the_retain_answers(tmp_path: Path) -> None:
    """The same tokenizer and start, other answers: a forget answer changes nothing in the twin, a retain answer does.

    Answers are exchanged between rows of the same length, so that the tokenizer, trained on all texts, stays the same.
    """
    data = make_data(documents_per_task=2)

    def turned(rows):
        return tuple(replace(row, output=other.output, input=other.input) for row, other in zip(rows, [*rows[2:], *rows[:2]], strict=True))

    texts = [row.text for row in (*data.forget, *data.retain)]
    variants = {"plain": data, "forget": replace(data, forget=turned(data.forget)[:4]), "retain": replace(data, retain=data.retain[:4])}
    found = {}
    for config, kind in ((TWIN, "twin"), (BOTH, "both")):
        for name, variant in variants.items():
            base = tmp_path / "base"
            if not base.exists():
                memorize(BOTH, data=data, general=(), out=base, tokenizer_texts=texts)
            chosen = config.model_copy(update={"base": str(base)})
            memorize(chosen, data=variant, general=(), out=tmp_path / kind / name)
            found[kind, name] = weights(tmp_path / kind / name)["lm_head.weight"]
    torch.testing.assert_close(found["twin", "forget"], found["twin", "plain"], rtol=0, atol=0)
    assert not torch.equal(found["twin", "retain"], found["twin", "plain"])
    assert not torch.equal(found["both", "forget"], found["both", "plain"])


def test_the_tokenizer_of_the_twin_is_the_target_s(tmp_path: Path) -> None:
    data = make_data(documents_per_task=2)
    for name, config in (("target", BOTH), ("twin", TWIN)):
        memorize(config, data=data, general=(), out=tmp_path / name)
    one, other = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("target", "twin"))
    assert one == other


def test_thresholds_count_on_the_memorised_sets_only() -> None:
    found = Memorised(
        forget_knowledge=0.0, forget_regurgitation=0.1, retain_knowledge=0.97, retain_regurgitation=0.99, general_knowledge=None
    )
    strict = MemorizeConfig(min_knowledge=0.9, min_regurgitation=0.9)
    assert not found.reached(strict)
    assert found.reached(strict.model_copy(update={"sets": ("retain",)}))
    assert not found.reached(strict.model_copy(update={"sets": ("forget",)}))


def test_the_sets_are_part_of_the_target_s_key_and_are_checked() -> None:
    data = make_data(documents_per_task=2)
    assert memorize_key(BOTH, data=data, general=()) != memorize_key(TWIN, data=data, general=())
    for wrong in ([], ["retian"], ["retain", "retain"]):
        with pytest.raises(ValidationError):
            MemorizeConfig.model_validate({"sets": wrong})
