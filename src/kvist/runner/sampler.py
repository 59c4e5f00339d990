"""The sampler: from logits to tokens, all rows at once, each with its own request's parameters.

A row's draw depends on that row alone: its logits, its parameters, its history and one uniform
number from the counter (`core/rng.py`), never on its neighbours. Order: logit bias, minimum tokens,
penalties, temperature, top-k, top-p, min-p. Log-probabilities are the model's own, before all that.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvist.cache.batch import int_tensor
from kvist.core.params import ResolvedParams
from kvist.core.results import TokenLogprob
from kvist.errors import NumericalError
from kvist.kernels import can_run
from kvist.runner.filter_first import filter_then_temperature
from kvist.runner.greedy import all_finite, finite_rows, largest


@dataclass
class _Slot:
    """A running sequence's sampling state."""

    params: ResolvedParams
    counts: Tensor | None = None  # [vocab], how often each token is in the output
    seen: Tensor | None = None  # [vocab] bool, in prompt or output (repetition penalty)
    bias: Tensor | None = None  # [vocab]


class Sampler:
    """Sampling state by slot; `choose` takes the next token of some of them."""

    def __init__(self, vocab_size: int, device: str | torch.device = "cpu") -> None:
        """Make an empty sampler for logits of this width."""
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._by_kernels = self.device.type == "cuda" and can_run(self.device)
        self._slots: dict[int, _Slot] = {}

    def admit(
        self,
        slot: int,
        params: ResolvedParams,
        prompt_ids: tuple[int, ...],
        output_ids: tuple[int, ...] = (),
    ) -> None:
        """A sequence takes this slot; prompt and output so far count for its penalties."""
        state = _Slot(params)
        if params.presence_penalty or params.frequency_penalty:
            output = torch.tensor(output_ids, dtype=torch.long, device=self.device)
            state.counts = output.bincount(minlength=self.vocab_size).float()
        if params.repetition_penalty != 1.0:
            state.seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
            said = torch.tensor((*prompt_ids, *output_ids), dtype=torch.long, device=self.device)
            state.seen[said] = True
        if params.logit_bias:
            state.bias = torch.zeros(self.vocab_size, device=self.device)
            for token, bias in params.logit_bias.items():
                state.bias[token] = bias
        self._slots[slot] = state

    def release(self, slot: int) -> None:
        """The slot's sequence has ended."""
        self._slots.pop(slot, None)

    def sample(
        self,
        logits: Tensor,
        slots: Rows[int],
        uniforms: Rows[float],
        banned: Rows[frozenset[int]] = (),
    ) -> list[int]:
        """`choose`, read from the device."""
        return self.choose(logits, slots, uniforms, banned).tolist()

    def choose(
        self,
        logits: Tensor,
        slots: Rows[int],
        uniforms: Rows[float],
        banned: Rows[frozenset[int]] = (),
        allowed: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Choose each row's next token and count it; waits for nothing on the device.

        Args:
            logits: `[R, vocab]` float32; not written to.
            slots: the slot of each row.
            uniforms: a number in [0, 1) for each row; unused where greedy.
            banned: ids that a row must not take (minimum tokens); empty for none.
            allowed: row -> bool `[vocab]`, the only tokens that it may take (a grammar's).

        Returns:
            `[R]` int64.
        """
        states = [self._slots[slot] for slot in slots]
        scores = self._adjust(logits, states, banned)
        for row, mask in (allowed or {}).items():
            scores = scores.clone() if scores is logits else scores
            scores[row].masked_fill_(~mask, -torch.inf)
        usual = not any(state.params.filter_first for state in states)
        if self._by_kernels and usual and scores.is_contiguous():
            tokens = self._launch(scores, [s.params for s in states], uniforms)
        elif all(state.params.greedy for state in states):
            tokens = largest(scores)
        else:
            tokens = self._draw(scores, [s.params for s in states], uniforms)
        for row, state in enumerate(states):
            if state.counts is not None:
                state.counts[tokens[row : row + 1]] += 1
            if state.seen is not None:
                state.seen[tokens[row : row + 1]] = True
        return tokens

    def _adjust(self, logits: Tensor, states: Rows[_Slot], banned: Rows[frozenset[int]]) -> Tensor:
        """Bias, bans and penalties; copies only if there are any."""
        scores = logits
        for row, state in enumerate(states):
            forbidden = banned[row] if banned else frozenset()
            touched = forbidden or state.bias is not None
            if not touched and state.seen is None and state.counts is None:
                continue
            if scores is logits:
                scores = logits.clone()
            line = scores[row]
            if state.bias is not None:
                line += state.bias
            if forbidden:
                line[int_tensor(sorted(forbidden), line.device)] = -torch.inf
            params = state.params
            if state.seen is not None:
                # CTRL (Keskar et al., 2019): divide what is positive, multiply what is negative.
                factor = params.repetition_penalty
                line.copy_(
                    torch.where(
                        state.seen, torch.where(line > 0, line / factor, line * factor), line
                    )
                )
            if state.counts is not None:
                line -= params.frequency_penalty * state.counts
                line -= params.presence_penalty * (state.counts > 0)
        return scores

    def rehearse(self, logits: Tensor) -> None:
        """Start the kernels that choose the likeliest and draw, for rows like these."""
        from kvist.kernels.sampling import sample

        tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        params = torch.zeros(5, len(logits), dtype=torch.float64, device=logits.device)
        sample(logits, None, tokens)
        sample(logits, params, tokens, filtered=False)

    def _launch(
        self, scores: Tensor, params: Rows[ResolvedParams], uniforms: Rows[float]
    ) -> Tensor:
        """The same by kernels that never sort; 0 for a row that is not finite."""
        from kvist.kernels.sampling import sample

        tokens = torch.empty(len(params), dtype=torch.long, device=scores.device)
        if all(p.greedy for p in params):
            sample(scores, None, tokens)
        else:
            columns = [kernel_params(p, self.vocab_size) for p in params]
            filtered = any(t > 0 and (k > 0 or p < 1) for t, k, p, _ in columns)
            numbers = torch.tensor([*zip(*columns, strict=True), uniforms], dtype=torch.float64)
            given = numbers.pin_memory().to(scores.device, non_blocking=True)
            sample(scores, given, tokens, filtered=filtered)
        return tokens.clamp_(min=0)

    def _draw(self, scores: Tensor, params: Rows[ResolvedParams], uniforms: Rows[float]) -> Tensor:
        """Inverse-CDF sampling over the vocabulary in its own order; greedy rows by arg-max."""
        device = scores.device
        greedy = torch.tensor([p.greedy for p in params], device=device)
        temperature = torch.tensor([p.temperature or 1.0 for p in params], device=device)
        scaled = _filter(scores / temperature[:, None], params)
        shares = torch.softmax(scaled, dim=-1, dtype=torch.float64)
        for row, p in enumerate(params):
            if p.filter_first and not p.greedy:
                shares[row] = filter_then_temperature(
                    scores[row], top_k=p.top_k, top_p=p.top_p, temperature=p.temperature
                )
        cdf = shares.cumsum(dim=-1)
        u = torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None]
        # The first token with cdf > u * total has a probability over zero.
        drawn = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]
        best = scores.argmax(dim=-1)
        return torch.where(greedy | (drawn >= self.vocab_size), best, drawn)


def is_simple(params: ResolvedParams) -> bool:
    """Whether sampling needs no more than temperature, filters and a uniform number."""
    return (
        params.logprobs is None
        and not params.filter_first
        and not params.logit_bias
        and not params.presence_penalty
        and not params.frequency_penalty
        and params.repetition_penalty == 1.0
    )


def kernel_params(params: ResolvedParams, vocab_size: int) -> tuple[float, float, float, float]:
    """Temperature, k, p and min-p as the sampling kernels take them; k is 0 where it keeps all."""
    k = params.top_k if 0 < params.top_k < vocab_size else 0
    # p through float32, in which this sampler compares.
    return params.temperature, k, torch.tensor(params.top_p).item(), params.min_p


def _filter(scaled: Tensor, params: Rows[ResolvedParams]) -> Tensor:
    """Top-k, then top-p over what is left, then min-p; what falls out is -inf.

    All three are thresholds on a row's scores, so that equal scores share their fate and the
    result does not depend on the order of a sort.
    """
    device, vocab = scaled.device, scaled.shape[-1]
    floor = torch.full(scaled.shape[:1], -torch.inf, device=device)
    by_k = [min(p.top_k, vocab) if p.top_k and not p.greedy else vocab for p in params]
    by_p = [p.top_p < 1.0 and not p.greedy for p in params]
    if any(by_p) or min(by_k) < vocab:
        # Only as much of the order as the rows that filter need: [R, width], descending.
        needed = (k for k, nucleus in zip(by_k, by_p, strict=True) if nucleus or k < vocab)
        width = max(needed)
        ordered = (
            scaled.topk(width, dim=-1).values
            if width < vocab
            else scaled.sort(dim=-1, descending=True).values
        )
        k = torch.tensor(by_k, device=device)[:, None]
        rank = torch.arange(width, device=device)
        limited = ordered.masked_fill(rank >= k, -torch.inf)
        # Unnormalised, in float64, scanned from the likeliest down: what stands behind a token,
        # and so how wide a neighbour made this table, cannot move the sum before it.
        mass = (limited - limited[:, :1]).double().exp()
        reached = mass.cumsum(dim=-1)
        p = torch.tensor([x.top_p if n else 2.0 for x, n in zip(params, by_p, strict=True)])
        share = p.to(device, torch.float64)[:, None] * reached[:, -1:]
        kept = (reached - mass < share) & (rank < k)
        lowest = limited.masked_fill(~kept, torch.inf).amin(dim=-1)
        filters = torch.tensor(
            [n or key < vocab for key, n in zip(by_k, by_p, strict=True)], device=device
        )
        floor = torch.where(filters, lowest, floor)
    if any(p.min_p > 0 for p in params):
        # p >= min_p * p_max, in logarithms.
        ratio = torch.tensor([p.min_p for p in params], device=device).log()
        floor = torch.maximum(floor, scaled.amax(dim=-1) + ratio)
    return scaled.masked_fill(scaled < floor[:, None], -torch.inf)


def check_finite(logits: Tensor, name: Callable[[int], str], step: int) -> None:
    """Raise if a row's logits cannot be sampled from.

    Args:
        logits: `[R, vocab]`.
        name: what to call the owner of a row.
        step: which step of the generation this is, from 0.

    Raises:
        NumericalError: names the step and the first such row's owner.
    """
    if not all_finite(logits):
        row = int(finite_rows(logits).logical_not().nonzero()[0, 0])
        raise NumericalError(
            f"the logits of {name(row)} are NaN or infinite at step {step}; the weights may be "
            "damaged, or dtype too narrow for this model: try dtype='float32'"
        )


def read_later(tensor: Tensor) -> Callable[[], Any]:
    """Take a tensor to the host, behind what is queued already.

    Returns:
        a function that waits for that copy alone, not for what is queued later, and gives the
        tensor as lists. The tensor may be written over at once.
    """
    if tensor.device.type != "cuda":
        values = tensor.tolist()
        return lambda: values
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> Any:
        copied.synchronize()
        return host.tolist()

    return read


def logprobs_later(
    logits: Tensor, tokens: Tensor, tops: Rows[int | None], rows: Tensor | None = None
) -> Callable[[], list[TokenLogprob]]:
    """Log-probabilities of the given tokens, with alternatives, queued; read when asked for.

    Args:
        logits: `[any, vocab]`, the model's own; may be written over at once.
        tokens: `[R]` int64, on the same device.
        tops: how many alternatives each token wants; None and 0 are none.
        rows: `[R]` int64, the row of logits that each token is from; None: in their order.
    """
    width = min(max((k or 0 for k in tops), default=0), logits.shape[-1])
    if logits.device.type == "cuda" and can_run(logits.device) and logits.is_contiguous():
        from kvist.kernels.logprobs import logprobs

        at = torch.arange(len(tokens), device=logits.device) if rows is None else rows
        found = logprobs(logits, at, tokens, width)
        own, ranks, ids, values = found.own, found.ranks, found.ids, found.values
    else:
        picked = logits if rows is None else logits[rows]
        normalised = torch.log_softmax(picked.float(), dim=-1)
        own = normalised.gather(1, tokens[:, None])
        ranks = 1 + (normalised > own).sum(dim=-1)
        own, (values, ids) = own[:, 0], normalised.topk(width, dim=-1)
    columns = [read_later(t) for t in (tokens, own, ids, values, ranks)]

    def read() -> list[TokenLogprob]:
        each = zip(*(column() for column in columns), tops, strict=True)
        return [
            TokenLogprob(token, own, tuple(zip(ids[: k or 0], values[: k or 0], strict=True)), rank)
            for token, own, ids, values, rank, k in each
        ]

    return read


def logprobs_of(logits: Tensor, tokens: Rows[int], tops: Rows[int | None]) -> list[TokenLogprob]:
    """`logprobs_later` of tokens that are known, read at once."""
    return logprobs_later(logits, int_tensor(tokens, logits.device), tops)()
