"""Answering VQA questions: the engine against transformers' `generate`, one question at a time, in one process.

    python benchmarks/vqa_throughput.py

Both get the same conversations and ready pixel values, and do the rest: tokenising, encoding images, prefill
and decoding with a cache. Answers are compared token by token up to the first place where the two likeliest tokens
are closer than 1e-4, where rounding may decide.
"""

import time
from pathlib import Path

import numpy as np
from checkout import DEMO_MODEL, IMAGES, QUESTIONS, add_json_flag, show

from llava.commandline import ArgumentParser, existing_dir, existing_file, run, write_line

MARGIN = 1e-4


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default=str(DEMO_MODEL))
    parser.add_argument("--question-file", default=str(QUESTIONS), help="VQA-RAD's own JSON, or LLaVA-Med records")
    parser.add_argument("--image-folder", default=str(IMAGES))
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3, help="passes of each kind, the fastest counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None)
    add_json_flag(parser)
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    question_file = existing_file(args.question_file, "question file")
    folder = existing_dir(args.image_folder, "image folder")

    import torch

    from llava.generation import Engine, Request, SamplingParams
    from llava.model import load_pretrained_model
    from llava.records import read_records

    loaded = load_pretrained_model(args.model_path, device=args.device, dtype=args.dtype)
    records = read_records(question_file)[: args.limit]
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens)
    pixels = read_images(records, folder, loaded)
    requests = [
        Request(conversation(record, loaded.model.config), [pixels[image_name(record)]], sampling) for record in records
    ]
    write_line(
        f"{len(requests)} questions about {len(pixels)} images, {args.device}, {torch.get_num_threads()} threads"
    )

    single_seconds, batched_seconds = [], []
    for _ in range(args.repeat):
        started = time.perf_counter()
        singles = [answer_alone(request, loaded, args.max_new_tokens) for request in requests]
        single_seconds.append(time.perf_counter() - started)
        # A new engine each time: nothing of an earlier pass is in its caches.
        engine = Engine(loaded, max_batch_size=args.batch_size)
        started = time.perf_counter()
        answers = engine.generate(requests)
        batched_seconds.append(time.perf_counter() - started)
    equal, close, different = compare(singles, answers)
    numbers = {
        "questions": len(requests),
        "single_questions_per_second": len(requests) / min(single_seconds),
        "batched_questions_per_second": len(requests) / min(batched_seconds),
        "batched_over_single_ratio": min(single_seconds) / min(batched_seconds),
        "answers_equal": equal,
        "answers_equal_to_a_close_call": close,
        "answers_different": different,
        "prefill_arithmetic_share_ratio": prefill_share(engine, requests, args.device),
    }
    show(args.model_path, numbers, args.json)


def conversation(record, config):
    """The record's question in the model's template, the image before it."""
    from llava.conversation import get_template
    from llava.tokenization import conversation_from_record

    if "conversations" not in record:
        record = {"conversations": [{"from": "human", "value": f"<image>\n{record['question']}"}]}
    return conversation_from_record(record, get_template(config.conversation_template))


def image_name(record) -> str:
    return record.get("image_name") or record["image"]


def read_images(records, folder: Path, loaded) -> dict[str, np.ndarray]:
    """Pixel values `[1, 3, H, W]` of each distinct image."""
    from llava.images import open_image

    names = dict.fromkeys(image_name(record) for record in records)
    ratio = loaded.model.config.image_aspect_ratio
    return {name: loaded.image_processor([open_image(folder / name)], ratio) for name in names}


def answer_alone(request, loaded, max_new_tokens: int) -> tuple[list[int], list[float]]:
    """transformers' greedy answer to one question: (tokens up to the end mark, margin of the top two at each)."""
    import torch

    from llava.tokenization import ImageTokens, encode_prompt, expand_images, stop_token_ids

    model, tokenizer = loaded.model, loaded.tokenizer
    ids = encode_prompt(request.conversation, tokenizer, ImageTokens.from_config(model.config))
    ids, _ = expand_images(ids, None, model.num_patches)
    ids = torch.from_numpy(ids)[None].to(model.device)
    stops = stop_token_ids(request.conversation, tokenizer)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(request.images[0]).to(model.device, model.dtype),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=stops,
            pad_token_id=stops[0],
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    top = torch.cat(output.logits).float().topk(2).values
    margins = (top[:, 0] - top[:, 1]).tolist()
    length = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:length], margins


def compare(singles, answers) -> tuple[int, int, int]:
    """How many answers are equal, equal up to a close call, and different."""
    equal = close = different = 0
    for (tokens, margins), answer in zip(singles, answers):
        pairs = zip([*tokens, None], [*answer.token_ids, None])
        place = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
        if place is None:
            equal += 1
        elif margins[place] < MARGIN:
            close += 1
        else:
            different += 1
    return equal, close, different


def prefill_share(engine, requests, device: str) -> float:
    """Arithmetic of the prompts' products per second, over what one large product reaches here."""
    import torch

    from llava.generation.forward_pass import Row

    prompts = [engine.prompts.build(request) for request in requests]
    runner = engine.scheduler.runner
    count = min(len(prompts), engine.scheduler.max_batch_size)
    prompts = sorted(prompts, key=len, reverse=True)[:count]
    lengths = [len(prompt) for prompt in prompts]
    layers = engine.model.get_model().layers
    multiplying = sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    with torch.inference_mode():
        runner.cache.prepare(lengths, 0)
        rows = [Row(row, 0, length) for row, length in enumerate(lengths)]
        runner.run(rows, [], prompts)
        seconds = fastest(lambda: runner.run(rows, [], prompts), device)
    reached = 2 * multiplying * sum(lengths) / seconds
    return reached / peak(device, engine.model.dtype)


def peak(device: str, dtype) -> float:
    """Floating-point operations per second of a large square product."""
    import torch

    size = 8192 if device.startswith("cuda") else 2048
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / fastest(lambda: left @ right, device)


def fastest(work, device: str, times: int = 5) -> float:
    import torch

    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    run(main)
