"""The plugins of docs/extending.md as a reader would use them: a trial, a merge and scores; and what a wrong plugin is told."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, softplus

from eval.config import EvalConfig
from eval.metrics import METRICS
from eval.report import SCORE_NAMES, EvalReport
from eval.runner import evaluate
from launcher.cli import main
from launcher.load import load_experiment
from launcher.plugins import use_named, use_run_plugins
from launcher.report import build_report
from launcher.stages import run_memorize, run_train
from merging.config import MergeConfig
from merging.methods.table import METHODS
from tests.documents.blocks import command_lines, find_blocks, page_name
from tests.documents.scene import inside
from tests.helpers.data import REPOSITORY
from tests.helpers.eval_models import Bench, half_trained, untrained
from tests.helpers.merge_models import write_base, write_lora
from tests.helpers.small_run import write_small_data, write_small_experiment
from tests.helpers.tiny_trial import tiny_inputs, tiny_train
from trainers.config import ObjectiveConfig, ObjectiveName
from trainers.errors import InputError
from trainers.files import read_json, sha256_file
from trainers.loop import TrialInputs, train_worker
from trainers.modeling import load_model
from trainers.objectives.custom import made_up_rows
from trainers.objectives.table import OBJECTIVES, objective_terms
from trainers.plugins import active_plugins, find_plugin, use_plugins
from trainers.trial_rows import encode_trial

PAGE = REPOSITORY / "docs" / "extending.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the guides are part of the repository, not of the package")


@pytest.fixture(autouse=True)
def _no_plugins() -> Iterator[None]:
    """Every test begins and ends without plugins, and with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    use_plugins([])
    yield
    use_plugins([])
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has pasted every file of the page."""
    folder = tmp_path_factory.mktemp("page")
    blocks = find_blocks(PAGE.read_text(encoding="utf-8"), page=page_name(PAGE))
    files = [text for block in blocks if block.language == "bash" for _, text in command_lines(block) if text.startswith("cat > ")]
    for text in files:
        subprocess.run(["bash", "-c", text], cwd=folder, check=True)
    assert {file.name for file in folder.iterdir()} == {"mine.yaml", "floored_ascent.py", "mean_then_trim.py", "digits_leaked.py"}
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrialInputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


def write(folder: Path, text: str, *, name: str = "mine.py") -> Path:
    file = folder / name
    file.write_text(text)
    return file


# ---- an objective


def first_step(inputs: TrialInputs, trial: Path, *, beta: float = 3.0, micro_batch: int = 12, **changes: Any) -> dict[str, Any]:
    """The metrics of a step over all forget rows, all parameters trained."""
    objective = ObjectiveConfig.model_validate({"name": "floored_ascent", "beta": beta, "retain_ce_weight": 0.5, **changes})
    train = tiny_train(objective=objective, lora=None, train_batch_size=12, per_device_train_batch_size=micro_batch, max_grad_norm=1e9)
    return next(iter(train_worker(train=train, inputs=inputs, trial=trial)))


def by_hand(inputs: TrialInputs, *, beta: float) -> tuple[float, float, float]:
    """Forget term, retain cross-entropy and the gradient's norm in float64: one row at a time, tokens averaged over all rows of a set."""
    rows = encode_trial(inputs, train=tiny_train())
    model = load_model(inputs.target, dtype="float32").double().eval()
    sums = {"forget": torch.zeros((), dtype=torch.float64), "retain": torch.zeros((), dtype=torch.float64)}
    counts = {"forget": 0, "retain": 0}
    for side, own in (("forget", rows.forget), ("retain", rows.retain)):
        for row in own:
            ids = torch.tensor([row.input_ids])
            logits = model(ids).logits[0, :-1]
            log_probs = -cross_entropy(logits, ids[0, 1:], reduction="none")[row.num_prompt - 1 :]
            sums[side] = sums[side] + (log_probs + beta).exp().log1p().sum() if side == "forget" else sums[side] - log_probs.sum()
            counts[side] += len(log_probs)
    forget, retain = (sums[side] / counts[side] for side in ("forget", "retain"))
    (forget + 0.5 * retain).backward()
    norm = torch.stack([value.grad.norm() for value in model.parameters() if value.grad is not None]).norm()
    return float(forget.detach()), float(retain.detach()), float(norm)


def test_a_trial_with_the_objective_has_the_loss_and_gradient_of_its_formula(page: Path, inputs: TrialInputs, tmp_path: Path) -> None:
    """Mean of log(1 + p e^beta) over forget tokens, plus 0.5 cross-entropy, and the norm of its gradient by all parameters."""
    use_named([page / "floored_ascent.py"])
    metrics = first_step(inputs, tmp_path / "trial")
    forget, retain, norm = by_hand(inputs, beta=3.0)
    assert metrics["terms"] == pytest.approx({"forget_floored": forget, "retain_ce": retain}, rel=2e-6)
    assert metrics["loss"] == pytest.approx(forget + 0.5 * retain, rel=2e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    other, _, _ = by_hand(inputs, beta=3.1)
    assert abs(other - forget) > 1e-3 * forget, "the tolerance would notice another beta"


def test_how_a_step_is_split_changes_nothing(page: Path, inputs: TrialInputs, tmp_path: Path) -> None:
    """Twelve pairs at once, or five, five and two; the average over sequences is another number, and as independent of the split."""
    use_named([page / "floored_ascent.py"])
    for average in ("token", "sequence"):
        whole = first_step(inputs, tmp_path / f"whole-{average}", average=average)
        split = first_step(inputs, tmp_path / f"split-{average}", average=average, micro_batch=5)
        assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        if average == "token":
            by_token = whole["loss"]
    assert abs(whole["loss"] - by_token) > 1e-3


def test_the_objective_fades_below_its_floor(page: Path) -> None:
    """d/dlogp log(1 + p e^beta) = sigmoid(log p + beta): nearly 1 for likely tokens, nearly 0 for unlikely ones."""
    use_named([page / "floored_ascent.py"])
    rows = made_up_rows((4,))
    config = ObjectiveConfig.model_validate({"name": "floored_ascent", "retain_ce_weight": 0})
    (term,) = objective_terms(config, forget=rows, retain=made_up_rows(()))
    assert rows.token_log_probs_N.grad is None
    term.total.backward()
    torch.testing.assert_close(rows.token_log_probs_N.grad, torch.sigmoid(rows.token_log_probs_N.detach() + 3.0))
    assert softplus(torch.tensor(-50.0 + 3.0)) < 1e-20


# ---- a merge method


def test_a_merge_with_the_method_is_its_formula(page: Path, tmp_path: Path) -> None:
    """The upper half by magnitude of the weighted mean of B A, added to the base and rounded once to bfloat16."""
    base = write_base(tmp_path / "base")
    trials = [write_lora(tmp_path / f"trial-{seed}", base=base, seed=seed) for seed in (1, 2)]
    arguments = ["merge", "--base", base, "--trial", trials[0], "--trial", trials[1], "--out", tmp_path / "merged"]
    options = ["--method", "mean_then_trim", "--density", 0.5, "--weights", 1, 3, "--plugin", page / "mean_then_trim.py"]
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in (*arguments, *options)])
    assert end.value.code == 0
    record = read_json(tmp_path / "merged" / "merge.json")
    assert record["plugin"] == {"file": "mean_then_trim.py", "sha256": sha256_file(page / "mean_then_trim.py")}
    assert "top 0.5 by magnitude" in record["formula"]
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    factors = [load_file(trial / "adapter_model.safetensors") for trial in trials]
    name = "model.layers.1.mlp.down_proj"
    updates = [2.0 * one[f"base_model.model.{name}.lora_B.weight"] @ one[f"base_model.model.{name}.lora_A.weight"] for one in factors]
    mean = (updates[0] + 3 * updates[1]) / 4
    threshold = mean.abs().flatten().sort(descending=True).values[int(0.5 * mean.numel()) - 1]
    expected = (before[f"{name}.weight"].float() + torch.where(mean.abs() >= threshold, mean, 0.0)).bfloat16()
    torch.testing.assert_close(after[f"{name}.weight"], expected, rtol=2**-8, atol=0)
    assert not torch.equal(after[f"{name}.weight"], (before[f"{name}.weight"].float() + mean).bfloat16()), "without the trim"


def test_a_method_of_a_plugin_refuses_settings_that_it_does_not_read(page: Path) -> None:
    use_named([page / "mean_then_trim.py"])
    assert MergeConfig.model_validate({"method": "mean_then_trim", "density": 0.3}).model_dump()["density"] == 0.3
    with pytest.raises(ValueError, match="method = mean_then_trim does not read it; it reads density"):
        MergeConfig.model_validate({"method": "mean_then_trim", "epsilon": 0.1})


# ---- a metric


SAME_AS_OURS = """
from eval.metrics import register_metric

@register_metric("answered", meaning="the official score again", kind="qa", whole_texts={whole})
def answered(row):
    return row["score"]
"""


def scores_with(plugin: Path | None, *, bench: Bench | None = None) -> EvalReport:
    bench = bench or half_trained()
    use_named([] if plugin is None else [plugin])
    config = EvalConfig(max_new_tokens=40, dtype="float32", batch_tokens=1500, bootstrap_samples=50)
    return evaluate(model=bench.model, tokenizer=bench.tokenizer, data=bench.data, attack=None, mmlu=None, config=config, fold="test",
                    model_name="tiny")  # fmt: skip


def test_a_metric_is_averaged_and_resampled_as_the_official_scores_are(tmp_path: Path) -> None:
    """The official score of questions, registered once more, has the same mean and the same interval; and it changes no other score."""
    report = scores_with(write(tmp_path, SAME_AS_OURS.format(whole=False)))
    without = scores_with(None)
    for side in ("forget", "retain"):
        assert report.scores[f"{side}_answered"] == pytest.approx(report.scores[f"{side}_knowledge"])
        assert report.intervals[f"{side}_answered"] == pytest.approx(report.intervals[f"{side}_knowledge"])
    low, high = report.intervals["retain_answered"]
    assert low < high
    assert {name: report.scores[name] for name in SCORE_NAMES} == dict(without.scores)
    assert set(without.scores) == set(SCORE_NAMES)
    assert any("the official score again" in note for note in report.notes)


def test_a_metric_that_reads_texts_gets_whole_ones(tmp_path: Path) -> None:
    """Where the official score is decided early, decoding goes on for such a metric; for another one it does not."""
    short, whole = (scores_with(write(tmp_path, SAME_AS_OURS.format(whole=whole)), bench=untrained()) for whole in (False, True))
    assert short.counts["decided_rows"] > 0
    assert whole.counts["decided_rows"] == 0
    lengths = [sum(len(row["output"]) for row in report.rows if row["part"] == "task") for report in (short, whole)]
    assert lengths[0] < lengths[1]
    assert short.scores["forget_knowledge"] == whole.scores["forget_knowledge"]


def test_the_metric_of_the_page_counts_numbers(page: Path) -> None:
    use_named([page / "digits_leaked.py"])
    value = METRICS["digits_leaked"].value
    assert value({"expected": "born 12 May 1970", "output": "on the 12th"}) == 0.5
    assert value({"expected": "a baker", "output": "12"}) is None


# ---- a whole run


@pytest.fixture(scope="module")
def run(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trial with the plugins of the page, on invented documents, with its report; the plugins' own files are gone."""
    root = tmp_path_factory.mktemp("run")
    data = write_small_data(root / "data")
    for name in ("floored_ascent.py", "digits_leaked.py"):
        (root / name).write_bytes((page / name).read_bytes())
    changes: dict[str, Any] = {
        "data__mmlu": None,
        "target__num_train_epochs": 1,
        "eval__max_new_tokens": 4,
        "train__objective": {"name": "floored_ascent", "beta": 2.0},
        "train__learning_rate": 1e-3,
        "train__num_train_epochs": 1,
        "sweep__start_points": [],
    }
    file = write_small_experiment(root / "mine.yaml", data=data, storage=root, **changes)
    values = json.loads(file.read_text()) | {"plugins": ["floored_ascent.py", "digits_leaked.py"]}
    file.write_text(json.dumps(values))
    torch.set_num_threads(1)
    experiment = load_experiment(file)
    run_memorize(experiment=experiment)
    run_train(experiment=experiment)
    build_report(root / "small")
    use_plugins([])
    for name in ("floored_ascent.py", "digits_leaked.py"):
        (root / name).unlink()
    return root / "small"


def test_a_run_has_the_objective_s_loss_and_the_metric_s_scores(run: Path) -> None:
    trial = run / "trials" / "trial-00"
    assert "forget_floored" in json.loads((trial / "metrics.jsonl").read_text().splitlines()[0])["terms"]
    report = read_json(trial / "eval.json")
    assert math.isfinite(report["scores"]["retain_digits_leaked"])
    assert "retain_digits_leaked" in report["intervals"]
    header, line, *_ = (run / "trials.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), line.split(","), strict=True))
    assert float(cells["test.forget_digits_leaked"]) == pytest.approx(report["scores"]["forget_digits_leaked"])
    assert {"validation.forget_digits_leaked", "test.retain_digits_leaked"} <= set(cells)


def test_another_process_of_the_run_needs_nothing_but_its_folder(run: Path, page: Path) -> None:
    """It reads a configuration that was sent to it before it knows the plugin, then the run's own copy of that."""
    use_named([page / "floored_ascent.py"])
    sent = pickle.dumps(ObjectiveConfig.model_validate({"name": "floored_ascent"}))
    code = (
        "import pickle, sys; sent = pickle.loads(bytes.fromhex(sys.argv[2])); "
        "from launcher.trial import load_plan, trial_config, TrialTask; config, plan, data = load_plan(sys.argv[1]); "
        "train = trial_config(TrialTask(sys.argv[1], 'trial-00'), plan=plan); "
        "assert train.objective.name is sent.name; from trainers.plugins import active_plugins; "
        "print(config.train.objective.name, *(plugin.file for plugin in active_plugins()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run), sent.hex()], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    copies = [str((run / "plugins" / name).resolve()) for name in ("floored_ascent.py", "digits_leaked.py")]
    assert done.stdout.split() == ["floored_ascent", *copies]


def test_a_run_goes_on_from_its_own_file_and_not_with_another_plugin(run: Path, page: Path, tmp_path: Path) -> None:
    """``RUN/experiment.yaml`` names the copies; the same run with a changed plugin, or with a changed copy, is refused."""
    experiment = load_experiment(run / "experiment.yaml")
    assert [Path(file).parent for file in experiment.config.plugins] == [(run / "plugins").resolve()] * 2
    run_train(experiment=experiment)
    changed = write(tmp_path, (page / "floored_ascent.py").read_text() + "\n# changed\n", name="floored_ascent.py")
    other = load_experiment(run / "experiment.yaml", [f"plugins=[{changed}, {run / 'plugins' / 'digits_leaked.py'}]"])
    with pytest.raises(InputError, match=r"changed: plugins\.floored_ascent\.py"):
        run_train(experiment=other)
    copy = run / "plugins" / "digits_leaked.py"
    kept = copy.read_text()
    copy.write_text(kept + "# changed\n")
    try:
        with pytest.raises(InputError, match="copy of the plugin digits_leaked"):
            use_run_plugins(run)
    finally:
        copy.write_text(kept)


def test_the_run_s_files_name_no_folder_of_this_machine(run: Path) -> None:
    assert "plugins: [plugins/floored_ascent.py, plugins/digits_leaked.py]" in (run / "experiment.yaml").read_text()
    assert read_json(run / "sweep.json")["experiment"]["plugins"] == ["plugins/floored_ascent.py", "plugins/digits_leaked.py"]
    hashes = {name: sha256_file(run / "plugins" / name) for name in ("floored_ascent.py", "digits_leaked.py")}
    assert read_json(run / "experiment.json")["plugins"] == hashes


# ---- names


def test_the_page_s_experiment_is_valid_and_its_typos_are_answered_with_the_nearest_name(page: Path) -> None:
    experiment = load_experiment(page / "mine.yaml")
    assert experiment.config.train.objective.name == "floored_ascent"
    assert experiment.config.merge.method == "mean_then_trim"
    assert set(experiment.space.domains) == {"objective.beta"}
    for override, near in (("train.objective.name=floored_asent", "floored_ascent"), ("merge.method=mean_then_trimm", "mean_then_trim")):
        with pytest.raises(InputError, match=f'did you mean "{near}"'):
            load_experiment(page / "mine.yaml", [override])


def test_names_of_plugins_that_are_not_listed_are_unknown(page: Path) -> None:
    load_experiment(page / "mine.yaml")
    assert {"floored_ascent", "mean_then_trim", "digits_leaked"} <= {*map(str, OBJECTIVES), *map(str, METHODS), *METRICS}
    with pytest.raises(InputError, match=r'train\.objective\.name = "floored_ascent"'):
        load_experiment(page / "mine.yaml", ["plugins=[mean_then_trim.py]"])
    assert tuple(METHODS)[-1] == "mean_then_trim"
    use_plugins([])
    assert list(OBJECTIVES) == list(ObjectiveName)
    assert "mean_then_trim" not in METHODS
    assert METRICS == {}


def test_a_plugin_is_found_beside_the_file_then_in_the_working_folder_then_as_a_module(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = write(tmp_path, (page / "digits_leaked.py").read_text(), name="digits_leaked.py")
    with inside(tmp_path):
        assert find_plugin("digits_leaked.py", beside=page).file == (page / "digits_leaked.py").resolve()
        assert find_plugin("digits_leaked.py", beside=tmp_path / "elsewhere").file == here.resolve()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_plugin("digits_leaked", beside=page).file == here.resolve()


def test_an_installed_package_offers_a_plugin_by_a_short_name(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of the group ``unlearn_ties.plugins``; what is offered and not named is not loaded."""
    write(tmp_path, (page / "digits_leaked.py").read_text(), name="their_metrics.py")
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[unlearn_ties.plugins]\nnumbers = their_metrics\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert active_plugins() == ()
    use_named(["numbers"])
    assert list(METRICS) == ["digits_leaked"]


# ---- what a wrong plugin is told


OBJECTIVE = """
from trainers.objectives.custom import register_objective
from trainers.objectives.table import Need
from trainers.objectives.terms import LossTerm, Side, Unit

@register_objective({arguments})
def term({parameters}):
    return {value}
"""
TERM = 'LossTerm(name="t", total={total}, unit=Unit.TOKEN, side=Side.{side}, weight=weight)'
SUM = TERM.format(total="forget.token_log_probs_N.sum()", side="FORGET")


def objective(arguments: str = '"mine"', parameters: str = "*, forget, weight", value: str = SUM) -> str:
    return OBJECTIVE.format(arguments=arguments, parameters=parameters, value=value)


def method(parameters: str = "*, updates, weights", value: str = "sum(updates)", formula: str = "sum") -> str:
    head = "from merging.methods.custom import register_method\n\n"
    return f'{head}@register_method("mine", formula="{formula}")\ndef merge({parameters}):\n    return {value}\n'


def metric(arguments: str = '"mine", meaning="a number"', parameters: str = "row") -> str:
    return f"from eval.metrics import register_metric\n\n@register_metric({arguments})\ndef value({parameters}):\n    return 1\n"


WRONG = {
    "an import that fails": ("import torch\nimport no_such_library\n", "line 2: import no_such_library"),
    "no Python": ("x = 1\ndef (:\n", "SyntaxError"),
    "an error of its own": ("def f():\n    return 1 / 0\n\nf()\n", "line 2: return 1 / 0"),
    "nothing registered": ("x = 1\n", "registers nothing"),
    "a taken objective": (objective('"npo"'), "objective npo exists already"),
    "a name with a dash": (objective('"my-objective"'), "this cannot be a name"),
    "a name twice": (objective() + objective(), "mine.py registers it"),
    "an unknown argument": (objective(parameters="*, forget, weight, gama"), "takes gama"),
    "no weight": (objective(parameters="*, forget", value="None"), "does not take weight"),
    "beta without a default": (objective(parameters="*, forget, weight, beta"), "takes it, but it has no default"),
    "a default without beta": (objective('"mine", beta=1.0'), "does not take it, but its default is 1.0"),
    "a mean": (objective(value=TERM.format(total="forget.token_log_probs_N.mean()", side="FORGET")), "no sum over rows"),
    "no term": (objective(value="forget.token_log_probs_N.sum()"), "returned Tensor, not a LossTerm"),
    "a term of the other side": (objective(value=SUM.replace("FORGET", "RETAIN")), "of the retain side"),
    "no gradient": (objective(value=TERM.format(total="forget.token_log_probs_N.detach().sum()", side="FORGET")), "no gradient"),
    "a vector": (objective(value=TERM.format(total="forget.token_log_probs_N", side="FORGET")), "no scalar"),
    "not zero without rows": (objective(value=TERM.format(total="forget.token_log_probs_N.sum() + (forget.num_rows == 0)", side="FORGET")),
                              "for a micro-batch without rows"),
    "both gradients": (objective('"mine", needs=[Need.SIDE_GRADIENTS]'), "not open to plugins"),
    "a taken method": (method().replace('"mine"', '"ties"'), "merge method ties exists already"),
    "a method's unknown argument": (method("*, updates, weights, sparsity"), "takes sparsity"),
    "a formula with an unknown value": (method(formula="{sparsity}"), "{sparsity}"),
    "an update of another shape": (method(value="updates[0].sum()"), "of shape ()"),
    "an update that is no number": (method(value="sum(updates) / 0"), "not finite"),
    "a taken metric": (metric('"knowledge", meaning="x"'), "metric knowledge exists already"),
    "a metric of no row": (metric(parameters=""), "does not take one argument"),
    "a metric of no kind": (metric('"mine", meaning="x", kind="mc"'), "no kind 'mc'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plugin_is_refused_with_its_line_and_leaves_nothing_behind(case: str, tmp_path: Path) -> None:
    text, says = WRONG[case]
    file = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        use_named([file])
    assert says in str(error.value)
    assert str(file) in str(error.value)
    assert "fix: " in str(error.value)
    assert list(OBJECTIVES) == list(ObjectiveName)
    assert METRICS == {}
    assert "mine" not in METHODS
    assert active_plugins() == ()
    assert not (tmp_path / "__pycache__").exists()


def test_the_right_versions_of_the_wrong_plugins_are_accepted(tmp_path: Path) -> None:
    """The negative control: what the cases above differ from."""
    for text in (objective(), objective('"mine", beta=1.0', "*, forget, weight, beta"), method(), metric()):
        use_named([write(tmp_path, text)])
        assert len(active_plugins()) == 1


@pytest.mark.parametrize(
    ("named", "says"),
    [("no_such.py", "the plugin no_such.py is not there"), ("no_such_module", "there is no plugin"), ("json", "a package, not one file")],
)
def test_a_plugin_that_is_not_there_is_told_with_its_place_in_the_list(named: str, says: str, page: Path) -> None:
    with pytest.raises(InputError, match=says) as error:
        load_experiment(page / "mine.yaml", [f"plugins=[floored_ascent.py, {named}]"])
    assert "mine.yaml, plugins[1]" in str(error.value)


def test_two_plugins_of_one_name_are_refused(page: Path, tmp_path: Path) -> None:
    other = write(tmp_path, metric(), name="digits_leaked.py")
    with pytest.raises(InputError, match="two plugins are called digits_leaked"):
        use_named([page / "digits_leaked.py", other])


def test_a_metric_that_fails_names_its_row_and_line(tmp_path: Path) -> None:
    text = metric().replace("return 1", 'return float("nan") if row["kind"] == "sc" else row["no_such"]')
    with pytest.raises(InputError, match=r"the metric mine (returned nan|failed: KeyError)") as error:
        scores_with(write(tmp_path, text))
    assert "row 'doc" in str(error.value)
