"""Small files of records, written for one test."""

import json


def made_record(name, image, *pairs, **more):
    turns = []
    for place, (question, answer) in enumerate(pairs):
        mark = "\n<image>" if image and not place else ""
        turns += [{"from": "human", "value": question + mark}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **({"image": image} if image else {}), **more}


def write(path, content):
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in content) if lines else json.dumps(content))
    return str(path)


def yes_no_set(folder, name):
    gt = write(
        folder / f"{name}_test.json", [made_record(f"{name}{i}", f"{i}.png", ("Is it?", "no")) for i in range(4)]
    )
    rows = [{"question_id": f"{name}{i}", "text": "no" if i % 2 else "yes"} for i in range(4)]
    return gt, write(folder / f"{name}.jsonl", rows)
