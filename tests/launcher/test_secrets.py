"""Keys stay in the environment: a configuration that holds one is refused, and records hide what slipped through."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.load import load_experiment
from launcher.masking import hide_places, hide_secrets, names_secret, redact, secrets_of
from launcher.provenance import record_provenance
from trainers.errors import InputError

BASE = "name: x\nmodel: {model_name_or_path: m}\ndata: {path: d}\n"
AWS = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLE0"
"""It looks like nothing in particular; only the environment says what it is."""


def refusal(folder: Path, text: str = "", *overrides: str) -> str:
    (folder / "npo.yaml").write_text(BASE + text)
    with pytest.raises(InputError) as caught:
        load_experiment(folder / "npo.yaml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["api_key", "apikey", "key", "wandb_key", "hf_token", "token", "client_secret", "password", "db.password", "WANDB_API_KEY"]
)
def test_a_setting_named_like_a_key_is_refused(tmp_path: Path, name: str) -> None:
    told = refusal(tmp_path, f"tracking: {{{name}: abc}}\n")
    assert "is the name of an access key" in told
    assert "set it in the environment" in told
    assert "abc" not in told
    assert told.startswith("npo.yaml: 1 problem")


@pytest.mark.parametrize("name", ["max_new_tokens", "reduction", "train_batch_tokens", "keys", "tokenizer", "keep"])
def test_a_setting_with_such_a_word_in_it_is_none(name: str) -> None:
    assert not names_secret(name)


def test_no_text_of_ours_is_named_like_a_key(tmp_path: Path) -> None:
    """``skip_first_token`` is true or false, and stays readable."""
    (tmp_path / "npo.yaml").write_text(BASE)
    values = load_experiment(tmp_path / "npo.yaml").config.model_dump(mode="json")
    assert len(str(values)) > 1000
    assert redact(values) == values


@pytest.mark.parametrize(
    "place", ["tracking: {tags: [%s]}\n", "storage_path: runs/%s\n", "tracking: {project: '${oc.env:AWS_SECRET_ACCESS_KEY}'}\n"]
)
def test_what_the_environment_calls_a_key_is_refused_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    text = place % AWS if "%s" in place else place
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS)
    told = refusal(tmp_path, text)
    assert "looks like an access key" in told
    assert AWS not in told


def test_the_same_text_is_fine_where_nothing_calls_it_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    (tmp_path / "npo.yaml").write_text(BASE + f"tracking: {{tags: ['{AWS}']}}\n")
    assert load_experiment(tmp_path / "npo.yaml").config.tracking.tags == (AWS,)


def test_an_override_is_a_setting_too(tmp_path: Path) -> None:
    assert "tracking.wandb_api_key (override)" in refusal(tmp_path, "", "tracking.wandb_api_key=abc")


def test_secrets_are_the_values_of_variables_named_so() -> None:
    environment = {"WANDB_API_KEY": "a" * 40, "HF_TOKEN": "b" * 20, "PATH": "/usr/bin:/bin/long/enough", "SSH_KEY": "/home/me/.ssh/id_rsa",
                   "TOKEN": "1", "SORT_KEYS": "not-one-of-them", "AWS_ACCESS_KEY_ID": "c" * 16}  # fmt: skip
    assert secrets_of(environment) == ("a" * 40, "b" * 20, "c" * 16)
    assert hide_secrets(f"x {'a' * 40} y", secrets=secrets_of(environment)) == "x (hidden) y"


def test_redaction_leaves_what_is_no_key() -> None:
    assert redact({"a": [{"hf_token": "abc", "max_new_tokens": 3}], "api_key": None}) == {
        "a": [{"hf_token": "(hidden)", "max_new_tokens": 3}],
        "api_key": None,
    }


def test_of_a_path_only_its_end_is_shown() -> None:
    """A name with one slash may be a model of a hub."""
    shown = hide_places({"path": "/home/me/data", "base": ["~/x/y/", "runs/a/target", "s3://bucket/a"], "hub": "allenai/OLMo-1B", "n": 1})
    assert shown == {"path": "…/data", "base": ["…/y", "…/target", "…/a"], "hub": "allenai/OLMo-1B", "n": 1}


def test_the_recorded_command_hides_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-shaped-like-one")
    monkeypatch.setattr(sys, "argv", ["/bin/unlearn", "quickstart", "--out", "runs/not-shaped-like-one", "--data", "hf_" + "a" * 30])
    record_provenance(tmp_path, seed=1, hashes={})
    text = (tmp_path / "provenance.json").read_text()
    assert "not-shaped-like-one" not in text
    assert "hf_aaa" not in text
    assert '"runs/(hidden)"' in text
