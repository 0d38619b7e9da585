"""Reading the recorded logits and greedy tokens of G1 to G3, and comparing a model with them."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from llava.constants import IMAGE_TOKEN_INDEX


class Case:
    """One golden case: `tolerance` and `margin` from its meta.json, inputs, pixel values, recorded outputs."""

    def __init__(self, folder: Path, outputs: str = "outputs.npz"):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        text = self.meta["tolerance"]
        self.tolerance = _number(r"logit difference\| <= ([\d.e+-]+)", text)
        self.margin = _number(r"min_top2_margin\)? (?:is below|<) ([\d.e+-]+)", text)
        self.outputs = np.load(folder / outputs)
        self.pixels = np.load(folder / "pixel_values.npz")

    def checkpoint(self, pattern: str = "llava*") -> Path:
        """The folder of the case's model: the one beside the vision tower's."""
        found = [path for path in self.folder.glob(pattern) if path.is_dir()]
        assert len(found) == 1, f"{self.folder} should hold one checkpoint, has {found}"
        return found[0]

    def pixel_values(self, name: str) -> torch.Tensor | None:
        return torch.from_numpy(self.pixels[name]) if name in self.pixels else None

    def compare(self, name: str, logits: torch.Tensor) -> None:
        """Every recorded view of the logits `[positions, vocabulary]` of input `name`, within the tolerance."""
        values = logits.double().numpy()
        found = {
            "logits": values,
            "logsumexp": torch.logsumexp(logits.double(), dim=-1).numpy(),
            "mean": values.mean(axis=-1),
            "std": values.std(axis=-1),
            "last_full": values[-1],
        }
        columns = self.outputs.get(f"{name}.cols", self.outputs.get("cols"))
        if columns is not None:
            found["logits_cols"] = values[:, columns]
        if f"{name}.top5_ids" in self.outputs:
            found["top5_logits"] = np.take_along_axis(values, self.outputs[f"{name}.top5_ids"], axis=-1)
        compared = 0
        for view, ours in found.items():
            key = f"{name}.{view}"
            if key in self.outputs:
                recorded = self.outputs[key]
                assert recorded.shape == ours.shape, f"{key}: {recorded.shape} recorded, {ours.shape} found"
                difference = np.abs(recorded - ours).max()
                assert difference <= self.tolerance, f"{key}: off by {difference}"
                compared += 1
        assert compared, f"nothing is recorded for {name}"

    def compare_greedy(self, name: str, record: dict, found: list[int], suffix: str = "") -> None:
        """The recorded greedy tokens, unless a step was decided by less than the margin."""
        if record[f"min_top2_margin{suffix}"] >= self.margin:
            assert found == record[f"greedy16_no_cache{suffix}"], name


def _number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match, f"meta.json's tolerance doesn't say {pattern!r}: {text}"
    return float(match[1].rstrip("."))


def expand(ids: list[int], per_image: int) -> list[int]:
    """Each placeholder repeated for the features that take its place."""
    return [token for token in ids for _ in range(per_image if token == IMAGE_TOKEN_INDEX else 1)]


def logits_of(model, ids: list[int], pixel_values: torch.Tensor | None) -> torch.Tensor:
    """`[positions, vocabulary]` of one sample."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=pixel_values).logits[0]


def batch_logits(model, samples: list[list[int]], pixel_values: torch.Tensor | None, side: str) -> list[torch.Tensor]:
    """Logits of each sample's own positions, computed in one batch padded on `side`."""
    longest = max(map(len, samples))
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    spans = []
    for row, sample in enumerate(samples):
        start = longest - len(sample) if side == "left" else 0
        spans.append(slice(start, start + len(sample)))
        ids[row, spans[row]] = torch.tensor(sample)
        mask[row, spans[row]] = 1
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixel_values).logits
    return [logits[row, span] for row, span in enumerate(spans)]


def greedy(model, ids: list[int], pixel_values: torch.Tensor | None, steps: int = 16) -> list[int]:
    """The next tokens by `generate`, with its cache, going on behind an end token."""
    model.generation_config = GenerationConfig(pad_token_id=0)
    inputs = torch.tensor([ids])
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        pixel_values=pixel_values,
        do_sample=False,
        max_new_tokens=steps,
    )
    return output[0, len(ids) :].tolist()
