"""The demo's vision tower with the loss that trains it, and its first embeddings."""

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model import load_tokenizer

POOLS = 4
MATCH_SIZE = 64


class SentenceMatching(nn.Module):
    """Loss of pictures `[n, 3, H, W]` whose captions hold sentences as `holds [n, sentences]` says."""

    def __init__(self, args: SimpleNamespace, sentences: list[str], excludes: torch.Tensor):
        super().__init__()
        self.register_buffer("excludes", excludes, persistent=False)
        tokenizer = load_tokenizer(args.tokenizer)
        width = args.hidden_size
        heads = max(1, width // 32)
        vision = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            image_size=args.image_size,
            patch_size=args.patch_size,
            hidden_act="gelu",
        )
        self.tower = CLIPVisionModel(vision)
        self.class_project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, MATCH_SIZE, bias=False))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.words = nn.Embedding(len(tokenizer), MATCH_SIZE)
        self.register_buffer("word_shares", word_shares(sentences, tokenizer), persistent=False)
        self.pool_norm = nn.LayerNorm(width)
        self.pool_scores = nn.Linear(width, POOLS)
        self.pool_values = nn.Linear(width, width)
        self.pool_project = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, MATCH_SIZE, bias=False))

    def forward(self, pixel_values: torch.Tensor, holds: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixel_values=pixel_values).last_hidden_state
        rows = torch.arange(len(states))
        anywhere = states[rows, torch.randint(1, states.shape[1], (len(states),))]
        pictures = [
            self.class_project(states[:, 0]),
            # Any patch has to know all: a language model then finds the facts wherever it looks.
            self.class_project(anywhere),
            self.pool_project(self._pool(states[:, 1:])),
        ]
        texts = self._sentences()
        losses = [
            match_loss(self.log_scale.exp() * functional.normalize(picture, dim=-1) @ texts.T, holds, self.excludes)
            for picture in pictures
        ]
        return torch.stack(losses).mean()

    def _pool(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches `[n, patches, width]` weighed by what stands out, and their mean: `[n, 2 * width]`."""
        patches = self.pool_norm(patches)
        weights = self.pool_scores(patches).softmax(dim=1)
        values = self.pool_values(patches).unflatten(-1, (POOLS, -1))
        return torch.cat([(weights[..., None] * values).sum(1).flatten(1), patches.mean(1)], dim=-1)

    def _sentences(self) -> torch.Tensor:
        """Embeddings of the sentences, `[sentences, MATCH_SIZE]`, from the words they hold."""
        return functional.normalize(self.word_shares @ self.words.weight, dim=-1)


def word_shares(sentences: list[str], tokenizer) -> torch.Tensor:
    """How much each token counts in each sentence, `[sentences, vocabulary]`: less, the more sentences hold it."""
    shares = torch.zeros(len(sentences), len(tokenizer))
    for row, sentence in enumerate(sentences):
        shares[row, tokenizer(sentence)["input_ids"]] = 1
    return shares / shares.sum(0).clamp(min=1)


def match_loss(logits: torch.Tensor, holds: torch.Tensor, excludes: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each sentence that a picture's caption holds, against those that exclude it.

    Args:
        logits: `[pictures, sentences]`.
        holds: bool `[pictures, sentences]`.
        excludes: bool `[sentences, sentences]`: the two never stand in one caption, such as left and right.
    """
    against = logits[:, None].masked_fill(~excludes, -torch.inf).logsumexp(dim=-1)
    return functional.softplus(against - logits)[holds].mean()


@torch.no_grad()
def start_embeddings(tower: CLIPVisionModel, pixel_values: torch.Tensor) -> None:
    """First weights of the picture's embedding, from data: patches whitened, positions as sines of place.

    Without them the first half of the training goes into finding what differs between patches beside brightness.
    """
    embeddings = tower.embeddings
    weight = embeddings.patch_embedding.weight
    width, channels, patch, _ = weight.shape
    patches = functional.unfold(pixel_values, patch, stride=patch).transpose(1, 2).flatten(0, 1).double()
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
    """Bring the last hidden state to mean 0 and variance 1 over these pictures, all else the same.

    Training lets it grow to any size, and a projector starts best from features of size one. All that is added to
    the residual stream is scaled; each block's norms undo it, so only the stream itself changes.
    """
    states = tower(pixel_values=pixel_values).last_hidden_state
    scale = 1 / states.std()
    parts = [tower.pre_layrnorm]
    for block in tower.encoder.layers:
        parts += [block.self_attn.out_proj, block.mlp.fc2]
    for part in parts:
        part.weight *= scale
        part.bias *= scale
    tower.encoder.layers[-1].mlp.fc2.bias -= scale * states.mean((0, 1))
