"""Conversion between a `UNet` and the weights of diffusers' ``UNet2DModel``, as plain dictionaries: diffusers is not needed.

It covers unconditional and class-conditional networks of convolutions, residual blocks and self-attention, such as
``google/ddpm-cifar10-32`` (35.7 M parameters). Other networks are refused; the error names the setting that a `UNet` lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.unet import UNet
from diffusion_core.storage import atomic_folder, read_json, write_json

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

_DEFAULTS: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
"""Values of the settings that config.json omits."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel", "UNetUnconditionalModel"),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
"""The values of a setting that a `UNet` supports."""

_BLOCKS: dict[tuple[str, str], tuple[bool, str | None]] = {
    ("DownBlock2D", "UpBlock2D"): (False, "conv"),
    ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"): (False, "resnet"),
    ("AttnDownBlock2D", "AttnUpBlock2D"): (True, None),
}
"""Block types of a level: whether it has attention, and its resampling (None: the value of downsample_type and upsample_type)."""


def config_from_diffusers(
    config: Mapping[str, Any], *, image_size: int | None = None, last_class_is_null: bool = False
) -> dict[str, Any]:
    """Return the `build_network` config of the `UNet` that computes the same as ``UNet2DModel(**config)``.

    ``image_size`` replaces a missing ``sample_size``. ``last_class_is_null``: the last class embedding was trained on images
    without a class, and becomes the null condition.

    Raises ValueError, naming the setting, if a `UNet` does not support it.
    """
    given = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    for name, allowed in _ONLY.items():
        if given[name] not in allowed:
            raise ValueError(f"diffusers' {name}={given[name]!r} is not supported: allowed is {_listed(allowed)}")
    size = given["sample_size"] or image_size
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise ValueError(f"the images must be square and their size known, got sample_size={size!r}: pass image_size")
    widths = list(given["block_out_channels"])
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels={widths} is not supported: each must be a multiple of the first")
    if given["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise ValueError(
            f"time_embedding_dim={given['time_embedding_dim']} is not supported: allowed is 4 x {widths[0]}"
        )
    if given["in_channels"] * 2 != given["out_channels"] and given["in_channels"] != given["out_channels"]:
        raise ValueError(
            f"in_channels={given['in_channels']} and out_channels={given['out_channels']} are not supported: "
            "out_channels must be in_channels, or twice as many (learned variance)"
        )
    scale_shift = given["resnet_time_scale_shift"] == "scale_shift"
    if given["attn_norm_num_groups"] not in (None, given["norm_num_groups"]):
        raise ValueError(
            f"attn_norm_num_groups={given['attn_norm_num_groups']} is not supported: it must equal norm_num_groups"
        )
    if last_class_is_null and given["num_class_embeds"] is None:
        raise ValueError("last_class_is_null needs num_class_embeds, which this config does not have: omit it")
    if not len(widths) == len(given["down_block_types"]) == len(given["up_block_types"]):
        raise ValueError(
            f"block_out_channels, down_block_types and up_block_types have {len(widths)}, {len(given['down_block_types'])} "
            f"and {len(given['up_block_types'])} levels: they must have the same number"
        )
    attention_sizes, resamplings = [], []
    for level, (down, up) in enumerate(zip(given["down_block_types"], reversed(given["up_block_types"]), strict=True)):
        down, up = down.removeprefix("UNetRes"), up.removeprefix("UNetRes")  # the prefix of its first releases
        if (down, up) not in _BLOCKS:
            raise ValueError(
                f"blocks {down} and {up} of level {level} are not supported: "
                f"allowed are the pairs {', '.join(' and '.join(pair) for pair in _BLOCKS)}"
            )
        attends, ways = _BLOCKS[down, up]
        if attends:
            attention_sizes.append(size // 2**level)
        if level < len(widths) - 1:
            resamplings.append(ways or given["downsample_type"])
        if level > 0:
            resamplings.append(ways or given["upsample_type"])
    if len(set(resamplings)) > 1:
        raise ValueError(
            "this network resamples by convolution at some levels and by a residual block at others: all must be the same"
        )
    resampling = "residual" if "resnet" in resamplings else "conv"
    num_classes = given["num_class_embeds"]
    condition = ConditionSpec()
    if num_classes is not None:
        condition = ConditionSpec("class", num_classes - 1 if last_class_is_null else num_classes)
    return {
        "name": "unet",
        "condition": condition.as_dict(),
        "image_size": size,
        "image_channels": given["in_channels"],
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": given["layers_per_block"],
        "attention_sizes": attention_sizes,
        "head_dim": given["attention_head_dim"],
        "groups": given["norm_num_groups"],
        "dropout": given["dropout"],
        "scale_shift": scale_shift,
        "resampling": resampling,
        "learned_variance": given["out_channels"] == 2 * given["in_channels"],
        "middle_attention": bool(given["add_attention"]),
        "middle_attention_norm": not scale_shift or given["attn_norm_num_groups"] is not None,
        "norm_eps": given["norm_eps"],
        "cos_first": bool(given["flip_sin_to_cos"]),
        "frequency_shift": given["freq_shift"],
        "asymmetric_downsampling": given["downsample_padding"] == 0 and resampling == "conv",
    }


def unet_from_diffusers(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    image_size: int | None = None,
    last_class_is_null: bool = False,
) -> UNet:
    """Return the `UNet` that computes the same as ``UNet2DModel(**config)`` with these weights; see `config_from_diffusers`.

    Without ``last_class_is_null``, the other network has no null condition; here it adds zero to the time embedding.
    Raises ValueError if a setting is not supported, or weights are missing, unknown or of another shape.
    """
    options = config_from_diffusers(config, image_size=image_size, last_class_is_null=last_class_is_null)
    options.pop("name")
    network = UNet(condition=ConditionSpec(**options.pop("condition")), **options)
    remaining = {_current_name(name): value for name, value in weights.items()}
    state: dict[str, Tensor] = {}
    for ours, theirs in _pairs(network):
        absent = [name for name in theirs if name not in remaining]
        if absent:
            raise ValueError(f"the diffusers weights lack {', '.join(absent)}: they do not belong to this config")
        parts = [remaining.pop(name) for name in theirs]
        if ".attentions." in theirs[0]:  # early releases saved a 1x1 convolution
            parts = [part.flatten(1) if part.ndim == 4 and part.shape[2:] == (1, 1) else part for part in parts]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(
                f"the diffusers weights {', '.join(theirs)} have shapes {', '.join(str(list(part.shape)) for part in parts)}: they must be equal"
            )
        state[ours] = torch.cat(parts)
    if remaining:
        raise ValueError(
            f"the diffusers weights hold {', '.join(sorted(remaining)[:4])}, which this config does not have"
        )
    table = "condition_embedding.table.weight"
    if table in state and not last_class_is_null:
        state[table] = torch.cat([state[table], torch.zeros_like(state[table][:1])])
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"the diffusers weights do not fit the config: {str(error).splitlines()[-1].strip()}"
        ) from None
    return network


def unet_to_diffusers(network: UNet, *, null_class: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, weights) of the ``UNet2DModel`` that computes the same as ``network``.

    A class condition of N classes becomes ``num_class_embeds`` N + 1; the last is the null. ``null_class=False`` omits it, so
    that a network read without a null is written back unchanged.
    Raises ValueError, naming the option, if a UNet2DModel does not support it.
    """
    options = network.config
    kind = network.condition.kind
    if kind not in ("none", "class"):
        raise ValueError(f"a UNet2DModel takes no condition of kind {kind!r}: allowed are 'class' and 'none'")
    if options["self_conditioning"]:
        raise ValueError("a UNet2DModel has no self_conditioning")
    sizes = [options["image_size"] // 2**level for level in range(len(options["multipliers"]))]
    attends = [size in options["attention_sizes"] for size in sizes]
    if options["resampling"] == "pool":
        raise ValueError("a UNet2DModel has no resampling 'pool': allowed are 'conv' and 'residual'")
    widths = [options["channels"] * multiplier for multiplier in options["multipliers"]]
    if any(width % options["groups"] for width in widths):
        raise ValueError(f"a UNet2DModel needs widths {widths} that are multiples of groups={options['groups']}")
    if not options["scale_shift"] and not options["middle_attention_norm"]:
        raise ValueError("a UNet2DModel without scale_shift always normalises before its middle attention")
    resample_type = "resnet" if options["resampling"] == "residual" else "conv"
    plain = next(pair for pair, (_, way) in _BLOCKS.items() if way == resample_type)
    config = {
        **_DEFAULTS,
        "sample_size": options["image_size"],
        "in_channels": options["image_channels"],
        "out_channels": (2 if options["learned_variance"] else 1) * options["image_channels"],
        "freq_shift": options["frequency_shift"],
        "flip_sin_to_cos": options["cos_first"],
        "down_block_types": ["AttnDownBlock2D" if attend else plain[0] for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else plain[1] for attend in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": options["num_res_blocks"],
        "downsample_padding": 0 if options["asymmetric_downsampling"] else 1,
        "downsample_type": resample_type,
        "upsample_type": resample_type,
        "dropout": options["dropout"],
        "attention_head_dim": options["head_dim"],
        "norm_num_groups": options["groups"],
        "attn_norm_num_groups": options["groups"] if options["middle_attention_norm"] else None,
        "norm_eps": options["norm_eps"],
        "resnet_time_scale_shift": "scale_shift" if options["scale_shift"] else "default",
        "add_attention": options["middle_attention"],
        "num_class_embeds": network.condition.size + null_class if kind == "class" else None,
    }
    state = network.state_dict()
    if kind == "class" and not null_class:
        state["condition_embedding.table.weight"] = state["condition_embedding.table.weight"][:-1]
    weights: dict[str, Tensor] = {}
    for ours, theirs in _pairs(network):
        for name, part in zip(theirs, state[ours].detach().cpu().chunk(len(theirs)), strict=True):
            weights[name] = part.clone().contiguous()
    return config, weights


def read_diffusers_folder(folder: Path, *, variant: str | None = None, **options: Any) -> UNet:
    """Read a folder with config.json and diffusion_pytorch_model.safetensors; ``options`` as in `unet_from_diffusers`.

    ``variant``: the weights of this name, such as ``fp16`` for diffusion_pytorch_model.fp16.safetensors; the network is float32
    anyway. Weights in several files are read by their index.json, which diffusers also prefers if there is one file, too.
    `diffusers_folder` reads the folder of a whole pipeline. Raises ValueError if a file is missing or damaged, and as
    `unet_from_diffusers` does.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} does not hold the settings of a network")
    return unet_from_diffusers(config, _read_weights(folder, variant), **options)


def _read_weights(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """Return the weights of the files that an index names, or of one file. Raises ValueError if they are missing or damaged."""
    if variant is not None and (not isinstance(variant, str) or not re.fullmatch(r"[\w-]+", variant)):
        raise ValueError(f"a variant is a name such as 'fp16', got {variant!r}")
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    middle = "" if variant is None else f".{variant}"
    whole = folder / f"{stem}{middle}.safetensors"
    # the second is the name that older releases gave to the index of a variant
    indices = [folder / f"{WEIGHTS_FILE}.index{middle}.json", folder / f"{WEIGHTS_FILE}{middle}.index.json"]
    index = next((path for path in indices if path.exists()), None)
    if index is None:
        if not whole.exists():
            raise ValueError(_missing_weights(folder, whole))
        return _load(whole)
    described = read_json(index)
    places = described.get("weight_map") if isinstance(described, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map from weights to files")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file in this folder")
        part = _load(folder / name)
        if twice := part.keys() & weights.keys():
            raise ValueError(f"{folder / name} holds {sorted(twice)[0]}, which another file holds too")
        weights |= part
    if lacking := sorted(places.keys() - weights.keys()):
        raise ValueError(f"the files of {index} lack {', '.join(lacking[:4])}: one of them is incomplete")
    return weights


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def _missing_weights(folder: Path, path: Path) -> str:
    """Return the message for a folder without these weights: name the other variants, or the pickle."""
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    names = {found.name for found in folder.glob(f"{stem}*")}
    patterns = (
        r"\.([\w-]+)\.safetensors",
        r"\.safetensors\.index\.([\w-]+)\.json",
        r"\.safetensors\.([\w-]+)\.index\.json",
    )
    found = {match[1] for name in names for p in patterns if (match := re.fullmatch(stem + p, name))}
    found = {name for name in found if not re.search(r"-\d{5}-of-\d{5}$", name)}  # one of the files of an index
    plain = bool(names & {WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json"})
    if found or plain:
        choices = ["no variant"] * plain + [f"variant={name!r}" for name in sorted(found)]
        return f"{folder} has no {path.name}; it has weights for {', '.join(choices)}"
    if pickles := sorted(name for name in names if ".bin" in name):
        return f"{folder / pickles[0]} is a pickle, which is not read: save the model with safe_serialization=True"
    return f"cannot read {path}: it does not exist"


def write_diffusers_folder(network: UNet, folder: Path, *, null_class: bool = True) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors, which ``UNet2DModel.from_pretrained(folder)`` reads.

    ``null_class`` and the errors: see `unet_to_diffusers`.
    """
    config, weights = unet_to_diffusers(network, null_class=null_class)
    with atomic_folder(Path(folder)) as temporary:
        write_json(temporary / "config.json", config)
        save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})


def _pairs(network: UNet) -> Iterator[tuple[str, list[str]]]:
    """Yield (our parameter, their parameters that concatenate to it) for each parameter of the network."""
    options = network.config
    levels, per_level = len(options["multipliers"]), options["num_res_blocks"]
    modules = [
        ("conv_in", "conv_in"),
        ("time_mlp.0", "time_embedding.linear_1"),
        ("time_mlp.2", "time_embedding.linear_2"),
    ]
    down = up = 0
    for level in range(levels):
        for block in range(per_level):
            modules += _stage(f"down.{down}", f"down_blocks.{level}", block)
            down += 1
        if level < levels - 1:
            modules += _resampler(f"down.{down}.0", f"down_blocks.{level}.downsamplers.0")
            down += 1
    modules += _residual("middle.0", "mid_block.resnets.0") + _residual("middle.2", "mid_block.resnets.1")
    modules += _attention("middle.1", "mid_block.attentions.0")
    for level in range(levels):
        for block in range(per_level + 1):
            modules += _stage(f"up.{up}", f"up_blocks.{level}", block)
            up += 1
        if level < levels - 1:
            modules += _resampler(f"up.{up}.0", f"up_blocks.{level}.upsamplers.0")
            up += 1
    modules += [
        ("norm_out", "conv_norm_out"),
        ("conv_out", "conv_out"),
        ("condition_embedding.table", "class_embedding"),
    ]
    ours_to_theirs: dict[str, list[str]] = {}
    for ours, theirs in modules:
        ours_to_theirs.setdefault(ours, []).append(theirs)
    for name in network.state_dict():
        module, parameter = name.rsplit(".", 1)
        yield name, [f"{theirs}.{parameter}" for theirs in ours_to_theirs[module]]


def _stage(ours: str, theirs: str, block: int) -> list[tuple[str, str]]:
    return _residual(f"{ours}.0", f"{theirs}.resnets.{block}") + _attention(f"{ours}.1", f"{theirs}.attentions.{block}")


def _residual(ours: str, theirs: str) -> list[tuple[str, str]]:
    names = {"embedding": "time_emb_proj", "shortcut": "conv_shortcut"}
    parts = ("norm1", "conv1", "embedding", "norm2", "conv2", "shortcut")
    return [(f"{ours}.{part}", f"{theirs}.{names.get(part, part)}") for part in parts]


def _attention(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [
        (f"{ours}.norm", f"{theirs}.group_norm"),
        *((f"{ours}.qkv", f"{theirs}.{part}") for part in ("to_q", "to_k", "to_v")),
        (f"{ours}.project", f"{theirs}.to_out.0"),
    ]


def _resampler(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(f"{ours}.conv", f"{theirs}.conv"), *_residual(ours, theirs)]


def _current_name(name: str) -> str:
    """Return a weight's name in current diffusers; early releases named the parts of attention differently."""
    if ".attentions." in name:
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            name = name.replace(f".{old}.", f".{new}.")
    return name.replace(".downsamplers.0.Conv2d_0.", ".downsamplers.0.conv.")


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)
