"""The registered model, as MLflow loads it: this file and the model directory, nothing pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

from diffusion_core.artifact import DiffusionModel
from diffusion_core.condition_encoding import encode_classes
from diffusion_core.generation import SamplerSettings, generate_images


class DiffusionPyfunc(PythonModel):
    """``predict(df, params)``: a column ``label`` (class index or class name), one row per image; returns (N, H, W, C) uint8.

    params: steps, eta, guidance_scale, seed. The same seed and labels give the same images.
    """

    def load_context(self, context: PythonModelContext) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = DiffusionModel.load(Path(context.artifacts["model"]), device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        if "label" not in model_input.columns:
            raise ValueError(f"the input needs a column 'label', it has {list(model_input.columns)}")
        given = dict(params or {})
        seed = int(given.pop("seed", 0))
        settings = SamplerSettings(
            steps=int(given.get("steps", 50)),
            eta=float(given.get("eta", 0.0)),
            guidance_scale=float(given.get("guidance_scale", 1.0)),
        )
        labels = encode_classes(model_input["label"].tolist(), self.model.class_names)
        images = generate_images(self.model, labels, torch.arange(len(labels)), settings, seed=seed)
        return images.permute(0, 2, 3, 1).numpy()


mlflow.models.set_model(DiffusionPyfunc())
