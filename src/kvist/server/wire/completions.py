"""`/v1/completions`, and the small endpoints: tokens, models, embeddings."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from kvist.server.wire.chat import JSONObject, Message, ResponseFormat, Tool
from kvist.server.wire.common import Body, Sampling, Text, UsageBody

TokenId = Annotated[int, Field(ge=0, strict=True)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Prompts = Text | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
"""Text, token ids, or a list of either."""


def prompts_of(prompts: Prompts) -> list[str | list[int]]:
    """One or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    single = [part for part in prompts if isinstance(part, int)]
    return [single] if single else [part for part in prompts if not isinstance(part, int)]


class CompletionRequest(Sampling):
    """A text to be continued."""

    prompt: Prompts
    max_tokens: int | None = Field(default=16, ge=1, le=1 << 31)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = Field(default=False, description="Begin with the prompt.")
    best_of: int | None = Field(default=None, description="Only as many as n.")
    suffix: None = Field(default=None, description="Not supported.")
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fits(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of {self.best_of} is not supported; ask for n instead")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self


class TextLogprobs(BaseModel):
    """Log-probabilities in the older shape; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of n for one of the prompts."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"]


class CompletionAnswer(BaseModel):
    """All of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody
    system_fingerprint: str | None = None


class TokenizeRequest(Body):
    """A text, or a chat as its template renders it."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: JSONObject | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give a prompt or messages, and not both")
        return self


class TokenizeAnswer(BaseModel):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    model: Text | None = None
    tokens: list[TokenId]


class DetokenizeAnswer(BaseModel):
    """Their text."""

    prompt: str


class ModelBody(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvist"
    root: str
    max_model_len: int


class ModelsAnswer(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelBody]


class EmbeddingsRequest(Body):
    """Texts or token ids."""

    model: Text
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, description="Only the model's own number.")
    user: str | None = None


class EmbeddingBody(BaseModel):
    """A unit vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """One for each input."""

    object: Literal["list"] = "list"
    data: list[EmbeddingBody]
    model: str
    usage: EmbeddingsUsage
