"""The processes of a sharded run that hold other amounts than the first, each kind predicted."""

from collections.abc import Sequence

from llava.train.estimate.dry_run import Prediction, beside_eager, dry_run
from llava.train.step.hardware import Gpu


def by_ranks(
    flags: Sequence[str], gpu: Gpu, gpus: int, records: int | None
) -> list[tuple[tuple[int, ...], Prediction]]:
    """(processes by number, what is predicted for each of them), those of the first one first."""
    first = dry_run(flags, gpu, gpus, records, progress="predicting")
    first = beside_eager(first, flags, gpu, gpus, records)
    others = [
        (ranks, dry_run(flags, gpu, gpus, records, rank=ranks[0], progress=f"predicting process {ranks[0]}"))
        for ranks in first.unlike_ranks
    ]
    unlike = {rank for ranks in first.unlike_ranks for rank in ranks}
    return [(tuple(rank for rank in range(gpus) if rank not in unlike), first), *others]
