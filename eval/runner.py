"""One evaluation: every score of a model on one fold, in one report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.config import EvalConfig
from eval.deviations import list_deviations
from eval.generate import altered_generation
from eval.measure import encode_data
from eval.metrics import add_values, metric_settings
from eval.mmlu import MmluData
from eval.parts import Helpers, Shard, UnitStore
from eval.progress import Meter
from eval.report import EvalReport
from eval.rows import attack_rows, mmlu_rows, task_rows
from eval.summary import build_report
from eval.teacher_forced import RowScore, score_rows
from eval.work import Work
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
    encoded = encode_data(data, attack=attack, model=model, tokenizer=tokenizer)
    budget = 1 if config.official else config.batch_tokens
    scores = score_rows(model=model, tokenizer=tokenizer, rows=encoded.everything, batch_tokens=budget, device=device)
    sets, attacked = encoded.sets(scores), encoded.losses(scores)
    losses = [score.answer_log_prob for task_set in sets.values() for score in task_set.scores]
    losses += [*attacked.members, *attacked.nonmembers] if attacked else []
    (forget_log_prob, forget_accuracy), (retain_log_prob, retain_accuracy) = (_per_token(task_set.scores) for task_set in sets.values())
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
    store: UnitStore | None = None,
    meter: Meter | None = None,
    helpers: Helpers | None = None,
) -> EvalReport:
    """Score a model as the benchmark does, with intervals, notes and a list of everything done differently.

    With a store, what an earlier process finished of the same evaluation is not computed again, and the report is the same to the
    digit (but for its seconds). The caller removes the store once the report is written.

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
        store: results of finished units; default: in memory.
        meter: shows rows done and the time left.
        helpers: other processes that share the work through the store, which then needs a folder. What they leave undone is done here.

    Raises:
        InputError: if a row, a document or a question does not fit the model's context.
    """
    start = time.perf_counter()
    say = progress or (lambda text: None)
    config = metric_settings(config)
    work = Work(
        model=model, tokenizer=tokenizer, data=data, attack=attack, mmlu=mmlu, config=config, device=device, store=store or UnitStore()
    )
    if work.open():
        say("unfinished results of another model, other data or other settings were discarded")
    if work.num_found:
        say(f"going on: {work.num_found} of {work.num_rows} rows were finished before")
    work.start_meter(meter)
    if helpers and work.num_found < work.num_rows:
        helpers.start()
        try:
            work.compute(shard=Shard(0, helpers.count), meter=meter)
            helpers.wait(lambda: work.show(meter))
        finally:
            helpers.stop()
        work.refresh()
    work.compute(meter=meter)
    if meter:
        meter.finish()
    scores, answers, questions = work.scores(), work.answers(), work.questions()
    sets, attacked = work.encoded.sets(scores), work.encoded.losses(scores)
    both = [(name, index) for name, task_set in sets.items() for index in range(len(task_set.rows))]
    for name, task_set in sets.items():
        say(f"{name}: {len(task_set.rows)} answers scored under teacher forcing")
    say(f"{answers.num_decoded} of {len(both)} answers decoded")
    rows = task_rows(sets=sets, places=both, answers=answers, official=config.official)
    add_values(rows)
    if attacked and attack:
        rows += attack_rows(attack=attack, attacked=attacked)
        say(f"membership attack: AUC {attacked.auc:.3f}")
    if questions is not None:
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
        ),
        altered=altered_generation(model),
        start=start,
    )


def evaluate_shard(
    *,
    model: Any,
    tokenizer: Any,
    data: ForgetRetain,
    attack: AttackDocuments | None,
    mmlu: MmluData | None,
    config: EvalConfig,
    store: UnitStore,
    shard: Shard,
    device: str = "cpu",
    keep_going: Callable[[], bool] = lambda: True,
) -> None:
    """Compute every ``count``-th unit of an evaluation into a store; ``evaluate`` with the same store merges what all shards found.

    No row is computed twice, and the units, with them the batches, are the same for any number of shards.

    Args:
        model, tokenizer, data, attack, mmlu, config, device: see ``evaluate``; the same in all shards.
        store: with a folder that all shards share.
        shard: which units.
        keep_going: asked before each unit.
    """
    config = metric_settings(config)
    work = Work(model=model, tokenizer=tokenizer, data=data, attack=attack, mmlu=mmlu, config=config, device=device, store=store)
    work.open(shard=shard)
    work.compute(shard=shard, keep_going=keep_going)
