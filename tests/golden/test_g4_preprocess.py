"""G4: training text → ids and labels as the two reference code bases make them, single and collated.

Exceptions, each with its reason (the golden README's numbers):
5. samples that the reference masks whole or fails on: ids as the reference's, targets exactly the answers;
7. `mpt` with a tokenizer without BOS: labels are a record of a fault, ours have exactly the answers;
   its tokenizer may also join an answer's first line break with the cue's, where ours keeps answers apart;
   LLaVA's `--version v0` renders vicuna_v1; v1.0 with "llama" in the path has </s> in place of BOS;
9. LLaVA cuts samples with an image in the collator only: ours are compared uncut, and cut after collation.
"""

import gzip
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llava.constants import DEFAULT_IMAGE_PATCH_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.model.tokenizer import add_tokens, load_tokenizer
from llava.record_content import ASSISTANT, read_turns
from llava.tokenization import (
    Encoded,
    ImageTokens,
    conversation_from_record,
    encode_conversation,
    encode_prompt,
    pad_batch,
)
from tests.conftest import golden_cases, golden_root


def is_hash(case: Path) -> bool:
    meta = json.loads((case / "meta.json").read_text())
    return meta["version_flag"] == "v0" if "special_ids" in meta else meta["sep_style"].endswith("SINGLE")


CASES = golden_cases("G4_preprocess")
NOT_HASH = [case for case in CASES if case.values[0] is None or not is_hash(case.values[0])]
"""v0's masking rule is the golden labels' own, and its training format isn't that of its prompts."""
V1_0_TEMPLATES = {"v0": "default", "v1": "vicuna_v1_1"}
LLAVA_VERSIONS = {"v0": "v1"}


@cache
def setting(case: Path) -> SimpleNamespace:
    """One folder: tokenizer, template and scheme as its meta.json says, the records by id, and ours of each."""
    meta = json.loads((case / "meta.json").read_text())
    tokenizer = load_tokenizer(golden_root() / meta["tokenizer"].split()[0])
    if "special_ids" in meta:
        names = {index: token for token, index in meta["special_ids"].items() if index >= len(tokenizer)}
        add_tokens(tokenizer, [names[index] for index in sorted(names)], strip_blanks=True)
        assert all(tokenizer.convert_tokens_to_ids(name) == index for index, name in names.items())
        image_tokens = ImageTokens("patch", meta["mm_use_im_start_end"])
        template = get_template(V1_0_TEMPLATES[meta["version_flag"]], "llava_med_v1.0")
    else:
        if meta["pad_token_id"] >= len(tokenizer):  # what LLaVA's `--version v0` adds
            add_tokens(tokenizer, ["[PAD]"], strip_blanks=False)
        if meta["mm_use_im_start_end"]:
            add_tokens(tokenizer, ["<im_patch>", "<im_start>", "<im_end>"], strip_blanks=False)
        image_tokens = ImageTokens("placeholder", meta["mm_use_im_start_end"])
        template = get_template(LLAVA_VERSIONS.get(meta["version_flag"], meta["version_flag"]), "llava")
    records = json.loads((case.parent / meta.get("source", "source.json")).read_text())
    result = SimpleNamespace(
        meta=meta,
        tokenizer=tokenizer,
        image_tokens=image_tokens,
        template=template,
        is_v1_0="special_ids" in meta,
        records={record["id"]: record for record in records},
        expected=json.loads(gzip.decompress((case / "outputs.json.gz").read_bytes())),
        batches=json.loads(gzip.decompress((case / "collated.json.gz").read_bytes())),
    )
    result.ours = {id: encode(result, record) for id, record in result.records.items()}
    return result


def encode(setting: SimpleNamespace, record: dict) -> Encoded:
    cut = setting.is_v1_0 or "image" not in record  # 9.
    return encode_conversation(
        record,
        setting.template,
        setting.tokenizer,
        setting.image_tokens,
        max_length=setting.meta["model_max_length"] if cut else None,
        features_per_image=setting.meta.get("image_token_len"),
    )


def comparable_ids(setting: SimpleNamespace, ids: list[int]) -> list[int]:
    """Ours with v1.0's <im_patch> where IMAGE_TOKEN_INDEX stands, and its BOS of llama paths (7.)."""
    if not setting.is_v1_0:
        return ids
    patch = setting.meta["special_ids"][DEFAULT_IMAGE_PATCH_TOKEN]
    ids = [patch if token == IMAGE_TOKEN_INDEX else token for token in ids]
    if setting.meta["llama_in_model_path"]:
        assert ids[0] == setting.tokenizer.bos_token_id
        ids[0] = setting.meta["bos_token_id"]
    return ids


def ids_are_a_record(setting: SimpleNamespace, record: dict) -> bool:
    """7.: v1.0 with </s> as BOS strips the blanks around typed specials; `mpt` joins line breaks across a border."""
    turns = read_turns(record)
    if setting.meta.get("conversation_version") == "mpt":
        return any(turn.text.startswith("\n") for turn in turns if turn.role == ASSISTANT)
    if not setting.meta.get("llama_in_model_path"):
        return False
    return any(mark in turn.text for turn in turns for mark in ("<s>", "</s>", "<unk>"))


def labels_are_a_fault(setting: SimpleNamespace, id: str) -> bool:
    meta = setting.meta
    if id in meta["mismatch_ids"] or id in meta["error_ids"] or meta.get("conversation_version") == "mpt":
        return True
    # Masked whole because all answers lie beyond the cut is right; ours has to agree.
    return id in meta["all_masked_ids"] and not setting.ours[id].truncated and setting.ours[id].num_targets > 0


@pytest.mark.parametrize("case", CASES)
def test_ids_and_labels(case):
    this = setting(case)
    compared = 0
    for expected in this.expected:
        id, ours = expected["id"], this.ours[expected["id"]]
        if "error" in expected or ids_are_a_record(this, this.records[id]):
            continue
        assert comparable_ids(this, ours.input_ids) == expected["input_ids"], id
        if not labels_are_a_fault(this, id):
            assert ours.labels == expected["labels"], id
            compared += 1
    assert compared >= len(this.expected) // 2 or this.meta.get("conversation_version") == "mpt"


@pytest.mark.parametrize("case", NOT_HASH)
def test_targets_are_exactly_the_answers(case):
    """Every sample, those that the reference gets wrong (5., 7.) among them."""
    this = setting(case)
    for id, record in this.records.items():
        whole = encode_conversation(record, this.template, this.tokenizer, this.image_tokens)
        targets = [token for token in whole.labels if token != IGNORE_INDEX]
        assert solid(this.tokenizer.decode(targets)) == solid(answers(this.template, record)), id


@pytest.mark.parametrize("case", CASES)
def test_collated_batches(case):
    this = setting(case)
    assert this.batches
    for batch in this.batches:
        samples = [(comparable_ids(this, this.ours[id].input_ids), this.ours[id].labels) for id in batch["ids"]]
        ours = pad_batch(samples, this.meta["pad_token_id"], max_length=this.meta["model_max_length"])
        for row, id in enumerate(batch["ids"]):
            if ids_are_a_record(this, this.records[id]):
                continue
            assert ours["input_ids"][row].tolist() == batch["input_ids"][row], id
            # The references' mask is ids != padding: where a text spells the padding token, it hides a real one. Ours
            # never does, so there the reference's isn't compared.
            is_typed = ours["attention_mask"][row] & (ours["input_ids"][row] == this.meta["pad_token_id"])
            expected = np.array(batch["attention_mask"][row], bool)
            assert not expected[is_typed].any(), id
            assert (ours["attention_mask"][row] == expected)[~is_typed].all(), id
            if not labels_are_a_fault(this, id):
                assert ours["labels"][row].tolist() == batch["labels"][row], id


@pytest.mark.parametrize("case", NOT_HASH)
def test_prompt_is_the_beginning_of_the_training_sample(case):
    this = setting(case)
    for id, record in this.records.items():
        sample = encode_conversation(record, this.template, this.tokenizer, this.image_tokens)
        prompt = encode_prompt(conversation_from_record(record, this.template), this.tokenizer, this.image_tokens)
        assert sample.input_ids[: len(prompt)] == prompt, id
        last = answers(this.template, [{"from": "human", "value": "?"}, last_turn(record)])
        assert solid(this.tokenizer.decode(sample.input_ids[len(prompt) :])) == solid(last), id


@pytest.mark.parametrize("case", CASES)
def test_samples_without_target_are_known(case):
    """What the reference masks whole without a mismatch: cut before the first answer, and counted by ours."""
    this = setting(case)
    for id in set(this.meta["all_masked_ids"]) - set(this.meta["mismatch_ids"]):
        assert this.ours[id].truncated > 0, id
        assert this.ours[id].num_targets == 0, id


def answers(template: Conversation, record) -> str:
    """What has to be learned: each answer that says something, and its end mark."""
    turns = read_turns(record)
    if turns[0].role == ASSISTANT:
        turns = turns[1:]
    end = template.sep if template.sep2 is None else template.sep2
    plain = template.sep_style is SeparatorStyle.PLAIN
    return "".join(turn.text + end for turn in turns if turn.role == ASSISTANT and (turn.text or plain))


def last_turn(record: dict) -> dict:
    return (record.get("conversations") or record["conversatons"])[-1]


def solid(text: str) -> str:
    """Without blanks: LLaMA's tokenizers add some next to special tokens."""
    return "".join(text.split())
