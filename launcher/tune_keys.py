"""Keeping keys out of what Ray writes down."""

from __future__ import annotations


def keep_keys_out_of_trials() -> None:
    """Stop Tune from copying the driver's keys into the ``runtime_env`` of its trials, which Ray writes to its logs in plain text.

    Trials have the environment of their node: on a private cluster this is the driver's own. Tune copies AWS keys whatever the storage is
    (``ENV_VARS_TO_PROPAGATE`` in https://github.com/ray-project/ray/blob/master/python/ray/tune/execution/class_cache.py), and has no
    setting for it.
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}
