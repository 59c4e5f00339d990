"""nanoVLM's `LanguageModel` as an interface: padded batches, `start_pos`, tokens or embeddings.

A thin layer over the packed decoder, for code and references written against nanoVLM. Padding is
taken out on the way in and put back on the way out; kvist's own loop and engine never pad and do
not call this.
"""

import torch
from torch import Tensor

from kvist.cache import Batch, Cache, make_cache
from kvist.errors import ContextTooLong, RequestError
from kvist.models.decoder import Decoder


class LanguageModel:
    """Tokens in and logits out, or (`use_tokens=False`) embeddings in and hidden states out."""

    def __init__(self, decoder: Decoder, *, use_tokens: bool) -> None:
        """Share the decoder; it is not copied."""
        self.decoder = decoder
        self.use_tokens = use_tokens

    def __call__(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        kv_cache: Cache | None = None,
        start_pos: int = 0,
    ) -> tuple[Tensor, Cache]:
        """Run some columns of a padded batch.

        Args:
            x: `[B, T]` token ids, or `[B, T, hidden]`.
            attention_mask: `[B, start_pos + T]` or longer, 0 where padding stands. Columns that
                are in the cache must be masked as they were when they were written.
            kv_cache: what the call before returned; None begins anew. `kv_cache[i]` is block i's
                keys and values, without the padding.
            start_pos: columns that came before, padding included.

        Returns:
            `[B, T, vocab]` logits or `[B, T, hidden]`, zero where padding stands; the cache.

        Raises:
            ContextTooLong: past `lm_max_position_embeddings`, where nanoVLM changes the rotation
                and what it cached before no longer fits.
            RequestError: mask, cache and `start_pos` contradict each other.
        """
        rows, width = x.shape[:2]
        config, weight = self.decoder.config, self.decoder.model.embed_tokens.weight
        stop = start_pos + width
        if stop > config.max_positions:
            raise ContextTooLong(
                f"{stop} positions, but the model's limit is {config.max_positions}"
            )
        if attention_mask is None:
            attention_mask = torch.ones(rows, stop, dtype=torch.long)
        if attention_mask.shape[0] != rows or attention_mask.shape[1] < stop:
            raise RequestError(
                f"attention_mask is {list(attention_mask.shape)}; it must be [{rows}, {stop}]"
            )
        mask = attention_mask[:, :stop].bool().cpu()
        if kv_cache is None:
            kv_cache = make_cache(
                self.decoder.specs,
                rows=rows,
                max_length=config.max_positions,
                dtype=weight.dtype,
                device=weight.device,
            )
        seen = tuple(mask[:, :start_pos].sum(dim=1).tolist())
        if kv_cache.lengths != seen:
            raise RequestError(
                f"start_pos {start_pos} and the mask say that rows have {list(seen)} tokens "
                f"before, but the cache holds {list(kv_cache.lengths)}"
            )

        # Only what is no padding, row by row. Padding counts in positions, as in nanoVLM: the
        # rotation is relative, so that moves rounding errors and nothing else.
        real = mask[:, start_pos:].to(x.device)
        columns = torch.arange(start_pos, stop, device=x.device).expand(rows, -1)
        counts = real.sum(dim=1).tolist()
        batch = Batch.pack(
            [[0] * count for count in counts], kv_cache.lengths, device=weight.device, logits="none"
        )
        packed = self.decoder.embed(x[real]) if self.use_tokens else x[real]
        hidden = self.decoder(packed, columns[real], kv_cache.bind(batch))
        kv_cache.commit(batch)
        out = self.decoder.logits(hidden) if self.use_tokens else hidden
        padded = out.new_zeros(rows, width, out.shape[-1])
        padded[real] = out
        return padded, kv_cache

    @torch.inference_mode()
    def generate(self, inputs: Tensor, max_new_tokens: int = 20) -> Tensor:
        """Go on greedily, from tokens with tokens, from embeddings with hidden states.

        In the second mode the last hidden state itself is the next input, as in nanoVLM.

        Args:
            inputs: `[B, T]` or `[T]` token ids, or `[B, T, hidden]`.
            max_new_tokens: how many columns to add.

        Returns:
            The inputs with the new columns behind them.
        """
        if inputs.dim() == 1:
            inputs = inputs[None]
        columns = [inputs]
        x, cache, start = inputs, None, 0
        for _ in range(max_new_tokens):
            out, cache = self(x, kv_cache=cache, start_pos=start)
            start += x.shape[1]
            last = out[:, -1:]
            x = last.argmax(dim=-1) if self.use_tokens else last
            columns.append(x)
        return torch.cat(columns, dim=1)
