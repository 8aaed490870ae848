"""Does a model prefer the right answer to wrong ones of the same form?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def truth_ratio(*, right_loss: float, wrong_losses: Sequence[float]) -> float:
    """R = p(wrong answers) / p(paraphrased right answer), >= 0: below 1 the model prefers the right one.

    p is exp(-mean token loss), and that of the wrong answers their geometric mean, exp(-mean over them of the mean token loss), as in
    the aggregation and forget quality of the published code. The paper's formula, and one function of that code, average the
    probabilities instead; the geometric mean is never larger.

    Args:
        right_loss: mean token loss of the paraphrased right answer (of the answer, where there is no paraphrase), nats.
        wrong_losses: the same of each wrong answer, at least one.

    Returns:
        The ratio; infinite where it overflows, NaN where a loss is NaN.

    Source: Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121, and https://github.com/locuslab/tofu (aggregate_eval_stat.py)
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.exp(right_loss - np.mean(np.asarray(wrong_losses, dtype=np.float64))))


def forget_truth(ratio: float) -> float:
    """min(R, 1 / R), in [0, 1]: 1 where right and wrong are equally likely, which is what forgetting should look like.

    Source: TOFU, https://arxiv.org/abs/2401.06121. open-unlearning adds 1e-10 to the denominators.
    """
    if math.isnan(ratio) or ratio in (0.0, math.inf):
        return math.nan if math.isnan(ratio) else 0.0
    return min(ratio, 1 / ratio)


def retain_truth(ratio: float) -> float:
    """max(0, 1 - R), in [0, 1]: high where the right answer is much more likely.

    Source: TOFU, https://arxiv.org/abs/2401.06121
    """
    return math.nan if math.isnan(ratio) else max(0.0, 1 - ratio)


def truth_share(ratio: float) -> float:
    """p(right) / (p(right) + p(wrong)) = 1 / (1 + R), in [0, 1]: 1/2 where the model has no preference.

    The later variant, which falls with forgetting on every set. Not comparable with the two above.

    Source: Dorna et al. 2025 (OpenUnlearning), https://arxiv.org/abs/2506.12618
    """
    return 1 / (1 + ratio)
