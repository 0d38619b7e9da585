"""Chat about images in the terminal: streaming, several turns, several images.

/image adds one, /save writes the conversation, /help lists the rest. Answers are drawn at temperature 0.2, as in
LLaVA's chat, so the same question may be answered otherwise; --temperature 0 always gives the likeliest. For research
only.

python -m llava.serve.cli --model-path CHECKPOINT --image-file scan.png
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from llava.commandline import ArgumentParser, run, write_line
from llava.constants import DEFAULT_IMAGE_TOKEN, NO_IMAGE, RESEARCH_NOTICE
from llava.errors import LlavaError, for_terminal
from llava.image_options import NO_OPTIONS, ImageOptions, add_image_flags, image_options_from_args, options_of
from llava.sampling_params import add_sampling_flags, sampling_from_args

HELP = """\
/image PATH   add an image to your next question (as often as you like)
/reset        start again, without images
/save PATH    write the conversation as JSON; again, to the same file, once there is more of it
/help         this list
/exit         leave (so does Ctrl-D; Ctrl-C stops an answer)"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", "--model-name", dest="model_path", required=True, help="folder or hub id")
    parser.add_argument("--model-base", help="what an adapter or projector folder was trained over")
    parser.add_argument("--image-file", action="append", default=[], help="an image to begin with; may be repeated")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--conv-mode", "--conv-template", dest="conv_mode", help="template; default: the checkpoint's")
    add_sampling_flags(parser, temperature=0.2, max_new_tokens=512)
    parser.add_bool("--load-8bit", help="quantize to 8 bits while loading")
    parser.add_bool("--load-4bit", help="quantize to 4 bits while loading")
    add_image_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    sampling, shown = sampling_from_args(args), image_options_from_args(args)
    images = [_open(path, shown) for path in args.image_file]

    from llava.model.weights.locate import locate_model

    folder = locate_model(args.model_path)  # before torch is imported, which takes seconds
    from llava.generation import Engine
    from llava.model import load_pretrained_model

    loaded = load_pretrained_model(
        folder,
        args.model_base,
        device=args.device,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        conversation_template=args.conv_mode,
    )
    chat = Chat(Engine(loaded), loaded.model.config.conversation_template, sampling, shown)
    write_line(RESEARCH_NOTICE)
    asked = "Ask about the image" if images else "No image yet: /image PATH adds one. Ask"
    write_line(f"{asked}; /help lists the commands.")
    for image in images:
        chat.add_image(*image)
    talk(chat)


def _open(path: str, shown: ImageOptions) -> tuple:
    """(path, its options as JSON or None, the image), shown as the flags say."""
    from llava.images import open_image, with_default_options

    (image,) = with_default_options([path], shown)
    return path, options_of(image), open_image(image)


class Chat:
    """One conversation: the turns so far, the images of them, and those waiting for the next question; `shown` is how
    DICOM and NIfTI files are shown."""

    def __init__(self, engine, template: str | None, sampling, shown: ImageOptions = NO_OPTIONS):
        self.engine, self.template, self.sampling, self.shown = engine, template, sampling, shown
        self.reset()

    def reset(self) -> None:
        from llava.conversation import get_template

        self.conversation = get_template(self.template)
        self.images: list = []
        self.entries: list[str | dict] = []
        self.waiting = 0
        self.saved: set[str] = set()
        """Files that hold this conversation: they alone are written again."""

    def add_image(self, path: str, options: dict | None, image) -> None:
        self.images.append(image)
        self.entries.append({"path": str(path), **options} if options else str(path))
        self.waiting += 1
        as_asked = f", {ImageOptions.parse(options)}" if options else ""
        write_line(f"[{Path(path).name}, {image.width} × {image.height}{as_asked}; ask about it]")

    def ask(self, question: str) -> Iterator[str]:
        """Yield the pieces of the answer; an answer that fails leaves the conversation as it was."""
        from llava.generation import Request

        user, assistant = self.conversation.roles[:2]
        before = self.conversation.copy()
        self.conversation.append_message(user, (DEFAULT_IMAGE_TOKEN + "\n") * self.waiting + question)
        pieces: list[str] = []
        try:
            for piece in self.engine.stream(Request(self.conversation, self.images, self.sampling)):
                pieces.append(piece)
                yield piece
        except LlavaError:
            self.conversation = before
            raise
        except KeyboardInterrupt:
            pieces.append(" …")
        self.conversation.append_message(assistant, "".join(pieces).strip())
        self.waiting = 0

    def save(self, path: str) -> None:
        from llava.records import write_json

        if path not in self.saved and Path(path).exists():
            raise LlavaError(f"{path} is there and isn't of this conversation; give /save another name")
        names = dict(zip(self.conversation.roles, ("human", "gpt"), strict=False))
        start = self.conversation.offset
        turns = [{"from": names.get(role, role), "value": text} for role, text in self.conversation.messages[start:]]
        content = {"images": self.entries, "conversations": turns, "notice": RESEARCH_NOTICE}
        write_json(path, content, overwrite=path in self.saved)
        self.saved.add(path)
        write_line(f"[saved to {path}]")


def talk(chat: Chat) -> None:
    """Read lines until the end of input; an error of one line doesn't end the chat."""
    while True:
        try:
            line = input("\nyou: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            write_line()
            return
        if line in ("/exit", "/quit"):
            return
        try:
            if line.startswith("/"):
                command(chat, line)
            elif line:
                if not chat.images:
                    write_line(f"[{NO_IMAGE} /image PATH adds one.]")
                for piece in chat.ask(line):
                    sys.stdout.write(for_terminal(piece))
                    sys.stdout.flush()
                write_line()
        except LlavaError as error:
            write_line(f"error: {error}")


def command(chat: Chat, line: str) -> None:
    """Carry out a line that starts with a slash."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]  # as terminals write a path that is dropped on them
    if name == "/image" and value:
        chat.add_image(*_open(value, chat.shown))
    elif name == "/save" and value:
        chat.save(value)
    elif name == "/reset":
        chat.reset()
        write_line("[a new conversation]")
    elif name == "/help":
        write_line(HELP)
    elif name in ("/image", "/save"):
        raise LlavaError(f"{name} needs a path")
    else:
        raise LlavaError(f"unknown command {name}; /help lists them")


if __name__ == "__main__":
    run(main)
