"""Small photographs and cut-outs to compose from, drawn; no files are needed."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_NAMES = (
    "banana anchor lantern violin tiger pumpkin kettle cactus robot mitten acorn balloon helmet"
    " feather turtle basket candle trumpet"
)
NAMES = _NAMES.split()


def write_photos(folder: Path, count: int = 3) -> None:
    """Skies over meadows, 360 x 240, each of its own colours."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        down = np.linspace(0, 1, 240)[:, None, None]
        sky, meadow = np.array([150 + 9 * i, 160, 165.0]), np.array([120.0, 125, 100 + 9 * i])
        pixels = sky * (1 - down) + meadow * down + rng.normal(0, 2, (240, 360, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"photo_{i}.png")


def cutout(seed: int) -> Image.Image:
    """A dark blob of its own shape with a light patch, on transparent ground, 90 x 80."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGBA", (90, 80), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    reach = rng.uniform(22, 38, 8)
    outline = [(45 + r * np.cos(a), 40 + r * np.sin(a)) for r, a in zip(reach, angles, strict=True)]
    draw.polygon(outline, fill=(*(int(v) for v in rng.integers(10, 70, 3)), 255))
    draw.ellipse((34, 30, 52, 46), fill=(210, 200, 190, 255))
    return image


def write_objects(folder: Path, names: list[str] = NAMES) -> None:
    """A third named by .txt, a third by names.json, a third by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for i, name in enumerate(names):
        stem = name if i % 3 == 2 else f"item{i:02d}"
        if i % 3 == 0:
            (folder / f"{stem}.txt").write_text(f"A {name}.\nEin Ding.\n")
        elif i % 3 == 1:
            listed.append(f'"{stem}.png": "{name}"')
        cutout(i).save(folder / f"{stem}.png")
    (folder / "names.json").write_text("{" + ", ".join(listed) + "}")
