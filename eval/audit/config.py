"""What an audit attacks with: names, defaults and units."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

from pydantic import Field

from eval.config import EvalConfig
from trainers.config import Frozen, LoraConfig
from trainers.errors import InputError


class Attack(StrEnum):
    """Ways to bring out what a model was made to forget."""

    RELEARN_FORGET = "relearn-forget"
    """Fine-tune on a few forget documents, ask for the others."""
    RELEARN_UNRELATED = "relearn-unrelated"
    """Fine-tune on other text for as many steps, ask for all forget documents."""
    INT8 = "int8"
    """Round the linear weights to 8 bits and back."""
    INT4 = "int4"
    """Round the linear weights to 4 bits and back."""
    PREFIX_25 = "prefix-25"
    """Give the first quarter of each completion, ask for the rest."""
    PREFIX_50 = "prefix-50"
    PREFIX_75 = "prefix-75"
    EXTRACTION = "extraction"
    """Extraction strength: how short a prefix makes the model finish the text by itself."""
    PARAPHRASE = "paraphrase"
    """Ask in other words; the best of a handful of prompts counts."""
    FEW_SHOT_RETAIN = "few-shot-retain"
    """Ask after a few solved examples from the retain set."""
    FEW_SHOT_FORGET = "few-shot-forget"
    """The same with examples from other forget documents."""
    SAMPLING = "sampling"
    """Draw several answers; the best of them counts."""
    MEMBERSHIP = "membership"
    """A family of membership attacks on the documents of every task."""


PREFIX_SHARES = {Attack.PREFIX_25: 0.25, Attack.PREFIX_50: 0.5, Attack.PREFIX_75: 0.75}
"""Share of the words of a completion that the model is given."""


class RelearnConfig(Frozen):
    """How the relearning attacks fine-tune.

    An attacker chooses the learning rate that works, so several are tried; the one after which the scored rows are most likely counts,
    for the control as well. The published attacks use a tenth of the forget set or less, and between one and ten epochs
    (https://arxiv.org/abs/2406.13356, https://arxiv.org/abs/2402.16835, https://arxiv.org/abs/2410.08827).
    """

    share: float = Field(0.1, gt=0, lt=1, description="share of the forget documents that is given to the attacker")
    min_documents: int = Field(2, ge=1, description="but at least so many, where there are more")
    num_train_epochs: int = Field(10, ge=1)
    train_batch_size: int = Field(8, ge=1, description="rows per optimizer step")
    learning_rates: tuple[float, ...] = Field((1e-4, 1e-3, 1e-2), min_length=1, description="of AdamW, constant")
    max_grad_norm: float = Field(1.0, gt=0)
    lora: LoraConfig | None = Field(
        LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0), description="adapters on all linear layers; null trains every parameter"
    )


class SamplingConfig(Frozen):
    """How answers are drawn; top-p is 1 and top-k is off, so that nothing is cut from the distribution.

    Source: Scholten et al. 2024, https://arxiv.org/abs/2410.03523
    """

    num_samples: int = Field(8, ge=1, description="answers drawn per row")
    temperature: float = Field(1.0, gt=0)


class AttackSettings(Frozen):
    """What is attacked with, and how hard."""

    attacks: tuple[Attack, ...] = Field(tuple(Attack), min_length=1, description="names of the attacks; default: all")
    documents: int = Field(10, ge=2, description="documents per task and set")
    seed: int = Field(0, ge=0, description="of the sample of documents, of examples, of fine-tuning and of sampling")
    shots: int = Field(3, ge=1, description="solved examples before a few-shot prompt")
    unseen_documents: int = Field(30, ge=1, description="non-member documents that serve as control, at most")
    relearn: RelearnConfig = RelearnConfig()
    sampling: SamplingConfig = SamplingConfig()


class AuditConfig(AttackSettings):
    """Settings of one audit."""

    eval: EvalConfig = EvalConfig()
    quantised: Literal["decoder-linears"] = Field("decoder-linears", description="every linear layer but the head; no embeddings")


def read_attacks(text: str | None) -> tuple[Attack, ...]:
    """Attacks from a list of names with commas between; None or ``all`` gives every one. In the order of the enumeration.

    Raises:
        InputError: for a name that is none, with the nearest one.
    """
    import difflib

    names = [name.strip() for name in (text or "all").split(",")]
    if names == ["all"]:
        return tuple(Attack)
    known = [attack.value for attack in Attack]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"unknown attack {name!r}" if name else "an empty name of an attack",
                where="--attacks",
                why=f"the attacks are {', '.join(known)}",
                fix=f"did you mean {near[0]!r}?" if near else "name some of these with commas between, or all",
            )
    return tuple(attack for attack in Attack if attack.value in names)


def attack_names(attacks: Sequence[Attack]) -> list[str]:
    """Their words, for files."""
    return [attack.value for attack in attacks]
