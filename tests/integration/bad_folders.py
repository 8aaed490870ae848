"""Places that cannot be written or are no run, each with its message."""

from __future__ import annotations

from tests.helpers.bad_commands import Case, also, in_used_run, run
from tests.helpers.bad_input import rows

QUICKSTART = [
    Case(
        "membership without data",
        lambda p: ["quickstart", "--out", "q", "--mia", "mia"],
        ("--mia and --mmlu go with --data", "fix: give --data"),
    ),
    Case("no documents", lambda p: ["quickstart", "--out", "q", "--documents", "0"], ("--documents", "greater than or equal to 1")),
    Case(
        "too few synthetic documents",
        lambda p: ["quickstart", "--out", "q", "--documents", "2"],
        ("2 synthetic documents", "--documents", "from 3 to 60"),
    ),
    Case(
        "too many synthetic documents",
        lambda p: ["quickstart", "--out", "q", "--documents", "61"],
        ("61 synthetic documents", "from 3 to 60"),
    ),
    Case(
        "too few real documents",
        lambda p: also(p.lume(), ["quickstart", "--out", "q", "--data", "lume", "--documents", "1"]),
        ("Task1 has 1 document, too few", "the forget set"),
    ),
    Case(
        "no such data", lambda p: ["quickstart", "--out", "q", "--data", str(p.folder / "nowhere")], ("path not found", "nowhere", "fix:")
    ),
    Case("out is a file", lambda p: also(p.write("q", "x"), ["quickstart", "--out", "q"]), ("the run folder is a file", "q", "fix:")),
    Case(
        "out below a file",
        lambda p: also(p.write("q", "x"), ["quickstart", "--out", "q/run"]),
        ("a file stands where a folder is needed", "q", "fix:"),
    ),
    Case(
        "out holds other files",
        lambda p: also(p.write("q/thesis.tex", "x"), ["quickstart", "--out", "q"]),
        ("the folder holds something that is not a run", "found: thesis.tex", "fix:"),
    ),
    Case(
        "out holds another model",
        lambda p: also(p.write("q/target/config.json", "{}"), ["quickstart", "--out", "q"]),
        ("something that is not a run", "found: target"),
    ),
    Case(
        "out has spaces",
        lambda p: ["quickstart", "--out", "my runs/my run"],
        ("'my run' cannot be the name of a run folder", "letters, digits", "fix: for instance --out my runs/my-run"),
    ),
    Case("out is on the network", lambda p: ["quickstart", "--out", "s3://bucket/run"], ("not a folder of this machine", "fix:")),
    Case(
        "out is a run on other data",
        lambda p: also(in_used_run(p), ["quickstart", "--out", "runs/run"]),
        ("belongs to a run on other data", "runs/run", "--data"),
    ),
    Case(
        "out was begun with other options",
        lambda p: also(
            p.write("q/data/manifest.json", '{"seed": 42, "parameters": {"documents_per_task": 3}}'),
            ["quickstart", "--out", "q", "--documents", "4"],
        ),
        ("made with {'documents_per_task': 3", "fix: use the same options"),
    ),
]

RUN_FOLDERS = [
    Case(
        "another configuration",
        lambda p: in_used_run(p, "train.learning_rate=0.5", "seed=7"),
        ("belongs to another configuration; changed: seed, train.learning_rate", "runs/run", "undo the change, or choose another name"),
    ),
    Case(
        "other data",
        lambda p: also(in_used_run(p), also(p.lume(retain=rows("r", count=6)), ["sweep", "exp.yaml"])),
        ("changed: the data", "fix:"),
    ),
    Case("another search", lambda p: in_used_run(p, train__beta=None, train__seed={"values": [1, 2]}), ("changed: train.seed\n", "fix:")),
    Case("no resume", lambda p: in_used_run(p, "--no-resume"), ("already in use", "runs/run", "leave out --no-resume")),
    Case(
        "train in a used folder",
        lambda p: in_used_run(p, "train.seed=3", command="train"),
        ("belongs to another configuration", "train.seed", "--out"),
    ),
    Case(
        "memorize another target in a used folder",
        lambda p: in_used_run(p, command="memorize", target={"seed": 5}),
        ("belongs to another configuration; changed: target.seed",),
    ),
    Case(
        "memorize among other files",
        lambda p: also(p.write("runs/run/thesis.tex", "x"), run(p, "memorize", target={})),
        ("something that is not a run", "thesis.tex"),
    ),
    Case(
        "sweep among other files",
        lambda p: also(p.write("runs/run/thesis.tex", "x"), run(p, "sweep")),
        ("something that is not a run", "runs/run", "fix: choose an empty or a new folder"),
    ),
    Case("run folder is a file", lambda p: also(p.write("runs/run", "x"), run(p, "sweep")), ("the run folder is a file", "runs/run")),
    Case(
        "storage below a file",
        lambda p: also(p.write("disk", "x"), run(p, "sweep", storage_path="disk/runs")),
        ("a file stands where a folder is needed", "disk", "fix:"),
    ),
    Case(
        "damaged record of the run",
        lambda p: also(p.write("runs/run/experiment.json", "[]"), run(p, "sweep")),
        ("record of the run's configuration is damaged", "experiment.json"),
    ),
    Case(
        "torn record of the run",
        lambda p: also(p.write("runs/run/experiment.json", "{"), run(p, "sweep")),
        ("not a JSON file", "experiment.json"),
    ),
    Case(
        "trial folder with spaces",
        lambda p: run(p, "train", "--out", "one trial"),
        ("'one trial' cannot be the name of a run folder", "fix: for instance --out one-trial"),
    ),
    Case("report of nothing", lambda p: ["report", "runs/none"], ("run folder not found", "runs/none", "fix:")),
    Case(
        "report of another folder",
        lambda p: also(p.lume(), ["report", "lume"]),
        ("not a run folder", "lume", "fix: give the folder that a sweep"),
    ),
    Case("status of another folder", lambda p: also(p.lume(), ["status", "lume"]), ("not a run folder", "lume")),
    Case("status of a file", lambda p: also(p.write("f", ""), ["status", "f"]), ("run folder not found", "f")),
]
