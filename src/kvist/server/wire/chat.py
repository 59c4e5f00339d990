"""`/v1/chat/completions`: the request, and the parts of its answer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvist.server.wire.common import Body, Sampling, Text, UsageBody

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:/-]+$")]
JSONObject = dict[str, Any]


class TextPart(Body):
    """Words."""

    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    """Where a picture is: a data URL, or a host that the operator has listed."""

    url: Text
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Body):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class FunctionCall(BaseModel):
    """A function's name, and its arguments as JSON text."""

    name: Text
    arguments: str | JSONObject = ""


class ToolCall(BaseModel):
    """A call that an assistant has made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One turn. Chat templates may read fields of their own, so unknown ones are kept."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Body):
    """What a model may call."""

    name: Name
    description: str | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None


class Tool(Body):
    """A function, in OpenAI's wrapping."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The function that is to be called."""

    name: Name


class NamedTool(Body):
    """Call this one."""

    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JSONFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema that the output is held to, strict or not."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: Name = "answer"
    description: str | None = None
    schema_: JSONObject | bool = Field(default={"type": "object"}, alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JSONFormat | SchemaFormat, Field(discriminator="type")]


class ChatRequest(Sampling):
    """A chat to be continued."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 31)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = True
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None,
        description='"none" asks the chat template for no thinking; others change nothing.',
    )
    chat_template_kwargs: JSONObject | None = Field(
        default=None,
        max_length=32,
        description="Variables for the chat template: enable_thinking …",
    )
    verbosity: str | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        choice, tools = self.tool_choice, self.tools or []
        if choice not in (None, "none", "auto") and not tools:
            raise ValueError("tool_choice needs tools to choose from")
        if isinstance(choice, NamedTool):
            names = [tool.function.name for tool in tools]
            if choice.function.name not in names:
                raise ValueError(f"tool_choice names {choice.function.name!r}; tools has {names}")
        return self


class TopLogprob(BaseModel):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token of the output, with the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the output's tokens."""

    content: list[ChatLogprob] | None
    refusal: None = None


class CallBody(BaseModel):
    """A function that the model wants called."""

    name: str
    arguments: str


class ToolCallBody(BaseModel):
    """One of the calls of an answer."""

    id: str
    type: Literal["function"] = "function"
    function: CallBody


class AnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    refusal: None = None


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class ChatChoice(BaseModel):
    """One of n."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatAnswer(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    system_fingerprint: str | None = None
