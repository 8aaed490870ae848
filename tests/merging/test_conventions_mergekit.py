"""The same merges as mergekit makes, where both have them. mergekit runs as a program of its own environment.

UNLEARN_MERGEKIT names its ``mergekit-yaml``, for instance in an environment with ``mergekit==0.1.4 transformers==4.57.1``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merging.config import MergeConfig
from merging.merge import merge_checkpoint
from tests.helpers.merge_models import write_base, write_full

MERGEKIT = os.environ.get("UNLEARN_MERGEKIT")
pytestmark = [
    pytest.mark.skipif(not MERGEKIT, reason="UNLEARN_MERGEKIT does not name a mergekit-yaml"),
    pytest.mark.slow,
]
torch.set_num_threads(1)

SAME = {
    "ties": (
        {"merge_method": "ties", "parameters": {"normalize": True}},
        {"density": 0.5},
        (1.0, 1.0),
        {"convention": "mergekit", "density": 0.5},
        0.0,
    ),
    "ties, weights and lambda": (
        {"merge_method": "ties", "parameters": {"normalize": True, "lambda": 1.3}},
        {"density": 0.3},
        (0.6, 0.4),
        {"convention": "mergekit", "density": 0.3, "scale": 1.3},
        0.0,
    ),
    "task_arithmetic": (
        {"merge_method": "task_arithmetic", "parameters": {"normalize": False}},
        {},
        (0.6, -0.2),
        {"method": "task_arithmetic"},
        0.0,
    ),
    "breadcrumbs": (
        {"merge_method": "breadcrumbs", "parameters": {"normalize": False}},
        {"density": 0.5, "gamma": 0.1},
        (0.6, 0.2),
        {"method": "breadcrumbs", "density": 0.5, "gamma": 0.1},
        0.0,
    ),
    # These two add in another order: the last float32 bit of weights of about 0.02.
    "linear": ({"merge_method": "linear"}, {}, (0.6, 0.2), {"method": "linear"}, 1e-8),
    "nuslerp": ({"merge_method": "nuslerp"}, {}, (0.6, 0.2), {"method": "slerp"}, 1e-8),
}  # fmt: skip
"""mergekit's recipe, its settings per model, weights, our settings, and the largest difference allowed."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mergekit")
    base = write_base(root / "base", dtype=torch.float32)
    for number in (1, 2):
        write_full(root / f"trial-{number}", base=base, seed=number)
    return root


def _mergekit(root: Path, recipe: dict, *, weights: tuple[float, ...], settings: dict) -> dict[str, torch.Tensor]:
    models = [
        {"model": str(root / f"trial-{number}"), "parameters": {"weight": weight, **settings}}
        for number, weight in enumerate(weights, start=1)
    ]
    base = {} if recipe["merge_method"] == "linear" else {"base_model": str(root / "base")}
    # YAML is a superset of JSON.
    (root / "recipe.yml").write_text(json.dumps({**recipe, **base, "models": models, "dtype": "float32"}))
    environment = {"PATH": os.environ["PATH"], "HOME": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    assert MERGEKIT
    command = [MERGEKIT, str(root / "recipe.yml"), str(root / "made"), "--random-seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    tensors = {name: value for file in (root / "made").glob("*.safetensors") for name, value in load_file(file).items()}
    shutil.rmtree(root / "made")
    return tensors


def _ours(root: Path, out: Path, trials: int = 2, **settings) -> dict[str, torch.Tensor]:
    paths = [root / f"trial-{number}" for number in range(1, trials + 1)]
    merge_checkpoint(base=root / "base", trials=paths, out=out, config=MergeConfig(**settings))
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("case", list(SAME))
def test_the_merged_weights_are_mergekits(root, tmp_path, case):
    """float32 throughout. The control: with a method or a density that differs, thousands of weights do."""
    recipe, settings, weights, ours, tolerance = SAME[case]
    theirs = _mergekit(root, recipe, weights=weights, settings=settings)
    actual = _ours(root, tmp_path / "out", weights=weights, **ours)
    assert set(actual) == set(theirs)
    for name, value in actual.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance)
    control = {"method": "task_arithmetic" if case != "task_arithmetic" else "linear", "weights": (1.0, 1.0)}
    other = _ours(root, tmp_path / "other", **control)
    assert sum(int(((other[name] - theirs[name]).abs() > 1e-4).sum()) for name in other) > 5000


@pytest.mark.parametrize(
    ("recipe", "settings", "ours"),
    [
        ("dare_linear", {"density": 0.4}, {"method": "dare_linear", "density": 0.4, "rescale": "l1"}),
        ("dare_ties", {"density": 0.4}, {"method": "dare_ties", "density": 0.4, "rescale": "l1"}),
        ("della", {"density": 0.4, "epsilon": 0.3}, {"method": "della", "density": 0.4, "epsilon": 0.3, "rescale": "l1"}),
    ],
)
def test_random_methods_drop_and_rescale_as_mergekit_does(root, tmp_path, recipe, settings, ours):
    """One trial, other masks: the same share of small and of large elements is kept (two halves of 7,296, four standard errors are 0.02),
    and the L1 norm of every tensor is that of the trial."""
    theirs = _mergekit(
        root, {"merge_method": recipe, "parameters": {"normalize": False, "rescale": True}}, weights=(1.0,), settings=settings
    )
    made = {"theirs": theirs, "ours": _ours(root, tmp_path / "out", trials=1, **ours)}
    base, trial = (load_file(root / name / "model.safetensors") for name in ("base", "trial-1"))
    shares: dict[str, list[float]] = {}
    for side, tensors in made.items():
        small, large = [], []
        for name, before in base.items():
            update, kept = trial[name] - before, tensors[name] - before
            assert float(kept.abs().sum()) == pytest.approx(float(update.abs().sum()), rel=2e-3)
            middle = update.abs().median(dim=-1, keepdim=True).values
            small.append((kept != 0)[update.abs() <= middle])
            large.append((kept != 0)[update.abs() > middle])
        shares[side] = [float(torch.cat(half).float().mean()) for half in (small, large)]
    assert shares["ours"] == pytest.approx(shares["theirs"], abs=0.03)
    expected = [0.25, 0.55] if recipe == "della" else [0.4, 0.4]
    assert shares["ours"] == pytest.approx(expected, abs=0.03)
