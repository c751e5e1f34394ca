"""The embedded task: generated one-step word problems in GSM8K's format, easy enough for a 135M model to improve on.

A third each of the problems is addition, subtraction and multiplication, with single-digit operands. The prompt is
short, because a training step processes each prompt token several times. Problems share the first part of the prompt,
which a prefix cache then computes once: with SmolLM2's tokenizer, prompts have 99 to 102 tokens, 79 of them shared, and
responses have 12 to 14.

SmolLM2-135M-Instruct in bf16, before training, on the first 96 test problems per operation of seed 0, has the strict
accuracy for add, subtract, multiply: .49 .49 .62 at temperature 1, 1.0 .71 .84 with greedy decoding. With its linears
rounded to MXFP4 by the smallest squared error (first 48 each): .31 .19 .27 at temperature 1.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_aqn.errors import ConfigError
from verl_aqn.tasks.parquet import Message, row, write_parquet

SOURCE = "verl_aqn/word_problems"
OPERATIONS = ("add", "subtract", "multiply")

# Each is one token in SmolLM2's vocabulary.
NAMES = (  # noqa: SIM905
    "Ann Anna Ben Jim Kim Max Sam Tom Bob Dan Mark Mary Nick Paul Rose Adam Jack Jane John Luke "
    "Will Alice Peter David Alex Lee Bill"
).split()
THINGS = (  # noqa: SIM905
    "apples books cards coins eggs stamps balls cakes pens shells toys cups keys hats nuts roses cookies boxes plates "
    "flowers stones rings shirts letters"
).split()
# Every question ends with the expression itself: without it, SmolLM2 scores .11 .08 .20 (bf16, temperature 1, 64 each),
# which is too rarely right to learn from in the few steps that a CPU can run.
_TEMPLATES = {
    "add": (
        "{name} has {a} {things} and gets {b}. {a} + {b}?",
        "{name} has {a} {things}, {other} has {b}. {a} + {b}?",
        "{name} finds {a} {things}, then {b}. {a} + {b}?",
        "{name} buys {a} {things} and {b} more. {a} + {b}?",
    ),
    "subtract": (
        "{name} has {a} {things} and loses {b}. {a} - {b}?",
        "{name} had {a} {things} and sold {b}. {a} - {b}?",
        "{name} takes {b} of {a} {things}. {a} - {b}?",
        "{name} gives {other} {b} of {a} {things}. {a} - {b}?",
    ),
    "multiply": (
        "{name} has {a} bags of {b} {things}. {a} * {b}?",
        "{name} buys {a} sets of {b} {things}. {a} * {b}?",
        "{name} fills {a} boxes with {b} {things}. {a} * {b}?",
        "{a} jars hold {b} {things} each. {a} * {b}?",
    ),
}
_SIGN = {"add": "+", "subtract": "-", "multiply": "*"}

_CALL = '<tool_call>{{"name": "calculator", "arguments": {{"expression": "{}"}}}}</tool_call>'

# The examples are the same for every problem and come first in the prompt. The first question is in the system message:
# that saves a separate system message and keeps the chat template from adding its default one.
_EXAMPLES: tuple[Message, ...] = (
    {"role": "system", "content": "Ann has 9 cups and loses 4. 9 - 4?"},
    {"role": "assistant", "content": "9 - 4 = 5\n#### 5"},
    {"role": "user", "content": "Tim has 3 bags of 2 pens. 3 * 2?"},
    {"role": "assistant", "content": "3 * 2 = 6\n#### 6"},
)
# The same two questions, answered by calling a calculator (verl's tool agent loop, `hermes` format). SmolLM2's chat
# template does not tell a model which tools exist, so the examples have to.
_TOOL_EXAMPLES: tuple[Message, ...] = (
    {"role": "system", "content": "Ann has 9 cups and loses 4. 9 - 4?"},
    {"role": "assistant", "content": _CALL.format("9 - 4")},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "#### 5"},
    {"role": "user", "content": "Tim has 3 bags of 2 pens. 3 * 2?"},
    {"role": "assistant", "content": _CALL.format("3 * 2")},
    {"role": "tool", "content": "6"},
    {"role": "assistant", "content": "#### 6"},
)
_TEST_SHARE = 8  # one question in eight belongs to the test split


@dataclass(frozen=True)
class Problem:
    """A question with its worked answer, as in GSM8K: `answer` ends in "#### N"."""

    operation: str
    question: str
    answer: str

    @property
    def truth(self) -> str:
        return self.answer.rpartition("#### ")[2]


def problems(n: int, split: str, seed: int) -> list[Problem]:
    """Return `n` different problems, cycling through the operations.

    The text of a question decides whether it belongs to "train" or "test", so the two splits are disjoint for all seeds
    and sizes.

    Raises:
        ConfigError: `split` is neither of the two, or `n` is below 1 or more than the templates can produce.
    """
    check_request(n, split)
    rng = random.Random(f"{seed}/{split}")
    chosen: dict[str, Problem] = {}
    for operation in itertools.cycle(OPERATIONS):
        for problem in _draws(rng, operation):
            if problem.question not in chosen and _is_test(problem.question) == (split == "test"):
                chosen[problem.question] = problem
                break
        if len(chosen) == n:
            return list(chosen.values())
    raise AssertionError("cycle does not end")


def check_request(n: int, split: str) -> None:
    """Check the number of problems and the split that are asked for. Raises ConfigError."""
    if split not in ("train", "test"):
        raise ConfigError(f"word problems: split={split!r} is not known: use 'train' or 'test'")
    if not 1 <= n <= 10_000:
        raise ConfigError(f"word problems: n={n} is out of range: ask for 1 to 10000")


def prompt(question: str, *, tool: bool = False) -> list[Message]:
    """Return the chat messages: the two worked examples (with `tool`, they call a calculator), then `question`."""
    return [*(_TOOL_EXAMPLES if tool else _EXAMPLES), {"role": "user", "content": question}]


def prepare_word_problems(
    dst: str | Path, n_train: int, n_test: int, seed: int = 0, *, tool: bool = False
) -> dict[str, Path]:
    """Write `train.parquet` and `test.parquet` to `dst`, and return {"train": path, "test": path}.

    Raises the same errors as `problems`.
    """
    sets = {split: problems(n, split, seed) for split, n in (("train", n_train), ("test", n_test))}
    return write_problems(dst, sets, lambda question: prompt(question, tool=tool))


def write_problems(
    dst: str | Path, sets: Mapping[str, Sequence[Problem]], messages: Callable[[str], list[Message]]
) -> dict[str, Path]:
    """Write each split's problems to `dst`/SPLIT.parquet, with the prompt `messages(question)`. Return the paths."""
    paths = {}
    for split, chosen in sets.items():
        rows = [
            row(SOURCE, messages(p.question), p.truth, split=split, index=i, question=p.question, answer=p.answer)
            for i, p in enumerate(chosen)
        ]
        paths[split] = write_parquet(rows, Path(dst) / f"{split}.parquet")
    return paths


def _draws(rng: random.Random, operation: str) -> Iterator[Problem]:
    while True:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        if operation == "subtract":
            a, b = max(a, b), min(a, b)
            if a == b:
                continue
        name, other = rng.sample(NAMES, 2)
        question = rng.choice(_TEMPLATES[operation]).format(a=a, b=b, name=name, other=other, things=rng.choice(THINGS))
        result = {"add": a + b, "subtract": a - b, "multiply": a * b}[operation]
        yield Problem(operation, question, f"{a} {_SIGN[operation]} {b} = {result}\n#### {result}")


def _is_test(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % _TEST_SHARE == 0
