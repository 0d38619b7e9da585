"""Ask one question about one or several images.

python -m llava.eval.run_llava --model-path CHECKPOINT --image-file scan.png --query "What is shown?"
"""

from llava.commandline import ArgumentParser, run, write_line
from llava.errors import LlavaError
from llava.sampling_params import add_sampling_flags, sampling_from_args


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
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
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from llava.images import open_image

    sampling = sampling_from_args(args)
    # Before the model, which takes longer: an image that can't be read is found out at once.
    paths = [path for path in (args.image_file or "").split(args.sep) if path]
    images = [open_image(path) for path in paths]

    from llava.conversation import get_template
    from llava.generation import Engine, Request
    from llava.model import load_pretrained_model

    loaded = load_pretrained_model(
        args.model_path,
        args.model_base,
        device=args.device,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        conversation_template=args.conv_mode,
    )
    conversation = get_template(loaded.model.config.conversation_template)
    conversation.append_message(conversation.roles[0], with_images(args.query, len(images)))
    write_line(Engine(loaded).generate([Request(conversation, images, sampling)])[0].text.strip())


def with_images(question: str, count: int) -> str:
    """The question with an <image> for each image before it, where it names none itself.

    Raises:
        LlavaError: it names a number of images that isn't `count`.
    """
    from llava.constants import DEFAULT_IMAGE_TOKEN

    named = question.count(DEFAULT_IMAGE_TOKEN)
    if named not in (0, count):
        raise LlavaError(f"the question has {named} {DEFAULT_IMAGE_TOKEN} but there are {count} images")
    return question if named else (DEFAULT_IMAGE_TOKEN + "\n") * count + question


if __name__ == "__main__":
    run(main)
