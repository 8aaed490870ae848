"""What the tests of the guides share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.documents.scene import Prototypes


@pytest.fixture(scope="session")
def prototypes(tmp_path_factory: pytest.TempPathFactory) -> Prototypes:
    """Models, trials, data and a run, made once."""
    return Prototypes.make(tmp_path_factory.mktemp("prototypes"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Commands set torch's threads for their whole process, which here is that of the tests."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
