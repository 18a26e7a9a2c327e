import numpy as np
import pytest
import torch

from diffusion_core.metrics.inception_score import inception_score


@pytest.mark.parametrize("splits", [1, 7, 10])
def test_score_agrees_with_torch_fidelity_on_the_same_float64_logits(splits):
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = np.random.RandomState(0).randn(203, 9) * 3
    theirs = isc.isc_features_to_metric(torch.from_numpy(logits), splits=splits)
    ours = inception_score(logits, splits=splits)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-10, abs=1e-12)


def test_certain_varied_predictions_score_the_number_of_classes_and_uncertain_ones_score_1():
    sure = np.eye(5)[np.arange(100) % 5] * 1e4
    assert inception_score(sure, splits=1).mean == pytest.approx(5.0, rel=1e-12)
    assert inception_score(np.zeros((100, 5))).mean == pytest.approx(1.0, rel=1e-12)
    one_class = np.tile(np.eye(5)[:1] * 1e4, (100, 1))
    assert inception_score(one_class).mean == pytest.approx(1.0, rel=1e-12)


def test_more_splits_than_samples_are_refused():
    with pytest.raises(ValueError, match="1 to 3 splits"):
        inception_score(np.zeros((3, 2)), splits=4)
