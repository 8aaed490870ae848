"""One self-contained page about a run, and beside it the data and the figures that it shows, all from the run's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.plots import Plot
from launcher.report_audit import audit_view
from launcher.report_data import RunData, read_run
from launcher.report_failures import failures_view
from launcher.report_figures import FILES_ONLY, PAGE_ONLY, report_figures
from launcher.report_headline import headline, progress, tiles, verdict_sentence
from launcher.report_pairs import pair_view
from launcher.report_points import left_out, plot_fold, tradeoff_points, undrawn_trials
from launcher.report_provenance import provenance_view
from launcher.report_rows import side_by_side
from launcher.report_scores import LEADERBOARD, LEADERBOARD_URL, PART_COLUMNS, SCORE_COLUMNS, heat_view, score_rows
from launcher.report_tables import report_tables, save_tables
from launcher.report_text import asset, template
from launcher.report_trials import TRIAL_SCORES, trial_rows, trials_csv
from launcher.report_verdicts import verdict_view
from trainers.files import write_text


def build_report(run: Path, *, mask: bool = True) -> Path:
    """Write ``RUN/report.html``, ``RUN/trials.csv`` and ``RUN/plots/``, and return the page's path.

    Works during a sweep and on incomplete runs: what is missing is named on the page.

    Args:
        run: the run folder.
        mask: hide personal data in the generations that are shown.

    Raises:
        InputError: if ``run`` is not a run folder.
    """
    data = read_run(Path(run))
    plots, tables = report_figures(data), report_tables(data, mask=mask)
    for name in plots.keys() - PAGE_ONLY:
        plots[name].save(data.run / "plots")
    save_tables(tables, data.run / "plots")
    write_text(data.run / "trials.csv", trials_csv(data))
    page = data.run / "report.html"
    write_text(page, render(data, plots=plots, mask=mask, files=file_links(plots, tables)))
    return page


def file_links(plots: Mapping[str, Plot], tables: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Name of a figure or table to its files beside the page: kind to relative path."""
    drawn = plots.keys() - PAGE_ONLY
    kinds = {
        name: [*(("png", "svg") if name in drawn else ()), *(("csv", "json") if name in tables else ())]
        for name in dict.fromkeys([*plots, *tables])
    }
    return {name: {kind: f"plots/{name}.{kind}" for kind in found} for name, found in kinds.items() if found}


def render(data: RunData, *, plots: Mapping[str, Plot], mask: bool = True, files: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The page as text; every value from the run is escaped.

    Args:
        data: the run.
        plots: its figures.
        mask: hide personal data in the generations.
        files: the files beside the page, as ``file_links`` names them; none are linked without.
    """
    import base64
    import hashlib

    import markupsafe

    script = asset("report.js").strip()
    points = tradeoff_points(data)
    sentence = verdict_sentence(data)
    title = headline(data)
    context = {
        "css": markupsafe.Markup(asset("report.css")),
        "script": markupsafe.Markup(script),
        # Only this script may run: text of a run that passed for markup would still do nothing.
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "name": data.name,
        "finished": data.finished,
        "progress": progress(data),
        "fold": data.fold,
        "headline": title,
        "sentence": sentence if sentence != title else "",
        "missing": data.missing,
        "warnings": [str(text) for text in data.results.get("warnings") or []],
        "tiles": tiles(data),
        "plots": {name: plot.inline for name, plot in plots.items() if name not in FILES_ONLY},
        "files": files or {},
        "plot_fold": plot_fold(data),
        "num_checkpoints": sum(point.step is not None for point in points),
        "num_estimated": sum(point.estimated for point in points),
        "left_out": left_out(data),
        "undrawn": undrawn_trials(data, points),
        "columns": SCORE_COLUMNS,
        "part_columns": PART_COLUMNS,
        "models": score_rows(data),
        "leaderboard": LEADERBOARD,
        "leaderboard_url": LEADERBOARD_URL,
        "verdicts": verdict_view(data),
        "heat": heat_view(data),
        "pair": pair_view(data),
        "audit": audit_view(data),
        "trials": trial_rows(data),
        "trial_scores": TRIAL_SCORES,
        "failures": failures_view(data),
        "examples": side_by_side(data, mask=mask),
        "masked": mask,
        "provenance": provenance_view(data),
    }
    return str(template("report.html.j2", autoescape=True).render(**context))
