"""Whole runs of a tiny model: stages, resuming, adapters, caches, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava.constants import SCHEME_PATCH
from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.serve.worker.card import card_of
from llava.train.arguments import parse_arguments
from llava.train.prepare_model import prepare_model
from llava.train.progress import flops_per_token
from llava.train.train import train
from tests.tiny import hub_cache, make_llava
from tests.train.helpers import flags, make_bases, make_records


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, bases, data):
    output_dir = tmp_path_factory.mktemp("runs") / "stage1"
    llm, clip = bases
    more = ("--vision_tower", str(clip), "--tune_mm_mlp_adapter", "--version", "plain", "--num_train_epochs", "2")
    more += ("--data_description", "a dozen made-up records")
    return output_dir, train(flags(output_dir, data, llm, *more))


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_stage_1_trains_the_projector_alone_and_writes_model_and_projector(stage1, bases):
    output_dir, summary = stage1
    found = weights(output_dir)
    llm = load_file(bases[0] / "model.safetensors")
    assert all(torch.equal(found[name], llm[name]) for name in llm)
    projector = torch.load(output_dir / "mm_projector.bin", weights_only=True)
    assert set(projector) == {"model.mm_projector.weight", "model.mm_projector.bias"}
    assert all(torch.equal(projector[name], found[name]) for name in projector)
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in projector.values())
    load_pretrained_model(output_dir)


def test_the_checkpoint_says_what_it_was_made_from(stage1, bases):
    output_dir, summary = stage1
    model = load_pretrained_model(output_dir).model
    assert model.config.trained_on == "a dozen made-up records" and summary["base"] == str(bases[0])
    card = card_of(str(output_dir), model)
    assert card.trained_on == "a dozen made-up records" and card.training == "12 steps over 12 samples"
    assert card.base == bases[0].name and card.template == "plain" and card.context.endswith(" tokens")
    assert str(output_dir.parent) not in card.model_dump_json() and str(bases[0].parent) not in card.model_dump_json()


@pytest.mark.parametrize(
    ("own", "flag", "written"), [(True, (), True), (False, (), False), (False, ("--use_cache",), True)]
)
def test_the_written_config_holds_the_use_of_a_cache_that_the_base_had(tmp_path, data, own, flag, written):
    base = make_llava(tmp_path / "base", use_cache=own)
    train(flags(tmp_path / "out", data, base, "--max_steps", "1", *flag))
    assert json.loads((tmp_path / "out/config.json").read_text())["use_cache"] is written


def test_the_summary_and_the_curve_are_written(stage1):
    output_dir, summary = stage1
    written = json.loads((output_dir / "training_summary.json").read_text())
    assert written["steps"] == summary["steps"] == 12
    assert written["samples"] == 12 and written["samples_seen"] == 24
    assert written["first_loss"] > 0 and written["tokens_seen"] > 24 * 4
    assert (output_dir / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    page = (output_dir / "training_report.html").read_text()
    assert f"{written['first_loss']:.4f}" in page and f"{written['last_loss']:.4f}" in page
    assert f"{written['tokens_seen']:,}" in page


def test_nothing_unfinished_is_left_behind(stage1):
    assert not [path.name for path in stage1[0].rglob("*") if ".part" in path.name]


@pytest.mark.parametrize("start", ["whole", "projector"])
def test_stage_2_starts_from_either_and_trains_all_but_the_tower(tmp_path, stage1, bases, data, start):
    stage1_dir, _ = stage1
    if start == "whole":
        model, more = stage1_dir, ()
    else:
        model = bases[0]
        more = ("--vision_tower", str(bases[1]), "--pretrain_mm_mlp_adapter", str(stage1_dir / "mm_projector.bin"))
    more += ("--version", "v1", "--max_steps", "3")
    train(flags(tmp_path / "out", data, model, *more))
    names = changed(weights(stage1_dir), weights(tmp_path / "out"))
    assert any("layers" in name for name in names) and any("mm_projector" in name for name in names)
    assert "lm_head.weight" in names and not any("vision_tower" in name for name in names)
    model = load_pretrained_model(tmp_path / "out").model
    assert model.config.conversation_template == "v1"


@pytest.mark.parametrize(
    ("own", "version", "kept"),
    [("llava_llama_2", (), "llava_llama_2"), ("llava_llama_2", ("--version", "v1"), "v1"), ("plain", (), "v0"),
     ("plain", ("--version", "v1"), "v1"), ("v1", ("--version", "v1"), "v1"),
     ("simple", (), "v0"), ("simple", ("--version", "v0"), "v0"), ("simple", ("--version", "simple"), "simple")],
)  # fmt: skip
def test_another_template_than_the_checkpoints_own_is_said(tmp_path, data, caplog, own, version, kept):
    scheme = {"mm_image_token_scheme": SCHEME_PATCH} if own == "simple" else {}  # as v1.0's releases
    model = make_llava(tmp_path / "model", conversation_template=own, **scheme)
    loaded = prepare_model(parse_arguments(flags(tmp_path / "out", data, model, *version)))
    assert loaded.model.config.conversation_template == kept
    said = [line for line in caplog.messages if line.startswith("--version")]
    other = own == "llava_llama_2" and kept == "v1"
    assert said == ["--version v1: the checkpoint's own template is llava_llama_2; without the flag it is kept"] * other


def test_other_tokens_around_images_than_the_checkpoints_are_said(tmp_path, data, caplog):
    model = make_llava(tmp_path / "model")
    for value in ("False", "True"):
        more = ("--mm_use_im_start_end", value)
        loaded = prepare_model(parse_arguments(flags(tmp_path / "out", data, model, *more)))
        assert loaded.model.config.mm_use_im_start_end == (value == "True")
    said = [line for line in caplog.messages if line.startswith("--mm_use_im_start_end")]
    assert said == ["--mm_use_im_start_end True: the checkpoint was made with False; without the flag that is kept"]


def test_hub_ids_are_looked_for_in_the_cache_that_is_named(tmp_path, bases, data):
    llm, clip = bases
    cache = hub_cache(tmp_path / "cache", {"some/llm": llm, "some/tower": clip})
    more = ("--vision_tower", "some/tower", "--tune_mm_mlp_adapter", "--version", "plain", "--max_steps", "1")
    with pytest.raises(LlavaError, match="model not found: there is no folder some/llm"):
        train(flags(tmp_path / "none", data, "some/llm", *more))
    train(flags(tmp_path / "out", data, "some/llm", *more, "--cache_dir", str(cache)))
    assert load_pretrained_model(tmp_path / "out", device="cpu").model.config.mm_vision_tower == "some/tower"


def test_the_projector_that_is_given_really_is_loaded(tmp_path, stage1, bases, data):
    stage1_dir, _ = stage1
    more = ("--vision_tower", str(bases[1]), "--max_steps", "1", "--learning_rate", "0")
    train(flags(tmp_path / "a", data, bases[0], *more))
    train(flags(tmp_path / "b", data, bases[0], *more, "--pretrain_mm_mlp_adapter", str(stage1_dir)))
    name = "model.mm_projector.weight"
    assert torch.equal(weights(tmp_path / "b")[name], weights(stage1_dir)[name])
    assert not torch.equal(weights(tmp_path / "a")[name], weights(stage1_dir)[name])


def test_start_and_end_tokens_are_learned_in_stage_1_and_carried_over(tmp_path, bases, data):
    llm, clip = bases
    more = ("--vision_tower", str(clip), "--mm_use_im_start_end", "--max_steps", "2", "--version", "v0")
    train(flags(tmp_path / "one", data, llm, *more, "--tune_mm_mlp_adapter"))
    embedding = weights(tmp_path / "one")["model.embed_tokens.weight"]
    old = load_file(llm / "model.safetensors")["model.embed_tokens.weight"]
    assert embedding.shape[0] == old.shape[0] + 2
    assert torch.equal(embedding[:-2], old) and not torch.equal(embedding[-2], embedding[-1])
    train(
        flags(
            tmp_path / "two",
            data,
            llm,
            *more,
            "--pretrain_mm_mlp_adapter",
            str(tmp_path / "one"),
            "--learning_rate",
            "0",
        )
    )
    assert torch.equal(weights(tmp_path / "two")["model.embed_tokens.weight"], embedding)


def losses(output_dir):
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


def test_a_resumed_run_continues_bit_for_bit(tmp_path, stage1, data):
    more = ("--version", "v1", "--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "4")
    more += ("--gradient_accumulation_steps", "2", "--lr_scheduler_type", "cosine", "--warmup_steps", "0.1")
    train(flags(tmp_path / "whole", data, stage1[0], *more))
    # The folder as a killed run leaves it: a checkpoint in the middle, something half-written, no final model.
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    (tmp_path / "killed" / ".checkpoint-5.part").mkdir()
    summary = train(flags(tmp_path / "killed", data, stage1[0], *more))
    assert summary["resumed_from"].endswith("checkpoint-4") and summary["steps"] == 6
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert changed(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == set()


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, stage1, data, caplog):
    more = ("--version", "v1", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1")
    train(flags(tmp_path / "out", data, stage1[0], *more))
    path = tmp_path / "out" / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    summary = train(flags(tmp_path / "out", data, stage1[0], *more))
    assert summary["resumed_from"].endswith("checkpoint-3")
    assert "checkpoint-4 is damaged" in caplog.text


def test_save_total_limit_keeps_the_newest(tmp_path, stage1, data):
    more = ("--version", "v1", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1")
    train(flags(tmp_path / "out", data, stage1[0], *more, "--save_total_limit", "2"))
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_cached_features_give_the_same_losses_as_the_tower(tmp_path, stage1, data):
    more = ("--version", "v1", "--num_train_epochs", "1")
    train(flags(tmp_path / "plain", data, stage1[0], *more))
    shared = ("--cache_vision_features", "--vision_cache_dir", str(tmp_path / "cache"))
    train(flags(tmp_path / "cached", data, stage1[0], *more, *shared))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    (index,) = (tmp_path / "cache").glob("*/index.json")
    assert len(json.loads(index.read_text())["rows"]) == 4  # distinct images
    before = index.stat().st_mtime_ns
    train(flags(tmp_path / "again", data, stage1[0], *more, *shared))
    assert index.stat().st_mtime_ns == before
    assert losses(tmp_path / "again") == losses(tmp_path / "cached")


def test_packed_batches_have_the_unpacked_loss(tmp_path, stage1, bases, data):
    more = ("--version", "v1", "--num_train_epochs", "1", "--per_device_train_batch_size", "4")
    train(flags(tmp_path / "padded", data, stage1[0], *more))
    train(flags(tmp_path / "packed", data, stage1[0], *more, "--packing"))
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-5)


def test_packing_up_to_a_number_of_tokens_sees_every_sample_once(tmp_path, stage1, data):
    more = ("--version", "v1", "--num_train_epochs", "1", "--packing", "--max_tokens_per_batch", "150")
    summary = train(flags(tmp_path / "out", data, stage1[0], *more, "--per_device_train_batch_size", "1"))
    assert summary["samples_seen"] == 12 and summary["steps"] < 12


def test_grouped_mixed_batches_train(tmp_path, stage1):
    mixed = make_records(tmp_path, 13, text_only_every=3)
    more = ("--version", "v1", "--num_train_epochs", "1", "--group_by_modality_length", "True")
    summary = train(flags(tmp_path / "out", mixed, stage1[0], *more))
    assert summary["samples_seen"] == 13


@pytest.mark.parametrize(("kwargs", "runs"), [(None, [2, 2]), ('{"every_n_layers": 2}', [2, 1])])
def test_checkpointed_layers_run_twice_and_the_loss_stays(tmp_path, stage1, data, monkeypatch, kwargs, runs):
    """Forward passes of each of the two layers in one step: again in the backward pass where checkpointed."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    more = ("--version", "v1", "--max_steps", "1", "--gradient_accumulation_steps", "1")
    plain = train(flags(tmp_path / "plain", data, stage1[0], *more))
    counted, forward = {}, LlamaAttention.forward

    def count(self, *args, **kwargs):
        counted[self.layer_idx] = counted.get(self.layer_idx, 0) + 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", count)
    more += ("--gradient_checkpointing", "True")
    more += ("--gradient_checkpointing_kwargs", kwargs) if kwargs else ()
    summary = train(flags(tmp_path / "again", data, stage1[0], *more))
    assert sorted(counted.values(), reverse=True) == runs
    assert summary["first_loss"] == pytest.approx(plain["first_loss"], abs=1e-6)


@pytest.mark.parametrize("tool", ["tensorboard", "wandb"])
def test_what_a_person_watches_is_written(tmp_path, stage1, data, monkeypatch, tool):
    pytest.importorskip(tool)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    words = flags(tmp_path / "out", data, stage1[0], "--version", "v1", "--max_steps", "2")
    words[words.index("--report_to") + 1] = tool
    train(words)
    pattern = {"tensorboard": "events.out.tfevents.*", "wandb": "run-*.wandb"}[tool]
    assert [path for path in tmp_path.rglob(pattern) if path.stat().st_size]


def test_own_learning_rates_move_their_part_alone(tmp_path, stage1, data):
    more = ("--version", "v1", "--max_steps", "2", "--learning_rate", "0", "--unfreeze_mm_vision_tower")
    train(flags(tmp_path / "out", data, stage1[0], *more, "--mm_projector_lr", "0", "--mm_vision_tower_lr", "1e-2"))
    names = changed(weights(stage1[0]), weights(tmp_path / "out"))
    assert names and all("vision_tower" in name for name in names)


def test_a_frozen_backbone_stays_and_the_projector_is_trained(tmp_path, stage1, data):
    more = ("--version", "v1", "--max_steps", "2", "--freeze_backbone", "True", "--peak_tflops", "0.001")
    summary = train(flags(tmp_path / "out", data, stage1[0], *more))
    moved = changed(weights(stage1[0]), weights(tmp_path / "out"))
    assert moved and all("mm_projector" in name for name in moved)
    model = load_pretrained_model(tmp_path / "out", device="cpu").model
    assert summary["mfu"] == pytest.approx(summary["tokens_per_second"] * flops_per_token(model) / 1e9, rel=0.5)


def test_cut_and_targetless_samples_are_counted_and_named(tmp_path, stage1, data):
    more = ("--version", "v1", "--max_steps", "1", "--model_max_length")
    summary = train(flags(tmp_path / "out", data, stage1[0], *more, "20"))
    assert summary["truncated"]["count"] == 12 and summary["without_target"]["count"] == 12
    assert 'record 0 ("r0")' in summary["truncated"]["first"][0]


@pytest.mark.parametrize("lazy", ["True", "False"])
def test_a_missing_image_names_record_path_and_what_to_do(tmp_path, stage1, lazy):
    data = make_records(tmp_path)
    (tmp_path / "images" / "green.png").unlink()
    more = ("--version", "v1", "--num_train_epochs", "1", "--lazy_preprocess", lazy)
    with pytest.raises(
        LlavaError, match=r'record \d+ \("r\d+"\): image ".*green\.png" not found.*llava-med filter-missing'
    ):
        train(flags(tmp_path / "out", data, stage1[0], *more))
    summary = train(flags(tmp_path / "out", data, stage1[0], *more, "--skip_unreadable_images"))
    assert summary["left_out"]["count"] == 3
    assert summary["samples_seen"] == 9


def test_a_shape_that_the_tower_does_not_take_is_named(tmp_path, stage1):
    data = make_records(tmp_path)
    with pytest.raises(
        LlavaError, match=r'record \d+ \("r\d+"\): --image_aspect_ratio keep .*; train with square or pad$'
    ):
        more = ("--version", "v1", "--image_aspect_ratio", "keep", "--skip_unreadable_images")
        train(flags(tmp_path / "out", data, stage1[0], *more))


@pytest.mark.parametrize("early", [("--cache_vision_features",), ("--image_aspect_ratio", "anyres")])
def test_a_missing_image_that_is_looked_for_early_is_named_too(tmp_path, stage1, early):
    data = make_records(tmp_path)
    (tmp_path / "images" / "green.png").unlink()
    more = ("--version", "v1", "--lazy_preprocess", "True", *early)
    with pytest.raises(
        LlavaError, match=r'record \d+ \("r\d+"\): image ".*green\.png" not found.*llava-med filter-missing'
    ):
        train(flags(tmp_path / "out", data, stage1[0], *more))


@pytest.mark.parametrize(
    "more",
    [
        ("--lazy_preprocess", "True"),
        ("--lazy_preprocess", "False"),
        ("--lazy_preprocess", "True", "--train_sampling_strategy", "group_by_length"),
        ("--lazy_preprocess", "True", "--packing", "--max_tokens_per_batch", "400", "--questions_per_image", "2"),
    ],
)
def test_tiles_of_images_that_are_not_there_are_left_out_too(tmp_path, stage1, more):
    """How many tiles an image has is asked before its turn in a batch comes."""
    data = make_records(tmp_path)
    (tmp_path / "images" / "green.png").unlink()
    (tmp_path / "images" / "blue.png").write_bytes(b"not an image")
    more = ("--version", "v1", "--num_train_epochs", "1", "--image_aspect_ratio", "anyres", *more)
    summary = train(flags(tmp_path / "out", data, stage1[0], *more, "--skip_unreadable_images"))
    assert (summary["left_out"]["count"], summary["samples_seen"]) == (6, 6)


@pytest.mark.parametrize("cached", [(), ("--cache_vision_features",)])
def test_an_unreadable_image_is_an_error_or_counted(tmp_path, stage1, cached):
    data = make_records(tmp_path)
    (tmp_path / "images" / "blue.png").write_bytes(b"not an image")
    more = ("--version", "v1", "--num_train_epochs", "1", *cached)
    with pytest.raises(LlavaError, match=r'record \d+ \("r\d+"\).*blue\.png.*llava-med validate" with --fix'):
        train(flags(tmp_path / "out", data, stage1[0], *more))
    summary = train(flags(tmp_path / "out", data, stage1[0], *more, "--skip_unreadable_images"))
    assert summary["left_out"]["count"] == 3


def test_no_readable_image_at_all_is_an_error(tmp_path, stage1):
    data = make_records(tmp_path)
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"not an image")
    more = ("--version", "v1", "--cache_vision_features", "--skip_unreadable_images")
    with pytest.raises(LlavaError, match=r"train\.json: no record is left.*--image_folder"):
        train(flags(tmp_path / "out", data, stage1[0], *more))


def test_a_record_without_conversations_is_named(tmp_path, stage1):
    data = make_records(tmp_path)
    records = json.loads(data.read_text())
    del records[7]["conversations"]
    data.write_text(json.dumps(records))
    with pytest.raises(LlavaError, match=r'train\.json record 7 \("r7"\).*conversations'):
        train(flags(tmp_path / "out", data, stage1[0]))


def test_a_image_without_its_place_in_the_text_is_named(tmp_path, stage1):
    data = make_records(tmp_path)
    records = json.loads(data.read_text())
    records[2]["conversations"][0]["value"] = "Which colour?"
    data.write_text(json.dumps(records))
    with pytest.raises(LlavaError, match=r'"r2".*0 <image>.*1 image'):
        train(flags(tmp_path / "out", data, stage1[0], "--version", "v1"))


def test_a_loss_that_is_no_number_stops_with_the_record_ids(tmp_path, stage1, data):
    broken = tmp_path / "broken"
    shutil.copytree(stage1[0], broken)
    from safetensors.torch import save_file

    tensors = weights(broken)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlavaError, match=r'loss is nan at step 1.*\("r\d+"\), .*\("r\d+"\)'):
        train(flags(tmp_path / "out", data, broken, "--version", "v1"))
