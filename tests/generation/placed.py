"""Tensors that claim to be on other devices: content is the CPU's, operators refuse what isn't on one device."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
MOVING = {aten._to_copy, aten.copy_}
KIND = "meta"
"""The kind of device that torch takes without a driver; `meta:0`, `meta:1`, … are as many of it."""


class Placed(torch.Tensor):
    """A CPU tensor (`content`) under the name of another device."""

    content: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, content: torch.Tensor, device: torch.device):
        made = torch.Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), dtype=content.dtype, device=KIND, dispatch_device=True
        )
        made.content, made.place = content, device
        return made

    @property
    def device(self):
        return self.place

    def tolist(self):
        raise AssertionError("a tensor is read without being copied to the host")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return carry_out(function, args, kwargs or {})


class Placing(TorchDispatchMode):
    """Within, tensors made on `meta:N` are `Placed` there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return carry_out(function, args, kwargs or {})


def carry_out(function, args, kwargs):
    if function is torch.ops.prim.device.default:
        return args[0].place
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
        with Placing():  # its parts are what is carried out
            return function.decompose(*args, **kwargs)
    found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    # As torch: a number without a device goes anywhere.
    devices = {one.device for one in found if isinstance(one, Placed) or one.ndim}
    packet = function._overloadpacket
    if len(devices) > 1 and packet not in MOVING:
        raise AssertionError(f"{function}: tensors on {sorted(map(str, devices))}")
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else next((one.device for one in found if one.ndim), None)
    if packet is aten.copy_:
        device = args[0].device
    kwargs = {name: torch.device("cpu") if name == "device" and value else value for name, value in kwargs.items()}
    args, kwargs = tree_map(lambda leaf: leaf.content if isinstance(leaf, Placed) else leaf, (args, kwargs))
    result = function(*args, **kwargs)
    if packet is aten.copy_:
        return found[0]
    if device is None or device.type != KIND:
        return result
    if function._schema.is_mutable and function._schema.name.endswith("_"):
        return found[0]
    return tree_map(lambda leaf: Placed(leaf, device) if isinstance(leaf, torch.Tensor) else leaf, result)


@torch.inference_mode()
def place(module: nn.Module, device: torch.device) -> None:
    """Have a module's weights claim to be on `device`."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and not isinstance(weight, Placed):
                part._parameters[name] = nn.Parameter(Placed(weight.data, device), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, Placed):
                part._buffers[name] = Placed(buffer, device)
