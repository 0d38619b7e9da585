"""What libraries say at their import that means nothing here: kept away in one place, before any is imported.

Each has a logger of its own, or a warning known by its words; whatever else they say is said.
"""

import logging
import warnings

_SAYS_NOTHING = (
    # It advises a package for 4-bit products on CPUs; llava.model.weights.linear4bit has no use for it.
    "bitsandbytes.backends.cpu.ops",
    # transformers imports torchao wherever it is installed; it speaks of CUDA libraries and of its own old calls.
    "torchao",
    "torch.utils._pytree",
)
_OLD_CALLS = r"`((is_)?gradient_checkpointing(_enable|_disable)?|rope_scaling)` is deprecated"
"""transformers' own, and peft's, of names that both still have; `rope_scaling` stands in our config.json for others."""
_WIDGETS = "IProgress not found"
"""tqdm's, in a notebook without ipywidgets: its bars are text then."""
_THREADS = "OMP_NUM_THREADS/MKL_NUM_THREADS unset"
"""accelerate's, of processes on CPUs and of each dry run: how many threads it has set."""
_OTHER_STEPS = "Warning: The following arguments do not match the ones in the `trainer_state.json`"
"""How often is logged and saved, where a run goes on: in the state as a number, in the flags also as a share. What
matters is compared by llava.train.output.one_run."""


def silence() -> None:
    """Raise the loggers' levels and leave out the warnings."""
    for name in _SAYS_NOTHING:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=_OLD_CALLS, category=FutureWarning)
    warnings.filterwarnings("ignore", message=_WIDGETS)
    warnings.filterwarnings("ignore", message=_THREADS)
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: _OTHER_STEPS not in record.getMessage())
