import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_core.metrics.manifold import manifold_scores


def by_hand(real, generated, k):
    """Return the four scores by their definitions, written as loops."""

    def ball(points, i):
        return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]

    real_radius = [ball(real, i) for i in range(len(real))]
    generated_radius = [ball(generated, i) for i in range(len(generated))]
    inside = np.array([[np.linalg.norm(g - r) <= radius for r, radius in zip(real, real_radius)] for g in generated])
    recalled = [any(np.linalg.norm(g - r) <= radius for g, radius in zip(generated, generated_radius)) for r in real]
    return inside.any(axis=1).mean(), np.mean(recalled), inside.sum() / (k * len(generated)), inside.any(axis=0).mean()


@given(
    n=st.integers(6, 25),
    m=st.integers(6, 25),
    k=st.integers(1, 5),
    shift=st.floats(0, 3),
    block=st.integers(1, 30),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_scores_are_the_definitions_written_out_for_any_block_size(n, m, k, shift, block, seed):
    generator = np.random.RandomState(seed)
    real, generated = generator.randn(n, 3), generator.randn(m, 3) + shift
    got = manifold_scores(real, generated, neighbours=k, block_size=block)
    assert (got.precision, got.recall, got.density, got.coverage) == pytest.approx(
        by_hand(real, generated, k), rel=1e-12
    )


def test_precision_and_recall_agree_with_torch_fidelity_on_the_same_float64_features():
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    generator = np.random.RandomState(0)
    real, generated = generator.randn(300, 8), generator.randn(260, 8) * 0.8 + 0.3
    theirs = prc.prc_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), prc_neighborhood=3, verbose=False
    )
    ours = manifold_scores(real, generated, neighbours=3)
    # torch-fidelity computes the means in float32
    assert ours.precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours.recall == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0.1 < ours.recall < ours.precision < 1


def test_equal_sets_score_one_and_a_distant_set_scores_zero():
    real = np.random.RandomState(0).randn(200, 5)
    same, far = manifold_scores(real, real.copy()), manifold_scores(real, real + 100)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)


def test_coverage_of_equal_distributions_has_its_closed_form():
    # arXiv 2002.09797, lemma 2: 1 - prod_{i=0}^{k-1} (N - 1 - i) / (N + M - 1 - i)
    generator, n, m, k = np.random.RandomState(0), 60, 40, 3
    scores = [manifold_scores(generator.randn(n, 4), generator.randn(m, 4), neighbours=k) for _ in range(120)]
    expected = 1 - np.prod([(n - 1 - i) / (n + m - 1 - i) for i in range(k)])
    assert np.mean([s.coverage for s in scores]) == pytest.approx(expected, abs=0.02)
    assert np.mean([s.density for s in scores]) == pytest.approx(1.0, abs=0.03)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="neighbours must lie in 1 to 2"):
        manifold_scores(np.zeros((3, 2)), np.zeros((9, 2)), neighbours=3)
    with pytest.raises(ValueError, match="neighbours must lie in 1 to 8"):
        manifold_scores(np.zeros((9, 2)), np.zeros((9, 2)), neighbours=2.0)
    with pytest.raises(ValueError, match="block_size must be a whole number of at least 1"):
        manifold_scores(np.zeros((9, 2)), np.zeros((9, 2)), block_size=0)


def two_clusters(seed, features=5, spread=1e-6, apart=1e4):
    points = np.random.RandomState(seed).randn(200, features) * spread
    points[100:] += apart
    return points


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize("block_size", [7, 64, 2048])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_set_against_itself_has_exactly_the_density_of_its_ties(neighbours, block_size, offset):
    """Each point lies on the surface of k balls and in the centre of its own: (k + 1) / k without ties among the points."""
    real = offset + np.random.RandomState(0).randn(150, 8)
    scores = manifold_scores(real, real.copy(), neighbours=neighbours, block_size=block_size)
    assert (scores.precision, scores.recall, scores.coverage) == (1.0, 1.0, 1.0)
    assert scores.density == (neighbours + 1) / neighbours


def test_scores_of_distant_tight_clusters_are_the_definitions_written_out():
    real, generated = two_clusters(0), two_clusters(1)
    for one, other in ((real, generated), (real, real.copy()), (generated, real)):
        got = manifold_scores(one, other)
        expected = by_hand(one, other, 3)
        assert (got.precision, got.recall, got.density, got.coverage) == pytest.approx(expected, rel=1e-12)
    assert manifold_scores(real, real.copy()).density == 4 / 3
    assert 0.8 < manifold_scores(real, generated).density < 1.2


@pytest.mark.parametrize("make", [two_clusters, lambda seed: np.random.RandomState(seed).randint(0, 3, (120, 4))])
def test_scores_do_not_depend_on_the_block_size_or_the_order_of_the_samples(make):
    real, generated = make(0), make(1)
    generator = np.random.RandomState(2)
    expected = manifold_scores(real, generated)
    for block_size in (1, 7, 50, 119):
        assert manifold_scores(real, generated, block_size=block_size) == expected
    shuffled = manifold_scores(real[generator.permutation(len(real))], generated[generator.permutation(len(real))])
    assert shuffled.precision == pytest.approx(expected.precision, abs=1e-15)
    assert (shuffled.recall, shuffled.density, shuffled.coverage) == pytest.approx(
        (expected.recall, expected.density, expected.coverage), rel=1e-12
    )


@given(seed=st.integers(0, 200), k=st.integers(1, 4), block=st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_equal_distances_and_repeated_points_count_as_in_the_definitions(seed, k, block):
    """Points on a small lattice: most distances tie, and many points coincide."""
    generator = np.random.RandomState(seed)
    real, generated = (generator.randint(0, 3, (size, 2)).astype(float) for size in (14, 11))
    got = manifold_scores(real, generated, neighbours=k, block_size=block)
    assert (got.precision, got.recall, got.density, got.coverage) == pytest.approx(
        by_hand(real, generated, k), rel=1e-12
    )


def test_identical_points_have_balls_of_radius_zero_that_hold_each_other():
    scores = manifold_scores(np.full((6, 3), 0.1), np.full((5, 3), 0.1))
    assert (scores.precision, scores.recall, scores.density, scores.coverage) == (1.0, 1.0, 2.0, 1.0)
    near = manifold_scores(np.full((6, 3), 0.1), np.full((5, 3), np.nextafter(0.1, 1)))
    assert (near.precision, near.recall, near.density, near.coverage) == (0.0, 0.0, 0.0, 0.0)


def test_strict_balls_of_the_prdc_package_give_density_one_for_a_set_against_itself():
    """The stated difference: prdc counts distance < radius, so a ball does not hold the neighbour on its surface."""
    real = np.random.RandomState(0).randn(60, 4)
    distances = np.linalg.norm(real[:, None] - real[None], axis=2)
    radius = np.sort(distances, axis=1)[:, 3]
    assert (distances < radius[:, None]).sum() / (3 * len(real)) == 1.0
    assert manifold_scores(real, real.copy(), neighbours=3).density == 4 / 3
