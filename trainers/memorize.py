"""Fine-tuning a model until it has memorised the documents: the target that trials start from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from trainers.config import Frozen
from trainers.data.types import ForgetRetain, Kind
from trainers.errors import InputError, RunError
from trainers.files import atomic_folder, read_json, sha256_folder, sha256_json, weights_hash, write_json
from trainers.tiny import TinyOlmoConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainers.data.encode import EncodedRow, PackedRow
    from trainers.engine.base import Engine

MANIFEST = "target-manifest.json"


class MemorizeConfig(Frozen):
    """How a target model is built."""

    base: str | None = Field(None, description="model folder to fine-tune; null builds a tiny OLMo from random weights")
    tiny: TinyOlmoConfig = TinyOlmoConfig()
    sets: tuple[Literal["forget", "retain"], ...] = Field(
        ("forget", "retain"),
        description="what is memorised; [retain] builds the twin that never saw the forget set, with the same tokenizer: "
        "the control of an audit",
    )
    learning_rate: float = Field(2e-3, gt=0, description="peak; warmed up over 5 % of the steps, then cosine to a tenth")
    num_train_epochs: int = Field(60, ge=1, description="at most; fewer when the thresholds are reached earlier")
    train_batch_tokens: int = Field(1024, ge=16, description="tokens per optimizer step, padding included")
    min_knowledge: float = Field(0.95, ge=0, le=1, description="share of questions answered exactly, on the worse of both sets")
    min_regurgitation: float = Field(0.95, ge=0, le=1, description="token accuracy of completions, on the worse of both sets")
    min_general_knowledge: float = Field(0.9, ge=0, le=1, description="share of general-knowledge questions answered right")
    check_every_epochs: int = Field(5, ge=1)
    seed: int = Field(42, ge=0)

    @field_validator("sets")
    @classmethod
    def _some_once(cls, sets: tuple[str, ...]) -> tuple[str, ...]:
        if not sets or len(set(sets)) < len(sets):
            raise ValueError("must name forget, retain or both, each once")
        return sets


@dataclass(frozen=True)
class QuestionGroup:
    """General-knowledge questions that share a header.

    Args:
        header: text before the first question.
        questions: pairs of a prompt that ends where the answer begins, and the answer with its leading space.
    """

    header: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Memorised:
    """How well the target knows what it was trained on; shares between 0 and 1, teacher-forced."""

    forget_knowledge: float
    forget_regurgitation: float
    retain_knowledge: float
    retain_regurgitation: float
    general_knowledge: float | None

    def reached(self, config: MemorizeConfig) -> bool:
        """Whether every threshold is met, on the sets that were to be memorised."""
        knowledge = {"forget": self.forget_knowledge, "retain": self.retain_knowledge}
        regurgitation = {"forget": self.forget_regurgitation, "retain": self.retain_regurgitation}
        return (
            min(knowledge[name] for name in config.sets) >= config.min_knowledge
            and min(regurgitation[name] for name in config.sets) >= config.min_regurgitation
            and (self.general_knowledge is None or self.general_knowledge >= config.min_general_knowledge)
        )


def memorize_key(
    config: MemorizeConfig, *, data: ForgetRetain, general: Sequence[QuestionGroup], tokenizer_texts: Sequence[str] = ()
) -> str:
    """Hash of everything that determines the target: configuration, base weights, rows, questions and the tokenizer's texts.

    Raises:
        InputError: if the base is no model folder.
    """
    from trainers.modeling import check_model_folder

    base = sha256_folder(check_model_folder(config.base)) if config.base else None
    rows = [[asdict(record) for record in side] for side in (data.forget, data.retain)]
    return sha256_json(
        {
            "config": config.model_dump(mode="json"),
            "base": base,
            "rows": rows,
            "general": [asdict(group) for group in general],
            "tokenizer_texts": list(tokenizer_texts),
        }
    )


def existing_target(out: Path, *, key: str) -> dict[str, Any] | None:
    """The manifest of a target that was built from exactly these inputs, or None."""
    path = Path(out) / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    return manifest if manifest.get("key") == key and weights_hash(out) == manifest.get("weights_hash") else None


def memorize(
    config: MemorizeConfig,
    *,
    data: ForgetRetain,
    general: Sequence[QuestionGroup],
    out: Path,
    tokenizer_texts: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Build the target in ``out`` and return its manifest; an existing one from the same inputs is reused.

    Documents are learnt whole, questions by their answers, general-knowledge questions by their answer letters, several
    of them in one row as a few-shot prompt shows them. ``tokenizer_texts`` are texts that a tiny model's tokenizer is trained on
    beside these, and the model is not: without the membership attack's non-members among them, every known name would be one
    token and every unknown one several, and the attack would read the tokenizer instead of the model.

    Raises:
        InputError: if the base cannot be loaded or a row is longer than its context.
        RunError: if the loss stops being finite.
    """
    key = memorize_key(config, data=data, general=general, tokenizer_texts=tokenizer_texts)
    manifest = existing_target(out, key=key)
    if manifest is not None:
        return manifest
    say = progress or (lambda text: None)
    started = time.perf_counter()
    tokenizer, engine = _build(config, data=data, general=general, tokenizer_texts=tokenizer_texts)
    rows = _Rows(tokenizer, data=data, general=general, context=_context(engine), sets=config.sets)
    memorised, epochs = _train(config, engine=engine, rows=rows, say=say)
    with atomic_folder(out) as folder:
        engine.model.lm.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        manifest = {
            "schema_version": 1,
            "key": key,
            "config": config.model_dump(mode="json"),
            "config_hash": sha256_json(config.model_dump(mode="json")),
            "data_hash": sha256_json([[asdict(record) for record in side] for side in (data.forget, data.retain)]),
            "weights_hash": weights_hash(folder),
            "memorised": asdict(memorised),
            "reached": memorised.reached(config),
            "epochs": epochs,
            "num_parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def target_tokenizer(
    config: MemorizeConfig, *, data: ForgetRetain, general: Sequence[QuestionGroup], tokenizer_texts: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """The tokenizer that the target will have: the base's, or one trained on the texts at hand.

    Raises:
        InputError: if the base's cannot be read.
    """
    from trainers.modeling import check_model_folder, load_tokenizer
    from trainers.tiny import train_tokenizer

    if config.base:
        return load_tokenizer(check_model_folder(config.base))
    texts = [record.text for record in (*data.forget, *data.retain)]
    texts += [group.header + prompt + answer for group in general for prompt, answer in group.questions]
    return train_tokenizer([*texts, *tokenizer_texts], vocab_size=config.tiny.vocab_size)


def check_questions(general: Sequence[QuestionGroup], *, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Refuse questions that do not fit into the context whichever of their subject's are packed with them.

    Raises:
        InputError: naming the subject.
    """
    for group in general:
        texts = [group.header, *(f"{prompt}{answer}\n\n" for prompt, answer in group.questions)]
        header, *lengths = (len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        longest = sorted(lengths, reverse=True)[:QUESTIONS_PER_ROW]
        # The last row is filled up with questions that it already has.
        total = header + sum(longest) + (QUESTIONS_PER_ROW - len(longest)) * longest[0]
        if total > context:
            raise _too_long(total, header=group.header, context=context)


def _too_long(num_tokens: int, *, header: str, context: int) -> InputError:
    return InputError(
        f"a general-knowledge prompt of {QUESTIONS_PER_ROW} questions has {num_tokens} tokens, but the model's context is {context}",
        where=header.strip(),
        fix="choose shorter questions (data.mmlu_questions with data.mmlu_max_words), or a longer context",
    )


def _build(
    config: MemorizeConfig, *, data: ForgetRetain, general: Sequence[QuestionGroup], tokenizer_texts: Sequence[str]
) -> tuple[PreTrainedTokenizerBase, Engine]:
    from trainers.distributed import Rank
    from trainers.engine.local import LocalEngine
    from trainers.modeling import load_model
    from trainers.scoring import ScoringModel
    from trainers.tiny import build_tiny_olmo

    tokenizer = target_tokenizer(config, data=data, general=general, tokenizer_texts=tokenizer_texts)
    model = load_model(config.base) if config.base else build_tiny_olmo(config.tiny, tokenizer=tokenizer, seed=config.seed)
    engine = LocalEngine(ScoringModel(model.requires_grad_(True)), weight_decay=0.0, max_grad_norm=1.0, device=Rank().device)
    return tokenizer, engine


def _context(engine: Engine) -> int:
    from trainers.modeling import context_length

    return context_length(engine.model.causal_lm.config)


class _Rows:
    """What is trained on, and what memorisation is measured on."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        data: ForgetRetain,
        general: Sequence[QuestionGroup],
        context: int,
        sets: Sequence[str] = ("forget", "retain"),
    ) -> None:
        from trainers.data.encode import EncodedRow, encode_records

        self.tokenizer, self.general, self.context = tokenizer, general, context
        self.by_set = {
            name: encode_records(records, tokenizer=tokenizer, max_length=context)
            for name, records in (("forget", data.forget), ("retain", data.retain))
        }
        self.kinds = {"forget": [record.kind for record in data.forget], "retain": [record.kind for record in data.retain]}
        self.train: list[EncodedRow | PackedRow] = [
            # A document is learnt from its second token on; a question only by its answer.
            EncodedRow(row.row_id, row.input_ids, row.num_prompt if kind is Kind.QUESTION else 1)
            for name in sets
            for row, kind in zip(self.by_set[name], self.kinds[name], strict=True)
        ]

    def packed_questions(self, *, per_row: int, seed: list[int]) -> list[PackedRow]:
        """All general-knowledge questions in a new order, several per row under their header."""
        import numpy as np

        generator = np.random.default_rng(seed)
        rows = []
        for group in self.general:
            order = generator.permutation(len(group.questions)).tolist()
            for start in range(0, len(order), per_row):
                # The last row is filled up with the first questions, so that every position in a prompt is trained.
                chosen = [order[(start + offset) % len(order)] for offset in range(per_row)]
                rows.append(self._pack(group, [group.questions[index] for index in chosen]))
        return rows

    def _pack(self, group: QuestionGroup, questions: Sequence[tuple[str, str]]) -> PackedRow:
        from trainers.data.encode import PackedRow

        text, spans = group.header, []
        for prompt, answer in questions:
            text += prompt
            spans.append((len(text), len(text) + len(answer)))
            text += answer + "\n\n"
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        scored = tuple(
            index
            for index, (begin, end) in enumerate(encoded["offset_mapping"])
            if index > 0 and any(begin < high and end > low for low, high in spans)
        )
        ids = tuple(encoded["input_ids"])
        if len(ids) > self.context:
            raise _too_long(len(ids), header=group.header, context=self.context)
        return PackedRow(row_id=group.header, input_ids=ids, scored=scored)


QUESTIONS_PER_ROW = 6
"""As many as a five-shot prompt shows, the asked one included."""


def _train(config: MemorizeConfig, *, engine: Engine, rows: _Rows, say: Callable[[str], None]) -> tuple[Memorised, int]:
    import numpy as np

    from trainers.data.batches import batches_by_length
    from trainers.data.packing import pack
    from trainers.scoring import Request, Segment

    pad = int(rows.tokenizer.pad_token_id)
    step = 0
    memorised: Memorised | None = None
    for epoch in range(1, config.num_train_epochs + 1):
        everything = [*rows.train, *rows.packed_questions(per_row=QUESTIONS_PER_ROW, seed=[config.seed, 1, epoch])]
        groups = batches_by_length(everything, batch_tokens=config.train_batch_tokens)
        num_steps = len(groups) * config.num_train_epochs
        for index in np.random.default_rng([config.seed, 2, epoch]).permutation(len(groups)).tolist():
            step += 1
            batch = pack([everything[row] for row in groups[index]], pad_token_id=pad, max_groups=engine.model.max_groups)
            scores = engine.forward(batch, Request((Segment(0, batch.first_evaluated[-1]),)))
            loss = -scores.segments[0].log_prob_N.mean()
            if not math.isfinite(float(loss.detach())):
                raise RunError(f"memorising diverged at step {step}: the loss is {float(loss.detach())}", fix="lower target.learning_rate")
            engine.backward(loss, last=True)
            engine.step(learning_rate=_memorize_rate(config.learning_rate, step=step, num_steps=num_steps))
        if epoch % config.check_every_epochs == 0 or epoch == config.num_train_epochs:
            memorised = _measure(engine, rows=rows)
            general = "" if memorised.general_knowledge is None else f", general knowledge {memorised.general_knowledge:.2f}"
            say(
                f"epoch {epoch}: knowledge {memorised.forget_knowledge:.2f}/{memorised.retain_knowledge:.2f}, "
                f"regurgitation {memorised.forget_regurgitation:.2f}/{memorised.retain_regurgitation:.2f} (forget/retain){general}"
            )
            if memorised.reached(config):
                break
    assert memorised is not None, "the last epoch measures"
    return memorised, epoch


def _memorize_rate(peak: float, *, step: int, num_steps: int) -> float:
    warmup = max(1, num_steps // 20)
    if step <= warmup:
        return peak * step / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def _measure(engine: Engine, *, rows: _Rows) -> Memorised:
    from trainers.signals import row_sums

    pad = int(rows.tokenizer.pad_token_id)
    values: dict[str, float] = {}
    for name, encoded in rows.by_set.items():
        sums = row_sums(engine, rows=encoded, pad_token_id=pad)
        questions = [row.num_correct == row.num_tokens for row, kind in zip(sums, rows.kinds[name], strict=True) if kind is Kind.QUESTION]
        completions = [row for row, kind in zip(sums, rows.kinds[name], strict=True) if kind is not Kind.QUESTION]
        values[f"{name}_knowledge"] = sum(questions) / len(questions) if questions else 1.0
        tokens = sum(row.num_tokens for row in completions)
        values[f"{name}_regurgitation"] = sum(row.num_correct for row in completions) / tokens if tokens else 1.0
    general = None
    if rows.general:
        sums = row_sums(engine, rows=rows.packed_questions(per_row=QUESTIONS_PER_ROW, seed=[0, 0]), pad_token_id=pad)
        general = sum(row.num_correct for row in sums) / max(1, sum(row.num_tokens for row in sums))
    return Memorised(**values, general_knowledge=general)
