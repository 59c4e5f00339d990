"""`/v1/responses`, as far as it keeps no state: the request, and its way to a chat."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvist.server.wire.chat import (
    ChatRequest,
    Function,
    FunctionCall,
    ImagePart,
    ImageUrl,
    JSONFormat,
    JSONObject,
    Message,
    Name,
    NamedFunction,
    NamedSchema,
    NamedTool,
    Part,
    ResponseFormat,
    SchemaFormat,
    TextFormat,
    TextPart,
    Tool,
    ToolCall,
)
from kvist.server.wire.common import Body, Ignored, Text


class InputText(BaseModel):
    """Words, also those of an earlier answer."""

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputImage(BaseModel):
    """A picture."""

    type: Literal["input_image"]
    image_url: Text
    detail: Literal["auto", "low", "high"] | None = None


class InputMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Annotated[InputText | InputImage, Field(discriminator="type")]]


class InputCall(BaseModel):
    """A call that an earlier answer has made."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class InputCallOutput(BaseModel):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text


class ReasoningText(BaseModel):
    """A piece of a thought."""

    type: Literal["reasoning_text"]
    text: Text


class InputReasoning(BaseModel):
    """What an earlier answer thought."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None


Item = InputCall | InputCallOutput | InputReasoning | InputMessage


class ResponsesTool(Body):
    """A function, without OpenAI's older wrapping."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None


class ChosenTool(Body):
    """Call this one."""

    type: Literal["function"]
    name: Name


class ResponsesSchema(NamedSchema):
    """JSON that fits a schema."""

    type: Literal["json_schema"]


class TextOptions(Body):
    """How the text is written."""

    format: (
        Annotated[TextFormat | JSONFormat | ResponsesSchema, Field(discriminator="type")] | None
    ) = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(BaseModel):
    """How much is thought."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: str | None = None


class ResponsesRequest(Ignored):
    """Something to be answered."""

    model: Text
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=4096)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=1 << 31)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    tools: list[ResponsesTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["disabled"] | None = None
    include: list[str] | None = Field(default=None, description="Taken and ignored.")
    background: Literal[False] | None = None
    previous_response_id: None = Field(
        default=None, description="Not supported: nothing is stored."
    )
    chat_template_kwargs: JSONObject | None = Field(default=None, max_length=32)
    cache_salt: str | None = Field(default=None, max_length=256)

    def as_chat(self) -> ChatRequest:
        """The same as a chat.

        Raises:
            ValidationError: a tool choice without its tool.
        """
        choice = self.tool_choice
        return ChatRequest(
            model=self.model,
            messages=list(_messages(self)),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            tools=[
                Tool(
                    type="function",
                    function=Function(**tool.model_dump(exclude={"type"}, exclude_none=True)),
                )
                for tool in self.tools or ()
            ]
            or None,
            tool_choice=NamedTool(function=NamedFunction(name=choice.name))
            if isinstance(choice, ChosenTool)
            else choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=_format(self.text),
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            chat_template_kwargs=self.chat_template_kwargs,
            cache_salt=self.cache_salt,
        )


def _format(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    if isinstance(text.format, ResponsesSchema):
        return SchemaFormat(type="json_schema", json_schema=text.format)
    return text.format


def _messages(asked: ResponsesRequest) -> Iterable[Message]:
    """Items as turns: an assistant's thought, words and calls that stand together are one."""
    if asked.instructions is not None:
        yield Message(role="system", content=asked.instructions)
    if isinstance(asked.input, str):
        yield Message(role="user", content=asked.input)
        return
    turn: Message | None = None  # the assistant's, as far as it has come
    for item in asked.input:
        said = isinstance(item, InputCall | InputReasoning) or (
            isinstance(item, InputMessage) and item.role == "assistant"
        )
        if turn is not None and not said:
            yield turn
            turn = None
        if isinstance(item, InputCallOutput):
            yield Message(role="tool", content=item.output, tool_call_id=item.call_id)
        elif not said:
            assert isinstance(item, InputMessage)
            yield Message(role=item.role, content=_content(item))
        else:
            turn = _joined(turn or Message(role="assistant", content=""), item)
    if turn is not None:
        yield turn


def _joined(turn: Message, item: Item) -> Message:
    if isinstance(item, InputCall):
        function = FunctionCall(name=item.name, arguments=item.arguments)
        call = ToolCall(id=item.call_id, function=function)
        return turn.model_copy(update={"tool_calls": [*(turn.tool_calls or ()), call]})
    if isinstance(item, InputReasoning):
        thought = "".join(part.text for part in item.content or ())
        before = turn.reasoning_content or ""
        return turn.model_copy(update={"reasoning_content": before + thought or None})
    assert isinstance(item, InputMessage)
    content = _content(item)
    words = (
        content
        if isinstance(content, str)
        else "".join(part.text for part in content if isinstance(part, TextPart))
    )
    return turn.model_copy(update={"content": f"{turn.content}{words}"})


def _content(item: InputMessage) -> str | list[Part]:
    if isinstance(item.content, str):
        return item.content
    return [
        TextPart(type="text", text=part.text)
        if isinstance(part, InputText)
        else ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url))
        for part in item.content
    ]
