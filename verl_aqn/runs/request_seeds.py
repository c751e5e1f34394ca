"""Names of prompts and responses that are the same in two runs with one seed, and the seed of each generation request.

verl names prompts by random UUIDs and takes responses in the order in which they arrive, so two runs cannot be matched
sample by sample. Here the name of a prompt contains its row in the data, and the order of samples and their random
numbers depend on these names alone.

========  =============================  ==============================================================
what      form                           example
========  =============================  ==============================================================
prompt    ROW, or ROW+TIMES              `417`; `417+1`: the same row for the second time in one step
uid       STEP-PLACE-PROMPT              `12-3-417`: place 3 (from 0) of step 12
key       UID_SESSION_INDEX (verl's)     `12-3-417_5_0`: session 5 (from 0), first output of that session
========  =============================  ==============================================================
"""

import hashlib
from collections import Counter

PROMPT = "aqn_prompt"
"""Name of a batch's column: the name of the prompt within its step."""


def seed_of(*parts: int | str) -> int:
    """Return a number from 0 to 2^63 - 1 that depends on `parts` alone: not on the process, the machine or the time.

    The number is the first 63 bits of SHA-256 over the parts as text. Each part is preceded by its type and length, so
    that two different lists of parts never give the same text.
    """
    text = "".join(f"{type(part).__name__}{len(str(part))}:{part};" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def request_seed(run_seed: int, part: str, step: int, prompt: str, sample: int) -> int:
    """Return the seed of one request, from the run's seed, `train` or `val`, RL step, prompt and sample number."""
    return seed_of("request", run_seed, part, step, prompt, sample)


def turn_seed(seed: int, tokens: int) -> int:
    """Return the seed of one turn of a request; `tokens`, the number of tokens before it, differs from turn to turn."""
    return seed_of("turn", seed, tokens)


class StepPrompts:
    """Names for the prompts of one step, in the order in which they are taken from the data."""

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
    """Return the place (from 0) of the prompt `uid` within its step."""
    return int(uid.split("-")[1])


def order_of_key(key: str) -> tuple[int, int, int]:
    """Return the sort key for the keys of one step: place of the prompt, session and index."""
    uid, session, index = key.rsplit("_", 2)
    return place_of(uid), int(session), int(index)


def answer_name(key: str) -> str:
    """Return a key without its step and place, for example `417_5_0`; the place depends on the step's other prompts."""
    return key.split("-", 2)[2]


def last_outputs(keys: list[str]) -> dict[tuple[str, int], int]:
    """Return {(uid, session): index in `keys` of its last output}; a session with several turns has several outputs."""
    newest: dict[tuple[str, int], tuple[int, int]] = {}
    for at, key in enumerate(keys):
        uid, session, index = key.rsplit("_", 2)
        one = (uid, int(session))
        newest[one] = max(newest.get(one, (-1, -1)), (int(index), at))
    return {one: at for one, (_, at) in newest.items()}


def digest_of(answers: dict[str, list[int]]) -> tuple[str, dict[str, str]]:
    """Return one SHA-256 over all of a step's `answers` {key: tokens}, in the order of keys, and one for each of them.

    The second value maps `answer_name` of each key to the first 12 hexadecimal digits of its SHA-256.
    """
    whole, each = hashlib.sha256(), {}
    for key in sorted(answers, key=order_of_key):
        text = ",".join(map(str, answers[key]))
        whole.update(f"{key}:{text};".encode())
        each[answer_name(key)] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return whole.hexdigest(), each
