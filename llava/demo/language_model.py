"""Train a small language model on text: comparisons, notes retold as a caption, conversations about notes.

It learns to say what notes say and to answer from them; the projector later puts an image in their place. All is
read once, from beginning to end: the demo's text gets harder.

python -m llava.demo.language_model --data-path text.json --tokenizer TOKENIZER --output-dir language_model
"""

from pathlib import Path

from llava.commandline import ArgumentParser, run
from llava.folders import WEIGHTS, check_target, stage_files

IGNORED = -100
HEAD_SIZE = 16
"""Small, so that there are many heads: each kind of fact is found by one of its own."""

WINDOW = 128
"""Samples sorted by length at a time: little padding, and still batches of many kinds."""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data-path", action="append", required=True, help="records, read one file after the other; may be repeated"
    )
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer")
    parser.add_argument("--template", default="mistral_instruct", help="prompt template of its conversations")
    parser.add_argument("--output-dir", required=True, help="folder of the model")
    parser.add_argument("--batch-tokens", type=int, default=3600, help="of one step, padding included")
    parser.add_argument("--layers", type=int, default=3, help="of the model")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the model")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_overwrite()
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_target(args.output_dir, args.overwrite)
    from llava.demo.fitting import in_processes

    in_processes(train_language_model, args, args.processes)


def train_language_model(args) -> None:
    """Train and save: a Mistral's folder with its tokenizer."""
    from torch.nn import functional
    from transformers import MistralConfig, MistralForCausalLM

    from llava.demo.fitting import fit, is_first, own_part
    from llava.model import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    samples = read_samples(args, tokenizer)
    batches = in_order([len(ids) for ids, _ in samples], args.batch_tokens, args.seed)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.hidden_size // HEAD_SIZE),
            num_key_value_heads=max(1, args.hidden_size // HEAD_SIZE),
            max_position_embeddings=1024,
            sliding_window=None,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def loss_of(numbers):
        ids, labels = collate([samples[number] for number in numbers], tokenizer.pad_token_id)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        return functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])

    fit(
        model,
        own_part(batches),
        loss_of,
        steps=len(batches),
        lr=3e-3,
        matrix_lr=5e-3,
        hidden=lambda name: "layers." in name,
        name="language model",
        folder=Path(args.output_dir),
    )
    if is_first():
        with stage_files(args.output_dir, last="config.json", stale=WEIGHTS) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def read_samples(args, tokenizer) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every record: in the template, or as plain text where it says so.

    Of a record with an image the answer is learned, as plain text.
    """
    from llava.record_content import first_pair, images_of
    from llava.records import read_records
    from llava.tokenization import encode_conversation

    samples = []
    for path in args.data_path:
        for number, record in enumerate(read_records(path)):
            where = f"{path} record {number}"
            shown, caption = first_pair(record, where)
            has_image = bool(images_of(record, where))
            if record.get("plain") or has_image:
                samples.append(_plain("" if has_image else shown, caption, tokenizer))
            else:
                encoded = encode_conversation(record, args.template, tokenizer)
                samples.append((encoded.input_ids, encoded.labels))
    return samples


def in_order(lengths: list[int], batch_tokens: int, seed: int) -> list[list[int]]:
    """Numbers of samples in batches of about `batch_tokens` with padding: windows in order, shuffled within."""
    import random

    generator = random.Random(seed)
    batches: list[list[int]] = []
    for start in range(0, len(lengths), WINDOW):
        window = sorted(range(start, min(start + WINDOW, len(lengths))), key=lengths.__getitem__)
        found: list[list[int]] = [[]]
        for number in window:
            if found[-1] and (len(found[-1]) + 1) * lengths[number] > batch_tokens:
                found.append([])
            found[-1].append(number)
        # Each process needs a part of each batch.
        if len(found[-1]) < 8 and (len(found) > 1 or batches):
            small = found.pop()
            (found or batches)[-1] += small
        generator.shuffle(found)
        batches += found
    return batches


def _plain(shown: str, caption: str, tokenizer) -> tuple[list[int], list[int]]:
    """As stage 1 has it: what is shown, its caption, a line's end. The caption alone is learned."""
    before = tokenizer(shown)["input_ids"]
    after = tokenizer(caption + "\n", add_special_tokens=False)["input_ids"]
    return before + after, [IGNORED] * len(before) + after


def collate(samples: list[tuple[list[int], list[int]]], padding: int):
    """Ids and labels, `[batch, longest]`, padded on the right (which causal attention never sees)."""
    import torch

    longest = max(len(ids) for ids, _ in samples)
    ids = torch.full((len(samples), longest), padding)
    labels = torch.full((len(samples), longest), IGNORED)
    for row, (sample_ids, sample_labels) in enumerate(samples):
        ids[row, : len(sample_ids)] = torch.tensor(sample_ids)
        labels[row, : len(sample_labels)] = torch.tensor(sample_labels)
    return ids, labels


if __name__ == "__main__":
    run(main)
