"""The registered model, as MLflow loads it: this file and the model directory, nothing pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import AnyType

from diffusion_core.artifact import DiffusionModel
from diffusion_core.condition_encoding import encode_class_indices, encode_classes
from diffusion_core.generation import MOST_INDICES, SamplerSettings, generate_images

COLUMNS = ("label", "class_index")
"""The columns that give the class of each image: its name, or its index."""


class DiffusionPyfunc(PythonModel):
    """``predict(df, params)``: one row per image; returns (N, H, W, C) uint8.

    Columns: ``label``, class names (3, 3.0 and "3" are the class named 3), or ``class_index``, class indices: exactly one of
    them, and neither for a model without a condition; ``sample_index``, the numbers of the samples (default: first, first + 1, ...).
    params: steps, eta, sigma_hat (DDPM's larger variance, instead of a number for eta), guidance_scale, spacing, seed, first. A
    param that is not given has the value that the gate judged the model with. The same seed, sample numbers and classes give the
    same images. What a user can cause raises MlflowException with INVALID_PARAMETER_VALUE, which the server answers with 400.
    """

    def load_context(self, context: PythonModelContext) -> None:
        _let_the_server_read_csv()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = DiffusionModel.load(Path(context.artifacts["model"]), device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        try:
            given = {name: value for name, value in (params or {}).items() if value is not None}
            seed, first = given.pop("seed", 0), given.pop("first", 0)
            settings = requested_settings(given, SamplerSettings(**context.model_config))
            condition = _condition(model_input, self.model)
            indices = _sample_indices(model_input, first)
            images = generate_images(self.model, condition, indices, settings, seed=seed)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return images.permute(0, 2, 3, 1).numpy()


def signature(model: DiffusionModel, judged: SamplerSettings) -> ModelSignature:
    """Return the columns and params of `DiffusionPyfunc`. The defaults are the sampler settings that the model was judged with."""
    classes = COLUMNS if model.condition.kind == "class" else ()
    channels, height, width = model.image_shape
    sigma_hat = judged.eta == "sigma_hat"
    return ModelSignature(
        # AnyType: with a type of its own, MLflow would refuse numbers as labels, and cut 2.7 to the index 2
        inputs=Schema([ColSpec(AnyType(), name, required=False) for name in (*classes, "sample_index")]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, height, width, channels))]),
        params=ParamSchema(
            [
                ParamSpec("steps", DataType.long, judged.steps),
                ParamSpec("eta", DataType.double, None if sigma_hat else float(judged.eta)),
                ParamSpec("sigma_hat", DataType.boolean, sigma_hat),
                ParamSpec("guidance_scale", DataType.double, float(judged.guidance_scale)),
                ParamSpec("spacing", DataType.string, judged.spacing),
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("first", DataType.long, 0),
            ]
        ),
    )


def input_example(model: DiffusionModel) -> pd.DataFrame:
    """Return the input of two images (one if the model has one class)."""
    if model.condition.kind != "class":
        return pd.DataFrame({"sample_index": [0, 1]})
    if model.class_names:
        return pd.DataFrame({"label": list(model.class_names[:2])})
    return pd.DataFrame({"class_index": list(range(min(model.condition.size, 2)))})


def requested_settings(params: Mapping[str, Any], judged: SamplerSettings) -> SamplerSettings:
    """Return the sampler settings of a request; what it does not give is as it was ``judged``.

    Raises ValueError if a param is unknown, a value is not allowed, or both a number for eta and sigma_hat are requested.
    """
    unknown = sorted(params.keys() - asdict(judged).keys() - {"sigma_hat"})
    if unknown:
        raise ValueError(
            f"unknown params {', '.join(unknown)}: the model takes {', '.join(asdict(judged))}, sigma_hat, seed, first"
        )
    values = {**asdict(judged), **params}
    sigma_hat = values.pop("sigma_hat", judged.eta == "sigma_hat")
    if judged.eta == "sigma_hat":
        if not sigma_hat and "eta" not in params:
            raise ValueError("sigma_hat is false: give a number for eta")
    elif sigma_hat:
        if values["eta"] != judged.eta:
            raise ValueError(f"eta {values['eta']} and sigma_hat were both given: give one of them")
        values["eta"] = "sigma_hat"
    return SamplerSettings(**values)


def _condition(model_input: pd.DataFrame, model: DiffusionModel) -> torch.Tensor | None:
    """Return the class of each row, or None for a model without a condition. Raises ValueError if the columns do not fit."""
    kind = model.condition.kind
    if kind not in ("class", "none"):
        raise ValueError(f"the model takes a condition of kind {kind}, only classes are served")
    given = [name for name in COLUMNS if name in model_input.columns]
    if kind == "none":
        if given or "sample_index" not in model_input.columns:
            raise ValueError(
                "the model takes no condition: the input needs the column sample_index alone, one row per image"
            )
        return None
    if len(given) != 1:
        raise ValueError(
            "the input needs exactly one of the columns label (class names) and class_index (class indices), it has "
            f"{' and '.join(given) or 'neither'}"
        )
    values = model_input[given[0]].tolist()
    if given == ["label"]:
        return encode_classes(values, model.class_names)
    return encode_class_indices(values, model.condition.size)


def _sample_indices(model_input: pd.DataFrame, first: int) -> torch.Tensor:
    """Return the numbers of the samples: the column sample_index, or the rows counted from ``first``."""
    if "sample_index" not in model_input.columns:
        if not 0 <= first <= MOST_INDICES - len(model_input):
            raise ValueError(f"first is {first}: sample numbers must lie in 0 to {MOST_INDICES - 1}")
        return torch.arange(first, first + len(model_input))
    if first:
        raise ValueError("the column sample_index and the param first were both given: give one of them")
    return encode_class_indices(model_input["sample_index"].tolist(), MOST_INDICES, "sample_index")


def _let_the_server_read_csv() -> None:
    """Give a column of any type the pandas type object in MLflow's schemas.

    Without it, `mlflow models serve` refuses every text/csv request to a model with such a column. The column is then text.
    """
    known = Schema.pandas_types

    def pandas_types(schema: Schema) -> list[Any]:
        if any(isinstance(column.type, AnyType) for column in schema.inputs):
            types = [column.type for column in schema.inputs]
            return [kind.to_pandas() if isinstance(kind, DataType) else np.dtype(object) for kind in types]
        return known(schema)

    if not getattr(known, "reads_any_type", False):
        pandas_types.reads_any_type = True  # type: ignore[attr-defined]
        Schema.pandas_types = pandas_types  # type: ignore[method-assign, assignment]


mlflow.models.set_model(DiffusionPyfunc())
