"""The schema of params.yaml. Every error is one line that names the key, what was given and what is allowed."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

PARAMS_PATH = Path("params.yaml")

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Eta = Annotated[float, Field(ge=0.0, le=1.0)] | Literal["sigma_hat"]
ScheduleName = Literal["linear", "scaled_linear", "cosine", "sigmoid"]
ObjectiveName = Literal["eps", "x0", "v"]
WeightingName = Literal["uniform", "snr", "truncated_snr", "snr_plus_one", "min_snr", "p2"]
SpacingName = Literal["uniform", "leading", "trailing", "linspace", "quadratic"]


SHA256 = r"^[0-9a-fA-F]{64}$"
MODEL_NAME = r"^[^/:.%\"']+$"
PATTERNS = {SHA256: "64 hexadecimal digits", MODEL_NAME: "a name without / : . % and quotes"}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Prepare(Section):
    """Where the images come from, and what is made of them."""

    source: Literal["digits", "torchvision", "folder"]
    dataset: str | None = None
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
        _require(
            self.source != "torchvision" or self.dataset is not None,
            "prepare.dataset",
            "null",
            "with prepare.source torchvision: the name of a class of torchvision.datasets, MNIST say",
        )
        _require(
            self.source != "torchvision" or self.root is not None,
            "prepare.root",
            "null",
            "with prepare.source torchvision: the folder that holds the data set or is to hold it, data say",
        )
        _require(
            self.source != "folder" or self.root is not None,
            "prepare.root",
            "null",
            "with prepare.source folder: the folder that holds <class>/<image> files",
        )
        _require(
            self.source == "torchvision" or self.dataset is None,
            "prepare.dataset",
            repr(self.dataset),
            f"only with prepare.source torchvision, not {self.source}: set it to null",
        )
        _require(
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
            _require(
                self.extractor != "classifier" or getattr(self, key) is None,
                f"reference.{key}",
                repr(getattr(self, key)),
                "only with reference.extractor inception-v3-compat: set it to null",
            )
        _require(
            self.inception_sha256 is None or self.inception_weights is not None,
            "reference.inception_sha256",
            repr(self.inception_sha256),
            "only together with reference.inception_weights, the file that it is the hash of",
        )
        return self


class SearchSpace(Section):
    """What the trials choose from."""

    schedule: Annotated[list[ScheduleName], Field(min_length=1)]
    objective: Annotated[list[ObjectiveName], Field(min_length=1)]
    weighting: Annotated[list[WeightingName], Field(min_length=1)]
    learning_rate: Annotated[list[Positive], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.learning_rate
        _require(
            low <= high,
            "tune.space.learning_rate",
            f"[{low:g}, {high:g}]",
            "[lowest, highest], the lowest first",
        )
        return self


class Tune(Section):
    """The search: trials of a few steps each, compared by a quick FID."""

    enabled: bool = True
    num_trials: PositiveInt
    max_concurrent: PositiveInt = 2
    cpus_per_trial: Positive = 1.0
    gpus_per_trial: NonNegative = 0.0
    steps: PositiveInt
    grace_steps: PositiveInt
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    num_samples: Annotated[int, Field(ge=2)] = 512
    ddim_steps: PositiveInt = 10
    space: SearchSpace

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(
            self.grace_steps <= self.steps,
            "tune.grace_steps",
            str(self.grace_steps),
            f"at most tune.steps ({self.steps}): a trial cannot be judged after its end",
        )
        return self


class Network(Section):
    """The network that is trained."""

    name: Literal["unet", "context_unet"] = "unet"
    channels: PositiveInt
    multipliers: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 2]
    num_res_blocks: PositiveInt = 1
    attention_sizes: list[PositiveInt] = []
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
        _require(
            not (self.zero_terminal_snr and self.objective == "eps"),
            "train.diffusion.objective",
            "'eps'",
            "v or x0 together with train.diffusion.zero_terminal_snr true: at a zero SNR eps says nothing of x0",
        )
        _require(
            not (self.zero_terminal_snr and self.num_steps < 2),
            "train.diffusion.num_steps",
            "1",
            "at least 2 together with train.diffusion.zero_terminal_snr true",
        )
        return self


class Train(Section):
    """Training with Ray Train."""

    num_workers: PositiveInt = 2
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative = 0.0
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
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 100
    sample_every: PositiveInt = 500
    max_failures: Annotated[int, Field(ge=0)] = 3
    network: Network
    diffusion: Diffusion

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(
            self.batch_size % self.num_workers == 0,
            "train.batch_size",
            str(self.batch_size),
            f"a multiple of train.num_workers ({self.num_workers}), so that each worker has an equal share",
        )
        _require(
            self.warmup_steps <= self.steps,
            "train.warmup_steps",
            str(self.warmup_steps),
            f"at most train.steps ({self.steps})",
        )
        return self


class Evaluate(Section):
    """The sweep: every eta with every number of steps."""

    etas: Annotated[list[Eta], Field(min_length=1)]
    steps: Annotated[list[PositiveInt], Field(min_length=1)]
    num_samples: Annotated[int, Field(ge=2)]
    shard_size: PositiveInt = 500
    batch_size: PositiveInt = 125
    guidance_scale: NonNegative = 1.0
    spacing: SpacingName = "trailing"
    grid_rows: Annotated[int, Field(ge=1, le=32)] = 4
    cpus_per_task: Positive = 1.0
    gpus_per_task: NonNegative = 0.0
    max_retries: Annotated[int, Field(ge=0)] = 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("etas", "steps"):
            values = getattr(self, key)
            _require(len(set(values)) == len(values), f"evaluate.{key}", str(values), "each value once")
        _require(
            self.shard_size % self.batch_size == 0,
            "evaluate.shard_size",
            str(self.shard_size),
            f"a multiple of evaluate.batch_size ({self.batch_size})",
        )
        return self


class Register(Section):
    """The model's name in the registry, and the sampler setting at which the gate compares."""

    model_name: Annotated[str, Field(min_length=1, pattern=MODEL_NAME)]
    eta: Eta = 0.0
    steps: PositiveInt = 50


class Report(Section):
    """The page."""

    title: Annotated[str, Field(min_length=1)]
    trajectory_images: Annotated[int, Field(ge=1, le=32)] = 8


class Ray(Section):
    """Where Ray runs. Changes of this section re-run nothing."""

    address: str | None = None
    num_cpus: PositiveInt | None = None
    storage: Annotated[str, Field(min_length=1)] = "runs"


class Tracking(Section):
    """Where MLflow writes. Changes of this section re-run nothing."""

    uri: str | None = None
    experiment: Annotated[str, Field(min_length=1)] = "rediffuse"


class Params(Section):
    """The whole of params.yaml: one section a stage, and where things run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    prepare: Prepare
    reference: Reference
    tune: Tune
    train: Train
    evaluate: Evaluate
    register_: Annotated[Register, Field(alias="register")]
    report: Report
    ray: Ray = Ray()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _check(self) -> Self:
        network, diffusion, size = self.train.network, self.train.diffusion, self.prepare.image_size
        if network.name == "unet":
            factor = 2 ** (len(network.multipliers) - 1)
            _require(
                size % factor == 0,
                "prepare.image_size",
                str(size),
                f"a multiple of {factor}, because train.network.multipliers {network.multipliers} halve it "
                f"{len(network.multipliers) - 1} times",
            )
            levels = [size // 2**level for level in range(len(network.multipliers))]
            for attention_size in network.attention_sizes:
                _require(
                    attention_size in levels,
                    "train.network.attention_sizes",
                    str(network.attention_sizes),
                    f"sizes of the network's levels, which are {levels} for prepare.image_size {size}",
                )
        else:
            _require(
                size % 4 == 0, "prepare.image_size", str(size), "a multiple of 4 with train.network.name context_unet"
            )
        _require(
            not (diffusion.zero_terminal_snr and self.tune.enabled and "eps" in self.tune.space.objective),
            "tune.space.objective",
            str(self.tune.space.objective),
            "v and x0 together with train.diffusion.zero_terminal_snr true: at a zero SNR eps says nothing of x0",
        )
        counted = [("evaluate.steps", steps) for steps in self.evaluate.steps]
        for key, steps in [*counted, ("tune.ddim_steps", self.tune.ddim_steps)]:
            _require(
                steps <= diffusion.num_steps,
                key,
                str(steps),
                f"at most train.diffusion.num_steps ({diffusion.num_steps})",
            )
        _require(
            self.evaluate.guidance_scale == 1.0 or self.train.condition_dropout > 0.0,
            "evaluate.guidance_scale",
            f"{self.evaluate.guidance_scale:g}",
            "1 with train.condition_dropout 0: guidance needs a model that was trained with its condition dropped at times",
        )
        _require(
            self.register_.steps in self.evaluate.steps,
            "register.steps",
            str(self.register_.steps),
            f"one of evaluate.steps {self.evaluate.steps}: the gate compares at a setting of the sweep",
        )
        _require(
            self.register_.eta in self.evaluate.etas,
            "register.eta",
            str(self.register_.eta),
            f"one of evaluate.etas {self.evaluate.etas}: the gate compares at a setting of the sweep",
        )
        return self


class _Conflict(ValueError):
    """A setting that is wrong beside another one."""


def _require(condition: bool, key: str, given: str, allowed: str) -> None:
    if not condition:
        raise _Conflict(f"{key}: given {given}, allowed {allowed}")


def load_params(path: Path = PARAMS_PATH) -> Params:
    """Read and check params.yaml. Raises ValueError with one line that names what is wrong."""
    return parse_params(read_yaml(path), str(path))


def parse_params(tree: Any, origin: str = "params.yaml") -> Params:
    """Check a tree of plain values against the schema."""
    if not isinstance(tree, dict):
        raise ValueError(f"{origin}: must hold sections ({', '.join(_field_names(Params))}), not {_shown(tree)}")
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(item) for item in error.errors()))
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ValueError(f"{origin}: {'; '.join(lines[:3])}{more}") from None


def read_yaml(path: Path) -> Any:
    """Plain values from a YAML 1.2 file (so 1e-3 is a number). Raises ValueError naming the file and the line."""
    try:
        with open(path, encoding="utf-8") as file:
            return YAML(typ="safe", pure=True).load(file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error.reason}") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{path}: line {line} is not valid YAML: {error.problem}") from None
    except YAMLError as error:
        raise ValueError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None


def _explain(error: Any) -> str:
    if isinstance(error.get("ctx", {}).get("error"), _Conflict):
        return str(error["ctx"]["error"])
    location = tuple(part for part in error["loc"] if not _is_union_branch(part))
    key, kind, context = _dotted(location), error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{key}: is missing, allowed {_allowed_of(location)}"
    if kind == "extra_forbidden":
        names = _field_names(_section_at(location[:-1]))
        close = difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{key}: unknown key, given {_shown(error['input'])}, allowed {', '.join(names)}{hint}"
    phrases = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "above {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "below {lt}",
        "literal_error": "{expected}",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a string",
        "list_type": "a list",
        "finite_number": "a finite number",
        "too_short": "at least {min_length} entries",
        "too_long": "at most {max_length} entries",
        "string_too_short": "a string that is not empty",
        "model_type": "a section of keys",
        "model_attributes_type": "a section of keys",
        "dict_type": "a section of keys",
    }
    allowed = phrases[kind].format(**context) if kind in phrases else error["msg"]
    if kind == "string_pattern_mismatch":
        allowed = PATTERNS[context["pattern"]]
    if "sigma_hat" in allowed or (location and location[-1] == "eta") or (len(location) > 1 and location[1] == "etas"):
        allowed = "a number from 0 to 1, or sigma_hat"
    return f"{key}: given {_shown(error['input'])}, allowed {allowed}"


def _is_union_branch(part: Any) -> bool:
    return isinstance(part, str) and (
        part.startswith(("constrained-", "literal[", "function-")) or part in ("int", "float")
    )


def _dotted(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the file"


def _section_at(location: tuple[Any, ...]) -> type[BaseModel]:
    """The innermost section on the way to ``location``."""
    model: type[BaseModel] = Params
    for part in location:
        for name, field in model.model_fields.items():
            annotation = field.annotation
            if part in (name, field.alias) and isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
                break
    return model


def _allowed_of(location: tuple[Any, ...]) -> str:
    section = _section_at(location)
    if section is not _section_at(location[:-1]):
        return f"a section with {', '.join(_field_names(section))}"
    return "a value: it has no default"


def _field_names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
