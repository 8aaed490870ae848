"""One evaluation: every score of a model on one fold, in one report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.answers import answer_rows
from eval.config import EvalConfig
from eval.deviations import list_deviations
from eval.generate import altered_generation
from eval.measure import TaskSet, run_attack, score_set
from eval.mmlu import MmluData
from eval.mmlu_accuracy import mmlu_accuracy
from eval.report import EvalReport
from eval.rows import attack_rows, mmlu_rows, task_rows
from eval.summary import build_report
from eval.teacher_forced import RowScore
from trainers.data.types import AttackDocuments, ForgetRetain

Progress = Callable[[str], None]


@dataclass(frozen=True)
class QuickSignals:
    """What can be known without generating anything.

    Args:
        forget_answer_log_prob: mean log-probability per answer token, nats, <= 0; NaN without rows.
        retain_answer_log_prob: the same on the retain set.
        forget_token_accuracy: share of answer tokens that are the argmax; NaN without rows.
        retain_token_accuracy: the same on the retain set.
        mia_auc: AUC of the membership attack; None without documents.
        finite: whether every loss was a finite number.
    """

    forget_answer_log_prob: float
    retain_answer_log_prob: float
    forget_token_accuracy: float
    retain_token_accuracy: float
    mia_auc: float | None
    finite: bool


def loss_only(
    *, model: Any, tokenizer: Any, data: ForgetRetain, attack: AttackDocuments | None, config: EvalConfig, device: str = "cpu"
) -> QuickSignals:
    """The cheap measurement: one teacher-forced pass over both sets and the attack's documents, no generation.

    Raises:
        InputError: if a row or a document is longer than the model's context.
    """
    budget = 1 if config.official else config.batch_tokens
    sets = [
        score_set(model=model, tokenizer=tokenizer, records=records, batch_tokens=budget, device=device)
        for records in (data.forget, data.retain)
    ]
    attacked = run_attack(model=model, tokenizer=tokenizer, attack=attack, batch_tokens=budget, device=device)
    losses = [score.answer_log_prob for task_set in sets for score in task_set.scores]
    losses += [*attacked.members, *attacked.nonmembers] if attacked else []
    (forget_log_prob, forget_accuracy), (retain_log_prob, retain_accuracy) = (_per_token(task_set.scores) for task_set in sets)
    return QuickSignals(
        forget_answer_log_prob=forget_log_prob,
        retain_answer_log_prob=retain_log_prob,
        forget_token_accuracy=forget_accuracy,
        retain_token_accuracy=retain_accuracy,
        mia_auc=attacked.auc if attacked else None,
        finite=all(map(math.isfinite, losses)),
    )


def _per_token(scores: Sequence[RowScore]) -> tuple[float, float]:
    tokens = sum(score.num_tokens for score in scores)
    if not tokens:
        return math.nan, math.nan
    log_prob = sum(score.answer_log_prob for score in scores) / tokens
    return log_prob, sum(score.token_accuracy * score.num_tokens for score in scores if score.num_tokens) / tokens


def evaluate(
    *,
    model: Any,
    tokenizer: Any,
    data: ForgetRetain,
    attack: AttackDocuments | None,
    mmlu: MmluData | None,
    config: EvalConfig,
    fold: str,
    model_name: str,
    device: str = "cpu",
    progress: Progress | None = None,
) -> EvalReport:
    """Score a model as the benchmark does, with intervals, notes and a list of everything done differently.

    Args:
        model: a causal language model (or a peft model around one), already in ``config.dtype`` and on the device.
        tokenizer: its tokenizer.
        data: the rows of one fold; rows that are neither completions nor questions are counted and left out.
        attack: documents of the membership attack, or None.
        mmlu: questions, or None.
        config: limits and mode.
        fold: name of the fold, for the report.
        model_name: name of the model, for the report.
        device: where the model is.
        progress: told about each finished part in a sentence.

    Raises:
        InputError: if a row, a document or a question does not fit the model's context.
    """
    start = time.perf_counter()
    say = progress or (lambda text: None)
    budget = 1 if config.official else config.batch_tokens
    sets: dict[str, TaskSet] = {}
    for name, records in (("forget", data.forget), ("retain", data.retain)):
        sets[name] = score_set(model=model, tokenizer=tokenizer, records=records, batch_tokens=budget, device=device)
        say(f"{name}: {len(sets[name].rows)} answers scored under teacher forcing")
    both = [(name, index) for name, task_set in sets.items() for index in range(len(task_set.rows))]
    # Both sets decode together, so that the last rows of one do not run alone.
    answers = answer_rows(
        model=model,
        tokenizer=tokenizer,
        records=[sets[name].records[index] for name, index in both],
        rows=[sets[name].rows[index] for name, index in both],
        scores=[sets[name].scores[index] for name, index in both],
        config=config,
        device=device,
    )
    say(f"{answers.num_decoded} of {len(both)} answers decoded")
    rows = task_rows(sets=sets, places=both, answers=answers, official=config.official)
    attacked = run_attack(model=model, tokenizer=tokenizer, attack=attack, batch_tokens=budget, device=device)
    if attacked and attack:
        rows += attack_rows(attack=attack, attacked=attacked)
        say(f"membership attack: AUC {attacked.auc:.3f}")
    questions = None
    if mmlu is not None and mmlu.questions:
        questions = mmlu_accuracy(
            model=model,
            tokenizer=tokenizer,
            data=mmlu,
            shots=config.mmlu_shots,
            max_prompt_tokens=config.mmlu_max_prompt_tokens,
            batch_tokens=config.batch_tokens,
            device=device,
            official=config.official,
        )
        rows += mmlu_rows(questions)
        say(f"MMLU: {questions.average:.3f} of {len(questions.answers)} questions")
    return build_report(
        rows=rows,
        sets=sets,
        data=data,
        answers=answers,
        attacked=attacked,
        questions=questions,
        config=config,
        fold=fold,
        model_name=model_name,
        deviations=list_deviations(
            model=model,
            tokenizer=tokenizer,
            config=config,
            mmlu=mmlu,
            mmlu_result=questions,
            outputs=[answer.text for answer in answers.answers],
        ),
        altered=altered_generation(model),
        start=start,
    )
