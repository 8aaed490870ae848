"""Every template loads, can be drawn from and can be written by `unlearn init`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import launcher
from launcher.load import load_experiment
from launcher.problems import looks_secret
from launcher.search_space import draw_trials
from launcher.templates import RECIPES, cluster_files, template_names, write_template
from trainers.config import Reduction
from trainers.errors import InputError

ROOT = Path(launcher.__file__).parent
EXPERIMENTS = sorted(file for file in ROOT.rglob("*.yaml") if not file.name.startswith("cluster-"))
CLUSTERS = sorted(ROOT.rglob("cluster-*"))


def test_all_recipes_are_found() -> None:
    assert [file.stem for file in EXPERIMENTS] == template_names() == ["olmo-1b", "olmo-7b", "quickstart"]
    assert [file.name for file in CLUSTERS] == ["cluster-aws.yaml", "cluster-k8s.yaml", "cluster-onprem.yaml", "cluster-slurm.sh"]
    assert list(cluster_files()) == ["aws", "k8s", "onprem", "slurm"]


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


@pytest.mark.parametrize("name", ["olmo-1b", "olmo-7b"])
def test_the_start_points_are_the_published_ones(name: str) -> None:
    """ZJUKLAB's Table 3 under the names of its code: weights of NPO, KL, CE and batch x accumulation. https://arxiv.org/abs/2503.21088"""
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
    assert rows == [(0.4, 0.4, 0.2, 1, 4), (0.3, 0.3, 0.4, 2, 8)]


@pytest.mark.parametrize("path", [path for path in CLUSTERS if path.suffix == ".yaml"], ids=lambda path: path.stem)
def test_a_cluster_file_is_yaml_without_keys(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    assert not any(looks_secret(word) for word in text.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_slurm_script_is_bash() -> None:
    done = subprocess.run(["bash", "-n", str(cluster_files()["slurm"])], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_init_writes_a_file_that_loads(tmp_path: Path) -> None:
    written = write_template("olmo-7b", cluster="slurm", folder=tmp_path)
    assert [path.name for path in written] == ["olmo-7b.yaml", "cluster-slurm.sh"]
    assert load_experiment(tmp_path / "olmo-7b.yaml").config.train.engine.zero_stage == 3


def test_init_overwrites_nothing_and_then_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "cluster-aws.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"cluster-aws\.yaml exists"):
        write_template("olmo-1b", cluster="aws", folder=tmp_path)
    assert os.listdir(tmp_path) == ["cluster-aws.yaml"]
    assert (tmp_path / "cluster-aws.yaml").read_text() == "mine"


def test_an_unknown_template_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="olmo-1b, olmo-7b, quickstart") as caught:
        write_template("olmo1b", folder=tmp_path)
    assert 'did you mean "olmo-1b"?' in str(caught.value)
    with pytest.raises(InputError, match="aws, k8s, onprem, slurm"):
        write_template("olmo-1b", cluster="azure", folder=tmp_path)
    assert os.listdir(tmp_path) == []
