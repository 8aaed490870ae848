"""Models and trials that cannot be used, each with its message."""

from __future__ import annotations

from tests.helpers.bad_commands import LONG, Case, also, evaluate, merge, run
from tests.helpers.bad_input import cut, edit_json, edit_tensors, flip


def widen(tensors: dict) -> None:
    """One column more in every factor that reads the input."""
    for name, value in tensors.items():
        if ".lora_A." in name:
            tensors[name] = value.new_zeros(value.shape[0], value.shape[1] + 1)


def poison(tensors: dict) -> None:
    """One value that is no number."""
    next(iter(tensors.values()))[0, 0] = float("nan")


MODELS = [
    Case(
        "no target folder",
        lambda p: run(p, "sweep", model={"model_name_or_path": "nowhere"}),
        ("model folder not found", "nowhere (model.model_name_or_path)", "fix:"),
    ),
    Case("no base folder", lambda p: run(p, "memorize", target={"base": "nowhere"}), ("model folder not found", "nowhere (target.base)")),
    Case(
        "target without config.json",
        lambda p: run(p, "sweep", model={"model_name_or_path": p.model(without=["config.json"])}),
        ("no config.json", "model", "found:", "fix:"),
    ),
    Case(
        "target with a broken config.json",
        lambda p: run(p, "validate", model={"model_name_or_path": p.model(change=lambda m: cut(m / "config.json"))}),
        ("configuration cannot be read", "config.json", "fix:"),
    ),
    Case(
        "target with a broken tokenizer",
        lambda p: run(p, "validate", model={"model_name_or_path": p.model(change=lambda m: cut(m / "tokenizer.json"))}),
        ("the tokenizer cannot be read", "model", "fix:"),
    ),
    Case("eval: no folder", lambda p: evaluate(p, "nowhere"), ("model folder not found", "nowhere", "Hugging Face layout")),
    Case("eval: a file", lambda p: evaluate(p, p.write("m", "x")), ("a file where a model folder is expected", "fix:")),
    Case(
        "eval: no config.json",
        lambda p: evaluate(p, p.model(without=["config.json"])),
        ("no config.json", "found: generation_config.json, model.safetensors", "fix:"),
    ),
    Case(
        "eval: no tokenizer",
        lambda p: evaluate(p, p.model(without=["tokenizer.json", "tokenizer_config.json"])),
        ("no tokenizer in the model folder", "fix: save the tokenizer"),
    ),
    Case(
        "eval: truncated weights",
        lambda p: evaluate(p, p.model(change=lambda m: cut(m / "model.safetensors"))),
        ("the checkpoint cannot be read", "model", "fix:"),
    ),
    Case(
        "eval: pickled weights",
        lambda p: evaluate(p, p.model(change=lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"))),
        ("no .safetensors weights", "can run code", "convert pickled weights"),
    ),
    Case(
        "eval: a tensor missing",
        lambda p: evaluate(
            p, p.model(change=lambda m: edit_tensors(m / "model.safetensors", lambda t: t.pop("model.layers.0.mlp.up_proj.weight")))
        ),
        ("lacks 1 of the model's tensors", "mlp.up_proj.weight", "fix:"),
    ),
    Case(
        "eval: another shape",
        lambda p: evaluate(p, p.model(change=lambda m: edit_json(m / "config.json", intermediate_size=96))),
        ("the checkpoint cannot be read", "model"),
    ),
    Case(
        "eval: the adapter's base has moved",
        lambda p: evaluate(p, p.trial(change=lambda t: edit_json(t / "adapter_config.json", base_model_name_or_path="gone"))),
        ("base model is not there: gone", "adapter_config.json", "fix:"),
    ),
    Case(
        "eval: a damaged adapter",
        lambda p: evaluate(p, p.trial(change=lambda t: flip(t / "adapter_model.safetensors"))),
        ("not those that were written", "adapter_model.safetensors", "fix:"),
    ),
    Case(
        "eval: out is a folder",
        lambda p: evaluate(p, p.world.target, out="lume"),
        ("a folder where a file is to be written", "fix: name a file"),
    ),
    Case(
        "eval: out below a file",
        lambda p: evaluate(p, p.world.target, out="lume/forget.jsonl/e.json"),
        ("a file stands where a folder is needed", "forget.jsonl"),
    ),
    Case(
        "eval: no data",
        lambda p: ["eval", "--model", str(p.world.target), "--data", str(p.folder / "none"), "--out", "e.json"],
        ("path not found", "none"),
    ),
    Case(
        "eval: no strangers",
        lambda p: also(p.mia(nonmember=None), evaluate(p, p.world.target, "--mia", "mia")),
        ("no nonmember.jsonl", "mia"),
    ),
    Case(
        "eval: MMLU of five columns",
        lambda p: also(p.mmlu(test="a,1,2,3,A\n"), evaluate(p, p.world.target, "--mmlu", "mmlu")),
        ("5 columns instead of 6", "line 1"),
    ),
    Case(
        "eval: a row too long",
        lambda p: also(
            evaluate(p, ""),
            also(p.lume(forget=p.edited(1, output=LONG)), ["eval", "--model", str(p.world.target), "--data", "lume", "--out", "e.json"]),
        ),
        ("the longest allowed is 128", "row 'f0qa0'"),
    ),
    Case(
        "eval: no tokens",
        lambda p: evaluate(p, p.world.target, "--max-new-tokens", "0"),
        ("--max-new-tokens", "greater than or equal to 1"),
    ),
]

MERGE = [
    Case("merge: no trial", lambda p: ["merge", "--base", "b", "--out", "o"], ("Missing option '--trial'",)),
    Case("merge: no base", lambda p: merge(p, p.world.over, base="nowhere"), ("model folder not found", "nowhere")),
    Case(
        "merge: base without weights",
        lambda p: merge(p, p.world.over, base=p.model(without=["model.safetensors"])),
        ("no .safetensors weights", "model"),
    ),
    Case(
        "merge: density",
        lambda p: merge(p, p.world.over, "--density", "1.5"),
        ("--density = 1.5", "a number in (0, 1]", "unlearn merge --help"),
    ),
    Case("merge: scale", lambda p: merge(p, p.world.over, "--scale", "0"), ("--scale = 0", "> 0")),
    Case("merge: method", lambda p: merge(p, p.world.over, "--method", "tie"), ("--method", 'did you mean "ties"?')),
    Case(
        "merge: number of weights",
        lambda p: merge(p, p.world.over, "--weights", "1", "2", "3"),
        ("3 weights for 2 trials", "one number per --trial"),
    ),
    Case("merge: negative weights", lambda p: merge(p, p.world.over, "--weights", "1", "-1"), ("negative weights", "task_arithmetic")),
    Case(
        "merge: out is no merge",
        lambda p: also(p.write("out/thesis.tex", "x"), merge(p, p.world.over)),
        ("the output folder is not empty and holds no earlier merge", "out", "fix:"),
    ),
    Case("merge: out is a file", lambda p: also(p.write("out", "x"), merge(p, p.world.over)), ("the output is a file", "out", "fix:")),
    Case(
        "merge: out below a file",
        lambda p: also(p.write("f", "x"), merge(p, p.world.over, out="f/out")),
        ("a file stands where a folder is needed", "f"),
    ),
    Case(
        "merge: out is the base",
        lambda p: merge(p, p.world.over, base=p.model(change=lambda m: (m / "merge.json").write_text("{}")), out="model"),
        ("the output folder is or contains the input", "fix: name another"),
    ),
    Case("merge: no such trial", lambda p: merge(p, "nowhere"), ("trial folder not found", "nowhere", "fix:")),
    Case("merge: a trial that is a file", lambda p: merge(p, p.write("t", "x")), ("a file where a trial folder is expected", "fix:")),
    Case(
        "merge: a trial without checkpoint",
        lambda p: also(p.write("t/config.yaml", "x"), merge(p, "t")),
        ("the trial has no complete checkpoint", "t", "let the trial finish"),
    ),
    Case(
        "merge: a run of several trials",
        lambda p: merge(p, p.world.over.parent.parent),
        ("a run of 2 trials where one trial is expected", "trials/over"),
    ),
    Case(
        "merge: truncated weights",
        lambda p: merge(p, p.trial(without=["manifest.json"], change=lambda t: cut(t / "adapter_model.safetensors"))),
        ("header describes", "adapter_model.safetensors", "incompletely", "fix: copy the file again"),
    ),
    Case(
        "merge: truncated header",
        lambda p: merge(p, p.trial(without=["manifest.json"], change=lambda t: cut(t / "adapter_model.safetensors", keep=0.001))),
        ("not a complete safetensors file", "adapter_model.safetensors"),
    ),
    Case(
        "merge: truncated weights with a manifest",
        lambda p: merge(p, p.trial(change=lambda t: cut(t / "adapter_model.safetensors"))),
        ("not those that were written", "adapter_model.safetensors", "fix:"),
    ),
    Case(
        "merge: a flipped bit",
        lambda p: merge(p, p.trial(change=lambda t: flip(t / "adapter_model.safetensors"))),
        ("not those that were written", "SHA-256", "fix:"),
    ),
    Case(
        "merge: an adapter without weights",
        lambda p: merge(p, p.trial(without=["adapter_model.safetensors", "manifest.json"])),
        ("weights file not found", "adapter_model.safetensors", "fix:"),
    ),
    Case(
        "merge: another target",
        lambda p: merge(p, p.world.over, base=p.model(change=lambda m: flip(m / "model.safetensors"))),
        ("trained from another target", "trial over", "target_hash", "give --base the model"),
    ),
    Case(
        "merge: other shapes",
        lambda p: merge(p, p.trial(without=["manifest.json"], change=lambda t: edit_tensors(t / "adapter_model.safetensors", widen))),
        ("has shape", "the base has", "trial trial"),
    ),
    Case(
        "merge: not finite",
        lambda p: merge(p, p.trial(without=["manifest.json"], change=lambda t: edit_tensors(t / "adapter_model.safetensors", poison))),
        ("values of tensor", "are not finite", "trial trial", "fix:"),
    ),
    Case(
        "merge: another kind of adapter",
        lambda p: merge(p, p.trial(change=lambda t: edit_json(t / "adapter_config.json", peft_type="IA3"))),
        ("peft_type = 'IA3' cannot be merged", "adapter_config.json"),
    ),
    Case(
        "merge: an adapter without rank",
        lambda p: merge(p, p.trial(change=lambda t: edit_json(t / "adapter_config.json", r=None))),
        ("r = None is not a number", "adapter_config.json"),
    ),
]
