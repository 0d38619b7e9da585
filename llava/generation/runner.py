"""The language model over rows of the cache: one token for each running row, and what is new of prompts."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from llava.errors import LlavaError
from llava.generation.attention.joined import Tables, has_fixed_tables, join_layers
from llava.generation.attention.kernels import PagedKernel, working_fused, working_kernel
from llava.generation.attention.passes import DecodingPass, PagedPass
from llava.generation.cache.pages import PageCache
from llava.generation.cache.rows import GrowingRowCache, RowCache, gives_addresses
from llava.generation.decoding import Decoder, DecodingState
from llava.generation.forward_pass import PackedPass, Row, WatchedPass, attention_by_passes
from llava.generation.image_features import ImageEncoder
from llava.generation.prompts import Prompt
from llava.model.language_model import LlavaForCausalLM

Pass = TypeVar("Pass", PackedPass, WatchedPass, PagedPass)


class Runner:
    """Runs a language model's blocks on packed tokens; their modules are transformers' (quantized or not)."""

    def __init__(
        self,
        model: LlavaForCausalLM,
        encoder: ImageEncoder,
        cache_bytes: int,
        context_len: int,
        *,
        paged: bool | None = None,
        max_rows: int = 64,
    ):
        """
        Args:
            paged: keys and values in pages, and layers in joined products: by default on a GPU alone.
            max_rows: rows that run at the same time, at most.
        """
        config = model.config
        self.model = model
        self.encoder = encoder
        self.window = _window(config)
        embedding = model.get_input_embeddings().weight
        self.device = device_of(model.get_input_embeddings(), embedding.device)
        self.dtype = embedding.dtype
        core = model.get_model()
        self.devices = [device_of(layer, self.device) for layer in core.layers]
        """Of each layer: a model may be spread over several."""
        self.norm_device, self.head_device = (device_of(one, self.device) for one in (core.norm, model.lm_head))
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_size = config.num_key_value_heads * self.head_dim
        self.bytes_per_position = 2 * config.num_hidden_layers * kv_size * embedding.element_size()
        self.cache: RowCache | PageCache
        self.kernel: PagedKernel | None = None
        self.decoder: Decoder | None = None
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        if not (self.device.type == "cuda" if paged is None else paged):
            is_on_cpu = {device.type for device in self.devices} == {"cpu"}
            has_addresses = is_on_cpu and gives_addresses(max_rows * context_len * self.bytes_per_position)
            kind = RowCache if has_addresses else GrowingRowCache
            self.cache = kind(layers, self.bytes_per_position, cache_bytes, max_rows, context_len)
            return
        self.kernel = working_kernel(self.device, self.dtype, config.num_attention_heads, heads, self.head_dim)
        self.cache = PageCache(layers, heads, self.bytes_per_position, cache_bytes, context_len, self.kernel.page)
        is_one_device = {*self.devices, self.norm_device, self.head_device} == {self.device}
        fused = working_fused(self.device)
        joined = join_layers(core.layers, fused) if is_one_device and has_fixed_tables(core.rotary_emb) else None
        if joined is not None:
            self.joined = joined
            self.tables = Tables(core.rotary_emb, context_len, embedding, config.num_attention_heads, heads, fused)
            self.decoder = Decoder(self.cache, self._decode, self.device, max_rows)

    def _decode(self, state: DecodingState) -> torch.Tensor:
        """A decoding step: the logits `[rows, vocabulary]` of the next tokens."""
        assert isinstance(self.cache, PageCache) and self.kernel is not None
        core: Any = self.model.get_model()
        hidden = self.model.get_input_embeddings()(state.tokens)
        rotation = self.tables.of(state.positions)
        decoding = DecodingPass(self.cache, self.kernel, state.positions, state.table, state.starts, self.window)
        for layer in self.joined:
            hidden = layer(hidden, rotation, decoding)
        state.positions.add_(1)
        return self.logits(self.joined[0].kernels.normed(hidden, core.norm.weight, core.norm.variance_epsilon))

    def run(self, rows: Sequence[Row], tokens: Sequence[int], prompts: Sequence[Prompt]) -> torch.Tensor:
        """Compute `rows` in one pass: the first take a token each, of the others each takes its part of a prompt.

        Returns the hidden state of each row's last position, `[rows, hidden]`.
        """
        fresh = rows[len(tokens) :]
        parts = [prompt.ids[row.begin : row.end] for prompt, row in zip(prompts, fresh, strict=True)]
        ids = torch.from_numpy(np.concatenate([np.array(tokens, np.int64), *parts])).to(self.device)
        if prompts:
            features = self._features(prompts, fresh)
            embeds = self.model.embed_inputs(ids[None], image_features=features)[0]
        else:
            embeds = self.model.get_input_embeddings()(ids)
        packed: Any
        if isinstance(self.cache, RowCache):
            packed = PackedPass(self.cache, rows, self.device, self.dtype, self.window)
        else:
            assert self.kernel is not None
            packed = PagedPass(self.cache, self.kernel, rows, self.device, self.window)
        hidden, packed = self._forward(embeds, packed)
        normed: torch.Tensor = self.model.get_model().norm(hidden[packed.last].to(self.norm_device))
        return normed

    def watch(self, prompt: Prompt, count: int) -> torch.Tensor:
        """Where the last `count` positions of a prompt look: `[count, positions]`, rows sum to 1.

        Attention's weights, averaged over heads and layers. Nothing that runs is touched: the pass has a cache of
        its own.
        """
        row, layers = Row(0, 0, len(prompt)), len(self.cache.layers)
        cache = RowCache(layers, self.bytes_per_position, 0, 1, len(prompt))
        ids = torch.from_numpy(prompt.ids)[None].to(self.device)
        embeds = self.model.embed_inputs(ids, image_features=self._features([prompt], [row]))
        watched = WatchedPass(cache, row, count, self.device, self.dtype, self.window)
        _, watched = self._forward(embeds[0], watched)
        return watched.weights / layers

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows, vocabulary]` of hidden states `[rows, hidden]`."""
        logits: torch.Tensor = self.model.lm_head(hidden.to(self.head_device))
        return logits

    def _forward(self, hidden: torch.Tensor, packed: Pass) -> tuple[torch.Tensor, Pass]:
        """Embeddings `[tokens, hidden]` through all blocks; the pass is the one of the last block's device.

        A block's parts are called, not the block: one that training has compiled would be compiled again for each pass.
        What a layer reads goes to its device first, where that is another than the last layer's.
        """
        core = self.model.get_model()
        if self.decoder is not None and isinstance(packed, PagedPass):
            rotation = self.tables.of(packed.positions)
            for joined in self.joined:
                hidden = joined(hidden, rotation, packed)
            return hidden, packed
        hidden = hidden[None]
        rotary = core.rotary_emb(hidden, packed.positions[None])
        here = self.device
        with attention_by_passes(self.model.config):
            for layer, device in zip(core.layers, self.devices, strict=True):
                if device != here:
                    hidden, rotary = hidden.to(device), tuple(one.to(device) for one in rotary)
                    packed, here = packed.to(device), device
                normed = layer.input_layernorm(hidden)
                found, _ = layer.self_attn(normed, position_embeddings=rotary, attention_mask=None, packed=packed)
                hidden = hidden + found
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden[0], packed

    def _features(self, prompts: Sequence[Prompt], rows: Sequence[Row]) -> torch.Tensor | None:
        """Features of the images (or parts of images) within the computed positions, in reading order."""
        needed = [
            (image, max(row.begin, first) - first, min(row.end, last) - first)
            for prompt, row in zip(prompts, rows, strict=True)
            for image, (first, last) in zip(prompt.images, prompt.spans, strict=True)
            if first < row.end and last > row.begin
        ]
        if not needed:
            return None
        features = self.encoder.features([image for image, _, _ in needed])
        return torch.cat([own[first:last] for own, (_, first, last) in zip(features, needed, strict=True)])


def device_of(module: nn.Module, default: torch.device) -> torch.device:
    """Where a module computes: the device that a hook brings weights to, if it has one, else its first parameter's."""
    found = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if found is None:
        found = next((parameter.device for parameter in module.parameters()), default)
    return torch.device(found)


def _window(config: Any) -> int | None:
    """How many positions back each position sees, the same in all layers; None for all.

    Raises:
        LlavaError: some layers have a window and some don't.
    """
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds == {"full_attention"}:
        return None
    if kinds - {"sliding_attention"}:
        raise LlavaError(
            f"layer_types: the engine runs models whose layers all attend in one way, this one has {sorted(kinds)}"
        )
    return getattr(config, "sliding_window", None)
