"""The published recipe's merge: both adapters combined factor by factor inside peft, folded into the weights, saved.

Written from the paper (https://arxiv.org/abs/2503.21088) and from what its public code is known to call; no code of it is used. The
model is loaded once and in its stored type, which is the cheaper choice.

    python benchmarks/arms/merge_recipe.py BASE TRIAL TRIAL OUT DENSITY
"""

from __future__ import annotations

import sys
from typing import Any


def main() -> None:
    """Load, combine, fold, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, first, second, out, density = sys.argv[1:]
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], adapter_name="merge", combination_type="ties", density=float(density))
    model.set_adapter("merge")
    model.merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    main()
