"""Ask one question about one or several images.

Greedy unless a flag says otherwise; DICOM and NIfTI files are shown as --window, --frame and the like say.

python -m llava.eval.run_llava --model-path CHECKPOINT --image-file scan.png --query "What is shown?"
"""

from argparse import Namespace
from typing import Any

from llava.commandline import ArgumentParser, complain, run, write_line
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, NO_IMAGE
from llava.errors import LlavaError
from llava.image_options import add_image_flags, image_options_from_args
from llava.sampling_params import add_sampling_flags, sampling_from_args


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", "--model-name", dest="model_path", required=True, help="folder or hub id")
    parser.add_argument("--model-base", help="what an adapter or projector folder was trained over")
    parser.add_argument("--image-file", help="an image, or several separated by --sep")
    parser.add_argument("--sep", default=",", help="what stands between several images")
    parser.add_argument("--query", required=True, help="the question")
    parser.add_argument("--conv-mode", "--conv-template", dest="conv_mode", help="template; default: the checkpoint's")
    add_sampling_flags(parser, max_new_tokens=512)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_bool("--load-8bit", help="quantize to 8 bits while loading")
    parser.add_bool("--load-4bit", help="quantize to 4 bits while loading")
    add_image_flags(parser)
    return parser


def eval_model(args: Namespace) -> None:
    """Answer `args.query` about the images of `args.image_file` and print the answer; LLaVA's quick start.

    Args:
        args: any object with the attributes `model_path` and `query`; of the command's other flags those that it has.
    """
    from llava.images import open_image, with_default_options

    given = {name: value for name, value in _attributes(args).items() if value is not None}
    args = Namespace(**(vars(build_parser().parse_args(["--model-path", "", "--query", ""])) | given))
    if not args.sep:
        raise LlavaError("--sep is empty; give what stands between several images")
    sampling = sampling_from_args(args)
    # Before the model, which takes longer: an image that can't be read is found out at once.
    paths = [path for path in (args.image_file or "").split(args.sep) if path]
    images = [open_image(image) for image in with_default_options(paths, image_options_from_args(args))]
    if not images:
        complain(f"{NO_IMAGE} --image-file names one.")

    from llava.assistant import load

    assistant = load(
        args.model_path,
        args.model_base,
        device=args.device,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        conversation_template=args.conv_mode,
    )
    question = args.query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    write_line(assistant.answer(question, images, **sampling.model_dump(exclude_defaults=True)))


def main(argv: list[str] | None = None) -> None:
    eval_model(build_parser().parse_args(argv))


def _attributes(args: Any) -> dict[str, Any]:
    """Those of an object, whether they are its own or its class's (`type("Args", (), {...})()`)."""
    return {name: getattr(args, name) for name in dir(args) if not name.startswith("_")}


if __name__ == "__main__":
    run(main)
