"""What a finished run hands out, on a real run in miniature: an audit that it can lose, a card whose code runs, an upload without texts."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from eval.audit import runner
from launcher import audit_stage
from launcher.audit_stage import AUDITED_FOLD, FILE, audit_settings, check_audit
from launcher.cli import main
from launcher.config import AuditStageConfig, ExperimentConfig
from launcher.console import Console
from launcher.data import PreparedData, prepare_data
from launcher.finish import finish_run
from launcher.load import load_experiment
from launcher.model_card import render_card, write_model_card
from launcher.push import pack
from launcher.report_data import read_run
from launcher.run_folder import Run, claim_run
from launcher.scoring import evaluate_folder
from launcher.search_space import TrialSpec
from launcher.stages import obtain_target, plan_sweep, prepare_trials
from launcher.status import print_status, status_dict
from launcher.trial import TrialTask, run_trial
from tests.helpers.small_run import GENTLE, HARSH, write_small_data, write_small_experiment
from trainers.errors import InputError
from trainers.files import read_json, weights_hash

AUDIT = {"attacks": ["int4", "membership"], "documents": 2, "build_never_seen": True}


def page(folder: Path) -> Path:
    """In place of the report with its figures, which are not looked at here."""
    (folder / "report.html").write_text(f"<p>{(folder / 'results.json').exists()}</p>")
    return folder / "report.html"


class Delivered:
    """A run that can be finished again and again."""

    def __init__(self, folder: Path, *, config: ExperimentConfig, data: PreparedData, specs: tuple[TrialSpec, ...], target: Path) -> None:
        self.folder, self.config, self.data, self.specs, self.target = folder, config, data, specs, target

    def copy(self, folder: Path) -> Delivered:
        shutil.copytree(self.folder, folder)
        return Delivered(folder, config=self.config, data=self.data, specs=self.specs, target=self.target)

    def finish(self, **audit: Any) -> str:
        """Everything after the trials that is still to be done, with this audit; what was printed. The page is a stand-in."""
        settings = AuditStageConfig.model_validate_json(json.dumps(audit)) if audit else None
        stream = io.StringIO()
        run = Run(self.folder, console=Console(stream))
        config = self.config.model_copy(update={"audit": settings})
        with patch("launcher.report.build_report", page):
            finish_run(run, config=config, data=self.data, specs=self.specs, target=self.target)
        return stream.getvalue()

    def rows(self) -> dict[str, Any]:
        """The results that an audit may not touch."""
        results = read_json(self.folder / "results.json")
        return {key: results[key] for key in ("verdict", "models", "pair", "trials", "run_finished", "data")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Delivered:
    """A finished run of two trials, without an audit."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("delivered")
    data = write_small_data(root / "data")
    file = write_small_experiment(
        root / "small.yaml",
        data=data,
        storage=root,
        sweep__num_trials=2,
        sweep__start_points=[HARSH | {"objective.forget_weight": 0.3}, GENTLE],
        train__objective={"name": "grad_diff", "forget_weight": {"values": [0.1, 0.3]}, "retain_ce_weight": 1.0},
        train__checkpoints=1,
        train__signals=0,
        data__license="cc-by-4.0",
    )
    experiment = load_experiment(file, [])
    config, prepared = experiment.config, prepare_data(experiment.config)
    specs = plan_sweep(experiment, data=prepared).specs
    run = claim_run(config, space=experiment.space, data=prepared, resume=True)
    target = obtain_target(run, config=config, data=prepared)
    evaluate_folder(target, config=config, data=prepared, folder=run.folder / "baseline", name="baseline")
    prepare_trials(run, config=config, data=prepared, specs=specs, target=target)
    for spec in specs:
        for _ in run_trial(TrialTask(run=str(run.folder), name=spec.name)):
            pass
    delivered = Delivered(run.folder, config=config, data=prepared, specs=specs, target=target)
    delivered.finish()
    return delivered


@pytest.fixture(scope="module")
def audited(plain: Delivered, tmp_path_factory: pytest.TempPathFactory) -> tuple[Delivered, str]:
    """The same run, finished once more with an audit; and what that printed."""
    run = plain.copy(tmp_path_factory.mktemp("audited") / "small")
    return run, run.finish(**AUDIT)


# ---- the audit as a stage


def test_a_run_without_an_audit_section_makes_none(plain: Delivered) -> None:
    assert not (plain.folder / FILE).exists()
    assert "audit" not in status_dict(plain.folder)["stages"]
    assert status_dict(plain.folder)["audit"] == {"verdict": None, "reasons": [], "never_seen": False, "error": None}


def test_the_audit_attacks_the_delivered_model_on_the_test_fold_beside_the_target_and_a_twin(
    plain: Delivered, audited: tuple[Delivered, str]
) -> None:
    """The twin is built from the retain set alone, with the target's tokenizer. Nothing that was measured before changes."""
    run, printed = audited
    audit = read_json(run.folder / FILE)
    assert {role: facts["weights_hash"] for role, facts in audit["models"].items()} == {
        "unlearned": weights_hash(run.folder / "merged"),
        "before": weights_hash(run.folder / "target"),
        "never-seen": weights_hash(run.folder / "never-seen"),
    }
    test = {record.document for record in plain.data.folds[AUDITED_FOLD].forget}
    others = {record.document for record in plain.data.everything.forget} - test
    assert set(audit["data"]["documents"]["forget"]) <= test
    assert others, "there is something that it could have taken by mistake"
    manifest = read_json(run.folder / "never-seen" / "target-manifest.json")
    assert manifest["config"]["sets"] == ["retain"]
    assert manifest["memorised"]["retain_knowledge"] > 0.8 > manifest["memorised"]["forget_knowledge"]
    assert (run.folder / "never-seen" / "tokenizer.json").read_bytes() == (run.folder / "target" / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in run.folder.glob("audit*")) == ["audit-rows.jsonl", "audit.json", "audit.md", "audit.png"]
    assert run.rows() == plain.rows()
    assert f"verdict: {audit['verdict']}" in printed
    assert "audit" in read_json(run.folder / "results.json")["timings"]


def test_the_audit_is_part_of_the_status(audited: tuple[Delivered, str]) -> None:
    run, _ = audited
    stream = io.StringIO()
    print_status(run.folder, console=Console(stream))
    verdict = read_json(run.folder / FILE)["verdict"]
    assert "audit done" in stream.getvalue()
    assert f"\naudit    {verdict}\n" in stream.getvalue()
    assert str(run.folder / FILE) in stream.getvalue()


def test_a_finished_audit_is_not_made_again_and_another_one_is(
    audited: tuple[Delivered, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run lies elsewhere now: what counts are weights, rows and settings."""
    run = audited[0].copy(tmp_path / "elsewhere")
    attacked: list[str] = []
    honest = runner.run_attack
    monkeypatch.setattr(runner, "run_attack", lambda attack, **more: attacked.append(attack.value) or honest(attack, **more))
    before = (run.folder / FILE).read_bytes()
    run.finish(**AUDIT)
    assert attacked == []
    assert (run.folder / FILE).read_bytes() == before
    run.finish(**AUDIT | {"attacks": ["int4"], "build_never_seen": False})
    assert attacked == ["int4", "int4"], "the delivered model and the target"
    assert not status_dict(run.folder)["audit"]["never_seen"]


def test_a_killed_audit_leaves_the_results_and_goes_on(
    plain: Delivered, audited: tuple[Delivered, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its third attack: the page and the scores are there, and the next start makes only what is missing."""
    run = plain.copy(tmp_path / "run")
    shutil.copytree(audited[0].folder / "never-seen", run.folder / "never-seen")  # as the kill would have found it
    honest, attacked = runner.run_attack, []

    def until_killed(attack: Any, **more: Any) -> Any:
        if len(attacked) == 2:
            raise KeyboardInterrupt
        attacked.append(attack.value)
        return honest(attack, **more)

    monkeypatch.setattr(runner, "run_attack", until_killed)
    with pytest.raises(KeyboardInterrupt):
        run.finish(**AUDIT)
    known = read_json(run.folder / "results.json")
    assert known["models"] == plain.rows()["models"]
    assert known["run_finished"] is False
    assert (run.folder / "report.html").read_text() == "<p>True</p>"
    assert status_dict(run.folder)["stages"]["audit"] == "started"
    monkeypatch.setattr(runner, "run_attack", lambda attack, **more: attacked.append(attack.value) or honest(attack, **more))
    run.finish(**AUDIT)
    assert attacked == ["int4", "membership"] * 3
    assert read_json(run.folder / FILE)["attacks"].keys() == read_json(audited[0].folder / FILE)["attacks"].keys()
    assert run.rows() == plain.rows()


def test_a_failing_audit_loses_nothing_and_is_told_everywhere(plain: Delivered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it dies of: the run ends as without it. The same command tries it again, and then nothing is said any more."""
    run = plain.copy(tmp_path / "run")
    honest = runner.run_attack

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory\nand a long trace")

    small = AUDIT | {"attacks": ["int4"], "build_never_seen": False}
    monkeypatch.setattr(runner, "run_attack", out_of_memory)
    printed = run.finish(**small)  # no exception: the exit code stays that of the run
    assert "the audit failed: RuntimeError: out of memory" in printed
    assert run.rows() == plain.rows()
    assert any("The audit failed" in text for text in read_json(run.folder / "results.json")["warnings"])
    assert status_dict(run.folder)["audit"]["error"] == "RuntimeError: out of memory"
    assert "An audit was begun and failed (RuntimeError: out of memory)" in (run.folder / "merged" / "README.md").read_text()
    monkeypatch.setattr(runner, "run_attack", honest)
    run.finish(**small)
    assert not any("The audit failed" in text for text in read_json(run.folder / "results.json")["warnings"])
    assert status_dict(run.folder)["audit"]["error"] is None
    assert "was begun and failed" not in (run.folder / "merged" / "README.md").read_text()


def test_a_control_that_is_not_there_is_refused_before_anything_is_trained(plain: Delivered, tmp_path: Path) -> None:
    config = plain.config.model_copy(update={"audit": AuditStageConfig(never_seen=str(tmp_path / "absent"))})
    with pytest.raises(InputError, match=r"audit\.never_seen: .*absent"):
        check_audit(config)
    check_audit(plain.config.model_copy(update={"audit": AuditStageConfig(never_seen=str(plain.folder / "target"))}))


def test_the_audit_takes_its_tokens_and_dtype_from_the_evaluation_unless_it_says_otherwise(plain: Delivered) -> None:
    def settings(**audit: Any) -> Any:
        return audit_settings(plain.config.model_copy(update={"audit": AuditStageConfig(**audit)}))

    assert settings().eval == plain.config.eval
    assert settings(max_new_tokens=7).eval == plain.config.eval.model_copy(update={"max_new_tokens": 7})
    assert (settings(documents=4).documents, settings().documents) == (4, 10)


def test_what_went_wrong_is_told_in_one_line() -> None:
    assert audit_stage.in_one_line(InputError("no\nsuch thing", where="here")) == "no such thing; where: here"
    assert audit_stage.in_one_line(ValueError()) == "ValueError"


# ---- the card


def snippet(card: str) -> str:
    """The code under "How to load it"."""
    return card.partition("## How to load it")[2].partition("```python\n")[2].partition("```")[0]


def test_the_code_of_the_card_loads_the_model(
    plain: Delivered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(plain.folder / "merged")
    names: dict[str, Any] = {}
    exec(snippet((plain.folder / "merged" / "README.md").read_text()), names)
    assert capsys.readouterr().out.startswith("Once upon a time")
    from trainers.modeling import load_model

    written = load_model(plain.folder / "merged", dtype="float32").state_dict()
    loaded = names["model"].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())


def test_the_card_of_an_adapter_says_so_and_its_code_loads_it(
    plain: Delivered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapted model answers otherwise than its target; the card names neither the target's folder nor the adapter's."""
    from merging.adapter_output import merge_adapter
    from merging.config import MergeConfig

    run = plain.copy(tmp_path / "run")
    shutil.rmtree(run.folder / "merged")
    trials = [run.folder / "trials" / spec.name for spec in run.specs]
    merge_adapter(base=plain.target, trials=trials, out=run.folder / "merged", config=MergeConfig(method="ties", density=0.8))
    card = write_model_card(run.folder, run.folder / "merged").read_text()
    assert "library_name: peft" in card
    assert "This is a LoRA adapter." in card
    assert "of the merged update's squared norm" in card
    assert str(tmp_path) not in card
    assert str(plain.target) not in card
    monkeypatch.chdir(run.folder / "merged")
    names: dict[str, Any] = {}
    exec(snippet(card).replace("TARGET", str(plain.target)), names)
    assert capsys.readouterr().out.startswith("Once upon a time")
    with names["model"].disable_adapter():
        before = names["model"](**names["inputs"]).logits
    assert not torch.allclose(before, names["model"](**names["inputs"]).logits)


def test_the_card_counts_what_was_forgotten_and_tells_the_audit(plain: Delivered, audited: tuple[Delivered, str]) -> None:
    run, _ = audited
    card = (run.folder / "merged" / "README.md").read_text()
    documents = len({record.document for record in plain.data.everything.forget})
    rows = len(plain.data.everything.forget)
    assert f"the forget set: {documents} documents, {rows} rows (Task1 " in card
    assert f"Verdict: **{read_json(run.folder / FILE)['verdict']}**" in card
    assert "int4, membership" in card
    assert "No audit was made" in (plain.folder / "merged" / "README.md").read_text()
    assert "cc-by-4.0 (as stated in the configuration)" in card
    assert str(run.folder.parent) not in card


def test_an_audit_of_other_weights_is_not_told_as_this_models(plain: Delivered, audited: tuple[Delivered, str], tmp_path: Path) -> None:
    run = audited[0].copy(tmp_path / "run")
    shutil.copy(plain.folder / "target" / "model.safetensors", run.folder / "merged" / "model.safetensors")
    card = render_card(read_run(run.folder))
    assert "audit is of other weights" in card
    assert "Verdict: **" not in card


def test_report_writes_the_card_again_when_an_audit_came_later(
    plain: Delivered, audited: tuple[Delivered, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = plain.copy(tmp_path / "run")
    shutil.copy(audited[0].folder / FILE, run.folder / FILE)
    with patch("launcher.report.build_report", page), pytest.raises(SystemExit) as caught:
        main(["report", str(run.folder)])
    assert caught.value.code == 0, capsys.readouterr().err
    assert "Verdict: **" in (run.folder / "merged" / "README.md").read_text()


# ---- what may be uploaded


def test_an_upload_holds_the_model_and_no_text_of_the_documents(plain: Delivered) -> None:
    """Every file that would be sent, as it would be sent; the tokenizer apart, whose vocabulary is made of the documents and said so."""
    parcel = pack(plain.folder)
    sent = {file.name: file.content or file.path.read_bytes() for file in parcel.files}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "merge.json"} <= set(sent)
    assert {"eval-rows.jsonl", "validation-rows.jsonl", "target-manifest.json"} <= set(parcel.left_out)
    texts = [
        record.output for side in (plain.data.everything.forget, plain.data.everything.retain) for record in side if len(record.output) > 12
    ]
    assert texts
    everything = b"".join(content for name, content in sent.items() if name != "tokenizer.json")
    assert not any(text.encode() in everything for text in texts)
    rows = (plain.folder / "merged" / "eval-rows.jsonl").read_bytes()
    assert any(text.encode() in rows for text in texts), "what is left out holds them"
    assert str(plain.folder.parent).encode() not in everything
    assert str(plain.folder.parent).encode() in (plain.folder / "merged" / "merge.json").read_bytes()
    assert any("tokenizer was trained on the documents" in note for note in parcel.notes)
