"""The schema of params.yaml: everything that decides a result, one section per stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipelines.params.run_settings import MOVED_HERE
from pipelines.params.sections import (
    MODEL_NAME,
    NAME,
    SHA256,
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    parse_section,
    read_yaml,
    require,
)

PARAMS_PATH = Path("params.yaml")

Eta = Annotated[
    Annotated[float, Field(ge=0.0, le=1.0)] | Literal["sigma_hat"],
    Field(description="a number from 0 to 1, or sigma_hat"),
]
ScheduleName = Literal["linear", "scaled_linear", "cosine", "sigmoid"]
ObjectiveName = Literal["eps", "x0", "v"]
WeightingName = Literal["uniform", "snr", "truncated_snr", "snr_plus_one", "min_snr", "p2"]
SpacingName = Literal["uniform", "leading", "trailing", "linspace", "quadratic"]


class Prepare(Section):
    """The source of the images, and how they are transformed and split."""

    source: Literal["digits", "torchvision", "folder"]
    dataset: str | None = None
    dataset_options: Annotated[
        dict[str, Any], Field(default_factory=dict, description="arguments of the data set's class by name")
    ]
    root: str | None = None
    download: bool = True
    image_size: Annotated[int, Field(ge=4, le=1024)]
    channels: Literal[1, 3]
    background: Annotated[int, Field(ge=0, le=255)] = 0
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    max_images: PositiveInt | None = None
    on_broken_image: Literal["fail", "skip"] = "fail"
    shard_size: PositiveInt = 16384

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.source != "torchvision" or self.dataset is not None,
            "prepare.dataset",
            "null",
            "with prepare.source torchvision: the name of a class of torchvision.datasets, such as MNIST",
        )
        require(
            self.source != "torchvision" or self.root is not None,
            "prepare.root",
            "null",
            "with prepare.source torchvision: the folder of the data set, such as data; it is downloaded there if it is missing",
        )
        require(
            self.source != "folder" or self.root is not None,
            "prepare.root",
            "null",
            "with prepare.source folder: the folder that holds <class>/<image> files",
        )
        require(
            self.source == "torchvision" or self.dataset is None,
            "prepare.dataset",
            repr(self.dataset),
            f"only with prepare.source torchvision, not {self.source}: set it to null",
        )
        require(
            self.source == "torchvision" or not self.dataset_options,
            "prepare.dataset_options",
            str(self.dataset_options),
            f"only with prepare.source torchvision, not {self.source}: set it to {{}}",
        )
        for name, option in self.dataset_options.items():
            values = option if isinstance(option, list) else option.values() if isinstance(option, dict) else [option]
            require(
                all(isinstance(value, str | int | float | None) for value in values),
                f"prepare.dataset_options.{name}",
                str(option),
                "a string, number, true, false or null, a list of them, or a mapping to them",
            )
        for key in ("dataset", "root"):
            value = getattr(self, key)
            require(value is None or value.strip() != "", f"prepare.{key}", repr(value), "a name that is not blank")
        require(
            self.source != "digits" or self.root is None,
            "prepare.root",
            repr(self.root),
            "only with prepare.source torchvision or folder, not digits: set it to null",
        )
        return self


class Reference(Section):
    """The network whose features FID compares."""

    extractor: Literal["classifier", "inception-v3-compat"] = "classifier"
    inception_weights: str | None = None
    inception_sha256: Annotated[str, Field(pattern=SHA256)] | None = None
    classifier_steps: PositiveInt = 600
    classifier_batch_size: PositiveInt = 128

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("inception_weights", "inception_sha256"):
            require(
                self.extractor != "classifier" or getattr(self, key) is None,
                f"reference.{key}",
                repr(getattr(self, key)),
                "only with reference.extractor inception-v3-compat: set it to null",
            )
        require(
            self.inception_weights is None or self.inception_weights.strip() != "",
            "reference.inception_weights",
            repr(self.inception_weights),
            "a path that is not blank",
        )
        require(
            self.inception_sha256 is None or self.inception_weights is not None,
            "reference.inception_sha256",
            repr(self.inception_sha256),
            "only together with reference.inception_weights, the file with that hash",
        )
        return self


class SearchSpace(Section):
    """The values that trials choose from."""

    schedule: Annotated[list[ScheduleName], Field(min_length=1)]
    objective: Annotated[list[ObjectiveName], Field(min_length=1)]
    weighting: Annotated[list[WeightingName], Field(min_length=1)]
    learning_rate: Annotated[list[Positive], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.learning_rate
        require(
            low <= high,
            "tune.space.learning_rate",
            f"[{low:g}, {high:g}]",
            "[lowest, highest], the lowest first",
        )
        return self


class Tune(Section):
    """The search: short trials, compared by a quick FID."""

    enabled: bool = True
    num_trials: PositiveInt
    steps: PositiveInt
    grace_steps: PositiveInt
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    num_samples: Annotated[int, Field(ge=16)] = 512
    ddim_steps: PositiveInt = 10
    space: SearchSpace

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.grace_steps <= self.steps,
            "tune.grace_steps",
            str(self.grace_steps),
            f"at most tune.steps ({self.steps}): a trial cannot be judged after its end",
        )
        return self


class Network(Section):
    """The network to train."""

    name: Literal["unet", "context_unet"] = "unet"
    channels: PositiveInt
    multipliers: Annotated[list[PositiveInt], Field(min_length=1, default_factory=lambda: [1, 2])]
    num_res_blocks: PositiveInt = 1
    attention_sizes: Annotated[list[PositiveInt], Field(default_factory=list)]
    dropout: Fraction = 0.0


class Diffusion(Section):
    """The diffusion process and the loss."""

    schedule: ScheduleName = "cosine"
    num_steps: PositiveInt = 1000
    zero_terminal_snr: bool = False
    objective: ObjectiveName = "v"
    weighting: WeightingName = "snr_plus_one"

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            not (self.zero_terminal_snr and self.objective == "eps"),
            "train.diffusion.objective",
            "'eps'",
            "v or x0 together with train.diffusion.zero_terminal_snr true: at zero SNR, eps carries no information about x0",
        )
        require(
            not (self.zero_terminal_snr and self.num_steps < 2),
            "train.diffusion.num_steps",
            "1",
            "at least 2 together with train.diffusion.zero_terminal_snr true",
        )
        return self


class Train(Section):
    """The training run."""

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: Positive
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "cosine"] = "cosine"
    weight_decay: NonNegative = 0.0
    grad_clip: Positive = 1.0
    ema_decay: Fraction = 0.999
    condition_dropout: Fraction = 0.1
    horizontal_flip: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    network: Network
    diffusion: Diffusion

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.warmup_steps <= self.steps,
            "train.warmup_steps",
            str(self.warmup_steps),
            f"at most train.steps ({self.steps})",
        )
        return self


class Evaluate(Section):
    """The sweep: every eta with every number of steps."""

    etas: Annotated[list[Eta], Field(min_length=1, description="a number from 0 to 1, or sigma_hat")]
    steps: Annotated[list[PositiveInt], Field(min_length=1)]
    num_samples: Annotated[int, Field(ge=2)]
    shard_size: PositiveInt = 256
    batch_size: Annotated[PositiveInt | Literal["auto"], Field(description="a whole number of at least 1, or auto")] = (
        "auto"
    )
    guidance_scale: NonNegative = 1.0
    spacing: SpacingName = "trailing"
    picture_rows: Annotated[int, Field(ge=1, le=32)] = 4
    trajectory_images: Annotated[int, Field(ge=1, le=32)] = 8

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("etas", "steps"):
            values = getattr(self, key)
            require(len(set(values)) == len(values), f"evaluate.{key}", str(values), "each value once")
        require(
            self.batch_size == "auto" or self.shard_size % self.batch_size == 0,
            "evaluate.shard_size",
            str(self.shard_size),
            f"a multiple of evaluate.batch_size ({self.batch_size})",
        )
        return self


class Register(Section):
    """The model's name in the registry, and the sampler setting at which the gate compares."""

    model_name: Annotated[str, Field(pattern=MODEL_NAME)]
    eta: Eta = 0.0
    steps: PositiveInt = 50


class Report(Section):
    """The page."""

    title: Annotated[str, Field(pattern=NAME)]


class Params(Section):
    """All of params.yaml: the seed, and one section per stage."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    prepare: Prepare
    reference: Reference
    tune: Tune
    train: Train
    evaluate: Evaluate
    register_: Annotated[Register, Field(alias="register")]
    report: Report

    @model_validator(mode="after")
    def _check(self) -> Self:
        network, diffusion, size = self.train.network, self.train.diffusion, self.prepare.image_size
        if network.name == "unet":
            factor = 2 ** (len(network.multipliers) - 1)
            require(
                size % factor == 0,
                "prepare.image_size",
                str(size),
                f"a multiple of {factor}, because train.network.multipliers {network.multipliers} halve it "
                f"{len(network.multipliers) - 1} times",
            )
            levels = [size // 2**level for level in range(len(network.multipliers))]
            for attention_size in network.attention_sizes:
                require(
                    attention_size in levels,
                    "train.network.attention_sizes",
                    str(network.attention_sizes),
                    f"sizes of the network's levels, which are {levels} for prepare.image_size {size}",
                )
        else:
            require(
                size % 4 == 0, "prepare.image_size", str(size), "a multiple of 4 with train.network.name context_unet"
            )
        require(
            not (diffusion.zero_terminal_snr and self.tune.enabled and "eps" in self.tune.space.objective),
            "tune.space.objective",
            str(self.tune.space.objective),
            "v and x0 together with train.diffusion.zero_terminal_snr true: at zero SNR, eps carries no information about x0",
        )
        self._check_first_trial()
        counted = [("evaluate.steps", steps) for steps in self.evaluate.steps]
        for key, steps in [*counted, ("tune.ddim_steps", self.tune.ddim_steps)]:
            require(
                steps <= diffusion.num_steps,
                key,
                str(steps),
                f"at most train.diffusion.num_steps ({diffusion.num_steps})",
            )
        require(
            self.evaluate.guidance_scale == 1.0 or self.train.condition_dropout > 0.0,
            "evaluate.guidance_scale",
            f"{self.evaluate.guidance_scale:g}",
            "1 with train.condition_dropout 0: guidance needs a model that was trained with condition dropout",
        )
        require(
            self.register_.steps in self.evaluate.steps,
            "register.steps",
            str(self.register_.steps),
            f"one of evaluate.steps {self.evaluate.steps}: the gate compares at a setting of the sweep",
        )
        require(
            self.register_.eta in self.evaluate.etas,
            "register.eta",
            str(self.register_.eta),
            f"one of evaluate.etas {self.evaluate.etas}: the gate compares at a setting of the sweep",
        )
        return self

    def _check_first_trial(self) -> None:
        """Check that train's own settings, the search's first trial, lie in the search space."""
        if not self.tune.enabled:
            return
        space, diffusion = self.tune.space, self.train.diffusion
        for name in ("schedule", "objective", "weighting"):
            require(
                getattr(diffusion, name) in getattr(space, name),
                f"train.diffusion.{name}",
                repr(getattr(diffusion, name)),
                f"one of tune.space.{name} {getattr(space, name)}: the search's first trial is train's own settings",
            )
        low, high = space.learning_rate
        require(
            low <= self.train.learning_rate <= high,
            "train.learning_rate",
            f"{self.train.learning_rate:g}",
            f"within tune.space.learning_rate [{low:g}, {high:g}]: the search's first trial is train's own settings",
        )


MOVED = {
    **{key: f"has moved to run.yaml, which decides where and how things run: set {key} there" for key in MOVED_HERE},
    "report.trajectory_images": "has moved: set evaluate.trajectory_images",
    "evaluate.grid_rows": "has a new name: set evaluate.picture_rows",
}
"""Keys that older params.yaml files hold, with the text that names their new place."""


def load_params(path: Path = PARAMS_PATH) -> Params:
    """Read and check params.yaml. Raises ValueError with one line that names what is wrong."""
    return parse_params(read_yaml(path), str(path))


def parse_params(tree: Any, origin: str = "params.yaml") -> Params:
    """Check a tree of plain values against the schema. Raises ValueError with one line."""
    return parse_section(Params, tree, origin, MOVED)


def with_overrides(params: Params, overrides: Mapping[str, Any], origin: str) -> Params:
    """Return the params with the search's choice of schedule, objective, weighting and learning_rate in the train section.

    Raises ValueError that names ``origin`` and the key if a value is not allowed.
    """
    tree = params.train.model_dump()
    for name, value in overrides.items():
        section = tree if name == "learning_rate" else tree["diffusion"]
        section[name] = value
    return params.model_copy(update={"train": parse_section(Train, tree, f"{origin} (train)")})


def declared_params(params: Params, keys: Sequence[str]) -> Params:
    """Return the params restricted to ``keys`` (dotted; sections or single values).

    A stage gets the params that dvc.yaml declares for it; reading another one raises AttributeError.
    """
    return _restricted(params, [key.split(".") for key in keys])


def _restricted(section: Any, paths: Sequence[Sequence[str]]) -> Any:
    names = {field.alias or name: name for name, field in type(section).model_fields.items()}
    kept: dict[str, Any] = {}
    for key, name in names.items():
        below = [path[1:] for path in paths if path[0] == key]
        if below:
            value = getattr(section, name)
            kept[name] = value if any(not path for path in below) else _restricted(value, below)
    copy = section.model_copy()
    copy.__dict__.clear()
    copy.__dict__.update(kept)
    copy.__pydantic_fields_set__.intersection_update(kept)
    return copy
