"""`kvist quality`: what a lossy codec, or weights in fewer bits, cost on text; never claimed.

Each window of text is run once with the plain cache and once with each codec, and the two are
compared token by token: they differ in nothing but the codec, so the differences are paired and
their standard error is small. So are a model's own weights and the same in fp8. What attention sees
is always `decode(encode(x))`, so one forward over a window measures what generation with that cache
would meet.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvist.cache import Batch, Codec, make_cache
from kvist.cache.groups import bytes_per_token, group_layers
from kvist.errors import RequestError
from kvist.loading.image_prompt import PreparedPrompt
from kvist.loading.model import Model
from kvist.reports.needle import NeedleScore
from kvist.runner.encoder_cache import with_images

ROWS = 256  # rows of logits at a time: a vocabulary is wide

Window = Sequence[int] | PreparedPrompt
"""Token ids, or a prompt with pictures; places whose next token is a picture's do not count."""


@dataclass(frozen=True)
class CodecQuality:
    """One codec against the plain cache.

    Args:
        codec: its name.
        tokens: tokens that were predicted.
        perplexity: on the text.
        perplexity_change: relative to the plain cache, 0.01 = 1 % worse.
        standard_error: of that change, over windows.
        kl: mean Kullback-Leibler divergence, nats, of this cache's distribution from the plain's.
        top1: share of places where both find the same token likeliest.
        bits_per_value: bits of cache for each number of keys and values, all planes included.
        bytes_per_token: bytes of cache for a token, all layers.
    """

    codec: str
    tokens: int
    perplexity: float
    perplexity_change: float
    standard_error: float
    kl: float
    top1: float
    bits_per_value: float
    bytes_per_token: int


@dataclass(frozen=True)
class WeightsQuality:
    """Weights kept in fewer bits against the model's own, both with the plain cache.

    Args:
        weights: a name in `kvist.models.fp8.WEIGHTS`.
        tokens: tokens that were predicted.
        perplexity: on the text.
        perplexity_change: relative to the model's own weights, 0.01 = 1 % worse.
        standard_error: of that change, over windows.
        kl: mean Kullback-Leibler divergence, nats, of its distribution from the model's own.
        top1: share of places where both find the same token likeliest.
        nbytes: of all weights and scales.
    """

    weights: str
    tokens: int
    perplexity: float
    perplexity_change: float
    standard_error: float
    kl: float
    top1: float
    nbytes: int


@dataclass(frozen=True)
class Sensitivity:
    """What a codec costs if one layer alone is written with it."""

    layer: int
    kl: float


@dataclass(frozen=True)
class Quality:
    """A whole measurement; `advice` in sentences."""

    model: str
    window: int
    windows: int
    codecs: tuple[CodecQuality, ...]
    weights: tuple[WeightsQuality, ...] = ()
    layers: tuple[Sensitivity, ...] = ()
    needles: tuple[NeedleScore, ...] = ()
    advice: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def windows_of(token_ids: Sequence[int], window: int, most: int | None = None) -> list[list[int]]:
    """Whole windows of a text, none shared; if only some, spread evenly over it.

    Raises:
        RequestError: the text does not fill one.
    """
    count = len(token_ids) // window
    if not count:
        raise RequestError(
            f"the text has {len(token_ids)} tokens, fewer than one window of {window}"
        )
    most = count if most is None else min(count, most)
    starts = [i * count // most * window for i in range(most)]
    return [list(token_ids[start : start + window]) for start in starts]


@torch.inference_mode()
def measure(
    model: Model,
    windows: Sequence[Window],
    codecs: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CodecQuality]:
    """Each codec on each window, paired with the plain cache.

    Args:
        model: the model.
        windows: pieces of text, at least two tokens in each, or prompts with pictures.
        codecs: names, as `make_codec` takes them.
        progress: told how many of how many forwards are done.
    """
    made = {name: model.codec(name) for name in codecs}
    others = [None if name == "plain" else (model, codec) for name, codec in made.items()]
    sums = _paired(model, windows, others, progress)
    return [
        found.result(name, codec, model)
        for (name, codec), found in zip(made.items(), sums, strict=True)
    ]


@torch.inference_mode()
def measure_weights(
    model: Model,
    others: Sequence[Model],
    windows: Sequence[Window],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[WeightsQuality]:
    """The same model with other weights, on each window, paired with the model's own.

    Args:
        model: with its own weights, in the type that is compared with.
        others: loaded from the same checkpoint with other `weights`.
        windows: as in `measure`.
        progress: told how many of how many forwards are done.
    """
    # Embedding and head are the same.
    plain = [(other, other.codec("plain")) for other in others]
    sums = _paired(model, windows, plain, progress)
    return [
        WeightsQuality(other.weights, **found.loss(), nbytes=weight_bytes(other))
        for other, found in zip(others, sums, strict=True)
    ]


def weight_bytes(model: Model) -> int:
    """Bytes of a model's weights, with the scales of those that have them."""
    kept = (*model.lm.parameters(), *model.lm.buffers())
    return sum(tensor.nbytes for tensor in kept)


@torch.inference_mode()
def sensitivity(
    model: Model,
    windows: Sequence[Window],
    codec: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sensitivity]:
    """The KL of each layer alone in `codec`, the others plain."""
    layers, found = len(model.specs), []
    plain = [_hidden(model, window, model.codec("plain")) for window in windows]
    for layer in range(layers):
        alone = model.codec(f"plain,{layer}={codec}")
        total, count = 0.0, 0
        for window, reference in zip(windows, plain, strict=True):
            compared = _compare(model, reference, _hidden(model, window, alone), window)
            total, count = total + compared.kl, count + compared.tokens
        found.append(Sensitivity(layer, total / count))
        progress(layer + 1, layers)
    return found


def advise(codec: str, layers: Sequence[Sensitivity], better: str = "int8") -> list[str]:
    """Which layers deserve more bits: those that cost several times what the middle one does."""
    ordered = sorted(found.kl for found in layers)
    middle, whole = ordered[len(ordered) // 2], sum(ordered)
    costly = [found.layer for found in layers if found.kl > 4 * middle and found.kl > 0.05 * whole]
    if not costly or not whole:
        return [f"{codec}: no layer stands out; more bits for single layers would gain little."]
    share = sum(found.kl for found in layers if found.layer in costly) / whole
    setting = ",".join([codec, *(f"{layer}={better}" for layer in costly)])
    one = len(costly) == 1
    cause = f"{len(costly)} {'layer' if one else 'layers'} of {len(layers)}"
    cause = f"{codec}: {cause} {'causes' if one else 'cause'} {share:.0%} of the loss"
    return [f'{cause}; codec="{setting}" spends {better} on {"it" if one else "them"} alone.']


def _parts(window: Window) -> PreparedPrompt:
    return window if isinstance(window, PreparedPrompt) else PreparedPrompt(tuple(window), ())


def _hidden(model: Model, window: Window, codec: Codec) -> Tensor:
    """`[len(window), hidden]` after the last norm."""
    ids, spans = _parts(window).token_ids, _parts(window).spans
    cache = make_cache(
        model.specs,
        layout="static",
        codec=codec,
        max_length=len(ids),
        dtype=model.dtype,
        device=model.device,
    )
    batch = Batch.pack([ids], [0], device=model.device, logits="none")
    embeddings = model.lm.embed(batch.token_ids)
    if model.images is not None:
        pictured = with_images(batch, model.lm, [spans], model.images).embeddings
        embeddings = embeddings if pictured is None else pictured
    return model.lm.forward(embeddings, batch.positions, cache.bind(batch))


@dataclass(frozen=True)
class _Compared:
    """Sums over one window's places."""

    tokens: int
    nll: float
    plain_nll: float
    kl: float
    agree: int


def _compare(model: Model, plain: Tensor, hidden: Tensor, window: Window) -> _Compared:
    ids, spans = _parts(window).token_ids, _parts(window).spans
    shown = {place for span in spans for place in range(span.start, span.stop)}
    # The row at place i predicts the token at i + 1.
    places = torch.tensor([i for i in range(len(ids) - 1) if i + 1 not in shown])
    following = torch.tensor(ids)[places + 1].to(model.device)
    places = places.to(model.device)
    nll = plain_nll = kl = 0.0
    agree = 0
    for start in range(0, len(following), ROWS):
        rows = places[start : start + ROWS]
        p = torch.log_softmax(model.lm.logits(plain[rows]), dim=-1)
        q = p if hidden is plain else torch.log_softmax(model.lm.logits(hidden[rows]), dim=-1)
        target = following[start : start + ROWS, None]
        plain_nll -= float(p.gather(1, target).sum(dtype=torch.float64))
        nll -= float(q.gather(1, target).sum(dtype=torch.float64))
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
    return _Compared(len(following), nll, plain_nll, kl, agree)


class _Sums:
    """What is gathered over windows."""

    def __init__(self) -> None:
        self._windows: list[_Compared] = []

    def add(self, compared: _Compared) -> None:
        self._windows.append(compared)

    def loss(self) -> dict[str, Any]:
        """What was lost, as the fields that both kinds of quality have."""
        found = self._windows
        tokens = sum(w.tokens for w in found)
        changes = [(w.nll - w.plain_nll) / w.tokens for w in found]
        mean = sum(changes) / len(changes)
        spread = sum((c - mean) ** 2 for c in changes) / max(1, len(changes) - 1)
        error = math.sqrt(spread / len(changes))
        return {
            "tokens": tokens,
            "perplexity": math.exp(sum(w.nll for w in found) / tokens),
            "perplexity_change": math.expm1(mean),
            "standard_error": math.exp(mean) * error,
            "kl": sum(w.kl for w in found) / tokens,
            "top1": sum(w.agree for w in found) / tokens,
        }

    def result(self, name: str, codec: Codec, model: Model) -> CodecQuality:
        per_token = sum(bytes_per_token(group, codec) for group in group_layers(model.specs))
        values = sum(2 * spec.num_kv_heads * spec.head_dim for spec in attention_specs(model))
        return CodecQuality(
            codec=name,
            **self.loss(),
            bits_per_value=8 * per_token / values,
            bytes_per_token=per_token,
        )


def _paired(
    model: Model,
    windows: Sequence[Window],
    others: Sequence[tuple[Model, Codec] | None],
    progress: Callable[[int, int], None],
) -> list[_Sums]:
    """What each of `others` loses against the model's own plain cache; None is that itself."""
    sums = [_Sums() for _ in others]
    total, done = len(windows) * (1 + len(others)), 0
    for window in windows:
        own = _hidden(model, window, model.codec("plain"))
        done += 1
        progress(done, total)
        for other, found in zip(others, sums, strict=True):
            hidden = own if other is None else _hidden(other[0], window, other[1])
            found.add(_compare(model, own, hidden, window))
            done += 1
            progress(done, total)
    return sums


def attention_specs(model: Model) -> Iterator[Any]:
    """The specs of the layers that keep keys and values."""
    return (spec for spec in model.specs if hasattr(spec, "num_kv_heads"))
