"""Which places a score rests on, of scores whose answer is known."""
import pytest
import torch

from mmhybrid.analysis.class_activation import activation_map

FEATURES = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)) + 0.1


def gradient(score):
    features = FEATURES.clone().requires_grad_()
    score(features).backward()
    return features.grad


def left_half(features):
    return (3 * features[0, :, :3] - features[1, :, :3]).sum()


def test_place_by_place_only_what_is_looked_at_counts():
    heat = activation_map(FEATURES, gradient(left_half))
    assert (heat[:, 3:] == 0).all()
    expected = (3 * FEATURES[0] - FEATURES[1])[:, :3].relu()
    torch.testing.assert_close(heat[:, :3], expected)


def test_by_channel_places_that_look_alike_count_too():
    heat = activation_map(FEATURES, gradient(left_half), 'grad-cam')
    torch.testing.assert_close(heat, (1.5 * FEATURES[0] - 0.5 * FEATURES[1]).relu())
    assert (heat[:, 3:] > 0).any()


def test_what_speaks_against_a_score_stays_dark():
    for method in ('hires-cam', 'grad-cam'):
        assert (activation_map(FEATURES, gradient(lambda x: -x.sum()), method) == 0).all()


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="got method='cam', expected one of hires-cam, grad-cam"):
        activation_map(FEATURES, FEATURES, 'cam')
