"""How much the engine takes on: the scheduler's configuration, and what can never fit.

A request that passes `refuse_what_never_fits` can always be finished once it runs alone; the
scheduler's promise not to deadlock rests on that.
"""

from dataclasses import dataclass

from kvist.core.blocks import PagedBlockManager
from kvist.core.request import Request
from kvist.errors import ConfigError, ContextTooLong, RequestError


@dataclass(frozen=True)
class SchedulerConfig:
    """How much one step, and the engine as a whole, may take on.

    Args:
        max_num_seqs: runner slots.
        max_batch_tokens: tokens of one step, decodes and chunks together.
        max_model_len: the longest prompt plus output.
        max_chunk_tokens: tokens of one prompt in one step; None leaves it to the budget.
        watermark: part of each pool that stays free when a request is admitted beside others, so
            that those can grow before anything has to be preempted.
        max_image_tokens: image tokens encoded in one step.
        encoder_cache_tokens: image tokens that the runner keeps encoded; None: twice the above.
        max_drafts: guessed tokens per decode, where a drafter is given.
        codec: names the cache's precision; part of every prefix's identity.
    """

    max_num_seqs: int = 256
    max_batch_tokens: int = 2048
    max_model_len: int = 1 << 20
    max_chunk_tokens: int | None = None
    watermark: float = 0.01
    max_image_tokens: int = 4096
    encoder_cache_tokens: int | None = None
    max_drafts: int = 0
    codec: str = ""

    def __post_init__(self) -> None:
        """Refuse a step that could hold nothing."""
        for name in ("max_num_seqs", "max_batch_tokens", "max_model_len", "max_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, not {value}")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark must be in [0, 1), not {self.watermark}")
        if self.image_capacity < self.max_image_tokens:
            raise ConfigError(
                f"encoder_cache_tokens must be >= max_image_tokens {self.max_image_tokens}, "
                f"not {self.image_capacity}"
            )

    @property
    def chunk(self) -> int:
        """The most tokens of one sequence in one step."""
        return min(self.max_chunk_tokens or self.max_batch_tokens, self.max_batch_tokens)

    @property
    def image_capacity(self) -> int:
        """Image tokens that the runner keeps encoded."""
        kept = self.encoder_cache_tokens
        return 2 * self.max_image_tokens if kept is None else kept


def refuse_what_never_fits(
    request: Request, config: SchedulerConfig, blocks: PagedBlockManager
) -> None:
    """Raise if the request could not be finished even alone.

    Raises:
        ContextTooLong: too many tokens for the model or for the pool.
        RequestError: an image of more tokens than a step may encode.
    """
    prompt, new = len(request.prompt_ids), request.params.max_tokens
    if prompt + new > config.max_model_len:
        raise ContextTooLong(
            f"request {request.id}: {prompt} prompt + {new} new tokens = {prompt + new}, but the "
            f"model takes {config.max_model_len}; shorten the prompt or lower max_tokens"
        )
    # One token at a time needs least: the last sampled token is never written.
    needs = blocks.most_blocks(prompt + new - 1, chunk=1)
    for group, need in zip(blocks.groups, needs, strict=True):
        if need > group.num_blocks - 1:
            raise ContextTooLong(
                f"request {request.id}: {prompt} prompt + {new} new tokens need {need} blocks of "
                f"{blocks.block_size}, but the cache has {group.num_blocks - 1}; shorten the "
                f"request or give the cache more memory"
            )
    for span in request.images:
        if span.length > config.max_image_tokens:
            raise RequestError(
                f"request {request.id}: an image of {span.length} tokens, but a step encodes "
                f"{config.max_image_tokens}; raise max_image_tokens or use a smaller image"
            )
