"""A server whose model says what a test wants: its logits put the script's next token first."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from running import MEMORY, SIZES, Running, running

from kvist import AsyncLLM
from kvist.loading.model import Model


class Script:
    """A step that forgets what the model thinks; one request at a time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.ids: list[int] = []
        self.place = 0

    def __call__(self, batch: Any, cache: Any) -> torch.Tensor:
        rows = len(batch.logit_rows)
        logits = torch.zeros(rows, self.model.config.vocab_size)
        if rows:
            assert rows == 1, "a script is for one sample"
            logits[0, self.ids[min(self.place, len(self.ids) - 1)]] = 50.0
            self.place += 1
        return logits


class Scripted(Running):
    """A running server, and what it is to say."""

    script: Script

    def says(self, text: str) -> None:
        """What is answered next."""
        tokenizer = self.script.model.require_tokenizer()
        self.script.ids = [*tokenizer.encode(text), min(self.script.model.eos_token_ids)]
        self.script.place = 0


@contextlib.contextmanager
def scripted(model: Model) -> Iterator[Scripted]:
    """Serve a script while the block runs."""
    # A whole prompt in one step: how many rows of logits its chunks have is nobody's business.
    sizes = SIZES | {"max_batch_tokens": 1024}
    engine = AsyncLLM(model, cache_memory=MEMORY, prefix_cache=False, **sizes)
    script = Script(model)
    engine._engine.runner.step = script
    with running(model, engine, ui=False) as server:
        actor = Scripted(engine, server.served, server.url)
        actor.script = script
        yield actor
    engine.close()
