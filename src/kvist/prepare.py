"""The door: every prompt and parameter is checked here, before any work is done for any of them.

The loop and the engine both come through it; what leaves it are samples that can be run.
"""

from collections.abc import Sequence
from typing import Any

from kvist.beam import check_beams
from kvist.core.params import SamplingParams
from kvist.errors import ContextTooLong, RequestError
from kvist.loading.image_prompt import PreparedPrompt
from kvist.loading.model import Model, Prompt
from kvist.sample import Sample


def prepare(
    model: Model,
    prompts: Sequence[Prompt | PreparedPrompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    max_length: int | None = None,
) -> list[Sample]:
    """Check every prompt and parameter, before any work; one sample each, or n.

    `max_length` is the longest prompt plus output, where that is less than the model's.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is a list, such as [prompt], not {type(prompts).__name__}")
    if not prompts:
        raise RequestError("prompts is empty; give at least one")
    samples: list[Sample] = []
    limit = min(max_length or model.max_length, model.max_length)
    for index, (prompt, asked) in enumerate(zip(prompts, params_for(prompts, params), strict=True)):
        prepared = model.prepare(prompt)
        ids = prepared.token_ids
        resolved = asked.resolve(model.generation_config)
        if resolved.num_beams > 1:
            check_beams(resolved)
        room = limit - len(ids)
        wanted = max(1, asked.min_tokens) if asked.max_tokens is None else asked.max_tokens
        if room < wanted:
            raise ContextTooLong(
                f"prompt {index} has {len(ids)} tokens; with {wanted} new it needs "
                f"{len(ids) + wanted}, and the limit is {limit}"
            )
        if resolved.stop and model.tokenizer is None:
            raise RequestError(f"{model.name} has no tokenizer, so stop strings cannot be met")
        resolved = resolved.with_max_tokens(min(resolved.max_tokens, room))
        for token in (*resolved.stop_token_ids, *resolved.logit_bias):
            if token >= model.config.vocab_size:
                raise RequestError(
                    f"token id {token} is not in the vocabulary of {model.config.vocab_size}"
                )
        samples += [
            Sample(
                ids,
                resolved,
                model.tokenizer,
                model.eos_token_ids,
                prompt_index=index,
                sample_index=i,
                slot=len(samples) + i,
                images=prepared.spans,
            )
            for i in range(resolved.n)
        ]
    return samples


def params_for(
    prompts: Sequence[Prompt | PreparedPrompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[SamplingParams]:
    """One for each prompt, whether one, a list or nothing was given."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    given: list[Any] = list(params) if isinstance(params, Sequence) else [params]
    for item in given:
        if not isinstance(item, SamplingParams):
            raise RequestError(
                f"params is a SamplingParams, or a list of them, not {type(item).__name__}"
            )
    if len(given) != len(prompts):
        raise RequestError(f"{len(given)} sampling parameters for {len(prompts)} prompts")
    return given
