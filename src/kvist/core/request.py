"""What the engine is asked to do: token ids, images, parameters, and who may share the cache.

Plain data, made by the text side and read by the scheduler; the runner never sees a request, only
the plan. Nothing here knows text, tensors or blocks.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvist.core.params import ResolvedParams
from kvist.errors import RequestError


class Grammar(Protocol):
    """Says which tokens may come next; the bits themselves stay with whoever samples."""

    def mask(self, output_ids: SequenceOf[int]) -> int:
        """Handle (> 0) of the allowed-token mask for the token after `output_ids`; 0 allows all.

        Whatever it raises fails this one request.
        """


@dataclass(frozen=True)
class ImageSpan:
    """Where one image's embeddings stand in a prompt.

    Args:
        start: position of its first placeholder token.
        length: placeholder tokens, which is also how many embeddings the encoder gives.
        digest: names the image's *content*; equal digests are encoded and cached once.
        pixels: what the encoder reads; opaque here.
    """

    start: int
    length: int
    digest: str
    pixels: Any = field(default=None, compare=False, repr=False)

    @property
    def stop(self) -> int:
        """The position behind its last token."""
        return self.start + self.length


@dataclass(frozen=True)
class Request:
    """One thing that a user asked for; `params.n` samples of it share the prompt's blocks.

    Args:
        id: unique among the requests that are not finished.
        prompt_ids: the prompt's token ids, placeholders for images included.
        params: resolved sampling parameters; `params.n` is the number of samples.
        images: spans in order of position, without overlap.
        priority: lower goes first (as in vLLM); equal priorities are served first come.
        arrival: seconds on the scheduler's clock; None takes the time of `add`.
        cache_salt: requests share cached blocks only with requests of the same salt.
        adapter: names the weights' variant; cached blocks are not shared across adapters.
        eos_token_ids: the model's end-of-sequence ids.
        grammar: constrains the output, or None.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: ResolvedParams
    images: tuple[ImageSpan, ...] = ()
    priority: int = 0
    arrival: float | None = None
    cache_salt: str = ""
    adapter: str = ""
    eos_token_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        """Refuse what no engine could run, whatever its size.

        Raises:
            RequestError: an empty prompt, or an image outside the prompt or over another one.
        """
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
        if not self.prompt_ids:
            raise RequestError(f"request {self.id}: the prompt is empty; give at least one token")
        # Spans are in order and disjoint: [free, span.start) holds text, [start, stop) the image.
        free = 0
        for span in self.images:
            if span.length < 1 or span.start < free or span.stop > len(self.prompt_ids):
                raise RequestError(
                    f"request {self.id}: image at [{span.start}, {span.stop}) overlaps another or "
                    f"leaves the prompt of {len(self.prompt_ids)} tokens; give spans in order"
                )
            free = span.stop

    @property
    def max_tokens_in_cache(self) -> int:
        """The longest that one sample's cache gets: the last sampled token is never written."""
        return len(self.prompt_ids) + self.params.max_tokens - 1
