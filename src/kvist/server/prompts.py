"""Prompts as requests bring them, to prompts as the engine takes them.

Chats go through the model's template, pictures through its processor, both on a worker thread.
"""

from collections.abc import Sequence
from typing import Any

from kvist.errors import KvistError, RequestError
from kvist.loading.image_prompt import PreparedPrompt
from kvist.server.errors import ApiError, refused
from kvist.server.fetch import fetch
from kvist.server.formats import Thinking
from kvist.server.outputs import prompt_opens_thinking
from kvist.server.served import Served
from kvist.server.wire.chat import ImagePart, JSONObject, Message, Tool
from kvist.text.thinking import CLOSE, OPEN

# Variables of a chat template that are not the client's to set.
_OURS = {"messages", "tools", "documents", "add_generation_prompt", "special_tokens", "template"}
_OURS |= {"bos_token", "eos_token", "unk_token", "pad_token", "allow_images", "prompt", "images"}


async def chat_prompt(
    served: Served,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    template: JSONObject | None = None,
    add_generation_prompt: bool = True,
) -> PreparedPrompt:
    """A chat, rendered and tokenized, its pictures cut into tiles.

    Raises:
        ApiError: naming the message or picture.
    """
    variables: dict[str, Any] = dict(template or {})
    if taken := sorted(variables.keys() & _OURS):
        raise ApiError(
            400, f"chat_template_kwargs may not set {taken[0]}", param="chat_template_kwargs"
        )
    if tools:
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    if not add_generation_prompt:
        variables["add_generation_prompt"] = False
    _check_images(served, messages)
    try:
        return await served.aside(
            lambda: served.model.prepare(
                [_plain(served, message) for message in messages], **variables
            )
        )
    except KvistError as error:
        raise refused(error, "messages") from error


async def text_prompt(
    served: Served, prompt: str | list[int], *, add_special_tokens: bool = True
) -> PreparedPrompt:
    """A text, tokenized, or token ids, checked.

    Raises:
        ApiError: empty, or ids that the model does not have.
    """

    def prepare() -> PreparedPrompt:
        if isinstance(prompt, str) and not add_special_tokens:
            ids = served.model.require_tokenizer().encode(prompt)
            return PreparedPrompt(tuple(ids), ())
        return served.model.prepare(prompt)

    try:
        return await served.aside(prepare)
    except KvistError as error:
        raise refused(error, "prompt") from error


def thinking_of(served: Served, prompt: PreparedPrompt) -> Thinking:
    """Whether this prompt's output may begin with a thought, or begins inside one."""
    tokenizer = served.model.tokenizer
    if tokenizer is None:
        return "never"
    if prompt_opens_thinking(served.model, prompt.token_ids):
        return "begun"
    tail = tokenizer.decode(prompt.token_ids[-16:], skip_special_tokens=False)
    thinks = OPEN in (tokenizer.chat_template or "") and not tail.rstrip().endswith(CLOSE)
    return "maybe" if thinks else "never"


def _check_images(served: Served, messages: Sequence[Message]) -> None:
    images = sum(
        isinstance(part, ImagePart)
        for message in messages
        if isinstance(message.content, list)
        for part in message.content
    )
    if images and served.model.processor is None:
        raise ApiError(400, f"{served.names[0]} takes no pictures", param="messages")
    if images > served.settings.max_images:
        raise ApiError(
            400,
            f"{images} pictures in one request; at most {served.settings.max_images}",
            param="messages",
        )


def _plain(served: Served, message: Message) -> dict[str, Any]:
    """A message as chat templates read it, its pictures at hand."""
    try:
        plain = message.model_dump(exclude_none=True)
    except (ValueError, RecursionError) as error:
        raise RequestError("messages holds values that are nested too deeply") from error
    if isinstance(message.content, list):
        plain["content"] = [
            {"type": "image", "image": _picture(served, part.image_url.url)}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part.text}
            for part in message.content
        ]
    if message.tool_calls:
        plain["tool_calls"] = [_call(served, call) for call in plain["tool_calls"]]
    return plain


def _picture(served: Served, url: str) -> str | bytes:
    if url[:5].lower() == "data:":
        return url
    if url[:7].lower() == "http://" or url[:8].lower() == "https://":
        settings = served.settings
        return fetch(url, settings.image_hosts, settings.max_image_bytes)
    raise RequestError("a picture's url is a data URL, data:image/png;base64,...")


def _call(served: Served, call: dict[str, Any]) -> dict[str, Any]:
    """A call as the template wants it: templates that do not ask take arguments as an object."""
    from json import loads

    tokenizer = served.model.tokenizer
    arguments = call["function"]["arguments"]
    by_itself = tokenizer is not None and "is string" in (tokenizer.chat_template or "")
    if isinstance(arguments, str) and not by_itself:
        try:
            arguments = loads(arguments or "{}")
        except ValueError as error:
            name = call["function"]["name"]
            raise RequestError(f"messages: the arguments of {name!r} are not JSON") from error
    return {**call, "function": {**call["function"], "arguments": arguments}}
