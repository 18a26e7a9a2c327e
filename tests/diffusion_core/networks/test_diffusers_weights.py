"""Our UNet against diffusers' UNet2DModel with the same random weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.diffusers_weights import (
    config_from_diffusers,
    read_diffusers_folder,
    unet_from_diffusers,
    unet_to_diffusers,
    write_diffusers_folder,
)
from diffusion_core.networks.unet import UNet


def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is in the bench group: uv sync --group bench")


CIFAR10 = {  # google/ddpm-cifar10-32
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
}
SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CASES = {
    "cifar10": CIFAR10,
    "default": SMALL,
    "ddpm": {  # the settings of CIFAR10 in a small network
        **SMALL,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "norm_num_groups": 16,
    },
    "class": {**SMALL, "num_class_embeds": 5},
    "scale_shift": {**SMALL, "resnet_time_scale_shift": "scale_shift"},
    "scale_shift_mid_norm": {**SMALL, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "adm": {
        **SMALL,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "out_channels": 6,
    },
    "no_middle_attention": {
        **SMALL,
        "add_attention": False,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 2,
    },
}


def random_model(config):
    torch.manual_seed(0)
    return diffusers().UNet2DModel(**config).eval()


def unet_from_config(config):
    """Return our network with random weights for a diffusers config: needs no diffusers."""
    torch.manual_seed(0)
    options = config_from_diffusers(config)
    options.pop("name")
    network = UNet(condition=ConditionSpec(**options.pop("condition")), **options).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def inputs(config, batch=2):
    generator = torch.Generator().manual_seed(1)
    size, channels = config["sample_size"], config.get("in_channels", 3)
    x = torch.randn(batch, channels, size, size, generator=generator)
    labels = torch.arange(batch) if "num_class_embeds" in config else None
    return x, torch.linspace(0, 999, batch).long(), labels


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_network_read_from_diffusers_gives_the_same_output(case):
    theirs = random_model(CASES[case])
    x, t, labels = inputs(CASES[case])
    ours = unet_from_diffusers(dict(theirs.config), theirs.state_dict()).eval()
    expected = theirs(x, t, labels).sample
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours(x, t, labels), expected, atol=1e-5, rtol=0)
    if case == "cifar10":
        assert sum(p.numel() for p in ours.parameters()) == 35_746_307


@pytest.mark.parametrize("case", [case for case in CASES if case != "cifar10"])
@torch.no_grad()
def test_network_written_to_diffusers_folder_is_loaded_by_diffusers_and_read_back(case, tmp_path):
    source = random_model(CASES[case])
    ours = unet_from_diffusers(dict(source.config), source.state_dict()).eval()
    x, t, labels = inputs(CASES[case])
    write_diffusers_folder(ours, tmp_path / "model")
    theirs = diffusers().UNet2DModel.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(theirs(x, t, labels).sample, ours(x, t, labels), atol=1e-5, rtol=0)
    again = read_diffusers_folder(tmp_path / "model", last_class_is_null=labels is not None)
    assert again.config == ours.config and again.condition == ours.condition
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@torch.no_grad()
def test_null_class_is_the_last_embedding_of_diffusers():
    condition = ConditionSpec("class", 4)
    torch.manual_seed(0)
    ours = UNet(
        condition=condition, image_size=8, image_channels=1, channels=32, multipliers=(1, 2), num_res_blocks=1
    ).eval()
    for parameter in ours.parameters():
        parameter.normal_(0, 0.05)
    config, weights = unet_to_diffusers(ours)
    theirs = diffusers().UNet2DModel(**{k: v for k, v in config.items() if k != "_class_name"}).eval()
    theirs.load_state_dict(weights)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 500])
    torch.testing.assert_close(theirs(x, t, torch.tensor([4, 4])).sample, ours(x, t, None), atol=1e-5, rtol=0)


@torch.no_grad()
def test_class_network_without_a_null_is_written_back_unchanged(tmp_path):
    source = random_model(CASES["class"])
    ours = unet_from_diffusers(dict(source.config), source.state_dict())
    config, weights = unet_to_diffusers(ours, null_class=False)
    assert config["num_class_embeds"] == 5
    assert weights.keys() == source.state_dict().keys()
    for name, value in source.state_dict().items():
        assert torch.equal(weights[name], value), name
    write_diffusers_folder(ours, tmp_path / "model", null_class=False)
    assert diffusers().UNet2DModel.from_pretrained(tmp_path / "model").config.num_class_embeds == 5


def test_weights_named_by_the_first_diffusers_releases_are_read():
    source = random_model(SMALL)
    old = {}
    for name, value in source.state_dict().items():
        for new, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{former}.")
        old[name] = value
    ours, same = (unet_from_diffusers(dict(source.config), weights) for weights in (old, source.state_dict()))
    for name, value in same.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"block_out_channels": (32, 48)}, "block_out_channels"),
        ({"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")}, "SkipDownBlock2D"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"sample_size": None}, "image_size"),
        ({"out_channels": 5}, "out_channels"),
        ({"sample_size": (16, 32)}, "square"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
    ],
)
def test_unsupported_diffusers_setting_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        config_from_diffusers({**SMALL, **change})


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    config, weights = unet_to_diffusers(unet_from_config(SMALL))
    missing = {k: v for k, v in weights.items() if k != "mid_block.attentions.0.to_k.weight"}
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0\.to_k\.weight"):
        unet_from_diffusers(config, missing)
    with pytest.raises(ValueError, match="extra"):
        unet_from_diffusers(config, {**weights, "extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="conv_in"):
        unet_from_diffusers(config, {**weights, "conv_in.weight": torch.zeros(32, 4, 3, 3)})
    transposed = weights["down_blocks.1.resnets.0.conv1.weight"].transpose(0, 1)
    with pytest.raises(ValueError, match="conv1"):
        unet_from_diffusers(config, {**weights, "down_blocks.1.resnets.0.conv1.weight": transposed})
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0\.to_k"):
        unet_from_diffusers(config, {**weights, "mid_block.attentions.0.to_k.weight": torch.zeros(64, 32)})
    (tmp_path / "config.json").write_text(json.dumps({**SMALL}))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="safe_serialization"):
        read_diffusers_folder(tmp_path)


@pytest.mark.parametrize("options", [{"resampling": "pool"}, {"self_conditioning": True}, {"groups": 24}])
def test_network_that_diffusers_does_not_support_is_refused(options):
    network = UNet(
        condition=ConditionSpec(), image_size=8, image_channels=1, channels=32, multipliers=(1, 2), **options
    )
    with pytest.raises(ValueError, match="UNet2DModel"):
        unet_to_diffusers(network)


TINY = {**SMALL, "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
STEM = "diffusion_pytorch_model"
SHARDED = {  # the names that diffusers gives to the files and to their index, now and in older releases
    "plain": (None, f"{STEM}-{{}}.safetensors", f"{STEM}.safetensors.index.json"),
    "fp16": ("fp16", f"{STEM}.fp16-{{}}.safetensors", f"{STEM}.safetensors.index.fp16.json"),
    "old fp16": ("fp16", f"{STEM}-{{}}.fp16.safetensors", f"{STEM}.safetensors.fp16.index.json"),
    "name with hyphens": ("non-ema", f"{STEM}.non-ema-{{}}.safetensors", f"{STEM}.safetensors.index.non-ema.json"),
}


@pytest.fixture
def written(tmp_path):
    """A network and the folder that holds only its config.json; its weights, to be written by the test."""
    network = unet_from_config(TINY)
    config, weights = unet_to_diffusers(network)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return network, weights, tmp_path


def write_shards(folder, weights, names, index_name):
    """Write the weights in three files and their index."""
    keys = sorted(weights)
    parts = {names.format(f"{i + 1:05}-of-00003"): keys[i::3] for i in range(3)}
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, folder / name)
    places = {key: name for name, part in parts.items() for key in part}
    (folder / index_name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return list(parts)


def assert_same(network, other, dtype=torch.float32):
    for name, value in network.state_dict().items():
        assert other.state_dict()[name].dtype == torch.float32
        assert torch.equal(other.state_dict()[name], value.to(dtype).float()), name


@pytest.mark.parametrize("layout", SHARDED)
def test_weights_in_several_files_are_read_by_their_index(written, layout):
    network, weights, folder = written
    variant, names, index_name = SHARDED[layout]
    dtype = torch.float32 if variant is None else torch.float16
    write_shards(folder, {name: value.to(dtype) for name, value in weights.items()}, names, index_name)
    assert_same(network, read_diffusers_folder(folder, variant=variant), dtype)
    other = "fp16" if variant is None else None
    found = "no variant" if variant is None else f"variant='{variant}'"
    with pytest.raises(ValueError, match=f"it has weights for {found}$"):
        read_diffusers_folder(folder, variant=other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_variant_is_read_into_a_float32_network_and_others_are_named(written, dtype):
    network, weights, folder = written
    save_file({name: value.to(dtype) for name, value in weights.items()}, folder / f"{STEM}.fp16.safetensors")
    read = read_diffusers_folder(folder, variant="fp16")
    assert_same(network, read, dtype)
    x, t, _ = inputs(TINY)
    with torch.no_grad():
        torch.testing.assert_close(read(x, t), network(x, t), atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match=r"no diffusion_pytorch_model\.safetensors; it has weights for variant='fp16'"):
        read_diffusers_folder(folder)
    save_file(weights, folder / f"{STEM}.safetensors")
    assert_same(network, read_diffusers_folder(folder))
    with pytest.raises(ValueError, match="it has weights for no variant, variant='fp16'"):
        read_diffusers_folder(folder, variant="ema")
    for variant in ("", "../fp16", "fp16.index", 16):
        with pytest.raises(ValueError, match="a variant is a name such as"):
            read_diffusers_folder(folder, variant=variant)


def test_index_is_preferred_to_a_single_file_as_in_diffusers(written):
    network, weights, folder = written
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, folder / f"{STEM}.safetensors")
    write_shards(folder, weights, *SHARDED["plain"][1:])
    assert_same(network, read_diffusers_folder(folder))


def test_damaged_index_or_file_is_refused_by_name(written):
    _, weights, folder = written
    with pytest.raises(ValueError, match="it does not exist"):
        read_diffusers_folder(folder)
    first, second, third = write_shards(folder, weights, *SHARDED["plain"][1:])
    index = folder / SHARDED["plain"][2]
    described = json.loads(index.read_text())
    some = next(key for key, name in described["weight_map"].items() if name == second)
    content = load_file(folder / second)
    save_file({key: value for key, value in content.items() if key != some}, folder / second)
    with pytest.raises(ValueError, match=f"lack {some}"):
        read_diffusers_folder(folder)
    other = next(key for key, name in described["weight_map"].items() if name == first)
    save_file({**content, other: weights[other]}, folder / second)
    with pytest.raises(ValueError, match=f"holds {other}, which another file holds too"):
        read_diffusers_folder(folder)
    (folder / second).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"cannot read .*{second}"):
        read_diffusers_folder(folder)
    (folder / third).unlink()
    (folder / second).unlink()
    with pytest.raises(ValueError, match=f"cannot read .*{second}"):
        read_diffusers_folder(folder)
    for broken in ({}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": [1]}, []):
        index.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="has no weight_map"):
            read_diffusers_folder(folder)
    index.write_text(json.dumps({"weight_map": {some: "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="which is not a file in this folder"):
        read_diffusers_folder(folder)


def test_pickles_are_not_read_and_their_name_is_stated(written):
    _, _, folder = written
    (folder / f"{STEM}.fp16.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"fp16\.bin is a pickle.*safe_serialization=True"):
        read_diffusers_folder(folder, variant="fp16")


def test_config_of_another_network_is_refused_by_its_class(written):
    _, weights, folder = written
    save_file(weights, folder / f"{STEM}.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="_class_name='UNet2DConditionModel' is not supported"):
        read_diffusers_folder(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", [None, "40KB"])
@torch.no_grad()
def test_folder_that_diffusers_writes_in_any_layout_gives_the_output_of_diffusers(tmp_path, variant, shard):
    theirs = random_model(TINY)
    theirs.save_pretrained(tmp_path, variant=variant, **({} if shard is None else {"max_shard_size": shard}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard is not None)
    x, t, _ = inputs(TINY)
    torch.testing.assert_close(
        read_diffusers_folder(tmp_path, variant=variant).eval()(x, t), theirs(x, t).sample, atol=1e-5, rtol=0
    )
