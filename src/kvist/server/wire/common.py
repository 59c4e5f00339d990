"""Parameters and parts of answers that several endpoints share."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvist.core.params import SamplingParams

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024

Text = Annotated[str, Field(strict=True)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Body(BaseModel):
    """A request's body: unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid")


def without_nulls(body: Any) -> Any:
    """OpenAI's clients send null for what they leave out."""
    if not isinstance(body, dict):
        return body
    return {name: value for name, value in body.items() if value is not None}


class StreamOptions(Body):
    """What a stream tells beside the output."""

    include_usage: bool = Field(default=False, description="Send the usage in a last chunk.")
    include_obfuscation: bool = Field(default=False, description="Taken and ignored.")


class Ignored(Body):
    """Parameters of OpenAI's service that mean nothing here; clients send them all the same."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Sampling(Ignored):
    """How tokens are chosen; what is left out is the model's default."""

    _nulls = model_validator(mode="before")(without_nulls)

    model: Text = Field(description="One of /v1/models.")
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, le=1 << 31, description="0 and -1 keep all.")
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(default=None, gt=0, le=100, allow_inf_nan=False)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=1024, description="Token id -> added to its logit."
    )
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stops | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, max_length=64)
    min_tokens: int = Field(default=0, ge=0, le=1 << 31)
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(
        default=None,
        max_length=256,
        description="Share cached prefixes only with requests of this salt.",
    )
    priority: int = Field(default=0, ge=-1000, le=1000, description="Lower goes first.")

    def sampling_params(self, **given: Any) -> SamplingParams:
        """As the engine takes them; `given` are the fields that each endpoint has its own way with.

        Raises:
            RequestError: what the checks of single fields let through.
        """
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias=token_biases(self.logit_bias or {}),
            seed=self.seed,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            n=self.n,
            **given,
        )


def token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are texts; ids are numbers.

    Raises:
        RequestError: a key that is none.
    """
    from kvist.errors import RequestError

    found = {}
    for key, bias in biases.items():
        if not key.isdecimal() or len(key) > 9:
            raise RequestError(f"logit_bias has the key {key[:40]!r}, which is not a token id")
        found[int(key)] = bias
    return found


class CachedTokens(BaseModel):
    """How much of the prompt did not have to be computed."""

    cached_tokens: int = 0


class OutputTokens(BaseModel):
    """What the output was made of."""

    reasoning_tokens: int = 0


class UsageBody(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: OutputTokens | None = None
