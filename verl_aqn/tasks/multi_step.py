"""The harder embedded task: generated word problems of two or three steps, in GSM8K's format.

A problem is a sentence of clauses, one for each number, and ends with the steps: "Ann has 3 cups, gets 4 and loses 2.
3 + 4, then - 2?" Its answer has a line for each step. The first sign may be a multiplication, so that the steps always
go from left to right.

SmolLM2-135M-Instruct, calibrated to MXFP4 on one-step problems (`quantize --calibrate embedded`), before training at
temperature 1, problems of two steps: 23 % of 96 training problems (95 % interval 16 to 32 %), and of 96 test problems
with four responses each 10.7 % (8 to 15 %), pass@4 33 %. With the expression in one piece and two examples: 2.6 %.

The two splits have nothing in common but names and things: a test problem is made of clauses, and has an expression,
that no training problem has. One-step problems (`verl_aqn.tasks.word_problems`) are separated by their text alone.
The 384 test problems of two steps have 187 different expressions (6 where both signs are minus), those of three steps
333: intervals over problems take problems with the same expression for independent ones.
"""

import hashlib
import itertools
import random
from pathlib import Path

from verl_aqn.errors import ConfigError
from verl_aqn.tasks.parquet import Message
from verl_aqn.tasks.word_problems import NAMES, THINGS, Problem, check_request, write_problems

STEPS = (2, 3)
_LARGEST = 99  # of a result

# Clauses by sign and split. The first clause says the first number, or the first two if the first sign is *.
_FIRST = {
    "train": ("{name} has {n} {things}", "{name} buys {n} {things}", "{name} finds {n} {things}"),
    "test": ("{name} starts with {n} {things}", "{name} keeps {n} {things}"),
}
_FIRST_TIMES = {
    "train": ("{name} has {n} bags of {m} {things}", "{name} buys {n} sets of {m} {things}"),
    "test": ("{name} fills {n} boxes with {m} {things}", "{name} takes {n} rows of {m} {things}"),
}
_NEXT = {
    "+": {"train": ("gets {n}", "finds {n}", "buys {n} more"), "test": ("adds {n}", "makes {n} more")},
    "-": {"train": ("loses {n}", "sells {n}", "drops {n}"), "test": ("gives {other} {n}", "breaks {n}")},
}
_TEST_SHARE = 8  # one expression in eight belongs to the test split

# Worked examples, the same for every problem of so many steps and first in the prompt (see `word_problems`).
_EXAMPLES = {
    2: (
        ("Ann has 9 cups, gets 3 and loses 4.", (9, 3, 4), "+-"),
        ("Tim has 3 bags of 2 pens and buys 5 more.", (3, 2, 5), "*+"),
        ("Sam has 8 pens, sells 2 and loses 3.", (8, 2, 3), "--"),
        ("Kim finds 4 nuts, gets 5 and buys 6 more.", (4, 5, 6), "++"),
    ),
    3: (
        ("Ann has 9 cups, gets 3, loses 4 and finds 2.", (9, 3, 4, 2), "+-+"),
        ("Tim has 3 bags of 2 pens, sells 4 and buys 5 more.", (3, 2, 4, 5), "*-+"),
        ("Sam has 8 pens, sells 2, loses 3 and finds 4.", (8, 2, 3, 4), "--+"),
        ("Kim finds 4 nuts, gets 5, buys 6 more and drops 3.", (4, 5, 6, 3), "++-"),
    ),
}


def problems(n: int, split: str, seed: int, steps: int) -> list[Problem]:
    """Return `n` different problems of so many steps, cycling through the signs, e.g. "+-" as `operation`.

    Raises:
        ConfigError: as for one-step problems, or `steps` is neither 2 nor 3.
    """
    check_request(n, split)
    if steps not in STEPS:
        raise ConfigError(f"word problems: steps={steps} is not known: use 2 or 3")
    rng = random.Random(f"{seed}/{split}/{steps}")
    kinds = ["".join(signs) for signs in itertools.product("+-*", *["+-"] * (steps - 1))]
    chosen: dict[str, Problem] = {}
    for signs in itertools.cycle(kinds):
        if len(chosen) == n:
            break
        while (problem := _draw(rng, signs, split)).question in chosen:
            pass
        chosen[problem.question] = problem
    return list(chosen.values())


def prompt(question: str, steps: int) -> list[Message]:
    """Return the chat messages: four worked examples of so many steps, then `question`."""
    messages: list[Message] = []
    for text, numbers, signs in _EXAMPLES[steps]:
        worked, role = _problem(text, numbers, signs), "user" if messages else "system"
        messages += [{"role": role, "content": worked.question}, {"role": "assistant", "content": worked.answer}]
    return [*messages, {"role": "user", "content": question}]


def prepare_multi_step(dst: str | Path, n_train: int, n_test: int, steps: int, seed: int = 0) -> dict[str, Path]:
    """Write `train.parquet` and `test.parquet` to `dst`, and return {"train": path, "test": path}.

    Raises the same errors as `problems`.
    """
    sets = {split: problems(n, split, seed, steps) for split, n in (("train", n_train), ("test", n_test))}
    return write_problems(dst, sets, lambda question: prompt(question, steps))


def _draw(rng: random.Random, signs: str, split: str) -> Problem:
    while True:
        numbers = tuple(rng.randint(2, 9) for _ in range(len(signs) + 1))
        results = _results(numbers, signs)
        if min(results) > 0 and max(results) <= _LARGEST and _is_test(_expression(numbers, signs)) == (split == "test"):
            return _problem(_story(rng, numbers, signs, split), numbers, signs)


def _story(rng: random.Random, numbers: tuple[int, ...], signs: str, split: str) -> str:
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    if signs[0] == "*":
        first = rng.choice(_FIRST_TIMES[split]).format(n=numbers[0], m=numbers[1], **words)
        rest = zip(signs[1:], numbers[2:], strict=True)
    else:
        first = rng.choice(_FIRST[split]).format(n=numbers[0], **words)
        rest = zip(signs, numbers[1:], strict=True)
    clauses = [first, *(rng.choice(_NEXT[sign][split]).format(n=number, **words) for sign, number in rest)]
    return f"{', '.join(clauses[:-1])} and {clauses[-1]}."


def _problem(text: str, numbers: tuple[int, ...], signs: str) -> Problem:
    results = _results(numbers, signs)
    before = (numbers[0], *results)
    lines = [
        f"{left} {sign} {right} = {result}"
        for left, sign, right, result in zip(before[:-1], signs, numbers[1:], results, strict=True)
    ]
    answer = "\n".join([*lines, f"#### {results[-1]}"])
    first, *others = (f"{sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
    asked = ", then ".join([f"{numbers[0]} {first}", *others])
    return Problem(signs, f"{text} {asked}?", answer)


def _expression(numbers: tuple[int, ...], signs: str) -> str:
    rest = (f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
    return f"{numbers[0]}{''.join(rest)}"


def _results(numbers: tuple[int, ...], signs: str) -> tuple[int, ...]:
    """Return the result of each step, from left to right."""
    found = [numbers[0]]
    for sign, number in zip(signs, numbers[1:], strict=True):
        found.append({"+": found[-1] + number, "-": found[-1] - number, "*": found[-1] * number}[sign])
    return tuple(found[1:])


def _is_test(expression: str) -> bool:
    return hashlib.sha256(expression.encode()).digest()[0] % _TEST_SHARE == 0
