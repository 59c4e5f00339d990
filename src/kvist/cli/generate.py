"""`kvist generate`: one prompt, streamed to the terminal or as JSON."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvist.cli.options import (
    CacheOption,
    CodecOption,
    DeterministicOption,
    DeviceOption,
    DtypeOption,
    DummyOption,
    ExactOption,
    JsonOption,
    ModelArgument,
    SinksOption,
    WeightsOption,
    WindowOption,
    executor_name,
)
from kvist.errors import RequestError

if TYPE_CHECKING:
    from kvist.cache import Cache
    from kvist.core.results import Result
    from kvist.loading.model import Model, Prompt

SAMPLING = "Sampling"
CACHE = "Cache and computation"


def command(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; - reads standard input.", show_default=False),
    ] = None,
    token_ids: Annotated[
        str | None,
        typer.Option(help="The prompt as token ids: 1,2,3.", show_default=False),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="A picture for a vision-language model: a path; may be repeated.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system message for the chat template.", show_default=False)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens at most.", show_default="the model's, else 256")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the likeliest token.", rich_help_panel=SAMPLING)
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(show_default="the model's", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(show_default="a fresh one", rich_help_panel=SAMPLING)
    ] = None,
    n: Annotated[
        int, typer.Option("-n", "--samples", help="Samples.", rich_help_panel=SAMPLING)
    ] = 1,
    beams: Annotated[
        int, typer.Option(help="Search with N beams.", min=1, rich_help_panel=SAMPLING)
    ] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End at this text; may be repeated.", show_default=False, rich_help_panel=SAMPLING
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Go on after the end.", rich_help_panel=SAMPLING),
    ] = False,
    filter_first: Annotated[
        bool,
        typer.Option(
            "--filter-first",
            help="nanoVLM's order: filters before the temperature.",
            rich_help_panel=SAMPLING,
        ),
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="Log-probabilities and the N likeliest tokens (with --json).",
            show_default=False,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    cache: CacheOption = "dynamic",
    codec: CodecOption = "plain",
    window: WindowOption = None,
    sinks: SinksOption = 0,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache",
            help="Compute everything anew for each token, to see what a cache is worth.",
            rich_help_panel=CACHE,
        ),
    ] = False,
    speculate: Annotated[
        int,
        typer.Option(
            help="Guess up to N tokens a step from the text so far; same tokens, sooner.",
            min=0,
            rich_help_panel=CACHE,
        ),
    ] = 0,
    attention: Annotated[
        str, typer.Option(help="auto, sdpa, reference …", rich_help_panel=CACHE)
    ] = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    weights: WeightsOption = "auto",
    exact: ExactOption = False,
    deterministic: DeterministicOption = False,
    dummy: DummyOption = False,
    json: JsonOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only the text: no figures afterwards.")
    ] = False,
) -> None:
    """Generate from one prompt and stream the text.

    A model with a chat template is asked as a chat unless [bold]--raw[/] is given.
    """
    if (prompt is None) == (token_ids is None):
        raise RequestError("give a prompt, or token ids with --token-ids, and not both")
    if greedy and temperature:
        raise RequestError(f"--greedy and --temperature {temperature} contradict each other")
    if prompt == "-":
        prompt = sys.stdin.read()

    from kvist.core.params import SamplingParams
    from kvist.core.retention import SlidingWindow
    from kvist.generate import decode, open_cache
    from kvist.loading.model import load
    from kvist.prepare import prepare

    executor = executor_name(exact=exact, deterministic=deterministic)
    loaded = load(model, dtype, device, executor=executor, weights=weights, dummy=dummy)
    params = SamplingParams(
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_tokens=max_tokens,
        stop=stop or (),
        ignore_eos=ignore_eos,
        seed=seed,
        n=n,
        num_beams=beams,
        logprobs=logprobs,
        repetition_penalty=repetition_penalty,
        filter_first=filter_first,
    )
    asked = _prompt(loaded, prompt, token_ids, system, raw, image or [])
    samples = prepare(loaded, [asked], params)
    retention = None if window is None else SlidingWindow(window, sinks)
    store = open_cache(loaded, samples, cache, codec, retention)
    streaming = not json and len(samples) == 1
    for _ in decode(loaded, samples, store, attention, use_cache=not no_cache, speculate=speculate):
        if streaming:
            text = samples[0].delta().text
            print(text, end="", flush=True)
    results = [sample.result() for sample in samples]
    if json:
        _print_json(loaded, results, store)
        return
    if streaming:
        print()
        if loaded.tokenizer is None:
            print(",".join(map(str, results[0].token_ids)))
    else:
        for result in results:
            print(f"[{result.sample_index}] {result.text}")
    if not quiet:
        typer.secho(figures(results, store), err=True, dim=True)


def _prompt(
    model: "Model",
    prompt: str | None,
    token_ids: str | None,
    system: str | None,
    raw: bool,
    images: list[str],
) -> "Prompt":
    if images and model.processor is None:
        raise RequestError(f"{model.name} takes no pictures; leave --image out")
    if token_ids is not None:
        if images:
            raise RequestError("--image goes with a prompt in words, not with --token-ids")
        try:
            return [int(token) for token in token_ids.split(",")]
        except ValueError as error:
            raise RequestError(f"--token-ids takes ids such as 1,2,3, not {token_ids!r}") from error
    assert prompt is not None
    templated = model.tokenizer is not None and model.tokenizer.chat_template is not None
    if raw or not templated:
        if system is not None or images:
            option = "--image" if images else "--system"
            raise RequestError(f"{option} needs a chat template, which is not used here")
        return prompt
    content: Any = prompt
    if images:
        pictures = [{"type": "image", "image": path} for path in images]
        content = [*pictures, {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def figures(results: list["Result"], cache: "Cache") -> str:
    """What a generation cost, in a line."""
    first, total = results[0], sum(len(r.token_ids) for r in results)
    prompt = first.usage.prompt_tokens
    prefill, decode = first.timings.prefill, max(r.timings.decode for r in results)
    parts = [f"prefill {prompt} tokens in {prefill:.2f} s ({prompt / prefill:,.0f} tok/s)"]
    if decode > 0:
        parts.append(f"decode {total} tokens at {(total - len(results)) / decode:,.1f} tok/s")
    else:
        parts.append(f"{total} token")
    parts.append(f"cache {cache.nbytes / 1e6:.1f} MB")
    return " · ".join(parts)


def _print_json(model: "Model", results: list["Result"], cache: "Cache") -> None:
    from dataclasses import asdict
    from json import dumps

    objects: list[dict[str, Any]] = [asdict(result) for result in results]
    print(dumps({"model": model.name, "results": objects, "cache_bytes": cache.nbytes}))
