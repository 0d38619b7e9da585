"""Does a recipe fit the GPU? Says so before the start, from the model's shape and the training flags.

Takes the flags of a training command; nothing is loaded but the config.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError
from llava.records import read_json, write_json

GB = 1e9
CONTEXT_GB = 1.2
"""The CUDA context and the libraries' workspaces."""
FRAGMENTATION = 1.05
ACTIVATION_BYTES = 34
"""Bytes per position, layer and hidden unit that a LLaMA block keeps for its backward pass in half precision."""
LOGIT_BYTES = 3 * 128 * 2**20
"""One chunk of float32 logits, its gradient and its softmax (llava.model.loss)."""

KNOWN_SHAPES: dict[str, dict[str, int]] = {
    "llama-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32000,
                 "num_attention_heads": 32, "num_key_value_heads": 32},
    "llama-13b": {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824, "vocab_size": 32000,
                  "num_attention_heads": 40, "num_key_value_heads": 40},
    "mistral-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 32000,
                   "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
OPTIMIZER_BYTES = {"8bit": 2, "adafactor": 0.1, "sgd": 0, "lion": 4}


@dataclass(frozen=True)
class Recipe:
    """What decides the memory; names are the training flags'."""

    shape: dict[str, int]
    tower_parameters: int = 303_000_000
    tower_hidden: int = 1024
    gpus: int = 1
    per_device_train_batch_size: int = 8
    model_max_length: int = 2048
    gradient_checkpointing: bool = False
    every_n_layers: int = 1
    """With gradient_checkpointing: one layer of so many computes its activations again, the others keep them."""
    half_precision: bool = True
    tune_mm_mlp_adapter: bool = False
    lora_enable: bool = False
    lora_r: int = 64
    bits: int = 16
    optim: str = "adamw_torch_fused"
    shard: int = 0
    """0: nothing; 2: gradients and optimizer (ZeRO-2); 3: weights too (ZeRO-3, FSDP)."""
    offload: bool = False
    unfreeze_mm_vision_tower: bool = False


def parameters(shape: dict[str, int]) -> int:
    """Parameters of a language model of this shape."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    head = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    queries = shape["num_attention_heads"] * head
    keys = (shape.get("num_key_value_heads") or shape["num_attention_heads"]) * head
    block = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    matrices = 1 if shape.get("tied") else 2
    return layers * block + matrices * shape["vocab_size"] * hidden + hidden


def lora_parameters(shape: dict[str, int], rank: int) -> int:
    """Parameters of adapters of this rank on every linear layer of the blocks."""
    hidden, middle = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    queries = shape["num_attention_heads"] * head
    keys = (shape.get("num_key_value_heads") or shape["num_attention_heads"]) * head
    sides = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + middle)
    return shape["num_hidden_layers"] * rank * sides


def estimate(recipe: Recipe) -> dict[str, float]:
    """Memory of one GPU in GB by part, `total` at the end."""
    shape = recipe.shape
    base = parameters(shape)
    projector = recipe.tower_hidden * shape["hidden_size"]
    frozen_base = recipe.tune_mm_mlp_adapter or recipe.lora_enable
    trained = projector + (lora_parameters(shape, recipe.lora_r) if recipe.lora_enable else 0)
    trained += 0 if frozen_base else base
    trained += recipe.tower_parameters if recipe.unfreeze_mm_vision_tower else 0
    per_frozen = {4: 0.53, 8: 1.05}.get(recipe.bits, 2.0 if recipe.half_precision else 4.0)
    frozen = (base * per_frozen if frozen_base else 0) + (
        0 if recipe.unfreeze_mm_vision_tower else recipe.tower_parameters * 4
    )
    weights = frozen + trained * 4
    # Mixed precision keeps float32 weights and casts them: all of them at once, or a layer at a time if sharded.
    copy = trained * 2 if recipe.half_precision and not frozen_base else 0
    if recipe.shard == 3:
        weights, copy = weights / recipe.gpus, copy / shape["num_hidden_layers"] * 2
    states = trained * next((size for name, size in OPTIMIZER_BYTES.items() if name in recipe.optim), 8)
    gradients = trained * 4.0
    if recipe.shard >= 2:
        states, gradients = states / recipe.gpus, gradients / recipe.gpus
    if recipe.offload:
        states = 0
        weights = 0 if recipe.shard == 3 else weights
    tokens = recipe.per_device_train_batch_size * recipe.model_max_length
    per_layer = tokens * shape["hidden_size"] * ACTIVATION_BYTES * (1 if recipe.half_precision else 2)
    layers = shape["num_hidden_layers"]
    again = -(-layers // recipe.every_n_layers) if recipe.gradient_checkpointing else 0
    kept_inputs = tokens * shape["hidden_size"] * again * (2 if recipe.half_precision else 4)
    activations = kept_inputs + per_layer * (layers - again + bool(again))
    parts = {
        "weights": weights / GB,
        "half-precision copy": copy / GB,
        "gradients": gradients / GB,
        "optimizer": states / GB,
        "activations": activations / GB,
        "logits": LOGIT_BYTES / GB,
    }
    parts["total"] = sum(parts.values()) * FRAGMENTATION + CONTEXT_GB
    return parts


def remedies(recipe: Recipe, limit: float) -> list[tuple[str, Recipe]]:
    """Flags that make it fit, gentlest first; each line adds to those before it. Empty if nothing helps."""
    steps: list[tuple[str, dict[str, Any]]] = [
        ("--gradient_checkpointing True", {"gradient_checkpointing": True, "every_n_layers": 1}),
        ("--per_device_train_batch_size 1 (keep --global_batch_size)", {"per_device_train_batch_size": 1}),
    ]
    if recipe.gpus > 1 and recipe.shard < 3:
        steps.append(('--fsdp "full_shard auto_wrap"', {"shard": 3}))
    if not (recipe.tune_mm_mlp_adapter or recipe.lora_enable):
        steps.append(("--optim adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}))
        steps.append(("--lora_enable True", {"lora_enable": True}))
    steps.append(("--bits 4", {"bits": 4}))
    steps.append(("--model_max_length 1024", {"model_max_length": min(1024, recipe.model_max_length)}))
    applied: list[tuple[str, Recipe]] = []
    for flag, change in steps:
        changed = replace(recipe, **change)
        if changed == recipe or estimate(changed)["total"] >= estimate(recipe)["total"]:
            continue
        recipe = changed
        applied.append((flag, recipe))
        if estimate(recipe)["total"] <= limit:
            return applied
    return []


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m llava.train.estimate_memory", description=__doc__)
    parser.add_argument(
        "--model_name_or_path", required=True, help=f"model folder, or one of {', '.join(KNOWN_SHAPES)}"
    )
    parser.add_argument("--gpu-memory-gb", type=float, default=80, help="memory of one GPU")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8, help="samples at once on one GPU")
    parser.add_argument("--model_max_length", type=int, default=2048, help="longest sample in positions")
    parser.add_argument("--lora_r", type=int, default=64, help="rank of the adapters")
    parser.add_argument("--bits", type=int, default=16, choices=(4, 8, 16), help="of the frozen language model")
    parser.add_argument("--optim", default="adamw_torch_fused", help="the Trainer's name of the optimizer")
    parser.add_argument("--fsdp", default="", help="as in the training command")
    parser.add_argument("--deepspeed", help="DeepSpeed's configuration file")
    parser.add_argument("--json", help="also write the parts to this file")
    for flag in ("--gradient_checkpointing", "--tune_mm_mlp_adapter", "--lora_enable", "--unfreeze_mm_vision_tower"):
        parser.add_bool(flag, help="as in the training command")
    parser.add_argument("--gradient_checkpointing_kwargs", help="as in the training command")
    parser.add_bool("--bf16", default=False, help="as in the training command")
    parser.add_bool("--fp16", default=False, help="as in the training command")
    return parser


def recipe_of(args) -> Recipe:
    """The recipe that parsed flags describe."""
    shard, offload = 0, "offload" in args.fsdp
    if args.fsdp and args.fsdp.lower() not in {"false", "none"}:
        shard = 2 if "shard_grad_op" in args.fsdp else 3
    if args.deepspeed:
        zero = read_json(args.deepspeed).get("zero_optimization", {})
        shard, offload = zero.get("stage", 0), "offload_optimizer" in zero
    return Recipe(
        shape=_shape(args.model_name_or_path),
        gpus=args.gpus,
        per_device_train_batch_size=args.per_device_train_batch_size,
        model_max_length=args.model_max_length,
        gradient_checkpointing=args.gradient_checkpointing,
        every_n_layers=_every_n_layers(args.gradient_checkpointing_kwargs),
        half_precision=args.bf16 or args.fp16,
        tune_mm_mlp_adapter=args.tune_mm_mlp_adapter,
        lora_enable=args.lora_enable,
        lora_r=args.lora_r,
        bits=args.bits,
        optim=args.optim,
        shard=shard,
        offload=offload,
        unfreeze_mm_vision_tower=args.unfreeze_mm_vision_tower,
    )


def _every_n_layers(text: str | None) -> int:
    try:
        value = json.loads(text or "{}").get("every_n_layers", 1)
        number = int(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise LlavaError(f"--gradient_checkpointing_kwargs {text}: expected a JSON object") from error
    if number < 1:
        raise LlavaError(f"--gradient_checkpointing_kwargs: every_n_layers is {number}; expected at least 1")
    return number


def main(argv: list[str] | None = None) -> int:
    args, rest = build_parser().parse_known_args(argv)
    if rest:
        _check_training_flags(rest)
    recipe = recipe_of(args)
    parts = estimate(recipe)
    for name, size in parts.items():
        write_line(f"{name:22}{size:8.1f} GB")
    if args.json:
        write_json(args.json, {f"{name.replace(' ', '_')}_gb": size for name, size in parts.items()})
    if parts["total"] <= args.gpu_memory_gb:
        write_line(f"fits: {args.gpu_memory_gb:g} GB on each of {recipe.gpus} GPU(s)")
        return 0
    write_line(f"does not fit {args.gpu_memory_gb:g} GB; an estimate, every part of it rounded up a little")
    changes = remedies(recipe, args.gpu_memory_gb)
    if not changes:
        write_line(
            "no flag of these helps: take more or larger GPUs, or DeepSpeed with offload (scripts/zero3_offload.json)"
        )
    for flag, changed in changes:
        write_line(f"  {flag:60}→ {estimate(changed)['total']:6.1f} GB")
    return 1


def _shape(name: str) -> dict[str, int]:
    if name in KNOWN_SHAPES:
        return KNOWN_SHAPES[name]
    path = Path(name) / "config.json"
    if not path.is_file():
        raise LlavaError(f"--model_name_or_path {name}: no config.json there, and none of {', '.join(KNOWN_SHAPES)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {key: config[key] for key in KNOWN_SHAPES["llama-7b"] if key != "num_key_value_heads"} | {
            "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "head_dim": config.get("head_dim") or 0,
            "tied": int(bool(config.get("tie_word_embeddings"))),
        }
    except (ValueError, KeyError, RecursionError) as error:
        raise LlavaError(f"{path}: not a language model's config ({error})") from error


def _check_training_flags(rest: list[str]) -> None:
    """Flags of a training command that don't matter here are fine; what is no flag of one is refused."""
    from llava.train.arguments import boolean_flags
    from llava.train.arguments import build_parser as training_parser
    from llava.train.legacy_flags import translate_flags

    argv, _ = translate_flags(rest, boolean_flags(), has_gpu=True)
    _, unknown = training_parser().parse_known_args(argv)
    if unknown:
        raise LlavaError(f"unknown argument {unknown[0]!r}; see --help")


if __name__ == "__main__":
    run(main)
