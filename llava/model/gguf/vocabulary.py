"""A tokenizer as the fields of a GGUF file that llama.cpp makes the same ids from."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from llava.errors import LlavaError
from llava.model.gguf.names import DIGITS_APART, known_cuts

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_LOW = -1e6
"""Score of a token that no merge makes: single characters are there from the start."""


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, end_mark: str | None) -> None:
    """Tokens, types, merges or scores, and the special ids; `rows` is the embedding's number of rows.

    Args:
        end_mark: what ends an answer in the model's template, told if it is a token other than the end of text.

    Raises:
        LlavaError: the tokenizer cuts text in a way that llama.cpp has no name for.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise LlavaError(f"the tokenizer is of type {model['type']}; only BPE tokenizers can be written as GGUF")
    added = {token["id"]: token for token in content["added_tokens"]}
    names = [
        str(added[index]["content"] if index in added else tokenizer.convert_ids_to_tokens(index))
        for index in range(min(rows, len(tokenizer)))
    ]
    free = range(len(names), rows)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    types = [_type(name, added.get(index), model.get("unk_token")) for index, name in enumerate(names)]
    writer.add_token_list(names + [f"[PAD{index}]" for index in free])
    writer.add_token_types(types + [TokenType.UNUSED] * len(free))
    if _is_byte_level(content):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cuts(content))
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        # llama.cpp merges the pair whose result has the highest score.
        writer.add_token_scores([-float(ranks[name]) if name in ranks else _LOW for name in names] + [_LOW] * len(free))
        writer.add_add_space_prefix(_begins_with_blank(content))
    _add_special(writer, tokenizer, end_mark)


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, end_mark: str | None) -> None:
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    for role, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    begins = tokenizer("x").input_ids[:1] == [ids["bos"]]
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    mark = tokenizer.get_vocab().get(end_mark or "")
    if mark is not None:
        writer.add_eot_token_id(mark)


def _type(name: str, added: dict[str, Any] | None, unknown: str | None) -> TokenType:
    if name == unknown:
        return TokenType.UNKNOWN
    if added:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if name in _BYTES else TokenType.NORMAL


def _is_byte_level(content: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(content["decoder"], "decoders"))


def _begins_with_blank(content: dict[str, Any]) -> bool:
    kinds = [step["type"] for step in _steps(content["normalizer"], "normalizers")]
    spaced = [step for step in _steps(content["pre_tokenizer"], "pretokenizers") if step["type"] == "Metaspace"]
    return "Prepend" in kinds or any(step.get("prepend_scheme") != "never" for step in spaced)


def _cuts(content: dict[str, Any]) -> str:
    """llama.cpp's name of the way that text is cut before merging."""
    steps = _steps(content["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return DIGITS_APART[0]
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex")
        named = [name for name, split in known_cuts().items() if split == pattern]
        if named:
            return "llama-bpe" if "llama-bpe" in named else named[0]
    raise LlavaError(f"the tokenizer cuts text by {', '.join(kinds)} in a way that llama.cpp has no name for")


def _steps(part: dict[str, Any] | None, list_name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[list_name] if part["type"] == "Sequence" else [part]
