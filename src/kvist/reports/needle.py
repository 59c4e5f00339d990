"""Needle retrieval: whether a model still finds a number in a long text, with each codec's cache.

A pass key is hidden at several depths of texts of several lengths, and the engine is asked for it.
Perplexity averages over all tokens and hardly notices a few lost ones; this looks for just those.
`kvist quality --needle` runs it, beside the plain cache, since small models lose needles by
themselves.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvist.core.params import SamplingParams
from kvist.errors import RequestError
from kvist.llm import LLM
from kvist.loading.model import Model

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle lies, 0 = at the beginning."""

NEEDLE = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
DIGITS = 5


@dataclass(frozen=True)
class NeedleScore:
    """How often the key came back: one codec, one length, one depth.

    Args:
        codec: its name.
        context: tokens of the prompt.
        depth: where the needle lay, 0..1.
        found: keys that were given back whole.
        asked: keys in all.
    """

    codec: str
    context: int
    depth: float
    found: int
    asked: int


def needle_prompts(
    model: Model, text: Sequence[int], context: int, depth: float, count: int, seed: int = 0
) -> list[tuple[list[int], str]]:
    """Prompts of exactly `context` tokens, and the key that each hides.

    Args:
        model: for its tokenizer.
        text: the haystack's token ids; repeated where it is too short.
        context: tokens of a prompt.
        depth: where the needle lies, 0..1.
        count: prompts, each with a key and a piece of the text of its own.
        seed: of the keys and pieces.

    Raises:
        RequestError: needle and question alone are longer than the context, or there is no text.
    """
    encode = model.require_tokenizer().encode
    opening = encode("", add_special_tokens=True)
    question = encode(QUESTION)
    rng = random.Random(f"{seed} {context} {depth}")
    prompts = []
    for _ in range(count):
        key = "".join(rng.choice("0123456789") for _ in range(DIGITS))
        needle = encode(NEEDLE.format(key=key))
        room = context - len(opening) - len(needle) - len(question)
        if room < 0 or not text:
            raise RequestError(
                f"a context of {context} tokens has no room for a needle and its question; "
                f"take at least {context - room}"
            )
        start = rng.randrange(len(text))
        hay = [text[(start + i) % len(text)] for i in range(room)]
        before = round(depth * room)
        prompts.append(([*opening, *hay[:before], *needle, *hay[before:], *question], key))
    return prompts


def find_needles(
    model: Model,
    text: Sequence[int],
    codecs: Sequence[str],
    contexts: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    count: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[NeedleScore]:
    """Ask for every needle with every codec, through the engine.

    Args:
        model: with a tokenizer.
        text: the haystack's token ids.
        codecs: names, as `make_codec` takes them.
        contexts: tokens of a prompt.
        depths: where needles lie.
        count: needles for each codec, context and depth.
        progress: told how many of how many cells are done.

    Raises:
        RequestError: a context is too short, or longer than the model's.
    """
    params = SamplingParams(temperature=0, max_tokens=DIGITS + 4, ignore_eos=True)
    cells = [
        (context, depth, needle_prompts(model, text, context, depth, count))
        for context in contexts
        for depth in depths
    ]
    longest = max(contexts) + DIGITS + 4
    scores = []
    for codec in codecs:
        llm = LLM(model, codec=codec, max_model_len=longest, max_num_seqs=count)
        for context, depth, prompts in cells:
            results = llm.generate([prompt for prompt, _ in prompts], params)
            found = sum(
                result.text.strip().startswith(key)
                for result, (_, key) in zip(results, prompts, strict=True)
            )
            scores.append(NeedleScore(codec, context, depth, found, len(prompts)))
            progress(len(scores), len(codecs) * len(cells))
    return scores
