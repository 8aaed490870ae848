"""What of a run is shown in Weights & Biases and TensorBoard; it changes nothing that a run computes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainers.config import Frozen


class TrackingConfig(Frozen):
    """Where curves and scores are shown besides the run folder."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto",
        description="Weights & Biases: auto is online where this machine has a key and offline where it has none; offline runs are "
        "uploaded by `unlearn sync RUN`",
    )
    project: str | None = Field(None, min_length=1, description="W&B project; null: WANDB_PROJECT, or unlearning")
    entity: str | None = Field(None, min_length=1, description="W&B team or user; null: the key's own")
    tags: tuple[str, ...] = Field((), description="W&B tags of every run of the sweep")
    tensorboard: bool = Field(False, description="write TensorBoard event files to RUN/tracking/tensorboard as well")
