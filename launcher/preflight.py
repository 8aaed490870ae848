"""What can be known before anything is computed: that every text and every trial fits the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import ExperimentConfig
from launcher.data import PreparedData, question_groups, unseen_texts
from trainers.config import TrainConfig
from trainers.data.types import AttackDocuments
from trainers.errors import InputError

if TYPE_CHECKING:
    from eval.mmlu import MmluData


def check_texts(config: ExperimentConfig, *, data: PreparedData, trains: Sequence[TrainConfig]) -> None:
    """Refuse rows, documents and questions that the target cannot take in.

    Args:
        config: names the target, or says how it is built.
        data: everything that will be read.
        trains: the trials; the shortest ``max_length`` of them counts.

    Raises:
        InputError: naming row, document or question.
    """
    from trainers.data.encode import encode_records
    from trainers.loop import uses_retain
    from trainers.memorize import check_questions

    if not data.training.retain and any(uses_retain(train) for train in trains):
        raise InputError(
            "no retain row is left to train on",
            where=f"data.rehearse = {list(config.data.rehearse)}",
            why="the folds named there are empty, but the objective has retain terms",
            fix="name another fold, or give those folds documents",
        )
    tokenizer, context = _target_tokenizer(config, data=data)
    check_fit(
        tokenizer=tokenizer,
        context=context,
        rows=(*data.everything.forget, *data.everything.retain),
        attack=tuple((data.attack or {}).values()),
        mmlu=tuple((data.mmlu or {}).values()),
        max_prompt_tokens=config.eval.mmlu_max_prompt_tokens,
    )
    if config.model.model_name_or_path is None:
        check_questions(question_groups(data.mmlu), tokenizer=tokenizer, context=context)
    length = min([context, *(train.max_length for train in trains if train.max_length is not None)])
    if length < context:
        validation = data.folds["validation"]
        rows = (*data.training.forget, *data.training.retain, *validation.forget, *validation.retain)
        encode_records(rows, tokenizer=tokenizer, max_length=length)
    check_trials(config, data=data, trains=trains, tokenizer=tokenizer)


def check_trials(config: ExperimentConfig, *, data: PreparedData, trains: Sequence[TrainConfig], tokenizer: Any) -> None:
    """Refuse trials that name modules or layers which the target has not, or that lack answers to prefer.

    Raises:
        InputError: naming the setting.
    """
    from trainers.loop import check_trial
    from trainers.trial_rows import check_alternatives

    seen = set()
    for train in trains:
        check_alternatives(data.training.forget, train=train)
        settings = str((train.lora, train.trainable, train.objective.name, train.objective.layer))
        if settings not in seen:
            seen.add(settings)
            check_trial(_target_skeleton(config, tokenizer=tokenizer), train=train)


def _target_skeleton(config: ExperimentConfig, *, tokenizer: Any) -> Any:
    """The target without weights, also of a target that is still to be built."""
    import torch

    from trainers.modeling import model_skeleton
    from trainers.tiny import build_tiny_olmo

    path = config.model.model_name_or_path or (config.target.base if config.target else None)
    if path is not None:
        return model_skeleton(path)
    assert config.target is not None, "checked by the configuration"
    with torch.device("meta"):
        return build_tiny_olmo(config.target.tiny, tokenizer=tokenizer, seed=config.target.seed)


def _target_tokenizer(config: ExperimentConfig, *, data: PreparedData) -> tuple[Any, int]:
    """The target's tokenizer and context, also of a target that is still to be built."""
    from trainers.memorize import target_tokenizer
    from trainers.modeling import check_model_folder, context_length, load_model_config, load_tokenizer

    key, path = "model.model_name_or_path", config.model.model_name_or_path
    if path is None:
        assert config.target is not None, "checked by the configuration"
        key, path = "target.base", config.target.base
        if path is None:
            tokenizer = target_tokenizer(
                config.target, data=data.everything, general=question_groups(data.mmlu), tokenizer_texts=unseen_texts(data)
            )
            return tokenizer, config.target.tiny.max_position_embeddings
    try:
        folder = check_model_folder(path)
    except InputError as error:
        raise InputError(error.what, where=f"{error.where} ({key})", why=error.why, fix=error.fix) from None
    model_config, tokenizer = load_model_config(folder), load_tokenizer(folder)
    check_vocabulary(tokenizer, model_config=model_config, where=folder)
    return tokenizer, context_length(model_config)


def check_vocabulary(tokenizer: Any, *, model_config: Any, where: Path) -> None:
    """Refuse a tokenizer that can give ids without an embedding.

    Raises:
        InputError: if it is larger than the model's vocabulary.
    """
    rows, highest = getattr(model_config, "vocab_size", None), max(tokenizer.get_vocab().values(), default=-1)
    if rows is not None and highest >= rows:
        raise InputError(
            f"the tokenizer has ids up to {highest}, but the model has {rows} embeddings",
            where=str(where),
            why="a text with a token beyond them cannot be read",
            fix="put the tokenizer that the model was trained with into the folder, or resize the model's embeddings",
        )


def check_weights_finite(model: Any, *, where: Path) -> None:
    """Refuse a model with a weight that is no number.

    Raises:
        InputError: naming the first such tensor.
    """
    broken = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if broken:
        raise InputError(
            f"{len(broken)} of the model's tensors are not finite, the first is {broken[0]}",
            where=str(where),
            why="every loss computed with it would be nan, and no generation would mean anything",
            fix="copy the checkpoint again; where training made it so, train with a lower learning rate",
        )


def check_fit(
    *,
    tokenizer: Any,
    context: int,
    rows: Sequence[Any],
    attack: Sequence[AttackDocuments],
    mmlu: Sequence[MmluData],
    max_prompt_tokens: int,
) -> None:
    """Refuse what an evaluation cannot score with this tokenizer and context.

    Raises:
        InputError: naming row, document or question.
    """
    from eval.mmlu_accuracy import check_prompts
    from eval.teacher_forced import encode_documents
    from trainers.data.encode import encode_records

    encode_records(rows, tokenizer=tokenizer, max_length=context)
    for fold in attack:
        documents = (*fold.members, *fold.nonmembers)
        for document, row in zip(documents, encode_documents(documents, tokenizer=tokenizer, context=context), strict=True):
            if row.num_scored < 1:
                raise InputError(
                    f"the document {document.text!r} is a single token",
                    where=f"membership document {document.id!r}",
                    why="the attack reads the loss of every token but the first",
                    fix="give the whole document, or drop it",
                )
    for questions in mmlu:
        check_prompts(questions, tokenizer=tokenizer, limit=min(max_prompt_tokens, context))
