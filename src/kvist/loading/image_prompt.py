"""Prompts with pictures: the text that stands for them, and where their embeddings go.

`ImageProcessor.prepare` turns chat messages, text or token ids with pictures into token ids and
spans. From there on a prompt with pictures is a prompt like any other: a span says which positions
take an encoder's output in place of the token's own embedding. Computes no embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvist.core.request import ImageSpan
from kvist.errors import ConfigError, RequestError
from kvist.loading.images import (
    DEFAULT_LIMITS,
    ImageInput,
    ImageLimits,
    Tiles,
    Tiling,
    digest_of,
    open_image,
    tile_image,
)

if TYPE_CHECKING:
    from kvist.text.tokenizer import Tokenizer

__all__ = ["ImageProcessor", "PreparedPrompt"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PreparedPrompt:
    """What the engine takes.

    Args:
        token_ids: placeholders for image embeddings included.
        spans: one for each tile, in order, each with the tile's pixels `[3, H, W]`.
    """

    token_ids: tuple[int, ...]
    spans: tuple[ImageSpan, ...]


@dataclass(frozen=True)
class ImageProcessor:
    """A model's way with pictures.

    Args:
        tokenizer: knows the extra tokens.
        tiling: how pictures are resized and cut.
        image_tokens: positions that a tile takes.
        extra_tokens: by nanoVLM's names (`image_token`, `global_image_token`, `r1c1` ...). Empty
            for the first version, whose one image stands before the text.
        placeholder_id: the token in an image's positions; its own embedding is never used.
        limits: what a picture may cost.
    """

    tokenizer: "Tokenizer"
    tiling: Tiling
    image_tokens: int
    extra_tokens: Mapping[str, str]
    placeholder_id: int
    limits: ImageLimits = DEFAULT_LIMITS

    def prepare(
        self, prompt: Prompt, images: Sequence[ImageInput] = (), **template: Any
    ) -> PreparedPrompt:
        """Make a prompt that the engine takes.

        In chat messages, pictures are content parts `{"type": "image", "image": picture}`. As
        nanoVLM was trained, a message's pictures come before its text and, if there are several,
        are numbered; counting begins anew with each message, so that a later turn changes nothing
        in the turns before it, and their cache is good for it.

        Args:
            prompt: chat messages, text, or token ids with the placeholders in place.
            images: pictures for text, which they precede, or for token ids. Messages carry their
                own.
            template: further variables of the chat template.

        Raises:
            RequestError: a picture cannot be read, the text holds the image token itself, or
                placeholders and pictures do not match.
        """
        if isinstance(prompt, str):
            tiles = self._tiles(images)
            text = self._checked(prompt)
            return self._encode(self.image_text(tiles) + text, tiles, add_special_tokens=True)
        if prompt and isinstance(prompt[0], Mapping):
            if len(images):
                raise RequestError(
                    'give a chat\'s pictures as content parts {"type": "image", "image": ...} of '
                    "its messages"
                )
            return self._prepare_chat(prompt, **template)  # type: ignore[arg-type]
        ids = tuple(prompt)
        return self._with_spans(ids, self._tiles(images))  # type: ignore[arg-type]

    def _prepare_chat(
        self, messages: Sequence[Mapping[str, Any]], **template: Any
    ) -> PreparedPrompt:
        from kvist.text.chat import normalise_messages, render

        chat, all_tiles = [], []
        for message in normalise_messages(messages):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            tiles = self._tiles([part["image"] for part in parts if part["type"] == "image"])
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            message["content"] = self.image_text(tiles) + self._checked(text)
            chat.append(message)
            all_tiles += tiles
        rendered = render(
            self.tokenizer.chat_template,
            chat,
            special_tokens=self.tokenizer.special_tokens,
            **template,
        )
        return self._encode(rendered, all_tiles, add_special_tokens=False)

    def _tiles(self, images: Sequence[ImageInput]) -> list[Tiles]:
        return [tile_image(open_image(image, self.limits), self.tiling) for image in images]

    def image_text(self, images: Sequence[Tiles]) -> str:
        """What stands for some pictures in one message."""
        if not self.extra_tokens:
            return ""  # the embeddings come before the text, and no token stands for them
        tile = self.extra_tokens["image_token"] * self.image_tokens
        whole = self.extra_tokens.get("global_image_token")
        by_place = "r1c1" in self.extra_tokens
        pieces = []
        for number, image in enumerate(images):
            if len(images) > 1 and by_place:
                pieces.append(f"<image: {number}>")
            if whole is not None:
                pieces.append(whole + tile)
                if len(image.pixels) == 1:
                    continue
            pieces += [
                (self._place(row, column) if by_place else "") + tile
                for row in range(1, image.rows + 1)
                for column in range(1, image.columns + 1)
            ]
        return "".join(pieces)

    def _place(self, row: int, column: int) -> str:
        try:
            return self.extra_tokens[f"r{row}c{column}"]
        except KeyError:
            raise ConfigError(
                f"vlm_extra_tokens has no token for row {row}, column {column} of a picture cut "
                f"into tiles of {self.tiling.tile} up to {self.tiling.max_side} pixels"
            ) from None

    def _checked(self, text: str) -> str:
        token = self.extra_tokens.get("image_token")
        if token is not None and token in text:
            raise RequestError(
                f"the text holds {token}, which stands for pictures in this model's prompts; take "
                "it out"
            )
        return text

    def _encode(
        self, text: str, tiles: Sequence[Tiles], *, add_special_tokens: bool
    ) -> PreparedPrompt:
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self._with_spans(tuple(ids), tiles)

    def _with_spans(self, ids: tuple[int, ...], images: Sequence[Tiles]) -> PreparedPrompt:
        """Find the placeholders and give each tile its own."""
        pixels = [tile for image in images for tile in image.pixels]
        if not pixels:
            return PreparedPrompt(ids, ())
        length = self.image_tokens
        if not self.extra_tokens:
            if len(pixels) > 1:
                raise RequestError(
                    f"this model takes one picture in a prompt, not {len(pixels)}: its version of "
                    "nanoVLM puts it before the text"
                )
            ids = (self.placeholder_id,) * length + ids
        places = (place for place, token in enumerate(ids) if token == self.placeholder_id)
        spans = []
        for tile in pixels:
            own = list(islice(places, length))
            # A tile's placeholders are one run: [first, first + length).
            if len(own) < length or own[-1] - own[0] != length - 1:
                raise _mismatch(ids.count(self.placeholder_id), len(pixels), length)
            spans.append(ImageSpan(own[0], length, digest_of(tile), tile))
        if self.extra_tokens and next(places, None) is not None:
            raise _mismatch(ids.count(self.placeholder_id), len(pixels), length)
        return PreparedPrompt(ids, tuple(spans))


def _mismatch(placeholders: int, tiles: int, length: int) -> RequestError:
    return RequestError(
        f"the prompt has {placeholders} image tokens, but its pictures make {tiles} tiles of "
        f"{length} tokens each"
    )
