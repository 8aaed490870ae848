"""Whether a sweep talks to Weights & Biases, decided before anything starts."""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from launcher.tracking.config import TrackingConfig
from trainers.errors import InputError

Mode = Literal["online", "offline", "off"]

_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Names of W&B's own server: what wandb asks first depends on its version, and it looks for a key under both."""
_FIX = "set WANDB_API_KEY in the environment or run `wandb login`"
_WORDS: dict[str, Mode] = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
"""What WANDB_MODE may say (https://docs.wandb.ai/guides/track/environment-variables)."""


def resolve_mode(tracking: TrackingConfig, *, environment: Mapping[str, str]) -> Mode:
    """Online, offline or off.

    ``auto`` follows WANDB_MODE where it is set, and else the key: online with one, offline without.

    Raises:
        InputError: if the run is to be online and there is no key.
    """
    has_key = has_wandb_key(environment)
    if tracking.wandb != "auto":
        where, mode = "tracking.wandb: online", tracking.wandb
    elif (word := environment.get("WANDB_MODE", "").lower()) in _WORDS:
        where, mode = f"WANDB_MODE={word}", _WORDS[word]
    else:
        return "online" if has_key else "offline"
    if mode == "online" and not has_key:
        raise InputError("no Weights & Biases key on this machine", where=where, fix=f"{_FIX}; or use tracking.wandb=offline")
    return mode


def has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B would find a key here: in the environment, or in the netrc file under the server's name. The key itself is not kept."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(environment.get("HOME") or "~").expanduser()
    files = [Path(environment["NETRC"]).expanduser()] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    hosts = (urlsplit(environment["WANDB_BASE_URL"]).netloc,) if environment.get("WANDB_BASE_URL") else _HOSTS
    for file in files:
        try:
            known = netrc.netrc(str(file))
            if any(known.authenticators(host) for host in hosts):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
