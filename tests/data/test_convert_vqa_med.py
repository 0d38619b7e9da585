"""VQA-Med 2019: lines with "|" between, by category, of three archives beside each other."""

import pytest

from llava.data.convert import main
from llava.data.record_checks import check_form
from llava.errors import LlavaError
from llava.records import read_json, read_records

FILES = {
    "Training/QAPairsByCategory/C1_Modality_train.txt": "synpic1|what kind of image is this?|cta - ct angiography\n",
    "Training/QAPairsByCategory/C2_Plane_train.txt": "synpic1|is\tthis\u2028axial?|yes\n\nsynpic2|which plane?|axial\n",
    "Training/All_QA_Pairs_train.txt": "synpic1|never read|where categories are\n",
    "Validation/All_QA_Pairs_val.txt": "synpic3|what is alarming?|\nsynpic3|is it a ct scan?|no\n",
    "Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt": "synpic4|abnormality|what is wrong?|a mass#a (solid) tumour\n",
}
IMAGES = ("Training/Train_images/synpic1", "Training/Train_images/synpic2", "Validation/Val_images/synpic3",
          "Test/VQAMed2019_Test_Images/synpic4")  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "VQA-Med-2019"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    for name in IMAGES:
        (root / f"{name}.jpg").parent.mkdir(exist_ok=True)
        (root / f"{name}.jpg").write_bytes(b"x")
    return root


def convert(folder, *flags):
    main(["vqa-med", "--folder", str(folder), "--output-dir", str(folder.parent / "out"), *flags])
    out = folder.parent / "out"
    return {path.stem: read_records(path) for path in out.glob("*.json") if path.stem in ("train", "validate", "test")}


def test_three_splits_by_category(folder):
    splits = convert(folder)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "validate": 1, "test": 1}
    first, second, _ = splits["train"]
    assert first == {
        "id": "train_00001",
        "image": "Training/Train_images/synpic1.jpg",
        "conversations": [
            {"from": "human", "value": "what kind of image is this?\n<image>"},
            {"from": "gpt", "value": "cta - ct angiography"},
        ],
        "answer_type": "OPEN",
        "question_type": "modality",
    }
    assert second["conversations"][0]["value"] == "is this axial?\n<image>"
    assert (second["answer_type"], second["question_type"]) == ("CLOSED", "plane")
    (test,) = splits["test"]
    assert (test["conversations"][1]["value"], test["answers"]) == ("a mass", ["a mass", "a (solid) tumour"])
    assert test["question_type"] == "abnormality" and "question_type" not in splits["validate"][0]
    assert all(check_form(row) == [] for rows in splits.values() for row in rows)
    manifest = read_json(folder.parent / "out" / "manifest.json")
    assert manifest["data_set"] == "vqa-med" and manifest["left_out"] == {"empty answer": 1}
    assert len(manifest["sources"]) == 4


def test_one_category_and_one_image_folder(folder, tmp_path):
    (folder / "Validation" / "All_QA_Pairs_val.txt").unlink()
    (folder / "Test" / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").unlink()
    (tmp_path / "all").mkdir()
    for name in IMAGES:
        (folder / f"{name}.jpg").rename(tmp_path / "all" / f"{name.split('/')[-1]}.jpg")
    splits = convert(folder, "--category", "plane", "--image-folder", str(tmp_path / "all"))
    assert [row["image"] for row in splits["train"]] == ["synpic1.jpg", "synpic2.jpg"]
    assert read_json(tmp_path / "out" / "manifest.json")["left_out"] == {"question of another category (modality)": 1}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("Training/QAPairsByCategory/C2_Plane_train.txt", "synpic1|a question\n", r"line 1: expected image\|question"),
        ("Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt", "synpic4|age|how old?|9\n", "the category is 'age'"),
        ("Training/QAPairsByCategory/C1_Modality_train.txt", "gone|q?|a\n", r"1 image of 1 record not found .*gone"),
    ],
)
def test_faults_are_named_and_nothing_is_written(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(LlavaError, match=message):
        convert(folder)
    assert not (folder.parent / "out").exists()


def test_categories_need_files_of_categories(folder):
    with pytest.raises(LlavaError, match="says no categories"):
        convert(folder, "--category", "plane")
    with pytest.raises(LlavaError, match="holds neither"):
        convert(folder / "Training" / "Train_images")
