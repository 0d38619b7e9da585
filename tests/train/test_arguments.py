from types import SimpleNamespace

import pytest

from llava.errors import LlavaError
from llava.train.arguments import parse_arguments
from llava.train.checks import check_distribution


@pytest.fixture
def parse(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "data.json").write_text("[]")
    base = ["--model_name_or_path", str(tmp_path / "model"), "--data_path", str(tmp_path / "data.json")]
    return lambda text="": parse_arguments([*base, "--output_dir", str(tmp_path / "out"), *text.split()])


def test_defaults_are_the_papers(parse):
    arguments = parse()
    assert arguments.training.model_max_length == 2048
    assert not arguments.model.unfreeze_mm_vision_tower
    assert (arguments.training.lora_r, arguments.training.lora_alpha, arguments.training.lora_dropout) == (64, 16, 0.05)


def test_published_flags_are_read(parse):
    arguments = parse(
        "--vision_tower openai/clip-vit-large-patch14 --mm_vision_select_layer -2 --mm_use_im_start_end "
        "--tune_mm_mlp_adapter True --evaluation_strategy no --save_strategy steps --save_steps 2400 "
        "--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --lazy_preprocess True "
        "--gradient_checkpointing True --report_to none --is_multimodal True --mm-projector-type mlp2x_gelu "
        "--cache_dir cache --force_fsdp False --trust_remote_code False --lora_bias none --double_quant True "
        "--quant_type nf4 --bits 16 --lora_dropout 0.1 --lora_alpha 8"
    )
    assert arguments.model.mm_vision_select_layer == -2
    assert arguments.model.mm_use_im_start_end is True and arguments.model.tune_mm_mlp_adapter is True
    assert arguments.training.warmup_steps == 0.03
    assert arguments.training.recomputes_activations is True
    assert arguments.data.lazy_preprocess is True


def test_the_global_batch_finds_the_accumulation(parse):
    assert parse("--global_batch_size 128 --per_device_train_batch_size 4").training.gradient_accumulation_steps == 32
    with pytest.raises(LlavaError, match="no multiple of 5"):
        parse("--global_batch_size 128 --per_device_train_batch_size 5")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--version nope", "unknown prompt template"),
        ("--quant_type int4", "int4"),
        ("--bits 5", "--bits 5"),
        ("--bits 4", "--lora_enable"),
        ("--bits 8 --tune_mm_mlp_adapter", "--lora_enable"),
        ("--learning_rate -1", "--learning_rate"),
        ("--learning_rate nan", "--learning_rate"),
        ("--per_device_train_batch_size 0", "at least 1"),
        ("--num_train_epochs 0", "--num_train_epochs"),
        ("--lora_dropout 1", "--lora_dropout"),
        ("--image_aspect_ratio round", "round"),
        ("--mm_vision_select_feature corner", "corner"),
        ("--lr_scheduler_type sometimes", "sometimes"),
        ("--optim magic", "magic"),
        ("--nosuch 1", "--nosuch"),
        ("--tune_mm_mlp_adapter --freeze_mm_mlp_adapter", "choose one"),
        ("--tune_mm_mlp_adapter --lora_enable", "choose one"),
        ("--cache_vision_features --unfreeze_mm_vision_tower", "choose one"),
        ("--mm_vision_tower_lr 1e-5", "--unfreeze_mm_vision_tower"),
        ("--packing --group_by_modality_length", "choose one"),
        ("--train_sampling_strategy sequential --group_by_modality_length", "keeps the file's order.* choose one"),
        ("--packing --max_tokens_per_batch 4096 --group_by_length True", "--group_by_length .* choose one"),
        ("--packing --train_sampling_strategy group_by_length", "--group_by_length .* choose one"),
        ("--max_tokens_per_batch 4096", "--packing"),
        ("--packing --questions_per_image 4", "add --packing True --max_tokens_per_batch"),
        ("--questions_per_image 0", "at least 1"),
        ("--fit_projector", "add --cache_vision_features True"),
        ("--fit_projector --cache_vision_features --pretrain_mm_mlp_adapter .", "choose one"),
        ("--remove_unused_columns True", "leave it out"),
        ("--lora_weight_path .", "--lora_enable"),
        ("--vision_tower /no/such/folder", "/no/such/folder"),
        ("--pretrain_mm_mlp_adapter /no/such.bin", "/no/such.bin"),
        ("--image_folder /no/such/folder", "/no/such/folder"),
        ("--warmup_ratio 3", "--warmup_ratio"),
        ("--seed -1", "--seed -1: expected a whole number from 0"),
        ("--data_seed 4294967296", "--data_seed"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers -1: expected"),
        ('--gradient_checkpointing --gradient_checkpointing_kwargs {"every_n_layers":0}', "every_n_layers 0"),
        ("--optim lomo", "--optim lomo can't be used here .*pip install lomo-optim"),
        ("--optim_args foo", "--optim adamw_torch_fused can't be used here"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(parse, flags, message):
    with pytest.raises(LlavaError, match=message):
        parse(flags)


def test_model_and_data_are_needed(tmp_path):
    with pytest.raises(LlavaError, match="--model_name_or_path is needed"):
        parse_arguments(["--data_path", str(tmp_path)])


def test_processes_that_would_train_alone_are_stopped(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_distribution(SimpleNamespace(world_size=2))
    with pytest.raises(LlavaError, match="2 processes were started but each would train alone"):
        check_distribution(SimpleNamespace(world_size=1))
