"""The first difference between two greedy responses, and its distance from a tie."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """The first difference between two responses.

    `token`: the index of the first token that differs. `gap`: its log-probability minus that of the other response's
    token there, in nats; None if the other token is not among the most likely ones.
    """

    token: int
    gap: float | None


def first_difference(
    tokens: Sequence[int],
    tops: Sequence[Mapping[int, float]],
    other: str,
    decode: Callable[[Sequence[int]], str],
) -> Difference:
    """Find the first difference between the response ``tokens`` and the text ``other``.

    ``tops``: {token: log-probability} of the most likely tokens at each position of ``tokens``. ``decode`` must skip
    special tokens. Only the text of ``other`` is known. Its token at the difference is taken to be the most likely
    token that continues the text, or a special token if the text ends.
    """
    # Search from the longest prefix: half a character decodes to a replacement character, which matches no text.
    same = next(n for n in range(len(tokens), -1, -1) if other.startswith(decode(tokens[:n])))
    begun = decode(tokens[:same])
    rest = other[len(begun) :]
    while same and rest and same == len(tokens) and decode(tokens[: same - 1]) == begun:
        same -= 1  # this response ended where the other continues: the EOS token differs
    if same == len(tokens):
        return Difference(same, None)

    def goes_on(token: int) -> bool:
        piece = decode([*tokens[:same], token])[len(begun) :]
        return rest.startswith(piece) if piece and rest else piece == rest

    likely = [logprob for token, logprob in tops[same].items() if goes_on(int(token))]
    own = tops[same].get(tokens[same])
    return Difference(same, own - max(likely) if likely and own is not None else None)
