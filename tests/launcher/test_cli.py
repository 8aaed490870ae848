"""The command line: what it imports, what it says, and the code it exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import cli, doctor
from launcher.cli import expand_weights, main
from launcher.templates import template_names
from trainers.errors import RunError, SetupError

COMMANDS = ["quickstart", "doctor", "init", "validate", "memorize", "train", "sweep", "merge", "eval", "audit", "report", "status"]
VALID = "name: x\nmodel: {model_name_or_path: m}\ndata: {path: d}\n"


def unlearn(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "140", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The same in this process, without the cost of a new one."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, captured.out, captured.err


def modules_after(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {
    "torch",
    "ray",
    "transformers",
    "peft",
    "deepspeed",
    "datasets",
    "numpy",
    "scipy",
    "sklearn",
    "matplotlib",
    "pydantic",
    "yaml",
    "omegaconf",
}


def test_help_imports_nothing_heavy() -> None:
    """Help must answer at once. The negative control: loading a configuration does need pydantic and YAML, but no torch."""
    assert modules_after("import launcher.cli; launcher.cli.typer.main.get_command(launcher.cli.app)") & HEAVY == set()
    loading = modules_after("import launcher.load") & HEAVY
    assert {"pydantic", "yaml"} <= loading
    assert not loading & {"torch", "ray", "transformers", "peft", "deepspeed", "datasets"}


def test_help_lists_every_command() -> None:
    done = unlearn("--help")
    assert done.returncode == 0
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_purpose_and_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Example: unlearn {command}" in " ".join(out.split())
    purpose = out.split("\n\n")[1].strip()
    assert purpose.endswith(".")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("quickstart", ["--out", "--data", "--mia", "--mmlu", "--documents", "--seed"]),
        ("doctor", ["--cluster", "--storage"]),
        ("init", ["--template", "--cluster"]),
        ("validate", ["--resolved"]),
        ("sweep", ["--config", "--dry-run", "--resume", "--no-resume"]),
        ("merge", ["--base", "--trial", "--out", "--method", "--density", "--scale", "--weights"]),
        ("eval", ["--model", "--data", "--mia", "--mmlu", "--max-new-tokens", "--official", "--out"]),
        ("audit", ["--model", "--base", "--data", "--out", "--never-seen", "--mia", "--mmlu", "--attacks", "--documents", "--seed"]),
    ],
)
def test_options_are_the_documented_ones(capsys: pytest.CaptureFixture[str], command: str, options: list[str]) -> None:
    out = run(capsys, command, "--help")[1]
    assert all(option in out for option in options)


BAD = [
    (["swep"], ["Did you mean", "sweep"]),
    (["sweep"], ["Missing argument"]),
    (["sweep", "a.yaml", "--dry"], ["--dry-run"]),
    (["quickstart", "--documents", "0"], ["--documents"]),
    (["validate", "absent.yaml"], ["input error: configuration file not found", "absent.yaml", "fix:"]),
    (
        ["validate", "bad.yaml"],
        ["input error: bad.yaml: 2 problems", "train.objective.betta (line 4)", 'did you mean "beta"?', "merge.density = 1.4"],
    ),
    (["train", "search.yaml"], ["train.learning_rate (line 4)", "add for instance train.learning_rate="]),
    (["memorize", "ok.yaml"], ["target", "add a `target:` section"]),
    (["sweep", "ok.yaml", "train.lora.rank=3"], ["train.lora.rank (override)", "unknown key"]),
    (["init", "--template", "olmo"], ['no template "olmo"', "olmo-1b, olmo-1b-16, olmo-7b"]),
    (["init", "--template", "olmo-1b", "--cluster", "azure"], ["azure", "aws"]),
    (["report", "absent"], ["run folder not found", "fix:"]),
    (["status", "absent"], ["run folder not found"]),
    (["merge", "--base", "b", "--trial", "t", "--trial", "u", "--out", "o", "--density", "1.5"], ["--density = 1.5", "(0, 1]"]),
    (["merge", "--base", "b", "--trial", "t", "--trial", "u", "--out", "o", "--method", "tie"], ["--method", 'did you mean "ties"?']),
    (["merge", "--base", "b", "--trial", "t", "--trial", "u", "--out", "o", "--weights", "1"], ["1 weights for 2 trials"]),
    (["merge", "--base", "b", "--trial", "t", "--trial", "u", "--out", "o", "--weights", "1", "-2"], ["negative weights"]),
    (["init", "--template", "zjuklb"], ['did you mean "zjuklab"?', "ails-ntua", "zjuklab-under"]),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ok.yaml").write_text(VALID)
    (tmp_path / "bad.yaml").write_text(VALID + "train: {objective: {betta: 1}}\nmerge: {density: 1.4}\n")
    (tmp_path / "search.yaml").write_text(VALID + "train: {learning_rate: {values: [1.0e-4, 1.0e-3]}}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=lambda value: " ".join(value)[:40])
def test_bad_input_exits_2_and_says_what_to_change(
    capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], parts: list[str]
) -> None:
    before = sorted(os.listdir(folder))
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert all(part in err for part in parts), err
    assert "Traceback" not in err
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("index", [0, 1, 4, 5, 6, 9, 13])
def test_a_real_process_exits_2_as_well_and_prints_no_colours(folder: Path, index: int) -> None:
    arguments, parts = BAD[index]
    done = unlearn(*arguments, cwd=folder, NO_COLOR="1", FORCE_COLOR="1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert all(part in done.stderr for part in parts), done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("unlearn-ties ")
    assert out.split()[1][0].isdigit()


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (RunError("trial-03 failed", fix="see logs/rank-0.log"), 1, ["run failed: trial-03 failed", "fix: see logs"]),
        (SetupError("no room", where="/disk"), 3, ["environment error: no room", "where: /disk"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (ZeroDivisionError("division by zero\nsecond line"), 1, ["internal error: ZeroDivisionError: division by zero", "--debug"]),
    ],
)
def test_every_kind_of_failure_has_its_code(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, parts: list[str]
) -> None:
    def fail(run: Path) -> None:
        raise error

    monkeypatch.setattr(cli, "_run_folder", fail)
    result, _, err = run(capsys, "status", "x")
    assert result == code
    assert all(part in err for part in parts), err
    assert "Traceback" not in err
    if not isinstance(error, KeyboardInterrupt):
        result, _, err = run(capsys, "status", "x", "--debug")
        assert result == code
        assert "Traceback" in err


def test_commands_hand_their_arguments_to_the_stages(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def stage(name: str):
        return lambda **arguments: calls.append((name, arguments))

    stages = ["run_sweep", "run_memorize", "run_train", "validate_experiment", "evaluate_model"]
    monkeypatch.setitem(sys.modules, "launcher.stages", SimpleNamespace(**{name: stage(name) for name in stages}))  # type: ignore[arg-type]
    quickstart = SimpleNamespace(run_quickstart=stage("run_quickstart"))
    monkeypatch.setitem(sys.modules, "launcher.quickstart", quickstart)  # type: ignore[arg-type]
    for line in (
        "sweep search.yaml sweep.num_trials=4 --dry-run --no-resume",
        "train ok.yaml train.learning_rate=1e-3 --out t",
        "memorize ok.yaml target={}",
        "validate ok.yaml --resolved",
        "eval --model m --data d --mia i --max-new-tokens 8 --official --plugin p.py --out e.json",
        "quickstart",
    ):
        assert run(capsys, *line.split())[0] == 0
    (sweep, swept), (_, trained), (_, memorized), (_, validated), (_, evaluated), (_, quick) = calls
    assert sweep == "run_sweep"
    assert (swept["resume"], swept["dry_run"], swept["experiment"].config.sweep.num_trials) == (False, True, 4)
    assert list(swept["experiment"].space.domains) == ["learning_rate"]
    assert (trained["out"], trained["experiment"].config.train.learning_rate) == (Path("t"), 1e-3)
    assert memorized["experiment"].config.target is not None
    assert validated["resolved"] is True
    assert evaluated == {
        "model": Path("m"), "data": Path("d"), "mia": Path("i"), "mmlu": None, "max_new_tokens": 8, "official": True, "out": Path("e.json"),
        "processes": 1, "plugins": [Path("p.py")],
    }  # fmt: skip
    assert quick == {"out": Path("runs/quickstart"), "data": None, "mia": None, "mmlu": None, "documents": None, "seed": 42}


def test_validate_plans_for_other_machines(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    stages = SimpleNamespace(validate_experiment=lambda **arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, "launcher.stages", stages)  # type: ignore[arg-type]
    assert run(capsys, "validate", "ok.yaml")[0] == 0
    assert run(capsys, *["validate", "ok.yaml", "--nodes", "2", "--gpus-per-node", "8", "--gpu-memory", "80", "--gpu-name", "H100"])[0] == 0
    assert run(capsys, *["validate", "ok.yaml", "--gpus-per-node", "1", "--gpu-memory", "24"])[0] == 0
    wanted = [call["nodes"] for call in calls]
    assert wanted[0] is None
    assert (wanted[1].number, wanted[1].gpus, wanted[1].gpu_memory_gib, wanted[1].gpu_name) == (2, 8, 80, "H100")
    assert (wanted[2].number, wanted[2].gpus, wanted[2].gpu_memory_gib) == (1, 1, 24)
    for half in ("--nodes 2", "--gpus-per-node 8", "--gpu-memory 80 --nodes 2", "--gpu-name H100"):
        code, _, err = run(capsys, "validate", "ok.yaml", *half.split())
        assert code == 2
        assert "needs --gpus-per-node and --gpu-memory" in err
    assert len(calls) == 3


def test_the_configuration_of_a_sweep_may_be_an_option(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then everything else is an override, also where it comes first and holds a URI."""
    calls: list[Any] = []
    module = SimpleNamespace(run_sweep=lambda **arguments: calls.append(arguments["experiment"].config))
    monkeypatch.setitem(sys.modules, "launcher.stages", module)  # type: ignore[arg-type]
    for line in ("--config search.yaml name=a//b seed=3", "name=a//b -c search.yaml seed=3", "name=a//b seed=3 --config=search.yaml"):
        code, _, err = run(capsys, "sweep", *line.replace("name=a//b", "data.path=a//b").split())
        assert code == 0, err
    assert [(config.data.path, config.seed) for config in calls] == [("a//b", 3)] * 3


def test_merge_hands_its_settings_to_the_merge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    module = SimpleNamespace(merge_checkpoint=lambda **arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, "merging.merge", module)  # type: ignore[arg-type]
    line = "merge --base b --trial t --trial u --weights 1 0.5 --out o --density 0.2 --scale 1.5"
    assert run(capsys, *line.split())[0] == 0
    (call,) = calls
    assert (call["base"], call["trials"], call["out"]) == (Path("b"), [Path("t"), Path("u")], Path("o"))
    config = call["config"]
    assert (config.method, config.density, config.scale, config.weights) == ("ties", 0.2, 1.5, (1.0, 0.5))


def test_several_weights_follow_one_option() -> None:
    assert expand_weights(["--weights", "1", "-0.5", "2e-1", "--out", "3"]) == [
        "--weights", "1", "--weights", "-0.5", "--weights", "2e-1", "--out", "3",
    ]  # fmt: skip
    assert expand_weights(["--weights", "1", "--weights", "2", "x", "3"]) == ["--weights", "1", "--weights", "2", "x", "3"]
    assert expand_weights(["--weights", "heavy"]) == ["--weights", "heavy"]


def test_init_writes_into_the_current_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "init", "--template", "quickstart", "--cluster", "k8s")
    assert (code, out.split()) == (0, ["wrote", "quickstart.yaml", "wrote", "cluster-k8s.yaml"])
    assert run(capsys, "init", "--template", "quickstart")[0] == 2


def test_init_without_a_template_lists_them_all_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "init")
    assert (code, err) == (0, "")
    for name in template_names():
        assert sum(line.split()[:1] == [name] for line in out.splitlines()) == 1
    assert out.index("Start here") < out.index("quickstart") < out.index("Published systems") < out.index("zjuklab")
    assert os.listdir(tmp_path) == []
    assert "without it all are listed" in " ".join(run(capsys, "init", "--help")[1].split())


def test_init_writes_a_preset_or_a_cluster_file_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "init", "--template", "zjuklab")[1] == "wrote zjuklab.yaml\n"
    assert run(capsys, "init", "--cluster", "slurm")[1] == "wrote cluster-slurm.sh\n"


# ---- doctor


@pytest.mark.slow
def test_the_doctor_runs_on_this_machine() -> None:
    done = unlearn("doctor", WANDB_API_KEY="f" * 40)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("python", "torch", "deepspeed 0.", "ray 2.", "CPU cores", "GiB memory", "GiB free", "Weights & Biases key: yes"):
        assert word in done.stdout
    assert "f" * 40 not in done.stdout + done.stderr
    statuses = {line[:4] for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert statuses <= {"pass", "warn"}


def test_the_doctor_exits_3_when_something_required_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    missing = doctor.Check("fail", "deepspeed cannot be imported", "pip install deepspeed")
    monkeypatch.setattr(doctor, "check_deepspeed", lambda **_: missing)
    code, out, _ = run(capsys, "doctor")
    assert code == 3
    assert "fail  deepspeed cannot be imported\n      fix: pip install deepspeed\n" in out


def test_single_checks_grade_what_they_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_python((3, 10, 1)).status == "fail"
    assert doctor.check_python((3, 11, 0)).status == "pass"
    assert doctor.check_package("no-such-package").status == "fail"
    usage = namedtuple("usage", "free")
    for free, status in ((2**29, "fail"), (5 * 2**30, "warn"), (100 * 2**30, "pass")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: usage(free))
        assert doctor.check_disk(tmp_path).status == status
    assert doctor.check_wandb({"WANDB_API_KEY": "secret"}).text == "Weights & Biases key: yes"
    assert "offline" in doctor.check_hub({"HF_HUB_OFFLINE": "1"}).text
    for output, status in (("0.19.8", "pass"), ("[notice]\n0.20.0+cpu", "pass"), ("0.15.3", "fail")):
        done = SimpleNamespace(returncode=0, stdout=output + "\n", stderr="")
        assert doctor.check_deepspeed(has_gpu=False, run=lambda *_, done=done, **__: done).status == status
    broken = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: no torch\n")
    assert "ImportError: no torch" in doctor.check_deepspeed(has_gpu=False, run=lambda *_, **__: broken).text


def test_no_cluster_is_an_environment_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(doctor, "check_deepspeed", lambda **_: doctor.Check("pass", "deepspeed"))
    code, _, err = run(capsys, "doctor", "--cluster")
    assert code == 3
    assert "no Ray cluster to connect to" in err
    assert "ray start --head" in err
