"""Make the pictures of the README and of docs/diffusion_core.md.

dvc repro && python -m docs.make_pictures
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from PIL import Image

from tests.diffusion_core.test_guide import run_guide

IMAGES = Path(__file__).parent / "images"


def readme_picture(evaluation: Path) -> Image.Image:
    """Return the samples of the champion's setting beside the heat map."""
    samples = Image.open(evaluation / "samples" / "eta-0.0-steps-50.png").convert("RGB")
    heat_map = Image.open(evaluation / "heatmap.png").convert("RGB")
    samples = samples.resize((samples.width * 2, samples.height * 2), Image.Resampling.NEAREST)
    scale = samples.height / heat_map.height
    heat_map = heat_map.resize((round(heat_map.width * scale), samples.height), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (samples.width + heat_map.width + 24, samples.height), "white")
    picture.paste(samples, (0, 0))
    picture.paste(heat_map, (samples.width + 24, 0))
    return picture


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_guide(Path(folder))
        for path in Path(folder).glob("*.png"):
            shutil.copy(path, IMAGES / path.name)
    evaluation = Path("artifacts/evaluation")
    if not evaluation.exists():
        raise SystemExit("made the pictures of the guide; that of the README needs the default run: uv run dvc repro")
    readme_picture(evaluation).save(IMAGES / "digits.png", optimize=True)


if __name__ == "__main__":
    main()
