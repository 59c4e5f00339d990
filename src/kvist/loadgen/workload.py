"""What is asked, how long it is, and when: arrivals, lengths, shared prefixes, conversations.

Texts are made of common words, most of which are one token to most tokenizers; how many tokens they
really were is the server's to say. Everything follows from the seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

from kvist.errors import ConfigError

Arrivals = Literal["poisson", "constant"]

_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will no more if
out so up said what its about than into them can only other time new some could these two may
first then do any like my now over such our man me even most made after also well where much long
down great before good back very way many still day own see last never same three while state
house world another work life year small part place school right here city off water high later
war number however room between again end came too us thing old under men might left both each
night once side fact hand during face without eyes given large public along need head white far
light course power business name line second enough almost study young door car next open early
book country family group point church body social find four money change order turn going music
""".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Call:
    """One request to be sent.

    Args:
        at: seconds after the start at which it is due.
        text: what the user says in this turn.
        max_tokens: of the answer.
        conversation: turns of one conversation carry what was said before.
        turn: its number in that conversation; a later one waits for the answer before it.
        system: the system message, the same in all turns.
    """

    at: float
    text: str
    max_tokens: int
    conversation: int
    turn: int = 0
    system: str = ""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens, drawn evenly from `low` to `high`."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """`256` or `128-512`; raises ConfigError for anything else."""
        parts = text.split("-")
        try:
            low, high = int(parts[0]), int(parts[-1])
        except ValueError:
            low = high = 0
        if len(parts) > 2 or not 0 < low <= high:
            raise ConfigError(f"{text!r} is no number of tokens; write 256, or 128-512 for a range")
        return cls(low, high)

    def draw(self, random: Random) -> int:
        """One of them."""
        return random.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A workload that is made up.

    Args:
        requests: first turns.
        rate: first turns a second.
        arrivals: at random ("poisson"), or evenly.
        input_tokens: of what each turn adds.
        output_tokens: of each answer.
        prefix_tokens: of a system message that many conversations share; 0 for none.
        prefixes: how many different such messages there are.
        turns: of each conversation.
        think_time: seconds from one turn's due time to the next one's.
        seed: everything follows from it.
    """

    requests: int
    rate: float
    arrivals: Arrivals = "poisson"
    input_tokens: Lengths = Lengths(256, 256)
    output_tokens: Lengths = Lengths(64, 64)
    prefix_tokens: int = 0
    prefixes: int = 1
    turns: int = 1
    think_time: float = 5.0
    seed: int = 0


def synthesize(workload: Synthetic) -> list[Call]:
    """The workload's requests, in order of their due times."""
    random = Random(workload.seed)
    systems = [
        words(workload.prefix_tokens, f"{workload.seed} prefix {i}")
        for i in range(workload.prefixes if workload.prefix_tokens else 0)
    ] or [""]
    calls: list[Call] = []
    times = arrival_times(workload.arrivals, workload.rate, workload.requests, random)
    for conversation, begin in enumerate(times):
        system = random.choice(systems)
        calls += [
            Call(
                at=begin + turn * workload.think_time,
                text=words(
                    workload.input_tokens.draw(random),
                    f"{workload.seed} turn {conversation} {turn}",
                ),
                max_tokens=workload.output_tokens.draw(random),
                conversation=conversation,
                turn=turn,
                system=system,
            )
            for turn in range(workload.turns)
        ]
    return sorted(calls, key=lambda call: call.at)


def arrival_times(kind: Arrivals, rate: float, count: int, random: Random) -> Iterator[float]:
    """`count` times in seconds, the first at 0; raises ConfigError unless the rate is positive."""
    if not rate > 0:
        raise ConfigError(f"a rate of {rate} requests a second never sends any; give one above 0")
    now = 0.0
    for _ in range(count):
        yield now
        now += random.expovariate(rate) if kind == "poisson" else 1 / rate


def words(count: int, key: str) -> str:
    """So many words; the same key gives the same ones."""
    return " ".join(Random(key).choices(_WORDS, k=count))


@cache
def block_words(hash_id: int, count: int) -> str:
    """The words of one block of a trace; blocks of equal ids say the same."""
    return words(count, f"block {hash_id}")


def by_conversation(calls: Sequence[Call]) -> list[list[Call]]:
    """The calls of each conversation, in order of their turns."""
    found: dict[int, list[Call]] = {}
    for call in calls:
        found.setdefault(call.conversation, []).append(call)
    return [sorted(turns, key=lambda call: call.turn) for turns in found.values()]
