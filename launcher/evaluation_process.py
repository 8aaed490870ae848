"""One of several processes that evaluate a model side by side: computes its shard into the shared store, and ends."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Compute a shard; the arguments are those that ``EvaluationProcesses`` gives."""
    import torch

    from eval.parts import Shard, UnitStore
    from eval.runner import evaluate_shard
    from launcher.logs import quiet_libraries
    from launcher.plugins import use_named
    from launcher.scoring import EvaluationInputs
    from trainers.distributed import Rank

    inputs = EvaluationInputs.from_json(arguments[0])
    folder, identity = Path(arguments[1]), json.loads(arguments[2])
    index, count, threads, parent = map(int, arguments[3:])
    quiet_libraries()
    use_named(inputs.plugins)
    torch.set_num_threads(threads)
    device = Rank(local_rank=index % max(1, torch.cuda.device_count())).device
    loaded = inputs.load()
    evaluate_shard(
        model=loaded.load_model(device),
        tokenizer=loaded.tokenizer,
        data=loaded.data,
        attack=loaded.attack,
        mmlu=loaded.mmlu,
        config=inputs.config,
        store=UnitStore(folder, identity=identity),
        shard=Shard(index, count),
        device=device,
        # Nobody would read the results of a process whose parent was killed.
        keep_going=lambda: os.getppid() == parent,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
