"""Connecting to a Ray cluster, or starting a private one, and what is asked of its nodes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from trainers.errors import SetupError


@dataclass
class _Connection:
    """This process's connection: how many callers hold it, and whether it is theirs to end."""

    holders: int = 0
    is_ours: bool = False


_connection = _Connection()


def start_ray(*, cpus: int) -> dict[str, float]:
    """Connect to the cluster in RAY_ADDRESS, or start a private one on this machine; its resources.

    Where this process is connected already, it stays so until the last ``stop_ray``.

    Raises:
        SetupError: if neither works.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Tune's own handler ends the trials on Ctrl-C and returns as if they had finished; the run must stop instead.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    import logging

    import ray

    if ray.is_initialized():
        _connection.holders += 1
        return dict(ray.cluster_resources())
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise SetupError(
            f"Ray does not start: {str(error).splitlines()[0]}",
            where=f"RAY_ADDRESS={address}" if address else "this machine",
            fix="unlearn doctor tells more"
            + (
                ", set RAY_AUTH_MODE=token if the cluster was started with a token, or unset RAY_ADDRESS to compute on this machine only"
                if address
                else ""
            ),
        ) from error
    _connection.holders, _connection.is_ours = 1, True
    return dict(ray.cluster_resources())


def stop_ray() -> None:
    """Disconnect, unless a caller further out still needs the connection; a private cluster ends with it."""
    import ray

    _connection.holders -= 1
    if _connection.holders <= 0:
        if _connection.is_ours and ray.is_initialized():
            ray.shutdown()
        _connection.holders, _connection.is_ours = 0, False
