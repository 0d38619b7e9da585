"""What `model_vqa`, `model_vqa_med` and `run_med_datasets_eval_batch` share: flags, and flags to answers."""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.commandline import ArgumentParser, check_outputs, existing_dir, existing_file
from llava.errors import LlavaError
from llava.image_options import add_image_flags, image_options_from_args
from llava.sampling_params import add_sampling_flags, sampling_from_args


def add_answer_flags(parser: ArgumentParser) -> None:
    """The flags of every command that answers questions."""
    parser.add_argument("--model-path", "--model-name", help="checkpoint: a folder or a hub id")
    parser.add_argument("--model-base", help="base model of a LoRA or projector checkpoint")
    parser.add_argument("--mm-projector", help="projector file over the language model --model-path")
    parser.add_argument("--vision-tower", help="vision tower's folder or hub id in place of the checkpoint's")
    parser.add_argument("--image-folder", default="", help="where the questions' images lie")
    parser.add_argument("--question-file", required=True, help="questions: JSON, JSONL or Parquet")
    parser.add_argument("--answers-file", default="answer.jsonl", help="where answers go, a line each")
    parser.add_argument("--conv-mode", help="prompt template (default: the checkpoint's own)")
    parser.add_argument("--num-chunks", type=int, default=1, help="parts of the questions")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="answer part I (from 0) of N, next to --answers-file; the last part to be done joins all of them there "
        "(default: torchrun's RANK and WORLD_SIZE, where it started the command)",
    )
    # The seed is that of --ablate-image too; top_p stays null in the manifest unless it is given.
    add_sampling_flags(parser, seed=0, top_p=None)
    parser.add_argument("--batch-size", type=int, default=32, help="answers generated side by side")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the best there is)")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16")
    parser.add_bool("--load-8bit", help="quantize to 8 bits while loading")
    parser.add_bool("--load-4bit", help="quantize to 4 bits while loading")
    parser.add_argument(
        "--ablate-image",
        choices=("none", "blank", "noise", "shuffle"),
        default="none",
        help="ask with the images as they are, grey, of noise, or of another question",
    )
    parser.add_bool("--answer-prompter", help="ask a second time for the answer alone")
    parser.add_bool("--yes-no-probabilities", help="write the probability of yes for closed questions too")
    parser.add_bool("--option-likelihoods", help="write how likely each option of a multiple-choice question is too")
    parser.add_overwrite()
    add_image_flags(parser)


def add_api_answer_flags(parser: ArgumentParser) -> None:
    """The flags that let a remote server answer."""
    from llava.openai_api import add_api_flags

    add_api_flags(parser)


def check_flags(args: Namespace) -> None:
    """Values that can't be are errors before anything is read."""
    remote = bool(getattr(args, "api_base", None) or getattr(args, "azure_endpoint", None))
    if not remote and not args.model_path:
        raise LlavaError("give --model-path (a checkpoint), or --api-base and --api-model (a server)")
    limits = {
        "--batch-size": (args.batch_size, 1),
        "--num-chunks": (args.num_chunks, 1),
    }
    for flag, (value, least) in limits.items():
        if value < least:
            raise LlavaError(f"{flag} is {value}; give {least} or more")
    check_outputs(args, [args.question_file], "answers_file")
    sampling_from_args(args)
    image_options_from_args(args)
    if args.load_8bit and args.load_4bit:
        raise LlavaError("--load-8bit and --load-4bit exclude each other")
    if remote and (args.yes_no_probabilities or args.option_likelihoods or args.answer_prompter):
        raise LlavaError(
            "--yes-no-probabilities, --option-likelihoods and --answer-prompter need a checkpoint on this machine"
        )
    if not remote:
        from llava.model.weights.locate import locate_model

        locate_model(args.model_path)  # before torch is imported, which takes seconds


def answer_file(
    args: Namespace, questions: Sequence[Any], everything: Sequence[Any], whole: Path | None = None
) -> dict[str, Any]:
    """Answer `questions` (a part of `everything`) as the flags say; returns the manifest.

    Templates and images are checked before a model is loaded. `whole`: what this is a part of.
    """
    from llava.conversation import get_template
    from llava.eval.answers.ablation import QuestionImages
    from llava.eval.answers.answering import answer_questions, question_settings
    from llava.eval.answers.checkpoint_facts import checkpoint_facts
    from llava.eval.answers.manifest import decoding_entry

    if args.conv_mode:
        get_template(args.conv_mode)
    if args.image_folder:
        existing_dir(args.image_folder, "--image-folder")
    shown = image_options_from_args(args)
    images = QuestionImages(args.image_folder, everything, args.ablate_image, args.seed, shown)
    sampling = sampling_from_args(args)
    settings = question_settings(
        args.question_file,
        questions,
        chunk=[args.chunk_idx, args.num_chunks],
        image_folder=str(args.image_folder),
        ablate_image=args.ablate_image,
        decoding=decoding_entry(sampling),
        # Only where it is asked for, as `option_likelihoods` below.
        **({"image_options": shown.as_dict()} if shown else {}),
    )
    if getattr(args, "api_base", None) or getattr(args, "azure_endpoint", None):
        from llava.eval.answers.remote import RemoteAnswers
        from llava.openai_api import print_dry_run, settings_from_args

        api = settings_from_args(args)
        if args.dry_run:
            remote = RemoteAnswers(api, images, sampling)
            print_dry_run([remote.job(question) for question in questions], api)
            return {}
        settings |= {"checkpoint": api.model, "served_by": api.base_url or api.azure_endpoint}
        return answer_questions(
            questions,
            args.answers_file,
            settings,
            RemoteAnswers(api, images, sampling),
            overwrite=args.overwrite,
            whole=whole,
        )
    from llava.eval.answers.local import LocalAnswers

    model = local_model(args)
    settings |= {
        "checkpoint": model.path,
        "model_base": model.base,
        **checkpoint_facts(model.path),
        **_digests(model_base=model.base, vision_tower=args.vision_tower),
        "conv_mode": args.conv_mode,
        "quantized": 8 * args.load_8bit + 4 * args.load_4bit,
        "vision_tower": args.vision_tower,
        "dtype_asked": args.dtype,
        "batch_size": args.batch_size,
        "answer_prompter": args.answer_prompter,
        "yes_no_probabilities": args.yes_no_probabilities,
        # Only where it is asked for: files that were answered before there was the flag stay as they are.
        **({"option_likelihoods": True} if args.option_likelihoods else {}),
    }
    fill = LocalAnswers(
        model,
        images,
        sampling,
        batch_size=args.batch_size,
        answer_prompter=args.answer_prompter,
        yes_no_probabilities=args.yes_no_probabilities,
        option_likelihoods=args.option_likelihoods,
    )
    return answer_questions(questions, args.answers_file, settings, fill, overwrite=args.overwrite, whole=whole)


def _digests(**folders: str | None) -> dict[str, str]:
    """`<name>_digest` of each folder given beside the checkpoint: at its path another model may lie tomorrow."""
    from llava.eval.answers.checkpoint_facts import checkpoint_facts

    found = {f"{name}_digest": checkpoint_facts(path)["checkpoint_digest"] for name, path in folders.items() if path}
    return {name: digest for name, digest in found.items() if digest}


def local_model(args: Namespace):
    """The checkpoint that the flags mean; v1.0's --mm-projector names a projector over --model-name."""
    from llava.eval.answers.local import LocalModel
    from llava.model.checkpoint.layouts import PROJECTOR_FILES

    path, base = args.model_path, args.model_base
    if args.mm_projector:
        if base:
            raise LlavaError("--mm-projector and --model-base exclude each other")
        file = existing_file(args.mm_projector, "--mm-projector")
        if file.name not in PROJECTOR_FILES:
            raise LlavaError(
                f"--mm-projector {file}: name it {' or '.join(PROJECTOR_FILES)}, with config.json next to it"
            )
        path, base = str(file.parent), path
    return LocalModel(
        path=str(path),
        base=base,
        vision_tower=args.vision_tower,
        template=args.conv_mode,
        device=args.device or _own_gpu(),
        dtype=args.dtype,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
    )


def _own_gpu() -> str | None:
    """The GPU of a process that torchrun started beside others on this machine."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1:
        return None
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{int(rank) % gpus}" if gpus else None


def run_answer_command(args: Namespace, read_questions) -> Path:
    """Read, take this process's part, answer; returns the answer file.

    With `--shard` (or torchrun's ranks) the part stands under a name of its own until the last one is done.
    """
    from llava.eval.answers.questions import chunk_of
    from llava.eval.answers.shards import join_when_complete, shard_of

    check_flags(args)
    whole = Path(args.answers_file)
    shard = shard_of(args) if args.num_chunks == 1 or args.shard else None
    if shard is not None:
        if args.num_chunks != 1:
            raise LlavaError("--shard and --num-chunks exclude each other; give one of them")
        args.chunk_idx, args.num_chunks = shard.index, shard.count
        args.answers_file = shard.path(whole)
    everything = read_questions(existing_file(args.question_file, "--question-file"))
    part = chunk_of(everything, args.num_chunks, args.chunk_idx)
    manifest = answer_file(args, part, everything, None if shard is None else whole)
    if shard is None or not manifest:
        return whole
    is_whole = join_when_complete(whole, shard.count, [one.id for one in everything], manifest["run"])
    return whole if is_whole else Path(args.answers_file)
