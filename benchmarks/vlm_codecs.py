"""What a compressed cache costs where pictures stand in the prompt, on pictures drawn here.

    python benchmarks/vlm_codecs.py [--pictures 60] [--json FILE]

Each window is a picture and a conversation of right answers about it; every codec is compared with
the plain cache place by place, as `kvist quality` does on text. The same conversations without
their pictures are measured beside them: what is worse is the pictures' doing. Then each picture's
first question is asked through the engine, and answers are counted.
"""

import argparse
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

import kvist
from kvist.cache import CODECS
from kvist.reports.quality import measure

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from tiny_vlm_pictures import draw, questions, sample_scene  # noqa: E402

TURNS = 6


def main() -> None:
    """Draw, measure, ask, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/vlm_codecs.json"))
    args = parser.parse_args()
    model = kvist.load(EXAMPLES / "tiny-vlm")
    windows, blind, prompts, answers = [], [], [], []
    for seed in range(args.pictures):
        rng = random.Random(10_000_000 + seed)
        scene = sample_scene(rng)
        picture = draw(scene, rng)
        asked = questions(scene, rng)
        turns = rng.sample(asked, min(TURNS, len(asked)))
        chat = []
        for turn in turns:
            chat += [
                {"role": "user", "content": turn.text},
                {"role": "assistant", "content": turn.answer},
            ]
        blind.append(model.prepare(chat, add_generation_prompt=False))
        chat[0]["content"] = [
            {"type": "image", "image": picture},
            {"type": "text", "text": turns[0].text},
        ]
        windows.append(model.prepare(chat, add_generation_prompt=False))
        prompts.append(chat[:1])
        answers.append(turns[0].answer)
    found = measure(model, windows, list(CODECS))
    without = measure(model, blind, list(CODECS))
    params = kvist.SamplingParams(temperature=0, max_tokens=24)
    rows = []
    for codec, text in zip(found, without, strict=True):
        results = kvist.LLM(model, codec=codec.codec).generate(prompts, params)
        said = [result.text.strip() for result in results]
        right = sum(a == b for a, b in zip(said, answers, strict=True))
        rows.append({**asdict(codec), "blind": asdict(text), "right": right, "asked": len(answers)})
        print(
            f"{codec.codec:<8}{codec.bits_per_value:>7.2f} bits  "
            f"{codec.perplexity_change:>+8.2%} ± {codec.standard_error:.2%}  "
            f"KL {codec.kl:.5f} (without pictures {text.kl:.5f})  top-1 {codec.top1:.1%}  "
            f"right {right}/{len(answers)}"
        )
    print(f"{found[0].tokens:,} places in {len(windows)} conversations")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
