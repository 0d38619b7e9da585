"""The small CLIP of the demo: a transformers CLIPModel, its sentence matching loss and its first embeddings."""

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from llava.model import load_tokenizer

POOLS = 4
TEXT_SIZE = 64


class SentenceMatching(nn.Module):
    """Loss of pictures `[n, 3, H, W]` whose captions hold sentences as `holds [n, sentences]` says."""

    def __init__(self, args: SimpleNamespace, sentences: list[str]):
        super().__init__()
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
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_SIZE,
            intermediate_size=2 * TEXT_SIZE,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.clip = CLIPModel(
            CLIPConfig(
                text_config=text.to_dict(),
                vision_config=vision.to_dict(),
                projection_dim=TEXT_SIZE,
                logit_scale_init_value=math.log(10.0),
            )
        )
        ids = [tokenizer(sentence)["input_ids"] + [tokenizer.eos_token_id] for sentence in sentences]
        longest = max(map(len, ids))
        padded = [row + [tokenizer.eos_token_id] * (longest - len(row)) for row in ids]
        self.register_buffer("sentence_ids", torch.tensor(padded), persistent=False)
        self.register_buffer("sentence_ends", torch.tensor([len(row) - 1 for row in ids]), persistent=False)
        self.pool_norm = nn.LayerNorm(width)
        self.pool_scores = nn.Linear(width, POOLS)
        self.pool_values = nn.Linear(width, width)
        self.pool_project = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, TEXT_SIZE, bias=False))

    def forward(self, pixel_values: torch.Tensor, holds: torch.Tensor) -> torch.Tensor:
        vision = self.clip.vision_model(pixel_values=pixel_values)
        pictures = [
            self.clip.visual_projection(vision.pooler_output),
            self.pool_project(self._pool(vision.last_hidden_state[:, 1:])),
        ]
        used = holds.any(0)
        texts = functional.normalize(self._sentences(used), dim=-1)
        scale = self.clip.logit_scale.exp()
        losses = [
            match_loss(scale * functional.normalize(picture, dim=-1) @ texts.T, holds[:, used]) for picture in pictures
        ]
        return torch.stack(losses).mean()

    def _pool(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches `[n, patches, width]` weighed by what stands out, and their mean: `[n, 2 * width]`."""
        patches = self.pool_norm(patches)
        weights = self.pool_scores(patches).softmax(dim=1)
        values = self.pool_values(patches).unflatten(-1, (POOLS, -1))
        return torch.cat([(weights[..., None] * values).sum(1).flatten(1), patches.mean(1)], dim=-1)

    def _sentences(self, used: torch.Tensor) -> torch.Tensor:
        """Embeddings of the used sentences, `[used, size]`, read off at their end token."""
        states = self.clip.text_model(input_ids=self.sentence_ids[used]).last_hidden_state
        ends = self.sentence_ends[used]
        return self.clip.text_projection(states[torch.arange(len(ends)), ends])


def match_loss(logits: torch.Tensor, holds: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each sentence that a picture's caption holds, against all those that it doesn't hold."""
    against = logits.masked_fill(holds, -torch.inf).logsumexp(dim=1, keepdim=True)
    return functional.softplus(against - logits)[holds].mean()


@torch.no_grad()
def start_embeddings(clip: CLIPModel, pixel_values: torch.Tensor) -> None:
    """First weights of the picture's embedding, from data: patches whitened, positions as sines of place.

    Without them the first half of the training goes into finding what differs between patches beside brightness.
    """
    embeddings = clip.vision_model.embeddings
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
