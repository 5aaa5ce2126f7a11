"""Which folder a model name means: `tiny`, a checkpoint folder, or a run folder's export."""

from __future__ import annotations

from pathlib import Path

from p2r_jax.paths import as_path

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"


def locate_checkpoint(name: str | Path) -> Path:
    """Folder with config.json. Raises FileNotFoundError saying what was tried."""
    if str(name) == "tiny":
        return TINY
    for folder in (as_path(name), as_path(name) / "export"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{name} is neither a Hugging Face checkpoint folder (config.json and safetensors) nor a "
        "run folder with an export; download weights first, or use `tiny`"
    )
