"""Reading an experiment: every mistake is told with its path, its line and a remedy, and all of them at once."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config import ExperimentConfig
from launcher.load import LoadedExperiment, dump_yaml, load_experiment
from launcher.search_space import Choice, Range
from trainers.errors import InputError

BASE = "name: x\nmodel: {model_name_or_path: m}\ndata: {path: d}\n"
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"
HUB_TOKEN = "hf_" + "aB3" * 11


def write(folder: Path, text: str) -> Path:
    path = folder / "npo.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str = "", *overrides: str, **options: Any) -> LoadedExperiment:
    return load_experiment(write(folder, BASE + text), overrides, **options)


def message(folder: Path, text: str = "", *overrides: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides, **options)
    return str(caught.value)


# (text below the smallest valid file, which ends in line 3; what the message must hold)
MISTAKES: list[tuple[str, list[str]]] = [
    ("train: {objective: {betta: 1}}\n", ["train.objective.betta (line 4)", 'unknown key; did you mean "beta"?']),
    ("trian: {}\n", ["trian (line 4)", 'did you mean "train"?']),
    ("sweep:\n  num_trails: 3\n", ["sweep.num_trails (line 5)", 'did you mean "num_trials"?']),
    ("sweep: {zzz: 3}\n", ["sweep.zzz", "unknown key; known: num_trials, search"]),
    ("train: {learning-rate: 1}\n", ["train.learning-rate", 'did you mean "learning_rate"?']),
    ("merge: {density: 1.4}\n", ["merge.density = 1.4 (line 4)", "must be a number in (0, 1]: fraction of each task vector kept"]),
    ("train: {learning_rate: -1}\n", ["train.learning_rate = -1", "must be a number > 0"]),
    ('train: {learning_rate: "fast"}\n', ['train.learning_rate = "fast"', "must be a number > 0"]),
    ('train: {learning_rate: "1e-4"}\n', ['train.learning_rate = "1e-4"', "must be a number > 0"]),
    ("train: {learning_rate: true}\n", ["train.learning_rate = true", "must be a number"]),
    ("train: {learning_rate: .nan}\n", ["train.learning_rate", "must be a number > 0"]),
    ("train: {lora: {r: 2.5}}\n", ["train.lora.r = 2.5", "must be a whole number >= 1: rank"]),
    ("train: {max_length: 3}\n", ["train.max_length = 3", "a whole number >= 8, or null"]),
    ("train: {objective: {name: npo_kl}}\n", ['train.objective.name = "npo_kl"', "one of grad_ascent", "did you mean"]),
    ("train: {engine: {zero_stage: 4}}\n", ["train.engine.zero_stage = 4", "one of 0, 1, 2, 3"]),
    ("train: {engine: {name: torch, ranks: 2}}\n", ["train.engine (line 4)", "use deepspeed for engine.ranks > 1"]),
    ("train: {train_batch_size: 2}\n", ["train.per_device_train_batch_size", "use at most 2, or raise train_batch_size"]),
    ("train: {lora: 8}\n", ["train.lora = 8", "a mapping of settings, or null: null trains all parameters"]),
    ("train: {lora: {target_modules: 3}}\n", ["train.lora.target_modules = 3", "must be text or a list: module names"]),
    ("train: 3\n", ["train = 3", "a mapping of settings"]),
    ("merge: {density: {values: [0.5, 1]}}\n", ["merge.density", "searched settings stand under `train`"]),
    ("sweep: {search: randm}\n", ['sweep.search = "randm"', "one of random, grid", 'did you mean "random"?']),
    ("sweep: {start_points: [{learning_rate: -1}]}\n", ["sweep.start_points[0].learning_rate = -1", "must be a number > 0"]),
    ("sweep: {start_points: [{lora.rank: 8}]}\n", ["sweep.start_points[0].lora.rank", "unknown key; known: r, lora_alpha"]),
    ("sweep: {start_points: [{train_batch_size: 1}]}\n", ["sweep.start_points[0].per_device_train_batch_size", "use at most 1"]),
    ("sweep: {num_trials: 1, start_points: [{}, {}]}\n", ["sweep.num_trials (line 4)", "raise num_trials, or drop start points"]),
    ("storage_path: ftp://b/runs\n", ["storage_path (line 4)", "must be a folder"]),
    (
        "trim: 1\nsweep: {start_points: [1, 2, 3]}\n",
        ["trim", "sweep.start_points[0] = 1", "sweep.start_points[2] = 3 (line 5)", "must be a mapping"],
    ),
    ("pairs: {densities: [a, 1, b]}\n", ['pairs.densities[0] = "a" (line 4)', 'pairs.densities[2] = "b" (line 4)', "must be a number"]),
    ("sweep: {start_points: [1, {learning_rate: -1}]}\n", ["sweep.start_points[0] = 1", "sweep.start_points[1].learning_rate = -1"]),
    ("eval: null\n", ["eval = null (line 4)", "must be a mapping of settings"]),
    ("pairs: {densities: [2]}\n", ["pairs (line 4)", "each must be in (0, 1]"]),
    ("name: y\n", ["name (line 4)", "given twice, first in line 1; delete one"]),
    ("train:\n  lora:\n    r: 1\n    r: 2\n", ["train.lora.r (line 7)", "given twice, first in line 6"]),
    ("train: {1: 2}\n", ["train.1 (line 4)", "keys must be text; put it in quotes"]),
    # search domains
    ("train: {learning_rate: {min: 1e-5}}\n", ["train.learning_rate (line 4)", "add `max`"]),
    ("train: {learning_rate: {min: 2, max: 1}}\n", ["train.learning_rate", "min = 2 is not below max = 1; swap them"]),
    ("train: {learning_rate: {min: 0, max: 1, distribution: log_uniform}}\n", ["train.learning_rate.min = 0", "> 0 for log_uniform"]),
    ("train: {learning_rate: {min: 0, max: 1}}\n", ["train.learning_rate.min = 0", "must be a number > 0"]),
    (
        "train: {learning_rate: {min: 1, max: 2, distribution: loguniform}}\n",
        ["train.learning_rate.distribution", "one of uniform, log_uniform"],
    ),
    ("train: {learning_rate: {values: []}}\n", ["train.learning_rate.values", "at least one value, for instance"]),
    ("train: {learning_rate: {values: [1, 1]}}\n", ["train.learning_rate.values", "lists a value twice; delete one"]),
    ("train: {learning_rate: {values: [1e-4, -1]}}\n", ["train.learning_rate.values[1] = -1 (line 4)", "must be a number > 0"]),
    ("train: {learning_rate: {values: [1], min: 1}}\n", ["train.learning_rate", "give either `values`, or `min` and `max`"]),
    ("train: {learning_rate: {values: [1], mx: 1}}\n", ["train.learning_rate.mx", 'did you mean "max"?']),
    ("train: {lora: {r: {min: 4, max: 8, distribution: uniform}}}\n", ["train.lora.r.distribution", "use int_uniform, or `values`"]),
    ("train: {lora: {rank: {values: [4]}}}\n", ["train.lora.rank", "unknown key; known: r, lora_alpha"]),
    ("train: {engine: {ranks: {values: [1, 2]}}}\n", ["train.engine.ranks", "cannot be searched", "run one sweep for each"]),
    ("train: {train_batch_size: {values: [8, 2]}}\n", ["train.train_batch_size.values[1] = 2", "use at most 2"]),
    # secrets
    (f"storage_path: {WANDB_KEY}\n", ["storage_path (line 4)", "looks like an access key", "set it in the environment"]),
    (f"tracking: {{key: {HUB_TOKEN}}}\n", ["tracking.key", "looks like an access key", "delete it"]),
]


@pytest.mark.parametrize(("text", "parts"), MISTAKES)
def test_a_mistake_is_told_with_its_path_and_its_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    told = message(tmp_path, text)
    assert told.startswith("npo.yaml: ")
    for part in parts:
        assert part in told
    assert "ValidationError" not in told
    assert "pydantic" not in told


def test_one_mistake_is_one_problem(tmp_path: Path) -> None:
    """The branches of a union, the base and the domain's value must not each report it again."""
    for text in (
        "train: {lora: {target_modules: 3}}\n",
        "train: {learning_rate: {values: [-1]}}\n",
        "train: {lora: {r: {values: [8, 0]}}}\n",
    ):
        assert message(tmp_path, text).startswith("npo.yaml: 1 problem\n")


def test_all_problems_are_told_together_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Also the rules between settings, which pydantic checks only where all fields are valid, and the overrides."""
    told = message(
        tmp_path,
        "train:\n  objective: {betta: 1}\n  learning_rate: {values: [-1]}\n  train_batch_size: 2\n"
        "merge: {density: 1.4}\nstorage_path: ftp://b\n",
        "sweep.num_trials=0",
    )
    assert told.startswith("npo.yaml: 6 problems")
    places = ["betta (line 5)", "values[0] = -1 (line 6)", "merge.density", "storage_path", "sweep.num_trials = 0 (override)"]
    positions = [told.index(place) for place in places]
    assert positions == sorted(positions)
    assert "train.per_device_train_batch_size" in told


def test_a_wrong_value_does_not_accuse_its_neighbours(tmp_path: Path) -> None:
    """With train_batch_size = 2 and an unreadable per_device size, nothing is known of how they fit together."""
    told = message(tmp_path, "train: {train_batch_size: 2, per_device_train_batch_size: two}\n")
    assert told.startswith("npo.yaml: 1 problem\n")
    assert 'per_device_train_batch_size = "two"' in told


def test_missing_settings_are_named_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_experiment(write(tmp_path, "merge: {density: 2}\n"))
    told = str(caught.value)
    assert "name " in told
    assert "is required: " in told
    assert "  data " in told
    assert "model.model_name_or_path" in told
    assert "merge.density = 2" in told


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["the file is empty", "unlearn init"]),
        ("# nothing\n", ["the file is empty"]),
        ("- 1\n", ["not a mapping", "line 1", "key: value"]),
        ("name: x\ntrain: {a: [1\n", ["not valid YAML", "npo.yaml, line", "check indentation"]),
        ("name: x\n\tseed: 1\n", ["a tab where YAML wants spaces", "line 2", "indent with spaces"]),
        ("name: 'x\n", ["not valid YAML", "line"]),
        ("name: x\nseed: !!python/object/apply:os.getcwd []\n", ["not valid YAML", "line 2"]),
        ("name: &a [*a]\n", ["an alias that contains itself", "key name"]),
        ("name: x\x07\n", ["a character that YAML does not allow", "line 1"]),
    ],
)
def test_text_that_is_no_yaml_mapping_is_told_with_its_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_experiment(write(tmp_path, text))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    with pytest.raises(InputError, match=r'did you mean ".*npo\.yaml"'):
        load_experiment(tmp_path / "npoo.yaml")
    with pytest.raises(InputError, match="unlearn init --template"):
        load_experiment(tmp_path / "nowhere" / "zzz.yaml")


def test_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"experiment\.yaml"):
        load_experiment(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_experiment(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.learning_rate", ["train.learning_rate (override)", "overrides are key=value"]),
        ("=3", ["(override)", "overrides are key=value"]),
        ("train..x=3", ["(override)", "overrides are key=value"]),
        ("train.learning_rat=1", ["train.learning_rat (override)", 'did you mean "learning_rate"?']),
        ("train.learning_rate=[1", ["train.learning_rate", "put the value in quotes"]),
        ("sweep.start_points[3].x=1", ["sweep.start_points[3].x", "cannot be set"]),
        ("train.weight_decay=-1", ["train.weight_decay = -1 (override)", ">= 0"]),
    ],
)
def test_a_wrong_override_is_told_as_an_override(tmp_path: Path, override: str, parts: list[str]) -> None:
    told = message(tmp_path, "sweep: {start_points: [{}]}\n", override)
    assert all(part in told for part in parts), told


def test_overrides_set_nested_values_in_yaml_words(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "train: {lora: null}\nsweep: {start_points: [{learning_rate: 1.0}]}\n",
        "train.lora.r=4",
        "train.learning_rate=2e-3",
        "train.max_length=null",
        "data.rehearse=[train, test]",
        "storage_path=a=b",
        "sweep.start_points[0].learning_rate=0.5",
        "seed=1",
        "seed=2",
    ).config
    assert config.train.lora is not None
    assert config.train.lora.r == 4
    assert config.train.learning_rate == 2e-3
    assert config.data.rehearse == ("train", "test")
    assert config.storage_path == "a=b"
    assert config.sweep.start_points == ({"learning_rate": 0.5},)
    assert config.seed == 2


def test_an_override_replaces_a_domain_and_can_be_one(tmp_path: Path) -> None:
    text = "train: {learning_rate: {values: [1.0e-4, 1.0e-3]}}\n"
    assert load(tmp_path, text).space.domains == {"learning_rate": Choice((1e-4, 1e-3))}
    fixed = load(tmp_path, text, "train.learning_rate=1e-2")
    assert not fixed.space
    assert fixed.config.train.learning_rate == 1e-2
    changed = load(tmp_path, text, "train.learning_rate={min: 1e-5, max: 1e-3, distribution: log_uniform}")
    assert changed.space.domains == {"learning_rate": Range(1e-5, 1e-3, "log_uniform")}


def test_domains_are_lifted_out_and_leave_their_middle(tmp_path: Path) -> None:
    """sqrt(1e-5 * 1e-3) = 1e-4; (4 + 9) // 2 = 6; a list leaves its first value."""
    loaded = load(
        tmp_path,
        "train:\n  objective: {beta: {min: 0.1, max: 0.5}}\n  learning_rate: {min: 1e-5, max: 1e-3, distribution: log_uniform}\n"
        "  lora: {r: {min: 4, max: 9}, target_modules: {values: [all-linear, [q_proj, v_proj]]}}\n",
    )
    assert list(loaded.space.domains) == ["objective.beta", "learning_rate", "lora.r", "lora.target_modules"]
    assert loaded.space.domains["lora.r"] == Range(4, 9, "int_uniform")
    train = loaded.config.train
    assert train.lora is not None
    assert (train.objective.beta, train.learning_rate, train.lora.r, train.lora.target_modules) == (0.3, 1e-4, 6, "all-linear")


def test_one_trial_needs_one_value_everywhere(tmp_path: Path) -> None:
    text = "train: {learning_rate: {values: [1.0e-4, 1.0e-3]}, lora: {r: {min: 4, max: 8}}}\n"
    told = message(tmp_path, text, require="one_trial")
    assert "train.learning_rate (line 4)" in told
    assert "add for instance train.learning_rate=0.0001" in told
    assert "train.lora.r=6" in told
    assert load(tmp_path, text, "train.learning_rate=1e-4", "train.lora.r=6", require="one_trial").config.train.learning_rate == 1e-4


def test_memorize_needs_a_target_section(tmp_path: Path) -> None:
    assert "target: {}" in message(tmp_path, require="target")
    assert load(tmp_path, "target: {}\n", require="target").config.target is not None


def test_yaml_words_mean_what_they_look_like(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text, no as false, 12:30 as 750, 010 as 8 and 2024-01-01 as a date."""
    for text in ("no", "on", "12:30", "010", "1_000", "2024-01-01", "0x1f", "y"):
        assert load(tmp_path, f"storage_path: {text}\n").config.storage_path == text
    assert load(tmp_path, "train: {learning_rate: 1e-4}\n").config.train.learning_rate == 1e-4
    assert load(tmp_path, "train: {num_train_epochs: 3, max_grad_norm: .5}\n").config.train.max_grad_norm == 0.5


def test_anchors_and_the_environment_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_TEST_SCRATCH", "/scratch/me")
    loaded = load(
        tmp_path,
        "storage_path: ${oc.env:UNLEARN_TEST_SCRATCH}/runs\n"
        "sweep:\n  start_points:\n    - &a {learning_rate: 1.0, seed: 3}\n    - {<<: *a, seed: 4}\n",
    )
    assert loaded.config.storage_path == "/scratch/me/runs"
    assert loaded.config.sweep.start_points[1] == {"learning_rate": 1.0, "seed": 4}
    assert "${oc.env:NAME}" in message(tmp_path, "storage_path: ${oc.env:UNLEARN_TEST_ABSENT}\n")
    assert "${" in message(tmp_path, "storage_path: ${\n")


@pytest.mark.parametrize("key", [WANDB_KEY, HUB_TOKEN])
@pytest.mark.parametrize("place", ["model: {model_name_or_path: KEY}", "KEY: 1", "sweep: {start_points: [{a: KEY}]}", "name: KEY"])
def test_a_key_is_refused_and_never_printed(tmp_path: Path, key: str, place: str) -> None:
    with pytest.raises(InputError) as caught:
        load_experiment(write(tmp_path, "data: {path: d}\n" + place.replace("KEY", key) + "\n"))
    assert "looks like an access key" in str(caught.value)
    assert key not in str(caught.value)


def test_a_key_on_the_command_line_or_in_the_environment_is_not_printed_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_TEST_KEY", HUB_TOKEN)
    for told in (
        message(tmp_path, "", HUB_TOKEN),
        message(tmp_path, "", f"storage_path={HUB_TOKEN}"),
        message(tmp_path, "", f"train.{HUB_TOKEN}=1"),
        message(tmp_path, "storage_path: ${oc.env:UNLEARN_TEST_KEY}\n"),
    ):
        assert HUB_TOKEN not in told


def test_a_commit_hash_inside_a_path_is_no_key(tmp_path: Path) -> None:
    folder = f"hub/snapshots/{WANDB_KEY}"
    assert load(tmp_path, "", f"model.model_name_or_path={folder}").config.model.model_name_or_path == folder


# ---- round trip


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    [
        "no",
        "1e-4",
        "007",
        "null",
        "~",
        "${x}",
        "\\${x}",
        "\\\\${",
        "a: b",
        "- x",
        "#",
        "'",
        '"',
        "2024-01-01",
        "\n",
        " x ",
        "=",
        "<<",
        "???",
        "\x85",
        "é",
    ]
)
numbers = st.floats(min_value=1e-12, max_value=1e12, allow_nan=False)


@st.composite
def experiments(draw: st.DrawFn) -> ExperimentConfig:
    values: dict[str, Any] = {
        "name": draw(st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)),
        "seed": draw(st.integers(0, 2**40)),
        "storage_path": draw(texts.filter(lambda text: "://" not in text)),
        "model": {"model_name_or_path": draw(texts), "dtype": draw(st.sampled_from(["float32", "bfloat16"]))},
        "data": {"path": draw(texts), "columns": draw(st.dictionaries(st.sampled_from(["id", "input"]), texts, max_size=2))},
        "train": {
            "learning_rate": draw(numbers),
            "weight_decay": draw(st.sampled_from([0.0, 1e-300, 0.1 + 0.2])),
            "lora": draw(
                st.none() | st.builds(lambda r, t: {"r": r, "target_modules": t}, st.integers(1, 9), texts | st.tuples(texts, texts))
            ),
            "objective": {"name": draw(st.sampled_from(["npo", "grad_diff"])), "retain_ce_weight": draw(st.none() | numbers)},
        },
        "sweep": {"start_points": draw(st.lists(st.fixed_dictionaries({"learning_rate": numbers}), max_size=2))},
        "target": draw(st.none() | st.just({})),
    }
    if draw(st.booleans()):
        values["train"]["seed"] = draw(st.integers(0, 9))
    return ExperimentConfig.model_validate(values)


@given(config=experiments())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_dumped_configuration_loads_to_itself(tmp_path: Path, config: ExperimentConfig) -> None:
    """Also whether the seed of the trials was given, which decides if every trial gets its own."""
    loaded = load_experiment(write(tmp_path, dump_yaml(config)))
    assert loaded.config == config
    assert not loaded.space
    assert ("seed" in loaded.config.train.model_fields_set) == ("seed" in config.train.model_fields_set)


def test_a_dumped_search_loads_to_the_same_search(tmp_path: Path) -> None:
    text = (
        "train:\n  learning_rate: {min: 1e-5, max: 1e-3, distribution: log_uniform}\n  lora: {r: {values: [8, 4]}}\n"
        "  num_train_epochs: {min: 1, max: 5}\n"
    )
    first = load(tmp_path, text)
    second = load_experiment(write(tmp_path, dump_yaml(first.config, space=first.space)))
    assert second.config == first.config
    assert second.space.domains == first.space.domains
    assert not load_experiment(write(tmp_path, dump_yaml(first.config))).space
