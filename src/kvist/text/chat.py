"""Chats to text: messages in OpenAI's shape, rendered by a model's own chat template.

The result equals what transformers' `apply_chat_template` gives. Nothing is tokenized here, and
images are only passed through for models that take them. Called by everything that accepts chat
messages: `generate()`, the command line, a server.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kvist.errors import RequestError

__all__ = ["ROLES", "normalise_messages", "render"]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak in a chat."""

# Names under which a message's thinking goes; templates read the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special_tokens: Mapping[str, str],
    allow_images: bool = False,
    **kwargs: Any,
) -> str:
    """Render a chat as the text that the model was trained to continue.

    Special tokens are written into the text, so it is to be encoded without adding any.

    Args:
        template: jinja source; None, a model without one, is refused.
        messages: see `normalise_messages`.
        add_generation_prompt: end with the words that open the assistant's turn.
        tools: JSON schemas of functions that the model may call.
        special_tokens: `bos_token`, `eos_token` ..., which templates refer to by name.
        allow_images: whether the model takes image parts; their content is not shown to the
            template, only their place.
        kwargs: further variables for the template, such as `enable_thinking=False`.

    Raises:
        RequestError: malformed messages, an image for a model that takes none, or a template that
            refuses the messages, is wrong itself, or takes too long.
    """
    if template is None:
        raise RequestError(
            "this model has no chat template; give the prompt as text, or a template of your own"
        )
    chat = normalise_messages(messages)
    for index, message in enumerate(chat):
        if not allow_images and not isinstance(message["content"], str):
            raise RequestError(f"messages[{index}] has an image, but this model takes no images")
        # "developer" is a newer name for "system"; a template that does not know it would leave
        # such a message out without a word.
        if message["role"] == "developer" and "developer" not in template:
            message["role"] = "system"
        for name in _REASONING:
            if name in message:
                message.setdefault("thinking", message[name])
                message.setdefault("reasoning_content", message[name])
                break

    from kvist.text import sandbox

    try:
        variables = {
            "messages": _plain(chat, "messages"),
            "tools": _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **special_tokens,
            **{name: _plain(value, name) for name, value in kwargs.items()},
        }
        return sandbox.run(template, variables)
    except RequestError:
        raise
    except sandbox.TemplateRefusal as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"the chat template refused the messages: {reason}") from error
    # A template is foreign code, which may raise anything, out of memory and recursion included.
    except Exception as error:
        line = getattr(error, "lineno", None)
        place = f" in line {line}" if line else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"the chat template failed{place}: {reason}") from error


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check messages in OpenAI's shape, and bring them to one form.

    `content` becomes a string: text parts are joined as they are, with nothing between them. It
    stays a list, of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`, where
    there is an image among the parts. An assistant that only calls tools has the content "".
    Keys that are None are left out, others are kept. The result passes through unchanged.

    Raises:
        RequestError: naming the message by its index, and the value.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages must be a list of objects with role and content, not {_short(messages)}"
        )
    if not messages:
        raise RequestError("messages is empty; a chat needs at least one message")
    return [_normalised(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalised(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"{where} must be an object with role and content, not {_short(message)}"
        )
    kept = {name: value for name, value in message.items() if value is not None}
    role = kept.get("role")
    if role not in ROLES:
        raise RequestError(f"{where} has the role {_short(role)}; it must be one of {ROLES}")
    content = kept.get("content")
    if content is None:
        if role != "assistant" or not kept.get("tool_calls"):
            raise RequestError(f"{where} has no content")
        kept["content"] = ""
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes):
        parts = [_part(part, f"{where} content[{i}]") for i, part in enumerate(content)]
        only_text = all(part["type"] == "text" for part in parts)
        kept["content"] = "".join(part["text"] for part in parts) if only_text else parts
    elif not isinstance(content, str):
        raise RequestError(
            f"{where} has the content {_short(content)}; it must be text, or a list of parts"
        )
    return kept


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image" and part.get("image") is not None:
        return {"type": "image", "image": part["image"]}
    if kind == "image_url":  # OpenAI's own spelling
        link = part.get("image_url")
        url = link.get("url") if isinstance(link, Mapping) else link
        if isinstance(url, str):
            return {"type": "image", "image": url}
    raise RequestError(
        f'{where} is {_short(part)}; it must be {{"type": "text", "text": ...}} '
        'or {"type": "image", "image": ...}'
    )


def _plain(value: Any, where: str) -> Any:
    """Copy a value as plain JSON, so that a template can neither change nor call what is ours."""
    if value is None or isinstance(value, bool):
        return value
    # Enums and numpy's scalars are subclasses of these, with methods of their own.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if value.get("type") == "image" and "image" in value:
            return {"type": "image", "image": "<image>"}
        return {str(name): _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise RequestError(f"{where} is of type {type(value).__name__}; chat templates take JSON only")


def _short(value: object) -> str:
    written = " ".join(repr(value).split())
    return written if len(written) <= 80 else f"{written[:77]}..."
