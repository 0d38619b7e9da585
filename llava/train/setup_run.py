"""The parts of a run, put together: processes, output folder, dataset, feature cache, trainer, final files."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.conversation import get_template
from llava.errors import LlavaError
from llava.folders import WEIGHTS, expanded, part_in, publish_files
from llava.images import ImageProcessor, image_size, open_image
from llava.model import LoadedModel, save_model
from llava.tokenization import ImageTokens, encode_conversation
from llava.train.arguments import Arguments, LlavaTrainingArguments
from llava.train.data.collator import Collator
from llava.train.data.dataset import LlavaDataset, PackedDataset, Report, distinct_images
from llava.train.data.feature_cache import FeatureCache, build_feature_cache, fingerprint
from llava.train.data.image_source import ImageSource
from llava.train.data.kept_files import kept_path
from llava.train.data.record_store import RecordStore
from llava.train.data.shared_images import groups_of_one_image
from llava.train.lora import add_adapters, save_adapter
from llava.train.output.projector_file import FILE_NAME as PROJECTOR_FILE
from llava.train.output.projector_file import save_projector
from llava.train.prepare_model import padding_id, start_end_ids
from llava.train.progress import LogInterval, ProgressBar, flops_per_token, memory_mb, peak_tflops
from llava.train.step import gpu
from llava.train.step.liger import use_liger_kernels
from llava.train.step.packing import fill_batches, training_attention
from llava.train.step.processes import of_all_processes
from llava.train.trainer import LlavaTrainer
from llava.train.validation.flags import metric_name
from llava.train.validation.held_out import EarlyStopping, Validation

logger = logging.getLogger(__name__)


def start_processes(training: LlavaTrainingArguments) -> None:
    """What has to happen before a model is loaded: DeepSpeed's ZeRO-3 shards weights as they are made."""
    if training.deepspeed and training.world_size > 1 and not torch.distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if training.use_cpu else None)


def build_dataset(
    arguments: Arguments, loaded: LoadedModel, store: RecordStore
) -> tuple[LlavaDataset, FeatureCache | None]:
    """The samples, tokenised as the model's config says, and the features of their images if asked for."""
    data, training = arguments.data, arguments.training
    model, tokenizer, processor = loaded.model, loaded.tokenizer, loaded.image_processor
    template = get_template(model.config.conversation_template)
    image_tokens = ImageTokens.from_config(model.config, tokenizer)
    images = ImageSource(data.image_folder, Path(training.output_dir))
    patches, side = model.num_patches, model.get_vision_tower().image_size

    def encode(record, features):
        return encode_conversation(record, template, tokenizer, image_tokens, features_per_image=features)

    aspect_ratio, grid = model.config.image_aspect_ratio, model.config.image_grid_pinpoints
    if data.jpeg_draft and aspect_ratio == "anyres":
        raise LlavaError("--jpeg_draft: tiles (--image_aspect_ratio anyres) are cut from the whole image; leave it out")
    draft = draft_size(processor) if data.jpeg_draft else None

    def load_image(source: Any) -> np.ndarray:
        pixels = processor([open_image(source, draft=draft)], aspect_ratio=aspect_ratio, grid_pinpoints=grid)
        if aspect_ratio == "keep":
            height, width = pixels[0].shape[1:]
            if (height, width) != (side, side):
                raise LlavaError(
                    f"--image_aspect_ratio keep makes it {width} × {height}, and the vision tower takes "
                    f"{side} × {side}; train with square or pad"
                )
            return pixels[0][None]
        return pixels[0] if aspect_ratio == "anyres" else np.asarray(pixels)

    def count_features(image) -> int:
        if aspect_ratio != "anyres":
            return patches
        # How many tiles there are depends on the image's size.
        return patches * processor.count_tiles(*image_size(images.read(image)), grid)

    dataset = LlavaDataset(
        store,
        encode,
        images,
        load_image,
        count_features=count_features,
        max_length=training.model_max_length,
        lazy=data.lazy_preprocess,
        skip_unreadable=data.skip_unreadable_images,
        lengths_path=_lengths_path(arguments, loaded, store, image_tokens),
        show_progress=not training.disable_tqdm and training.should_save,
    )
    cache = _cache_features(arguments, loaded, dataset) if data.cache_vision_features else None
    if cache is not None:
        dataset.feature_row = cache.row
    _tell(dataset)
    return dataset, cache


def build_trainer(
    arguments: Arguments,
    loaded: LoadedModel,
    dataset: LlavaDataset,
    cache: FeatureCache | None,
    validation: Validation | None = None,
    trainer_class: type[LlavaTrainer] | None = None,
) -> LlavaTrainer:
    """The trainer (of `trainer_class`, LlavaTrainer by default), its callbacks, and how it writes the model."""
    data, training = arguments.data, arguments.training
    model, tokenizer, processor = loaded.model, loaded.tokenizer, loaded.image_processor
    config = model.config
    adapted = add_adapters(model, arguments) if training.lora_enable else None
    trained = model if adapted is None else adapted
    if training.liger and not gpu.is_described():
        use_liger_kernels(model)

    def write_model(folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        if adapted is not None:
            save_adapter(adapted, folder, state_dict)
            tokenizer.save_pretrained(folder)
            processor.save_pretrained(folder)
        else:
            save_model(folder, model, tokenizer, processor, state_dict=state_dict)
        if arguments.model.tune_mm_mlp_adapter:
            state = trained.state_dict() if state_dict is None else state_dict
            save_projector(folder / PROJECTOR_FILE, state, start_end_ids(model, tokenizer))

    train_dataset: Any = dataset
    if data.max_tokens_per_batch:
        units, lengths = groups_of_one_image(dataset, data.questions_per_image, training.seed)
        batches = fill_batches(lengths, data.max_tokens_per_batch, training.seed)
        groups = [[number for unit in batch for number in units[unit]] for batch in batches]
        train_dataset = PackedDataset(dataset, groups)
    if training.ddp_find_unused_parameters is None:
        # Tower and projector take part in every batch, so nothing trainable is ever unused.
        training.ddp_find_unused_parameters = False
    trainer = (trainer_class or LlavaTrainer)(
        model=trained,
        args=training,
        train_dataset=train_dataset,
        data_collator=build_collator(arguments, loaded, cache, packs=training.train_batch_size),
        write_model=write_model,
        describe=dataset.describe,
        attention=partial(training_attention, config, packed=data.packing, longest=training.model_max_length),
        validation=validation,
    )
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # another one in a notebook
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.remove_callback(PrinterCallback)
    bar = ProgressBar(
        trainer,
        flops_per_token(trained),
        peak_tflops(training.peak_tflops),
        disable=bool(training.disable_tqdm),
    )
    trainer.add_callback(bar)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())  # what it adds to the logs is for TensorBoard and wandb too
    trainer.progress = bar
    trainer.add_callback(LogInterval())
    if arguments.validation.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(arguments.validation.early_stopping_patience))
    return trainer


def draft_size(processor: ImageProcessor) -> int:
    """Pixels that the sides of a draft need: twice what the image is resized to, so that resizing still averages."""
    return 2 * (processor.size if isinstance(processor.size, int) else max(processor.size))


def build_collator(arguments: Arguments, loaded: LoadedModel, cache: FeatureCache | None, packs: int = 1) -> Collator:
    """What makes batches, as the flags say, of so many packs; `cache` holds the features of their images."""
    length = pack_length(arguments)
    return Collator(
        padding_id(loaded.tokenizer),
        packing=arguments.data.packing,
        share_images=arguments.data.questions_per_image > 1,
        pack_length=length and length * packs,
        cache=cache,
    )


def build_validation(arguments: Arguments, loaded: LoadedModel, store: RecordStore) -> Validation:
    """What measures held-out records (`store`), made into samples and batches as those to train on."""
    flags = arguments.validation
    dataset, cache = build_dataset(arguments.held_out(), loaded, store)
    answers = None
    if flags.eval_generate:
        from llava.train.validation.answers import HeldOutAnswers

        if cache is None and dataset.skip_unreadable:
            dataset.drop_unreadable()  # the engine takes no question whose image can't be read
        answers = HeldOutAnswers(loaded, dataset, flags.eval_generate, flags.eval_max_new_tokens)
        answers.require(arguments.training.metric_for_best_model)
    return Validation(
        dataset,
        build_collator(arguments, loaded, cache),
        batch_size=arguments.training.eval_batch_size,
        max_tokens=arguments.data.max_tokens_per_batch,
        answer=answers,
    )


def pack_length(arguments: Arguments) -> int | None:
    """Tokens that packed batches are filled up to: on a GPU, and where something is made and kept for each shape.

    Such are compiled layers, and bfloat16's products on the CPU (oneDNN): three of SmolLM2's left 1.7 GB behind after
    425 lengths.
    """
    training = arguments.training
    fixed = gpu.is_on_gpu(training.device) or training.compile_layers or training.bf16
    return arguments.data.max_tokens_per_batch if fixed else None


def save_final(trainer: LlavaTrainer) -> None:
    """The finished model in the output folder: written aside, moved in when whole, config.json last."""
    output_dir = Path(trainer.args.output_dir)
    staging = part_in(output_dir)
    model = staging / output_dir.absolute().name  # the name that an adapter's README has
    trainer.save_model(str(model))
    trainer.wait_for_all()
    if trainer.args.should_save:
        publish_files(model, output_dir, last="config.json", stale=WEIGHTS)
        staging.rmdir()
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
    trainer.wait_for_all()


def summarise(
    arguments: Arguments, trainer: LlavaTrainer, dataset: LlavaDataset, checkpoint: Path | None, seconds: float
) -> dict[str, Any]:
    """What `training_summary.json` says of the run itself."""
    training, report = trainer.args, trainer.report
    report.add(dataset.report)
    for other in of_all_processes(report):
        report.add(other)
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = list(model.parameters())
    rate = trainer.progress.tokens_per_second(training.world_size)
    peak = peak_tflops(training.peak_tflops)
    return {
        "output_dir": str(training.output_dir),
        "base": arguments.model.model_name_or_path,
        "resumed_from": str(checkpoint) if checkpoint else None,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "samples": len(dataset),
        "samples_seen": trainer.samples_seen * training.world_size,
        "tokens_seen": trainer.tokens_seen * training.world_size,
        "tokens_per_second": round(rate, 1),
        "data_wait": round(trainer.progress.data_wait(), 4),
        "mfu": round(rate * flops_per_token(model) / (peak * 1e12 * training.world_size), 4) if peak else None,
        "seconds": round(seconds, 1),
        "peak_memory_mb": round(memory_mb(), 1),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "processes": training.world_size,
        "samples_per_step": training.train_batch_size * training.world_size * training.gradient_accumulation_steps,
        **_cut(dataset, report),
        "loss_normalisation": training.loss_normalisation,
        "validation": _validated(trainer),
        "conversation_template": model.config.conversation_template,
    }


def _validated(trainer: LlavaTrainer) -> dict[str, Any] | None:
    """What is to be said of the held-out records, but for what was measured."""
    validation = trainer.validation
    if validation is None:
        return None
    report = validation.report
    report.add(validation.dataset.report)
    for other in of_all_processes(report):
        report.add(other)
    return {
        "data_path": str(validation.dataset.store.path),
        "samples": len(validation.dataset),
        "seconds": round(validation.seconds, 1),
        "metric": metric_name(trainer.args) if trainer.args.metric_for_best_model else None,
        "best_step": trainer.state.best_global_step,
        "best_was_loaded": bool(trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint),
        **_cut(validation.dataset, report),
    }


def _lengths_path(arguments: Arguments, loaded: LoadedModel, store: RecordStore, image_tokens: ImageTokens) -> Path:
    config = loaded.model.config
    settings = {
        "vocabulary": sorted(loaded.tokenizer.get_vocab().items(), key=lambda item: item[1]),
        "template": config.conversation_template,
        "image_tokens": image_tokens,
        "patches": loaded.model.num_patches,
        "aspect_ratio": config.image_aspect_ratio,
        "pinpoints": config.image_grid_pinpoints,
        "max_length": arguments.training.model_max_length,
    }
    return kept_path(store.path, Path(arguments.training.output_dir), "lengths.npy", settings)


def _cache_features(arguments, loaded: LoadedModel, dataset: LlavaDataset) -> FeatureCache | None:
    """The features of all images of the data, None where there are none."""
    data, training = arguments.data, arguments.training
    tower = loaded.model.get_vision_tower()
    settings = {
        "layer": loaded.model.config.mm_vision_select_layer,
        "feature": loaded.model.config.mm_vision_select_feature,
        "processor": repr(loaded.image_processor),
        "aspect_ratio": loaded.model.config.image_aspect_ratio,
        "dtype": "bfloat16" if training.bf16 else "float32",
    }
    if data.jpeg_draft:
        settings["draft"] = draft_size(loaded.image_processor)
    root = expanded(data.vision_cache_dir or Path(training.output_dir) / "vision_cache")

    def identify(number: int, image) -> str:
        with dataset.record_errors(number):
            return dataset.image_source.identify(image)

    def load(number: int, image) -> np.ndarray:
        with dataset.record_errors(number):
            return dataset.load_image(dataset.image_source.read(image))

    if dataset.skip_unreadable:
        dataset.drop_unreadable()
    images = distinct_images(dataset)
    if not images:
        return None
    tower.to(training.device)
    return build_feature_cache(
        root / fingerprint(tower, **settings),
        images,
        identify,
        load,
        tower,
        bfloat16=training.bf16,
        show_progress=dataset.show_progress,
    )


def _tell(dataset: LlavaDataset) -> None:
    """Say what was cut or left out, with the first names."""
    texts = {
        "truncated": "were cut to --model_max_length",
        "targetless": "have no target (nothing to learn from)",
        "dropped_turns": "begin with an answer, which was left out",
        "skipped": "were left out: image missing or unreadable",
    }
    for name, text in texts.items():
        numbers = sorted(getattr(dataset.report, name))
        if numbers:
            some = ", ".join(dataset.describe(number) for number in numbers[:3])
            logger.warning("%d of %d records %s: %s%s", len(numbers), len(dataset.store), text, some,
                           " …" if len(numbers) > 3 else "")  # fmt: skip


def _cut(dataset: LlavaDataset, report: Report) -> dict[str, dict[str, Any]]:
    """What of the samples was cut or left out: how many, and the first of them by name."""
    found = {
        "truncated": report.truncated,
        "without_target": report.targetless,
        "answers_without_question": report.dropped_turns,
        "left_out": report.skipped,
    }
    return {
        name: {"count": len(numbers), "first": [dataset.describe(number) for number in sorted(numbers)[:20]]}
        for name, numbers in found.items()
    }
