import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.networks.conditioning import ConditionEmbedding, ConditionSpec, TokenSequence

SPECS = {
    "class": ConditionSpec("class", 4),
    "classes": ConditionSpec("classes", sizes=(4, 3, 2)),
    "multi_hot": ConditionSpec("multi_hot", 5),
    "vector": ConditionSpec("vector", 6),
    "tokens": ConditionSpec("tokens", 6, length=7),
}


def example(spec, batch, generator=None):
    """Return random conditions without a null."""
    if spec.kind == "class":
        return torch.randint(0, spec.size, (batch,), generator=generator)
    if spec.kind == "classes":
        return torch.stack([torch.randint(0, n, (batch,), generator=generator) for n in spec.sizes], dim=1)
    if spec.kind == "multi_hot":
        return torch.rand(batch, spec.size, generator=generator)
    condition = torch.randn(batch, *spec.shape, generator=generator)
    if spec.kind == "tokens":
        for row, length in enumerate(torch.randint(1, spec.length + 1, (batch,), generator=generator).tolist()):
            condition[row, length:] = float("nan")
    return condition


@pytest.mark.parametrize("kind", SPECS)
@given(dropped=st.lists(st.booleans(), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_dropping_replaces_exactly_the_marked_conditions_by_the_null(kind, dropped):
    spec = SPECS[kind]
    condition = example(spec, len(dropped), torch.Generator().manual_seed(0))
    result = spec.drop(condition, torch.tensor(dropped))
    null = spec.null(1)[0]
    for row, is_dropped in enumerate(dropped):
        expected = null.to(condition.dtype) if is_dropped else condition[row]
        torch.testing.assert_close(result[row], expected, equal_nan=True, atol=0, rtol=0)
    assert result.dtype == condition.dtype
    spec.check(result)


@pytest.mark.parametrize("kind", SPECS)
def test_spec_survives_json(kind):
    import json

    assert ConditionSpec(**json.loads(json.dumps(SPECS[kind].as_dict()))) == SPECS[kind]


@pytest.mark.parametrize("kind", [kind for kind in SPECS if kind != "tokens"])
def test_embedding_of_a_row_does_not_depend_on_the_other_rows_and_none_is_the_null(kind):
    spec = SPECS[kind]
    embed = ConditionEmbedding(spec, 8)
    if hasattr(embed, "null_embedding"):
        torch.nn.init.normal_(embed.null_embedding)
    condition = spec.drop(example(spec, 3), torch.tensor([False, True, False]))
    whole = embed(condition, 3, torch.device("cpu"))
    assert torch.isfinite(whole).all()
    for row in range(3):
        torch.testing.assert_close(embed(condition[row : row + 1], 1, torch.device("cpu"))[0], whole[row])
    torch.testing.assert_close(embed(None, 2, torch.device("cpu"))[1], whole[1])


def test_several_classes_are_the_sum_of_their_embeddings_and_each_has_its_own_null():
    spec = SPECS["classes"]
    embed = ConditionEmbedding(spec, 8)
    only_second = torch.tensor([[4, 1, 2]])  # the first and the last attribute are null
    spec.check(only_second)
    expected = embed.tables[0].weight[4] + embed.tables[1].weight[1] + embed.tables[2].weight[2]
    torch.testing.assert_close(embed(only_second, 1, torch.device("cpu"))[0], expected)


def test_tokens_that_are_padding_are_masked_and_a_null_sequence_is_one_learned_token():
    spec = SPECS["tokens"]
    sequence = TokenSequence(spec)
    condition = torch.randn(2, 7, 6)
    condition[0, 3:] = float("nan")
    condition[1] = float("nan")
    tokens, mask = sequence(condition, 2, torch.device("cpu"))
    assert torch.isfinite(tokens).all()
    assert mask[0, 0, 0].tolist() == [True] * 3 + [False] * 4
    assert mask[1, 0, 0].tolist() == [True] + [False] * 6
    torch.testing.assert_close(tokens[0, :3], condition[0, :3])
    torch.testing.assert_close(tokens[1, 0], sequence.null_token)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "colour", "size": 3}, "unknown condition kind 'colour'"),
        ({"kind": "class"}, "size of at least 1"),
        ({"kind": "classes"}, "needs sizes"),
        ({"kind": "classes", "sizes": (3, 0)}, "needs sizes"),
        ({"kind": "vector", "size": 3, "sizes": (3,)}, "sizes belongs to"),
        ({"kind": "tokens", "size": 3}, "length"),
        ({"kind": "vector", "size": 3, "length": 2}, "length"),
    ],
)
def test_impossible_spec_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        ConditionSpec(**arguments)


NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "condition", "named"),
    [
        ("class", torch.tensor([0, 5]), "0 to 3"),
        ("class", torch.tensor([-1]), "0 to 3"),
        ("class", torch.tensor([0.0]), "integers"),
        ("class", torch.tensor([[0]]), "shape"),
        ("classes", torch.tensor([[0, 4, 0]]), "attribute 1"),
        ("classes", torch.tensor([[0, 1]]), r"\(B, 3\)"),
        ("multi_hot", torch.tensor([[0, 1, 0, 0, 0]]), "floats"),
        ("multi_hot", torch.tensor([[0, 2.0, 0, 0, 0]]), "0 to 1"),
        ("multi_hot", torch.tensor([[-1.0, 1, 0, 0, 0]]), "0 to 1"),
        ("vector", torch.tensor([[0, NAN, 0, 0, 0, 0]]), "partly NaN"),
        ("vector", torch.full((1, 6), float("inf")), "infinite"),
        ("tokens", torch.full((1, 7, 6), 0.0).index_fill(1, torch.tensor([2]), NAN), "padding"),
        ("tokens", torch.zeros(1, 6, 6), r"\(B, 7, 6\)"),
    ],
)
def test_condition_outside_the_vocabulary_is_refused(kind, condition, named):
    with pytest.raises(ValueError, match=named):
        SPECS[kind].check(condition)


def test_number_of_conditions_must_equal_the_number_of_images():
    with pytest.raises(ValueError, match="2 conditions were given for 3 images"):
        ConditionEmbedding(SPECS["class"], 8)(torch.tensor([0, 1]), 3, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "condition", "named"),
    [
        ("class", torch.tensor([0, 5]), "0 to 3"),
        ("class", torch.tensor([-1, 0]), "0 to 3"),
        ("class", [0, 1], "tensor"),
        ("multi_hot", torch.full((2, 5), 2.0), "0 to 1"),
        ("vector", torch.zeros(2, 5), r"\(B, 6\)"),
    ],
)
def test_embedding_refuses_a_condition_outside_the_vocabulary(kind, condition, named):
    with pytest.raises(ValueError, match=named):
        ConditionEmbedding(SPECS[kind], 8)(condition, 2, torch.device("cpu"))


def test_labels_of_any_integer_type_are_read():
    embedding = ConditionEmbedding(SPECS["class"], 8)
    for dtype in (torch.uint8, torch.int32):
        labels = torch.tensor([0, 3], dtype=dtype)
        assert torch.equal(embedding(labels, 2, labels.device), embedding(labels.long(), 2, labels.device))


def test_mask_of_dropped_conditions_must_fit():
    spec = SPECS["class"]
    for dropped in (torch.tensor([True]), torch.tensor([1, 0])):
        with pytest.raises(ValueError, match="one flag for each of 2"):
            spec.drop(torch.tensor([0, 1]), dropped)
    with pytest.raises(ValueError, match="integers"):
        spec.drop(torch.tensor([0.0, 1.0]), torch.tensor([True, False]))
