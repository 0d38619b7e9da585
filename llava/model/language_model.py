"""What makes a language model multimodal: a vision tower, a projector and one scatter of features.

`LlavaForCausalLM` is mixed into the language models of llava.model.families.

`input_ids` come expanded: every position that an image feature takes holds IMAGE_TOKEN_INDEX. In training the
collator says where those are (`image_positions`), so that no step waits for the GPU; else they are looked for.
"""

from collections.abc import Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError
from llava.images.anyres import read_pinpoints
from llava.model.configuration import LlavaConfigFields
from llava.model.loss import LanguageHead, causal_loss
from llava.model.projector import build_projector
from llava.model.towers import VisionTower, build_vision_tower
from llava.model.unexpanded import Images, expand_batch

if TYPE_CHECKING:
    from typing import Self

    from transformers import GenerationMixin

    class Attention(nn.Module):
        """A block's attention, as far as it is asked."""

        layer_idx: int

    class Block(nn.Module):
        """A layer of the language model (`Family.layer_class`)."""

        self_attn: Attention
        input_layernorm: nn.Module
        post_attention_layernorm: nn.Module
        mlp: nn.Module

    class Core(PreTrainedModel):
        """The language model without its head, and what the mixin puts into it."""

        layers: Sequence[Block]
        norm: nn.Module
        rotary_emb: nn.Module
        vision_tower: VisionTower
        mm_projector: nn.Module

    class _LanguageModel(PreTrainedModel, GenerationMixin):
        """What the mixin finds in the language model's class, its other base (llava.model.families)."""

        config: LlavaConfigFields

        # The library's has a protocol of its own for `self`.
        def generate(self, inputs: Any = None, **kwargs: Any) -> torch.Tensor: ...  # type: ignore[override]
        def eval(self) -> Self: ...
        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear: ...
else:
    _LanguageModel = object


class LlavaForCausalLM(_LanguageModel):
    """What the models of all families share; stands before the language model's class among the bases.

    `core_class` is the library's language model without its head.
    """

    core_class: type[PreTrainedModel]
    trained_rows: Sequence[int] = ()
    """Rows of the input embedding that are trained where the others aren't; () where it is trained whole or not."""

    if TYPE_CHECKING:  # transformers evaluates a class's annotations, and `Core` isn't there to find
        model: Core
        lm_head: LanguageHead

    def __init__(self, config: LlavaConfigFields):
        # Past the language model's own __init__, which would build the core a second time.
        PreTrainedModel.__init__(self, config)
        self.model = cast("Core", self.core_class(config))
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size, bias=False)
        if not config.tie_word_embeddings:  # else it has to be sharded with the embedding
            self._no_split_modules = {*(self._no_split_modules or ()), LanguageHead.__name__}
        self.post_init()
        # Tower and projector come last and keep their own initialisation.
        if config.mm_vision_config:
            self.initialize_vision_modules()

    def get_model(self) -> "Core":
        return self.model

    def get_vision_tower(self) -> VisionTower:
        """The tower, or a LlavaError if the model has none."""
        tower = getattr(self.model, "vision_tower", None)
        if tower is None:
            raise LlavaError("the model has no vision tower; build it with llava.model.build_model_from_llm")
        return tower

    @property
    def num_patches(self) -> int:
        """Features (positions) per image."""
        return self.get_vision_tower().num_patches

    def initialize_vision_modules(self) -> None:
        """Add tower and projector as `config` describes them; their weights are random."""
        tower = build_vision_tower(self.config)
        if self.config.image_aspect_ratio == "anyres" and self.config.image_grid_pinpoints:
            read_pinpoints(self.config.image_grid_pinpoints, tower.image_size)  # said now, not at the first image
        self._no_split_modules = {*(self._no_split_modules or ()), *tower.no_split_modules}
        self.config.mm_hidden_size = tower.hidden_size
        self.model.vision_tower = tower
        self.model.mm_projector = build_projector(
            self.config.mm_projector_type, tower.hidden_size, self.config.hidden_size
        )

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the head; one whose rows were added or taken away is a plain linear layer."""
        if isinstance(new_embeddings, nn.Linear) and type(new_embeddings) is nn.Linear:
            new_embeddings = LanguageHead.of(new_embeddings)
        super().set_output_embeddings(new_embeddings)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel values `[n, 3, H, W]` to projected features `[n, patches, hidden]`."""
        return self.project(self.get_vision_tower()(pixel_values))

    def project(self, vision_features: torch.Tensor) -> torch.Tensor:
        """The tower's features `[n, patches, mm_hidden]` to the language model's `[n, patches, hidden]`."""
        projector = self.model.mm_projector
        # The first floating one: an 8-bit weight is no dtype to compute in.
        parameter = next((one for one in projector.parameters() if one.is_floating_point()), None)
        if parameter is not None:
            vision_features = vision_features.to(parameter.device, parameter.dtype)
        return projector(vision_features)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        images: Images | None = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ):
        """The language model's forward, with images.

        Args:
            input_ids: `[batch, positions]`, expanded: IMAGE_TOKEN_INDEX at each position of an image.
            attention_mask: `[batch, positions]` (with a cache: past and new ones); 1 for real positions. If
                `position_ids` is missing they are counted from it, so left padding changes no answer.
            labels: `[batch, positions]`, -100 ignored. In training mode, or with `target_positions`, the result then
                holds the loss alone: logits are made for the targets only, in chunks (llava.model.loss).
            pixel_values: `[n_images, 3, H, W]` of all images of the batch, in reading order.
            image_features: in their place, `[n_image_positions, hidden]`, already projected.
            vision_features: in their place, `[n_images, patches, mm_hidden]`, from the tower.
            image_positions: int64 `[n_image_positions]`, where image positions lie in the flattened `input_ids`.
            target_positions: int64 `[targets]`, where targets lie in the flattened labels, none first in its row.
                With both a training step depends on shapes alone and never waits for the GPU.
            images: LLaVA's call: `input_ids` hold one IMAGE_TOKEN_INDEX per image (llava.model.unexpanded). Logits and
                labels are those of the expanded ids, padded on the right.
            image_sizes: LLaVA's, not needed: tiles are made by `process_images`.

        In training, or with `image_positions`, a batch without images still runs projector (and tower, unless
        `vision_features` are in use) on a zero image with weight zero: sharded parameters are gathered by all ranks
        or none.

        Raises:
            LlavaError: the number of image positions isn't the number of features.
        """
        if images is not None and input_ids is not None:
            input_ids, attention_mask, labels, pixel_values = expand_batch(
                input_ids, attention_mask, labels, images, self.num_patches, "right"
            )
            position_ids = None
        if inputs_embeds is None:
            if input_ids is None:
                raise LlavaError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed_inputs(input_ids, pixel_values, image_features, vision_features, image_positions)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = positions_from_mask(attention_mask, inputs_embeds.shape[1])
        if labels is not None and (self.training or target_positions is not None):
            outputs = self.model(
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=False,
                **kwargs,
            )
            loss = causal_loss(
                outputs.last_hidden_state,
                self.lm_head,
                labels,
                self.config.vocab_size,
                target_positions=target_positions,
            )
            return CausalLMOutputWithPast(loss=loss)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )

    def embed_inputs(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings `[batch, positions, hidden]` of expanded ids, image features in their places."""
        is_image = input_ids == IMAGE_TOKEN_INDEX
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        features = self._features(pixel_values, image_features, vision_features)
        decoding = input_ids.shape[1] == 1 and features is None
        if not decoding and not torch.compiler.is_compiling():
            positions = int(is_image.sum()) if image_positions is None else image_positions.shape[0]
            _check_counts(positions, 0 if features is None else features.shape[0])
        if features is None:
            learns = self.training and torch.is_grad_enabled()
            if (learns or image_positions is not None) and image_features is None:
                inputs_embeds = inputs_embeds + self._idle_contribution(vision_features).to(inputs_embeds)
            return inputs_embeds
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        if image_positions is None:
            return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features)
        return inputs_embeds.flatten(0, 1).index_copy(0, image_positions, features).view_as(inputs_embeds)

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the library's takes its configuration second
        self,
        inputs: torch.Tensor | None = None,
        images: Images | EllipsisType | None = ...,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The library's `generate`; with `images` (None too) LLaVA's.

        LLaVA's takes `inputs` (or `input_ids`) with one IMAGE_TOKEN_INDEX per image, padded on either side, and gives
        the new tokens alone, int64 `[batch, new]`. Temperature 0 is greedy.
        """
        if images is ...:
            return super().generate(inputs, **kwargs)
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None:
            raise LlavaError("give inputs, the ids of the prompt")
        batch = expand_batch(input_ids, kwargs.pop("attention_mask", None), None, images, self.num_patches, "left")
        if not kwargs.get("temperature", 1):
            kwargs["do_sample"] = False
        if not kwargs.get("do_sample"):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("temperature", "top_p", "top_k")}
        kwargs.pop("position_ids", None)
        # Given embeddings, the library's gives back the new tokens alone.
        embeds = self.embed_inputs(batch.input_ids, batch.pixel_values)
        return super().generate(inputs_embeds=embeds, attention_mask=batch.attention_mask, **kwargs)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        labels: torch.Tensor | None,
        images: Images | None,
        image_sizes: Any = None,
    ) -> tuple[Any, ...]:
        """LLaVA's step between ids and the language model: what `model(inputs_embeds=...)` takes, in its order.

        Returns:
            (None, position_ids, attention_mask, past_key_values, inputs_embeds `[batch, positions, hidden]`, labels),
            padded on the right; what was None stays None. Without images, or in a step of decoding, the ids come back
            as they are.
        """
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        batch = expand_batch(input_ids, attention_mask, labels, images, self.num_patches, "right")
        embeds = self.embed_inputs(batch.input_ids, batch.pixel_values)
        positions = None if position_ids is None else positions_from_mask(batch.attention_mask, embeds.shape[1])
        mask = None if attention_mask is None else batch.attention_mask.to(attention_mask.dtype)
        return None, positions, mask, past_key_values, embeds, batch.labels

    def prepare_inputs_for_generation(  # type: ignore[override]  # its other parameters go through by name
        self,
        input_ids: torch.Tensor,
        is_first_iteration: bool | None = False,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As the library's, with the images given in the first step alone: later they are in the cache.

        `inputs_embeds` is named because the library looks for it to allow a prompt given as embeddings.
        """
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]  # `self` there is a wider protocol
            cast(torch.LongTensor, input_ids),
            is_first_iteration=is_first_iteration,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "image_features", "vision_features"):
                inputs.pop(name, None)
        return inputs

    def _features(
        self,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        vision_features: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """`[n_image_positions, hidden]` from whichever was given, None if there are none."""
        given = [tensor for tensor in (pixel_values, image_features, vision_features) if tensor is not None]
        if len(given) > 1:
            raise LlavaError("give pixel_values, image_features or vision_features, not two of them")
        if not given or given[0].shape[0] == 0:
            return None
        if image_features is not None:
            return image_features
        if vision_features is not None:
            return self.project(vision_features).flatten(0, 1)
        return self.encode_images(given[0]).flatten(0, 1)

    def _idle_contribution(self, vision_features: torch.Tensor | None) -> torch.Tensor:
        """Zero, computed through projector and tower so that they take part in a batch without images."""
        if getattr(self.model, "vision_tower", None) is None:
            return torch.zeros(())
        tower = self.get_vision_tower()
        if vision_features is None:
            size = tower.image_size
            features = self.encode_images(torch.zeros(1, 3, size, size, device=tower.device))
        else:
            features = self.project(vision_features.new_zeros(1, tower.num_patches, tower.hidden_size))
        return features.sum() * 0


def positions_from_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Positions `[batch, length]` of the last `length` columns of a 0/1 mask, counted from its first 1."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.clamp(min=0)[:, -length:]


def _check_counts(positions: int, features: int) -> None:
    if positions != features:
        raise LlavaError(
            f"the text has {positions} image positions but the images give {features} features; "
            f"expand each <image> with llava.tokenization.expand_images and give every image once"
        )
