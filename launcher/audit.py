"""``unlearn audit``: checks what is given, reads the models, writes the verdict with its table and figure."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.errors import InputError
from trainers.files import check_output_file, read_json, sha256_json, strict_json, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from eval.audit.config import AuditConfig
    from eval.audit.runner import Role
    from eval.mmlu import MmluData
    from trainers.data.types import AttackDocuments, ForgetRetain

SCHEMA_VERSION = 1
Say = Callable[[str], None]
_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""What two models of one target have in common."""


@dataclass(frozen=True)
class AuditedModel:
    """A model that was named on the command line or in an experiment, checked."""

    option: str
    path: Path
    base: Path
    checkpoint: Path

    def identity(self) -> dict[str, Any]:
        """Where it lies and which weights it has."""
        from trainers.files import weights_hash

        found = {"path": str(self.path), "checkpoint": str(self.checkpoint), "weights_hash": weights_hash(self.checkpoint)}
        return found if self.base == self.checkpoint else found | {"base": str(self.base), "base_weights_hash": weights_hash(self.base)}


def run_audit(
    *,
    model: Path,
    base: Path,
    data: Path,
    out: Path,
    mia: Path | None = None,
    mmlu: Path | None = None,
    never_seen: Path | None = None,
    attacks: str | None = None,
    documents: int | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    config: AuditConfig | None = None,
    progress: Say | None = None,
) -> dict[str, Any]:
    """Attack a model, compare with the untouched target and with a never-seen one, and write what was found.

    Beside ``out`` lie its rows (``-rows.jsonl``), a table (``.md``) and a figure (``.png``). Finished readings are kept in a folder
    beside it until then, so that the same call goes on where it was stopped.

    Args:
        model: the audited model: a model folder, a trial or one of its checkpoints.
        base: the untouched target.
        data: folder with the forget and the retain set.
        out: JSON file to write.
        mia: folder with members and non-members.
        mmlu: folder with MMLU.
        never_seen: a model that never saw the forget set.
        attacks: names with commas between; default: all.
        documents: documents per task and set.
        seed: of the sample, of examples, fine-tuning and sampling.
        max_new_tokens: tokens generated per row at most.
        config: every other setting; for callers in Python.
        progress: told about each reading in a line.

    Raises:
        InputError: before anything is computed, if something given is unusable.
    """
    from eval.audit.config import read_attacks
    from eval.audit.runner import Role
    from launcher.audit_table import console_lines
    from launcher.logs import quiet_libraries

    say = progress or print
    quiet_libraries()
    out = Path(out)
    check_output_file(out)
    settings = _settings(config, attacks=read_attacks(attacks), documents=documents, seed=seed, max_new_tokens=max_new_tokens)
    models = {Role.UNLEARNED: locate("--model", model), Role.BEFORE: locate("--base", base)}
    if never_seen is not None:
        models[Role.NEVER_SEEN] = locate("--never-seen", never_seen)
    tokenizer = check_alike(models)
    inputs = AuditInputs.read(data, mia=mia, mmlu=mmlu, config=settings)
    result = audit_models(models, tokenizer=tokenizer, inputs=inputs, config=settings, out=out, say=say)
    _print(console_lines(result), say)
    return result


def audit_models(
    models: Mapping[Role, AuditedModel], *, tokenizer: Any, inputs: AuditInputs, config: AuditConfig, out: Path, say: Say
) -> dict[str, Any]:
    """Attack models that were checked to be alike, and write what was found.

    The same weights, rows and settings are the same audit wherever they lie: it is not made twice.

    Args:
        models: by what they are in the audit.
        tokenizer: of all of them.
        inputs: the rows.
        config: settings.
        out: JSON file to write.
        say: told about each reading in a line.

    Returns:
        The content of ``out``.

    Raises:
        InputError: if a text does not fit the models' context.
    """
    from eval.audit.runner import Role, Store, assemble, read_model
    from eval.audit.verdict import AuditThresholds
    from launcher.audit_table import markdown
    from trainers.distributed import Rank

    started = time.perf_counter()
    inputs.check(models[Role.BEFORE].base, tokenizer=tokenizer, config=config)
    identities = {role.value: one.identity() for role, one in models.items()}
    arguments = {"settings": config.model_dump(mode="json"), "models": identities, "data": inputs.identity()}
    key = sha256_json(_without_places(arguments))
    known = _known(out)
    if known is not None and known.get("key") == key:
        say(f"{out} already holds this audit")
        return known
    store = Store(out.with_name(f".{out.stem}-parts"))
    _claim(store.folder, arguments=arguments, key=key, say=say)
    for number, (role, one) in enumerate(models.items(), start=1):
        say(f"model {number} of {len(models)}: {role.value}, {one.path}")
        read_model(
            _candidate(role, one, config=config, device=Rank().device),
            tokenizer=tokenizer,
            given=inputs.given,
            attack=inputs.attack,
            mmlu=inputs.questions,
            config=config,
            device=Rank().device,
            store=store,
            say=lambda text: say(f"  {text}"),
        )
    thresholds = AuditThresholds()
    assembled = assemble(roles=list(models), config=config, thresholds=thresholds, store=store)
    summary = assembled.summary
    result = {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        **summary,
        "models": {role: identities[role] | found for role, found in summary["models"].items()},
        "data": inputs.identity(),
        "settings": arguments["settings"],
        "thresholds": thresholds.model_dump(mode="json"),
        "unrelated_text": inputs.given.unrelated_source,
        "seconds": round(time.perf_counter() - started, 2),
    }
    result = strict_json(result)
    _write(out, result=result, rows=assembled.rows, table=markdown(result))
    shutil.rmtree(store.folder, ignore_errors=True)
    say(f"wrote {out}, {out.with_suffix('.md').name}, {out.with_suffix('.png').name}, {_rows_file(out).name}")
    return result


def _without_places(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without the paths of models and data, whose contents are hashed."""
    models = {
        role: {key: value for key, value in facts.items() if key not in ("path", "checkpoint", "base")}
        for role, facts in arguments["models"].items()
    }
    data = {key: value for key, value in arguments["data"].items() if key != "path"}
    return {**arguments, "models": models, "data": data}


def _settings(
    config: AuditConfig | None, *, attacks: Sequence[Any], documents: int | None, seed: int, max_new_tokens: int | None
) -> AuditConfig:
    from eval.audit.config import AuditConfig

    base = config or AuditConfig()
    changes: dict[str, Any] = {"attacks": tuple(attacks), "seed": seed}
    if documents is not None:
        changes["documents"] = documents
    if max_new_tokens is not None:
        changes["eval"] = base.eval.model_copy(update={"max_new_tokens": max_new_tokens})
    return base.model_copy(update=changes)


# ---- what is given


def locate(option: str, path: Path) -> AuditedModel:
    """A model by its path.

    Args:
        option: what named it, for messages.
        path: a model folder, a trial or one of its checkpoints.

    Raises:
        InputError: if it is none of these.
    """
    from launcher.stages import locate_model

    try:
        base, checkpoint = locate_model(path)
    except InputError as error:
        raise InputError(error.what, where=f"{option}: {error.where or path}", why=error.why, fix=error.fix) from None
    return AuditedModel(option, Path(path), Path(base), Path(checkpoint))


def check_alike(models: Mapping[Role, AuditedModel]) -> Any:
    """The tokenizer of all models.

    Raises:
        InputError: if a model differs from the target in vocabulary or architecture, or is the adapter of another target.
    """
    from eval.audit.runner import Role
    from trainers.files import weights_hash
    from trainers.modeling import load_model_config, load_tokenizer

    target = models[Role.BEFORE]
    tokenizer, shape = load_tokenizer(target.base), load_model_config(target.base)
    for role, one in models.items():
        if role is Role.BEFORE:
            continue
        where = f"{one.option} {one.path} and --base {target.path}"
        other = load_model_config(one.base)
        differing = [
            f"{name} {getattr(other, name, None)} and {getattr(shape, name, None)}"
            for name in _SHAPE
            if getattr(other, name, None) != getattr(shape, name, None)
        ]
        if differing:
            raise InputError(
                f"the two models are not of one architecture: {'; '.join(differing)}",
                where=where,
                fix="give the model that the other was made from, or was trained beside",
            )
        if load_tokenizer(one.base).get_vocab() != tokenizer.get_vocab():
            raise InputError(
                "the two models have different vocabularies",
                where=where,
                why="their scores would be of different tokens",
                fix="give models that share a tokenizer; a never-seen twin is built with target.sets=[retain] in the target's own "
                "configuration"
                if role is Role.NEVER_SEEN
                else "give the target that the model was unlearned from",
            )
        if role is Role.UNLEARNED and one.base != one.checkpoint and weights_hash(one.base) != weights_hash(target.base):
            raise InputError(
                f"the adapter belongs to another base: {one.base}",
                where=where,
                why="the recovered share is measured against the model before unlearning",
                fix=f"use --base {one.base}",
            )
    return tokenizer


@dataclass(frozen=True)
class AuditInputs:
    """The data of an audit, checked and sampled."""

    source: Path
    given: Any
    attack: Any
    questions: Any
    sampled: ForgetRetain
    hashes: Mapping[str, str | None]

    @classmethod
    def read(cls, data: Path, *, mia: Path | None, mmlu: Path | None, config: AuditConfig) -> AuditInputs:
        """Read and sample.

        Raises:
            InputError: naming file, row and field of what is wrong.
        """
        from eval.mmlu import load_mmlu
        from trainers.data.records import load_attack_documents, load_forget_retain

        return cls.of(
            load_forget_retain(data),
            source=data,
            attack=load_attack_documents(mia.expanduser()) if mia else None,
            questions=load_mmlu(mmlu.expanduser()) if mmlu else None,
            config=config,
        )

    @classmethod
    def of(
        cls, rows: ForgetRetain, *, source: Path, attack: AttackDocuments | None, questions: MmluData | None, config: AuditConfig
    ) -> AuditInputs:
        """Sample from rows that were read already.

        Args:
            rows: both sets.
            source: the folder that they came from, which may hold other wordings of its questions.
            attack: members and non-members, or None.
            questions: general knowledge, or None.
            config: settings.

        Raises:
            InputError: if no row of a set can be scored.
        """
        from eval.audit.attacks import material
        from launcher.data import check_kinds
        from trainers.data.subset import subset_documents

        for name, records in (("forget", rows.forget), ("retain", rows.retain)):
            check_kinds(records, where=f"{source}, the {name} set")
        sampled = subset_documents(rows, documents_per_task=config.documents, seed=config.seed)
        rewordings = _rewordings(source, rows=sampled.forget)
        given = material(sampled, attack=attack, rewordings=rewordings, config=config)
        hashes = {
            "rows": sha256_json([[asdict(record) for record in side] for side in (sampled.forget, sampled.retain)]),
            "rewordings": sha256_json(rewordings),
            "attack": sha256_json(asdict(attack)) if attack else None,
            "mmlu": sha256_json([asdict(question) for question in questions.questions]) if questions else None,
        }
        return cls(source=source, given=given, attack=attack, questions=questions, sampled=sampled, hashes=hashes)

    def check(self, base: Path, *, tokenizer: Any, config: AuditConfig) -> None:
        """Refuse texts that the models cannot take in.

        Raises:
            InputError: naming row, document or question.
        """
        from launcher.preflight import check_fit
        from trainers.modeling import context_length, load_model_config

        check_fit(
            tokenizer=tokenizer,
            context=context_length(load_model_config(base)),
            rows=(*self.sampled.forget, *self.sampled.retain),
            attack=(self.attack,) if self.attack else (),
            mmlu=(self.questions,) if self.questions else (),
            max_prompt_tokens=config.eval.mmlu_max_prompt_tokens,
        )

    def identity(self) -> dict[str, Any]:
        """Which rows were read: their documents by set, and hashes of everything."""
        documents = {
            name: sorted({record.document for record in records})
            for name, records in (("forget", self.sampled.forget), ("retain", self.sampled.retain))
        }
        return {
            "path": str(self.source),
            "documents": documents,
            "forget_rows": len(self.given.data.forget),
            "retain_rows": len(self.given.data.retain),
            "nonmembers": len(self.given.nonmembers),
            "unseen_completions": len(self.given.unseen),
            "hashes": dict(self.hashes),
        }


def _rewordings(data: Path, *, rows: Sequence[Any]) -> dict[str, str]:
    """The data's own paraphrases of its questions (column ``paraphrased_question``), by row id; most data has none."""
    from trainers.data.tables import find_table, read_table

    folder = Path(data).expanduser()
    if not folder.is_dir():
        return {}
    table = read_table(find_table(folder, name="forget"), wanted=("id", "paraphrased_question"))
    wanted = {record.id for record in rows}
    found = {str(row.values.get("id")): row.values.get("paraphrased_question") for row in table.rows}
    return {row_id: text for row_id, text in found.items() if row_id in wanted and isinstance(text, str) and text.strip()}


def _candidate(role: Role, one: AuditedModel, *, config: AuditConfig, device: str) -> Any:
    from eval.audit.runner import Candidate
    from trainers.modeling import load_adapted_model

    def load() -> Any:
        return load_adapted_model(one.base, one.checkpoint, dtype=config.eval.dtype, device=device)

    return Candidate(role, str(one.path), load)


# ---- files


def _known(out: Path) -> dict[str, Any] | None:
    """An audit that the file already holds; None if it holds none, or something else."""
    if not out.exists():
        return None
    try:
        value = read_json(out)
    except InputError:
        return None
    return value if isinstance(value, dict) and "verdict" in value and out.with_suffix(".png").exists() else None


def _claim(folder: Path, *, arguments: Mapping[str, Any], key: str, say: Say) -> None:
    """Take over the readings of an earlier start with the same arguments; others are dropped, naming what changed."""
    from trainers.checkpoint import changed_keys

    path = folder / "arguments.json"
    if path.exists():
        known = read_json(path)
        if known["key"] == key:
            say("going on with the readings of an earlier start")
            return
        changed = changed_keys(known["arguments"], strict_json(dict(arguments)))
        say(f"an earlier start had other arguments ({', '.join(changed[:4])}): beginning anew")
    shutil.rmtree(folder, ignore_errors=True)
    write_json(path, {"key": key, "arguments": arguments})


def _rows_file(out: Path) -> Path:
    from eval.report import rows_path

    return rows_path(out)


def _write(out: Path, *, result: dict[str, Any], rows: Sequence[Mapping[str, Any]], table: str) -> None:
    """Rows, table and figure, then the summary, which is the sign that all are complete."""
    from launcher.audit_plot import audit_plot

    out.unlink(missing_ok=True)
    lines = [json.dumps(strict_json(dict(row)), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_text(_rows_file(out), "".join(lines))
    write_text(out.with_suffix(".md"), table)
    write_bytes(out.with_suffix(".png"), audit_plot(result).png)
    write_json(out, result)


def _print(lines: Sequence[str], say: Say) -> None:
    for line in lines:
        say(line)
