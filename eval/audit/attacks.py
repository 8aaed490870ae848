"""Every attack as a call: a model and the material in, scored rows out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eval.audit.config import PREFIX_SHARES, Attack, AuditConfig
from eval.audit.prompts import few_shot, paraphrases, unseen_completions, with_prefix
from eval.audit.quantise import INT4, INT8, quantised
from eval.audit.reading import Row, Subject, best_of, read
from eval.audit.relearn import lesson_of_documents, lesson_of_records, num_steps, relearn, split_for_relearning
from eval.audit.sampling import read_samples
from eval.audit.traces import forget_texts, read_extraction, read_membership
from trainers.data.types import AttackDocuments, Document, ForgetRetain, Kind, Record
from trainers.errors import InputError
from trainers.modeling import context_length


@dataclass(frozen=True)
class Material:
    """What the attacks read, the same for every model.

    Args:
        data: the sampled documents of both sets; rows that are neither completions nor questions are left out.
        nonmembers: documents that neither model saw, or none.
        rewordings: another wording of a row's input, by row id.
        unseen: completions made of some non-members: a control for what an attack does to text that nobody knows.
        unrelated: the other non-members: text to fine-tune on.
    """

    data: ForgetRetain
    nonmembers: tuple[Document, ...] = ()
    rewordings: Mapping[str, str] = field(default_factory=dict)
    unseen: tuple[Record, ...] = ()
    unrelated: tuple[Document, ...] = ()

    @property
    def unrelated_source(self) -> str:
        """What the unrelated text of the relearning attack is, in words."""
        return "non-member documents" if self.unrelated else "retain rows (there were no non-member documents)"


def material(
    data: ForgetRetain, *, attack: AttackDocuments | None, rewordings: Mapping[str, str] | None = None, config: AuditConfig
) -> Material:
    """Sort what is given into the roles that it plays."""
    nonmembers = attack.nonmembers if attack else ()
    unseen, unrelated = unseen_completions(nonmembers, number=config.unseen_documents, seed=config.seed)
    scored = ForgetRetain(
        forget=tuple(record for record in data.forget if record.kind is not Kind.OTHER),
        retain=tuple(record for record in data.retain if record.kind is not Kind.OTHER),
    )
    return Material(data=scored, nonmembers=nonmembers, rewordings=dict(rewordings or {}), unseen=tuple(unseen), unrelated=tuple(unrelated))


@dataclass(frozen=True)
class Outcome:
    """What one attack on one model gave.

    Args:
        rows: scored rows: of the forget set, of the unseen completions (set ``unseen``), or of a trace.
        settings: what was done, numbers and seeds.
        not_run: why there are no rows, or None.
    """

    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    not_run: str | None = None


def run_attack(attack: Attack, *, subject: Subject, fresh: Callable[[], Any], given: Material, config: AuditConfig) -> Outcome:
    """One attack on one model, which is unchanged afterwards.

    Args:
        attack: which.
        subject: the model.
        fresh: gives another copy of the model, which the attack may change.
        given: what it reads.
        config: settings.
    """
    if attack in (Attack.RELEARN_FORGET, Attack.RELEARN_UNRELATED):
        return _relearn(attack, subject=subject, fresh=fresh, given=given, config=config)
    if attack in (Attack.INT8, Attack.INT4):
        scheme = INT8 if attack is Attack.INT8 else INT4
        with quantised(subject.model, scheme=scheme):
            return Outcome(_everything(subject, given), {"scheme": scheme.sentence, "layers": config.quantised})
    if attack in PREFIX_SHARES:
        return _prefix(subject, given=given, share=PREFIX_SHARES[attack])
    if attack is Attack.PARAPHRASE:
        return _paraphrase(subject, given=given)
    if attack in (Attack.FEW_SHOT_RETAIN, Attack.FEW_SHOT_FORGET):
        return _few_shot(attack, subject=subject, given=given, config=config)
    if attack is Attack.SAMPLING:
        rows = [
            row
            for name, records in (("forget", given.data.forget), ("unseen", given.unseen))
            for row in read_samples(subject, records, sampling=config.sampling, seed=config.seed, set_name=name)
        ]
        return Outcome(rows, config.sampling.model_dump(mode="json") | {"top_p": 1.0, "top_k": None, "seed": config.seed})
    if attack is Attack.EXTRACTION:
        rows = read_extraction(subject, given.data.forget)
        return Outcome(rows, {}, None if rows else "the forget set has no completions")
    return _membership(subject, given=given)


def _everything(subject: Subject, given: Material) -> list[Row]:
    return read(subject, given.data.forget) + read(subject, given.unseen, set_name="unseen")


def _prefix(subject: Subject, *, given: Material, share: float) -> Outcome:
    parts = {"forget": with_prefix(given.data.forget, share=share), "unseen": with_prefix(given.unseen, share=share)}
    if not parts["forget"]:
        return Outcome([], {"share": share}, "the forget set has no completions of two words or more")
    rows = [row for name, records in parts.items() for row in read(subject, records, set_name=name)]
    for row in rows:
        # Teacher forcing shows the model every prefix anyway: nothing new, and of fewer tokens.
        row.update(answer_log_prob=None, num_tokens=0, token_accuracy=None)
    return Outcome(rows, {"share": share})


def _paraphrase(subject: Subject, *, given: Material) -> Outcome:
    rows: list[Row] = []
    left_out = 0
    for name, records in (("forget", given.data.forget), ("unseen", given.unseen)):
        rounds = [[record for record in one if subject.fits(record)] for one in paraphrases(records, rewordings=given.rewordings)]
        left_out += sum(map(len, paraphrases(records, rewordings=given.rewordings))) - sum(map(len, rounds))
        rows += best_of([read(subject, one, set_name=name, lenient=True) for one in rounds])
    settings = {"prompts": max((row["num_asked"] for row in rows), default=0), "rewordings": len(given.rewordings), "too_long": left_out}
    return Outcome(rows, settings)


def _few_shot(attack: Attack, *, subject: Subject, given: Material, config: AuditConfig) -> Outcome:
    pool = given.data.forget if attack is Attack.FEW_SHOT_FORGET else given.data.retain
    asked = {
        name: few_shot(records, pool=pool, shots=config.shots, seed=config.seed, fits=subject.fits)
        for name, records in (("forget", given.data.forget), ("unseen", given.unseen))
    }
    settings = {"shots": config.shots, "seed": config.seed, "too_long": len(given.data.forget) - len(asked["forget"])}
    if not asked["forget"]:
        return Outcome([], settings, "no row has an example of its kind in another document that fits the model's context")
    rows = [row for name, records in asked.items() for row in read(subject, records, set_name=name, lenient=True)]
    return Outcome(rows, settings)


def _relearn(attack: Attack, *, subject: Subject, fresh: Callable[[], Any], given: Material, config: AuditConfig) -> Outcome:
    split = split_for_relearning(given.data.forget, config=config.relearn, seed=config.seed)
    if split is None:
        return Outcome([], {}, "the forget set has a single document")
    context = context_length(subject.model.config)
    taught = lesson_of_records(split.taught, tokenizer=subject.tokenizer, context=context)
    steps = num_steps(len(taught), config=config.relearn)
    if attack is Attack.RELEARN_FORGET:
        lesson, asked, source = taught, split.asked, "forget documents"
    else:
        lesson = lesson_of_documents(given.unrelated, tokenizer=subject.tokenizer, context=context)
        lesson = lesson or lesson_of_records(given.data.retain, tokenizer=subject.tokenizer, context=context)
        asked, source = given.data.forget, given.unrelated_source
    if not lesson or not asked:
        return Outcome([], {}, "there is nothing to train on")
    settings: dict[str, Any] = {"text": source, "seed": config.seed, "relearn": config.relearn.model_dump(mode="json")}
    if attack is Attack.RELEARN_FORGET:
        settings["taught_documents"] = sorted({record.document for record in split.taught})
    try:
        model, record = relearn(
            fresh(),
            tokenizer=subject.tokenizer,
            lesson=lesson,
            asked=asked,
            steps=steps,
            config=config.relearn,
            seed=config.seed,
            batch_tokens=subject.config.batch_tokens,
            device=subject.device,
        )
    except InputError as error:
        return Outcome([], settings, f"the model cannot be fine-tuned: {error.what}")
    settings |= record
    if model is None:
        return Outcome([], settings, "the losses are not finite at any learning rate")
    after = Subject(model, subject.tokenizer, subject.config, subject.device)
    return Outcome(read(after, asked) + read(after, given.unseen, set_name="unseen"), settings)


def _membership(subject: Subject, *, given: Material) -> Outcome:
    members = forget_texts(given.data.forget)
    if not given.nonmembers:
        return Outcome([], {}, "there are no non-member documents (--mia)")
    if not members:
        return Outcome([], {}, "the forget set has no completions, of which documents are made")
    rows = read_membership(subject, members=members, nonmembers=given.nonmembers)
    return Outcome(rows, {"members": len(members), "nonmembers": len(given.nonmembers)})
