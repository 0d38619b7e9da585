"""A checkpoint's tokenizer with the ids it was trained with, and the image tokens added to one.

`tokenizer.json` is taken as it stands. A folder with a SentencePiece `tokenizer.model` alone (LLaVA-Med's are)
is converted here: transformers 5 orders the merges by vocabulary index and drops the `legacy` default of the
time, which gives other ids for double blanks and for text next to special tokens.
"""

import re
import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from llava.constants import MOST_OF_TOKEN
from llava.errors import LlavaError, library_errors
from llava.model.checkpoint.tokenizer_steps import check_steps
from llava.records import read_json, write_json

SENTENCEPIECE = "tokenizer.model"

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Kinds of pieces in a SentencePiece model: normal ones take part in merges, user-defined ones are matched whole."""

_NOTES_OF_LOADING = ("backend", "is_local", "local_files_only")
"""What transformers 5 writes into tokenizer_config.json about how it came by the tokenizer."""

_HAS_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_UNLIMITED = int(1e30)


def load_tokenizer_of(folders: Iterable[Path], otherwise: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the first of `folders` that has one; `otherwise` is named where none has.

    Raises:
        LlavaError: as `load_tokenizer`.
    """
    return load_tokenizer(next((folder for folder in folders if find_tokenizer(folder)), otherwise))


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's main file of a model folder."""
    return next((folder / name for name in ("tokenizer.json", SENTENCEPIECE) if (folder / name).is_file()), None)


def load_tokenizer(folder: str | Path, strip_blanks: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token (unk, else eos, if it names none).

    Args:
        strip_blanks: for a folder with `tokenizer.model` alone: added tokens take in the blanks around them, as
            when LLaVA-Med v1.0 was trained; by default they don't, as when it was evaluated.

    Raises:
        LlavaError: the folder holds no tokenizer, or one that can't be read.
    """
    folder = Path(folder)
    path = find_tokenizer(folder)
    if path is None:
        raise LlavaError(
            f"{folder}: no tokenizer found (looked for tokenizer.json and tokenizer.model); copy the "
            f"tokenizer's files of the base model there"
        )
    with library_errors(f"{path}: the tokenizer or a file next to it can't be read"):
        if path.name == SENTENCEPIECE:
            tokenizer = _from_sentencepiece(folder, strip_blanks)
        else:
            check_steps(path)
            _check_merges(path)
            # The file that was looked at: its neighbours may name another, of any place.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_file=str(path))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        # Some faults show only in use.
        tokenizer.decode(tokenizer.encode("A chest X-ray.\n<image>"))
    tokenizer.name_or_path = str(folder)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that older transformers, SGLang and llama.cpp read it too.

    Apart from `tokenizer.json` these are the older name of the class, the SentencePiece model that it was made
    from, and `added_tokens.json`.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {name: value for name, value in read_json(path).items() if name not in _NOTES_OF_LOADING}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)
    source = Path(tokenizer.name_or_path) / SENTENCEPIECE
    if not source.is_file():
        return
    shutil.copyfile(source, folder / SENTENCEPIECE)
    pieces = len(_read_pieces(source))
    added = {token: index for token, index in tokenizer.get_added_vocab().items() if index >= pieces}
    if added:
        write_json(folder / "added_tokens.json", added)


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str], strip_blanks: bool) -> int:
    """Add special tokens; returns how many were new.

    `strip_blanks` lets them take in blanks and line ends on both sides, as the tokenizer did with which
    LLaVA-Med v1.0 was trained.
    """
    added = [
        AddedToken(token, lstrip=strip_blanks, rstrip=strip_blanks, normalized=False, special=True) for token in tokens
    ]
    return tokenizer.add_tokens(added, special_tokens=True)


def _check_merges(path: Path) -> None:
    """Against what the library ends the process for: it cuts the prefix off the second part without a look."""
    if not _HAS_PREFIX.search(path.read_bytes()):
        return
    model = read_json(path)["model"]
    prefix = model["continuing_subword_prefix"]
    for merge in model.get("merges") or ():
        second = (merge.split(" ") if isinstance(merge, str) else merge)[1]
        if not second.startswith(prefix):
            raise LlavaError(f"{path}: the merge {merge!r} doesn't go on with the continuing_subword_prefix {prefix!r}")


def _from_sentencepiece(folder: Path, strip_blanks: bool) -> PreTrainedTokenizerFast:
    config = _optional_json(folder / "tokenizer_config.json")
    special = config | _optional_json(folder / "special_tokens_map.json")
    names = {
        role: _content(token)
        for role in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (token := special.get(role)) is not None
    }
    backend = _convert(folder / SENTENCEPIECE, legacy=config.get("legacy", True))
    _set_template(backend, names, config)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=min(config.get("model_max_length") or _UNLIMITED, _UNLIMITED),
        padding_side=config.get("padding_side", "right"),
        clean_up_tokenization_spaces=False,
        chat_template=config.get("chat_template"),
        # A pad token that was added later must take its own id below, not the next free one.
        **{role: name for role, name in names.items() if backend.token_to_id(name) is not None},
    )
    _add_in_order(tokenizer, _added_tokens(folder, config, strip_blanks), folder)
    pad = names.get("pad_token")
    if pad is not None and tokenizer.convert_tokens_to_ids(pad) is not None:
        tokenizer.pad_token = pad
    return tokenizer


def _convert(path: Path, legacy: bool) -> Tokenizer:
    """The SentencePiece BPE model as a `tokenizers` pipeline with the same ids.

    `legacy` (the old default) puts a blank before each piece of text between special tokens, the newer
    behaviour before the first alone.
    """
    pieces = _read_pieces(path)
    # All ways to cut a piece in two are tried, and each part is kept.
    if (longest := max(len(piece.piece) for piece in pieces)) > MOST_OF_TOKEN:
        raise LlavaError(f"{path}: a piece of {longest:,} characters; at most {MOST_OF_TOKEN} are taken")
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    unmergeable = {piece.piece for piece in pieces if piece.type != _NORMAL}
    merges = generate_merges(vocab, scores, skip_tokens=unmergeable)
    unknown = next((piece.piece for piece in pieces if piece.type == _UNKNOWN), "<unk>")
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    special = [piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    own = [piece.piece for piece in pieces if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
    return tokenizer


def _read_pieces(path: Path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes the class when imported
    with library_errors(f"{path}: the tokenizer can't be read"):
        proto.ParseFromString(path.read_bytes())
    if not proto.pieces or proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise LlavaError(f"{path}: not a SentencePiece BPE model")
    return proto.pieces


def _set_template(backend: Tokenizer, names: dict[str, str], config: dict[str, Any]) -> None:
    """Begin and end tokens as `add_bos_token` (default yes) and `add_eos_token` (default no) say."""
    bos = names["bos_token"] if config.get("add_bos_token", True) and "bos_token" in names else None
    eos = names["eos_token"] if config.get("add_eos_token", False) and "eos_token" in names else None
    around = [token for token in (bos, eos) if token]
    if not around:
        return
    first = f"{bos}:0 $A:0" if bos else "$A:0"
    second = f"{bos}:1 $B:1" if bos else "$B:1"
    tail, tail_second = (f" {eos}:0", f" {eos}:1") if eos else ("", "")
    backend.post_processor = TemplateProcessing(
        single=first + tail,
        pair=first + tail + " " + second + tail_second,
        special_tokens=[(token, backend.token_to_id(token)) for token in around],
    )


def _added_tokens(folder: Path, config: dict[str, Any], strip_blanks: bool) -> dict[int, AddedToken]:
    """Tokens added after training, by id; `added_tokens.json` knows names and ids alone."""
    plain = _optional_json(folder / "added_tokens.json")
    added = {
        index: AddedToken(token, lstrip=strip_blanks, rstrip=strip_blanks, normalized=False, special=True)
        for token, index in plain.items()
    }
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        flags = {
            name: token[name] for name in ("lstrip", "rstrip", "single_word", "normalized", "special") if name in token
        }
        added[int(index)] = AddedToken(token["content"], **flags)
    return added


def _add_in_order(tokenizer: PreTrainedTokenizerFast, added: dict[int, AddedToken], folder: Path) -> None:
    order = sorted(added)
    # The library goes over all added tokens at each call.
    for special, indices in groupby(order, lambda index: added[index].special):
        tokenizer.add_tokens([added[index] for index in indices], special_tokens=special)
    for index, found in zip(order, tokenizer.convert_tokens_to_ids([added[index].content for index in order])):
        if found != index:
            raise LlavaError(
                f"{folder}: added token {added[index].content!r} should have id {index} but gets {found}; "
                f"added_tokens.json doesn't belong to this tokenizer.model"
            )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token; that of the unknown token for one that the vocabulary doesn't have."""
    return cast(int, tokenizer.convert_tokens_to_ids(token))


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token
