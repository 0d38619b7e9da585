"""What the manifest of an answer file says: on a line, and of the questions that it names.

`FILE.manifest.json` lies next to FILE (`llava.manifests`). It says which checkpoint, template and decoding gave the
answers, to which questions, with which versions.
"""

from pathlib import Path
from typing import Any

from llava.commandline import existing_file
from llava.data.conversion import MANIFEST_FILE
from llava.errors import LlavaError
from llava.manifests import manifest_path, read_manifest, sha256_of
from llava.records import read_json
from llava.sampling_params import SamplingParams

_ALWAYS_NAMED = ("temperature", "top_p", "num_beams", "max_new_tokens", "seed")


def manifest_of(file: str | Path) -> dict[str, Any] | None:
    """The manifest of an answer file, its entries of the kinds that they are written in; None if there is none.

    Raises:
        LlavaError: it is no object, or an entry is of another kind, as after an edit by hand.
    """
    manifest: Any = read_manifest(file)
    if manifest is None:
        return None
    path, entries = manifest_path(file), manifest if isinstance(manifest, dict) else {}
    _check_kind(path, "what it holds", manifest, dict)
    for kind, names in _ENTRIES.items():
        for name in names:
            _check_kind(path, name, entries.get(name), kind)
    for name in ("temperature", "num_beams"):
        _check_kind(path, name, (entries.get("decoding") or {}).get(name), float)
    return entries


_ENTRIES = {
    dict: ("decoding", "counts", "versions", "image_options", "memory"),
    str: (
        *("sha256", "questions", "questions_sha256", "checkpoint", "checkpoint_digest"),
        *("template", "ablate_image", "image_folder"),
    ),
}


def _check_kind(path: Path, name: str, value: Any, kind: type) -> None:
    """Null is of every kind, and a whole number a number."""
    if value is not None and not isinstance(value, int | float if kind is float else kind):
        words = {dict: "an object", str: "a text", float: "a number"}[kind]
        raise LlavaError(f"{path}: {name} has to be {words}; restore the file, or remove it")


def questions_of(file: str | Path) -> Path:
    """The questions that an answer file's manifest names.

    Raises:
        LlavaError: there is no manifest, it names none, or they aren't there.
    """
    questions = (manifest_of(file) or {}).get("questions")
    if not questions:
        raise LlavaError(f"{file}: no manifest says which questions it answers; give --gt")
    return existing_file(questions, "questions of the manifest")


def decoding_entry(sampling: SamplingParams) -> dict[str, Any]:
    """The manifest's `decoding`: what has always been in it, and every other parameter that isn't at its default.

    So a new parameter leaves the manifests of those who don't use it as they were, and their runs go on.
    """
    others = sampling.model_dump(mode="json", exclude_defaults=True)
    always = {name: getattr(sampling, name) for name in _ALWAYS_NAMED}
    # An old form: null where --top_p wasn't given.
    return others | always | ({} if "top_p" in sampling.model_fields_set else {"top_p": None})


def describe(manifest: dict[str, Any] | None) -> str:
    """One line: checkpoint, epochs, split, template, decoding, seed."""
    if manifest is None:
        return "unknown (no manifest next to the answers)"
    decoding = manifest.get("decoding") or {}
    how = "greedy" if not decoding.get("temperature") else f"temperature {decoding['temperature']:g}"
    if decoding.get("num_beams", 1) > 1:
        how = f"{decoding['num_beams']} beams"
    how = " ".join([how, *(f"{name} {value}" for name, value in decoding.items() if name not in _ALWAYS_NAMED)])
    parts = {
        "checkpoint": manifest.get("checkpoint"),
        "epochs": manifest.get("training_epochs"),
        "questions": manifest.get("questions"),
        "template": manifest.get("template"),
        "decoding": how if "memory" not in manifest else None,
        "seed": decoding.get("seed"),
        "images": None if manifest.get("ablate_image") in {None, "none"} else manifest["ablate_image"],
        "shown with": ", ".join(f"{name} {value}" for name, value in (manifest.get("image_options") or {}).items())
        or None,
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)


def read_dataset_manifest(questions: str | Path) -> dict[str, Any] | None:
    """What the converter wrote about a file of questions: its data set, sources and this split's counts.

    `changed` says that the file is no longer the one that was converted. None if no manifest names the file; a
    manifest.json that another program wrote names none.
    """
    questions = Path(questions)
    path = questions.parent / MANIFEST_FILE
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict) or "data_set" not in manifest:
        return None
    for name, split in manifest["splits"].items():
        if isinstance(split, dict) and split.get("file") == questions.name:
            about = {key: manifest[key] for key in ("data_set", "sources", "left_out", "corrected") if key in manifest}
            return about | {"split": name, **split, "changed": sha256_of(questions) != split.get("sha256")}
    return None
