"""What an output is held to: response formats and forced tool calls, as grammars' sources.

A schema comes from outside, so it is bounded in size and depth before anything reads it; regular
expressions in it are run by an engine without backtracking, under `kvist.grammar`'s limits.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from kvist.grammar import json_rule
from kvist.server.errors import ApiError
from kvist.server.hermes import CLOSE, OPEN
from kvist.server.wire.chat import (
    JSONFormat,
    NamedTool,
    ResponseFormat,
    SchemaFormat,
    Tool,
    ToolChoice,
)
from kvist.text.thinking import CLOSE as END_THINK
from kvist.text.thinking import OPEN as THINK

MAX_DEPTH = 64
MAX_NODES = 10_000
MAX_CHARACTERS = 128 << 10
MAX_PATTERN = 1024

Thinking = Literal["never", "maybe", "begun"]
"""Whether the output has a thought before the answer: not at all, if it likes, or it is in one."""


def format_source(
    asked: ResponseFormat | None, thinking: Thinking, tag: Callable[[str], str]
) -> str | None:
    """The grammar of a response format; None where anything goes.

    Args:
        asked: as the request has it.
        thinking: whether a thought comes first.
        tag: how a grammar writes a tag; see `Grammars.tag`.

    Raises:
        ApiError: a schema that is too large, or none.
    """
    if isinstance(asked, JSONFormat):
        return _source(json_rule({"type": "object"}), thinking, tag)
    if isinstance(asked, SchemaFormat):
        schema = asked.json_schema.schema_
        check_schema(schema, "response_format.json_schema.schema")
        return _source(json_rule(schema), thinking, tag)
    return None


def calls_source(
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    thinking: Thinking,
    tag: Callable[[str], str],
    *,
    several: bool,
) -> str | None:
    """The grammar of calls that have to be made; None where the model may choose."""
    if choice in (None, "auto", "none"):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    rules = []
    for number, tool in enumerate(tools):
        head = f'\n{{"name": {json.dumps(tool.function.name)}, "arguments": '
        schema = tool.function.parameters or {"type": "object"}
        rules.append(
            f"call_{number}: {tag(OPEN)} {json.dumps(head)} arguments_{number} "
            f"{_CALL_ENDS} {tag(CLOSE)}\narguments_{number}: {json_rule(schema)}"
        )
    one = " | ".join(f"call_{number}" for number in range(len(rules)))
    more = r' ("\n" call)*' if several else ""
    return _source(f"call{more}", thinking, tag, f"call: {one}", *rules)


_CALL_ENDS = json.dumps("}\n")


def check_tools(tools: Sequence[Tool]) -> None:
    """Refuse tools whose schemas nobody should have to read."""
    names = [tool.function.name for tool in tools]
    for number, tool in enumerate(tools):
        if tool.function.name in names[:number]:
            raise ApiError(
                400, f"two tools are named {tool.function.name!r}", param=f"tools[{number}]"
            )
        check_schema(tool.function.parameters, f"tools[{number}].function.parameters")


def check_schema(schema: Any, param: str) -> None:
    """Refuse a schema that is too deep or too large.

    Raises:
        ApiError: with the limit.
    """
    nodes, level = 0, [schema]
    for _ in range(MAX_DEPTH):
        nodes += len(level)
        if nodes > MAX_NODES:
            raise ApiError(400, f"{param} has more than {MAX_NODES} values", param=param)
        level = [child for node in level for child in _children(node, param)]
        if not level:
            break
    else:
        raise ApiError(400, f"{param} is nested deeper than {MAX_DEPTH}", param=param)
    if len(json.dumps(schema)) > MAX_CHARACTERS:
        raise ApiError(400, f"{param} has more than {MAX_CHARACTERS} characters", param=param)


def _children(node: Any, param: str) -> list[Any]:
    if isinstance(node, list):
        return node
    if not isinstance(node, dict):
        return []
    pattern = node.get("pattern")
    if isinstance(pattern, str) and len(pattern) > MAX_PATTERN:
        raise ApiError(
            400, f"{param} has a pattern of more than {MAX_PATTERN} characters", param=param
        )
    return list(node.values())


def _source(answer: str, thinking: Thinking, tag: Callable[[str], str], *rules: str) -> str:
    start = {
        "never": "start: answer",
        "maybe": f"start: ({tag(THINK)} thought)? answer",
        "begun": "start: thought answer",
    }[thinking]
    thought = []
    if thinking != "never":
        # What has a token of its own no text can contain; what has none ends at its first writing.
        own_token = tag(END_THINK) == END_THINK
        end = f"thinking: /(?s:.*)/ {END_THINK}" if own_token else _LAZY
        thought = [r"thought: thinking /\n{0,2}/", end]
    return "\n".join((start, *thought, f"answer: {answer}", *rules))


_LAZY = r"thinking[lazy]: /(?s:.*)<\/think>/"
