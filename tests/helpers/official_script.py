"""The benchmark's final script once more, as plainly as its description reads, to compare our evaluation with.

Rows are generated one at a time, written to CSV files by pandas, read back, scored, averaged, and written to a JSON line.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLEAN_UP = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
            (" 've", "'ve"), (" 're", "'re")]  # fmt: skip
COLUMNS = ["id", "task", "input", "expected_output", "model_output", "nll"]


def write_answers(folder: Path, *, split: str, rows: Sequence[dict[str, Any]]) -> None:
    """``<split>_0.csv`` as one process writes it."""
    import pandas

    # Python before 3.11.9 and 3.12.3 writes a lone carriage return without quotes, which ends the row; the benchmark ran on 3.12.8.
    text = "".join(str(row[column]) for row in rows for column in COLUMNS)
    quoting = csv.QUOTE_ALL if "\r" in text and sys.version_info < (3, 12, 3) else csv.QUOTE_MINIMAL
    pandas.DataFrame(list(rows), columns=COLUMNS).to_csv(folder / f"{split}_0.csv", index=False, quoting=quoting)


def metric_stage(folder: Path, *, losses: tuple[Sequence[float], Sequence[float]] | None, mmlu_average: float | None) -> dict[str, Any]:
    """Scores of the CSV files of a folder, as they stand in ``evaluation_results.jsonl``.

    Args:
        folder: with ``forget_0.csv`` and ``retain_0.csv``.
        losses: of members and non-members, or None.
        mmlu_average: or None.
    """
    import pandas
    from rouge_score import rouge_scorer
    from sklearn.metrics import auc, roc_curve

    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    results: dict[str, Any] = {}
    terms: list[float] = []
    for split in ("forget", "retain"):
        frame = pandas.read_csv(folder / f"{split}_0.csv")
        regurgitation: dict[str, list[float]] = {}
        knowledge: dict[str, list[float]] = {}
        for row in frame.itertuples():
            task = str(row.task)
            regurgitation.setdefault(task, [])
            knowledge.setdefault(task, [])
            expected, output = str(row.expected_output), str(row.model_output)
            if row.id[:-1].endswith("sc"):
                regurgitation[task].append(scorer.score(target=expected, prediction=output)["rougeL"].recall)
            elif row.id[:-1].endswith("qa"):
                knowledge[task].append(int(expected.strip().lower() == output.strip().lower()))
        results[f"{split}-set"] = {
            "overall-regurgitation-score": _mean([score for scores in regurgitation.values() for score in scores]),
            "overall-knowledge-score": _mean([score for scores in knowledge.values() for score in scores]),
        }
        for task in sorted(regurgitation):
            pair = (_mean(regurgitation[task]), _mean(knowledge[task]))
            results[f"{split}-set"][task] = {"regurgitation-score": pair[0], "knowledge-score": pair[1]}
            terms += [1 - value for value in pair] if split == "forget" else pair
    if losses is not None:
        members, nonmembers = losses
        labels = [1] * len(members) + [0] * len(nonmembers)
        false_rate, true_rate, _ = roc_curve(labels, [-loss for loss in (*members, *nonmembers)])
        results["mia_loss_acc"] = float(auc(false_rate, true_rate))
    if mmlu_average is not None:
        results["mmlu_average"] = mmlu_average
    aggregate = statistics.harmonic_mean(terms)
    results["aggregated-terms"] = terms
    results["aggregate-score"] = -1
    results["harmonic-mean-task-aggregate"] = aggregate
    if losses is not None and mmlu_average is not None:
        attack = 1 - abs(results["mia_loss_acc"] - 0.5) * 2
        results["aggregate-score"] = statistics.mean([aggregate, mmlu_average, attack])
        results["mia_final_score"] = attack
    file = folder / "evaluation_results.jsonl"
    file.write_text(json.dumps(results))
    return json.loads(file.read_text())


def _mean(scores: list[float]) -> float:
    import pandas

    return float(pandas.Series(scores, dtype=float).mean())


def whole_script(
    *, model: Path, data: Path, mia: Path, mmlu_average: float, max_new_tokens: int, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Inference and metrics of a saved checkpoint, and the generated text of every row by its id."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    texts = {}
    for split in ("retain", "forget"):
        rows = []
        for row in _lines(data / f"{split}.jsonl"):
            ids = torch.tensor([tokenizer(row["input"])["input_ids"]])
            with torch.no_grad():
                output = loaded.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=tokenizer.eos_token_id,
                )
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for old, new in CLEAN_UP:
                text = text.replace(old, new)
            texts[row["id"]] = text
            rows.append({**row, "expected_output": row["output"], "model_output": text, "nll": 0.0})
        write_answers(folder, split=split, rows=rows)
    losses = []
    for side in ("member", "nonmember"):
        losses.append([])
        for row in _lines(mia / f"{side}.jsonl"):
            ids = torch.tensor([tokenizer(row["document"])["input_ids"]])
            with torch.no_grad():
                losses[-1].append(float(loaded(input_ids=ids, labels=ids).loss))
    return metric_stage(folder, losses=(losses[0], losses[1]), mmlu_average=mmlu_average), texts


def mmlu_accuracy_of(*, model: Path, mmlu: Path, shots: int = 5, limit: int = 2048) -> dict[str, Any]:
    """Accuracy over the files of an MMLU folder, one prompt at a time in bfloat16: overall and per subject."""
    import pandas
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    letters = [tokenizer(f" {letter}")["input_ids"][-1] for letter in "ABCD"]

    def block(frame: Any, row: int, *, solved: bool) -> str:
        text = str(frame.iloc[row, 0])
        for number, letter in enumerate("ABCD", start=1):
            text += f"\n{letter}. {frame.iloc[row, number]}"
        return text + "\nAnswer:" + (f" {frame.iloc[row, 5]}\n\n" if solved else "")

    correct: dict[str, list[bool]] = {}
    for file in sorted((mmlu / "test").glob("*_test.csv")):
        subject = file.name.removesuffix("_test.csv")
        dev, test = pandas.read_csv(mmlu / "dev" / f"{subject}_dev.csv", header=None), pandas.read_csv(file, header=None)
        head = "The following are multiple choice questions (with answers) about " + "".join(f" {word}" for word in subject.split("_"))
        for row in range(len(test)):
            count = min(shots, len(dev))
            while True:
                prompt = head + ".\n\n" + "".join(block(dev, shot, solved=True) for shot in range(count)) + block(test, row, solved=False)
                ids = tokenizer(prompt)["input_ids"]
                if len(ids) <= limit:
                    break
                count -= 1
            with torch.no_grad():
                probabilities = loaded(torch.tensor([ids])).logits[0, -1].softmax(-1)[letters]
            chosen = "ABCD"[int(probabilities.float().numpy().argmax())]
            correct.setdefault(subject, []).append(chosen == test.iloc[row, 5])
    flags = [flag for group in correct.values() for flag in group]
    return {"average_acc": sum(flags) / len(flags), **{subject: sum(group) / len(group) for subject, group in correct.items()}}


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def assert_same_block(actual: Any, expected: Any, *, place: str = "official", tolerance: float = 1e-12) -> None:
    """Same keys in the same order, same numbers; NaN (or the null that stands for it in our files) only where there is NaN."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected), place
        for key in expected:
            assert_same_block(actual[key], expected[key], place=f"{place}.{key}", tolerance=tolerance)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), place
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same_block(a, b, place=f"{place}[{index}]", tolerance=tolerance)
    elif expected != expected:
        assert actual is None or actual != actual, place
    else:
        assert actual is not None, place
        assert abs(actual - expected) <= tolerance, f"{place}: {actual!r} instead of {expected!r}"
        assert (actual == 0 and isinstance(actual, int)) == (expected == 0 and isinstance(expected, int)), f"{place}: {actual!r}"
