"""Train a LLaVA: records → samples → Trainer → checkpoint."""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.commandline import run

if TYPE_CHECKING:
    from llava.train.arguments import Arguments

logger = logging.getLogger(__name__)


def train(argv: list[str] | None = None, *, keep_fsdp: bool = False) -> dict[str, Any]:
    """Run one training, from flags to a finished output directory.

    Args:
        argv: flags, as on the command line (default: the command line's).
        keep_fsdp: keep `--fsdp` although there is no GPU.

    Returns:
        what `training_summary.json` holds.

    Raises:
        LlavaError: flags, records, images or a checkpoint that can't be used.
    """
    # Heavy, and not needed for the messages of a wrong flag's spelling.
    from llava.train.arguments import parse_arguments

    arguments = parse_arguments(list(sys.argv[1:] if argv is None else argv), keep_fsdp=keep_fsdp)
    return run_training(arguments)


def run_training(arguments: "Arguments") -> dict[str, Any]:
    """Train as `arguments` say; see `train`."""
    from llava.train.data.record_store import open_records
    from llava.train.output.one_run import claim
    from llava.train.setup_run import build_dataset, build_trainer, build_validation, start_processes

    started = time.monotonic()
    training = arguments.training
    start_processes(training)
    store = open_records(arguments.data.data_path, training.output_dir)
    held_out_path = arguments.validation.eval_data_path
    held_out = open_records(held_out_path, training.output_dir) if held_out_path else None
    checkpoint = claim(arguments)
    from llava.train.prepare_model import prepare_model

    loaded = prepare_model(arguments)
    dataset, cache = build_dataset(arguments, loaded, store)
    if arguments.model.fit_projector and checkpoint is None:
        from llava.train.fit_projector import fit_projector

        fit_projector(loaded, dataset, cache)
    validation = build_validation(arguments, loaded, held_out) if held_out else None
    trainer = build_trainer(arguments, loaded, dataset, cache, validation)
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return finish(arguments, trainer, dataset, checkpoint, time.monotonic() - started)


def finish(arguments, trainer, dataset, checkpoint: Path | None, seconds: float) -> dict[str, Any]:
    """Write the final model whole, then the summary and the loss curve; a finished run that was started again keeps
    what it has."""
    from llava.train.output.summary import PAGE, add_losses, finished_before, write_summary
    from llava.train.setup_run import save_final, summarise

    before = finished_before(trainer.args.output_dir, trainer.state.global_step)
    if before and not trainer.samples_seen:
        logger.info("finished before: %s is as it was", trainer.args.output_dir)
        return before | {"resumed_from": str(checkpoint)}
    save_final(trainer)
    summary = add_losses(summarise(arguments, trainer, dataset, checkpoint, seconds), trainer.state.log_history)
    if trainer.args.should_save:
        write_summary(trainer.args.output_dir, summary, trainer.state.log_history)
        logger.info("finished at step %d: the model and %s are in %s", summary["steps"], PAGE, trainer.args.output_dir)
    return summary


def __getattr__(name: str) -> Any:
    # What forks of LLaVA import from here; it needs torch, which the messages of a wrong flag don't.
    from llava.train import reference_names

    if name not in reference_names.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(reference_names, name)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    quicken_help(argv)
    train(argv)


def quicken_help(argv: list[str]) -> None:
    """Leave peft out where flags are only listed: transformers imports it along, which takes longer than all else."""
    if {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        sys.modules["peft"] = None  # type: ignore[assignment]


if __name__ == "__main__":
    run(main)
