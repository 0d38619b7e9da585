"""Metrics: what the strict set counts and the published one doesn't, and the other way round."""

import re
from collections import Counter
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.eval.metrics import OPEN, Answer, normalize_word, paper_item, paper_summary, strict_item, strict_words
from llava.eval.metrics.calibration import calibrate
from llava.eval.metrics.chrf import open_chrf
from llava.eval.metrics.intervals import bootstrap_interval, compare_paired, mcnemar, share_interval, wilson_interval
from llava.eval.metrics.paper import Candidates
from llava.eval.metrics.registry import all_metrics
from llava.eval.metrics.strict import question_options
from llava.eval.reports.compare import comparison_cells, turned


def test_a_repeated_word_counts_once_in_strict_recall():
    assert paper_item("lung lung lung", "left lung").recall == 0.75
    assert strict_item("lung lung lung", "left lung").recall == 0.5


def test_no_inside_normal_is_not_no():
    assert paper_item("the heart is normal", "no").contained == 1
    assert strict_item("the heart is normal", "no").correct == 0


@pytest.mark.parametrize("reference", ["yes", "no"])
def test_an_answer_with_yes_and_no_is_undecided(reference):
    assert paper_item("yes and no", reference).contained == 1
    item = strict_item("yes and no", reference)
    assert (item.correct, item.polarity) == (0, "both")


def test_a_sentence_that_says_no_is_no():
    assert strict_item("No, there is no effusion.", "no").correct == 1
    assert strict_item("No, there is no effusion.", "yes").correct == 0
    assert strict_item("There might be.", "yes").correct == 0


def test_closed_answers_other_than_yes_and_no_are_whole_words():
    question = "Left or right? Please choose from the following two options: [left, right]"
    assert strict_item("It is on the left.", "left", question).correct == 1
    assert strict_item("left and right", "left", question).correct == 0
    assert strict_item("cleft", "left").correct == 0
    assert strict_item("pa view", "PA").correct == 1


def test_an_option_that_is_part_of_the_right_one_does_not_count_against_it():
    question = "Please choose from the following two options: [lobe, upper lobe]"
    assert strict_item("upper lobe", "upper lobe", question).correct == 1


_PIECES = (
    "Choose from the following ",
    "two options:",
    "options: ",
    "choose from the following options:\n[",
    "[",
    "]",
    ", a",
)


@given(st.lists(st.sampled_from(_PIECES)))
def test_options_are_those_of_the_first_list_that_has_an_end(parts):
    text = "".join(parts)
    match = re.search(r"choose from the following(?: \w+)? options:\s*\[([^\]]*)\]", text, re.IGNORECASE)
    assert question_options(text) == ([strict_words(one) for one in match.group(1).split(",")] if match else [])


@pytest.mark.timeout(60)
def test_many_lists_of_options_without_an_end_take_time_by_their_number():
    assert question_options("choose from the following options:[" * 100_000) == []


def test_precision_counts_a_word_as_often_as_the_reference_has_it():
    item = strict_item("lung lung lung", "left lung")
    assert item.precision == pytest.approx(1 / 3)
    assert item.f1 == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))


def test_a_reference_of_marks_alone_is_compared_as_it_stands():
    assert strict_item("+", "+").recall == 1
    assert strict_item("-", "+").recall == 0


def test_strict_words_keep_decimals_and_join_thousands():
    assert strict_words("The 3.5 cm x-ray, of 1,000 (one) doesnt’t") == [
        "3.5",
        "cm",
        "x",
        "ray",
        "of",
        "1000",
        "1",
        "doesnt't",
    ]
    assert strict_words("It doesnt.") == ["it", "doesn't"]


def test_strict_words_of_scripts_without_blanks_are_characters():
    assert strict_words("CT显示3.5厘米的结节") == ["ct", "显", "示", "3.5", "厘", "米", "的", "结", "节"]
    assert strict_words("폐 결절, naïve") == ["폐", "결절", "naïve"]


@pytest.mark.parametrize(("said", "right"), [("有", 1), ("有的", 1), ("没有", 0), ("有没有", 0), ("无", 0)])
def test_a_denied_chinese_word_is_not_said(said, right):
    assert strict_item(said, "有").correct == right


def test_only_the_first_32_periods_go_in_paper():
    text = " ".join(["a.b."] * 20)
    assert normalize_word(text).count(".") == 40 - 32
    assert strict_words(text).count("b") == 20


def test_no_closed_question_gives_no_closed_number():
    numbers = paper_summary([paper_item("left", "left")], ["OPEN"])
    assert numbers["yes/no accuracy"] is None and numbers["recall"] == 100


@given(st.text(max_size=60), st.text(max_size=60))
def test_scores_are_fractions(prediction, reference):
    paper, strict = paper_item(prediction, reference), strict_item(prediction, reference)
    for value in (paper.recall, paper.precision, paper.f1, strict.recall, strict.precision, strict.f1):
        assert 0 <= value <= 1
    assert strict.exact <= strict.recall


@given(st.text(min_size=1, max_size=60))
def test_the_reference_itself_is_right(text):
    item = strict_item(text, text)
    assert item.recall == item.precision == item.exact == 1


def test_chrf_is_sacrebleus_and_knows_no_case():
    def score(prediction, reference):
        return open_chrf(Answer(prediction, reference, OPEN))

    assert score("Left lung", "left lung") == 1 and score("", "left lung") == score("xyz", "abd") == 0
    # Letters alone: 1 of 3 and of 2 is right; the two counts weigh 1 and 4 (beta is 2), longer n-grams find nothing.
    assert score("abc", "ax") == pytest.approx(5 / (3 + 4 * 2) / 2)
    assert score("cardiomegalie", "cardiomegaly") > 0.8 > strict_item("cardiomegalie", "cardiomegaly").recall


def test_interval_holds_the_mean_and_narrows_with_more_questions():
    few = bootstrap_interval([0.0, 1.0] * 10)
    many = bootstrap_interval([0.0, 1.0] * 1000)
    assert few[0] < 0.5 < few[1] and many[1] - many[0] < few[1] - few[0]
    # A mean of 2000 coin flips has a standard error of 0.0112.
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.0112, rel=0.05)


def test_interval_of_none_or_all_right_is_wilsons():
    """By hand for 13: z²/(13 + z²) with z = 1.96 is 22.8 %."""
    assert share_interval([0.0] * 13) == pytest.approx((0.0, 0.2281), abs=1e-4)
    assert share_interval([1.0] * 13) == pytest.approx((0.7719, 1.0), abs=1e-4)
    assert share_interval([0.0] * 26, [n // 2 for n in range(26)]) == share_interval([0.0] * 13)
    assert share_interval([0.0, 1.0] * 10) == bootstrap_interval([0.0, 1.0] * 10)
    assert bootstrap_interval([1.0] * 13) == (1.0, 1.0)
    assert wilson_interval(5, 20) == pytest.approx((0.1119, 0.4687), abs=1e-4)


def test_interval_of_clusters_is_wider_when_a_image_decides_all_its_questions():
    values = [float(image % 2) for image in range(40) for _ in range(10)]
    clusters = [image for image in range(40) for _ in range(10)]
    alone, together = bootstrap_interval(values), bootstrap_interval(values, clusters)
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


def test_interval_leaves_out_what_does_not_count():
    assert share_interval([None, 1.0, None, 1.0]) == wilson_interval(2, 2)
    assert bootstrap_interval([None]) is None


def test_a_single_question_or_image_gives_no_interval():
    assert bootstrap_interval([0.4]) is bootstrap_interval([0.4, None]) is share_interval([0.4]) is None
    assert bootstrap_interval([0.0, 1.0], ["a", "a"]) is share_interval([0.0, 1.0], ["a", "a"]) is None
    assert share_interval([1.0]) == wilson_interval(1, 1)
    found = compare_paired([0.0, None], [1.0, 1.0])
    assert (found.difference, found.low, found.high, found.p_value) == (1.0, None, None, None)
    assert (found.only_second, found.mcnemar_p) == (1, 1.0)
    back = turned(found)
    assert (back.difference, back.low, back.high) == (-1.0, None, None)
    cells = comparison_cells(next(metric for metric in all_metrics() if metric.scale == 100), found)
    assert cells == ["0.00", "100.00", "+100.00", "-"]


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(5, 5) == 1
    assert mcnemar(30_000, 30_000) == 1  # each of the numbers computed anew would take hours
    assert mcnemar(900, 1000) == 2 * sum(comb(1900, count) for count in range(901)) / 2**1900


@given(st.lists(st.text("abcd ", max_size=9), min_size=1, max_size=9), st.text("abcdx ", max_size=9))
def test_the_nearest_candidate_is_the_first_of_those_most_of_whose_words_are_said(candidates, text):
    def share(words):
        return sum(word in said for word in words) / len(words) if words else 0.0

    said, kept = Counter(normalize_word(text).split()), [Counter(normalize_word(one).split()) for one in candidates]
    assert Candidates(candidates).nearest(said) == max(kept, key=share)


def test_comparison_sees_a_difference_and_its_absence():
    first, second = [0.0] * 40 + [1.0] * 60, [1.0] * 30 + [0.0] * 10 + [1.0] * 60
    better = compare_paired(first, second)
    assert better.difference == pytest.approx(0.3) and better.low > 0
    assert (better.only_first, better.only_second) == (0, 30) and better.mcnemar_p < 1e-6
    same = compare_paired(first, first)
    assert same.difference == 0 and same.p_value == 1 and same.mcnemar_p == 1


def test_calibration_of_a_sure_and_right_model():
    found = calibrate([1.0, 0.0, 1.0, 0.0], [True, False, True, False])
    assert (found.accuracy, found.ece, found.auc, found.brier) == (1, 0, 1, 0)


def test_calibration_error_is_confidence_less_accuracy():
    # Four answers at 0.9, two of them right; one bin.
    found = calibrate([0.9, 0.9, 0.1, 0.1], [True, False, False, True])
    assert found.ece == pytest.approx(0.4) and found.accuracy == 0.5
    assert [(one.count, one.accuracy) for one in found.bins] == [(4, 0.5)]


def test_area_under_the_curve_counts_ties_half():
    assert calibrate([0.5, 0.5, 0.5], [True, False, False]).auc == 0.5
    assert calibrate([0.9, 0.4, 0.4, 0.1], [True, True, False, False]).auc == pytest.approx(3.5 / 4)
    assert calibrate([0.2, 0.3], [True, True]).auc is None
    assert calibrate([], []) is None
