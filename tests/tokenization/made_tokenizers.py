"""Tokenizers of several kinds, made on the spot, and the golden ones where they are: all can say any text."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.model.tokenizer import load_tokenizer
from tests.conftest import golden_root

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: yes no",
    "[INST] <<SYS>>\n\n<</SYS>>\n\n What does the picture show? [/INST] yes </s><s>[INST] ### Human: Assistant:",
    "<|im_start|>user\nIs there a fracture?<|im_end|><|im_start|>assistant\n\n\nno, none.<|im_end|>\n\n",
    "USER: yes ASSISTANT: yes\n\n  no  no   yes</s>USER: <image>\nwhere? ASSISTANT: no no</s>",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(split: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind, no BOS. Without `split` tokens grow across words, line ends and end marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *(["<|im_start|>", "<|im_end|>"] if split else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def unigram(first_only: bool) -> PreTrainedTokenizerFast:
    """SentencePiece's unigram kind with BOS: the best split of a text can change with what follows it."""
    tokenizer = Tokenizer(models.Unigram())
    scheme = "first" if first_only else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=BYTES[:0],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    vocab = [(token, 0.0) for token in ["<unk>", "<s>", "</s>"]] + [(token, -20.0) for token in BYTES]
    learned = [(piece, score) for piece, score in _scores(tokenizer) if (piece, 0.0) not in vocab[:3]]
    tokenizer.model = models.Unigram(vocab + learned, unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_bos(tokenizer)


def llama_like() -> PreTrainedTokenizerFast:
    """LLaMA's kind (blank before each text, bytes for what is unknown), with tokens that span words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return _with_bos(tokenizer)


def _scores(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    import json

    return [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]


def _with_bos(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


MADE = {
    "byte_level": lambda: byte_level(split=True),
    "byte_level_unsplit": lambda: byte_level(split=False),
    "llama_like": llama_like,
    "unigram": lambda: unigram(first_only=False),
    "unigram_first": lambda: unigram(first_only=True),
}


def names() -> list[str]:
    folder = golden_root() / "common" / "tokenizers"
    golden = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [*MADE, *golden]


@cache
def get(name: str) -> PreTrainedTokenizerBase:
    return MADE[name]() if name in MADE else load_tokenizer(golden_root() / "common" / "tokenizers" / name)
