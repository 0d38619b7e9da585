"""Tokenizers from SentencePiece files: the ids that sentencepiece itself gives, added tokens, saved files."""

import io
import json
import subprocess
import sys

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llava.errors import LlavaError
from llava.generation.cache import tokenizer_cache
from llava.generation.cache.tokenizer_cache import TokenizerCache
from llava.model.tokenizer import load_tokenizer, save_tokenizer
from tests.tiny import CORPUS, make_tokenizer

TEXTS = (
    "The chest X-ray shows a large nodule.",
    " blanks  in   all    places ",
    "line\nends\n\nand\ttabs",
    "é 胸部 😀 unknown bytes",
    "USER: yes ASSISTANT: no",
    "",
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A SentencePiece BPE of LLaMA's kind: byte fallback, a blank in front, runs of blanks as pieces."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS.split(". "), "a  b   c    d"] * 3),
        model_writer=stream,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(stream.getvalue())
    return path


@pytest.fixture
def folder(model_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | special))
    return tmp_path


def configure(folder, **settings):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_ids_are_those_of_sentencepiece(folder):
    tokenizer = load_tokenizer(folder)
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert len(tokenizer) == processor.get_piece_size()
    for text in TEXTS:
        assert tokenizer(text).input_ids == [1, *processor.encode(text)], text
        assert tokenizer.decode(processor.encode(text)) == text.lstrip(" ") or text.startswith(" ")


def test_text_behind_a_special_token(folder):
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    legacy = load_tokenizer(folder)("yes</s>no").input_ids
    assert legacy == [1, *processor.encode("yes"), 2, *processor.encode("no")], "a blank before each piece of text"
    configure(folder, legacy=False)
    newer = load_tokenizer(folder)("yes</s>no").input_ids
    assert newer[: len(legacy) - len(processor.encode("no"))] == [1, *processor.encode("yes"), 2]
    assert newer != legacy


def test_begin_and_end(folder):
    configure(folder, add_bos_token=False, add_eos_token=True)
    ids = load_tokenizer(folder)("yes").input_ids
    assert ids[0] != 1 and ids[-1] == 2


def test_padding_token(folder):
    assert load_tokenizer(folder).pad_token == "<unk>"
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 420}))
    configure(folder, pad_token="[PAD]")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token_id, len(tokenizer)) == (420, 421)


@pytest.mark.parametrize("strip", [False, True])
def test_added_tokens_keep_their_ids(folder, strip):
    added = {"<im_end>": 422, "<im_patch>": 420, "<im_start>": 421}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(folder, strip_blanks=strip)
    assert tokenizer.convert_tokens_to_ids(list(added)) == list(added.values())
    ids, tight = tokenizer("a \n<im_start> b").input_ids, tokenizer("a<im_start>b").input_ids
    assert 421 in ids and (ids == tight) == strip


def test_added_tokens_with_their_flags(folder):
    flags = {"content": "<x>", "lstrip": True, "rstrip": False, "normalized": False, "special": False}
    configure(folder, added_tokens_decoder={"420": flags})
    tokenizer = load_tokenizer(folder)
    assert tokenizer("a <x>").input_ids == tokenizer("a<x>").input_ids
    assert "<x>" in tokenizer.decode([420], skip_special_tokens=True)


def test_added_tokens_of_another_model(folder):
    (folder / "added_tokens.json").write_text(json.dumps({"<im_patch>": 32000}))
    with pytest.raises(LlavaError, match="'<im_patch>' should have id 32000 but gets 420"):
        load_tokenizer(folder)


@pytest.mark.timeout(120)
def test_many_added_tokens_take_time_by_their_number(folder):
    """1,000 took 0.4 s and 4,000 took 9 s: the library goes over all of them at each call that adds some."""
    special = {"content": "<s1>", "special": True}, {"content": "<s2>", "special": True}
    added = {f"<{number}>": 421 + number for number in range(50_000)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    configure(folder, added_tokens_decoder={"420": special[0], "50421": special[1]})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids(["<s1>", "<0>", "<49999>", "<s2>"]) == [420, 421, 50_420, 50_421]


def test_saved_for_older_programs_too(folder, tmp_path_factory):
    (folder / "added_tokens.json").write_text(json.dumps({"<im_patch>": 420}))
    tokenizer = load_tokenizer(folder, strip_blanks=True)
    saved = tmp_path_factory.mktemp("saved")
    save_tokenizer(tokenizer, saved)
    assert (saved / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert json.loads((saved / "added_tokens.json").read_text()) == {"<im_patch>": 420}
    again = load_tokenizer(saved)
    for text in (*TEXTS, "a \n<im_patch> b"):
        assert again(text).input_ids == tokenizer(text).input_ids


def test_json_is_taken_as_it_stands(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path)("The chest X-ray.").input_ids == tokenizer("The chest X-ray.").input_ids


def test_folder_without(tmp_path):
    with pytest.raises(LlavaError, match=r"no tokenizer found \(looked for tokenizer.json and tokenizer.model\)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_damaged(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlavaError, match=name.replace(".", r"\.")):
        load_tokenizer(tmp_path)


def test_merges_without_their_prefix_are_refused(tmp_path):
    """The library would end the process."""
    make_tokenizer(tmp_path).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = "\0"
    path.write_text(json.dumps(content))
    with pytest.raises(LlavaError, match="doesn't go on with the continuing_subword_prefix"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_an_error(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    one = {"SpecialToken": {"id": "<nowhere>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [one, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }
    path.write_text(json.dumps(content))
    with pytest.raises(LlavaError, match="the tokenizer or a file next to it can't be read"):
        load_tokenizer(tmp_path)


def with_steps(folder, **steps):
    make_tokenizer(folder).save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | steps))
    return folder


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


DOUBLE = replace({"String": "a"}, "aa")
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def template(*parts, ids=(0,)):
    token = {"id": "<unk>", "ids": list(ids), "tokens": ["<unk>"] * len(ids)}
    pair = [TEXT, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": {"<unk>": token}}


MARK = {"SpecialToken": {"id": "<unk>", "type_id": 0}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": sequence(*[DOUBLE] * 30)},
        {"normalizer": sequence(*[sequence(DOUBLE)] * 5)},
        {"normalizer": sequence(*[replace({"Regex": ""}, "a")] * 5)},
        {"normalizer": replace({"String": "a"}, "a" * 65)},
        {"normalizer": sequence(*[{"type": "ByteLevel"}] * 30)},
        {"normalizer": sequence(*[{"type": "NFC"}] * 33)},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 30}},
        {"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 30}},
        {"post_processor": template(*[TEXT] * 17)},
        {"post_processor": {"type": "Sequence", "processors": [template(TEXT, TEXT)] * 5}},
        {"post_processor": template(TEXT, *[MARK] * 65)},
        {"post_processor": template(TEXT, MARK, ids=[0] * 65)},
    ],
)
def test_steps_that_let_a_text_grow_are_refused(steps, tmp_path):
    """The library would end the process, perhaps while it loads."""
    with pytest.raises(LlavaError, match=f"tokenizer.json: ({next(iter(steps))}|Replace|Template)"):
        load_tokenizer(with_steps(tmp_path, **steps))


LLAMA = sequence({"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁"))
CLIP = sequence({"type": "NFC"}, replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"})
ALBERT = sequence(replace({"String": "``"}, '"'), replace({"String": "''"}, '"'), {"type": "NFKD"})
SENTENCES = sequence({"type": "Strip", "strip_left": False, "strip_right": True}, replace({"Regex": " {2,}"}, "▁"))


@pytest.mark.parametrize("normalizer", [None, LLAMA, CLIP, ALBERT, SENTENCES, {"type": "NFC"}])
def test_steps_of_known_models_are_taken(normalizer, tmp_path):
    assert load_tokenizer(with_steps(tmp_path, normalizer=normalizer)).encode("A chest X-ray.")


def test_a_file_beside_it_names_no_other_tokenizer(tmp_path):
    """What was looked at is what is read."""
    folder, other = tmp_path / "a", tmp_path / "b"
    tokenizer = make_tokenizer(folder)
    make_tokenizer(other, vocab_size=300)
    (folder / "tokenizer.4.0.0.json").write_text((other / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    config |= {"tokenizer_file": str(other / "tokenizer.json"), "fast_tokenizer_files": ["tokenizer.4.0.0.json"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"tokenizer_file": str(other / "tokenizer.json")}))
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()


def test_a_piece_of_any_length_is_refused(folder):
    """All its parts would be made: a piece of 300,000 letters takes a minute, one of two million has no end."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    model.pieces.add(piece="a" * 257, score=0.0)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(LlavaError, match=r"tokenizer\.model: a piece of 257 characters; at most 256 are taken"):
        load_tokenizer(folder)


ENDLESS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def test_a_panic_at_a_text_is_an_error(tmp_path):
    tokenizer = load_tokenizer(with_steps(tmp_path, pre_tokenizer=ENDLESS))
    with pytest.raises(LlavaError, match="tokenizer fails at this text"):
        TokenizerCache(tokenizer)("a" * 40 + "b")


def test_long_texts_are_kept_up_to_a_size_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_cache, "_CHARACTERS", 1000)
    tokenizer = make_tokenizer(tmp_path)
    cache = TokenizerCache(tokenizer)
    for text in [f"{number} " * 100 for number in range(9)] + ["left " * 300, "short", "short"]:
        assert cache(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, add_special_tokens=False)
        assert sum(len(known) for known, *_ in cache._known) == cache._characters <= 1000
    assert [known for known, *_ in cache._known] == ["short"]


def test_a_panic_ends_a_command_in_one_line(tmp_path):
    folder = with_steps(tmp_path, pre_tokenizer=ENDLESS)
    code = "from llava.commandline import run; from llava.model.tokenizer import load_tokenizer; "
    code += f"run(lambda: load_tokenizer({str(folder)!r}).encode('a' * 40 + 'b') and 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "error: a library gave up" in done.stderr.splitlines()[-1]


THREADS = """
import psutil, sys, threading
from llava.generation.cache.tokenizer_cache import TokenizerCache
from llava.model.tokenizer import load_tokenizer

tokenizer = load_tokenizer(sys.argv[1])
asked = TokenizerCache(tokenizer) if sys.argv[2] == "cache" else tokenizer
ready = threading.Barrier(9)

def ask(thread):
    for number in range(3000):
        asked(f"Is there a nodule in picture {thread * 10_000 + number}, and where is it?", add_special_tokens=False)
    ready.wait()
    ready.wait()

before = psutil.Process().memory_info().rss
for thread in range(8):
    threading.Thread(target=ask, args=(thread,)).start()
ready.wait()
print((psutil.Process().memory_info().rss - before) >> 20)
ready.wait()
"""


def test_no_thread_keeps_words_of_its_own(tmp_path):
    """The library's tokenizer does: what is measured would show it."""
    make_tokenizer(tmp_path)
    took = {
        which: int(subprocess.run([sys.executable, "-c", THREADS, str(tmp_path), which], capture_output=True).stdout)
        for which in ("cache", "tokenizer")
    }
    assert took["cache"] < 20 < took["tokenizer"], took
