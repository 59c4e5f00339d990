"""A conversation with a model: its messages, its cache, and what of the cache is still true.

Every turn renders the chat template over all messages anew, finds how much of that the cache holds
already, goes back to there and computes only the rest; so it stays right where a template rewrites
history (Qwen3 leaves out the thinking of earlier turns). It knows no terminal: `kvist chat` is one
way to show it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from kvist.attention import check_backend
from kvist.cache import Batch, Cache, Codec, KVCache, make_cache
from kvist.chat.saved import load_chat, save_chat, saved_chat
from kvist.core.params import SamplingParams
from kvist.core.request import ImageSpan
from kvist.core.results import Delta
from kvist.core.retention import Retention
from kvist.errors import CacheError, ContextTooLong, RequestError
from kvist.generate import decode
from kvist.loading.image_prompt import PreparedPrompt
from kvist.loading.images import ImageInput, data_url
from kvist.loading.model import Model
from kvist.prepare import prepare
from kvist.runner.executors import choose_step
from kvist.runner.step import StepFunction
from kvist.sample import Sample
from kvist.text.thinking import CLOSE, ThinkingParser, opens_thinking

__all__ = ["Conversation", "Turn"]

ANSWER_LIMIT = 4096
"""New tokens of an answer, where neither the caller nor the model says otherwise."""

# Prompt tokens in one forward: small enough that `stop` is heeded soon, also on a CPU.
_CHUNK = 512


@dataclass(frozen=True)
class Turn:
    """What one turn took.

    Args:
        prompt_tokens: the whole rendered conversation before the answer.
        cached_tokens: those of them that the cache held; the others were computed.
        output_tokens: tokens of the answer.
        prefill: seconds to the answer's first token.
        decode: seconds from there to its last.
        finish_reason: "stop", "length", or "interrupted".
        remark: why less was cached than could have been, if so.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int = 0
    prefill: float = 0.0
    decode: float = 0.0
    finish_reason: str = "interrupted"
    remark: str = ""

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt_tokens - self.cached_tokens


class _Stopped(Exception):
    """Leaves a step before it begins; never seen outside."""


class Conversation:
    """Turns of one chat over one cache.

    Invariant: the cache's row holds the first `cache.lengths[0]` of `_ids`, or more than all of
    them, whatever a turn was interrupted by. So the next turn can compare ids and go on.

    Attributes:
        model: what answers.
        context: tokens that the conversation may take, answers included.
        codec: how keys and values are written.
        layout: where they lie.
        retention: which of them stay; None is all.
        turn: what the last answer took, None before the first.
        starts_thinking: whether the prompt of the last `say` opened a thought, so that its answer
            begins inside.
    """

    def __init__(
        self,
        model: Model,
        codec: str | Codec = "plain",
        layout: str = "dynamic",
        retention: Retention | None = None,
        *,
        system: str | None = None,
        context: int | None = None,
        attention: str = "auto",
        speculate: int = 0,
        step: StepFunction | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            model: from `kvist.load`, with a chat template.
            codec: how keys and values are written, as in `kvist.generate`.
            layout: where tokens lie.
            retention: which tokens stay; all by default.
            system: the system message.
            context: tokens at most; the model's own limit by default.
            attention: a backend's name, or "auto".
            speculate: tokens to guess at each step from what was said before.
            step: what computes a step; None takes the model's executor.
            template: variables of the chat template, such as `{"enable_thinking": False}`.

        Raises:
            RequestError: the model has no chat template, or it takes no system message.
            CacheError: no layout or codec of this name.
        """
        if context is not None and not 0 < context <= model.max_length:
            raise RequestError(
                f"context must be 1..{model.max_length} tokens, the model's limit, not {context}"
            )
        self.model = model
        self.context = context or model.max_length
        self.layout = layout
        self.turn: Turn | None = None
        self.starts_thinking = False
        self.retention = retention
        self.codec = model.codec(codec) if isinstance(codec, str) else codec
        check_backend(attention)
        self._attention = attention
        self._speculate = speculate
        self._template = dict(template or {})
        self._messages: list[dict[str, Any]] = []
        self._ids: tuple[int, ...] = ()
        self._images: tuple[ImageSpan, ...] = ()  # that stand among the ids
        self._forward = step or choose_step(model.executor, model)
        self._answering = self._stopping = False
        self.set_system(system)
        self._cache = self._empty_cache()

    # What was said.

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the messages, the system message first if there is one."""
        return [dict(message) for message in self._messages]

    @property
    def system(self) -> str | None:
        """The system message, if one was given."""
        for message in self._messages[:1]:
            if message["role"] == "system":
                return str(message["content"])
        return None

    def set_system(self, text: str | None) -> None:
        """Replace the system message, or take it away; what was said stays.

        Raises:
            RequestError: the chat template takes no system message; nothing has changed.
        """
        self._refuse_while_answering()
        head = [] if text is None else [{"role": "system", "content": text}]
        said = self._messages[1:] if self.system is not None else self._messages
        self._prepare([*head, *(said or [{"role": "user", "content": "Hello"}])])
        self._messages = [*head, *said]

    def undo(self) -> str | None:
        """Take back the last turn; return what the user had said, None if there was nothing."""
        self._refuse_while_answering()
        for index in range(len(self._messages) - 1, -1, -1):
            if self._messages[index]["role"] == "user":
                said = text_of(self._messages[index])
                del self._messages[index:]
                return said
        return None

    def reset(self) -> None:
        """Begin anew, with the same system message and an empty cache."""
        self._refuse_while_answering()
        del self._messages[0 if self.system is None else 1 :]
        self._forget()
        self.turn = None

    # Answers.

    def say(
        self,
        text: str,
        params: SamplingParams | None = None,
        images: Sequence[ImageInput] = (),
    ) -> Iterator[Delta]:
        """Say something and stream the answer.

        What was said and answered is kept once the stream ends, also where `stop` or closing the
        stream ended it; a turn that was interrupted before its first word is not.

        Args:
            text: the user's message.
            params: how to answer; None takes the model's defaults. A seed stands for the whole
                conversation: each turn draws its own numbers from it.
            images: pictures that the message shows: paths, bytes, data URLs or PIL images. The
                conversation keeps them, so a file may change or go afterwards.

        Raises:
            ContextTooLong: there is no room for the message and an answer.
            RequestError: a parameter makes no sense, a picture cannot be read, the model takes
                none, or an answer is still under way.
        """
        self._refuse_while_answering()
        message: dict[str, Any] = {"role": "user", "content": text}
        if images:
            parts = [{"type": "image", "image": self.picture(image)} for image in images]
            message["content"] = [*parts, {"type": "text", "text": text}]
        prompt = self._prepare([*self._messages, message])
        sample = self._sample(prompt, params or SamplingParams())
        said = [{**one, "content": text_of(one)} for one in (*self._messages, message)]
        self.starts_thinking = opens_thinking(self.model.render_chat(said, **self._template))
        self._stopping = False
        return self._answer(message, sample)

    def picture(self, image: ImageInput) -> str:
        """A picture in the form that messages keep, a data URL.

        Raises:
            RequestError: it cannot be read, or the model takes no pictures.
        """
        if self.model.processor is None:
            raise RequestError(f"{self.model.name} takes no pictures; it reads text alone")
        return data_url(image, self.model.processor.limits)

    def stop(self) -> None:
        """End the answer under way before its next step; may be called from a signal handler."""
        self._stopping = True

    def _prepare(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> PreparedPrompt:
        return self.model.prepare(messages, **self._template, **template)

    def _sample(self, prepared: PreparedPrompt, params: SamplingParams) -> Sample:
        """The sample to run: one, with room in the context, and with numbers of its own."""
        if params.n > 1 or params.num_beams > 1:
            raise RequestError(
                f"a chat gives one answer, not n={params.n}, num_beams={params.num_beams}"
            )
        prompt = prepared.token_ids
        room = self.context - len(prompt)
        if room < max(params.min_tokens, 1):
            raise ContextTooLong(
                f"with this message the conversation takes {len(prompt):,} tokens, and the context "
                f"is {self.context:,}: say less, undo turns, or reset"
            )
        usual = self.model.generation_config.get("max_new_tokens") or ANSWER_LIMIT
        limit = params.max_tokens or max(usual, params.min_tokens)
        params = replace(params, max_tokens=min(limit, room))
        if params.seed is not None:
            params = replace(params, seed=params.seed + len(self._messages))
        [sample] = prepare(self.model, [prompt], params)
        sample.images = prepared.spans
        return sample

    def _answer(self, message: dict[str, Any], sample: Sample) -> Iterator[Delta]:
        """Run the turn; however it ends, messages and ids agree with the cache afterwards."""
        self._answering = True
        prompt, output = sample.sequence.prompt_ids, sample.sequence.output_ids
        pieces: list[str] = []
        kept = True
        began = first = last = perf_counter()
        cached, remark = self._rewind(prompt, sample.images)
        try:
            for _ in decode(
                self.model,
                [sample],
                self._cache,
                self._attention,
                _CHUNK,
                speculate=self._speculate,
                step=self._step,
            ):
                last = perf_counter()
                first = last if not pieces else first
                delta = sample.delta()
                pieces.append(delta.text)
                yield delta
        except _Stopped:
            pass
        except GeneratorExit:
            raise
        except BaseException as error:
            # Whatever it was, it may have come in the middle of a write.
            self._forget()
            kept = isinstance(error, KeyboardInterrupt)
            raise
        finally:
            self._answering = False
            self._ids = (*prompt, *output[:-1])  # the last token is sampled, but not written
            self._images = sample.images
            answer = "".join(pieces)
            if kept and (answer.strip() or sample.finish_reason):
                answer = _with_thought_closed(answer, self.starts_thinking)
                self._messages += [message, {"role": "assistant", "content": answer}]
            if kept:
                self.turn = Turn(
                    prompt_tokens=len(prompt),
                    cached_tokens=cached,
                    output_tokens=len(output),
                    prefill=first - began,
                    decode=last - first,
                    finish_reason=sample.finish_reason or "interrupted",
                    remark=remark,
                )

    def _step(self, batch: Batch, cache: KVCache) -> Tensor:
        if self._stopping:
            raise _Stopped
        return self._forward(batch, cache)

    # The cache.

    @property
    def cache(self) -> Cache:
        """The cache, to look into."""
        return self._cache

    @property
    def cached_ids(self) -> tuple[int, ...]:
        """The tokens whose keys and values the cache holds."""
        return self._ids[: self._cache.lengths[0]]

    @property
    def tokens_used(self) -> int:
        """Tokens of the context that the messages so far take."""
        if not any(message["role"] == "user" for message in self._messages):
            return 0
        return len(self._prepare(self._messages, add_generation_prompt=False).token_ids)

    def save(self, path: Path) -> None:
        """Write messages, tokens and cache to one file, from which `restore` goes on.

        Raises:
            CacheError: it cannot be written; an old file stays.
            RequestError: an answer is under way.
        """
        self._refuse_while_answering()
        if self._cache.lengths[0] > len(self._ids):
            self._cache.crop(len(self._ids))  # guesses that were not read any more
        save_chat(path, self.model, self._messages, self._cache, self._ids)

    def restore(self, path: Path) -> None:
        """Go on with a saved conversation, without a prefill: with its codec, layout and retention.

        Raises:
            CacheError: it is of another model or tokenizer, damaged, or no conversation; nothing
                has changed.
            ContextTooLong: it is longer than the context.
            RequestError: an answer is under way.
        """
        self._refuse_while_answering()
        saved = saved_chat(path)
        if len(saved.token_ids) > self.context:
            raise ContextTooLong(
                f"{path} has {len(saved.token_ids):,} tokens, and the context is {self.context:,}"
            )
        before = self.codec, self.layout, self.retention, self._cache
        self.codec = self.model.codec(saved.codec)
        self.layout, self.retention = saved.layout, saved.retention
        try:
            self._cache = self._empty_cache()
            load_chat(path, self.model, self._cache)
            images = self._prepare(saved.messages).spans if saved.messages else ()
        except BaseException:
            self.codec, self.layout, self.retention, self._cache = before
            raise
        self._messages, self._ids, self.turn = list(saved.messages), saved.token_ids, None
        self._images = images

    def _refuse_while_answering(self) -> None:
        if self._answering:
            raise RequestError("an answer is still under way; let it end, or close its stream")

    def _rewind(self, prompt: Sequence[int], images: Sequence[ImageSpan]) -> tuple[int, str]:
        """Go back to what the cache and the prompt have in common, but for the prompt's last token.

        That one is always computed: its logits choose the answer's first token.

        Returns:
            Tokens that stay cached, and a remark if that is fewer than they have in common.
        """
        held = self._cache.lengths[0]
        common = min(_common_prefix(self.cached_ids, prompt), len(prompt) - 1)
        common = min(common, _first_difference(self._images, images))
        if common < held:
            try:
                self._cache.crop(common)
            except CacheError:
                self._forget()
                return 0, f"the cache could not go back from {held:,} to {common:,} tokens"
        return common, ""

    def _forget(self) -> None:
        """An empty cache instead of this one."""
        self._cache, self._ids, self._images = self._empty_cache(), (), ()

    def _empty_cache(self) -> Cache:
        return make_cache(
            self.model.specs,
            layout=self.layout,
            codec=self.codec,
            retention=self.retention,
            max_length=self.context,
            dtype=self.model.dtype,
            device=self.model.device,
        )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _first_difference(ours: Sequence[ImageSpan], theirs: Sequence[ImageSpan]) -> int:
    """The first position where one has a picture and the other none, or another one."""
    left, right = ({(s.start, s.length, s.digest) for s in spans} for spans in (ours, theirs))
    return min((start for start, _, _ in left ^ right), default=sys.maxsize)


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says, pictures left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _with_thought_closed(answer: str, inside: bool) -> str:
    """An answer that ended within a thought, with its end, so that templates can tell the two."""
    parser = ThinkingParser(inside=inside)
    parser.push(answer)
    return f"{answer}\n{CLOSE}\n\n" if parser.inside else answer
