"""Everything a process prints, into one file: also what libraries write past Python."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def capture_output(path: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 and all logging of this process to a file, appended, until the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    try:
        with open(path, "ab", buffering=0) as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        handler.setStream(open(2, "w", closefd=False))  # noqa: SIM115  # the descriptor outlives the wrapper
        logging.getLogger().addHandler(handler)
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


def last_lines(path: Path, *, count: int = 20) -> Sequence[str]:
    """The last lines of a log, or none if there is no log."""
    if not Path(path).exists():
        return []
    return Path(path).read_bytes()[-20_000:].decode("utf-8", "replace").splitlines()[-count:]


def quiet_libraries() -> None:
    """Progress bars and advice of libraries stay out of what a run prints."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu") if not _has_gpu() else None
    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
