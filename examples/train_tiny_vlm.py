"""Teach a small vision encoder to be read by a language model that stays as it is.

    python examples/train_tiny_vlm.py --language smollm2-135m --out models/tiny-vlm --minutes 8

About 4.6 million parameters see 96 x 96 pictures of coloured shapes, counts and short words (see
`tiny_vlm_pictures.py`) and become 16 embeddings in front of a question; SmolLM2-135M's own weights
are frozen. First each embedding learns to lie near the word embeddings of what stands in its cell,
which needs no forward pass of the language model; then the answers are the teacher. One H200 takes
8 minutes. It goes on where it stopped if it is run again with the same --work.

What comes out is nanoVLM's format without the language model, which config.json names. It knows
this small world and nothing else: it is a demonstration of the machinery, not a model of use.
"""

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tiny_vlm_lessons import IGNORE, NAMES, Lesson, Lessons, Teacher
from tiny_vlm_pictures import SIDE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import kvist
from kvist.attention import register
from kvist.loading.nanovlm import make_processor, save_pretrained
from kvist.models.nanovlm import VisionLanguageModel, VLMConfig, read_vlm
from kvist.models.siglip import VisionConfig, VisionEncoder
from kvist.text.tokenizer import Tokenizer

CONFIG: dict[str, Any] = {
    "vit_hidden_dim": 192,
    "vit_inter_dim": 768,
    "vit_patch_size": 8,
    "vit_img_size": SIDE,
    "vit_n_heads": 6,
    "vit_dropout": 0.0,
    "vit_n_blocks": 8,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "vit_model_type": "none",
    "lm_use_tokens": False,
    "lm_chat_template": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "mp_pixel_shuffle_factor": 3,
    "mp_image_token_length": 16,
    "max_img_size": SIDE,
    "resize_to_max_side_len": True,
    # Special tokens that SmolLM2 has and chats never use, so that its vocabulary stays as it is.
    "vlm_extra_tokens": {"image_token": "<file_sep>", "global_image_token": "<filename>"},
    "vlm_load_backbone_weights": False,
}

# The language model over padded rows, through the same seams that generation uses.


class Rows:
    """A cache that keeps nothing: each row sees its own past within this forward pass."""

    backend = "padded-rows"

    def __init__(self, count: int) -> None:
        """For this many rows of equal length."""
        self.count = count
        self.keys_values: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> Any:
        """Hand this layer's keys and values to attention."""
        seen = Rows(self.count)
        seen.keys_values = key_states, value_states
        return seen

    def state(self, layer_idx: int) -> Any:
        """No layer is recurrent."""
        raise NotImplementedError

    def observe(self, q: Tensor) -> None:
        """Nothing is scored."""


def attend_in_rows(q: Tensor, kv: Any, scale: float) -> Tensor:
    """Causal attention, all rows at once; padding stands behind and is never looked at."""
    q, k, v = (x.unflatten(0, (kv.count, -1)).transpose(1, 2) for x in (q, *kv.keys_values))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(0, 1)


register(Rows.backend, attend_in_rows, lambda kv: isinstance(kv, Rows))


def fresh_encoder(config: VisionConfig) -> VisionEncoder:
    """A vision encoder that learns fast: weights by their fan, positions that know the plane."""
    encoder = VisionEncoder(config)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    conv = encoder.patch_embedding.conv
    nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
    # Sines and cosines of row and column (Beyer et al., 2022), to begin with; they are learnt on.
    rows, columns = torch.meshgrid(*2 * [torch.arange(config.grid).float()], indexing="ij")
    waves = 10000 ** -torch.linspace(0, 1, config.hidden_size // 4)
    angles = [place.flatten()[:, None] * waves for place in (rows, columns)]
    places = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    encoder.patch_embedding.position_embedding.data.copy_(0.5 * places)
    return encoder


class Pupil(nn.Module):
    """What is trained, and what it is trained with."""

    def __init__(self, config: VLMConfig, lm: Any, tokenizer: Tokenizer) -> None:
        """A fresh vision encoder and projector before a frozen language model."""
        super().__init__()
        with torch.device("meta"):
            vlm = VisionLanguageModel(config)
        vlm.vision = fresh_encoder(config.vision)
        table = lm.model.embed_tokens.weight.detach().float().cpu()
        vlm.projector = type(vlm.projector)(
            config.vision, config.pixel_shuffle_factor, config.language.hidden_size
        )
        rows = table[[tokenizer.encode(f" {name}")[0] for name in NAMES]]
        self.size = float(rows.square().mean().sqrt())
        # Begin at the size of the word embeddings, by the last norm's gain: weights that small
        # would be thrown about by steps that suit all others.
        nn.init.normal_(vlm.projector.proj.weight, std=0.02)
        gain = self.size / (0.02 * vlm.projector.proj.in_features**0.5)
        nn.init.constant_(vlm.vision.norm.weight, gain)
        vlm.language = lm
        self.vlm = vlm
        self.centre: Tensor
        self.named: Tensor
        self.register_buffer("centre", rows.mean(dim=0))
        self.register_buffer("named", F.normalize(rows - rows.mean(dim=0), dim=-1))
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.offset = nn.Parameter(torch.tensor(-4.0))

    def trained(self) -> list[nn.Parameter]:
        """Parameters that learn."""
        return [p for p in self.parameters() if p.requires_grad]

    def see(self, pictures: Tensor) -> Tensor:
        """`[n, 3, SIDE, SIDE]` uint8 -> `[n, image tokens, hidden]`."""
        narrow = pictures.device.type == "cuda"
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=narrow):
            return self.vlm.encode_images(pictures.float().div(255)).float()

    def naming_loss(self, seen: Tensor, names: Tensor) -> Tensor:
        """How far each cell's embedding is from those of the words for it, and from their size."""
        alike = F.normalize(seen - self.centre, dim=-1) @ self.named.T
        logits = alike * self.scale + self.offset
        named = F.binary_cross_entropy_with_logits(logits, names.float()) * len(NAMES)
        sizes = seen.square().mean(dim=-1).sqrt() / self.size
        return named + sizes.log().square().mean()

    def answer_logits(self, lesson: Lesson, seen: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """`[answer tokens, vocab]` logits and the tokens that are right."""
        lm = self.vlm.language
        rows, length = lesson.token_ids.shape
        x, images = lm.embed(lesson.token_ids), seen[lesson.picture_of]
        x = torch.cat((x[:, :start], images.to(x.dtype), x[:, start + images.shape[1] :]), dim=1)
        positions = torch.arange(length, device=x.device).repeat(rows)
        hidden = lm(x.flatten(0, 1), positions, Rows(rows))
        wanted = lesson.targets.flatten() != IGNORE
        return lm.logits(hidden[wanted]), lesson.targets.flatten()[wanted]


@torch.no_grad()
def accuracy(pupil: Pupil, lessons: list[Lesson], start: int) -> dict[str, float]:
    """Share of answers of which every token is right, by kind of question."""
    pupil.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for lesson in lessons:
        logits, targets = pupil.answer_logits(lesson, pupil.see(lesson.pictures), start)
        row = (lesson.targets != IGNORE).nonzero()[:, 0]
        wrong = torch.zeros(len(lesson.token_ids), device=row.device)
        wrong.index_add_(0, row, (logits.argmax(dim=-1) != targets).float())
        for kind, errors in zip(lesson.kinds, wrong.tolist(), strict=True):
            right[kind].append(errors == 0)
            right["all"].append(errors == 0)
    pupil.train()
    return {kind: round(sum(r) / len(r), 4) for kind, r in sorted(right.items())}


def to_device(lesson: Lesson, device: torch.device) -> Lesson:
    """The tensors on the device, without waiting for them."""
    moved = (t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in lesson)
    return Lesson(*moved)  # type: ignore[arg-type]


def learning_rate(progress: float, naming: float) -> float:
    """Warm up and name; then warm up again and go down to nothing while answering."""
    if progress < naming:
        return 1e-3 * min(progress / (0.1 * naming), 1.0)
    done = (progress - naming) / (1 - naming)
    return 8e-4 * min(done / 0.04, 1.0) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def train(args: argparse.Namespace) -> None:
    """Run to the end of the time that was given, and write the result."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    model = kvist.load(args.language, "bfloat16" if device.type == "cuda" else "float32", device)
    names = {"lm_weights": args.language_name, "lm_tokenizer": args.language_name}
    config = read_vlm(CONFIG | names, language=model.config)
    tokenizer = model.require_tokenizer()
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.special_tokens, config.chat_template)
    teacher = Teacher(make_processor(config, tokenizer))
    pupil = Pupil(config, model.lm, tokenizer).to(device)
    optimizer = torch.optim.AdamW(
        pupil.trained(), betas=(0.9, 0.98), weight_decay=0.05, fused=device.type == "cuda"
    )
    spent, step = resume(args.work / "state.pt", pupil, optimizer)
    print(f"{sum(p.numel() for p in pupil.trained()):,} parameters learn; step {step}", flush=True)

    tests = {
        name: [
            to_device(
                teacher.lesson(random.Random(f"{name} {i}"), 100, unseen=unseen, test=True), device
            )
            for i in range(args.tests)
        ]
        for name, unseen in (("held_out", False), ("unseen_pairs", True))
    }
    lessons = DataLoader(
        Lessons(teacher, args.pictures, args.seed + 1000 * step, max(args.easy - step, 0)),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
        pin_memory=device.type == "cuda",
    )
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic() - spent
    saved = logged = time.monotonic()
    for lesson in lessons:
        progress = (time.monotonic() - began) / (60 * args.minutes)
        if progress >= 1:
            break
        naming = progress < args.naming
        lesson = to_device(lesson, device)
        seen = pupil.see(lesson.pictures)
        named = pupil.naming_loss(seen, lesson.names)
        answered = torch.zeros((), device=device)
        if not naming:
            logits, targets = pupil.answer_logits(lesson, seen, teacher.image_start)
            answered = F.cross_entropy(logits, targets)
        # Naming goes on beside answering at first, and fades.
        weight = 1.0 if naming else 0.3 * max(1 - 2 * progress, 0.0)
        optimizer.param_groups[0]["lr"] = learning_rate(progress, args.naming)
        optimizer.zero_grad(set_to_none=True)
        (answered + weight * named).backward()
        nn.utils.clip_grad_norm_(pupil.trained(), 1.0)
        optimizer.step()
        step += 1
        now = time.monotonic()
        if step % args.log_every == 0:
            facts: dict[str, Any] = {
                "step": step,
                "seconds": round(now - began, 1),
                "steps_per_second": round(args.log_every / (now - logged), 2),
                "naming_loss": round(named.item(), 4),
                "answer_loss": round(answered.item(), 4),
            }
            logged = now
            if step % (10 * args.log_every) == 0 and not naming:
                facts["accuracy"] = accuracy(pupil, tests["held_out"][:2], teacher.image_start)
            print(json.dumps(facts), flush=True)
        if now - saved > 60:
            save_state(args.work / "state.pt", pupil, optimizer, now - began, step)
            saved = now
    spent = time.monotonic() - began
    save_state(args.work / "state.pt", pupil, optimizer, spent, step)
    metrics = {
        "steps": step,
        "seconds": round(spent, 1),
        "questions_seen": 2 * args.pictures * step,
        **{name: accuracy(pupil, test, teacher.image_start) for name, test in tests.items()},
    }
    print(json.dumps(metrics, indent=1))
    pupil.vlm.vision.half()
    pupil.vlm.projector.half()
    save_pretrained(pupil.vlm, args.out, vision_only=True)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


def save_state(
    path: Path, pupil: Pupil, optimizer: torch.optim.Optimizer, spent: float, step: int
) -> None:
    """Everything that is needed to go on; whole or not at all."""
    weights = {n: t for n, t in pupil.state_dict().items() if not n.startswith("vlm.language.")}
    state = {"weights": weights, "optimizer": optimizer.state_dict(), "spent": spent, "step": step}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def resume(path: Path, pupil: Pupil, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """Go on from a saved state, if there is one: seconds spent and steps taken."""
    if not path.is_file():
        return 0.0, 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    pupil.load_state_dict(state["weights"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["spent"], state["step"]


def main() -> None:
    """Read the switches and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--language", default="smollm2-135m", help="anything that kvist loads")
    parser.add_argument(
        "--language-name", default="smollm2-135m", help="what the result calls it, in lm_weights"
    )
    parser.add_argument("--out", type=Path, default=Path("models/tiny-vlm"))
    parser.add_argument("--work", type=Path, default=Path("models/tiny-vlm-training"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, over all runs")
    parser.add_argument("--naming", type=float, default=0.2, help="share of them without answers")
    parser.add_argument("--pictures", type=int, default=256, help="in a step; two rows each")
    parser.add_argument("--easy", type=int, default=1500, help="steps until no picture is easy")
    parser.add_argument("--tests", type=int, default=10, help="hundreds of held-out pictures")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 2, 0))
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
