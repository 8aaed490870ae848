"""The audit of tiny models: a destroyed or a pretending one does not pass, one that never knew does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.audit import run_audit
from launcher.cli import main
from tests.helpers.audit_models import AuditModels
from trainers.files import read_json

ATTACKS = "relearn-forget,int4,prefix-50,membership"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> AuditModels:
    return AuditModels(tmp_path_factory.mktemp("audit"))


@pytest.fixture
def audit(models: AuditModels, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Audit a model beside the target and the never-seen twin; settings may be replaced."""

    def run(model: Path, **changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "base": models.target(),
            "data": models.data,
            "mia": models.mia,
            "never_seen": models.twin(),
            "attacks": ATTACKS,
            "max_new_tokens": 48,
            "out": tmp_path / "audit.json",
            "progress": lambda text: None,
        }
        return run_audit(model=model, **settings | changes)

    return run


def test_the_untouched_target_is_untouched(models: AuditModels, audit: Callable[..., dict[str, Any]]) -> None:
    found = audit(models.target())
    assert found["verdict"] == "untouched"
    assert all(one["recovered"] is None for attack in found["attacks"].values() for one in attack["scores"].values())


def test_a_destroyed_model_is_dead(models: AuditModels, audit: Callable[..., dict[str, Any]]) -> None:
    """No attack brings anything back from it: by the attacks alone it would be gone."""
    found = audit(models.destroyed())
    assert found["verdict"] == "dead"
    assert not any(one["clear"] for attack in found["attacks"].values() for one in attack["scores"].values())
    assert found["models"]["unlearned"]["degenerate"]["retain"] > 0.5


def test_a_model_trained_without_the_documents_is_gone(models: AuditModels, audit: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The best that unlearning can do: another twin, of another seed than the control."""
    found = audit(models.twin(3))
    assert (found["verdict"], found["weaker"][0][:12]) == ("gone", "Not asked fo")
    assert found["models"]["unlearned"]["weights_hash"] != found["models"]["never-seen"]["weights_hash"]
    assert found["models"]["unlearned"]["scores"]["forget_knowledge"] == 0
    # Everything lies beside the file, and nothing else.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit-rows.jsonl", "audit.json", "audit.md", "audit.png"]
    assert read_json(tmp_path / "audit.json") == found
    rows = [json.loads(line) for line in (tmp_path / "audit-rows.jsonl").read_text().split("\n") if line]
    assert {row["model"] for row in rows} == {"unlearned", "before", "never-seen"}
    assert {row["attack"] for row in rows} == {"as-is", *ATTACKS.split(",")}
    taught = set(found["attacks"]["relearn-forget"]["settings"]["unlearned"]["taught_documents"])
    asked = {row["document"] for row in rows if row["attack"] == "relearn-forget" and row["set"] == "forget"}
    assert taught
    assert asked
    assert not taught & asked


def test_a_model_whose_forgetting_vanishes_at_4_bits_is_hidden(models: AuditModels, audit: Callable[..., dict[str, Any]]) -> None:
    """On the surface it forgets as well as the twin that passes, and what should stay has stayed."""
    found = audit(models.pretending())
    assert found["verdict"] == "hidden"
    scores, target = (found["models"][role]["scores"] for role in ("unlearned", "before"))
    assert scores["forget_regurgitation"] < 0.25
    assert scores["forget_knowledge"] < 0.1
    assert scores["retention"] > 0.9 * target["retention"]
    rounded = found["attacks"]["int4"]["scores"]
    assert all(
        rounded[score]["clear"] and rounded[score]["recovered"]["value"] > 0.85 for score in ("forget_regurgitation", "forget_knowledge")
    )
    assert any("int4 brings back" in reason for reason in found["reasons"])


def test_without_a_never_seen_model_the_same_is_found_and_the_weakness_told(
    models: AuditModels, audit: Callable[..., dict[str, Any]]
) -> None:
    found = audit(models.pretending(), never_seen=None, attacks="int4,membership")
    assert found["verdict"] == "hidden"
    assert any("--never-seen" in text for text in found["weaker"])
    # Completions have unseen texts as control, questions none.
    scores = found["attacks"]["int4"]["scores"]
    assert scores["forget_regurgitation"]["control_recovered"] is not None
    assert scores["forget_knowledge"]["control_recovered"] is None
    alone = audit(models.pretending(), never_seen=None, mia=None, attacks="int4,membership")
    assert alone["verdict"] == "hidden"
    assert "non-member" in alone["not_run"]["membership"]


def test_a_model_that_is_no_number_is_dead_and_nothing_crashes(models: AuditModels, audit: Callable[..., dict[str, Any]]) -> None:
    found = audit(models.broken(), attacks="relearn-forget,sampling,int8")
    assert found["verdict"] == "dead"
    assert set(found["not_run"]) == {"relearn-forget", "sampling", "int8"}


def test_a_stopped_audit_goes_on_with_the_same_arguments_and_anew_with_others(
    models: AuditModels, audit: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the second attack of the second model; the same call then computes only what is missing, and finds the same."""
    whole = audit(models.twin(3), attacks="prefix-50,int8", never_seen=None, out=tmp_path / "whole.json")

    from eval.audit import runner

    def stop(attack: Any, **arguments: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(attack)
        return plain(attack, **arguments)

    calls: list[str] = []
    plain = runner.run_attack
    monkeypatch.setattr(runner, "run_attack", stop)
    with pytest.raises(KeyboardInterrupt):
        audit(models.twin(3), attacks="prefix-50,int8", never_seen=None)
    assert not (tmp_path / "audit.json").exists()
    assert len(list((tmp_path / ".audit-parts").glob("*-*.json"))) == 5

    lines: list[str] = []
    monkeypatch.setattr(runner, "run_attack", lambda attack, **arguments: calls.append(attack) or plain(attack, **arguments))
    again = audit(models.twin(3), attacks="prefix-50,int8", never_seen=None, progress=lines.append)
    assert calls == ["int8", "prefix-50", "int8", "prefix-50"]
    assert sum("is there from an earlier start" in line for line in lines) == 5
    for key in ("verdict", "reasons", "attacks", "remaining"):
        assert _without_seconds(again[key]) == _without_seconds(whole[key])
    # Finished: the same call prints what the file holds.
    audit(models.twin(3), attacks="prefix-50,int8", never_seen=None, progress=lines.append)
    assert len(calls) == 4
    assert any("already holds this audit" in line for line in lines)

    monkeypatch.setattr(runner, "run_attack", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        audit(models.twin(3), attacks="prefix-50,int8", never_seen=None, seed=1)
    monkeypatch.setattr(runner, "run_attack", plain)
    audit(models.twin(3), attacks="prefix-50", never_seen=None, seed=2, progress=lines.append)
    (told,) = [line for line in lines if "beginning anew" in line]
    assert "settings.attacks" in told
    assert "settings.seed" in told


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_seconds(item) for key, item in value.items() if key != "seconds"}
    return value


# ---- bad input


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert isinstance(caught.value.code, int)
    return caught.value.code, captured.err


def other_vocabulary(models: AuditModels, tmp_path: Path) -> Path:
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(models.target(), folder)
    # The ids of two letters exchanged: every text has as many tokens as before.
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def other_architecture(models: AuditModels, tmp_path: Path) -> Path:
    from trainers.modeling import load_tokenizer
    from trainers.tiny import TinyOlmoConfig, build_tiny_olmo

    folder = tmp_path / "wide"
    tokenizer = load_tokenizer(models.target())
    shape = TinyOlmoConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    build_tiny_olmo(shape, tokenizer=tokenizer, seed=0).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def no_forget_rows(models: AuditModels, tmp_path: Path) -> Path:
    folder = tmp_path / "lume"
    folder.mkdir()
    (folder / "forget.jsonl").write_text("")
    (folder / "retain.jsonl").write_bytes((models.data / "retain.jsonl").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--model": lambda m, p: p / "absent"}, ("model folder not found", "--model")),
        ({"--base": lambda m, p: p / "absent"}, ("model folder not found", "--base")),
        ({"--never-seen": lambda m, p: p / "absent"}, ("model folder not found", "--never-seen")),
        ({"--data": lambda m, p: p / "absent"}, ("absent",)),
        ({"--mia": lambda m, p: p / "absent"}, ("folder not found", "absent")),
        ({"--base": other_vocabulary}, ("different vocabularies", "--base")),
        ({"--never-seen": other_vocabulary}, ("different vocabularies", "target.sets=[retain]")),
        ({"--base": other_architecture}, ("not of one architecture", "hidden_size 48 and 32")),
        ({"--data": no_forget_rows}, ("the forget set is empty",)),
        ({"--attacks": lambda m, p: "int4,samplin"}, ("unknown attack 'samplin'", "did you mean 'sampling'?")),
        ({"--out": lambda m, p: p}, ("a folder where a file is to be written",)),
    ],
    ids=["model", "base", "never-seen", "data", "mia", "vocabulary", "twin's vocabulary", "architecture", "no rows", "attack", "out"],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    changes: dict[str, Callable[[AuditModels, Path], Any]],
    says: tuple[str, ...],
    models: AuditModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"--model": models.target(), "--base": models.target(), "--data": models.data, "--out": tmp_path / "out" / "audit.json"}
    options |= {option: make(models, tmp_path) for option, make in changes.items()}
    capsys.readouterr()
    code, message = command(capsys, "audit", *[part for pair in options.items() for part in pair])
    assert code == 2, message
    assert message.count("input error:") == 1
    for text in says:
        assert text in message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
