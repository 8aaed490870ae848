"""The cluster files as shipped: Ray's own checks, required fields, no keys, and commands that this package really has."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from launcher.cli import app, expand_weights
from launcher.problems import looks_secret
from launcher.templates import RECIPES, cluster_files, template_names

FILES = sorted(cluster_files().values())
RAY_VERBS = {"up", "down", "exec", "submit", "start", "stop", "symmetric-run", "get-auth-token", "job", "status", "rsync-down", "attach"}


def load(kind: str) -> Any:
    return yaml.safe_load(cluster_files()[kind].read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The arguments of every `unlearn ...` in a text, also behind `submit.py --`; a backslash at a line's end joins lines."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.findall(r"(?:(?<![\w/.-])unlearn|submit\.py(?: --tmux)? --) ((?:[a-z]+)(?: [^`'#&;|()]*)?)", line):
            words = shlex.split(part.split("  ")[0])
            if words[0] in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
                found.append(words)
    return found


def parse(arguments: list[str]) -> None:
    """Let the real command line read the arguments, and run nothing."""
    name, *rest = expand_weights(arguments)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, rest)


@pytest.mark.parametrize("path", [*FILES, RECIPES / "ignore.txt"], ids=lambda path: path.stem)
def test_no_file_holds_a_key(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not any(looks_secret(word) for word in re.split(r"[\s\"'=]+", text))
    assert not re.search(r"(?i)(api_key|token|secret)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9_-]{20,}", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_of_ours_exists(path: Path) -> None:
    """Read by the real command line; the negative control is an option that no command has."""
    found = commands(path.read_text(encoding="utf-8"))
    assert any(words[0] == "sweep" for words in found)
    for words in found:
        parse(words)
    with pytest.raises(Exception, match="no-such"):
        parse(["sweep", "a.yaml", "--no-such"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_that_is_named_is_shipped(path: Path) -> None:
    found = re.findall(r"[a-z][\w-]*(?=\.yaml)", path.read_text(encoding="utf-8"))
    experiments = {name for name in found if name.startswith("olmo")}
    assert experiments
    assert experiments <= set(template_names())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_verb_of_ray_exists(path: Path) -> None:
    from ray.scripts.scripts import cli

    verbs = set(re.findall(r"\bray ([a-z][a-z-]+)(?= [-a-z$>|]|$)", path.read_text(encoding="utf-8"), re.MULTILINE)) & RAY_VERBS
    assert verbs <= set(cli.commands)


# ---- `ray up`


@pytest.mark.parametrize("kind", ["aws", "onprem"])
def test_ray_accepts_the_file(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own schema and defaults, without a call to any cloud. The negative control: a key that the schema does not know."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("HOME", "/nonexistent")
    prepared = prepare_config(load(kind))
    validate_config(prepared)
    with pytest.raises(ValidationError, match="max_wrokers"):
        validate_config({**prepared, "max_wrokers": 3})


def test_the_aws_head_stays_and_its_workers_are_spot() -> None:
    config = load("aws")
    head, workers = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert head["resources"]["GPU"] == 0, "trials stay off the head"
    assert workers["min_workers"] == 0, "nothing is paid for while nothing runs"
    assert config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False


def test_the_nodes_of_a_site_are_all_counted() -> None:
    config = load("onprem")
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("kind", ["aws", "onprem"])
def test_a_login_shell_finds_the_environment_and_the_token(kind: str) -> None:
    config = load(kind)
    (line,) = [command for command in config["setup_commands"] if ".bashrc" in command]
    assert "unlearn/bin" in line
    assert "RAY_AUTH_MODE=token" in line
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


# ---- the others


def test_the_kubernetes_job_has_what_the_operator_requires() -> None:
    """https://docs.ray.io/en/latest/cluster/kubernetes/getting-started/rayjob-quick-start.html"""
    job = load("k8s")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for part in (head, group):
        pod = part["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"])
    (key,) = head["template"]["spec"]["containers"][0]["env"]
    assert set(key) == {"name", "valueFrom"}
    assert "env" not in group["template"]["spec"]["containers"][0], "only the driver needs the key"


def test_the_kubernetes_job_runs_the_ray_that_we_test() -> None:
    text = (RECIPES.parent.parent / "constraints.txt").read_text() if (RECIPES.parent.parent / "constraints.txt").exists() else ""
    found = re.search(r"^ray(?:\[.*\])?==(\S+)", text, re.MULTILINE)
    assert found is None or load("k8s")["spec"]["rayClusterSpec"]["rayVersion"] == found[1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_scripts_are_bash(tmp_path: Path) -> None:
    run = tmp_path / "run.sh"
    run.write_text(load("skypilot")["run"])
    for file in (cluster_files()["slurm"], run):
        done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_slurm_signals_the_script_before_the_time_is_up() -> None:
    text = cluster_files()["slurm"].read_text()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH"))
    assert options["signal"] == "B:TERM@300"
    assert options["ntasks-per-node"] == "1"
    assert {"exclusive", "requeue"} <= set(options)


def test_skypilots_own_ray_is_left_alone() -> None:
    """It listens on 6380; neither an address that is looked up nor `ray stop` may meet it."""
    task = load("skypilot")
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "secrets", "file_mounts", "setup", "run"}
    assert "ray stop" not in task["run"] + task["setup"]
    assert "auto" not in task["run"]
    assert "RAY_ADDRESS=127.0.0.1:6379 unlearn sweep" in task["run"]
    assert task["secrets"] == {"WANDB_API_KEY": ""}
