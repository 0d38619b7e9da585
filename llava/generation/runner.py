"""The model's forward passes over rows of the cache: prompts (or what is new of them), and one token for each row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llava.generation.kv_cache import CachePass, RowCache
from llava.generation.pictures import PictureEncoder
from llava.generation.prompts import Prompt


class Runner:
    """Runs the language model; rows are those of `cache`."""

    def __init__(self, model: Any, encoder: PictureEncoder, cache_bytes: int, context_len: int):
        config = model.config
        if "flash" in (config._attn_implementation or ""):
            # Those kernels take no mask, and rows of different lengths need one.
            model.set_attn_implementation("sdpa")
        self.model = model
        self.encoder = encoder
        self.window = getattr(config, "sliding_window", None)
        self.is_eager = config._attn_implementation == "eager"
        embedding = model.get_input_embeddings().weight
        self.device = embedding.device
        self.dtype = embedding.dtype
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * embedding.element_size()
        # One position more than a context, for what padding writes.
        self.cache = RowCache(config.num_hidden_layers, per_position, cache_bytes, context_len + 1)

    def prefill(self, start: int, prompts: Sequence[Prompt], begins: Sequence[int], ends: Sequence[int]):
        """Compute positions `begins[i]` to `ends[i]` of each prompt in row `start` + i, whose earlier ones are there.

        Returns the last position's hidden state of each, `[rows, hidden]`.
        """
        lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
        longest = max(lengths)
        ids = np.zeros((len(prompts), longest), np.int64)
        for row, (prompt, begin, end) in enumerate(zip(prompts, begins, ends, strict=True)):
            ids[row, : end - begin] = prompt.ids[begin:end]
        features = self._features(prompts, begins, ends)
        embeds = self.model.embed_inputs(torch.from_numpy(ids).to(self.device), image_features=features)
        hidden = self._forward(embeds, start, begins, lengths)
        places = torch.tensor(lengths, device=hidden.device) - 1
        return hidden[torch.arange(len(lengths), device=hidden.device), places]

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """One token into each of the first rows, behind its `lengths[i]` positions; hidden states `[rows, hidden]`."""
        ids = torch.tensor(tokens, device=self.device)[:, None]
        embeds = self.model.get_input_embeddings()(ids)
        return self._forward(embeds, 0, lengths, [1] * len(tokens))[:, 0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows, vocabulary]`."""
        return self.model.lm_head(hidden)

    def _forward(self, embeds: torch.Tensor, start: int, begins: Sequence[int], lengths: Sequence[int]):
        """Hidden states `[rows, new, hidden]`; row i has `lengths[i]` new positions from `begins[i]` on."""
        new = embeds.shape[1]
        width = max(begin + length for begin, length in zip(begins, lengths, strict=True))
        columns = torch.arange(new, device=self.device)
        offset = begins[0] if min(begins) == max(begins) else None
        positions = torch.tensor(begins, device=self.device)[:, None] + columns
        targets = positions
        if offset is None and min(lengths) < new:
            # Padding is written behind all that is read; it must not overwrite a longer row's positions.
            is_padding = columns >= torch.tensor(lengths, device=self.device)[:, None]
            targets = positions.masked_fill(is_padding, width)
        cache = CachePass(self.cache, start, width, offset, targets)
        output = self.model.get_model()(
            inputs_embeds=embeds,
            attention_mask=self._mask(positions if offset is None else positions[:1], width, embeds.dtype),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def _mask(self, positions: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """`[rows, 1, new, width]`: each position sees itself and what comes before it (in the window)."""
        keys = torch.arange(width, device=self.device)
        mask = keys <= positions[:, :, None]
        if self.window is not None:
            mask &= keys > positions[:, :, None] - self.window
        mask = mask[:, None]
        if self.is_eager:
            return torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask

    def _features(self, prompts: Sequence[Prompt], begins: Sequence[int], ends: Sequence[int]) -> torch.Tensor | None:
        """Features of the pictures (or parts of pictures) within the computed positions, in reading order."""
        needed = [
            (picture, max(begin, first) - first, min(end, last) - first)
            for prompt, begin, end in zip(prompts, begins, ends, strict=True)
            for picture, (first, last) in zip(prompt.pictures, prompt.spans, strict=True)
            if first < end and last > begin
        ]
        if not needed:
            return None
        features = self.encoder.features([picture for picture, _, _ in needed])
        return torch.cat([own[first:last] for own, (_, first, last) in zip(features, needed, strict=True)])
