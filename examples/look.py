"""Draw a picture that nobody has seen before, and ask kvist two questions about it.

    python examples/look.py [--seed 7] [--save picture.png]

The eyes are `examples/tiny-vlm` (4.6 million parameters, trained by `train_tiny_vlm.py` on pictures
like this one), the language model is SmolLM2-135M as it is. It knows coloured shapes, how many
there are and where, and short words; it is a demonstration, not a model of use.
"""

import argparse
import random
import time
from pathlib import Path

from tiny_vlm_pictures import draw, questions, sample_scene

import kvist

MODEL = Path(__file__).parent / "tiny-vlm"


def main() -> None:
    """Draw, ask, and say what would have been right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seed", type=int, default=None, help="of the picture; a fresh one if not given"
    )
    parser.add_argument("--save", type=Path, default=None, help="keep the picture as a PNG")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else time.time_ns() % 1_000_000
    rng = random.Random(seed)
    scene = sample_scene(rng)
    picture = draw(scene, rng)
    if args.save:
        picture.resize((384, 384)).save(args.save)
    model = kvist.load(MODEL)
    params = kvist.SamplingParams(temperature=0, max_tokens=24)
    print(f"a picture drawn from seed {seed}:")
    for asked in rng.sample(questions(scene, rng), 2):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": asked.text}]
        [result] = kvist.generate(model, [[{"role": "user", "content": content}]], params)
        verdict = "right" if result.text.strip() == asked.answer else f"it is: {asked.answer}"
        print(f"> {asked.text}\n{result.text.strip()}  ({verdict})")


if __name__ == "__main__":
    main()
