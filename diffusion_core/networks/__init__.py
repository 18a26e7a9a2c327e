"""Networks: ``network(x_t, t, condition, self_condition=None) -> tensor``.

Everything that a network is told about an image besides x_t and t, such as augmentation labels, is part of its condition;
there is no further argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.context_unet import ContextUNet
from diffusion_core.networks.unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet, "context_unet": ContextUNet}


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """Build the network that ``config`` describes: ``name``, ``condition`` (a ConditionSpec as a mapping) and its options.

    Raises ValueError if the name or an option is unknown.
    """
    options = dict(config)
    name = options.pop("name", None)
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    try:
        condition = ConditionSpec(**options.pop("condition", {"kind": "none"}))
        return NETWORKS[name](condition=condition, **options)
    except TypeError as error:
        raise ValueError(f"network {name!r} does not take these options: {error}") from None
