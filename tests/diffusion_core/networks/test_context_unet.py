import pytest
import torch

from diffusion_core.networks.conditioning import ConditionSpec
from diffusion_core.networks.context_unet import ContextUNet

SPECS = {
    "none": (ConditionSpec(), None),
    "class": (ConditionSpec("class", 4), torch.tensor([1, 3])),
    "classes": (ConditionSpec("classes", sizes=(4, 3)), torch.tensor([[1, 2], [3, 0]])),
    "multi_hot": (ConditionSpec("multi_hot", 5), torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 1]])),
    "vector": (ConditionSpec("vector", 3), torch.tensor([[0.1, -7.0, 2.0], [0.0, 0.0, 1.0]])),
}


def build(kind="class", size=8, **options):
    torch.manual_seed(0)
    return ContextUNet(
        condition=SPECS[kind][0], image_size=size, image_channels=2, channels=8, groups=4, **options
    ).eval()


@pytest.mark.parametrize("size", range(2, 32, 2))
def test_any_even_size_works_and_every_parameter_takes_part(size):
    network = build(size=size)
    x = torch.randn(2, 2, size, size)
    output = network(x, torch.tensor([3, 700]), torch.tensor([1, 4]))
    assert output.shape == x.shape and torch.isfinite(output).all()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_each_image_depends_on_itself_only_for_any_batch(kind):
    network, condition = build(kind).train(), SPECS[kind][1]  # BatchNorm would mix the batch in training mode
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3, 700])
    whole = network(x, t, condition)
    for row in range(2):
        part = slice(row, row + 1)
        alone = network(x[part], t[part], None if condition is None else condition[part])
        torch.testing.assert_close(alone, whole[part], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in SPECS if kind != "none"])
@torch.no_grad()
def test_context_multiplies_and_its_null_changes_nothing(kind):
    network, (spec, condition) = build(kind), SPECS[kind]
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3, 700])
    assert torch.equal(network(x, t), network(x, t, spec.null(2)))
    assert (network(x, t, condition) - network(x, t)).abs().max() > 1e-4
    if kind in ("multi_hot", "vector"):
        plain = ContextUNet(condition=ConditionSpec(), image_size=8, image_channels=2, channels=8, groups=4).eval()
        plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("context")})
        torch.testing.assert_close(network(x, t), plain(x, t))  # a new null multiplies by 1


def test_odd_sizes_tokens_and_unexpected_self_conditions_are_refused():
    with pytest.raises(ValueError, match="even image_size"):
        build(size=7)
    with pytest.raises(ValueError, match="tokens"):
        ContextUNet(condition=ConditionSpec("tokens", 3, length=2), image_size=8, image_channels=1)
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3, 700])
    with pytest.raises(ValueError, match="self_conditioning=True"):
        build("none")(x, t, None, self_condition=x)
    with torch.no_grad():
        network = build("none", self_conditioning=True)
        assert not torch.equal(network(x, t, None, self_condition=x), network(x, t))


@pytest.mark.parametrize(
    ("x", "condition", "named"),
    [
        (torch.zeros(2, 2, 16, 16), None, "size 8"),
        (torch.zeros(2, 1, 8, 8), None, "B, 2, H, W"),
        (torch.zeros(2, 2, 8, 8).double(), None, "float64"),
        (torch.zeros(2, 2, 8, 8), torch.tensor([0, 7]), "0 to 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(x, condition, named):
    with pytest.raises(ValueError, match=named):
        build()(x, torch.tensor([3, 700]), condition)


def test_condition_for_an_unconditional_network_is_refused():
    with pytest.raises(ValueError, match="takes no condition"):
        build("none")(torch.zeros(2, 2, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 1]))
