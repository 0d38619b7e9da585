"""Flags as the published scripts write them → flags of the present Trainer.

Spelling (`--a-b` is `--a_b`), booleans that stand alone, and names that the Trainer has dropped: each of the
latter is translated or ignored with one warning that says what happened. Nothing here needs torch.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from llava.commandline import TRUE_WORDS
from llava.errors import LlavaError

IGNORED = {
    "save_safetensors": "weights are always written as safetensors",
    "half_precision_backend": "PyTorch's own mixed precision is the only one left",
    "fp16_backend": "PyTorch's own mixed precision is the only one left",
    "fp16_opt_level": "it belonged to apex, which is gone",
    "logging_dir": "TensorBoard writes to the folder that TENSORBOARD_LOGGING_DIR names, or to <output_dir>/runs",
    "sharded_ddp": "use --fsdp",
    "use_ipex": "it is gone from the Trainer",
    "jit_mode_eval": "it is gone from the Trainer",
    "force_fsdp": "--fsdp says what is wanted",
    "trust_remote_code": "no code of a checkpoint is ever run",
    "is_multimodal": "images are used where a record has them",
}
"""Flags that can no longer mean anything: name → what holds instead."""

FSDP_WORDS = {"full_shard", "shard_grad_op", "auto_wrap", "offload"}
"""Of `--fsdp`, that have a meaning in FSDP 2."""


def translate_flags(
    argv: list[str],
    booleans: Collection[str],
    *,
    has_gpu: bool,
    keep_fsdp: bool = False,
) -> tuple[list[str], list[str]]:
    """Rewrite a command line for the present Trainer.

    Args:
        argv: the arguments as typed, without the program's name.
        booleans: names of the flags that hold True or False.
        has_gpu: without one, `--bf16` implies `--use_cpu`, and what only a GPU can do is ignored and said.
        keep_fsdp: keep `--fsdp` although there is no GPU.

    Returns:
        the new arguments and the warnings, one for each flag that was changed.

    Raises:
        LlavaError: a value that can't be translated.
    """
    flags = split_flags(argv)
    if flags.get("debug") == []:
        flags.pop("debug")  # ours, for tracebacks; the Trainer's --debug has a value
    warnings: list[str] = []
    _drop_ignored(flags, warnings)
    _rename(flags, warnings, booleans)
    _warmup(flags, warnings)
    _group_by_length(flags, warnings)
    _fsdp(flags, warnings, has_gpu or keep_fsdp)
    if not has_gpu:
        _without_gpu(flags, warnings)
    out: list[str] = []
    for name, values in flags.items():
        if name == "":
            out.extend(values)
            continue
        if not values and (name in booleans or name == "resume_from_checkpoint"):
            values = ["True"]
        out.extend([f"--{name}", *values])
    return out, warnings


def split_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """{flag with underscores: its values}; a flag given twice keeps its last place and value."""
    flags: dict[str, list[str]] = {}
    values = flags.setdefault("", [])
    for arg in argv:
        if arg.startswith("--") and len(arg) > 2:
            name, equals, value = arg[2:].partition("=")
            name = name.replace("-", "_")
            flags.pop(name, None)
            values = flags.setdefault(name, [])
            if equals:
                values.append(value)
        else:
            values.append(arg)
    return flags


def _drop_ignored(flags: dict, warnings: list[str]) -> None:
    for name, reason in IGNORED.items():
        if name in flags:
            flags.pop(name)
            # --is_multimodal True is what always happens: nothing to tell.
            if name != "is_multimodal":
                warnings.append(f"--{name} is ignored: {reason}")


def _rename(flags: dict, warnings: list[str], booleans: Collection[str]) -> None:
    if "evaluation_strategy" in flags:
        flags["eval_strategy"] = flags.pop("evaluation_strategy")
        warnings.append("--evaluation_strategy is now --eval_strategy; translated")
    if "no_cuda" in flags:
        flags["use_cpu"] = flags.pop("no_cuda")
        warnings.append("--no_cuda is now --use_cpu; translated")
    if "adafactor" in flags:
        if is_true(flags.pop("adafactor")):
            flags["optim"] = ["adafactor"]
        warnings.append("--adafactor is now --optim adafactor; translated")
    # One flag under two names: transformers renamed it, and tells by its own flags which it knows.
    old, new = "gradient_checkpointing", "activation_checkpointing"
    if new not in booleans:
        old, new = new, old
    for end in ("", "_kwargs"):
        if old + end in flags:
            flags.setdefault(new + end, flags[old + end])
            flags.pop(old + end)


def _warmup(flags: dict, warnings: list[str]) -> None:
    if "warmup_ratio" not in flags:
        return
    text = " ".join(flags.pop("warmup_ratio"))
    try:
        ratio = float(text)
    except ValueError as error:
        raise LlavaError(f"--warmup_ratio {text}: expected a number from 0 to below 1") from error
    if not 0 <= ratio < 1:
        raise LlavaError(f"--warmup_ratio {text}: expected a number from 0 to below 1")
    if "warmup_steps" in flags:
        warnings.append("--warmup_ratio is ignored: --warmup_steps is given too and counts")
        return
    flags["warmup_steps"] = [text]
    warnings.append(f"--warmup_ratio is now --warmup_steps (below 1: a share of all steps); using {text}")


def _group_by_length(flags: dict, warnings: list[str]) -> None:
    if "group_by_length" not in flags:
        return
    if is_true(flags.pop("group_by_length")):
        flags["train_sampling_strategy"] = ["group_by_length"]
    warnings.append("--group_by_length is now --train_sampling_strategy group_by_length; translated")


def _fsdp(flags: dict, warnings: list[str], possible: bool) -> None:
    """The published `--fsdp "full_shard auto_wrap"` means FSDP 2 from now on (`fsdp_config` version 1: FSDP 1)."""
    names = ("fsdp", "fsdp_config", "fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params")
    given = [name for name in names if name in flags]
    if not given:
        return
    kind = " ".join(flags.get("fsdp", [])).strip()
    wanted = kind.lower() not in {"", "false", "none"}
    if wanted and kind.lower() != "true" and not set(kind.split()) <= FSDP_WORDS:
        raise LlavaError(f'--fsdp "{kind}": expected True, or words of: {", ".join(sorted(FSDP_WORDS))}')
    if not possible:
        for name in given:
            flags.pop(name)
        warnings.append(
            f"{', '.join('--' + name for name in given)} ignored: sharding needs GPUs; "
            "without one the processes train together unsharded (DDP)"
        )
        return
    config = _json(flags.pop("fsdp_config", []), "--fsdp_config")
    config = {key.removeprefix("fsdp_"): value for key, value in config.items()}
    if "fsdp_transformer_layer_cls_to_wrap" in flags:
        layers = flags.pop("fsdp_transformer_layer_cls_to_wrap")
        config["transformer_layer_cls_to_wrap"] = layers
        warnings.append(
            f"--fsdp_transformer_layer_cls_to_wrap is now a key of --fsdp_config; translated ({', '.join(layers)})"
        )
    if "fsdp_min_num_params" in flags:
        text = " ".join(flags.pop("fsdp_min_num_params"))
        if not text.isdecimal():
            raise LlavaError(f"--fsdp_min_num_params {text}: expected a whole number from 0")
        config["min_num_params"] = int(text)
        config["auto_wrap_policy"] = "SIZE_BASED_WRAP"
        warnings.append("--fsdp_min_num_params is now a key of --fsdp_config; translated")
    if not wanted:
        flags.pop("fsdp", None)
        return
    if kind.lower() != "true":
        if "offload" in kind:
            config.setdefault("cpu_offload", True)
        if "shard_grad_op" in kind:
            config.setdefault("reshard_after_forward", False)
        warnings.append(f'--fsdp "{kind}" now means FSDP 2 (per-parameter sharding of each layer); translated')
    flags["fsdp"] = ["True"]
    flags["fsdp_config"] = [json.dumps(config)]


def _without_gpu(flags: dict, warnings: list[str]) -> None:
    if not is_true(flags.get("use_cpu", ["False"])):
        flags["use_cpu"] = ["True"]
        if is_true(flags.get("bf16", ["False"])):
            warnings.append("--bf16 without a GPU: training on the CPU (--use_cpu) with bfloat16 autocast")
    if "tf32" in flags and is_true(flags.pop("tf32")):
        warnings.append("--tf32 is ignored: it is a number format of NVIDIA GPUs, and there is none")
    if is_true(flags.get("fp16", ["False"])):
        flags.pop("fp16")
        warnings.append("--fp16 is ignored: half precision needs a GPU; training in float32 on the CPU")


def is_true(values: list[str]) -> bool:
    """What a boolean flag's values say; a flag that stands alone is True."""
    return not values or values[0].strip().lower() in TRUE_WORDS


def _json(values: list[str], flag: str) -> dict:
    """A JSON object given as text or as a file's name."""
    text = " ".join(values).strip()
    if not text:
        return {}
    try:
        if not text.startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise LlavaError(f"{flag} {' '.join(values)}: not a JSON object nor a file with one ({error})") from error
    if not isinstance(content, dict):
        raise LlavaError(f"{flag} {' '.join(values)}: not a JSON object")
    return content
