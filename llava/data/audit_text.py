"""An audit in words, for the terminal and the report."""

from typing import Any

from llava.errors import amount


def audit_lines(audit: dict[str, Any]) -> list[str]:
    """What was found, most serious first, one finding per line."""
    train, test = audit["train"], audit["test"]
    lines = [
        f"{split}: {amount(count['questions'], 'question')} ({count['open']:,} open, {count['closed']:,} closed) "
        f"on {amount(count['images'], 'image')}"
        for split, count in (("training", train), ("test", test))
    ]
    lines += ["", *_image_lines(audit["images"]), "", *_question_lines(audit["questions"], test["questions"]), ""]
    for kind, found in audit["answers"].items():
        lines += _answer_lines(kind, found)
    lines += ["", "clean test questions:"]
    lines += [f"  {name}: {len(ids):,} of {test['questions']:,}" for name, ids in audit["subsets"].items()]
    return lines


def _image_lines(found: dict[str, Any]) -> list[str]:
    total = found["test_images"]
    lines = [f"images (compared by {found['compared_by']}):"]
    lines.append(f"  {found['same_name']:,} of {total:,} test images have the name of a training image")
    if "seen" in found:
        lines.append(f"  {found['identical_pixels']:,} have the pixels of a training image")
        for key, what in (
            ("identical_under_another_name", "identical pairs under different names"),
            ("near_identical", "nearly identical pairs"),
            ("same_name_other_pixels", "share the name, not the pixels"),
        ):
            if found[key]:
                lines.append(f"  {len(found[key]):,} {what}")
        seen, nearly = found["seen"], found["seen_or_nearly"]
        lines.append(f"  {seen:,} are training images, {nearly:,} counting nearly identical ones too")
    return lines


def _question_lines(found: dict[str, Any], total: int) -> list[str]:
    return [
        f"questions on the same image (of {total:,}):",
        f"  {found['identical']:,} stand in training, case and outer blanks apart",
        f"  {found['identical_without_punctuation']:,} with punctuation dropped",
        f"  {found['near_duplicates']:,} have a near duplicate (Jaccard of the word sets >= {found['jaccard']:g}), "
        f"the nearest of {found['near_duplicates_with_same_answer']:,} with the same answer",
    ]


def _answer_lines(kind: str, found: dict[str, Any]) -> list[str]:
    total = found["questions"]
    if not total:
        return [f"{kind} answers: none in the test split"]

    def share(key: str) -> str:
        return f"{found[key]:,} ({100 * found[key] / total:.1f} %)"

    commonest = found["majority_answer"]
    if commonest is None:
        return [f"{kind} answers (of {total:,}): none in training"]
    priors = ", ".join(f"{answer} {count:,}" for answer, count in found["test_priors"][:4])
    return [
        f"{kind} answers (of {total:,}), without a look at the image:",
        f"  {share('in_training')} are among training's answers",
        f'  {share("majority")} are training\'s commonest, "{commonest}"',
        f"  {share('same_question')} are the commonest answer to the same question on any training image "
        f"({found['same_question_known']:,} are asked there)",
        f"  commonest in test: {priors}",
    ]
