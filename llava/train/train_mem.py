"""`train.py` with the fastest attention that is installed (flash-attention 3, 2, else torch's own SDPA)."""

import sys

from llava.commandline import run
from llava.train.train import quicken_help, train


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    quicken_help(argv)
    if not any(arg.replace("-", "_").startswith("__attn_implementation") for arg in argv):
        argv += ["--attn_implementation", fastest_attention()]
    train(argv)


def fastest_attention() -> str:
    """The name of the fastest attention that this machine can run."""
    import torch
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if torch.cuda.is_available():
        if is_flash_attn_3_available():
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


if __name__ == "__main__":
    run(main)
