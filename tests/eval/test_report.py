"""The report: one page that needs nothing else, with the numbers of run_eval, and the table as Markdown."""

import json
import re
import shutil

import pytest
from PIL import Image

from llava.data import audit
from llava.errors import LlavaError
from llava.eval import report, run_eval, run_eval_batch
from llava.eval.metrics import paper_item, strict_item
from llava.manifests import sha256_of, write_manifest
from llava.pages.printing import BROWSERS
from tests.made_files import made_record, write, yes_no_set


def record(key, question, answer, kind):
    turns = [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": key, "image": f"{key % 3}.png", "conversations": turns, "answer_type": kind, "organ": "AB"[key % 2]}


@pytest.fixture
def files(tmp_path):
    """Questions of a set named as VQA-RAD, answers with images and with grey ones, their images."""
    folder = tmp_path / "vqa_rad"
    folder.mkdir()
    records = [record(i, f"Is <b>{i}</b> there?", "yes" if i % 3 else "no", "CLOSED") for i in range(12)]
    records += [record(i, "Where?", "left lung", "OPEN") for i in range(12, 20)]
    (folder / "test.json").write_text(json.dumps(records))
    (folder / "train.json").write_text(json.dumps([record(1, "Is 1 there?", "yes", "CLOSED")]))
    for index in range(3):
        Image.new("RGB", (40, 30), (80 * index, 10, 10)).save(folder / f"{index}.png")
    for name, words in (("seen", {"CLOSED": "yes", "OPEN": "left lung"}), ("blank", {"CLOSED": "no", "OPEN": "it"})):
        path = folder / f"{name}.jsonl"
        lines = [
            {"question_id": r["id"], "text": words[r["answer_type"]], "metadata": {"p_yes": 0.3 + 0.02 * r["id"]}}
            for r in records
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        ablation = "none" if name == "seen" else "blank"
        questions = {"questions": str(folder / "test.json"), "questions_sha256": sha256_of(folder / "test.json")}
        counts = {"questions": 20, "cut_at_max_new_tokens": 3 if name == "blank" else 0}
        decoding = {"max_new_tokens": 8}
        facts = {"ablate_image": ablation, **questions, "counts": counts, "decoding": decoding}
        write_manifest(path, checkpoint="/models/m", template="v1", **facts)
    return folder


def make(files, *more):
    output = files / "page.html"
    flags = ["--pred", f"m={files / 'seen.jsonl'}", f"m, grey={files / 'blank.jsonl'}", "--output", str(output)]
    report.main([*flags, "--overwrite", "--bootstrap-samples", "200", *more])
    return output.read_text(), (files / "page.md").read_text()


def test_page_holds_every_section_and_fetches_nothing(files):
    audited = files / "audit.json"
    audit.main(["--train", str(files / "train.json"), "--test", str(files / "test.json"), "--output", str(audited)])
    html, _ = make(files, "--image-folder", str(files), "--audit", str(audited))
    for heading in ("Scores", "look at the image", "as sure as", "clean", "kind of question", "Examples", "produced"):
        assert re.search(f"<h2>[^<]*{heading}", html), heading
    assert not re.search(r'(?:src|href)="(?!data:|#)|url\((?!#)', html) and "<script" not in html and "://" not in html
    labels = re.findall('<svg role="img" aria-label="([^"]*)"', html)
    assert len(labels) == html.count("<svg ") == html.count("<figcaption>")
    for start in ("Bars, strict open, in %: m 100.0, m, grey 0.0", "Right answers over confidence, m, in percent: "):
        assert [label for label in labels if label.startswith(start)], start
    assert html.count("<img") == 8  # four right and four wrong answers, each with its image
    assert "data:image/jpeg;base64," in html


def test_that_the_paper_set_finds_words_in_words_is_said_beside_it(files):
    html, _ = make(files)
    notes = [found for found in re.findall("<p[^>]*>(.*?)</p>", html, re.DOTALL) if "published scripts" in found]
    assert any("nodule" in found for found in notes)
    assert paper_item("Yes, there is a nodule.", "no").contained == 1
    assert strict_item("Yes, there is a nodule.", "no").correct == 0


def test_answers_cut_at_the_limit_are_bold(files):
    html, _ = make(files)
    assert re.findall("<strong>(.*?)</strong>", html) == ["m, grey: 3 of 20 answers were cut at the limit of 8 tokens."]


def test_models_are_compared_in_pairs_and_the_direction_is_said(files):
    lines = (files / "seen.jsonl").read_text().splitlines()
    other = files / "other.jsonl"
    other.write_text("\n".join([*lines[:12], *(line.replace("left lung", "heart") for line in lines[12:])]) + "\n")
    html, _ = make(files, "--gt", str(files / "test.json"), "--pred", f"m={files / 'seen.jsonl'}", f"worse={other}")
    section = html.partition("Differences between models</h2>")[2].partition("</section>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>.*?</tr>", section, re.DOTALL)[1:]]
    said = {row[2]: row[-1] for row in rows}
    assert said["strict open"] == "m is better" and said["strict closed"] == "no difference is shown"
    assert next(row for row in rows if row[2] == "strict open")[5].startswith("-100.00 [")


def test_no_model_is_better_where_the_exact_test_shows_nothing(files):
    """Four questions that one alone has right: the interval leaves out 0, McNemar's p is 0.125."""
    lines = (files / "seen.jsonl").read_text().splitlines()
    wrong = [line.replace('"yes"', '"perhaps"') if place in (1, 2, 4, 5) else line for place, line in enumerate(lines)]
    other = files / "few.jsonl"
    other.write_text("\n".join(wrong) + "\n")
    html, _ = make(files, "--gt", str(files / "test.json"), "--pred", f"m={files / 'seen.jsonl'}", f"few={other}")
    assert "the two tests disagree: too few questions" in html and "m is better" not in html
    assert len(set(re.findall('<div class="gallery" id="([^"]*)"', html))) == 2


def test_yes_and_no_are_counted_against_the_reference(files):
    html, _ = make(files)
    section = html.partition("Yes and no</h2>")[2].partition("</section>")[0]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", section)
    assert cells[:7] == ["closed", "8", "0", "0", "0", "4", "0"]  # it says yes to eight of yes and to four of no


def test_the_page_as_a_pdf(files):
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no browser here")
    (files / "page.pdf").write_text("somebody's")
    with pytest.raises(LlavaError, match=r"page\.pdf is there and isn't of this page"):
        report.main(["--pred", f"m={files / 'seen.jsonl'}", "--output", str(files / "page.html"), "--pdf"])
    assert not (files / "page.html").exists()
    make(files, "--pdf")
    assert (files / "page.pdf").read_bytes()[:5] == b"%PDF-"


def test_paths_are_told_as_the_one_that_was_given(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    words = ["--pred", "m=seen.jsonl", "--gt", "test.json", "--bootstrap-samples", "0", "--output", "short.html"]
    printed = any(map(shutil.which, BROWSERS))
    report.main([*words, *(["--pdf"] if printed else [])])
    assert capsys.readouterr().out.split() == ["short.html", "short.md"] + ["short.pdf"] * printed


@pytest.mark.parametrize("flag", ["--bootstrap-samples", "--examples"])
def test_numbers_below_zero_are_refused(files, flag):
    with pytest.raises(LlavaError, match=f"{flag} is -1; give 0 or more"):
        make(files, flag, "-1")


def test_text_of_others_is_escaped(files):
    html, _ = make(files, "--examples", "20")
    assert "Is &lt;b&gt;1&lt;/b&gt; there?" in html and "<b>1</b>" not in html


def test_numbers_are_those_of_run_eval(files, tmp_path):
    output = tmp_path / "out.json"
    run_eval.main(["--gt", str(files / "test.json"), "--pred", str(files / "seen.jsonl"), "--output", str(output)])
    expected = json.loads(output.read_text())["strict"]["closed accuracy"]["value"]
    _, markdown = make(files)
    row = next(line for line in markdown.splitlines() if line.startswith("| m |"))
    assert f"{expected:.2f}" in row.split("|")[7]


def test_published_rows_stand_beside(files):
    _, markdown = make(files)
    assert "| LLaVA-Med from Vicuna | VQA-RAD, published | 179 / 272 | 64.39 | 81.98 |" in markdown


def test_the_drop_without_images_is_shown(files):
    html, _ = make(files)
    rows = re.findall(r"<tr><td>m</td><td>blank</td><td>([^<]*)</td><td class=\"n\">([^<]*)</td>", html)
    assert ("strict open", "100.00") in rows and len(rows) >= 4


def test_without_manifest_the_questions_have_to_be_given(files):
    (files / "seen.jsonl.manifest.json").unlink()
    with pytest.raises(LlavaError, match="no manifest says which questions"):
        make(files)
    assert not (files / "page.html").exists()
    assert make(files, "--gt", str(files / "test.json"))


def test_a_title_candidates_and_the_bootstrap_of_images(files):
    (files / "open.json").write_text(json.dumps({"0": ["left lung"]}))
    html, markdown = make(files, "--title", "My <set>", "--candidate", str(files / "open.json"))
    assert "<title>My &lt;set&gt;</title>" in html and markdown.startswith("# My <set>")
    assert str(files / "open.json") in html or "candidate" in html
    by_image, _ = make(files, "--title", "My <set>", "--bootstrap-unit", "image")
    assert by_image != html


def test_published_rows_stand_beside_their_own_set_alone(tmp_path):
    from llava.eval.reports.evaluation import evaluate
    from llava.eval.reports.published import recognise_dataset
    from llava.eval.reports.sections import Entry

    assert recognise_dataset("/home/vqa_rad/vqa_med/test.json", {"data_set": "vqa-med"}) is None
    (tmp_path / "slake").mkdir()
    gt = write(
        tmp_path / "slake" / "test.json",
        [made_record("1", "a.png", ("是吗?", "是"), language="zh", answer_type="CLOSED")],
    )
    pred = write(tmp_path / "a.jsonl", [{"question_id": "1", "text": "是"}])
    assert Entry("a", evaluate(gt, pred, resamples=0)).dataset is None


def test_the_same_questions_by_two_names_are_compared(tmp_path, monkeypatch):
    from llava.eval.report import main

    gt, pred = yes_no_set(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    flags = ["--gt", gt, "a_test.json", "--bootstrap-samples", "10", "--output", "r.html"]
    main(["--pred", f"x={pred}", f"y={pred}", *flags])
    assert "Differences between models" in (tmp_path / "r.html").read_text()


def test_an_audit_of_one_of_two_sets(tmp_path):
    from llava.data.audit import main as audit
    from llava.eval.report import main

    (gt, pred), (gt_b, pred_b) = yes_no_set(tmp_path, "a"), yes_no_set(tmp_path, "b")
    train = write(tmp_path / "train.json", [made_record("t", "0.png", ("Is it?", "no"))])
    audit(["--train", train, "--test", gt, "--output", str(tmp_path / "audit.json")])
    flags = ["--audit", str(tmp_path / "audit.json"), "--bootstrap-samples", "10", "--output", str(tmp_path / "r.html")]
    main(["--pred", f"x={pred}", f"y={pred_b}", "--gt", gt, gt_b, *flags])
    page = (tmp_path / "r.html").read_text()
    assert "unseen image" in page and "other questions than those of y" in page
    other = ["--pred", pred_b, "--gt", gt_b, "--audit", str(tmp_path / "audit.json")]
    said = []
    for command in (main, run_eval.main):  # where nothing is left to score, both say which audit to make
        with pytest.raises(LlavaError, match="audit is of other questions") as refused:
            command([*other, "--output", str(tmp_path / "none")])
        said.append(str(refused.value))
    assert said[0] == said[1] and gt_b in said[0] and not (tmp_path / "none").exists()


def test_what_is_missing_or_was_changed_is_said_wherever_there_are_scores(files, tmp_path, capsys):
    answers, questions = files / "seen.jsonl", files / "test.json"
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join(lines[:-1]) + "\n")
    questions.write_text(questions.read_text() + "\n")
    words = [
        "the answers were CHANGED after their manifest was written",
        "the questions were CHANGED after they were answered",
        "missing answers: 1, counted as empty answers",
    ]
    html, _ = make(files, "--on-missing", "wrong")
    assert re.findall("<strong>m: (.*?)</strong>", html) == words
    flags = ["--gt", str(questions), "--pred", str(answers), "--on-missing", "wrong", "--bootstrap-samples", "0"]
    run_eval.main([*flags, "--output", str(tmp_path / "o.json")])
    assert [line for line in capsys.readouterr().out.splitlines() if line in words] == words
    assert json.loads((tmp_path / "o.json").read_text())["changed_since_answered"] == ["answers", "questions"]
    run_eval_batch.main([*flags, "--output", str(tmp_path / "all.jsonl")])
    assert [f"{answers}: {line}" for line in words] == capsys.readouterr().out.splitlines()[3:6]


def test_answers_that_a_server_refused_are_said(files, capsys):
    lines = [json.loads(line) for line in (files / "seen.jsonl").read_text().splitlines()]
    lines[0] |= {"text": "", "metadata": {"finish_reason": "content_filter", "refused": "content_filter"}}
    other = write(files / "other.jsonl", lines)
    said = "answers that the server refused to give: 1, scored by the text that came, if any"
    flags = ["--gt", str(files / "test.json")]
    assert f"<strong>m: {said}</strong>" in make(files, "--pred", f"m={other}", *flags)[0]
    capsys.readouterr()
    run_eval.main(["--pred", other, *flags, "--bootstrap-samples", "0"])
    assert said in capsys.readouterr().out.splitlines()


def test_each_answer_file_is_read_once(files, monkeypatch):
    from llava.eval.reports import evaluation

    read, paths = evaluation.read_answers, []
    monkeypatch.setattr(evaluation, "read_answers", lambda path: paths.append(path) or read(path))
    make(files, "--pred", *(f"{name}={files / 'seen.jsonl'}" for name in "abc"))
    assert len(paths) == 3


def test_pairs_say_which_questions_both_answer(files):
    lines = (files / "seen.jsonl").read_text().splitlines()
    (files / "few.jsonl").write_text("\n".join(lines[:15]) + "\n")
    pairs = ["--pred", f"m={files / 'seen.jsonl'}", f"few={files / 'few.jsonl'}", "--gt", str(files / "test.json")]
    html, _ = make(files, *pairs, "--on-missing", "skip")
    section = html.partition("Differences between models</h2>")[2].partition("</section>")[0]
    assert "m and few: compared on the 15 of 20 questions that both answer" in section


def test_a_page_is_not_written_without_its_table(files):
    (files / "notes.md").write_text("mine")
    flags = ["--pred", str(files / "seen.jsonl"), "--bootstrap-samples", "0", "--output"]
    with pytest.raises(LlavaError, match=r"notes\.md is there and holds something else"):
        report.main([*flags, str(files / "notes.html")])
    with pytest.raises(LlavaError, match=r"page\.md: the table goes there; give the page a name that ends in \.html"):
        report.main([*flags, str(files / "page.md")])
    assert not (files / "notes.html").exists() and not (files / "page.md").exists()


def test_files_of_one_name_and_folders_that_are_not_there_are_refused(files):
    for folder in ("a", "b"):
        (files / folder / "run").mkdir(parents=True)
        shutil.copy(files / "seen.jsonl", files / folder / "run" / "answers.jsonl")
    both = [str(files / folder / "run" / "answers.jsonl") for folder in ("a", "b")]
    with pytest.raises(LlavaError, match="--pred: 2 files are called 'run/answers'; give each a name: NAME=FILE"):
        make(files, "--pred", *both, "--gt", str(files / "test.json"))
    with pytest.raises(LlavaError, match="--image-folder is not a folder: none_here"):
        make(files, "--image-folder", "none_here")


def test_without_resamples_no_interval_is_spoken_of(files):
    for samples in ("0", "50"):
        html, _ = make(files, "--pred", f"m={files / 'seen.jsonl'}", "--bootstrap-samples", samples)
        assert ("95 %" in html) == (samples == "50")


def test_multiple_choice_questions_are_examples_too(tmp_path):
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": n, "conversations": turns, "answer_type": "CHOICE", "options": ["lung", "heart"]} for n in range(5)]
    gt = write(tmp_path / "test.json", rows)
    pred = write(tmp_path / "a.jsonl", [{"question_id": n, "text": "AB"[n % 2]} for n in range(5)])
    page = tmp_path / "page.html"
    report.main(["--gt", gt, "--pred", f"m={pred}", "--output", str(page), "--bootstrap-samples", "0"])
    assert "m: 3 wholly right, 2 wholly wrong" in page.read_text()


def test_multiple_choice_questions_are_counted_in_every_table(tmp_path, capsys):
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": n, "conversations": turns, "answer_type": "CHOICE", "options": ["x", "y"]} for n in range(5)]
    gt = write(tmp_path / "test.json", [row | {"modality": "ab"[row["id"] % 2]} for row in rows])
    pred = write(tmp_path / "a.jsonl", [{"question_id": n, "text": "A"} for n in range(5)])
    files = ["--gt", gt, "--bootstrap-samples", "0"]
    train = write(tmp_path / "train.json", [rows[0] | {"image": "a.png"}])
    run_eval.main([*files, "--pred", pred, "--audit", "--train", train])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "0", "0", "3"] in [line[:4] for line in shown] and ["all", "0", "0", "5"] in [
        line[:4] for line in shown
    ]
    run_eval_batch.main([*files, "--pred", pred, "--output", str(tmp_path / "all.jsonl")])
    assert capsys.readouterr().out.splitlines()[0].split()[3:6] == ["open", "closed", "choice"]
    report.main([*files, "--pred", f"m={pred}", "--output", str(tmp_path / "page.html")])
    assert "| m | test | 0 / 0 / 5 |" in (tmp_path / "page.md").read_text()
    assert "choice questions" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ([], "what it holds has to be an object"),
        ({"decoding": "greedy"}, "decoding has to be an object"),
        ({"decoding": {"temperature": "hot"}}, "temperature has to be a number"),
        ({"image_options": ["a"]}, "image_options has to be an object"),
        ({"versions": ["a"]}, "versions has to be an object"),
        ({"questions": 7}, "questions has to be a text"),
        ({"sha256": 5}, "sha256 has to be a text"),
    ],
)
def test_a_manifest_that_was_edited_to_nonsense_is_one_line(files, manifest, words):
    path = files / "seen.jsonl.manifest.json"
    path.write_text(json.dumps(manifest))
    for flags in (["--gt", str(files / "test.json")], []):
        with pytest.raises(LlavaError, match=rf"seen\.jsonl\.manifest\.json: {words}; restore the file, or remove it"):
            make(files, *flags)


def test_a_manifest_may_lack_what_it_usually_says(files):
    path = files / "seen.jsonl.manifest.json"
    path.write_text(json.dumps({"counts": {"cut_at_max_new_tokens": 3}, "decoding": None}))
    html, _ = make(files, "--gt", str(files / "test.json"))
    assert "<strong>m: 3 of 20 answers were cut at the limit of tokens.</strong>" in html
