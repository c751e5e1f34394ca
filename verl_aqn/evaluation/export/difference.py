"""Where two greedy answers part, and how near a tie that token was."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """`token`: number of the first token that differs. `gap`: its log-probability less that of the token which the
    other answer has there, in nats; None where that is not among the likeliest."""

    token: int
    gap: float | None


def first_difference(
    tokens: Sequence[int],
    tops: Sequence[Mapping[int, float]],
    other: str,
    decode: Callable[[Sequence[int]], str],
) -> Difference:
    """Where the answer ``tokens`` leaves the text ``other``.

    ``tops``: {token: log-probability} of the likeliest tokens at each place of ``tokens``. ``decode`` leaves special
    tokens out. Of ``other`` only the text is known: the token that it has at the place is taken to be the likeliest one
    that goes on as it does, and a special one where it ends.
    """
    # Not the shortest: half a character decodes to a mark that no text begins with.
    same = next(n for n in range(len(tokens), -1, -1) if other.startswith(decode(tokens[:n])))
    begun = decode(tokens[:same])
    rest = other[len(begun) :]
    while same and rest and same == len(tokens) and decode(tokens[: same - 1]) == begun:
        same -= 1  # it ended where the other goes on: the end is what differs
    if same == len(tokens):
        return Difference(same, None)

    def goes_on(token: int) -> bool:
        piece = decode([*tokens[:same], token])[len(begun) :]
        return rest.startswith(piece) if piece and rest else piece == rest

    likely = [logprob for token, logprob in tops[same].items() if goes_on(int(token))]
    own = tops[same].get(tokens[same])
    return Difference(same, own - max(likely) if likely and own is not None else None)
