"""Configurations, resources and command lines that cannot work, each with its message."""

from __future__ import annotations

from tests.helpers.bad_commands import Case, also, run

TOKEN = "hf_" + "abcDEF0123456789" * 2

CONFIGURATION = [
    Case(
        "missing configuration",
        lambda p: also(p.config(), ["validate", "exq.yaml"]),
        ("configuration file not found", 'did you mean "exp.yaml"?'),
    ),
    Case(
        "configuration is a folder",
        lambda p: also(p.lume(), ["validate", "lume"]),
        ("a folder where a YAML file is expected", "lume", "fix:"),
    ),
    Case(
        "empty configuration",
        lambda p: also(p.write("e.yaml", ""), ["validate", "e.yaml"]),
        ("the file is empty", "e.yaml", "unlearn init"),
    ),
    Case(
        "configuration not UTF-8", lambda p: also(p.write("e.yaml", b"name: \xff"), ["validate", "e.yaml"]), ("not UTF-8", "byte 6", "fix:")
    ),
    Case("YAML syntax", lambda p: ["validate", p.config("train: {a: [1\n")], ("not valid YAML", "exp.yaml, line", "fix: check")),
    Case(
        "YAML tab",
        lambda p: ["validate", p.config("merge:\n\tdensity: 1\n")],
        ("a tab where YAML wants spaces", "line 9", "indent with spaces"),
    ),
    Case(
        "YAML key given twice",
        lambda p: ["validate", p.config("seed: 1\nseed: 2\n")],
        ("seed (line 9)", "given twice, first in line 8", "delete one"),
    ),
    Case("unknown key", lambda p: ["validate", p.config("trian: {}\n")], ("trian (line 8)", 'unknown key; did you mean "train"?')),
    Case(
        "unknown nested key",
        lambda p: ["validate", p.config(train__objective={"betta": 1})],
        ("train.objective.betta", 'did you mean "beta"?'),
    ),
    Case(
        "wrong type",
        lambda p: ["sweep", p.config(train__learning_rate="fast")],
        ('train.learning_rate = "fast" (line 5)', "must be a number > 0"),
    ),
    Case("out of range", lambda p: ["validate", p.config(merge__density=1.5)], ("merge.density = 1.5", "a number in (0, 1]")),
    Case(
        "several problems at once",
        lambda p: ["validate", p.config("sed: 1\n", train__lora={"rank": 8}, eval__dtype="int8")],
        ("exp.yaml: 3 problems", "train.lora.rank", 'eval.dtype = "int8"', 'did you mean "seed"?'),
    ),
    Case(
        "no target model",
        lambda p: ["validate", p.config(model=None)],
        ("model.model_name_or_path", "no target model: give its folder, or a `target`"),
    ),
    Case(
        "data given twice",
        lambda p: ["validate", p.config(data__forget="f.jsonl")],
        ("either data.path (a folder) or data.forget and data.retain", "not both"),
    ),
    Case("name is no folder name", lambda p: ["validate", p.config(name="a/b")], ('name = "a/b"', "letters, digits and . _ -")),
    Case(
        "storage on the network",
        lambda p: ["validate", p.config(storage_path="ftp://bucket")],
        ("storage_path", "must be a folder, a mounted one, or a URI"),
    ),
    Case(
        "keys in the storage's address",
        lambda p: ["validate", p.config(storage_path="s3://user:password@bucket")],
        ("storage_path", "holds keys", "through the environment"),
    ),
    Case(
        "access key in the file",
        lambda p: ["validate", p.config(model__model_name_or_path=TOKEN)],
        ("model.model_name_or_path", "access key", "delete it"),
        TOKEN,
    ),
    Case("access key as an override", lambda p: ["validate", p.config(), f"train.seed={TOKEN}"], ("train.seed", "access key"), TOKEN),
    Case(
        "override without =",
        lambda p: ["validate", p.config(), "train.learning_rate"],
        ("train.learning_rate (override)", "overrides are key=value"),
    ),
    Case(
        "override of an unknown key",
        lambda p: ["sweep", p.config(), "train.lora.rang=3"],
        ("train.lora.rang (override)", "unknown key; known: r, lora_alpha"),
    ),
    Case(
        "override of the wrong type",
        lambda p: ["sweep", p.config(), "sweep.num_trials=many"],
        ('sweep.num_trials = "many" (override)', "a whole number >= 1"),
    ),
    Case("override that is no YAML", lambda p: ["sweep", p.config(), "seed=[1"], ("seed", "not valid YAML", "put the value in quotes")),
    Case(
        "searched setting for one trial",
        lambda p: run(p, "train", train__learning_rate={"values": [1e-4, 1e-3]}),
        ("train.learning_rate", "one trial needs one value", "train.learning_rate=0.0001"),
    ),
    Case("memorize without a target section", lambda p: run(p, "memorize"), ("target", "add a `target:` section")),
    Case(
        "train in several ranks",
        lambda p: run(p, "train", train__engine={"ranks": 2}),
        ("train.engine.ranks = 2", "one process", "train.engine.ranks=1"),
    ),
    Case("shares of the folds", lambda p: run(p, "validate", data__folds={"train": 0.9}), ("data.folds", "must sum to 1")),
]

RESOURCES = [
    Case(
        "four GPUs for a rank",
        lambda p: run(p, "sweep", "sweep.gpus_per_rank=4"),
        ("sweep.gpus_per_rank = 4 (override)", "a number in [0, 1]"),
    ),
    Case(
        "more GPUs than there are",
        lambda p: run(p, "sweep", "sweep.gpus_per_rank=1", "train.engine={ranks: 64}", "train.train_batch_size=64"),
        ("a trial needs 64 GPUs", "sweep.gpus_per_rank", "it can never start", "fix:"),
    ),
    Case(
        "more cores than there are",
        lambda p: run(p, "sweep", "sweep.cpus_per_rank=1000"),
        ("a trial needs 1000 CPU cores", "sweep.cpus_per_rank", "fix: set sweep.cpus_per_rank:"),
    ),
    Case("more cores, only asked", lambda p: run(p, "validate", "sweep.cpus_per_rank=1000"), ("a trial needs 1000 CPU cores", "fix:")),
]

USAGE = [
    Case("unknown command", lambda p: ["swep"], ("No such command 'swep'", "sweep")),
    Case("unknown option", lambda p: ["sweep", "a.yaml", "--dry"], ("No such option", "--dry-run")),
    Case("no configuration", lambda p: ["sweep"], ("Missing argument CONFIG", "unlearn sweep")),
    Case("recipe with a typo", lambda p: ["sweep", "zjuklb"], ("configuration file not found", 'did you mean "zjuklab"?')),
    Case(
        "unknown template",
        lambda p: ["init", "--template", "quikstart"],
        ('no template "quikstart"', 'did you mean "quickstart"?', "olmo-1b"),
    ),
    Case(
        "init overwrites nothing",
        lambda p: also(p.write("quickstart.yaml", "mine"), ["init", "--template", "quickstart"]),
        ("quickstart.yaml exists and is not overwritten", "fix: rename"),
    ),
    Case(
        "init writes both files or none",
        lambda p: also(p.write("cluster-k8s.yaml", "mine"), ["init", "--template", "quickstart", "--cluster", "k8s"]),
        ("cluster-k8s.yaml exists",),
    ),
]
