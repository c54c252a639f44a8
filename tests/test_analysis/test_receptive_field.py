"""Effective receptive fields: known ones of small networks, and pictures of every family."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mmhybrid import cli
from mmhybrid.analysis.receptive_field import covering_sides, receptive_field
from mmhybrid.visualization import draw_receptive_fields


class Net(nn.Module):
    """Convolutions with positive weights; the last of two maps is looked at."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        for p in self.parameters():
            nn.init.constant_(p, 0.5)

    def forward(self, x):
        return x, self.layers(x)


def test_a_convolution_sees_its_kernel():
    field = receptive_field(Net(nn.Conv2d(3, 2, 3, padding=1)), torch.rand(2, 3, 9, 11))
    assert field.dtype == torch.float64 and field.shape == (9, 11) and field.max() == 1
    expected = torch.zeros(9, 11)
    expected[3:6, 4:7] = 1
    assert torch.equal(field, expected.double())
    assert covering_sides(field, [1 / 9, 0.12, 0.99, 1.0]) == [1, 3, 3, 3]


def test_two_convolutions_see_more_and_less_at_the_border():
    net = Net(nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
    field = receptive_field(net, torch.rand(1, 3, 9, 9))
    assert field[2:7, 2:7].min() == field[2, 2] == field[6, 6] < field[4, 4] == 1
    assert covering_sides(field, [0.99]) == [5]


def test_images_count_evenly_and_modes_do_not_matter():
    net = Net(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 1))
    images = torch.rand(3, 3, 9, 9)
    with torch.no_grad():  # as whoever predicts has it
        together = receptive_field(net, images)
    apart = [receptive_field(net, image[None]) for image in images]
    torch.testing.assert_close(together, sum(apart) / 3)
    assert net.layers[0].weight.grad is None and not images.requires_grad


def test_a_norm_at_the_end_is_no_obstacle():
    """The sum over channels of a LayerNorm is the same everywhere."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8, affine=False))
    field = receptive_field(lambda x: [net(x)], torch.rand(1, 3, 7, 7))
    assert (field > 0).all()


@pytest.mark.parametrize(('last', 'words'), [
    (lambda x: x * 0 - 1, 'has no gradient'), (lambda x: x / 0, 'a gradient that is not a number')])
def test_no_field(last, words):
    with pytest.raises(ValueError, match=words):
        receptive_field(lambda x: [last(x)], torch.rand(1, 3, 5, 5))


def test_the_picture_has_a_panel_for_each(tmp_path):
    fields = {f'net {i}': np.eye(8) for i in range(6)}
    picture = draw_receptive_fields(fields, 'title')
    one = draw_receptive_fields({'net': np.eye(8)})
    assert picture.width > 4 * one.width * 0.7 and picture.height > 1.5 * one.height
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 10


def test_every_family(tmp_path, capfd):
    assert cli.main(['visualize', '--receptive-field', '--size', '32', '--num', '1', '--out-dir',
                     str(tmp_path)]) == 0
    said = capfd.readouterr().out
    for name in ('MambaVision', 'VMamba', 'LocalVMamba', 'Vim', 'LocalVim'):
        assert f'{name}:tiny: 20% within ' in said
    assert Image.open(tmp_path / 'receptive_fields.png').width > 1000


def test_photographs_and_weights(tmp_path, capfd):
    for i, mode in enumerate(('RGB', 'L')):
        Image.new(mode, (70, 50), 90 * i).save(tmp_path / f'{i}.png')
    torch.manual_seed(0)
    from mmhybrid.models.backbones.vim import Vim
    arch = dict(dim=16, depth=2)
    network = Vim(arch, img_size=32, pyramid=False, out_indices=(1,), drop_path_rate=0.0)
    nn.init.normal_(network.layers[1].mixer.out_proj.weight)
    torch.save(network.state_dict(), tmp_path / 'own.pth')
    config = tmp_path / 'own.py'
    config.write_text("model = dict(type='EncoderDecoder', backbone=dict(type='mmhybrid.Vim', "
                      f'arch={arch}, out_indices=(1,), pyramid=False))')
    argv = ['visualize', '--receptive-field', str(config), str(config), '--weights', '-',
            str(tmp_path / 'own.pth'), '--images', str(tmp_path), '--size', '32', '--num', '5',
            '--out-dir', str(tmp_path / 'out')]
    assert cli.main(argv) == 0, capfd.readouterr().err
    lines = [line for line in capfd.readouterr().out.splitlines() if 'within' in line]
    assert len(lines) == 2 and 'own.pth: 20%' in lines[1] and 'own.pth' not in lines[0]

    (tmp_path / '2.png').write_bytes(b'no picture')
    assert cli.main(argv) == 1
    assert '2.png is not a picture that can be read' in capfd.readouterr().err


@pytest.mark.parametrize(('options', 'words'), [
    (['--weights', '-', '-', '-'], '--weights names 3 files for 2 networks'),
    (['--size', '16'], '--size is 16; expected at least 32'),
    (['--num', '0'], '--num is 0; expected at least 1'),
    (['--images', '.'], 'The folder . holds no picture and no video. It is empty.'),
    (['--weights', '-', 'nowhere.pth'], 'nowhere.pth'),
])
def test_what_a_user_gets_wrong(options, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    argv = ['visualize', '--receptive-field', 'VMamba:tiny', 'Vim:tiny', '--size', '32', '--num',
            '1', *options]
    assert cli.main(argv) == 1
    said = capfd.readouterr().err
    assert words in said and 'Traceback' not in said


def test_either_a_test_set_or_fields(capsys):
    for argv in (['config.py', 'a.pth', '--receptive-field', 'VMamba:tiny'], [], ['config.py']):
        with pytest.raises(SystemExit) as end:
            cli.main(['visualize', *argv])
        assert end.value.code == 2
    said = capsys.readouterr().err
    assert 'takes backbones, and no CONFIG CHECKPOINT' in said and 'or --receptive-field' in said
