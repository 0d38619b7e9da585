"""Train a small language model on text: notes retold as a caption, and conversations about notes.

It learns to say what notes say and to answer from them; the projector later puts a picture in their place.
"""

from pathlib import Path

from llava.commandline import ArgumentParser, run

IGNORED = -100


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m llava.demo.language_model", description=__doc__)
    parser.add_argument("--data-path", required=True, help="conversations without pictures")
    parser.add_argument("--captions", help="records whose answers are learned as plain text too")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer")
    parser.add_argument("--template", default="mistral_instruct")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.demo.fitting import in_processes

    in_processes(train_language_model, args, args.processes)


def train_language_model(args) -> None:
    """Train and save: a Mistral's folder with its tokenizer."""
    from torch.nn import functional
    from transformers import MistralConfig, MistralForCausalLM

    from llava.demo.fitting import fit, is_first, shuffled
    from llava.model import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    samples = read_samples(args, tokenizer)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.hidden_size // 32),
            num_key_value_heads=max(1, args.hidden_size // 32),
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
        shuffled(len(samples), args.batch_size, args.seed),
        loss_of,
        steps=args.steps,
        lr=3e-3,
        matrix_lr=5e-3,
        hidden=lambda name: "layers." in name,
        name="language model",
        folder=Path(args.output_dir),
    )
    if is_first():
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


def read_samples(args, tokenizer) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every record: in the template, or as plain text where the record says so; and of captions."""
    from llava.records import read_records
    from llava.tokenization import encode_conversation

    samples = []
    for record in read_records(args.data_path):
        if record.get("plain"):
            samples.append(_plain(record["conversations"][0]["value"], record["conversations"][1]["value"], tokenizer))
        else:
            encoded = encode_conversation(record, args.template, tokenizer)
            samples.append((encoded.input_ids, encoded.labels))
    captions = read_records(args.captions)[: len(samples) // 4] if args.captions else []
    return samples + [_plain("", record["conversations"][1]["value"], tokenizer) for record in captions]


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
