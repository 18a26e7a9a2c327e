import pytest
import torch

from diffusion_core.networks import build_network
from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.unet import UNet

SPECS = {
    "none": ConditionSpec(),
    "class": ConditionSpec("class", 4),
    "classes": ConditionSpec("classes", sizes=(4, 3)),
    "multi_hot": ConditionSpec("multi_hot", 5),
    "vector": ConditionSpec("vector", 6),
    "tokens": ConditionSpec("tokens", 6, length=5),
}
CONDITIONS = {
    "none": (None, None),
    "class": (torch.tensor([1, 3, 0]), torch.tensor([2, 3, 0])),
    "classes": (torch.tensor([[1, 0], [0, 0], [3, 2]]), torch.tensor([[1, 1], [0, 0], [3, 2]])),
    "multi_hot": (torch.eye(5)[:3], torch.eye(5)[[4, 1, 2]]),
    "vector": (torch.arange(18.0).view(3, 6), torch.arange(18.0).view(3, 6) + torch.eye(3, 1)),
    "tokens": (
        torch.arange(90.0).view(3, 5, 6).sin(),
        torch.arange(90.0).view(3, 5, 6).sin() + torch.eye(3, 1)[..., None],
    ),
}


def small(kind="none", **options):
    """Build a UNet with random values in its zero-initialised layers, so that every parameter affects the output."""
    torch.manual_seed(0)
    settings = {"image_size": 8, "image_channels": 3, "channels": 16, "multipliers": (1, 2), "num_res_blocks": 1}
    network = UNet(condition=SPECS[kind], **{**settings, "attention_sizes": (4,), "groups": 8, **options}).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def batch(size=8, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, channels, size, size, generator=generator), torch.tensor([0, 500, 999])


OPTIONS = [
    {},
    {"scale_shift": False},
    {"resampling": "pool"},
    {"resampling": "residual"},
    {"learned_variance": True},
    {"head_dim": 8},
    {"middle_attention": False},
    {"multipliers": (1, 2, 3), "attention_sizes": (8, 2)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["class", "tokens"])
def test_every_parameter_takes_part_and_the_output_has_the_right_shape(kind, options):
    network = small(kind, **options)
    x, t = batch()
    condition = CONDITIONS[kind][0].clone()
    condition = SPECS[kind].drop(condition, torch.tensor([False, False, True]))
    output = network(x, t, condition)
    assert output.shape == (3, 6 if options.get("learned_variance") else 3, 8, 8)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    attends = options.get("middle_attention", True) or options.get("attention_sizes", (4,))
    assert attends and without == []


@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_each_image_depends_on_its_own_input_time_and_condition_alone(kind):
    network = small(kind)
    x, t = batch()
    condition, other = CONDITIONS[kind]
    whole = network(x, t, condition)
    for row in range(3):
        alone = network(x[row : row + 1], t[row : row + 1], None if condition is None else condition[row : row + 1])
        torch.testing.assert_close(alone, whole[row : row + 1], atol=1e-5, rtol=1e-5)
    if condition is not None:  # only the first row's condition differs
        changed = network(x, t, other)
        assert (changed[0] - whole[0]).abs().max() > 1e-4
        torch.testing.assert_close(changed[1:], whole[1:], atol=1e-6, rtol=0)
    later = network(x, torch.tensor([10, 500, 999]), condition)
    assert (later[0] - whole[0]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [kind for kind in SPECS if kind != "none"])
@torch.no_grad()
def test_omitted_condition_is_the_null_condition(kind):
    network = small(kind)
    x, t = batch()
    null = SPECS[kind].null(3)
    assert torch.equal(network(x, t), network(x, t, null))
    assert (network(x, t) - network(x, t, CONDITIONS[kind][0])).abs().max() > 1e-4


@torch.no_grad()
def test_padding_tokens_change_nothing():
    network = small("tokens")
    x, t = batch()
    condition = CONDITIONS["tokens"][0].clone()
    condition[:, 2:] = float("nan")
    shorter = UNet(condition=ConditionSpec("tokens", 6, length=2), **{**network.config, "attention_sizes": (4,)}).eval()
    shorter.load_state_dict(network.state_dict())
    torch.testing.assert_close(network(x, t, condition), shorter(x, t, condition[:, :2]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_omitted_self_condition_is_zeros_and_a_given_one_matters():
    network = small(self_conditioning=True)
    x, t = batch()
    assert torch.equal(network(x, t), network(x, t, None, self_condition=torch.zeros_like(x)))
    assert (network(x, t, None, self_condition=x) - network(x, t)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="self_conditioning=True"):
        small()(x, t, None, self_condition=x)


@torch.no_grad()
def test_attention_with_several_heads_equals_the_sum_written_out():
    from diffusion_core.networks.blocks import SelfAttention

    torch.manual_seed(0)
    layer = SelfAttention(16, head_dim=4, groups=4)
    torch.nn.init.normal_(layer.project.weight)
    x = torch.randn(2, 16, 3, 5)
    normed = torch.nn.functional.group_norm(x, 4, layer.norm.weight, layer.norm.bias)
    expected = torch.empty_like(x)
    for b in range(2):
        tokens = normed[b].reshape(16, 15).T
        query, key, value = (tokens @ layer.qkv.weight.T + layer.qkv.bias).split(16, dim=1)
        heads = []
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            heads.append(torch.softmax(query[:, part] @ key[:, part].T / 2.0, dim=1) @ value[:, part])
        mixed = torch.cat(heads, dim=1) @ layer.project.weight.T + layer.project.bias
        expected[b] = x[b] + mixed.T.reshape(16, 3, 5)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["class", "tokens"])
@torch.no_grad()
def test_recording_gradients_and_the_memory_format_do_not_change_the_output(kind):
    network = small(kind)
    x, t = batch()
    without = network(x, t, CONDITIONS[kind][0])
    with torch.enable_grad():
        recorded = network(x, t, CONDITIONS[kind][0])
    torch.testing.assert_close(without, recorded, atol=1e-6, rtol=1e-6)
    last = network.to(memory_format=torch.channels_last)(
        x.to(memory_format=torch.channels_last), t, CONDITIONS[kind][0]
    )
    torch.testing.assert_close(last, without, atol=1e-5, rtol=1e-5)


def test_new_network_predicts_zero_and_dropout_acts_in_training_only():
    network = UNet(
        condition=SPECS["none"], image_size=8, image_channels=1, channels=32, multipliers=(1, 2), dropout=0.5
    )
    x, t = batch(channels=1)
    assert not network(x, t).any()
    network = small(dropout=0.5)
    x, t = batch()
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


def test_configuration_of_the_first_release_still_builds_with_the_same_weight_names():
    network = build_network(
        {
            "name": "unet",
            "condition": {"kind": "class", "size": 10},
            "image_size": 8,
            "image_channels": 1,
            "channels": 16,
            "multipliers": [1, 2],
            "num_res_blocks": 1,
            "attention_sizes": [4],
            "head_dim": None,
            "groups": 8,
            "dropout": 0.1,
        }
    )
    names = set(network.state_dict())
    assert len(names) == 129
    assert {
        "down.2.1.qkv.weight",
        "middle.1.project.bias",
        "up.2.0.conv.weight",
        "condition_embedding.table.weight",
    } <= names


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"image_size": 9}, "multiple of 2"),
        ({"resampling": "magic"}, "unknown resampling 'magic'"),
        ({"resampling": "pool", "asymmetric_downsampling": True}, "asymmetric_downsampling"),
        ({"head_dim": 5}, "choose a divisor"),
    ],
)
def test_impossible_options_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        small(**options)


def test_condition_of_the_wrong_shape_or_type_is_refused():
    x, t = batch()
    with pytest.raises(ValueError, match="integers"):
        small("class")(x, t, torch.rand(3))
    with pytest.raises(ValueError, match="shape"):
        small("tokens")(x, t, torch.rand(3, 4, 6))


@pytest.mark.parametrize(
    ("x", "t", "condition", "self_condition", "named"),
    [
        (torch.zeros(3, 1, 8, 8), torch.zeros(3).long(), None, None, "B, 3, H, W"),
        (torch.zeros(3, 8, 8), torch.zeros(3).long(), None, None, "B, 3, H, W"),
        (torch.zeros(3, 3, 9, 9), torch.zeros(3).long(), None, None, "multiples of 2"),
        (torch.zeros(3, 3, 8, 8).double(), torch.zeros(3).long(), None, None, "float64"),
        (torch.zeros(3, 3, 8, 8), torch.zeros(2).long(), None, None, "one step for each of 3"),
        (torch.zeros(3, 3, 8, 8), 5, None, None, "one step for each of 3"),
        (torch.zeros(3, 3, 8, 8), torch.zeros(3).long(), torch.zeros(3).long(), None, "takes no condition"),
        (torch.zeros(3, 3, 8, 8), torch.zeros(3).long(), None, torch.zeros(3, 3, 4, 4), "self_condition has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(x, t, condition, self_condition, named):
    with pytest.raises(ValueError, match=named):
        small(self_conditioning=True)(x, t, condition, self_condition=self_condition)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"multipliers": ()}, "at least one level"),
        ({"channels": 0}, "channels"),
        ({"channels": 15}, "even number of channels"),
        ({"groups": 0}, "groups"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"image_size": 8.0}, "image_size"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        small(**options)


def test_tokens_in_a_network_without_attention_are_refused():
    with pytest.raises(ValueError, match="needs attention"):
        small("tokens", attention_sizes=(), middle_attention=False)
