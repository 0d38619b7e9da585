"""What the processes of a run tell each other in addition to tensors."""

from typing import TypeVar

import torch.distributed

T = TypeVar("T")


def of_all_processes(own: T) -> list[T]:
    """What each process gives (anything that pickles), in their order, on all of them; each must call this."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [own]
    found = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found
