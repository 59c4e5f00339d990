"""Pictures of shapes, colours, counts and words, drawn on the spot, with questions about them.

The world that `train_tiny_vlm.py` teaches a small vision encoder, and all that it teaches it. A
`Scene` is plain data; `draw` makes the picture, `questions` asks, `cell_words` says what stands
where. Everything follows from the random generator that is handed in.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 96
COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 155, 65),
    "blue": (40, 80, 205),
    "yellow": (245, 215, 45),
    "orange": (245, 135, 25),
    "purple": (135, 55, 170),
    "pink": (245, 150, 190),
    "brown": (120, 72, 40),
    "black": (22, 22, 24),
    "white": (245, 245, 245),
    "gray": (130, 132, 135),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
NUMBERS = ("one", "two", "three", "four", "five")
# fmt: off
WORDS = (
    "cat", "dog", "sun", "sky", "sea", "tree", "fish", "bird", "book", "door", "milk", "rain",
    "snow", "wind", "fire", "moon", "king", "ship", "road", "gold", "salt", "rice", "hand", "foot",
    "eye", "ear", "hat", "box", "cup", "key", "bus", "car", "map", "egg", "bee", "cow", "pig",
    "fox", "ice", "lake",
)
# fmt: on
# Never drawn for training: what the model says of these, it did not learn by heart.
UNSEEN_PAIRS = frozenset(
    {
        ("red", "triangle"),
        ("green", "heart"),
        ("blue", "cross"),
        ("yellow", "circle"),
        ("purple", "square"),
        ("orange", "star"),
    }
)
KINDS = ("colour", "shape", "describe", "position", "count", "relation", "exists", "word", "ground")


@dataclass(frozen=True)
class Thing:
    """One shape; centre and half size as parts of the picture's side."""

    shape: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def name(self) -> str:
        """Such as "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is in a picture: some things, or one word."""

    ground: str
    things: tuple[Thing, ...] = ()
    word: str = ""
    word_colour: str = ""
    word_box: tuple[float, float, float, float] = (0, 0, 0, 0)  # left, top, right, bottom


class Question(NamedTuple):
    """A question of one of `KINDS`, and the only right answer."""

    kind: str
    text: str
    answer: str


# Scenes.


def sample_scene(rng: random.Random, *, unseen: bool = False, easy: bool = False) -> Scene:
    """A random scene.

    Args:
        rng: decides everything.
        unseen: all colour-shape pairs are of `UNSEEN_PAIRS`; else none is.
        easy: one large thing before a quiet background.
    """
    if easy:
        ground = rng.choice(("white", "gray", "black"))
        return Scene(ground, _place(rng, [_pair(rng, ground, unseen)], 0.22, 0.42))
    ground = rng.choice(("white", "white", "white", "gray", "black", *COLOURS))
    kind = rng.random()
    if unseen:
        kind *= 0.7
    if kind < 0.3:
        return Scene(ground, _place(rng, [_pair(rng, ground, unseen)], 0.12, 0.36))
    if kind < 0.7:
        pairs: list[tuple[str, str]] = []
        for _ in range(rng.choice((2, 2, 3))):
            for _ in range(20):
                pair = _pair(rng, ground, unseen)
                # No two of a colour or a shape, so that "the circle" and "what is red" are clear.
                if all(pair[0] != c and pair[1] != s for c, s in pairs):
                    pairs.append(pair)
                    break
        return Scene(ground, _place(rng, pairs, 0.11, 0.22))
    if kind < 0.87:
        pair, count = _pair(rng, ground, unseen), rng.randint(1, 5)
        same = [pair if rng.random() < 0.8 else _pair(rng, ground, unseen) for _ in range(count)]
        return Scene(ground, _place(rng, same, 0.085, 0.15))
    return _word_scene(rng, ground)


def _pair(rng: random.Random, ground: str, unseen: bool) -> tuple[str, str]:
    """A colour that is not the background's, and a shape."""
    while True:
        pair = (rng.choice(tuple(COLOURS)), rng.choice(SHAPES))
        if unseen:
            pair = rng.choice(sorted(UNSEEN_PAIRS))
        if pair[0] != ground and (pair in UNSEEN_PAIRS) == unseen:
            return pair


def _place(
    rng: random.Random, pairs: list[tuple[str, str]], smallest: float, largest: float
) -> tuple[Thing, ...]:
    """Find room for things so that none touches another; the last ones may find none."""
    things: list[Thing] = []
    for colour, shape in pairs:
        for attempt in range(40):
            size = rng.uniform(smallest, largest if attempt < 20 else smallest)
            x, y = (rng.uniform(size + 0.02, 0.98 - size) for _ in range(2))
            gap = 0.03
            if all(max(abs(x - t.x), abs(y - t.y)) > size + t.size + gap for t in things):
                things.append(Thing(shape, colour, x, y, size))
                break
    return tuple(things)


def _word_scene(rng: random.Random, ground: str) -> Scene:
    word = rng.choice(WORDS)
    colour = rng.choice([c for c in COLOURS if c != ground])
    width = rng.uniform(0.45, 0.9)
    height = min(width * 1.9 / max(len(word), 3), 0.5)
    left, top = rng.uniform(0.03, 0.97 - width), rng.uniform(0.03, 0.97 - height)
    return Scene(ground, (), word, colour, (left, top, left + width, top + height))


# Drawing.


def draw(scene: Scene, rng: random.Random, side: int = SIDE) -> Image.Image:
    """The scene as a picture; its finer points (tints, edges, noise) come from `rng`."""
    scale = rng.choice((2, 3, 4))
    image = Image.new("RGB", (side * scale, side * scale), _tint(scene.ground, rng))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _OUTLINES[thing.shape](pen, thing, side * scale, _tint(thing.colour, rng))
    if scene.word:
        _write(image, scene, _tint(scene.word_colour, rng), rng)
    kernel = rng.choice((Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS))
    image = image.resize((side, side), kernel)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if rng.random() < 0.5:
        noise = Image.frombytes("L", (side, side), rng.randbytes(side * side)).convert("RGB")
        image = Image.blend(image, noise, rng.uniform(0.0, 0.06))
    return image


def _tint(colour: str, rng: random.Random) -> tuple[int, int, int]:
    """A shade that everyone would still call by this name."""
    lighter = rng.randint(-10, 10)
    red, green, blue = (min(max(c + lighter + rng.randint(-6, 6), 0), 255) for c in COLOURS[colour])
    return red, green, blue


Outline = Callable[[ImageDraw.ImageDraw, Thing, int, tuple[int, int, int]], None]


def _circle(pen: ImageDraw.ImageDraw, t: Thing, side: int, fill: tuple[int, int, int]) -> None:
    box = [
        (t.x - t.size) * side,
        (t.y - t.size) * side,
        (t.x + t.size) * side,
        (t.y + t.size) * side,
    ]
    pen.ellipse(box, fill=fill)


def _polygon(corners: Callable[[], list[tuple[float, float]]]) -> Outline:
    """An outline from corners in [-1, 1]."""
    fixed = corners()

    def outline(pen: ImageDraw.ImageDraw, t: Thing, side: int, fill: tuple[int, int, int]) -> None:
        pen.polygon(
            [((t.x + t.size * u) * side, (t.y + t.size * v) * side) for u, v in fixed], fill
        )

    return outline


def _star() -> list[tuple[float, float]]:
    radii = (1.0, 0.42)
    angles = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
    return [(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


def _cross() -> list[tuple[float, float]]:
    arm = 0.32
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turned = [[(x, y), (-y, x), (-x, -y), (y, -x)] for x, y in quarter]
    return [points[turn] for turn in range(4) for points in turned]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in angles
    ]


_OUTLINES: dict[str, Outline] = {
    "circle": _circle,
    "square": _polygon(lambda: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
    "triangle": _polygon(lambda: [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]),
    "star": _polygon(_star),
    "cross": _polygon(_cross),
    "heart": _polygon(_heart),
}


def _write(
    image: Image.Image, scene: Scene, fill: tuple[int, int, int], rng: random.Random
) -> None:
    """Write the word into its box."""
    side = image.width
    left, top, right, bottom = (c * side for c in scene.word_box)
    text = rng.choice((scene.word, scene.word, scene.word.upper(), scene.word.capitalize()))
    # The font's size that fills the box, by proportion.
    font = ImageFont.load_default(size=100)
    box = font.getbbox(text)
    size = 100 * min((right - left) / (box[2] - box[0]), (bottom - top) / (box[3] - box[1]))
    font = ImageFont.load_default(size=max(size, 8))
    bold = rng.choice((0, 0, side // 96))
    pen = ImageDraw.Draw(image)
    pen.text(((left + right) / 2, (top + bottom) / 2), text, fill, font, "mm", stroke_width=bold)


# Questions.


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """All that can be asked of a scene without ambiguity, each in one of its phrasings."""

    def ask(kind: str, answer: str, *phrasings: str) -> Question:
        return Question(kind, rng.choice(phrasings), f"{answer[0].upper()}{answer[1:]}.")

    asked = [
        ask(
            "ground",
            scene.ground,
            "What colour is the background?",
            "Which colour does the background have?",
        )
    ]
    if scene.word:
        asked.append(
            ask("word", scene.word, "What does it say?", "Which word is written here?", "Read it.")
        )
        asked.append(
            ask("colour", scene.word_colour, "What colour is the word?", "What colour is the text?")
        )
        return asked
    asked += _about_each(scene, ask)
    asked += _about_all(scene, rng, ask)
    return asked


Ask = Callable[..., Question]


def _about_each(scene: Scene, ask: Ask) -> list[Question]:
    shapes = [t.shape for t in scene.things]
    colours = [t.colour for t in scene.things]
    asked = []
    for t in scene.things:
        alone = len(scene.things) == 1
        if shapes.count(t.shape) == 1:
            phrasings = [f"What colour is the {t.shape}?", f"Which colour does the {t.shape} have?"]
            asked.append(ask("colour", t.colour, *phrasings))
            if (place := _position(t)) and t.size < 0.3:
                asked.append(
                    ask(
                        "position",
                        place,
                        f"Where is the {t.shape}?",
                        f"Where do you see the {t.shape}?",
                    )
                )
        if colours.count(t.colour) == 1:
            phrasings = [f"What shape is {t.colour}?", f"Which shape is {t.colour}?"]
            asked.append(ask("shape", t.shape, *phrasings))
        if alone:
            asked.append(
                ask("colour", t.colour, "What colour is it?", "Which colour is the shape?")
            )
            asked.append(ask("shape", t.shape, "What shape is it?", "Which shape is this?"))
            asked.append(
                ask(
                    "describe",
                    f"a {t.name}",
                    "What is this?",
                    "What do you see?",
                    "What is in the picture?",
                )
            )
    return asked


def _about_all(scene: Scene, rng: random.Random, ask: Ask) -> list[Question]:
    things, asked = scene.things, []
    shapes = {t.shape for t in things}
    asked.append(
        ask(
            "count",
            NUMBERS[len(things) - 1],
            "How many shapes are there?",
            "How many shapes do you see?",
        )
    )
    for shape in sorted(shapes):
        count = sum(t.shape == shape for t in things)
        plural = f"{shape}es" if shape == "cross" else f"{shape}s"
        asked.append(
            ask(
                "count", NUMBERS[count - 1], f"How many {plural} are there?", f"Count the {plural}."
            )
        )
    # As often there as not, and wrong by one word only.
    t = rng.choice(things)
    real = {(o.colour, o.shape) for o in things}
    if rng.random() < 0.5:
        asked.append(ask("exists", "yes", f"Is there a {t.name}?", f"Do you see a {t.name}?"))
    else:
        other = (t.colour, rng.choice([s for s in SHAPES if s != t.shape]))
        if rng.random() < 0.5:
            other = (rng.choice([c for c in COLOURS if c != t.colour]), t.shape)
        if other not in real:
            name = " ".join(other)
            asked.append(ask("exists", "no", f"Is there a {name}?", f"Do you see a {name}?"))
    if len(things) == len(shapes) == 2:
        asked += _relations(things[0], things[1], ask) + _relations(things[1], things[0], ask)
    return asked


def _relations(a: Thing, b: Thing, ask: Ask) -> list[Question]:
    dx, dy = b.x - a.x, b.y - a.y
    asked = []
    if abs(dx) > 0.2:
        side = "left" if dx > 0 else "right"
        asked.append(ask("relation", f"the {a.shape}", f"What is {side} of the {b.shape}?"))
        asked.append(ask("relation", side, f"Is the {a.shape} left or right of the {b.shape}?"))
    if abs(dy) > 0.2:
        side = "above" if dy > 0 else "below"
        asked.append(ask("relation", f"the {a.shape}", f"What is {side} the {b.shape}?"))
        asked.append(ask("relation", side, f"Is the {a.shape} above or below the {b.shape}?"))
    return asked


def _position(t: Thing) -> str:
    """Such as "top left"; nothing where people would disagree."""
    names = []
    for value, low, high in ((t.y, "top", "bottom"), (t.x, "left", "right")):
        if 0.34 < value < 0.42 or 0.58 < value < 0.66:
            return ""
        names.append(low if value <= 0.34 else high if value >= 0.66 else "")
    return " ".join(name for name in names if name) or "in the middle"


def cell_words(scene: Scene, cells: int) -> list[set[str]]:
    """The words for what stands in each cell of a grid of `cells` x `cells`, row by row."""
    boxes = [
        (t.x - t.size, t.y - t.size, t.x + t.size, t.y + t.size, {t.colour, t.shape})
        for t in scene.things
    ]
    if scene.word:
        boxes.append((*scene.word_box, {scene.word, scene.word_colour}))
    found = []
    for row in range(cells):
        for column in range(cells):
            words, free = set(), 1.0
            for left, top, right, bottom, names in boxes:
                wide = min(right * cells, column + 1) - max(left * cells, column)
                high = min(bottom * cells, row + 1) - max(top * cells, row)
                share = max(wide, 0) * max(high, 0)
                whole = (right - left) * (bottom - top) * cells**2
                if share > 0.15 or share > 0.3 * whole:
                    words |= names
                free -= share
            found.append(words | ({scene.ground} if free > 0.3 else set()))
    return found
