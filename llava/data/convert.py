"""Bring a medical data set into LLaVA-Med's record form, by its name.

Name a set and add --help to see its flags.

python -m llava.data.convert csv --input table.csv --image-folder images --output-dir data/own
"""

import importlib
import pkgutil
from types import ModuleType

from llava.commandline import ArgumentParser, existing_dir, run, write_line
from llava.data import sources
from llava.data.conversion import FORMATS, MISSING_CHOICES, ImageFolder, summary_lines, write_conversion


def find_sources() -> dict[str, ModuleType]:
    """The data sets by name: every module of llava/data/sources/ that has one."""
    names = sorted(found.name for found in pkgutil.iter_modules(sources.__path__))
    modules = [importlib.import_module(f"{sources.__name__}.{name}") for name in names]
    return {module.NAME: module for module in modules if hasattr(module, "NAME")}


SOURCES = find_sources()


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(
        dest="name", required=True, metavar="NAME", title="data sets", help="see NAME --help"
    )
    for name, source in SOURCES.items():
        command = commands.add_parser(name, description=source.__doc__, help=str(source.__doc__).splitlines()[0])
        source.add_arguments(command)
        command.add_argument("--image-folder", help="where the images are; each record's image is looked for there")
        command.add_argument("--output-dir", required=True, help="gets one file per split and a manifest")
        command.add_argument("--format", choices=FORMATS, default="json", help="of the record files")
        command.add_argument(
            "--missing",
            choices=MISSING_CHOICES,
            default=getattr(source, "MISSING_DEFAULT", "error"),
            help="what to do with records whose image isn't in the image folder",
        )
        command.add_overwrite()
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    source = SOURCES[args.name]
    folder = args.image_folder
    if folder is None and hasattr(source, "default_image_folder"):
        folder = source.default_image_folder(args)
    if folder is not None:
        folder = existing_dir(folder, "--image-folder")
    conversion = source.convert(args, ImageFolder(folder, args.missing))
    manifest = write_conversion(conversion, args.output_dir, args.format, overwrite=args.overwrite)
    for line in summary_lines(manifest):
        write_line(line)
    return 0


if __name__ == "__main__":
    run(main)
