"""The scorer against hand-labelled responses."""

import inspect
import re
import time
from decimal import Decimal, InvalidOperation

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from verl_aqn.errors import ConfigError, DataError
from verl_aqn.tasks.gsm8k import compute_score, number, score

# text, ground truth, strict, flexible
LABELLED = [
    ("3 + 4 = 7\n#### 7", "7", 1, 1),
    ("#### 72", "72", 1, 1),
    ("#### 72\n", "72", 1, 1),
    ("#### 72.", "72", 1, 1),
    ("#### 72.0", "72", 1, 1),
    ("#### 72", "72.0", 1, 1),
    ("#### 72.00 dollars", "72", 1, 1),
    ("#### 072", "72", 1, 1),
    ("#### 0.5", "0.5", 1, 1),
    ("#### .5", "0.5", 1, 1),
    ("#### 0.50", ".5", 1, 1),
    ("#### 0.05", "0.5", 0, 0),
    ("#### 5", "0.5", 0, 0),
    ("#### 1,234", "1234", 1, 1),
    ("#### 1234", "1,234", 1, 1),
    ("#### 1,234,567.5", "1234567.5", 1, 1),
    ("#### 1,2", "12", 0, 0),  # two numbers, not a thousands separator
    ("#### 5, as asked", "5", 1, 1),
    ("#### $72", "72", 1, 1),
    ("#### $1,200.50", "1200.5", 1, 1),
    ("#### -$5", "-5", 1, 1),
    ("#### $-5", "-5", 1, 1),
    ("#### $72$", "72", 1, 1),
    ("#### 50%", "50", 1, 1),
    ("#### 50%", "0.5", 0, 0),
    ("#### 72kg", "72", 1, 1),
    ("#### 72 clips", "72", 1, 1),
    ("#### 72-hour", "72", 1, 1),
    ("#### 72 clips in 3 days", "72", 1, 0),
    ("#### -3", "-3", 1, 1),
    ("#### \N{MINUS SIGN}3", "-3", 1, 1),
    ("#### 3", "-3", 0, 0),
    ("#### -3", "3", 0, 0),
    ("#### 5\nNo, wait.\n#### 7", "7", 1, 1),
    ("#### 7\nNo, wait.\n#### 5", "7", 0, 0),
    ("#### 7\n#### none", "7", 0, 1),
    ("####    7", "7", 1, 1),
    ("####7", "7", 0, 1),
    ("### 7", "7", 0, 1),
    ("##### 7", "7", 1, 1),
    ("#### \n7", "7", 0, 1),
    ("#### The answer is 7", "7", 0, 1),
    ("The answer is 7", "7", 0, 1),
    ("The answer is 7. It took 2 steps", "7", 0, 0),
    ("#### \\boxed{7}", "7", 0, 1),
    ("\\boxed{7}", "7", 0, 1),
    ("#### **7**", "7", 1, 1),
    ("#### **7** (clips)", "7", 1, 1),
    ("#### *7*", "7", 1, 1),
    ('#### "7"', "7", 1, 1),
    ("#### “7”", "7", 1, 1),
    ("#### 7)", "7", 1, 1),
    ("#### (7)", "7", 0, 1),  # accountants write -7 so
    ("#### (7)", "-7", 0, 0),
    ("#### 7 (3 a day)", "7", 1, 0),
    ("#### 7(3)", "7", 0, 0),
    ("#### €72", "72", 1, 1),
    ("#### 72 €", "72", 1, 1),
    ("#### £ 72", "72", 1, 1),
    ("#### ¥1,200", "1200", 1, 1),
    ("#### ₹72", "72", 1, 1),
    ("#### Rs. 72", "72", 1, 1),
    ("#### USD 72", "72", 1, 1),
    ("#### US$72", "72", 1, 1),
    ("#### 72 USD", "72", 1, 1),
    ("#### €72.50", "72", 0, 0),
    ("#### 72 € 50", "72", 0, 0),
    ("#### €-5", "-5", 1, 1),
    ("#### -USD 5", "-5", 1, 1),
    ("#### -$-5", "5", 0, 0),
    ("#### +5", "5", 1, 1),
    ("#### 1 000", "1000", 1, 1),
    ("#### 1 000", "1", 0, 0),
    ("#### 1\N{NO-BREAK SPACE}000\N{NARROW NO-BREAK SPACE}000", "1000000", 1, 1),
    ("#### 1\N{THIN SPACE}000", "1", 0, 0),
    ("####\N{NO-BREAK SPACE}7", "7", 1, 1),
    ("#### 1'000", "1000", 1, 1),
    ("#### 1,000 000", "1", 0, 0),  # two kinds of separators
    ("#### 1,000 000", "1000", 0, 0),
    ("#### 1 00", "1", 0, 0),
    ("#### 1,00,000", "1", 0, 0),
    ("#### 1_000", "1", 0, 0),
    ("#### 0,123", "123", 0, 0),
    ("#### 0,123", "0", 0, 0),
    ("#### 1.234.567", "1.234", 0, 0),
    ("#### 1.234,5", "1.234", 0, 0),
    ("#### 1,234.5.6", "1234.5", 0, 0),
    ("#### 1e3", "1000", 1, 1),
    ("#### 1e3", "1", 0, 0),
    ("#### 1.5E-2", "0.015", 1, 1),
    ("#### 0.00001", "1e-05", 1, 1),
    ("#### 1e1000", "1", 0, 0),
    ("#### 1e", "1", 0, 0),
    ("#### 2 1/2", "2", 0, 0),
    ("#### 2 1/2", "2.5", 0, 0),  # expressions are not evaluated
    ("#### 1/2", "2", 0, 0),
    ("#### 2½", "2", 0, 0),
    ("#### 2 ½", "2", 0, 0),
    ("#### 2 and a half", "2", 0, 0),
    ("#### 2 and 1/2", "2", 0, 0),
    ("#### 10²", "10", 0, 0),
    ("#### 10^{2}", "10", 0, 0),
    ("#### 2**3", "2", 0, 0),
    ("#### 2 x 3", "2", 0, 0),
    ("#### 3 million", "3", 0, 0),
    ("#### 5k", "5", 0, 0),
    ("#### 3.33...", "3.33", 0, 0),
    ("#### 3.33…", "3.33", 0, 0),
    ("#### 5, 6", "5", 0, 0),
    ("#### 5 or 6", "5", 0, 0),
    ("#### 5 to 6", "5", 0, 0),
    ("#### 5h30", "5", 0, 0),
    ("#### 5'6\"", "5", 0, 0),
    ("#### 0x1F", "0", 0, 0),
    ("#### 0xFF", "0", 0, 0),
    ("#### 7٧", "7", 0, 0),
    ("#### 1{,}000", "1", 0, 0),
    ("#### 1\\,000", "1", 0, 0),
    ("#### 7\\frac{1}{2}", "7", 0, 0),
    ("#### 72\\%", "72", 1, 1),
    ("at 7:30", "30", 0, 0),
    ("it is \\frac{7}{2}", "2", 0, 0),
    ("it is 7/2", "2", 0, 0),
    ("it is 1.234.567", "0.567", 0, 0),
    ("it is 1,2", "2", 0, 0),
    ("it is x^2", "2", 0, 0),
    ("#### seven", "7", 0, 0),
    ("#### 72/2", "72", 0, 0),
    ("#### 3 + 4 = 7", "3", 0, 0),
    ("#### 3 + 4 = 7", "7", 0, 1),
    ("#### 7 = 3 + 4", "7", 1, 0),
    ("#### 10-12", "10", 0, 0),
    ("10-12", "12", 0, 1),
    ("10 - 12", "12", 0, 1),
    ("= -2", "-2", 0, 1),
    ("#### 7:30", "7", 0, 0),
    ("#### __import__('os').getpid()", "7", 0, 0),
    ("#### NaN", "7", 0, 0),
    ("#### Infinity", "7", 0, 0),
    ("#### ٧", "7", 0, 0),  # digits of another script
    ("#### " + "7" * 5000, "7", 0, 0),
    ("#### 1 2 3 4 5 6 7", "7", 0, 1),
    ("", "7", 0, 0),
    ("#### ", "7", 0, 0),
    ("####", "7", 0, 0),
]


@pytest.mark.parametrize(("text", "truth", "strict", "flexible"), LABELLED)
def test_labelled_answers(text, truth, strict, flexible):
    assert (score(text, truth), score(text, truth, "flexible")) == (strict, flexible)


@given(st.text() | st.text(alphabet="#0123456789 .,-$%\n/e"), st.sampled_from(["strict", "flexible"]))
def test_any_text_scores_0_or_1(text, method):
    assert score(text, "7", method) in (0.0, 1.0)
    assert score("#### " + text, "7", method) in (0.0, 1.0)


VALUES = st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9)
# As people write numbers: sign, currency before or after, thousands separator, and surrounding text.
MINUSES = "-", "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NON-BREAKING HYPHEN}", "\uff0d"
BEFORE = "", "$", "€", "£", "¥", "₹", "$ ", "USD ", "EUR\N{NO-BREAK SPACE}", "US$", "Rs. "
SEPARATORS = "", ",", " ", "\N{NO-BREAK SPACE}", "\N{NARROW NO-BREAK SPACE}", "\N{THIN SPACE}", "'", "’"
AROUND = ("", ""), ("", "."), ("**", "**"), ("**", "**."), ('"', '"'), ("“", "”"), ("", " €"), ("", " USD"), ("", "%")
AROUND += ("", "kg"), ("", " clips"), ("", "-hour"), ("", ", as asked"), ("", ")"), ("", " (in all)"), ("", "\n")


@given(VALUES, *map(st.sampled_from, (MINUSES, BEFORE, SEPARATORS, AROUND)), st.booleans())
def test_a_number_is_itself_in_every_formatting(value, minus, currency, separator, around, sign_first):
    digits = f"{abs(value):,f}".replace(",", separator)
    sign = minus if value < 0 else ""
    text = sign + currency + digits if sign_first else currency + sign + digits
    for method in ("strict", "flexible"):
        assert score(f"so\n#### {around[0]}{text}{around[1]}", f"{value:f}", method) == 1.0
    assert number(text) == value
    assert score(f"#### {text}", float(value)) == 1.0


GROUPED = re.compile(r"[1-9][0-9]{0,2}([, '])[0-9]{3}(?:\1[0-9]{3})*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?")


def understood(text):
    """Return the value of a text of digits and marks by rules that are independent of the scorer; None: no number."""
    if match := GROUPED.fullmatch(text.strip()):
        text = text.replace(match[1], "")
    try:
        return Decimal(text.strip()) if "_" not in text else None
    except InvalidOperation:
        return None


@given(
    st.from_regex(r"(?:[0-9]{1,4}|[1-9][0-9]{0,2},[0-9]{3})(?:\.[0-9]{1,2})?", fullmatch=True),
    st.text(alphabet="0123456789.,'’_/:;^*+-–×÷·⁄%½²eExX(\"$€ \N{NO-BREAK SPACE}", min_size=1, max_size=8),
    st.sampled_from([*"0123456789½²", "½"]),
)
@settings(max_examples=2000)
def test_the_beginning_of_a_number_is_never_the_number(begin, more, last):
    whole = (begin + more + last).replace("\N{NO-BREAK SPACE}", " ").replace("–", "-")
    assume(" (" not in whole)  # a remark, as in "72 (3 a day)"
    assume(understood(whole.replace("’", "'")) != number(begin))
    assert score(f"#### {begin}{more}{last}", begin) == 0.0


def test_a_long_negative_number_keeps_its_last_digit():
    long = "-123456789012345678901234567890123456789"
    assert score(f"#### {long}", long) == 1.0
    assert score(f"#### {long}", long[:-1] + "8") == 0.0


@pytest.mark.parametrize(
    "text",
    ["1" + ",111" * 8000 + "1", "1" * 32000, "," * 32000, "#### 1" + ",111" * 8000 + "1", "#### 7" + " " * 32000 + ", ",
     "#### 7" + "*" * 32000, "#### 7" + " - " * 11000, "-$" * 16000, "7e" * 16000, " and" * 8000, "7" + "x" * 32000,
     "#### 7" + "\\" * 32000, "#### 7" + " ," * 16000, "US$ " * 8000],
    ids=lambda text: text[:16],
)  # fmt: skip
def test_a_text_that_is_written_to_hold_the_scorer_up_takes_no_time(text):
    began = time.process_time()
    compute_score("", text, "7")
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    ("truth", "value"),
    [(7, "7"), (-7, "-7"), (7.5, "7.5"), (1e-05, "0.00001"), ("1e-05", "0.00001"), (np.int64(7), "7"),
     ("1,234", "1234"), (np.float64(0.1), "0.1"), (Decimal("7.50"), "7.5"), ("$5", "5"), (" 72 ", "72"), (0, "0"),
     (10**30, "1" + "0" * 30)],
)  # fmt: skip
def test_truths_that_are_numbers(truth, value):
    assert number(truth) == Decimal(value)
    assert compute_score("", f"#### {value}", truth)["acc"] == 1.0


@pytest.mark.parametrize(
    "truth",
    ["3/4", "7:30", "(3, 4)", "3, 4", "\\frac{3}{4}", "\\boxed{7}", "72 clips", "#### 72", "72%", "", " ", None,
     "seven", "NaN", float("nan"), float("inf"), True, "7 or 8", "2 1/2", "1,2", [7], {"a": 7}, b"7",
     "٧", "1_000", "1e1000"],
)  # fmt: skip
def test_truths_that_are_none(truth):
    assert number(truth) is None
    with pytest.raises(DataError, match="is not a number"):
        score("#### 4", truth)


def test_an_unknown_method_is_an_error():
    with pytest.raises(ConfigError, match="'strict' or 'flexible'"):
        score("#### 7", "7", "loose")


def test_what_verl_is_given():
    result = compute_score("openai/gsm8k", "the answer is 7", "7", extra_info={"index": 0}, reward_router_address="x")
    assert result == {"score": 0.0, "acc": 0.0, "flexible": 1.0}
    assert compute_score(data_source="s", solution_str="#### 7", ground_truth="7", extra_info=None)["score"] == 1.0
    assert list(inspect.signature(compute_score).parameters)[:4] == [
        "data_source",
        "solution_str",
        "ground_truth",
        "extra_info",
    ]
