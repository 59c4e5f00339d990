"""Pictures and questions as tensors: what `train_tiny_vlm.py` learns from in one step.

A `Teacher` writes the conversations as kvist will write the prompts later, which it checks; a data
loader's workers each run one of their own.
"""

import math
import random
from collections.abc import Iterator
from functools import cache
from itertools import count
from typing import NamedTuple

import torch
from tiny_vlm_pictures import (
    COLOURS,
    SHAPES,
    SIDE,
    WORDS,
    Question,
    Scene,
    cell_words,
    draw,
    questions,
    sample_scene,
)
from torch import Tensor
from torch.utils.data import IterableDataset

from kvist.loading.image_prompt import ImageProcessor

NAMES = (*COLOURS, *SHAPES, *WORDS)  # what a cell can be called
IGNORE = -100


class Lesson(NamedTuple):
    """Some pictures, what stands in their cells, and conversations about them."""

    pictures: Tensor  # [pictures, 3, SIDE, SIDE] uint8
    names: Tensor  # [pictures, cells, NAMES] uint8
    token_ids: Tensor  # [rows, length], padded at the end
    targets: Tensor  # [rows, length], the next token where it belongs to an answer
    picture_of: Tensor  # [rows]
    kinds: list[str]  # of each row's first question


class Teacher:
    """Writes lessons; everything follows from the generator it is given."""

    def __init__(self, processor: ImageProcessor) -> None:
        """Learn how this model's prompts look."""
        tokenizer = processor.tokenizer
        image = processor.extra_tokens
        self._encode = cache(tokenizer.encode)
        self._pad = tokenizer.eos_token_id or 0
        opening = f"<|im_start|>user\n{image['global_image_token']}"
        self.image_start = len(tokenizer.encode(opening))
        self._opening = opening + image["image_token"] * processor.image_tokens
        self._cells = math.isqrt(processor.image_tokens)
        question = Question("", "What is this?", "A red circle.")
        ids, _ = self._conversation([question])
        blank = draw(Scene("white"), random.Random(0))
        content = [{"type": "image", "image": blank}, {"type": "text", "text": question.text}]
        expected = processor.prepare([{"role": "user", "content": content}]).token_ids
        assert tuple(ids[: len(expected)]) == expected, "lessons differ from kvist's prompts"

    def lesson(
        self,
        rng: random.Random,
        pictures: int,
        *,
        easy: float = 0.0,
        unseen: bool = False,
        test: bool = False,
    ) -> Lesson:
        """Draw pictures and ask about each: two conversations, or four questions of a test.

        All conversations of a lesson have as many turns, so that little padding is computed.
        """
        double = not test and rng.random() < 0.25
        drawn, names, rows, owners, kinds = [], [], [], [], []
        for index in range(pictures):
            scene = sample_scene(rng, unseen=unseen, easy=rng.random() < easy)
            picture = bytearray(draw(scene, rng).tobytes())
            drawn.append(torch.frombuffer(picture, dtype=torch.uint8).view(SIDE, SIDE, 3))
            words = cell_words(scene, self._cells)
            names.append([[name in cell for name in NAMES] for cell in words])
            asked = questions(scene, rng)
            rng.shuffle(asked)
            single = [[question] for question in asked[: 4 if test else 2]]
            turns = [asked[i::2] for i in range(2)] if double else single
            for turn in turns:
                rows.append(self._conversation(turn[:2]))
                owners.append(index)
                kinds.append(turn[0].kind)
        length = -8 * (-max(len(ids) for ids, _ in rows) // 8)
        return Lesson(
            torch.stack(drawn).permute(0, 3, 1, 2),
            torch.tensor(names, dtype=torch.uint8),
            torch.tensor([ids + [self._pad] * (length - len(ids)) for ids, _ in rows]),
            torch.tensor([next_ + [IGNORE] * (length - len(next_)) for _, next_ in rows]),
            torch.tensor(owners),
            kinds,
        )

    def _conversation(self, turns: list[Question]) -> tuple[list[int], list[int]]:
        """Token ids, and for each the next one where that is to be learnt."""
        ids: list[int] = []
        learnt: list[bool] = []
        opening = self._opening
        for question in turns:
            asked = f"{opening}{question.text}<|im_end|>\n<|im_start|>assistant\n"
            for text, answer in ((asked, False), (f"{question.answer}<|im_end|>", True)):
                piece = self._encode(text)
                ids += piece
                learnt += [answer] * len(piece)
            opening = "\n<|im_start|>user\n"
        following = [i if learn else IGNORE for i, learn in zip(ids[1:], learnt[1:], strict=True)]
        return ids, [*following, IGNORE]


class Lessons(IterableDataset[Lesson]):
    """Lessons without end, easy ones first; every worker and every start has its own."""

    def __init__(self, teacher: Teacher, pictures: int, seed: int, easy: int) -> None:
        """Lessons of this many pictures; the share of easy ones fades over the first `easy`."""
        self.teacher, self.pictures, self.seed, self.easy = teacher, pictures, seed, easy

    def __iter__(self) -> Iterator[Lesson]:
        """Draw one after the other."""
        info = torch.utils.data.get_worker_info()
        if info is not None:
            torch.set_num_threads(1)
        rng = random.Random(f"{self.seed} {info.id if info else 0}")
        fading = max(self.easy // (info.num_workers if info else 1), 1)
        for number in count():
            yield self.teacher.lesson(rng, self.pictures, easy=max(1 - number / fading, 0.0))
