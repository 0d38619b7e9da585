"""Samples → one batch of tensors, padded to the longest or packed without padding."""

from typing import Any

import numpy as np
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.tokenization import pad_batch
from llava.train.data.dataset import Report, Sample
from llava.train.data.feature_cache import FeatureCache
from llava.train.data.shared_images import Joined, join, joinable, seen_by

META_KEYS = ("sample_numbers", "num_tokens", "report")
"""Of a batch: what is for the trainer; the model never sees it."""


class Collator:
    """Makes what the model takes, and what the trainer counts (`sample_numbers`, `num_tokens`, …).

    Padded: `input_ids`, `labels` int64 [batch, longest]; `attention_mask` bool of the same shape, left out when
    there is no padding (attention is faster without). Packed: [1, all tokens], `position_ids` that start anew
    with each sample, and the sample's borders (`cu_seq_lens_q/k` int32 [samples + 1], `max_length_q/k`). With
    `share_images` samples of one image are joined (llava.train.data.shared_images); borders are then those of their
    parts (`_q`) and of what each part sees (`_k`), and `key_places` int64 says which tokens these are.
    Either way `image_positions` and `target_positions`, int64: where image positions, and labels that are targets,
    lie in the flattened ids. Nothing of a step then depends on values, and the GPU is never waited for.
    Images: `pixel_values` float32 [images, 3, H, W] in reading order, or `vision_features` [images,
    patches, mm_hidden] from the cache.
    """

    def __init__(
        self,
        pad_id: int,
        *,
        packing: bool = False,
        share_images: bool = False,
        pack_length: int | None = None,
        cache: FeatureCache | None = None,
    ):
        """`pack_length`: tokens that packed batches are filled up to, so that shapes never change."""
        self.pad_id = pad_id
        self.pack_length = pack_length
        self.packing = packing
        self.share_images = share_images
        self.cache = cache

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        if items and isinstance(items[0], list):  # batches filled up to a number of tokens come as lists
            items = [item for group in items for item in group]
        skipped = {item["number"]: item["skipped"] for item in items if item["skipped"]}
        kept = [item for item in items if not item["skipped"]]
        samples = [item["sample"] for item in kept] or [self._padding(2)]
        groups = joinable(samples) if self.share_images else [([place], 0) for place in range(len(samples))]
        if self.packing:
            batch = self._packed([join([samples[place] for place in places], shared) for places, shared in groups])
        else:
            batch = self._padded(samples)
        # Nothing comes before the first label of a row that could predict it.
        is_target = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORE_INDEX, (1, 0))
        batch["target_positions"] = is_target.flatten().nonzero()[:, 0]
        batch["image_positions"] = (batch["input_ids"].flatten() == IMAGE_TOKEN_INDEX).nonzero()[:, 0]
        self._add_images(batch, [kept[places[0]] for places, _ in groups if kept])
        batch["sample_numbers"] = [item["number"] for item in kept]
        batch["num_tokens"] = int(batch.pop("real_tokens")) if kept else 0
        report = Report(skipped=skipped)
        for item in kept:
            report.note(item["number"], item["sample"])
        batch["report"] = report
        return batch

    def _padding(self, length: int) -> Sample:
        """A sample without a target."""
        return Sample(np.full(length, self.pad_id, np.int32), np.full(length, IGNORE_INDEX, np.int32), [], False)

    def _padded(self, samples: list[Sample]) -> dict[str, Any]:
        padded = pad_batch([(sample.input_ids, sample.labels) for sample in samples], self.pad_id)
        batch = {"input_ids": torch.from_numpy(padded["input_ids"]), "labels": torch.from_numpy(padded["labels"])}
        if not padded["attention_mask"].all():
            batch["attention_mask"] = torch.from_numpy(padded["attention_mask"])
        return {**batch, "real_tokens": padded["attention_mask"].sum()}

    def _packed(self, joined: list[Joined]) -> dict[str, Any]:
        real_tokens = sum(len(one.input_ids) for one in joined)
        if self.pack_length and real_tokens < self.pack_length:
            joined.append(join([self._padding(self.pack_length - real_tokens)]))
        ids = np.concatenate([one.input_ids for one in joined]).astype(np.int64)
        labels = np.concatenate([one.labels for one in joined]).astype(np.int64)
        positions = np.concatenate([one.positions for one in joined])
        sizes = np.concatenate([one.lengths for one in joined])
        borders = _borders(sizes)
        # A sample's first token is predicted by nothing; unpacked, the shift drops it. A branch's is no target.
        labels[borders[:-1]] = IGNORE_INDEX
        batch = {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": int(sizes.max()),
            "max_length_k": int(sizes.max()),
            "real_tokens": real_tokens,
        }
        if self.share_images:
            seen, places = seen_by(one.lengths for one in joined)
            batch |= {"cu_seq_lens_k": _borders(seen), "max_length_k": int(seen.max())}
            batch["key_places"] = torch.from_numpy(places)
        return batch

    def _add_images(self, batch: dict[str, Any], items: list[dict[str, Any]]) -> None:
        if self.cache is not None:
            rows = [row for item in items for row in item.get("feature_rows", ())]
            batch["vision_features"] = self.cache.take(rows)
            return
        images = [item["pixel_values"] for item in items if "pixel_values" in item]
        if images:
            batch["pixel_values"] = torch.from_numpy(np.concatenate(images))


def _borders(sizes: np.ndarray) -> torch.Tensor:
    """int32 [sequences + 1]: where each sequence of such lengths starts, and the end."""
    return torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int32))
