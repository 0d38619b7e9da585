"""Train, evaluate and serve assistants that look at medical images and talk about them. For research only.

`llava-med VERB …` (or `python -m llava VERB …`) is the command module of that verb, with its flags. Only that module
is imported, and for the list of verbs none.
"""

import ast
import difflib
import importlib
import sys
from argparse import REMAINDER, RawDescriptionHelpFormatter
from pathlib import Path

from llava import __version__
from llava.commandline import ArgumentParser, run
from llava.constants import RESEARCH_NOTICE
from llava.errors import LlavaError

VERBS = {
    "use a model": {
        "ask": "llava.eval.run_llava",
        "chat": "llava.serve.cli",
        "serve": "llava.serve.__main__",
        "controller": "llava.serve.controller",
        "worker": "llava.serve.model_worker",
        "api": "llava.serve.openai_api_server",
        "page": "llava.serve.gradio_web_server",
        "register-worker": "llava.serve.register_worker",
        "test-worker": "llava.serve.test_message",
    },
    "data": {
        "image-info": "llava.images.info",
        "image-convert": "llava.images.convert",
        "convert": "llava.data.convert",
        "validate": "llava.data.validate",
        "audit": "llava.data.audit",
        "stats": "llava.data.stats",
        "filter-missing": "llava.data.filter_missing",
        "split-long": "llava.data.split_long_conversation",
        "download-images": "llava.data.download_images",
        "phantoms": "llava.data.phantoms.__main__",
        "instruct-generate": "llava.instruct.instruct_generate",
        "instruct-postprocess": "llava.instruct.instruct_postprocess",
    },
    "training": {
        "train": "llava.train.train",
        "estimate": "llava.train.estimate_memory",
    },
    "evaluation": {
        "answer": "llava.eval.model_vqa_med",
        "answer-questions": "llava.eval.model_vqa",
        "answer-batch": "llava.eval.run_med_datasets_eval_batch",
        "baselines": "llava.eval.baselines",
        "score": "llava.eval.run_eval",
        "score-batch": "llava.eval.run_eval_batch",
        "report": "llava.eval.report",
        "paper-table": "llava.eval.paper_table",
        "judge": "llava.eval.eval_multimodal_chat_gpt_score",
        "judge-summary": "llava.eval.summarize_gpt_review",
    },
    "checkpoints": {
        "apply-delta": "llava.model.apply_delta",
        "make-delta": "llava.model.make_delta",
        "merge-lora": "llava.model.merge_lora",
        "consolidate": "llava.model.consolidate",
        "average": "llava.model.average",
        "quantize": "llava.model.quantize",
        "export": "llava.model.export_hf",
        "import": "llava.model.import_hf",
        "import-gguf": "llava.model.import_gguf",
        "export-gguf": "llava.model.export_gguf",
        "extract-projector": "llava.model.extract_mm_projector",
    },
    "try it": {
        "demo": "llava.demo.__main__",
    },
}
"""By task: the name of each verb and the module whose `main` it calls."""
_MEANT = {
    **dict.fromkeys(("eval", "evaluate"), ("answer", "score")),
    **dict.fromkeys(("finetune", "fine-tune", "fit", "tune"), ("train",)),
    **dict.fromkeys(("predict", "infer", "inference", "generate"), ("ask", "answer")),
}
"""Verbs that others have, which are spelt unlike ours."""


def build_parser() -> ArgumentParser:
    purpose = (__doc__ or "").splitlines()[0]
    parser = ArgumentParser(
        prog="llava-med",
        usage="llava-med VERB [FLAGS]",
        description=f"{purpose}\n\n{_listing()}\n\nllava-med VERB --help lists the verb's flags.",
        epilog=RESEARCH_NOTICE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llava-med {__version__}")
    parser.add_argument("verb", metavar="VERB", help="one of the above")
    parser.add_argument("flags", nargs=REMAINDER, metavar="FLAGS", help="those of the verb")
    return parser


def main(argv: list[str] | None = None) -> int | None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-"):
        build_parser().parse_args(argv)
    verb, *flags = argv
    module = find_module(verb)
    # What argparse names a command after, and what a command's own helpers look at.
    sys.argv = [f"llava-med {verb}", *flags]
    return importlib.import_module(module).main(flags)


def find_module(verb: str) -> str:
    """The command module of a verb.

    Raises:
        LlavaError: there is no such verb; the message names like ones.
    """
    known = {name: module for group in VERBS.values() for name, module in group.items()}
    if verb not in known:
        like = _MEANT.get(verb.lower().replace("_", "-")) or difflib.get_close_matches(verb, known, n=3)
        hint = f"did you mean {' or '.join(like)}?" if like else "llava-med --help lists them"
        raise LlavaError(f"llava-med has no verb {verb!r}; {hint}")
    return known[verb]


def script() -> None:
    """What the installed command `llava-med` runs."""
    run(main)


def _listing() -> str:
    width = max(len(verb) for group in VERBS.values() for verb in group)
    return "\n\n".join(
        "\n".join([f"{task}:", *(f"  {verb:{width}}  {_purpose(module)}" for verb, module in group.items())])
        for task, group in VERBS.items()
    )


def _purpose(module: str) -> str:
    """The first line of a module's docstring, which is read, not imported: that would take seconds."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


if __name__ == "__main__":
    script()
