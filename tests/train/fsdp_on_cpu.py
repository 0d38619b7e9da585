"""Runs a training whose FSDP 2 is real on CPU processes (gloo), for tests.

accelerate turns FSDP on for GPUs alone; on CPUs it would silently become DDP. Here its state is told that it is on,
and at the end the run proves that parameters were shards: the last line of stdout is a JSON object.
"""

import json
import os
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

LARGE = 1000


class FsdpState(AcceleratorState):
    """AcceleratorState that takes the FSDP plugin for CPU processes too."""

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        first = "fsdp_plugin" not in self._shared_state
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if first and fsdp_plugin is not None:
            # Both states: each new AcceleratorState copies what PartialState knows.
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin


def note_gradients(seen: dict):
    """A `_clip_grad_norm` that notes the gradients' dtypes, and which share (of those not 0) bfloat16 could hold."""
    import torch

    from llava.train.trainer import LlavaTrainer

    def clip(self, model):
        parts = [parameter.grad.to_local() for parameter in model.parameters() if parameter.grad is not None]
        seen["gradient_dtypes"] = sorted({str(part.dtype) for part in parts})
        values = torch.cat([part[part != 0] for part in parts])
        seen["gradients_in_bf16"] = (values == values.bfloat16()).float().mean().item()
        return LlavaTrainer._clip_grad_norm(self, model)

    return clip


def counting(seen: dict):
    """A context that counts how often FSDP 2 casts weights to bfloat16, and how often it joins gradients.

    Weights of more than LARGE numbers are counted.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    seen |= {"casts": 0, "joined_gradients": 0}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is torch.ops.fsdp.chunk_cat.default:
                seen["joined_gradients"] += 1
            # Each weight is cast as one row.
            flat = function is torch.ops.aten._to_copy.default and args[0].dim() == 1 and args[0].numel() > LARGE
            if flat and args[0].dtype == torch.float32 and kwargs.get("dtype") == torch.bfloat16:
                seen["casts"] += 1
            return function(*args, **kwargs)

    return Counting()


def main() -> None:
    import accelerate.accelerator
    import torch
    from torch.distributed.tensor import DTensor

    accelerate.accelerator.AcceleratorState = FsdpState
    if "WORLD_SIZE" not in os.environ:  # one process without torchrun
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from llava.train import train as training
    from llava.train.setup_run import summarise

    seen = {}

    def note(arguments, trainer, *args):
        parameters = list(trainer.model.parameters())
        seen["type"] = str(trainer.accelerator.distributed_type)
        seen["parameters"] = len(parameters)
        seen["large"] = sum(parameter.numel() > LARGE for parameter in parameters)
        seen["large_trained"] = sum(one.numel() > LARGE for one in parameters if one.requires_grad)
        seen["sharded"] = sum(isinstance(parameter, DTensor) for parameter in parameters)
        seen["local"] = sum(getattr(parameter, "_local_tensor", parameter).numel() for parameter in parameters)
        seen["whole"] = sum(parameter.numel() for parameter in parameters)
        return summarise(arguments, trainer, *args)

    from llava.train import setup_run

    setup_run.summarise = note
    setup_run.LlavaTrainer = type("Noting", (setup_run.LlavaTrainer,), {"_clip_grad_norm": note_gradients(seen)})
    # torchao compiles its optimizers' steps for each shape, which takes longer than all else here.
    with torch.compiler.set_stance("force_eager"), counting(seen):
        training.train(sys.argv[1:], keep_fsdp=True)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
