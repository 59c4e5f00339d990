"""`/v1/embeddings`: texts to unit vectors, pooled from the model's last hidden states.

Offered only where the operator asks for it: a chat model's hidden states are not trained to be
compared, and computing them takes the engine's time.
"""

import base64
import struct

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.server.errors import ApiError
from kvist.server.prompts import text_prompt
from kvist.server.served import served_by, tenant_of
from kvist.server.sse import Work
from kvist.server.wire.completions import (
    EmbeddingBody,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    EmbeddingsUsage,
    prompts_of,
)

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings", response_model=EmbeddingsAnswer, operation_id="embed")
async def create(body: EmbeddingsRequest, request: Request) -> Response:
    """A vector for each input."""
    served = served_by(request)
    model = served.check_model(body.model)
    width = served.model.config.hidden_size
    if body.dimensions not in (None, width):
        raise ApiError(
            400, f"the model's vectors have {width} dimensions and no others", param="dimensions"
        )
    inputs = prompts_of(body.input)
    if len(inputs) > served.settings.max_samples:
        raise ApiError(
            400, f"{len(inputs)} inputs; at most {served.settings.max_samples}", param="input"
        )
    prompts = [(await text_prompt(served, one)).token_ids for one in inputs]
    tokens = sum(map(len, prompts))

    async def make() -> str:
        with served.gate.admit(tenant_of(request), len(prompts), tokens):
            vectors = [
                await served.engine.embed(prompt, served.settings.pooling) for prompt in prompts
            ]
        return EmbeddingsAnswer(
            data=[
                EmbeddingBody(index=index, embedding=_written(vector, body.encoding_format))
                for index, vector in enumerate(vectors)
            ],
            model=model,
            usage=EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
        ).model_dump_json()

    return Work(make)


def _written(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
