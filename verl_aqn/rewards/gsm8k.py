"""Right or wrong, for answers in GSM8K's form: a chain of thought that ends in `#### N`.

Standard library only: verl loads this module by its name in every reward worker.
"""

import re
from decimal import Decimal

from verl_aqn.errors import ConfigError, DataError

# One number: thousands in groups of three or plain digits, decimals. A minus counts only where no word, number or
# bracket stands before it (7-3 is a difference). Possessive `++` and `(?>` keep a rejected number from being cut short.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?((?>[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)")
# What follows makes the number a part of something else: an expression, a fraction, a range, a time of day.
_GOES_ON = re.compile(r"\s*[-+*/×÷^:]\s*\$?[0-9(]")
_MARK = "#### "


def score(text: str, answer: str, method: str = "strict") -> float:
    """1.0 where the number that `text` gives equals `answer` (72.0 equals 72), else 0.0.

    `strict` takes the number right behind the last "#### ", on the same line; a currency sign before it and units or
    words after it are ignored, "#### 72/2" is not a number. `flexible` takes the last number in the text. LaTeX is not
    interpreted: "#### \\boxed{72}" is wrong by the strict rule.

    Raises:
        DataError: `answer` holds no number.
        ConfigError: `method` is neither.
    """
    if method not in ("strict", "flexible"):
        raise ConfigError(f"score: method={method!r} is not known: use 'strict' or 'flexible'")
    truth = _last_number(answer)
    if truth is None:
        raise DataError(f"score: ground truth {answer!r} holds no number: prepare the data again")
    given = _marked_number(text) if method == "strict" else _last_number(text)
    return float(given is not None and given == truth)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs: object
) -> dict[str, float]:
    """verl's `custom_reward_function`: both scores of one answer; the reward of the run is the strict one.

    `acc` repeats the reward because DAPO's group filtering and verl's validation look for that name, and because the
    dapo reward manager adds its overlong penalty to the reward only. The other arguments are verl's and not used.
    """
    strict = score(solution_str, ground_truth)
    return {"score": strict, "acc": strict, "flexible": score(solution_str, ground_truth, "flexible")}


def number(answer: str) -> Decimal | None:
    """The number that `answer` is, or None where it is anything else, such as a text that holds one."""
    match = _NUMBER.fullmatch(_plain(answer.strip()))
    return _value(match) if match else None


def _marked_number(text: str) -> Decimal | None:
    _, mark, rest = _plain(text).rpartition(_MARK)
    line = rest.partition("\n")[0].strip()
    match = _NUMBER.match(line) if mark else None
    if match is None or _GOES_ON.match(line, match.end()):
        return None
    return _value(match)


def _last_number(text: str) -> Decimal | None:
    matches = list(_NUMBER.finditer(_plain(text)))
    return _value(matches[-1]) if matches else None


def _plain(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-").replace("$-", "-$")


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match[1].replace(",", ""))
    return -value if match[0].startswith("-") else value
