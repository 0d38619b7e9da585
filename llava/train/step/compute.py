"""In which precision a run computes, and the one path that all runs in half precision on GPUs take.

Weights are kept in float32, computed with in bfloat16 (or float16), and gradients are reduced and summed in float32:
FSDP 2's mixed-precision policy. A single GPU takes it too, as a group of one process, so that nothing is cast
operation by operation (autocast) and the residual stream is in half precision. With `--master_weights False` the
weights themselves are in bfloat16, and one GPU needs no group.
"""

import atexit
import json
import logging
import os
import sys
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed
from torch import nn

from llava.model.families import decoder_layers
from llava.train.step import gpu
from llava.train.step.optimizers import takes_plain_tensors

logger = logging.getLogger(__name__)

HEAD = "LanguageHead"
"""Sharded as a unit of its own: all chunks of a loss are one call of it."""


def flags_of_the_path(flags: Namespace, processes: int) -> list[str]:
    """The flags to add to a command line on GPUs (`flags`: as parsed, not yet checked) so that it takes the path.

    Left alone: float32 runs, DeepSpeed, `--fsdp` as given, 4- and 8-bit weights, whose kernels choose their own
    precision, and optimizers that take plain tensors on several GPUs.
    """
    half = flags.bf16 or flags.fp16
    if flags.use_cpu or not half or flags.deepspeed or flags.bits < 16 or _is_set(flags.fsdp):
        return []
    if processes == 1 and flags.master_weights is False:
        return []
    if processes > 1 and takes_plain_tensors(flags.optim):
        logger.warning(
            "--optim %s can't be sharded: every GPU holds all weights and moments, and casts at each operation; "
            "--optim adamw_torch_8bit can",
            flags.optim,
        )
        return []
    if processes > 1:
        logger.warning(
            "training in half precision on %d GPUs: gradients and optimizer states are sharded (FSDP 2); "
            'add --fsdp "full_shard auto_wrap" to shard the weights too',
            processes,
        )
    # One GPU gathers nothing: making a layer's half-precision weights anew takes less than keeping them all.
    return ["--fsdp", "True", "--fsdp_config", json.dumps({"reshard_after_forward": processes == 1})]


def half_precision_of(flags: Namespace) -> list[str]:
    """`--bf16` on a GPU without bfloat16 means float16: the flags to add."""
    if not flags.bf16 or flags.use_cpu or not gpu.has_gpu() or gpu.has_bf16():
        return []
    logger.warning("--bf16: %s has no bfloat16; training in float16 (--fp16)", gpu.name())
    return ["--bf16", "False", "--fp16", "True"]


def join_group_of_one(flags: Namespace) -> None:
    """Make this process a group of its own where `--fsdp` is used without torchrun, as torchrun would."""
    if flags.use_cpu or not _is_set(flags.fsdp) or "LOCAL_RANK" in os.environ:
        return
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    if sys.platform == "linux":  # no network is needed, and a machine may have none
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if torch.distributed.is_initialized():
        return
    if gpu.is_described():
        torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=0, world_size=1)
    else:
        torch.cuda.set_device(0)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        atexit.register(torch.distributed.destroy_process_group)


def set_policy(accelerator, *, is_tied: bool) -> None:
    """Give an accelerator that shards with FSDP 2 this project's precision and units.

    The head is a unit of its own, unless its weight is the embedding's (`is_tied`): one weight can't be in two units.
    Compute in half precision (or in the weights' own), reduce in float32, outputs (the loss) as they are; accelerate's
    own policy reduces in half precision and rounds the loss.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    names = plugin.transformer_cls_names_to_wrap
    if names is not None and HEAD not in names and not is_tied:
        plugin.transformer_cls_names_to_wrap = [*names, HEAD]


def compile_layers(model: nn.Module, **options) -> None:
    """Compile each decoder layer by itself; `options` are torch.compile's.

    What is around a layer (gathering its weights, computing it again) stays outside, so a layer is one graph, and all
    layers share it. The layers get a subclass of their class, of the same name, as FSDP 2 does.
    """
    compiled: dict[type[nn.Module], type] = {}
    for layer in decoder_layers(model):
        own = type(layer)
        if own not in compiled:
            compiled[own] = _compiled_class(own, options)
        layer.__class__ = compiled[own]


def activation_budget(share: float | None) -> AbstractContextManager:
    """Within, layers that are compiled keep this share of their activations (None: as torch has it, 1).

    torch's partitioner computes again what costs least for its memory, so matrix products and attention come last.
    """
    from torch._functorch import config

    return nullcontext() if share is None else config.patch(activation_memory_budget=share)


def _compiled_class(layer_class: type[nn.Module], options: dict[str, Any]) -> type:
    forward = gpu.compiler()(layer_class.forward, **options)

    def compiled_forward(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return type(layer_class.__name__, (layer_class,), {"forward": compiled_forward})


def _is_set(fsdp) -> bool:
    text = " ".join(fsdp) if isinstance(fsdp, list) else str(fsdp or "")
    return text.strip().lower() not in {"", "false", "none"}
