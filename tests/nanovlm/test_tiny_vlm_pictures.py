"""The pictures that the tiny model learns from: what they show is what the answers say."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from tiny_vlm_pictures import (
    COLOURS,
    KINDS,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    Thing,
    cell_words,
    draw,
    questions,
    sample_scene,
)

SEEDS = range(200)


@pytest.mark.parametrize("unseen", [False, True])
def test_unseen_pairs_are_kept_apart(unseen: bool) -> None:
    for seed in SEEDS:
        scene = sample_scene(random.Random(seed), unseen=unseen)
        pairs = [(t.colour, t.shape) in UNSEEN_PAIRS for t in scene.things]
        assert all(pairs) if unseen else not any(pairs)
        assert scene.things or (scene.word and not unseen)


def test_things_lie_inside_and_apart_and_show_against_the_ground() -> None:
    for seed in SEEDS:
        scene = sample_scene(random.Random(seed))
        for i, t in enumerate(scene.things):
            assert t.size < t.x < 1 - t.size
            assert t.size < t.y < 1 - t.size
            assert t.colour != scene.ground
            for o in scene.things[:i]:
                assert max(abs(t.x - o.x), abs(t.y - o.y)) > t.size + o.size


def test_a_question_has_one_answer() -> None:
    kinds = set()
    for seed in SEEDS:
        scene = sample_scene(random.Random(seed))
        answers: dict[str, str] = {}
        for question in questions(scene, random.Random(seed)):
            kinds.add(question.kind)
            assert answers.setdefault(question.text, question.answer) == question.answer
    assert kinds == set(KINDS)


def test_answers_say_what_is_there() -> None:
    things = (Thing("circle", "red", 0.2, 0.2, 0.12), Thing("star", "blue", 0.8, 0.8, 0.12))
    scene, right = Scene("white", things), {}
    for seed in range(20):
        right |= {q.text: q.answer for q in questions(scene, random.Random(seed))}
    assert right["What colour is the circle?"] == "Red."
    assert right["Which shape is blue?"] == "Star."
    assert right["Where is the star?"] == "Bottom right."
    assert right["What is left of the star?"] == "The circle."
    assert right["Is the star above or below the circle?"] == "Below."
    assert right["How many shapes are there?"] == "Two."
    assert right["What colour is the background?"] == "White."


def test_cells_are_called_what_stands_in_them() -> None:
    scene = Scene("white", (Thing("circle", "red", 0.25, 0.25, 0.2),))
    words = cell_words(scene, 2)
    assert words[0] == {"red", "circle", "white"}
    assert words[1:] == [{"white"}] * 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", ["red", "blue", "white"])
def test_a_drawn_thing_has_its_colour(shape: str, colour: str) -> None:
    scene = Scene("green", (Thing(shape, colour, 0.5, 0.5, 0.3),))
    picture = draw(scene, random.Random(0))
    assert picture.size == (96, 96)
    near = {
        name: sum(abs(a - b) for a, b in zip(picture.getpixel((48, 50)), rgb, strict=True))
        for name, rgb in COLOURS.items()
    }
    assert min(near, key=near.__getitem__) == colour


def test_the_same_seed_draws_the_same_picture() -> None:
    scene = sample_scene(random.Random(5))
    once, again = (draw(scene, random.Random(6)).tobytes() for _ in range(2))
    assert scene == sample_scene(random.Random(5))
    assert once == again
