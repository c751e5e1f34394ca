"""Names of prompts and answers that two runs of one seed share, and the seed that each request for an answer gets.

verl names prompts by random UUIDs and takes answers as they arrive, so that nothing there can be told apart from run to
run. Here a prompt's name says which row of the data it is, and order and random numbers follow from names alone.

========  =============================  ==============================================================
what      form                           example
========  =============================  ==============================================================
prompt    ROW, or ROW+TIMES              `417`; `417+1`: the same row for the second time in one step
uid       STEP-PLACE-PROMPT              `12-3-417`: fourth (from 0) of step 12
key       UID_SESSION_INDEX (verl's)     `12-3-417_5_0`: its sixth answer, first output of that session
========  =============================  ==============================================================
"""

import hashlib
from collections import Counter

PROMPT = "aqn_prompt"
"""Column of a batch: the prompt's name within its step."""


def seed_of(*parts: int | str) -> int:
    """Return a number from 0 to 2^63 - 1 that depends on `parts` alone: not on the process, the machine or the time.

    The first 63 bits of SHA-256 over the parts as text, each behind its length and type, so that no two lists of parts
    give one text.
    """
    text = "".join(f"{type(part).__name__}{len(str(part))}:{part};" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def request_seed(run_seed: int, part: str, step: int, prompt: str, sample: int) -> int:
    """Return the seed of one request: of the run's seed, `train` or `val`, RL step, prompt and number of the answer."""
    return seed_of("request", run_seed, part, step, prompt, sample)


def turn_seed(seed: int, tokens: int) -> int:
    """Return the seed of one turn of a request, told from its other turns by the `tokens` before it."""
    return seed_of("turn", seed, tokens)


class StepPrompts:
    """The prompts of a step by name, in the order in which they are taken from the data."""

    def __init__(self) -> None:
        self.step = -1
        self.rows: list[int] = []
        """Rows of the data, in the order in which they were named in `step`."""
        self._times: Counter[int] = Counter()

    def name(self, step: int, row: int) -> tuple[str, str]:
        """Return `(prompt, uid)` of the next prompt of `step`, which is `row` of the data."""
        if step != self.step:
            self.step, self.rows, self._times = step, [], Counter()
        place, times = len(self.rows), self._times[row]
        self.rows.append(row)
        self._times[row] += 1
        prompt = f"{row}+{times}" if times else str(row)
        return prompt, f"{step}-{place}-{prompt}"

    def after(self, place: int) -> list[int]:
        """Return the rows that were named after the prompt at `place` in this step."""
        return self.rows[place + 1 :]


def place_of(uid: str) -> int:
    """Return which prompt of its step (from 0) `uid` is."""
    return int(uid.split("-")[1])


def order_of_key(key: str) -> tuple[int, int, int]:
    """Return what puts the keys of one step in order: place of the prompt, session and index."""
    uid, session, index = key.rsplit("_", 2)
    return place_of(uid), int(session), int(index)


def answer_name(key: str) -> str:
    """Return a key without step and place, which other prompts of the step may change: `417_5_0`."""
    return key.split("-", 2)[2]


def last_outputs(keys: list[str]) -> dict[tuple[str, int], int]:
    """Return {(uid, session): where in `keys` its last output is}: a session of several turns may have several."""
    newest: dict[tuple[str, int], tuple[int, int]] = {}
    for at, key in enumerate(keys):
        uid, session, index = key.rsplit("_", 2)
        one = (uid, int(session))
        newest[one] = max(newest.get(one, (-1, -1)), (int(index), at))
    return {one: at for one, (_, at) in newest.items()}


def digest_of(answers: dict[str, list[int]]) -> tuple[str, dict[str, str]]:
    """Return a SHA-256 over keys and tokens of a step's `answers` {key: tokens} in the order of keys, and one for each.

    The second holds 12 hexadecimal digits by `answer_name`.
    """
    whole, each = hashlib.sha256(), {}
    for key in sorted(answers, key=order_of_key):
        text = ",".join(map(str, answers[key]))
        whole.update(f"{key}:{text};".encode())
        each[answer_name(key)] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return whole.hexdigest(), each
