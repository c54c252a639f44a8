"""Padding in a colour, beside the image's own shape."""
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

import mmhybrid.models.data_preprocessors  # noqa: F401

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def build(**given):
    init_default_scope('mmdet')
    return MODELS.build(dict(dict(
        type='mmhybrid.ColourPadPreprocessor', mean=MEAN, std=STD, pad_colour=(114, 114, 0),
        pad_size_divisor=32, bgr_to_rgb=True), **given))


def batch():
    from mmdet.structures import DetDataSample

    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((20, 33), (32, 9))]
    return dict(inputs=images, data_samples=[
        DetDataSample(metainfo=dict(img_shape=tuple(image.shape[1:]))) for image in images])


def test_padding_has_the_colour_and_the_image_keeps_its_shape():
    given = batch()
    images = [image.flip(0).float() for image in given['inputs']]
    data = build()(given)
    assert data['inputs'].shape == (2, 3, 32, 64)
    back = data['inputs'] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    colour = torch.tensor([114.0, 114.0, 0.0]).view(3, 1, 1)
    for found, image, sample in zip(back, images, data['data_samples'], strict=True):
        height, width = image.shape[1:]
        expected = colour.expand(3, 32, 64).clone()
        expected[:, :height, :width] = image
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        assert sample.img_shape == (height, width)
        assert sample.batch_input_shape == (32, 64)


def test_nothing_is_added_to_the_weights():
    assert not build().state_dict()


@pytest.mark.parametrize('given, error, text', [
    (dict(pad_colour=(114,)), ValueError, 'expected 3 numbers'),
    (dict(pad_color=0), TypeError, "did you mean 'pad_colour'"),
])
def test_refusals(given, error, text):
    with pytest.raises(error, match=text):
        build(**given)
