"""Beam search, one request at a time, by transformers' own `generate`."""

import torch

from llava.generation.prompts import Prompt
from llava.generation.runner import Runner


@torch.inference_mode()
def beam_search(runner: Runner, prompt: Prompt) -> list[int]:
    """The best beam's tokens, without the end mark. Stop strings aren't looked at before the end."""
    ids = torch.from_numpy(prompt.ids)[None].to(runner.device)
    features = runner.encoder.features(prompt.images)
    embeds = runner.model.embed_inputs(ids, image_features=torch.cat(features) if features else None)
    sampling = prompt.request.sampling
    stop_ids = sorted(prompt.stop_ids)
    output = runner.model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids),
        num_beams=sampling.num_beams,
        do_sample=False,
        max_new_tokens=prompt.max_new_tokens,
        eos_token_id=stop_ids or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,
    )
    tokens = output[0].tolist()
    ends = [place for place, token in enumerate(tokens) if token in prompt.stop_ids]
    return tokens[: ends[0]] if ends else tokens
