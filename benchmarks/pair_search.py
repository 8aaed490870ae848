"""Does the pair search pay: its merge on documents that nobody selected on, against what needs no search, and what the search costs.

python benchmarks/pair_search.py --seeds 5 --write

Each seed is one run of the quickstart. ``--runs DIR`` keeps the runs, and goes on with those that are there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.options import shown_command
from benchmarks.results import Result, Table, publish
from eval.report import read_report
from launcher.config import ExperimentConfig
from launcher.data import prepare_data
from launcher.finish import candidates_of, ledger_of, model_place, scorer_of
from launcher.quickstart import run_quickstart
from launcher.run_folder import RESOLVED, Run
from merging.config import MergeConfig, ObjectiveWeights, PairConfig
from merging.gain import objective_gain
from merging.ledger import Ledger, Merge
from merging.pairs import Candidate, bracketing_pairs
from merging.search import search_pairs
from trainers.files import read_json, write_json

SEEDS = (42, *range(1, 42))
"""The quickstart's own seed first."""
HAND_PICKED = ("trial-01", "trial-00")
"""The quickstart's start points with the weights of the published recipe: its over-forgetting run and its under-forgetting one."""
FIXED = MergeConfig(method="ties", density=0.8)
"""The published recipe's merge: density 0.8, equal weights, no scale."""
RANDOM_PAIRS = 3
"""Bracketing pairs drawn per seed, merged like the published recipe; their mean is shown."""
EVERYTHING = 10**9
RIVALS = {
    "parent": "its better parent",
    "hand_picked": "(a) the recipe's pair at density 0.8",
    "random": "(b) a random bracketing pair at density 0.8",
    "trial": "(c) the best single trial",
    "scaled": "(d) its better parent, scaled to AUC 0.5",
}


@dataclass(frozen=True)
class Outcome:
    """What one seed gave; scores are final scores of the test fold.

    Args:
        seed: of the run.
        merge: the best merge of the search.
        name: its parents and parameters.
        delivered: the model that the run handed out, and its score.
        rivals: score by name of ``RIVALS``; nothing where there is none.
        gains: of the merge over each rival: difference, low, high (paired bootstrap over documents).
        cost: of the search.
        objective: the best estimated objective that the search found on the validation fold.
        grid: the best that the exhaustive grid has there; null if it was not measured.
        grid_merges: measurements of that grid.
        comparable: the best that the search finds there among the grid's own checkpoints.
        comparable_examples: examples that it scores for that.
    """

    seed: int
    merge: float | None
    name: str
    delivered: tuple[str, float]
    rivals: Mapping[str, float]
    gains: Mapping[str, Mapping[str, float]]
    cost: Mapping[str, int]
    objective: float | None
    grid: float | None
    grid_merges: int
    comparable: float | None = None
    comparable_examples: int = 0


def study(run: Path, *, seed: int, grid: str) -> Outcome:
    """Everything about one finished run; what is there already is not measured again."""
    config = ExperimentConfig.model_validate(read_json(run / RESOLVED)["config"])
    data, results, pairs = prepare_data(config), read_json(run / "results.json"), read_json(run / "pairs.json")
    scorer = scorer_of(Run(run), config=config, data=data, trials=results["trials"], target=Path(results["target"]["path"]))
    ledger = ledger_of(run, scorer=scorer, file="study-measured.jsonl")
    candidates = candidates_of(results["trials"], run=run, scorer=scorer, ledger=ledger)
    delivered = results["verdict"]["winner"]

    def report(name: str, merge: Merge | None = None) -> Any:
        place = model_place(run, name=name, delivered=delivered) if merge is None else run / "study" / name
        if merge is not None:
            scorer.evaluate(merge, folder=place, name=name, folds=("test",))
        return read_report(place / "eval.json")

    final = "final_score"
    last = sorted((one for one in candidates if one.complete), key=lambda one: (-(one.scores.get(final) or 0.0), one.name))
    rivals: dict[str, list[Any]] = {"hand_picked": [report("hand-picked", Merge(HAND_PICKED, FIXED))]}
    possible = bracketing_pairs(last)
    drawn = random.Random(seed).sample(possible, min(RANDOM_PAIRS, len(possible)))
    rivals["random"] = [report(f"random-{pair.name}", Merge(pair.trials, FIXED)) for pair in drawn]
    rivals["trial"] = [read_report(run / "trials" / last[0].name / "eval.json")] if last else []
    best, merged = pairs["best_merge"], None
    if best is not None:
        merged = report("ties")
        parents = [report(name) for name in best["parents"]]
        rivals["parent"] = [max(parents, key=lambda one: one.scores[final] or 0.0)]
        scaled = [
            one for one in pairs["controls"] if one["name"].removeprefix("scaled-") in best["parents"] and one["objective"] is not None
        ]
        rivals["scaled"] = [report(max(scaled, key=lambda one: one["objective"])["name"])] if scaled else []
    rivals = {name: found for name, found in rivals.items() if found}
    gains = {name: _mean_gain(merged, found) for name, found in rivals.items()} if merged is not None else {}
    whole = [
        point["objective"]
        for pair in pairs["pairs"]
        for point in pair["points"]
        if point["examples"] == ledger.num_examples and point["objective"] is not None and not point["gate"]
    ]
    best_of_grid = comparable = None
    grid_merges = comparable_examples = 0
    if grid != "none":
        pool = candidates if grid == "all" else last
        whole_grid = config.pairs.model_copy(update={"max_pairs": EVERYTHING, "calibrated": EVERYTHING, "first_rung": EVERYTHING})
        best_of_grid, _ = _best(run, pool, config=config, pairs=whole_grid, ledger=ledger)
        grid_merges = ledger.cost["merges"]
        fresh = ledger_of(run, scorer=scorer, file="study-search.jsonl")
        comparable, comparable_examples = _best(run, pool, config=config, pairs=config.pairs, ledger=fresh)
    return Outcome(
        seed=seed,
        merge=None if merged is None else merged.scores[final],
        name="" if best is None else best["name"],
        delivered=(str(delivered), read_report(run / "merged" / "eval.json").scores[final] or 0.0),
        rivals={name: statistics.mean(one.scores[final] or 0.0 for one in found) for name, found in rivals.items()},
        gains=gains,
        cost=pairs["cost"],
        objective=max(whole, default=None),
        grid=best_of_grid,
        grid_merges=grid_merges,
        comparable=comparable,
        comparable_examples=comparable_examples,
    )


def _best(
    run: Path, candidates: Sequence[Candidate], *, config: ExperimentConfig, pairs: PairConfig, ledger: Ledger
) -> tuple[float | None, int]:
    """The best objective on the whole fold that a search of these candidates finds, and the examples it scores for that."""
    found = search_pairs(
        candidates=candidates,
        baseline_scores=read_json(run / "baseline" / "validation.json")["scores"],
        measurements=ledger,
        config=pairs.model_copy(update={"finalists": 1}),
        merge=config.merge,
    )
    whole = [point for point in found.points if point.examples == ledger.num_examples and point.objective is not None and not point.gate]
    return max((point.objective for point in whole if point.objective is not None), default=None), ledger.cost["examples"]


def _mean_gain(merged: Any, rivals: Sequence[Any]) -> dict[str, float]:
    """Of one rival as the bootstrap tells; of several, the mean of the differences and of the bounds."""
    found = [gain for rival in rivals if (gain := objective_gain(merged, rival, weights=ObjectiveWeights())) is not None]
    return {name: statistics.mean(gain[name] for gain in found) for name in ("difference", "low", "high")} if found else {}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the 95 % t-interval over seeds."""
    from scipy import stats

    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("-inf"), float("inf")
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def summary(outcomes: Sequence[Outcome]) -> Table:
    """The merge against each rival over all seeds."""
    rows = []
    for name, label in RIVALS.items():
        gains = [one.gains[name] for one in outcomes if one.gains.get(name)]
        if not gains:
            continue
        differences = [gain["difference"] for gain in gains]
        mean, low, high = interval(differences)
        wins = sum(difference > 0 for difference in differences)
        clear = f"{sum(gain['low'] > 0 for gain in gains)} / {sum(gain['high'] < 0 for gain in gains)}"
        score = statistics.mean(one.rivals[name] for one in outcomes if one.gains.get(name))
        rows.append((label, f"{score:.3f}", f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{wins} of {len(gains)}", clear))
    columns = (
        "the best merge against",
        "its final score",
        "merge minus it",
        "95 % interval over seeds",
        "merge ahead",
        "clearly ahead / behind",
    )
    return Table(columns, rows)


def per_seed(outcomes: Sequence[Outcome]) -> Table:
    """One line per seed."""
    rows = []
    for one in outcomes:
        rivals = [f"{one.rivals[name]:.3f}" if name in one.rivals else "–" for name in RIVALS]
        merge = "–" if one.merge is None else f"{one.merge:.3f}"
        rows.append((str(one.seed), merge, *rivals, f"{one.delivered[1]:.3f} ({one.delivered[0]})", one.name))
    known = [one for one in outcomes if one.merge is not None and set(one.rivals) == set(RIVALS)]
    if known:
        means = [statistics.mean(one.merge or 0.0 for one in known)]
        means += [statistics.mean(one.rivals[name] for one in known) for name in RIVALS]
        means.append(statistics.mean(one.delivered[1] for one in known))
        rows.append(("mean", *(f"{value:.3f}" for value in means), ""))
    columns = ("seed", "best merge", "better parent", "(a)", "(b)", "(c)", "(d)", "delivered", "the merge")
    return Table(columns, rows, title="Final scores on the test fold")


def costs(outcomes: Sequence[Outcome]) -> Table:
    """What the search measured, and what it missed."""
    rows = []
    for one in outcomes:
        cost = one.cost
        regret = "–" if one.grid is None or one.comparable is None else f"{one.grid - one.comparable:+.3f}"
        rows.append(
            (
                str(one.seed),
                f"{cost['examples']:,}",
                f"{cost['merges']:,}",
                f"{cost['full']}",
                f"{cost['rows_generated']:,}",
                f"{cost['exhaustive_examples']:,}",
                f"{cost['exhaustive_examples'] / max(cost['examples'], 1):.0f}",
                "–" if one.objective is None else f"{one.objective:.3f}",
                "–" if one.grid is None else f"{one.grid:.3f} ({one.grid_merges:,} merges)",
                "–" if one.comparable is None else f"{one.comparable:.3f} ({one.comparable_examples:,} examples)",
                regret,
            )
        )
    columns = (
        "seed", "examples scored", "merges built", "full evaluations", "rows generated", "examples, exhaustive", "÷", "best objective",
        "best of the grid", "the search on its checkpoints", "regret",
    )  # fmt: skip
    return Table(columns, rows, title="Cost, and regret on the validation fold")


def main() -> None:
    """Run or reuse the sweeps one after the other, study each, and put the table together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="quickstart runs, seeds 42, 1, 2, and so on (default 5)")
    parser.add_argument("--runs", type=Path, metavar="DIR", default=Path("runs/pair-search"), help="where the runs are kept")
    parser.add_argument(
        "--grid", choices=("none", "last", "all"), default="last",
        help="pairs of the exhaustive grid: of last checkpoints (two minutes per seed), of all (half an hour)",
    )  # fmt: skip
    parser.add_argument("--write", action="store_true", help="write the result under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)

    outcomes = []
    for seed in SEEDS[: options.seeds]:
        run = options.runs / f"seed-{seed}"
        known = run / f"study-{options.grid}.json"
        if not (run / "results.json").exists() or not read_json(run / "results.json").get("run_finished"):
            run_quickstart(out=run, data=None, mia=None, mmlu=None, documents=None, seed=seed)
        if not known.exists():
            write_json(known, asdict(study(run, seed=seed, grid=options.grid)))
        outcomes.append(Outcome(**read_json(known)))
        print(json.dumps(asdict(outcomes[-1])), flush=True)
    seeds = ", ".join(str(one.seed) for one in outcomes)
    config = ExperimentConfig.model_validate(read_json(options.runs / f"seed-{SEEDS[0]}" / RESOLVED)["config"])
    publish(
        Result(
            theme="pair_search",
            title="The pair search on the quickstart's sweep",
            question="Is the merge that the search finds better than its parents and than what needs no search, on documents that nobody "
            "selected on, and what does the search cost against measuring everything?",
            command=shown_command("benchmarks/pair_search.py", parser=parser, options=options),
            settings={
                "runs": f"{len(outcomes)} quickstarts, seeds {seeds}; each has its own documents, target and eight trials",
                "pairs": json.dumps(config.pairs.model_dump(mode="json", exclude_defaults=True)),
                "merge": json.dumps(config.merge.model_dump(mode="json")),
            },
            tables=[summary(outcomes), per_seed(outcomes), costs(outcomes)],
            reading=[
                "Final score: mean of task aggregate, membership score and MMLU on the test fold; selection reads the validation fold.",
                "Clearly: the paired bootstrap interval over a seed's documents does not hold 0.",
                "The better parent is the one that is better on the test fold.",
                "Delivered is what the run hands out: the merge only where its gain over the best single checkpoint was clear of noise on "
                "the validation fold.",
                "Regret: best estimated objective of the grid minus that of a search among the same checkpoints, without generation on the "
                "validation fold.",
            ],
        ),
        write=options.write,
    )


if __name__ == "__main__":
    main()
