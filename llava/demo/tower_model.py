"""The demo's vision tower with the loss that trains it, and its first embeddings."""

import math
from types import SimpleNamespace
from typing import Any, cast

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from llava.model import load_tokenizer
from llava.model.library_model import load_library_model

POOLS = 4


class SentenceMatching(nn.Module):
    """Loss of images whose captions consist of sentences: each token of the tower says one of them.

    The sentences go round: token t says sentence t modulo their number. A language model then finds facts in the
    tokens as it finds words in a text. Sentences are compared by the language model's own embeddings of their words.
    The patches pooled by attention predict all sentences too; this is learned first and guides the rest.
    """

    def __init__(self, args: SimpleNamespace, texts: torch.Tensor, excludes: torch.Tensor):
        """`texts` `[sentences, size]` are the sentences' embeddings; for `excludes` see `match_loss`."""
        super().__init__()
        self.excludes: torch.Tensor
        self.register_buffer("excludes", excludes, persistent=False)
        width = args.hidden_size
        vision = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=args.layers,
            num_attention_heads=max(1, width // 32),
            image_size=args.image_size,
            patch_size=args.patch_size,
            hidden_act="gelu",
        )
        self.tower = CLIPVisionModel(vision)
        self.texts: torch.Tensor
        self.register_buffer("texts", texts, persistent=False)
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, texts.shape[1], bias=False))
        self.pool_norm = nn.LayerNorm(width)
        self.pool_scores = nn.Linear(width, POOLS)
        self.pool_values = nn.Linear(width, width)
        self.pool_project = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, texts.shape[1], bias=False))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pixel_values: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Loss of images `[n, 3, H, W]` with captions `[n, sentences per caption]`, numbers of sentences."""
        states = self.tower(pixel_values=pixel_values).last_hidden_state
        said = self.said(captions, states.shape[1])
        pooled = self.similarity(self.pool_project(self._pool(states[:, 1:])))
        pooled = pooled[:, None].expand(-1, captions.shape[1], -1)
        tokens = self.similarity(self.project(states))
        return match_loss(tokens, said, self.excludes) + match_loss(pooled, captions, self.excludes)

    def match(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """How well each token of each image matches each sentence, `[n, tokens, sentences]`."""
        return self.similarity(self.project(self.tower(pixel_values=pixel_values).last_hidden_state))

    def similarity(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.log_scale.exp() * functional.normalize(vectors, dim=-1) @ self.texts.T

    def _pool(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches `[n, patches, width]` weighed by what stands out, and their mean: `[n, 2 * width]`."""
        patches = self.pool_norm(patches)
        weights = self.pool_scores(patches).softmax(dim=1)
        values = self.pool_values(patches).unflatten(-1, (POOLS, -1))
        return torch.cat([(weights[..., None] * values).sum(1).flatten(1), patches.mean(1)], dim=-1)

    def said(self, captions: torch.Tensor, tokens: int) -> torch.Tensor:
        """Which sentence each token says, `[n, tokens]`."""
        return captions[:, torch.arange(tokens) % captions.shape[1]]


def match_loss(logits: torch.Tensor, said: torch.Tensor, excludes: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the sentence that is said against those that it excludes.

    Args:
        logits: `[images, places, sentences]`.
        said: `[images, places]`, numbers of sentences.
        excludes: bool `[sentences, sentences]`: the two never stand in one caption, such as left and right.
    """
    against = logits.masked_fill(~excludes[said], -torch.inf).logsumexp(dim=-1)
    return functional.softplus(against - logits.gather(2, said[..., None])[..., 0]).mean()


def sentence_embeddings(sentences: list[str], language_model: str) -> torch.Tensor:
    """Unit vectors `[sentences, hidden]`: sums of word embeddings; a word counts less, the more sentences hold it."""
    tokenizer = load_tokenizer(language_model)
    model = load_library_model(AutoModelForCausalLM, language_model, "language model")
    words = cast(nn.Embedding, model.get_input_embeddings()).weight.detach()
    shares = torch.zeros(len(sentences), len(tokenizer))
    for row, sentence in enumerate(sentences):
        shares[row, tokenizer(sentence, add_special_tokens=False)["input_ids"]] = 1
    sums = (shares / shares.sum(0).clamp(min=1)) @ functional.normalize(words.float(), dim=-1)
    return functional.normalize(sums - sums.mean(0), dim=-1)


@torch.no_grad()
def start_embeddings(tower: CLIPVisionModel, pixel_values: torch.Tensor) -> None:
    """First weights of the image's embedding, from data: patches whitened, positions as sines of place.

    Without them the first half of the training goes into finding what differs between patches apart from brightness.
    """
    embeddings = tower.embeddings
    weight = embeddings.patch_embedding.weight
    width, channels, patch, _ = weight.shape
    cut = "image channel (row height) (column width) -> (image row column) (channel height width)"
    patches = rearrange(pixel_values, cut, height=patch, width=patch).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    whitening = (vectors / (values + 0.02 * values[min(5, width - 1)]).sqrt()).T.float()
    mixed = torch.linalg.qr(torch.randn(width, len(whitening)))[0] @ whitening
    weight.copy_(0.7 * mixed.view(width, channels, patch, patch))
    side = pixel_values.shape[-1] // patch
    rates = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [place.reshape(-1, 1) * rates for place in (columns, rows)]
    table = torch.cat([function(wave) for wave in waves for function in (torch.sin, torch.cos)], dim=1)
    embeddings.position_embedding.weight[1:] = 0.5 * table
    embeddings.position_embedding.weight[0] = 0


@torch.no_grad()
def standardise(tower: CLIPVisionModel, pixel_values: torch.Tensor) -> None:
    """Bring the last hidden state to mean 0 and variance 1 over these images, all else the same.

    Training lets it grow to any size, and a projector starts best from features of size one. All that is added to
    the residual stream is scaled; each block's norms undo it, so only the stream itself changes.
    """
    states = tower(pixel_values=pixel_values).last_hidden_state
    scale = 1 / states.std()
    blocks: Any = tower.encoder.layers
    parts: list[Any] = [tower.pre_layrnorm]
    for block in blocks:
        parts += [block.self_attn.out_proj, block.mlp.fc2]
    for part in parts:
        part.weight *= scale
        part.bias *= scale
    blocks[-1].mlp.fc2.bias -= scale * states.mean((0, 1))
