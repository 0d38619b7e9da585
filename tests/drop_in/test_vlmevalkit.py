"""The calls of VLMEvalKit's LLaVA class, in its order and with its arguments (the tool isn't in the package index)."""

import argparse

import numpy as np
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.generation import Engine, Request, SamplingParams
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


def test_its_calls(folder, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, device=None: self)
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self, device=None: self)
    tokenizer, model, image_processor, context_len = load_pretrained_model(
        model_path=str(folder),
        model_base=None,
        model_name=get_model_name_from_path(str(folder)),
        device="cpu",
        device_map="cpu",
    )
    model = model.cuda()
    assert context_len > 0
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 44, 3), dtype=np.uint8))
    pixels = process_images([image], image_processor, argparse.Namespace(image_aspect_ratio="pad"))
    pixels = pixels.to(model.device, dtype=torch.float16)
    prompt = SYSTEM + "USER: <image>\nIs there a fracture?\nAnswer with yes or no. ASSISTANT: "
    input_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0).cuda()
    criteria = KeywordsStoppingCriteria(["</s>"], tokenizer, input_ids)
    with torch.inference_mode():
        output_ids = model.generate(
            input_ids,
            images=pixels,
            stopping_criteria=[criteria],
            do_sample=False,
            temperature=0,
            max_new_tokens=16,
            top_p=None,
            num_beams=1,
            use_cache=True,
        )
    text = tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip()

    loaded = load_pretrained_model(folder, device_map="cpu")
    request = Request(prompt, [pixels[0].float().cpu().numpy()], SamplingParams(max_new_tokens=16))
    assert text == Engine(loaded).generate([request])[0].text
