"""One evaluation on TOFU: every score of a model, in one report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.generate import altered_generation
from eval.membership import min_k
from eval.mia import attack_auc
from eval.rouge import rouge_l_recall
from eval.suites.answer_scores import (
    answer_loss,
    exact_memorization,
    extraction_strength,
    normalised_probability,
    probability,
    without_end,
)
from eval.suites.config import PromptStyle, SuiteConfig
from eval.suites.measure import check_vocabulary, generate_answers
from eval.suites.privleak import INDISTINGUISHABLE, privleak
from eval.suites.prompts import encode_answer, question_prompt
from eval.suites.report import SuiteReport
from eval.suites.resample import SetRows, by_set, drawn, limits, once, weighted_auc, weighted_mean
from eval.suites.tofu_data import AUTHOR_ROWS, QaRow, TofuData
from eval.suites.tofu_scores import forget_quality, model_utility
from eval.suites.truth_ratio import forget_truth, retain_truth, truth_ratio, truth_share
from eval.teacher_forced import TokenScores, token_scores
from trainers.data.encode import EncodedRow
from trainers.modeling import context_length

MAX_NEW_TOKENS = 200
"""What the published code generates, at most."""

QA_SETS = ("forget", "retain", "real_authors", "world_facts")
METRICS = (
    "probability",
    "normalised_probability",
    "rouge_l_recall",
    "truth_ratio",
    "truth_share",
    "exact_memorization",
    "extraction_strength",
)
"""Of a row, and of a set as the mean over its rows; ``truth_ratio`` is min(R, 1/R) on the forget set and max(0, 1 - R) elsewhere."""

UTILITY_TERMS = (
    *(f"retain_{metric}" for metric in ("probability", "rouge_l_recall", "truth_ratio")),
    *(
        f"{name}_{metric}"
        for name in ("real_authors", "world_facts")
        for metric in ("normalised_probability", "rouge_l_recall", "truth_ratio")
    ),
)
"""The nine scores whose harmonic mean is model utility."""

SCORE_NAMES = (
    "model_utility",
    "forget_quality",
    "forget_quality_statistic",
    "min_k_auc",
    "privleak",
    *(f"{name}_{metric}" for name in QA_SETS for metric in METRICS),
)
"""Every report has these keys under ``scores``; what was not measured is null."""

_COMPARED = ("forget", "holdout")
"""Sets on which a retained model is measured, too."""

Key = tuple[str, int, str]
"""Set, number of the row in it, and what is scored: ``answer``, ``right`` (a paraphrase), or ``wrong0`` and so on."""


@dataclass(frozen=True)
class TofuRows:
    """The texts that an evaluation scores, encoded."""

    data: TofuData
    encoded: Mapping[Key, EncodedRow]


@dataclass(frozen=True)
class RetainedModel:
    """What is compared with a model that was trained without the forget set.

    Args:
        name: of the model.
        ratios: its truth ratios on the forget set, one per row; empty if there are no wrong answers.
        auc: the min-K attack's AUC on it; None without a holdout set.
    """

    name: str
    ratios: tuple[float, ...]
    auc: float | None


def prepare_tofu(data: TofuData, *, tokenizer: Any, model_config: Any, config: SuiteConfig) -> TofuRows:
    """Encode everything that will be scored; no weights are needed.

    Raises:
        InputError: if a row does not fit the model's context, or the tokenizer is not the model's.
    """
    encoded: dict[Key, EncodedRow] = {}
    for name, rows in data.sets.items():
        for index, row in enumerate(rows):
            prompt = question_prompt(row.question, style=config.prompt, tokenizer=tokenizer)
            for part, text in _texts(row, name=name).items():
                encoded[name, index, part] = encode_answer(
                    row_id=row.id,
                    prompt=prompt,
                    answer=text,
                    style=config.prompt,
                    tokenizer=tokenizer,
                    max_length=context_length(model_config),
                )
    check_vocabulary(list(encoded.values()), model_config=model_config)
    return TofuRows(data=data, encoded=encoded)


def _texts(row: QaRow, *, name: str) -> dict[str, str]:
    """The answers to score, by what they are."""
    texts = {"answer": row.answer}
    if name != "holdout":
        if row.paraphrased is not None:
            texts["right"] = row.paraphrased
        texts |= {f"wrong{number}": text for number, text in enumerate(row.wrong)}
    return texts


def measure_retained(rows: TofuRows, *, model: Any, tokenizer: Any, config: SuiteConfig, name: str, device: str = "cpu") -> RetainedModel:
    """What forget quality and PrivLeak need of a model that was trained without the forget set. Nothing is generated.

    Args:
        rows: encoded with that model's own tokenizer.
        model: a causal language model.
        tokenizer: gives the padding id.
        config: the settings of the evaluation that it is for.
        name: of the model.
        device: where the model is.
    """
    scores = _score(rows, _compared(rows), model=model, tokenizer=tokenizer, config=config, device=device)
    forget = rows.data.sets["forget"]
    ratios = [_ratio(row, name="forget", index=index, scores=scores) for index, row in enumerate(forget)]
    attacked = {
        side: [
            min_k(without_end(scores[side, index, "answer"]), fraction=config.min_k_fraction) for index in range(len(rows.data.sets[side]))
        ]
        for side in ("forget", "holdout")
        if side in rows.data.sets
    }
    auc = attack_auc(member_losses=attacked["forget"], nonmember_losses=attacked["holdout"]) if "holdout" in attacked else None
    return RetainedModel(name=name, ratios=tuple(ratio for ratio in ratios if ratio is not None), auc=auc)


def evaluate_tofu(
    rows: TofuRows,
    *,
    model: Any,
    tokenizer: Any,
    config: SuiteConfig,
    model_name: str,
    retained: RetainedModel | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> SuiteReport:
    """Every score of TOFU.

    Args:
        rows: from ``prepare_tofu``.
        model: a causal language model, or a peft model around one.
        tokenizer: its tokenizer.
        config: limits and settings.
        model_name: name of the model, for the report.
        retained: from ``measure_retained``, with the same rows and settings; None leaves forget quality out.
        device: where the model is.
        progress: told about each finished part in a sentence.
    """
    start = time.perf_counter()
    say = progress or (lambda text: None)
    # What is compared with the retained model runs in the same batches as there: rounding must not tell equal models apart.
    compared = _compared(rows)
    others = [key for key in rows.encoded if key[0] not in _COMPARED]
    scores = {
        key: score
        for keys in (compared, others)
        for key, score in _score(rows, keys, model=model, tokenizer=tokenizer, config=config, device=device).items()
    }
    say(f"{len(scores)} texts scored under teacher forcing")
    asked = [key for key in rows.encoded if key[0] in QA_SETS and key[2] == "answer"]
    texts = generate_answers(
        model=model,
        tokenizer=tokenizer,
        rows=[rows.encoded[key] for key in asked],
        scores=[scores[key] for key in asked],
        max_new_tokens=config.max_new_tokens or MAX_NEW_TOKENS,
        batch_tokens=config.batch_tokens,
        device=device,
    )
    say(f"{len(texts)} answers generated")
    outputs = {(name, index): text for (name, index, _), text in zip(asked, texts, strict=True)}
    found = [
        _report_row(row, name=name, index=index, scores=scores, output=outputs.get((name, index)), config=config)
        for name, members in rows.data.sets.items()
        for index, row in enumerate(members)
    ]
    return _build_report(
        found,
        data=rows.data,
        retained=retained,
        config=config,
        model_name=model_name,
        deviations=_deviations(model, config=config),
        altered=altered_generation(model),
        start=start,
    )


def _compared(rows: TofuRows) -> list[Key]:
    """What a retained model is measured on, too."""
    return [key for key in rows.encoded if key[0] in _COMPARED]


def _score(rows: TofuRows, keys: Sequence[Key], *, model: Any, tokenizer: Any, config: SuiteConfig, device: str) -> dict[Key, TokenScores]:
    scores = token_scores(
        model=model, tokenizer=tokenizer, rows=[rows.encoded[key] for key in keys], batch_tokens=config.batch_tokens, device=device
    )
    return dict(zip(keys, scores, strict=True))


def _ratio(row: QaRow, *, name: str, index: int, scores: Mapping[Key, TokenScores]) -> float | None:
    """The truth ratio of a row; None without wrong answers."""
    if not row.wrong:
        return None
    right = scores[name, index, "right" if row.paraphrased is not None else "answer"]
    wrong = [answer_loss(scores[name, index, f"wrong{number}"]) for number in range(len(row.wrong))]
    return truth_ratio(right_loss=answer_loss(right), wrong_losses=wrong)


def _report_row(
    row: QaRow, *, name: str, index: int, scores: Mapping[Key, TokenScores], output: str | None, config: SuiteConfig
) -> dict[str, Any]:
    """The line of the rows file."""
    answer = scores[name, index, "answer"]
    text = without_end(answer)
    line: dict[str, Any] = {"set": name, "id": row.id, "unit": row.unit, "input": row.question, "expected": row.answer}
    line |= {"answer_loss": answer_loss(answer), "num_tokens": len(answer.log_prob_N), "min_k": min_k(text, fraction=config.min_k_fraction)}
    if output is None:
        return line
    ratio = _ratio(row, name=name, index=index, scores=scores)
    wrong = [answer_loss(scores[name, index, f"wrong{number}"]) for number in range(len(row.wrong))]
    return line | {
        "output": output,
        "probability": probability(answer),
        "normalised_probability": normalised_probability(right_loss=answer_loss(answer), wrong_losses=wrong) if wrong else None,
        "rouge_l_recall": rouge_l_recall(reference=row.answer, prediction=output),
        "ratio": ratio,
        "truth_ratio": None if ratio is None else forget_truth(ratio) if name == "forget" else retain_truth(ratio),
        "truth_share": None if ratio is None else truth_share(ratio),
        "exact_memorization": exact_memorization(text),
        "extraction_strength": extraction_strength(text),
    }


def _score_samples(sets: Mapping[str, SetRows], weights: Mapping[str, np.ndarray], *, retained_auc: float) -> dict[str, np.ndarray]:
    """The scores that are means or AUCs over rows, in every resample, shape (S,) each."""
    found = {
        f"{name}_{metric}": weighted_mean(sets[name].column(metric), weights[name])
        for name in QA_SETS
        if name in sets
        for metric in METRICS
    }
    if all(term in found for term in UTILITY_TERMS):
        found["model_utility"] = np.array(
            [model_utility(terms) for terms in np.stack([found[term] for term in UTILITY_TERMS], axis=1).tolist()]
        )
    if "holdout" in sets:
        found["min_k_auc"] = weighted_auc(
            sets["forget"].column("min_k"),
            sets["holdout"].column("min_k"),
            member_weights=weights["forget"],
            stranger_weights=weights["holdout"],
        )
        found["privleak"] = np.array([privleak(auc=auc, retained_auc=retained_auc) for auc in found["min_k_auc"].tolist()])
    return found


def _build_report(
    rows: list[dict[str, Any]],
    *,
    data: TofuData,
    retained: RetainedModel | None,
    config: SuiteConfig,
    model_name: str,
    deviations: list[str],
    altered: list[str],
    start: float,
) -> SuiteReport:
    sets = by_set(rows)
    retained_auc = retained.auc if retained and retained.auc is not None else INDISTINGUISHABLE
    points = {name: float(values[0]) for name, values in _score_samples(sets, once(sets), retained_auc=retained_auc).items()}
    ratios = [row["ratio"] for row in rows if row["set"] == "forget" and row["ratio"] is not None]
    if retained and ratios:
        quality = forget_quality(ratios=ratios, retained_ratios=retained.ratios)
        points |= {"forget_quality": quality.p_value, "forget_quality_statistic": quality.statistic}
    scores = {name: points[name] if math.isfinite(points.get(name, math.nan)) else None for name in SCORE_NAMES}
    samples = _score_samples(sets, drawn(sets, samples=config.bootstrap_samples, seed=config.bootstrap_seed), retained_auc=retained_auc)
    intervals = {name: limits(values, point=scores[name], confidence=config.confidence) for name, values in samples.items()}
    return SuiteReport(
        benchmark="tofu",
        model=model_name,
        retained_model=retained.name if retained else None,
        scores=scores,
        intervals={name: interval for name, interval in intervals.items() if interval is not None},
        counts={**data.counts, **{f"scored_{name}": len(table.rows) for name, table in sets.items()}},
        sets={name: _set_summary(name, table, data=data, scores=scores) for name, table in sets.items()},
        deviations=deviations,
        notes=_notes(rows, data=data, scores=scores, retained=retained, sets=sets, altered=altered),
        config=config.model_dump(mode="json") | {"split": data.split, "max_new_tokens": config.max_new_tokens or MAX_NEW_TOKENS},
        seconds=time.perf_counter() - start,
        rows=rows,
    )


def _set_summary(name: str, table: SetRows, *, data: TofuData, scores: Mapping[str, float | None]) -> dict[str, Any]:
    by_author = len(table.units) < len(table.rows)
    summary = {"source": data.sources[name], "rows": len(table.rows), "unit": "author" if by_author else "row", "units": len(table.units)}
    return summary | ({metric: scores[f"{name}_{metric}"] for metric in METRICS} if name in QA_SETS else {})


def _notes(
    rows: Sequence[Mapping[str, Any]],
    *,
    data: TofuData,
    scores: Mapping[str, float | None],
    retained: RetainedModel | None,
    sets: Mapping[str, SetRows],
    altered: Sequence[str],
) -> list[str]:
    notes = [f"Forget set: {data.split}, from {data.sources['forget']}.", *data.notes]
    broken = [row["id"] for row in rows if not math.isfinite(row["answer_loss"])]
    if broken:
        notes.append(f"{len(broken)} rows have a loss that is not finite, among them {broken[0]!r}: means over them are undefined.")
    if retained is None:
        notes.append(
            "No retained model was given (--retained-model): forget quality is undefined, and PrivLeak compares with an AUC of 0.5."
        )
    elif scores["forget_quality"] is None and any(row.wrong for row in data.sets["forget"]):
        notes.append("A truth ratio of one of the two models is not a number: forget quality is undefined.")
    elif retained.auc == 1 and scores["privleak"] is None:
        notes.append("The attack's AUC on the retained model is 1: PrivLeak is undefined.")
    authors = [name for name, table in sets.items() if len(table.units) < len(table.rows)]
    drawn_as = ", ".join(f"{len(sets[name].units)} authors of {name}" for name in authors)
    notes.append(
        (f"Intervals draw {drawn_as} with all of their {AUTHOR_ROWS} rows, and rows of other sets." if authors else "Intervals draw rows.")
        + " That of PrivLeak takes the retained model's AUC as it is; forget quality has none, being the p-value of a test."
    )
    if "forget" in authors and len(sets["forget"].units) < 5:
        notes.append(f"{len(sets['forget'].units)} authors are too few for intervals on the forget set that mean much.")
    if altered:
        notes.append(
            f"The checkpoint's generation configuration changes greedy decoding ({', '.join(altered)}): each row was decoded alone."
        )
    return notes


def _deviations(model: Any, *, config: SuiteConfig) -> list[str]:
    found = {
        PromptStyle.PLAIN: [
            "The published code also scores the words 'Answer: ' of the prompt of non-chat models; here they belong to the prompt."
        ],
        PromptStyle.BARE: ["Questions stand alone; the published code writes 'Question: ' before and 'Answer: ' after them."],
        PromptStyle.CHAT: ["Questions use the tokenizer's chat template; the published code has fixed tags for Llama 2."],
    }[config.prompt]
    found += [
        "Prompt and answer are tokenized apart; the published code tokenizes them together.",
        "No begin token is added, as everywhere in this project; the published code lets the tokenizer add one.",
        "All rows of a set are scored; the published code scores the first 300 of each.",
        "Generated texts have spaces before punctuation removed before they are scored.",
        "Rows run in padded batches: losses and near ties of tokens may differ by rounding.",
        f"The membership attack is min-K at {config.min_k_fraction:g} on answer tokens, forget set against holdout; TOFU itself has none.",
    ]
    if (config.max_new_tokens or MAX_NEW_TOKENS) != MAX_NEW_TOKENS:
        found.append(f"At most {config.max_new_tokens} tokens are generated; the published limit is {MAX_NEW_TOKENS}, prompt included.")
    else:
        found.append(f"At most {MAX_NEW_TOKENS} tokens are generated after the prompt; the published limit counts the prompt, too.")
    dtype = str(getattr(model, "dtype", config.dtype)).removeprefix("torch.")
    if dtype != "bfloat16":
        found.append(f"The model runs in {dtype}; the published code uses bfloat16.")
    return found
