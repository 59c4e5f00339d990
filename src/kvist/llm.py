"""`LLM`: many prompts through the engine, in one blocking call.

The same prompts, parameters and results as `kvist.generate`, with continuous batching, paged and
shared cache, and a record of what the cache did for each. For requests that come and go there is
`AsyncLLM`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from kvist.core.garbage import rare_full_collections
from kvist.core.params import SamplingParams
from kvist.core.record import Snapshot
from kvist.core.results import Result
from kvist.engine import Engine, EngineConfig
from kvist.grammar import CompiledGrammar, Grammars
from kvist.loading.model import Model, Prompt, load
from kvist.serving import Desk, make_jobs


class LLM:
    """A model with an engine around it.

        >>> llm = kvist.LLM("smollm2-135m", cache_memory=1 << 30)
        >>> results = llm.generate(["Hello", "Once upon a time"], params)

    Args:
        model: a `kvist.Model`, or what `kvist.load` takes.
        dtype: as in `kvist.load`.
        device: as in `kvist.load`.
        executor: as in `kvist.load`.
        weights: as in `kvist.load`.
        options: the fields of `EngineConfig` (codec, block_size, max_batch_tokens, cache_memory,
            prefix_cache, …).
    """

    def __init__(
        self,
        model: Model | str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        executor: str = "auto",
        weights: str = "auto",
        **options: Any,
    ) -> None:
        """Load the model if need be, and allocate the cache."""
        config = EngineConfig(**options)  # first: a wrong option costs no loading
        if not isinstance(model, Model):
            model = load(model, dtype, device, executor=executor, weights=weights)
        self.model = model
        self.grammars = Grammars(model)
        self.engine = Engine(self.model, config, mask_of=self.grammars.mask_of)
        self._desk = Desk(self.engine)
        self._ids = count()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        priority: int = 0,
        cache_salt: str = "",
        grammar: CompiledGrammar | Sequence[CompiledGrammar | None] | None = None,
    ) -> list[Result]:
        """Generate from all prompts; results in order, n for each where a prompt asks for n.

        Those that may become longest are begun first, so that none of them is left alone at the
        end.

        Args:
            prompts: a list; each is text, token ids, or chat messages.
            params: one for all, or one for each prompt; None takes the model's defaults.
            progress: show a bar on stderr.
            priority: lower goes first, where others wait.
            cache_salt: cached prefixes are shared only among calls of the same salt.
            grammar: what the outputs are held to, from `self.grammars`; one for all, or one or None
                for each prompt.

        Raises:
            RequestError: a prompt or parameter makes no sense, or could never fit; nothing has been
                computed then.
        """
        number = next(self._ids)
        jobs = make_jobs(
            self.model,
            prompts,
            params,
            lambda index: f"{number}.{index}",
            priority=priority,
            cache_salt=cache_salt,
            grammar=grammar,
            grammars=self.grammars,
            max_length=self.engine.max_length,
        )
        try:
            for job in sorted(jobs, key=lambda job: -job.request.params.max_tokens):
                self._desk.add(job)
            total = sum(len(job.samples) for job in jobs)
            with rare_full_collections(), _bar(total, shown=progress) as bar:
                while self.engine.has_unfinished:
                    touched = self._desk.take(self.engine.step())
                    bar.advance(sum(sample.record is not None for sample in touched))
        except BaseException:
            # Whatever it was (a request that cannot fit, Ctrl-C): leave nothing behind.
            for job in jobs:
                self._desk.abort(job.request.id)
            raise
        return [sample.result() for job in jobs for sample in job.samples]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Result]:
        """Answer one conversation, or a list of them; options as in `generate`."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        return self.generate([messages] if single else messages, params, **options)  # type: ignore[arg-type, list-item]

    def export_prefix(self, prompt: Prompt, path: str | Path, *, cache_salt: str = "") -> int:
        """Write what is cached of a prompt to a file; see `kvist.prefixes`."""
        from kvist.prefixes import export_prefix

        ids = self.model.encode(prompt)
        return export_prefix(self.engine, ids, Path(path), cache_salt=cache_salt)

    def import_prefix(self, path: str | Path, *, cache_salt: str = "") -> int:
        """Read an exported prefix into the cache; see `kvist.prefixes`."""
        from kvist.prefixes import import_prefix

        return import_prefix(self.engine, Path(path), cache_salt=cache_salt)

    def snapshot(self) -> Snapshot:
        """What the cache holds and how it has done so far, as plain data."""
        return self.engine.snapshot()


class _Bar(Protocol):
    def advance(self, count: int) -> None: ...


class _NoBar:
    def advance(self, count: int) -> None:
        """Show nothing."""


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[_Bar]:
    """A progress bar on stderr, or nothing."""
    if not shown:
        yield _NoBar()
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("generating", total=total)

        class Shown:
            def advance(self, count: int) -> None:
                bars.advance(task, count)

        yield Shown()
