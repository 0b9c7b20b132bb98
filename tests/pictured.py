"""Tiny models of image and text, and captioned images of coloured shapes, made in a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cluster.planning.preparation import prepare_run, run_plan
from shared.config.run import Config
from shared.run.plan import RunPlan
from tests import tiny

COLOURS = {"red": (220, 30, 30), "green": (30, 190, 60), "blue": (30, 60, 220), "white": (250,) * 3}
SHAPES = ("circle", "square", "cross")
PATCH, SIDE = 8, 16  # of an image as the models see it
SEEN = (SIDE // PATCH) ** 2  # tokens in the place of an image
VOCAB = tiny.VOCAB + 1


def save_llava(
    folder: Path, *, width: int, layers: int, seed: int, side: int = SIDE, **text: Any
) -> None:
    """A random LLaVA of CLIP and Llama with its processor, which needs no torchvision."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=PATCH,
        initializer_range=0.2,
        initializer_factor=2.0,
    )
    language = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
        **text,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=tiny.VOCAB,
        vision_feature_layer=-2,
        initializer_range=0.2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": side, "width": side}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def save_pair(folder: Path) -> tiny.Pair:
    """A teacher of width 48 and 3 layers, a student of width 32 and 2 layers."""
    pair = tiny.Pair(folder / "teacher", folder / "student")
    save_llava(pair.teacher, width=48, layers=3, seed=1)
    save_llava(pair.student, width=32, layers=2, seed=2)
    return pair


def draw(colour: str, shape: str, seed: int) -> Image.Image:
    """A shape of a colour somewhere on black."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", tuple(generator.integers(20, 40, 2).tolist()))
    pen, (x, y) = ImageDraw.Draw(image), generator.integers(2, 6, 2).tolist()
    box, fill = (x, y, x + 12, y + 12), COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    else:
        pen.line(box, fill=fill, width=4)
        pen.line((x, y + 12, x + 12, y), fill=fill, width=4)
    return image


def captions(folder: Path, name: str, *, count: int, seed: int = 0) -> Path:
    """A file of rows about images beside it, of one or two images each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        said, files = [], []
        for nth in range(1 + number % 3 // 2):
            at = seed + 7 * number + nth
            colour, shape = [*COLOURS][at % len(COLOURS)], SHAPES[at % len(SHAPES)]
            files.append(f"{name}-{number}-{nth}.png")
            draw(colour, shape, at).save(folder / files[-1])
            said.append(f"{colour} {shape}")
        prompt = " and ".join(["<image>"] * len(files)) + f" What is seen {number}?"
        prompt = prompt if number % 4 else f"What is seen {number}?"  # images then stand before it
        rows.append({"images": files, "prompt": prompt, "response": " and ".join(said)})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(folder: Path, name: str, *, pair: tiny.Pair, **options: Any) -> Config:
    """The config of a short run; options are sections or leaves of the config, merged."""
    train = captions(folder / "text", "train", count=12)
    valid = captions(folder / "text", "valid", count=5, seed=3)
    fields: dict[str, Any] = {
        "name": name,
        "seed": 7,
        "steps": 4,
        "log_every": 1,
        "paths": {"root": str(folder), "runs": str(folder), "cache": str(folder / "cache")},
        "task": "image_text",
        "teachers": {"t": {"model": str(pair.teacher)}},
        "student": {"model": str(pair.student), "workers": 2},
        "domains": {"shapes": {"train": str(train), "validation": str(valid)}},
        "data": {"context": 64, "too_long": "refuse"},
        "batch": {"rows_per_step": 8, "micro_batch": 2},
        "targets": {"selector": "top_k", "top_k": 16, "encoding": "fp32"},
        "losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy", "weight": 0.5}],
        "optimiser": {"lr": 1e-2, "warmup_steps": 1, "weight_decay": 0.01},
        "checkpoints": {"every": 2},
    }
    for option, value in options.items():
        old = fields.get(option)
        merges = isinstance(value, dict) and isinstance(old, dict) and option != "domains"
        fields[option] = {**old, **value} if merges else value
    return Config.model_validate(fields)


def plan_of(config: Config) -> RunPlan:
    """The plan of a config, prepared as a run prepares it."""
    folder = Path(config.paths.runs) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    return run_plan(prepare_run(config), run_dir=folder, teacher={"model": "t"})


def rows_in(config: Config, split: str) -> list[dict[str, Any]]:
    """What the sources of a split hold, images opened."""
    rows = []
    for domain in config.domains.values():
        path = Path(getattr(domain, split))
        for line in path.read_text().splitlines():
            row = json.loads(line)
            row["images"] = [Image.open(path.parent / name) for name in row["images"]]
            rows.append(row)
    return rows
