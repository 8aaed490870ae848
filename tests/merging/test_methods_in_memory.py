"""Every method on a resident model is the checkpoint that would be written."""

from __future__ import annotations

import pytest
import torch

from merging.config import MergeConfig
from merging.in_memory import MergeSession
from merging.merge import merge_checkpoint
from merging.methods.table import METHODS
from merging.task_vectors import open_task_vector
from tests.helpers.merge_models import write_base, write_lora
from trainers.errors import InputError
from trainers.modeling import load_model

torch.set_num_threads(1)
CONFIGS = [MergeConfig(method=method, scale=1.3) for method in METHODS] + [
    MergeConfig(convention="paper", density=0.3),
    MergeConfig(convention="mergekit", weights=(0.6, 0.4)),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("resident")
    base = write_base(root / "base")
    for number, settings in ((1, {}), (2, {}), (3, {"r": 2, "targets": ["q_proj"]})):
        write_lora(root / f"trial-{number}", base=base, seed=number, **settings)
    return root


def test_every_method_in_memory_equals_the_file_bit_for_bit(root, tmp_path):
    model = load_model(root / "base", dtype="bfloat16")
    vectors = [open_task_vector(base=root / "base", trial=root / f"trial-{number}") for number in (1, 2, 3)]
    session = MergeSession(model=model, base=root / "base", vectors=vectors)
    for number, config in enumerate(CONFIGS):
        pair = ("trial-1", "trial-2" if config.method == "seed" or number % 2 else "trial-3")
        merge_checkpoint(base=root / "base", trials=[root / trial for trial in pair], out=tmp_path / str(number), config=config)
        session.apply(pair, config)
        expected = load_model(tmp_path / str(number), dtype="bfloat16").state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()), config.formula()
    with pytest.raises(InputError, match="equal ranks"):
        session.apply(("trial-1", "trial-3"), MergeConfig(method="seed"))
