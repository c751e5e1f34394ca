"""Score responses in GSM8K's format: a chain of thought that ends in `#### N`.

Standard library only, because verl loads this module by name in every reward worker.

The table shows what is read as one number and what is not. A number is read completely or not at all: the beginning of
a longer number, of an expression or of a list is never used as the answer.

| written                                             | read as                                                      |
|-----------------------------------------------------|--------------------------------------------------------------|
| `72` `72.0` `072` `.5` `+72` `1e3` `1.5E-2`         | that number (an exponent of up to three digits)              |
| `1,000` `1 000` `1'000` (no-break and thin spaces)  | 1000: groups of three behind 1 to 3 digits, one separator    |
| `-5` and U+2212, hyphens, en dash, full-width minus | -5                                                           |
| `$5` `€ 5` `US$5` `EUR 5` `-$5` `$-5` `5 €` `5 USD` | the number: the currency does not count                      |
| `72.` `**72**` `"72"` `$72$` `72)` `72 clips` `72kg`| 72: closing marks, bold, quotes, units and words do not count|
| `50%`                                               | 50, not 0.5                                                  |
| `72 = 70 + 2`                                       | 72                                                           |
| `1/2` `2 1/2` `2½` `10²` `2^3` `2*3` `5-7` `7:30`   | no number: nothing is calculated                             |
| `1,2` `1.234.567` `1.234,5` `1,00,000` `0,123`      | no number: not in groups of three, or not one separator      |
| `1 2 3` `5, 6` `5 or 6` `5 to 6`                    | no number: several                                           |
| `3 million` `5 dozen` `5k` `2 and a half` `3.33...` | no number: more than its digits                              |
| `(72)`                                              | no number: accountants write -72 like this                   |
| `\\boxed{72}` `1{,}000` `\\frac{1}{2}`              | no number: LaTeX is not interpreted                          |
| `seven` `NaN` `0x1F`, digits of other scripts       | no number                                                    |

The rule for the whole text (`flexible`) uses the last number in it, and finds none if the last digits belong to
something that is not a number.
"""

import re
from decimal import Decimal
from numbers import Integral, Real

from verl_aqn.errors import ConfigError, DataError

_CURRENCY = (
    r"(?:(?<![^\W\d_])(?:(?:US|AU?|CA?|HK|NZ|S|R)\$|USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|NZD|HKD|SGD|KRW|BRL|MXN"
    r"|SEK|NOK|DKK|PLN|Rs\.?)|[$¢-¥฿₠-⃏＄￡￥])"
)
# A sign counts only if no word, number or bracket precedes it (7-3 is a difference). `*+` and `++` do not backtrack, so
# that a long text of digits and commas is read in one pass.
_NUMBER = re.compile(
    rf"(?:(?<![\w.)\]}}])(?P<sign>[-+]))?(?:{_CURRENCY} ?(?P<inner>[-+])?)?"
    r"(?P<digits>(?:[1-9][0-9]{0,2}(?P<mark>[, '’])[0-9]{3}(?![0-9])(?:(?P=mark)[0-9]{3}(?![0-9]))*+|[0-9]++)"
    r"(?:\.[0-9]++)?|\.[0-9]++)(?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
_TRUTH = re.compile(rf"{_NUMBER.pattern}(?: ?{_CURRENCY})?")
# Marks, signs and the letters x and e (times, exponent): if they lead to a digit, number and digit belong together. The
# same is true for a bracket without a space before it; the text after "72 (" is a remark.
_BETWEEN = re.compile(rf"(?:[\s.,;:'\"’”»`´_*/^+~%‰)\]}}×÷·⁄∕—xXeE-]|(?<!\s)\(|{_CURRENCY})*+")
_GOES_ON = re.compile(
    r"\.{2,}|…"  # 3.33...
    r"|\{|\s*+\\(?![)\]$%\\]|text|mathrm)"  # LaTeX's
    r"|\s*+[-+*/×÷^:]\s*+[(\\]|\^"  # an expression
    r"|[^\W\d_]+[0-9]|[eE][-+]?(?![^\W\d_])|(?<=0)[xX][0-9a-fA-F]"  # 5h30, 1e, 0xFF
    rf"|\s*+,?\s*+(?i:or|and|to|by|over|of|out of|point|plus|minus|times|through)\s++[-+]?{_CURRENCY}? ?[0-9.]"
    r"|\s++(?i:and\s++(?:a|an|one|two|three)[\s-]++(?:half|third|quarter|fourth|fifth))"
    r"|[\s-]*+(?i:hundred|thousand|million|billion|trillion|dozen|lakh|crore|mln|mio|bn|tn)s?\b|[kKMB](?![^\W\d_])"
)
# Text before digits that are only the end of something else.
_BEGAN = re.compile(
    r"(?:[0-9][.,'’_:]|[0-9]\s*[/÷⁄∕]\s*|[0-9]\*\*|\^\s*[{(]?|\}\s*\{\s*|[0-9][^\W\d_]+|[0-9][eE][-+]|\\[,;:! ]|\{,\})$"
)
_OPENING = re.compile(r"\*{1,3}|__?|[\"'“‘«`]|")
_MARK = "#### "
_DASHES = "\N{MINUS SIGN}\N{EN DASH}\N{FIGURE DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{SMALL HYPHEN-MINUS}\uff0d\ufe58"
_SPACES = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}\N{FIGURE SPACE}\N{HAIR SPACE}\N{PUNCTUATION SPACE}"
_UNSEEN = "\u200b\u200c\u200d\u200e\u200f\u202a\u202c\u2060\u2066\u2067\u2068\u2069\ufeff"
_PLAIN = str.maketrans({**dict.fromkeys(_DASHES, "-"), **dict.fromkeys(_SPACES, " "), **dict.fromkeys(_UNSEEN, "")})


def score(text: str, answer: object, method: str = "strict") -> float:
    """Return 1.0 if the number in `text` equals `answer` (72.0 equals 72), else 0.0.

    `strict` uses the number directly after the last "#### ", on the same line. `flexible` uses the last number in the
    text. The table above defines what is read as a number.

    Raises:
        DataError: `answer` is not a number.
        ConfigError: `method` is neither of the two.
    """
    if method not in ("strict", "flexible"):
        raise ConfigError(f"score: method={method!r} is not known: use 'strict' or 'flexible'")
    truth = number(answer)
    if truth is None:
        raise DataError(f"score: ground truth {answer!r} is not a number: prepare the data again")
    given = _marked_number(text) if method == "strict" else _last_number(text)
    return float(given is not None and given == truth)


def compute_score(
    data_source: str, solution_str: str, ground_truth: object, extra_info: dict | None = None, **kwargs: object
) -> dict[str, float]:
    """Return both scores of one response, as verl's `custom_reward_function`; the reward of the run is the strict one.

    `acc` repeats the reward because DAPO's group filtering and verl's validation look for that name, and because the
    dapo reward manager adds its overlong penalty only to the reward. The other arguments are passed by verl and not
    used.
    """
    strict = score(solution_str, ground_truth)
    return {"score": strict, "acc": strict, "flexible": score(solution_str, ground_truth, "flexible")}


def number(answer: object) -> Decimal | None:
    """Return a ground truth as a number: an int, a float, a Decimal, or a text that is a number as a whole.

    Returns None for anything else, such as a text that contains a number among other things, NaN, a bool, or nothing.
    """
    if isinstance(answer, Real | Decimal) and not isinstance(answer, bool):
        exact = answer if isinstance(answer, Decimal) else None
        exact = exact or Decimal(int(answer) if isinstance(answer, Integral) else repr(float(answer)))
        return exact if exact.is_finite() else None
    match = _TRUTH.fullmatch(_plain(answer).strip()) if isinstance(answer, str) else None
    return _value(match) if match else None


def _marked_number(text: str) -> Decimal | None:
    _, mark, rest = _plain(text).rpartition(_MARK)
    line = rest.partition("\n")[0].strip()
    opening = _OPENING.match(line)
    match = _NUMBER.match(line, opening.end()) if mark and opening else None
    if not match or not opening:
        return None
    end = match.end()
    if opening[0] and line.startswith(opening[0], end):
        end += len(opening[0])
    return None if _goes_on(line, match.end()) or _goes_on(line, end) else _value(match)


def _last_number(text: str) -> Decimal | None:
    text, match = _plain(text), None
    for match in _NUMBER.finditer(text):  # noqa: B007  the last
        pass
    if match is None or _goes_on(text, match.end()):
        return None
    before = text[max(0, match.start() - 32) : match.start()]
    return None if before[-1:].isnumeric() or _BEGAN.search(before) else _value(match)


def _goes_on(text: str, end: int) -> bool:
    """Return whether the text after `end` makes the number that ends there a part of something larger."""
    between = _BETWEEN.match(text, end)
    after = between.end() if between else end
    return text[after : after + 1].isnumeric() or _GOES_ON.match(text, end) is not None


def _plain(text: str) -> str:
    return text if text.isascii() else text.translate(_PLAIN)


def _value(match: re.Match[str]) -> Decimal | None:
    sign, inner = match["sign"], match["inner"]
    if sign and inner:
        return None
    digits = match["digits"].replace(match["mark"], "") if match["mark"] else match["digits"]
    value = Decimal(digits + (match["exponent"] or ""))
    return value.copy_negate() if "-" in (sign, inner) else value
