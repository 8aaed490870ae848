"""Online, offline or off: settled by settings, environment and netrc before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.tracking.config import TrackingConfig
from launcher.tracking.mode import has_wandb_key, resolve_mode
from trainers.errors import InputError

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("wanted", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_IDENTITY_TOKEN_FILE": "/run/token"}, "online"),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "off"),
        ("auto", {"WANDB_MODE": "online", "WANDB_API_KEY": KEY}, "online"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "online"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline"),
        ("off", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "off"),
    ],
)
def test_the_setting_counts_then_the_environment_then_the_key(tmp_path: Path, wanted: str, environment: dict[str, str], mode: str) -> None:
    assert resolve_mode(TrackingConfig(wandb=wanted), environment={"HOME": str(tmp_path), **environment}) == mode


@pytest.mark.parametrize(("wanted", "environment"), [("online", {}), ("auto", {"WANDB_MODE": "online"})])
def test_online_without_a_key_is_refused(tmp_path: Path, wanted: str, environment: dict[str, str]) -> None:
    with pytest.raises(InputError) as caught:
        resolve_mode(TrackingConfig(wandb=wanted), environment={"HOME": str(tmp_path), **environment})
    assert caught.value.exit_code == 2
    assert "WANDB_API_KEY" in str(caught.value.fix)


def test_a_key_counts_for_its_own_server_only(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    environment = {"HOME": str(tmp_path)}
    assert has_wandb_key(environment)
    assert not has_wandb_key(environment | {"WANDB_BASE_URL": "https://wandb.example.org"})
    assert not has_wandb_key(environment | {"NETRC": str(tmp_path / "other")})


def test_a_damaged_netrc_holds_no_key(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine\n")
    assert not has_wandb_key({"HOME": str(tmp_path)})


def test_a_sweep_that_cannot_be_online_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before the data is read, here from a folder that does not exist."""
    from launcher.load import load_experiment
    from launcher.stages import run_sweep

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "npo.yaml"
    file.write_text(f"name: x\nstorage_path: {tmp_path / 'runs'}\nmodel: {{model_name_or_path: m}}\ndata: {{path: d}}\n")
    with pytest.raises(InputError, match="no Weights & Biases key"):
        run_sweep(experiment=load_experiment(file, ["tracking.wandb=online"]))
    with pytest.raises(InputError, match="d"):
        run_sweep(experiment=load_experiment(file, ["tracking.wandb=auto"]))
    assert not (tmp_path / "runs").exists()
