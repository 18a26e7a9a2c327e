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
