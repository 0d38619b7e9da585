"""Answers as comparable words: the VQA-v2 normalisation with its faults (*paper*), and without them (*strict*).

Both drop articles, restore apostrophes of contractions and write number words as digits.
"""

import re
import unicodedata

PAPER_PERIODS = 32
"""The published code hands `re.UNICODE` (which is 32) to `re.sub` as the count, so only that many periods go."""


def normalize_word(text: str) -> str:
    """Lower case, punctuation, articles, contractions, number words, as the published metric code has them.

    Two of its habits are kept because the published numbers depend on them: a mark is deleted where it stands
    next to a blank anywhere in the text and becomes a blank otherwise ("x-ray" becomes "x ray"), one number
    with a thousands comma makes all marks be deleted; and only the first 32 periods are dropped.
    """
    has_thousands = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_blank or has_thousands else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=PAPER_PERIODS)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    words = [_PAPER_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(words).replace(",", "")


def strict_words(text: str) -> list[str]:
    """The words of an answer: every mark separates, but for decimal points, thousands commas and apostrophes.

    Scripts that are written without blanks (Chinese, Japanese, Thai, Lao, Khmer, Burmese) have a word per character.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    words = [_NUMBERS.get(word, word) for word in _WORD.findall(text)]
    return [_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES]


# Han (with extensions and compatibility forms), kana, Thai and Lao, Burmese, Khmer.
_UNSPACED = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED += "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_LETTER = rf"[^\W_{_UNSPACED}]"
WHOLE_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")
"""Letters, digits and underscores that stand together; in scripts without blanks each character."""
_WORD = re.compile(rf"\d+(?:\.\d+)+|[{_UNSPACED}]|{_LETTER}+(?:'{_LETTER}+)*")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}


def _contractions() -> dict[str, str]:
    """Each contraction by what is left of it when one apostrophe is lost ("couldnt've" means "couldn't've")."""
    table = {}
    for form in _CONTRACTED_FORMS.split():
        for place, letter in enumerate(form):
            if letter == "'":
                table[form[:place] + form[place + 1 :]] = form
    return table


_CONTRACTED_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = _contractions()
# The VQA-v2 table has one entry the wrong way round.
_PAPER_CONTRACTIONS = {key: form for key, form in _CONTRACTIONS.items() if key != "somebodyd"} | {
    "somebody'd": "somebodyd"
}
