"""Prompt lookup: guess the next tokens from what followed the same words earlier in the sequence.

Guesses cost nothing to make and are checked by the model, so they never change what comes out. The
loop and the scheduler both use it. Standard library only.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""The last n tokens are looked up, for the longest n that is found."""


def prompt_lookup(prompt_ids: Sequence[int], output_ids: Sequence[int], limit: int) -> list[int]:
    """Up to `limit` guesses at the tokens that follow.

    The latest earlier place where the sequence's last n tokens stand is continued (Saxena, 2023).

    Args:
        prompt_ids: the prompt.
        output_ids: the output so far.
        limit: guesses at most; 0 gives none.
    """
    if limit < 1:
        return []
    tokens = [*prompt_ids, *output_ids]
    for n in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        tail, last = tokens[-n:], tokens[-1]
        # The tail itself ends at len(tokens); an earlier copy ends at `end` < len(tokens).
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - 1] == last and tokens[end - n : end] == tail:
                # A copy may run into its own guesses, as in LZ77: a loop is guessed whole.
                for place in range(end, end + limit):
                    tokens.append(tokens[place])
                return tokens[-limit:]
    return []
