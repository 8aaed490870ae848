"""Every template loads, says what it reproduces and can be written by `unlearn init`; the guide to objectives is true to the code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.load import LoadedExperiment, load_experiment
from launcher.search_space import draw_trials
from launcher.templates import RECIPES, cluster_files, template_descriptions, template_listing, template_names, write_template
from trainers.config import ObjectiveConfig, ObjectiveName, Reduction, TrainConfig
from trainers.errors import InputError
from trainers.objectives.table import OBJECTIVES, unused_settings

ROOT = Path(launcher.__file__).parent
EXPERIMENTS = sorted((file for file in ROOT.rglob("*.yaml") if not file.name.startswith("cluster-")), key=lambda file: file.stem)
CLUSTERS = sorted(ROOT.rglob("cluster-*"))
STARTS = ["olmo-1b", "olmo-1b-16", "olmo-7b", "olmo-7b-16", "olmo-7b-full-zero3", "quickstart"]
PRESETS = [
    "ails-ntua", "ails-ntua-agad", "atyaephyra", "global-weight-modification", "mr-snuffleupagus", "semeval-ga", "semeval-gd",
    "semeval-kl", "semeval-npo", "sha256", "zjuklab", "zjuklab-over", "zjuklab-under",
]  # fmt: skip


def recipe(name: str, *overrides: str, one_trial: bool = False) -> LoadedExperiment:
    return load_experiment(RECIPES / f"{name}.yaml", overrides, require="one_trial" if one_trial else None)


def comments(name: str) -> list[str]:
    """The comment block at the head of a recipe, line by line."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]


def test_all_recipes_are_found() -> None:
    assert len(EXPERIMENTS) == 19
    assert [file.stem for file in EXPERIMENTS] == template_names() == sorted(STARTS + PRESETS)
    assert [file.name for file in CLUSTERS] == [
        "cluster-aws.yaml", "cluster-k8s.yaml", "cluster-onprem.yaml", "cluster-skypilot.yaml", "cluster-slurm.sh"
    ]  # fmt: skip
    assert list(cluster_files()) == ["aws", "k8s", "onprem", "skypilot", "slurm"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_loads_and_draws_all_its_trials(path: Path) -> None:
    loaded = load_experiment(path)
    config = loaded.config
    trials = draw_trials(
        base=config.train,
        space=loaded.space,
        start_points=config.sweep.start_points,
        num_trials=config.sweep.num_trials,
        search=config.sweep.search,
        seed=config.seed,
    )
    assert len(trials) == config.sweep.num_trials


@pytest.mark.parametrize("name", ["olmo-1b", "olmo-7b", "olmo-1b-16", "olmo-7b-16"])
def test_the_start_points_are_the_published_ones(name: str) -> None:
    """ZJUKLAB's Table 3 under the names of its code: weights of NPO, KL, CE and batch x accumulation. https://arxiv.org/abs/2503.21088

    How many pairs a pass takes changes no number; the recipes for clusters leave it to the planner.
    """
    loaded = load_experiment(RECIPES / f"{name}.yaml")
    sweep = loaded.config.sweep
    trials = draw_trials(base=loaded.config.train, space=loaded.space, start_points=sweep.start_points, num_trials=2, seed=1)
    rows = []
    for trial in trials:
        config, terms = trial.config, trial.config.objective
        assert config.lora is not None
        assert (config.learning_rate, config.num_train_epochs, config.warmup_ratio, config.weight_decay) == (1e-4, 5, 0.2, 0.01)
        assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout, config.max_length) == (32, 32, 0.05, 512)
        assert terms.reduction is Reduction.TOKEN_MEAN
        weights = (terms.forget_weight, terms.retain_kl_weight, terms.retain_ce_weight)
        rows.append((*weights, config.per_device_train_batch_size, config.train_batch_size))
    first, second = (None, None) if name.endswith("-16") else (1, 2)
    assert rows == [(0.4, 0.4, 0.2, first, 4), (0.3, 0.3, 0.4, second, 8)]


@pytest.mark.parametrize(("name", "trials"), [("olmo-1b-16", 16), ("olmo-7b-16", 16), ("olmo-7b-full-zero3", 8)])
def test_a_cluster_recipe_leaves_the_sharding_to_the_planner(name: str, trials: int) -> None:
    """Full parameters need their weights split, which is said; over how many ranks is not. The negative control is `olmo-7b`."""
    config = recipe(name).config
    assert config.name == name
    assert config.sweep.num_trials == trials
    assert (config.train.engine.ranks, config.train.per_device_train_batch_size) == (None, None)
    assert (config.train.lora is None, config.train.engine.zero_stage) == ((True, 3) if "full" in name else (False, None))
    assert recipe("olmo-7b").config.train.engine.ranks == 2


def test_a_recipe_is_found_by_its_name_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_experiment(Path("olmo-7b-16"), ["seed=7"]).config.seed == 7
    with pytest.raises(InputError, match="configuration file not found"):
        load_experiment(Path("olmo-7b-15"))
    (tmp_path / "olmo-7b-16").write_text("name: mine\nmodel: {model_name_or_path: m}\ndata: {path: d}\n")
    assert load_experiment(Path("olmo-7b-16")).config.name == "mine"


# ---- presets: published systems


@pytest.mark.parametrize("name", [*STARTS, *PRESETS])
def test_the_first_line_describes_the_recipe(name: str) -> None:
    first = comments(name)[0]
    assert re.fullmatch(r"# [A-Z].{20,105}\.", first)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_its_source_and_every_deviation(name: str) -> None:
    """Both stand in the head comment. None of the systems is reproduced without at least three."""
    lines = comments(name)
    (source,) = [line for line in lines if line.startswith("# Source: ")]
    assert "https://" in source
    start = next(index for index, line in enumerate(lines) if line.startswith("# Deviations:"))
    deviations = [line for line in lines[start + 1 :] if line.startswith("# - ")]
    assert len(deviations) >= 3
    assert not any(line.startswith(("# Source:", "# Deviations:")) for other in STARTS for line in comments(other))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_one_trial_on_one_rank_whose_paths_and_rate_can_be_replaced(name: str) -> None:
    """What `unlearn train NAME.yaml model.model_name_or_path=... data.path=... train.learning_rate=...` needs, the sweep included."""
    skeleton = recipe("olmo-7b").config
    config = recipe(name).config
    assert (config.name, config.storage_path) == (name, "runs")
    assert (config.model, config.data) == (skeleton.model, skeleton.data)
    assert config.train.engine.ranks == 1
    assert config.sweep.num_trials == (2 if name == "zjuklab" else 1)
    loaded = recipe(name, "model.model_name_or_path=m", "data.path=d", "train.learning_rate=3e-3", one_trial=True)
    assert not loaded.space
    assert (loaded.config.model.model_name_or_path, loaded.config.data.path, loaded.config.train.learning_rate) == ("m", "d", 3e-3)


ZJUKLAB = {
    "objective.name": "npo_ce_kl", "objective.beta": 0.1, "objective.reduction": "token_mean", "objective.average": "sequence",
    "objective.kl_scope": "padded", "learning_rate": 1e-4, "num_train_epochs": 5, "warmup_ratio": 0.2, "lr_scheduler_type": "linear",
    "weight_decay": 0.01, "seed": 42, "lora.r": 32, "lora.lora_alpha": 32, "lora.lora_dropout": 0.05, "lora.target_modules": "all-linear",
}  # fmt: skip
TOFU = {
    "lora": None, "trainable.modules": [], "learning_rate": 1e-5, "num_train_epochs": 10, "train_batch_size": 32, "warmup_ratio": 0.1,
    "lr_scheduler_type": "linear", "weight_decay": 0.01, "seed": 42,
}  # fmt: skip
HF_TRAINER = {"warmup_ratio": 0.0, "lr_scheduler_type": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0}
CONSTANT_RATE = {"warmup_ratio": 0.0, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1e6}
PUBLISHED: dict[str, dict[str, Any]] = {
    # Table 3 of https://arxiv.org/abs/2503.21088 under the names of its code: "gd" weighs KL, "gk" weighs cross-entropy.
    "zjuklab-over": ZJUKLAB | {
        "objective.forget_weight": 0.4, "objective.retain_kl_weight": 0.4, "objective.retain_ce_weight": 0.2,
        "train_batch_size": 4, "per_device_train_batch_size": 1,
    },
    "zjuklab-under": ZJUKLAB | {
        "objective.forget_weight": 0.3, "objective.retain_kl_weight": 0.3, "objective.retain_ce_weight": 0.4,
        "train_batch_size": 8, "per_device_train_batch_size": 2,
    },
    # The organisers' timing run (https://llmunlearningsemeval2025.github.io) and TOFU's defaults (https://github.com/locuslab/tofu).
    "semeval-ga": TOFU | {"objective.name": "grad_ascent", "objective.forget_weight": 1},
    "semeval-gd": TOFU | {"objective.name": "grad_diff", "objective.forget_weight": 1, "objective.retain_ce_weight": 1},
    "semeval-kl": TOFU | {
        "objective.name": "kl_min", "objective.forget_weight": 1, "objective.retain_kl_weight": 1, "objective.kl_scope": "padded",
        "max_length": 500,
    },
    "semeval-npo": TOFU | {
        "objective.name": "npo", "objective.beta": 0.1, "objective.forget_weight": 1, "objective.reduction": "sequence_sum",
    },
    # A class of methods, not a system: TOFU's settings with its own 5 epochs.
    "global-weight-modification": TOFU | {
        "objective.name": "grad_diff", "objective.forget_weight": 1, "objective.retain_ce_weight": 1, "objective.retain_kl_weight": 1,
        "num_train_epochs": 5, "warmup_ratio": 0.2,
    },
    # https://github.com/iraklis07/llm-unlearning, configs/sequential_args.json on eight GPUs, configs/alternating_args.json
    "ails-ntua": HF_TRAINER | {
        "objective.name": "grad_diff", "objective.average": "sequence", "lora": None, "trainable.last_layers": 8,
        "trainable.embeddings": True, "schedule.name": "chunked", "schedule.chunk_size": 32, "schedule.retain_per_forget": 7,
        "schedule.shuffle": False, "learning_rate": 1e-5, "num_train_epochs": 7, "train_batch_size": 1,
    },
    "ails-ntua-agad": HF_TRAINER | {
        "objective.name": "grad_diff", "objective.average": "token", "lora.r": 16, "lora.lora_alpha": 32, "lora.lora_dropout": 0.0,
        "lora.target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "schedule.name": "alternating", "schedule.chunk_size": 64,
        "schedule.annealing_fraction": 0.25, "schedule.annealing_epochs": 3, "schedule.final_annealing": True,
        "learning_rate": 5e-5, "num_train_epochs": 3, "train_batch_size": 16,
    },
    # https://github.com/LAB-FLAIR/Constrained-Unlearning-for-LLM, unlearn.py: 12 x 10 rows drawn from two sets of about the same size
    "sha256": HF_TRAINER | {
        "objective.name": "grad_diff", "objective.forget_weight": 1, "objective.retain_ce_weight": 1, "lora": None,
        "trainable.modules": ["gate_proj", "up_proj", "down_proj"], "trainable.layers": [0, 5], "adaptive_retain.scale": 0.3,
        "adaptive_retain.base": 6, "adaptive_retain.offset": 0.8, "adaptive_retain.lowest": 1.2, "adaptive_retain.highest": 2.8,
        "learning_rate": 1.5e-5, "num_train_epochs": 8, "train_batch_size": 12 * 10 // 2,
    },
    # https://github.com/XelfXendr/peft_unlearning, src/unlearn.py: 4 rows drawn from both sets
    "atyaephyra": CONSTANT_RATE | {
        "objective.name": "npo_ce_kl", "objective.beta": 0.5, "objective.forget_weight": 1, "objective.retain_ce_weight": 1,
        "objective.retain_kl_weight": 0.5, "lora.r": 5, "lora.lora_alpha": 5, "lora.lora_dropout": 0.0,
        "lora.target_modules": ["q_proj", "v_proj"], "learning_rate": 1e-4, "num_train_epochs": 20, "train_batch_size": 4 // 2,
    },
    # https://github.com/ArjunDosajh/Mr.Snuffleupagus-SemEval-2025-Task-4, unlearn_submission.py: 12 forget and 12 retain rows
    "mr-snuffleupagus": CONSTANT_RATE | {
        "objective.name": "adaptive_rmu", "objective.layer": 26, "objective.steering": 5, "objective.retain_activation_weight": 900,
        "lora": None, "trainable.modules": ["down_proj"], "trainable.layers": [24, 26], "learning_rate": 5e-5,
        "num_train_epochs": 100, "train_batch_size": 12,
    },
}  # fmt: skip


def settings(train: TrainConfig) -> dict[str, Any]:
    """Every setting by its dotted path, sections included."""
    found: dict[str, Any] = {}

    def walk(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            found[prefix + name] = value
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")

    walk(train.model_dump(mode="json"), "")
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_settings(name: str) -> None:
    actual = settings(recipe(name).config.train)
    assert {path: actual[path] for path in PUBLISHED[name]} == PUBLISHED[name]


def test_every_preset_is_compared_with_what_was_published() -> None:
    assert sorted([*PUBLISHED, "zjuklab"]) == PRESETS


def test_zjuklab_is_exactly_its_two_runs_and_one_merge() -> None:
    """The sweep's trials are the two single presets, and the pair search has one point: TIES at density 0.8 and scale 1."""
    loaded = recipe("zjuklab")
    config = loaded.config
    trials = draw_trials(base=config.train, space=loaded.space, start_points=config.sweep.start_points, num_trials=2, seed=config.seed)
    assert [trial.config for trial in trials] == [recipe(name).config.train for name in ("zjuklab-over", "zjuklab-under")]
    assert (config.merge.method, config.merge.density, config.merge.scale, config.merge.weights) == ("ties", 0.8, 1.0, None)
    pairs = config.pairs
    assert (pairs.max_pairs, pairs.finalists, pairs.densities, pairs.calibrated) == (1, 1, (0.8,), 0)


def test_the_weights_of_ails_ntua_give_the_mean_over_eight_rows() -> None:
    """One forget row of cross-entropy f and seven retain rows r_1 to r_7, each loss times its factor, -1 or 0.5:

    mean = (-f + 0.5 * (r_1 + ... + r_7)) / 8 = 1/8 * (-f) + 7/16 * mean(r) = 0.125 * (-f) + 0.4375 * mean(r)
    """
    objective = recipe("ails-ntua").config.train.objective
    forget, retain = 3.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    expected = (-forget + sum(0.5 * loss for loss in retain)) / 8
    assert objective.forget_weight is not None
    assert objective.retain_ce_weight is not None
    actual = objective.forget_weight * -forget + objective.retain_ce_weight * sum(retain) / 7
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [*STARTS, *PRESETS])
def test_no_recipe_has_a_setting_without_effect(name: str) -> None:
    """A setting that an objective does not read would be a claim that is not kept. The negative control: beta under gradient ascent."""
    assert unused_settings(recipe(name).config.train.objective) == ()
    control = ObjectiveConfig(name=ObjectiveName.GRAD_ASCENT, beta=0.1)
    assert unused_settings(control) == ("beta",)


def test_the_variants_in_comments_load() -> None:
    """Overrides that the comments offer, for other sizes of model and other members of a family."""
    found = 0
    for name in PRESETS:
        overrides = re.findall(r"train\.[a-z_.]+=(?:\[[\d,]+\]|[\d.]*\d)", "\n".join(comments(name)))
        found += len(overrides)
        for override in overrides:
            recipe(name, override)
    assert found >= 15
    train = recipe(
        "mr-snuffleupagus", "train.objective.layer=14", "train.trainable.layers=[12,14]", "train.objective.steering=3"
    ).config.train
    assert (train.objective.layer, train.trainable.layers) == (14, (12, 14))


# ---- the listing


def test_descriptions_are_grouped_by_whether_a_system_is_reproduced() -> None:
    assert list(template_descriptions(published=False)) == STARTS
    assert list(template_descriptions(published=True)) == PRESETS
    assert template_descriptions(published=True)["zjuklab"].startswith("ZJUKLAB, 2nd on 7B")


def test_the_listing_shows_every_template_once_with_its_description() -> None:
    starts, published, end = template_listing().split("\n\n")
    assert [line.split()[0] for line in starts.splitlines()[1:]] == STARTS
    assert [line.split()[0] for line in published.splitlines()[1:]] == PRESETS
    assert all(len(line.split("  ", 2)[2].strip()) > 20 for line in starts.splitlines()[1:])
    assert "--template NAME" in end


# ---- `unlearn init`; the cluster files themselves: test_cluster_files.py


def test_init_writes_a_file_that_loads(tmp_path: Path) -> None:
    written = write_template("olmo-7b", cluster="slurm", folder=tmp_path)
    assert [path.name for path in written] == ["olmo-7b.yaml", "cluster-slurm.sh"]
    assert load_experiment(tmp_path / "olmo-7b.yaml").config.train.engine.zero_stage == 3


def test_a_cluster_file_can_be_written_alone(tmp_path: Path) -> None:
    assert [path.name for path in write_template(None, cluster="k8s", folder=tmp_path)] == ["cluster-k8s.yaml"]


def test_what_a_cluster_file_needs_beside_it_is_written_once(tmp_path: Path) -> None:
    written = write_template(None, cluster="aws", folder=tmp_path)
    assert [path.name for path in written] == ["cluster-aws.yaml", "submit.py", ".rayignore"]
    assert (tmp_path / "submit.py").read_text() == (ROOT / "submit.py").read_text()
    (tmp_path / ".rayignore").write_text("mine")
    assert [path.name for path in write_template(None, cluster="onprem", folder=tmp_path)] == ["cluster-onprem.yaml"]
    assert (tmp_path / ".rayignore").read_text() == "mine"


def test_init_overwrites_nothing_and_then_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "cluster-aws.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"cluster-aws\.yaml exists"):
        write_template("olmo-1b", cluster="aws", folder=tmp_path)
    assert os.listdir(tmp_path) == ["cluster-aws.yaml"]
    assert (tmp_path / "cluster-aws.yaml").read_text() == "mine"


def test_an_unknown_template_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="olmo-1b, olmo-1b-16, olmo-7b") as caught:
        write_template("olmo1b", folder=tmp_path)
    assert 'did you mean "olmo-1b"?' in str(caught.value)
    with pytest.raises(InputError, match="aws, k8s, onprem, skypilot, slurm"):
        write_template("olmo-1b", cluster="azure", folder=tmp_path)
    assert os.listdir(tmp_path) == []


# ---- docs/objectives.md


GUIDE = ROOT.parent / "docs" / "objectives.md"


def defaults_in_words(name: ObjectiveName) -> str:
    """Published settings as the guide writes them: `beta` 0.1, forget 0.4, CE 0.2, KL 0.4."""
    info = OBJECTIVES[name]
    values = [(f"`{field}`", getattr(info, field)) for field in ("beta", "beta_2", "steering", "negation_scale")]
    weights = info.weights
    values += [("forget", weights.forget), ("CE", weights.retain_ce), ("KL", weights.retain_kl), ("activation", weights.retain_activation)]
    return ", ".join(f"{word} {value:g}" for word, value in values if value)


@pytest.mark.skipif(not GUIDE.exists(), reason="the guide is part of the repository, not of the installed package")
def test_the_guide_lists_every_objective_with_its_defaults_and_source() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in GUIDE.read_text(encoding="utf-8").splitlines()]
    listed = {row[0].strip("`"): row for row in rows if len(row) == 6 and row[0].startswith("`")}
    assert list(listed) == [name.value for name in ObjectiveName]
    for name in ObjectiveName:
        assert listed[name.value][3] == defaults_in_words(name)
        assert listed[name.value][5] == OBJECTIVES[name].source


@pytest.mark.skipif(not GUIDE.exists(), reason="the guide is part of the repository, not of the installed package")
def test_the_guide_names_every_preset() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert [name for name in PRESETS if f"`{name}`" not in text and f"`{name.removeprefix('semeval')}`" not in text] == []
