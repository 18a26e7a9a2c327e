import numpy as np
import pytest

from diffusion_core.metrics.agreement import class_agreement


def test_agreement_is_the_share_of_images_classified_as_requested():
    logits = np.array([[2.0, 1, 0], [0, 3, 1], [0, 1, 2], [5, 0, 0]])
    got = class_agreement(logits, np.array([0, 1, 1, 0]))
    assert got.overall == 0.75
    np.testing.assert_array_equal(got.per_class, [1.0, 0.5, np.nan])


def test_labels_that_do_not_fit_the_images_or_classes_are_refused():
    with pytest.raises(ValueError, match="0 to 2"):
        class_agreement(np.zeros((1, 3)), np.array([3]))
    with pytest.raises(ValueError, match="2 images need 2"):
        class_agreement(np.zeros((2, 3)), np.array([0]))
    with pytest.raises(ValueError, match="integer labels"):
        class_agreement(np.zeros((1, 3)), np.array([0.0]))
