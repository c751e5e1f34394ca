"""The scorer against answers labelled by hand."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_aqn.errors import ConfigError, DataError
from verl_aqn.rewards.gsm8k import compute_score, score

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
    ("#### **7**", "7", 0, 1),
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


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_equals_itself_in_every_notation(value):
    assert score(f"so\n#### {value:,f}", f"{value:f}") == 1.0


def test_a_truth_without_number_and_an_unknown_method_are_errors():
    with pytest.raises(DataError, match="prepare the data"):
        score("#### 7", "seven")
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
