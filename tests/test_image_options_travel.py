"""Options in records, flags and requests reach the one reader: training, evaluation, checks, API and Python alike."""

import json

import numpy as np
import pytest

import llava
from llava.data import audit, filter_missing, validate
from llava.data.stats_count import collect
from llava.errors import LlavaError
from llava.eval import model_vqa_med, run_llava, run_med_datasets_eval_batch
from llava.images import ImageOptions, ImageWithOptions, open_image
from llava.manifests import read_manifest
from llava.records import read_json, read_records, write_records
from llava.train.train import train
from tests.images.test_medical import dicom
from tests.tiny import make_llava
from tests.train.helpers import flags as train_flags
from tests.train.helpers import losses

nibabel = pytest.importorskip("nibabel")

SHOWN = [
    {"path": "ct.dcm", "preset": "lung"},
    {"path": "ct.dcm", "window": [40, 80]},
    {"path": "volume.nii.gz", "axis": 1, "slice": 3},
    {"path": "volume.nii.gz", "axis": 1, "slice": 9},
    {"path": "frames.dcm", "frame": 0},
    "ct.dcm",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`scans.json` names scans and how they are shown, `pictures.json` the same as PNGs; the images in `images/`."""
    folder = tmp_path_factory.mktemp("data")
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    hounsfield = rng.integers(-1000, 1000, (40, 40), dtype=np.int16)
    (images / "ct.dcm").write_bytes(dicom(hounsfield, WindowCenter=300, WindowWidth=900))
    (images / "frames.dcm").write_bytes(dicom(rng.integers(0, 255, (3, 30, 30), dtype=np.uint8)))
    volume = rng.normal(size=(20, 24, 28)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), images / "volume.nii.gz")
    scans, pictures = [], []
    for number, shown in enumerate(SHOWN):
        turns = [
            {"from": "human", "value": f"<image>\nWhat is it? {'a ' * number}"},
            {"from": "gpt", "value": "A lung."},
        ]
        scans.append({"id": f"q{number}", "image": shown, "answer_type": "OPEN", "conversations": turns})
        open_image(source_of(images, shown)).save(images / f"p{number}.png")
        pictures.append(scans[-1] | {"image": f"p{number}.png"})
    write_records(folder / "scans.json", scans)
    write_records(
        folder / "scans.jsonl", [record | {"images": [record.pop("image")]} for record in json.loads(json.dumps(scans))]
    )
    write_records(folder / "scans.parquet", [each for each in scans if isinstance(each["image"], dict)])
    write_records(folder / "pictures.json", pictures)
    return folder


def source_of(images, shown):
    if isinstance(shown, str):
        return images / shown
    return ImageWithOptions(images / shown["path"], ImageOptions(**{k: v for k, v in shown.items() if k != "path"}))


@pytest.mark.parametrize("more", [(), ("--cache_vision_features", "True")], ids=["opened", "cached"])
@pytest.mark.parametrize("name", ["scans.json", "scans.jsonl"])
def test_training_on_scans_is_training_on_their_pictures(model, data, tmp_path, name, more):
    found = []
    for file in (name, "pictures.json"):
        output = tmp_path / file
        train(train_flags(output, data / file, model, "--max_steps", "4", *more))
        found.append(losses(output))
    assert found[0] == found[1] and len(found[0]) == 4


def test_training_names_record_image_and_option(model, data, tmp_path):
    records = read_json(data / "scans.json")
    records[2]["image"] = {"path": "volume.nii.gz", "widow": [1, 2]}
    write_records(tmp_path / "bad.json", records)
    (tmp_path / "images").symlink_to(data / "images")
    words = train_flags(tmp_path / "out", tmp_path / "bad.json", model, "--max_steps", "1")
    with pytest.raises(LlavaError, match=r"bad.json record 2.*image 1 \(volume.nii.gz\): 'widow' is no option"):
        train(words)


def answers(model, data, path, *more, questions="scans.json", command=model_vqa_med):
    words = ["--model-path", str(model), "--image-folder", str(data / "images"), "--device", "cpu"]
    words += ["--question-file", str(data / questions), "--answers-file", str(path), "--max-new-tokens", "8"]
    command.main([*words, *more])
    return read_records(path)


@pytest.mark.parametrize("name", ["scans.json", "scans.jsonl", "scans.parquet"])
def test_questions_on_scans_are_answered_as_on_their_pictures(model, data, tmp_path, name):
    found = answers(model, data, tmp_path / "a.jsonl", questions=name)
    expected = answers(model, data, tmp_path / "b.jsonl", questions="pictures.json")
    assert [each["text"] for each in found] == [each["text"] for each in expected][: len(found)]
    options = [{k: v for k, v in each.items() if k != "path"} if isinstance(each, dict) else None for each in SHOWN]
    for each, shown in zip(found, options):
        assert each["metadata"].get("image_options") == ([shown] if shown else None)
    assert "image_options" not in expected[0]["metadata"] and "image_options" not in read_manifest(tmp_path / "b.jsonl")


def test_flags_are_defaults_and_are_recorded(model, data, tmp_path):
    found = answers(model, data, tmp_path / "a.jsonl", "--window", "-600,1500")
    plain = answers(model, data, tmp_path / "b.jsonl")
    assert read_manifest(tmp_path / "a.jsonl")["image_options"] == {"window": [-600, 1500]}
    shown = [each["metadata"]["image_options"][0] for each in found]
    assert shown[0] == {"preset": "lung"} and shown[1] == {"window": [40, 80]}
    assert shown[2] == {"window": [-600, 1500], "axis": 1, "slice": 3} and shown[5] == {"window": [-600, 1500]}
    # The lung's preset is the same window as the flag, which the last question took.
    assert [a["text"] == b["text"] for a, b in zip(found, plain)][:2] == [True, True]
    with pytest.raises(LlavaError, match=r"different: .*image_options"):
        answers(model, data, tmp_path / "a.jsonl", "--preset", "bone")
    several = ("--num-chunks", "2", "--preset", "bone")
    joined = answers(model, data, tmp_path / "d.jsonl", *several, command=run_med_datasets_eval_batch)
    assert joined[5]["metadata"]["image_options"] == [{"preset": "bone"}]
    assert read_manifest(tmp_path / "d.jsonl")["image_options"] == {"preset": "bone"}


def test_questions_with_a_wrong_option_are_refused(model, data, tmp_path):
    records = read_json(data / "scans.json")
    records[1]["image"] = ["ct.dcm", {"path": "ct.dcm", "window": [1, 2], "preset": "lung"}]
    write_records(tmp_path / "bad.json", records)
    with pytest.raises(LlavaError, match=r'record 1 \("q1"\): image 2 \(ct.dcm\): window and preset exclude'):
        model_vqa_med.main(["--model-path", str(model), "--question-file", str(tmp_path / "bad.json")])
    with pytest.raises(LlavaError, match="slice is given, but the file is a DICOM file"):
        records[1]["image"] = {"path": "ct.dcm", "slice": 4}
        write_records(tmp_path / "bad.json", records)
        words = [
            "--image-folder",
            str(data / "images"),
            "--question-file",
            str(tmp_path / "bad.json"),
            "--device",
            "cpu",
        ]
        model_vqa_med.main(["--model-path", str(model), *words, "--answers-file", str(tmp_path / "x.jsonl")])


def test_checks_of_records(data, tmp_path, capsys):
    images = ["--image-folder", str(data / "images")]
    assert validate.main([str(data / "scans.json"), *images, "--workers", "1"]) == 0
    records = read_json(data / "scans.json")
    records[0]["image"] = {"path": "ct.dcm", "preset": "lungs"}
    records[1]["image"] = {"path": "ct.dcm", "slice": 1}
    write_records(tmp_path / "bad.jsonl", records)
    capsys.readouterr()
    words = [str(tmp_path / "bad.jsonl"), *images, "--workers", "1", "--fix", str(tmp_path / "good.jsonl")]
    assert validate.main(words) != 0
    said = capsys.readouterr().out
    assert "record 0 (id 'q0'): image 1 (ct.dcm): preset: 'lungs' is unknown" in said
    assert "record 1 (id 'q1'): ct.dcm: " in said and "slice is given, but the file is a DICOM file" in said
    assert [record["id"] for record in read_records(tmp_path / "good.jsonl")] == ["q2", "q3", "q4", "q5"]
    assert read_records(tmp_path / "good.jsonl")[0]["image"] == SHOWN[2]
    with pytest.raises(LlavaError, match=r"bad.jsonl record 0.*image 1 \(ct.dcm\): preset"):
        filter_missing.main([str(tmp_path / "bad.jsonl"), *images, "--output", str(tmp_path / "there.jsonl")])


def test_missing_scans_are_dropped_and_counted(data, tmp_path):
    records = read_json(data / "scans.json")
    records[3]["image"] = {"path": "gone.nii.gz", "slice": 1}
    write_records(tmp_path / "some.json", records)
    words = [
        str(tmp_path / "some.json"),
        "--image-folder",
        str(data / "images"),
        "--output",
        str(tmp_path / "there.json"),
    ]
    filter_missing.main([*words, "--missing-list", str(tmp_path / "gone.json")])
    assert read_json(tmp_path / "gone.json") == ["gone.nii.gz"]
    assert [record["id"] for record in read_json(tmp_path / "there.json")] == ["q0", "q1", "q2", "q4", "q5"]


def test_statistics(data):
    pytest.importorskip("textblob")
    assert collect(data / "scans.json").text_only == 0


@pytest.mark.parametrize("by_pixels", [False, True])
def test_another_slice_of_a_trained_volume_is_seen(data, tmp_path, by_pixels):
    records = read_json(data / "scans.json")
    write_records(tmp_path / "train.json", records[:3])
    write_records(tmp_path / "test.json", [records[3], records[4]])
    words = ["--train", str(tmp_path / "train.json"), "--test", str(tmp_path / "test.json")]
    words += ["--image-folder", str(data / "images")] if by_pixels else []
    audit.main([*words, "--output", str(tmp_path / "found.json")])
    rows = read_json(tmp_path / "found.json")["items"]
    assert [(row["id"], row["image_seen"]) for row in rows] == [("q3", True), ("q4", False)]


def test_python(model, data, capsys, tmp_path):
    assistant = llava.load(model, device="cpu")
    volume = data / "images" / "volume.nii.gz"
    expected = assistant.answer("What?", open_image(volume, axis=1, frame=3, window=(0, 1)), max_new_tokens=8)
    options = {"axis": 1, "slice": 3, "window": [0, 1]}
    for form in (
        {"path": str(volume), **options},
        {"bytes": volume.read_bytes(), **options},
        {"path": volume, **options},
    ):
        assert assistant.answer("What?", [form], max_new_tokens=8) == expected
    given = ImageWithOptions(volume, ImageOptions.parse(options))
    assert assistant.answer("What?", given, max_new_tokens=8) == expected
    ct = (data / "images" / "ct.dcm").read_bytes()
    assert assistant.answer("What?", {"bytes": ct}, max_new_tokens=8) == assistant.answer("What?", ct, max_new_tokens=8)
    with pytest.raises(LlavaError, match="'level' is no option of an image"):
        assistant.answer("What?", {"path": volume, "level": 3})
    capsys.readouterr()
    words = ["--model-path", str(model), "--image-file", str(volume), "--query", "What?", "--device", "cpu"]
    run_llava.main([*words, "--max-new-tokens", "8", "--axis", "1", "--slice", "3", "--window", "0,1"])
    assert capsys.readouterr().out.strip() == expected
