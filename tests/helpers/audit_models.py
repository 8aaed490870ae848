"""A tiny target, twins that never saw the forget set, and models that only seem to have forgotten it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.data.synthetic import write_synthetic_benchmark

_BUILD = {
    "tiny": {
        "vocab_size": 400,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    },
    "learning_rate": 1e-2,
    "num_train_epochs": 50,
    "train_batch_tokens": 256,
    "min_knowledge": 0.9,
    "min_regurgitation": 0.97,
    "min_general_knowledge": 0.0,
    "check_every_epochs": 5,
}
"""Some ten thousand weights that know the documents by heart after a few seconds."""


class AuditModels:
    """Models of one small benchmark, each built when it is asked for first.

    Args:
        root: folder of data and models.
    """

    def __init__(self, root: Path) -> None:
        from trainers.data.records import load_attack_documents, load_forget_retain

        self.root = root
        write_synthetic_benchmark(root / "data", documents_per_task=3, subjects=1, questions_per_subject=4, seed=0)
        self.data, self.mia = root / "data" / "lume", root / "data" / "mia"
        self.records = load_forget_retain(self.data)
        self._strangers = [document.text for document in load_attack_documents(self.mia).nonmembers]

    def target(self) -> Path:
        """A model that has memorised both sets."""
        return self._memorised("target", seed=1, sets=["forget", "retain"])

    def twin(self, seed: int = 2) -> Path:
        """A model that has memorised the retain set and never saw the forget set."""
        return self._memorised(f"twin-{seed}", seed=seed, sets=["retain"])

    def destroyed(self) -> Path:
        """The target after long gradient ascent without anything that holds the rest together."""
        return self._tuned("destroyed", forget_weight=1.0, retain_weight=0.0, steps=40, cap=1e9, learning_rate=1e-2)

    def pretending(self) -> Path:
        """A model that has forgotten in full precision, and whose weights round to the target's at 4 bits.

        After every step of gradient difference the weights are put back into the rounding cells of the target's, and the largest
        weight of each group, which sets the scale, stays as it is. Embeddings and head are not touched.
        """
        from eval.audit.quantise import INT4, quantised_layers, round_trip
        from trainers.modeling import load_model

        cells = {name: _cells(layer.weight.detach()) for name, layer in quantised_layers(load_model(self.target())).items()}

        def project(model: Any) -> None:
            for name, layer in quantised_layers(model).items():
                low, high = cells[name]
                layer.weight.data.copy_(layer.weight.data.maximum(low).minimum(high))

        folder = self._tuned(
            "pretending", forget_weight=0.5, retain_weight=1.0, steps=120, cap=4.0, learning_rate=5e-3, only="layers", project=project
        )
        ours, theirs = quantised_layers(load_model(folder)), quantised_layers(load_model(self.target()))
        for name in ours:
            assert round_trip(ours[name].weight, scheme=INT4).equal(round_trip(theirs[name].weight, scheme=INT4)), name
        return folder

    def broken(self) -> Path:
        """The target with weights that are no numbers."""
        folder = self.root / "broken"
        if not folder.exists():
            model, tokenizer = self._load()
            model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
            self._save(model, tokenizer, folder)
        return folder

    def _memorised(self, name: str, *, seed: int, sets: list[str]) -> Path:
        from trainers.memorize import MemorizeConfig, memorize

        folder = self.root / name
        if not folder.exists():
            config = MemorizeConfig.model_validate(_BUILD | {"seed": seed, "sets": sets})
            manifest = memorize(config, data=self.records, general=(), out=folder, tokenizer_texts=self._strangers)
            assert manifest["reached"], manifest["memorised"]
        return folder

    def _load(self) -> tuple[Any, Any]:
        from trainers.modeling import load_model, load_tokenizer

        return load_model(self.target()), load_tokenizer(self.target())

    def _save(self, model: Any, tokenizer: Any, folder: Path) -> None:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))

    def _tuned(
        self,
        name: str,
        *,
        forget_weight: float,
        retain_weight: float,
        steps: int,
        cap: float,
        learning_rate: float,
        only: str = "",
        project: Callable[[Any], None] | None = None,
    ) -> Path:
        """Gradient difference over whole sets, with the forget loss of a token counting up to ``cap`` nats."""
        import torch

        from eval.audit.relearn import lesson_of_records
        from trainers.data.batches import collate
        from trainers.modeling import context_length

        folder = self.root / name
        if folder.exists():
            return folder
        model, tokenizer = self._load()
        context = context_length(model.config)
        batches = [
            collate(lesson_of_records(records, tokenizer=tokenizer, context=context), pad_token_id=tokenizer.pad_token_id)
            for records in (self.records.forget, self.records.retain)
        ]
        trained = [parameter for key, parameter in model.named_parameters() if only in key]
        optimizer = torch.optim.Adam(trained, lr=learning_rate)
        for _ in range(steps):
            losses = []
            for batch in batches:
                logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
                chosen = logits[batch.row_N, batch.position_N]
                losses.append(torch.nn.functional.cross_entropy(chosen, batch.label_N, reduction="none"))
            loss = -forget_weight * losses[0].clamp(max=cap).mean() + retain_weight * losses[1].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if project is not None:
                project(model)
        self._save(model, tokenizer, folder)
        return folder


def _cells(weight: Any) -> tuple[Any, Any]:
    """Lowest and highest weights that round to the same 4-bit values; the largest of each group may not move."""
    import torch

    from eval.audit.quantise import INT4, round_trip

    group = INT4.group
    assert group is not None
    num_outputs, num_inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -num_inputs % group)).view(num_outputs, -1, group)
    top = padded.abs().amax(-1, keepdim=True).expand_as(padded).reshape(num_outputs, -1)[:, :num_inputs]
    half = 0.49 * top / INT4.levels
    middle = round_trip(weight, scheme=INT4)
    low, high = (middle - half).maximum(-top), (middle + half).minimum(top)
    largest = weight.abs() == top
    return torch.where(largest, weight, low), torch.where(largest, weight, high)
