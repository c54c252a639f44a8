"""mmhybrid visualize with --features, --cam, --directions, --errors."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from looked_at import write_run
from mmengine.structures import InstanceData
from PIL import Image
from torch import nn

from mmhybrid import cli
from mmhybrid.cli.actions.looking.activation import explain_picture, gradients_of_features_alone
from mmhybrid.cli.actions.looking.opening import Input, as_map, evenly, find_layers, outputs_of
from mmhybrid.errors import UserError
from mmhybrid.visualization import as_colors, draw_bars, draw_heat, draw_map, sheet

pytestmark = pytest.mark.filterwarnings('ignore')


# --- answers that are known by construction -------------------------------------------------------

class Left(nn.Module):
    """Its backbone passes a picture on; its head looks at the left half only."""

    def __init__(self, count=2):
        super().__init__()
        self.backbone, self.count = nn.Conv2d(3, 4, 1), count
        nn.init.constant_(self.backbone.weight, 0.5)
        nn.init.zeros_(self.backbone.bias)
        self.unused = nn.Conv2d(3, 4, 1)

    def features(self, inputs):
        self.unused(inputs)
        features = self.backbone(inputs)
        features += 0  # in place, as a ReLU may be
        return features[..., :features.shape[-1] // 2]

    def forward(self, inputs, data_samples, mode):
        """A box of class 1, whose score is that of the half, and one below every threshold."""
        score = self.features(inputs).mean().sigmoid()
        boxes = torch.tensor([[1., 1, 5, 5], [0, 0, 9, 9]])
        return [SimpleNamespace(pred_instances=InstanceData(
            bboxes=boxes, labels=torch.tensor([1, 0]),
            scores=torch.stack([score, 0.1 * score.detach()])))]

    def encode_decode(self, inputs, metas):
        """Class 1 everywhere, as sure as the half is bright."""
        value = self.features(inputs).mean()
        logits = torch.zeros(1, self.count, *inputs.shape[2:])
        return logits + value if self.count == 1 else logits.index_add(
            1, torch.tensor([1]), value.expand(1, 1, *inputs.shape[2:]))


def given(model, finds_regions, size=(8, 12), padded=(8, 16)):
    pixels = torch.rand(1, 3, *padded) + 0.1
    picture = SimpleNamespace(size=size, rgb=lambda: np.zeros((*size, 3), np.uint8))
    samples = [SimpleNamespace(metainfo={})]
    predictor = SimpleNamespace(model=model, finds_regions=finds_regions, names=('no', 'yes'),
                                palette=((0, 0, 0), (9, 9, 9)), name='x.pth')
    return predictor, Input(picture, dict(inputs=pixels, data_samples=samples), padded, size)


@pytest.mark.parametrize('count', [0, 1, 2])
def test_a_network_that_looks_at_one_half(count):
    """A detector (0), a segmentor with one number for two classes, and one with two."""
    model = Left(count)
    predictor, picture = given(model, bool(count))
    layers = find_layers(model, ['backbone'])
    heats = {}
    for method in ('hires-cam', 'grad-cam'):
        found, panel = explain_picture(predictor, picture, layers, None, 0.5, method)
        assert [each.label for each in found] == [1] and panel.width >= 12
        assert found[0].boxes.tolist() == ([] if count else [[1, 1, 5, 5]])
        heats[method] = found[0].heat
        assert heats[method].shape == (8, 12)
    # half of the padded width; the picture is its left part
    assert (heats['hires-cam'][:, 8:] == 0).all() and (heats['hires-cam'][:, :8] > 0).all()
    assert (heats['grad-cam'][:, 8:] > 0).all()
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_classes_that_are_not_found_and_layers_that_do_not_matter():
    for regions in (False, True):
        predictor, picture = given(Left(), regions)
        layers = find_layers(predictor.model, ['backbone'])
        assert explain_picture(predictor, picture, layers, [0], 0.5, 'hires-cam')[0] == []
        with pytest.raises(UserError, match=r'x\.pth have no gradient with respect to unused'):
            explain_picture(predictor, picture, find_layers(predictor.model, ['unused']), None,
                            0.5, 'hires-cam')


def test_heads_that_detach_their_scores_keep_the_graph_meanwhile():
    """All dense heads of mmdet do, RetinaNet's and RTMDet's too."""
    head = pytest.importorskip('mmdet.models.dense_heads.base_dense_head')
    scores = [torch.ones(2, 3, requires_grad=True)]
    with gradients_of_features_alone(Left()):
        assert head.select_single_mlvl(scores, 1)[0].requires_grad
    assert not head.select_single_mlvl(scores, 1)[0].requires_grad


def test_layers_by_name():
    model = nn.ModuleDict(dict(backbone=nn.ModuleDict(dict(stem=nn.ReLU())), neck=nn.Identity()))
    with pytest.raises(UserError, match=r"no layer 'backbone\.sten'. Did you mean 'backbone\.stem"):
        find_layers(model, ['backbone.sten'])
    with pytest.raises(UserError, match="no layer '???'. Its parts are backbone, neck;"
                       .replace('?', r'\?')):
        find_layers(model, ['???'])
    with pytest.raises(UserError, match="no layer ''"):
        find_layers(model, [''])


def test_outputs_of_layers():
    class Many(nn.Module):
        def forward(self, x):
            return x + 1, dict(a=[x + 2]), 'text', x.long()

    many, once = Many(), nn.ReLU()
    with outputs_of(dict(many=many, once=once, never=nn.ReLU())) as outputs:
        many(once(torch.zeros(1)))
    assert {name: value.item() for name, value in outputs.items()} == {
        'many[0]': 1, 'many[1]': 2, 'once': 0}
    assert not many._forward_hooks


@pytest.mark.parametrize(('shape', 'expected'), [
    ((1, 5, 8, 12), (5, 8, 12)), ((1, 5, 2, 3), (5, 2, 3)), ((1, 2, 3, 5), (5, 2, 3)),
    ((1, 6, 5), (5, 2, 3)), ((1, 5, 1, 1), (5, 1, 1)), ((2, 5, 8, 12), None), ((1, 7, 5), None),
    ((1, 5, 3, 8), None), ((1, 5), None), ((1, 0, 8, 12), None)])
def test_maps_in_every_layout(shape, expected):
    if expected is None:
        with pytest.raises(UserError, match=r'The layer x returns \(.* 8 x 12 pixels'):
            as_map('x', torch.zeros(shape), (8, 12))
    else:
        assert as_map('x', torch.zeros(shape), (8, 12)).shape == expected


def test_a_map_lies_over_its_picture():
    _, picture = given(Left(), False, size=(4, 6))
    picture.padded, picture.filled = (8, 16), (8, 12)
    values = torch.zeros(2, 4)
    values[:, 3] = 1  # beyond the picture
    assert picture.cut(values).tolist() == [[0, 0, 0]] * 2
    heat = picture.over_picture(values)
    assert heat.shape == (4, 6) and heat[:, :4].max() == 0
    assert evenly(9, 3) == [0, 4, 8] and evenly(0, 3) == [] and evenly(2, 5) == [0, 1]


# --- pictures -------------------------------------------------------------------------------------

def test_heat_leaves_cold_places_grey():
    image = np.full((600, 600, 3), (200, 100, 0), np.uint8)
    heat = np.zeros((600, 600))
    heat[:300] = 2
    pixels = np.asarray(draw_heat(image, heat))
    assert (pixels[300:] == 100).all() and pixels[0, 0, 0] > 200
    assert (np.asarray(draw_heat(image, 0 * heat)) == 100).all()
    half = np.asarray(draw_heat(image, heat, most=4.))
    assert half[0, 0].tolist() != pixels[0, 0].tolist() and (half[300:] == 100).all()


def test_components_are_colours_that_repeat():
    channels = np.zeros((5, 4, 6))
    channels[:, :, 3:] = np.arange(5)[:, None, None]
    colors = as_colors(channels)
    assert colors.shape == (4, 6, 3) and set(np.unique(colors[..., 0])) == {0, 255}
    assert len(np.unique(colors[..., 1:])) == 1  # nothing else varies
    assert np.array_equal(colors, as_colors(channels))
    assert len(np.unique(as_colors(np.zeros((2, 1, 1))))) == 1
    assert draw_map(channels[0], 60).size == (60, 40)


def test_sheets_make_room_for_titles():
    small = Image.new('RGB', (10, 20), 'red')
    one = sheet([[('a title that is wider than its picture', small), ('b', small)], [('c', small)]],
                'on top')
    assert one.width > 250 and one.height > 100
    assert (np.asarray(one) == (255, 0, 0)).all(axis=2).sum() == 3 * 200


def test_a_chart_of_nothing():
    assert draw_bars(dict(a=0., b=-1.), {}, 'title').width > 200


# --- commands -------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Checkpoints of barely begun trainings, as their work directories."""
    folder = tmp_path_factory.mktemp('runs')
    return SimpleNamespace(det=write_run('cascade_mambavision_mini_coco', folder / 'det'),
                           seg=write_run('upernet_vmamba_mini_ade20k', folder / 'seg'))


def look(capfd, *arguments, code=0):
    capfd.readouterr()
    assert cli.main(['visualize', *map(str, arguments)]) == code
    said = capfd.readouterr()
    assert 'Traceback' not in said.err
    return said.out + said.err


def test_everything_for_a_detector(task, runs, tmp_path, capfd):
    data = '--data-root', task('det').data
    said = look(capfd, runs.det, *data, '--num', 2, '--out-dir', 'a')
    assert 'is the newest checkpoint' in said and len(list(Path('a').glob('*.png'))) == 2
    said = look(capfd, runs.det, *data, '--features', '--num', 1, '--layer', 'neck',
                'backbone.patch_embed', '--out-dir', 'b')
    (picture,) = Path('b').iterdir()
    assert Image.open(picture).size[1] > 5 * 150 and 'neck, backbone.patch_embed for 1' in said
    look(capfd, runs.det, *data, '--cam', '--num', 1, '--score-thr', 0, '--out-dir', 'c')
    assert len(list(Path('c').iterdir())) == 1
    said = look(capfd, runs.det, *data, '--errors', '--out-dir', 'd', '--num', 2)
    report = json.loads(Path('d/errors.json').read_text())
    assert report['images'] == 3 and report['objects'] > 0
    assert len(report['mistakes']) == sum(report['counts'].values()) > 0
    assert f'missed {report["counts"]["missed"]:>18}' in said and Path('d/errors.png').exists()
    drawn = {path.stem for path in Path('d').glob('errors_*.png')}
    assert drawn == {f'errors_{kind}' for kind, count in report['counts'].items() if count}
    said = look(capfd, runs.det, *data, '--directions', code=1)
    assert 'MambaVision scans its tokens in one direction only' in said


def test_everything_for_a_segmentor(task, runs, tmp_path, capfd):
    data = '--data-root', task('seg').data
    look(capfd, runs.seg, *data, '--cam', '--num', 1, '--out-dir', 'c', '--cam-method', 'grad-cam')
    assert len(list(Path('c').iterdir())) == 1
    said = look(capfd, runs.seg, *data, '--errors', '--num', 2, '--out-dir', 'd')
    report = json.loads(Path('d/errors.json').read_text())
    assert f'{100 * report["right"]:.1f} % of the pixels of 3 images are right' in said
    assert sum(pair['share'] for pair in report['confusions']) == pytest.approx(1)
    assert sorted(report['wrong'].values())[-1] > 0.5
    names = sorted(path.name for path in Path('d').glob('*.png'))
    assert names[0] == 'confusion.png' and names[1].startswith('worst_1_') and len(names) == 3
    look(capfd, runs.seg, *data, '--directions', '--num', 1, '--out-dir', 'e')
    (picture,) = Path('e').iterdir()
    four_by_four = Image.open(picture).size
    assert min(four_by_four) > 1000
    look(capfd, runs.seg, *data, '--directions', '--num', 1, '--at', 0, 0, '--layer',
         'backbone.layers.1', '--out-dir', 'f')
    (picture,) = Path('f').iterdir()
    assert Image.open(picture).size[1] < four_by_four[1] / 2
    said = look(capfd, '--receptive-field', runs.seg, '--size', 64, '--num', 1, '--out-dir', 'g')
    assert f'{runs.seg}: 20% within' in said
    assert 'has weights of its own' in look(capfd, '--receptive-field', runs.seg, '--weights',
                                            f'{runs.seg}/epoch_1.pth', '--size', 64, code=1)
