"""Published tables against the tool, and the tool's command line."""
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmhybrid import cli
from mmhybrid.analysis.models.complexity import measure
from mmhybrid.analysis.models.published import (
    CountedRow,
    agrees,
    count_row,
    markdown,
    read_published,
)
from mmhybrid.analysis.models.source import find_model
from mmhybrid.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / 'configs/complexity.yml'

# Independent counts of the released code, parameters in M and multiply-accumulates in G: the rows
# of the published tables that can be reproduced. None where nothing was published.
EXACT = {
    'MambaVision-T': (31.794, 4.459), 'MambaVision-T2': (35.104, 5.105),
    'MambaVision-S': (50.141, 7.481), 'MambaVision-B, B-21K': (97.685, 14.954),
    'MambaVision-L, L-21K': (227.961, 34.841), 'MambaVision-L2': (241.555, 37.500),
    'MambaVision-L2-512-21K': (241.555, 195.91), 'MambaVision-L3-256-21K': (739.570, 122.11),
    'MambaVision-L3-512-21K': (739.570, 488.47),
    'VMamba-T[s1l8]': (30.249, 4.906), 'VMamba-T[s2l5]': (30.706, 4.858),
    'VMamba-S[s2l15]': (50.148, 8.716), 'VMamba-S[s1l20]': (49.013, 8.612),
    'VMamba-B[s2l15]': (88.558, 15.359), 'VMamba-B[s1l20]': (86.615, 15.221),
    'VMamba-T (first release)': (22.893, 5.627), 'VMamba-S (first release)': (44.417, 11.232),
    'VMamba-B (first release)': (76.254, 18.020),
    'LocalVMamba-T': (25.527, 5.729), 'LocalVMamba-S': (49.749, 11.373),
    'Mask R-CNN LocalVMamba-T': (45.033, 291), 'Mask R-CNN LocalVMamba-S': (69.255, 414),
    'UperNet LocalVMamba-T': (57.181, 970), 'UperNet LocalVMamba-S': (81.402, 1095),
    'LocalVim-T': (7.994, 1.482), 'LocalVim-S': (27.784, 4.771),
    'LocalVim-T, middle class token': (7.995, None),
    'Vim-Ti': (7.148, None), 'Vim-S': (25.797, None), 'Vim-B': (97.598, None),
    'Vim-Ti+ (stride 8)': (7.250, None), 'Vim-S+ (stride 8)': (26.001, None),
    'Mask R-CNN VMamba-T': (49.755, 271.2), 'Mask R-CNN VMamba-S': (69.654, 348.9),
    'Mask R-CNN VMamba-B': (107.931, 485.48),
    'UperNet VMamba-T': (61.903, 948.8), 'UperNet VMamba-S': (81.801, 1027.9),
    'UperNet VMamba-B': (122.069, 1170.3), 'UperNet MambaVision-L3-21K': (780.51, None),
    # as printed
    'Mask R-CNN Swin-T': (48, 267), 'Mask R-CNN ConvNeXt-T': (48, 262),
    'Cascade Mask R-CNN Swin-T': (86, 745), 'Cascade Mask R-CNN ConvNeXt-T': (86, 741),
    'UperNet Swin-T': (60, 945), 'UperNet ConvNeXt-T': (60, 939),
}


@pytest.fixture(scope='module')
def sections():
    return {title: [count_row(row, str(TABLE.parent)) for row in rows]
            for title, rows in read_published(str(TABLE)).items()}


@pytest.fixture(scope='module')
def by_name(sections):
    return {it.row['name']: it for comparisons in sections.values() for it in comparisons}


@pytest.mark.parametrize('name', EXACT)
def test_reproduces_the_rows_that_can_be(by_name, name):
    for got, expected in zip(by_name[name].counted, EXACT[name], strict=True):
        if expected is not None:
            assert got == pytest.approx(expected, rel=0.005)


def test_a_row_that_does_not_reproduce_says_why(by_name):
    for name, it in by_name.items():
        assert all(it.reproduces) != ('why' in it.row), name
    assert {name for name in EXACT if 'why' in by_name[name].row} == {
        'Mask R-CNN VMamba-S', 'UperNet MambaVision-L3-21K'}
    assert len(by_name) == sum(map(len, read_published(str(TABLE)).values())), 'a name twice'


def test_the_table_beside_the_configs_is_up_to_date(sections):
    page = (ROOT / 'configs/complexity.md').read_text()
    assert page == markdown(sections, 'configs/complexity.yml') + '\n', (
        'run: python tools/get_flops.py configs/complexity.yml > configs/complexity.md')


def test_what_counts_as_the_printed_number():
    assert agrees('4.4', 4.46) and agrees('4.4', 4.36) and not agrees('4.4', 4.51)
    assert agrees('22', 22.893) and not agrees('22', 23.2)
    assert agrees('1028', 1031) and not agrees('1028', 1034)
    assert agrees('-', 3.0)
    row = dict(published=['-', '384'])
    cost = measure(find_model('VMambaClassifier:tiny'), (64, 64), depth=0)
    assert CountedRow(row, cost).reproduces == (True, False)


def test_head_rules_of_two_stage_detectors():
    source = find_model(str(ROOT / 'configs/cascade_mambavision_t_coco.py'))
    totals = {rule: measure(source, (800, 1280), rule, depth=None)
              for rule in ('all', 'mmdet2', 'mmdet3', 'conv-linear')}
    assert totals['all'].macs == totals['mmdet2'].macs
    assert totals['mmdet2'].macs / 1e9 == pytest.approx(1192.4, rel=0.005)
    assert totals['mmdet3'].macs / 1e9 == pytest.approx(2623, rel=0.005)
    parts = {row.module: row.total / 1e9 for row in totals['mmdet2'].rows}
    assert parts['roi_head.bbox_head'] == pytest.approx(386.88, rel=1e-3)
    assert parts['roi_head.mask_head'] == pytest.approx(159.0, rel=1e-3)
    assert parts['rpn_head'] == pytest.approx(50.62, rel=1e-3)
    assert parts['neck'] == pytest.approx(50.14 + 2.46, rel=1e-3)
    # 636 if the last blocks attended from padded tokens, whose outputs are thrown away
    assert parts['backbone'] == pytest.approx(543.3, rel=1e-3)
    attention = totals['conv-linear'].of_kind('attention')
    assert attention > 0 and totals['conv-linear'].macs < totals['all'].macs - attention
    small = find_model(str(ROOT / 'configs/cascade_mambavision_mini_coco.py'))
    assert measure(small, (160, 160), 'all').notes == [
        'heads on 64 boxes in each of 3 stages and 20 masks in each of 3 stages']


def test_tight_windows_count_real_tokens_only():
    """At most 3 % above attention over the real tokens of the published windows."""
    source = find_model(str(ROOT / 'configs/cascade_mambavision_t_tight_coco.py'))
    cost = measure(source, (800, 1280), 'all', depth=None)
    parts = {row.module: row.total / 1e9 for row in cost.rows}
    assert parts['backbone'] == pytest.approx(135.0, rel=1e-3)
    tokens = {2: 50 * 80, 3: 25 * 40}
    attention = sum(2 * 320 * 2 ** (i - 2) * depth // 2 * tokens[i] ** 2
                    for i, depth in ((2, 8), (3, 4)))
    assert cost.of_kind('attention') == pytest.approx(attention, rel=0.03)


def test_one_mask_head_for_three_stages():
    source = find_model(str(ROOT / 'configs/cascade_vim_ti_coco.py'))
    parts = {}
    for rule in ('all', 'mmdet3'):
        cost = measure(source, (128, 128), rule, depth=None)
        parts[rule] = {row.module: row.total for row in cost.rows}
        assert cost.notes == [f'heads on 1000 boxes in each of 3 stages and '
                              f'{100 if rule == "all" else 1000} masks']
    assert parts['all']['roi_head.bbox_head'] == 3 * parts['all']['roi_head.bbox_head.0']
    # four convolutions on 14 x 14, one transposed, logits of 80 classes on 28 x 28; five norms
    macs = 256 * 256 * (4 * 9 * 14 ** 2 + 28 ** 2) + 80 * 256 * 28 ** 2
    assert parts['all']['roi_head.mask_head'] == 100 * (macs + 5 * 4 * 256 * 14 ** 2)
    assert parts['mmdet3']['roi_head.mask_head'] == 10 * parts['all']['roi_head.mask_head']


def test_heads_with_a_forward_of_their_own_are_refused():
    from mmdet.models.roi_heads import StandardRoIHead
    from mmengine.registry import MODELS

    @MODELS.register_module(force=True)
    class Other(StandardRoIHead):
        def forward(self, x):
            return x

    @MODELS.register_module(force=True)
    class More(Other):
        pass

    config = str(ROOT / 'configs/mask_rcnn_swin_t_coco.py')
    for name in ('Other', 'More'):
        source = find_model(config, {'model.roi_head.type': f'mmengine.{name}'})
        with pytest.raises(UserError, match='no rule for how often the parts of'):
            measure(source, (64, 64))


def test_every_direction_as_long_as_the_longest():
    source = find_model('LocalVMamba:tiny')
    plain, padded = (measure(source, (512, 512), rule, depth=None)
                     for rule in ('all', 'localvmamba-released'))
    assert padded.macs / 1e9 == pytest.approx(31.50, rel=1e-3)
    assert padded.everything == plain.macs == plain.everything
    for kind in ('conv', 'norm', 'resize'):
        assert padded.of_kind(kind) == plain.of_kind(kind)
    # stage 4 has 16 x 16 tokens, in windows of 7 that is 21 x 21
    rows = {row.module: row.macs['scan'] for row in padded.rows}
    assert rows['layers.3.blocks.0.op'] == 4 * 1536 * 21 ** 2 * (9 * 16 + 1)


def test_nothing_of_the_scan_is_left_to_the_config(monkeypatch):
    """A model that wants a GPU's kernels is counted without one."""
    source = find_model('VMamba:tiny', {'model.scan_backend': 'triton'})
    plain = measure(find_model('VMamba:tiny'), (64, 64))
    assert measure(source, (64, 64)).macs == plain.macs
    monkeypatch.setenv('MMHYBRID_SCAN_BACKEND', 'triton')
    assert measure(source, (64, 64)).macs == plain.macs


def test_fused_kernels_are_not_needed_where_numbers_are():
    from mmhybrid.analysis.models import complexity
    fused = {'fused_mixer': True, 'arch': 'tiny'}
    counted = []
    for options, device in ((fused, 'meta'), (fused, 'cpu'), ({'arch': 'tiny'}, 'cpu')):
        source = find_model('MambaVision', {f'model.{k}': v for k, v in options.items()})
        records = complexity._count(source, (32, 32), 'all', device)[1]
        counted.append(sum(record.macs for record in records))
    assert counted[0] == counted[1] == counted[2] > 0


def test_a_backbone_of_another_package_alone():
    """Many backbones of mmdet return nothing from train() and eval()."""
    config = str(ROOT / 'configs/mask_rcnn_swin_t_coco.py')
    cost = measure(find_model(config, backbone_only=True), (64, 64))
    assert cost.name == 'backbone of mask_rcnn_swin_t_coco'
    assert cost.rows[0].type == 'SwinTransformer' and cost.of_kind('attention') > 0


def test_classifier_of_a_config():
    source = find_model(str(ROOT / 'configs/classification/localvim_t_imagenet.py'))
    assert measure(source, (224, 224), 'localvim-released').macs / 1e9 == pytest.approx(
        1.482, rel=0.005)


def test_what_a_segmentor_runs():
    config = str(ROOT / 'configs/upernet_vmamba_t_ade20k.py')
    cost = measure(find_model(config), (128, 256), depth=1)
    assert [note.partition(',')[0] for note in cost.notes] == ['without the auxiliary head']
    rows = {row.module: row for row in cost.rows}
    assert rows['auxiliary_head'].total == 0 < rows['auxiliary_head'].parameters
    # resizing happens in decode_head.forward, which mmseg calls without the module's hooks
    assert rows['decode_head'].macs['resize'] > 1e6
    assert cost.macs == rows['backbone'].total + rows['decode_head'].total


def test_a_model_that_looks_at_numbers(tmp_path):
    from mmengine.registry import MODELS

    @MODELS.register_module(force=True)
    class Looks(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1) if x.sum().item() == 0 else x)

    config = tmp_path / 'looks.py'
    config.write_text("model = dict(type='Looks', in_features=48, out_features=5)\n")
    cost = measure(find_model(str(config)), (4, 4))
    assert cost.macs == 240 and 'really computed' in cost.notes[0]


def test_single_stage_detector(tmp_path):
    config = tmp_path / 'retina.py'
    config.write_text(
        "default_scope = 'mmdet'\ncustom_imports = dict(imports=['mmhybrid'])\n"
        "model = dict(type='RetinaNet', backbone=dict(type='mmhybrid.VMamba', arch='tiny'),\n"
        "  neck=dict(type='FPN', in_channels=[96, 192, 384, 768], out_channels=32, num_outs=5),\n"
        "  bbox_head=dict(type='RetinaHead', num_classes=80, in_channels=32, feat_channels=32))\n")
    cost = measure(find_model(str(config)), (128, 160), depth=1)
    assert [row.module for row in cost.rows] == ['total', 'backbone', 'neck', 'bbox_head']
    assert all(row.total > 0 for row in cost.rows)


# --- command line ------------------------------------------------------------------------------


def test_formats(capsys):
    arguments = ['VMambaClassifier:tiny', '--shape', '224', '--depth', '1']
    cli.main(['flops', *arguments, '--format', 'json'])
    data = json.loads(capsys.readouterr().out)
    assert data['parameters'] == 30249064 and data['shape'] == [3, 224, 224]
    assert data['macs'] == sum(data['macs_by_kind'].values()) > 4.9e9
    cli.main(['flops', *arguments, '--format', 'csv', '--convention', 'conv-linear'])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row['module'] for row in rows] == ['total', 'patch_embed', 'layers', 'classifier']
    kinds = data['macs_by_kind']
    assert int(rows[0]['total']) == kinds['conv'] + kinds['linear']
    assert int(rows[0]['scan']) == kinds['scan'] > 0
    cli.main(['flops', *arguments, '--convention', 'conv-linear'])
    text = capsys.readouterr().out
    assert '(scan)' in text and '(norm)' in text and '30.249' in text


def test_standard_output_is_the_table_alone():
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/get_flops.py', ROOT / 'configs/upernet_vmamba_t_ade20k.py',
         '--shape', '64', '128', '--format', 'json'], capture_output=True, text=True, cwd='/')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['model'] == 'upernet_vmamba_t_ade20k'


@pytest.mark.parametrize(('arguments', 'parts'), [
    (['VMambaClasifier:tiny'], ['neither a config file', "Did you mean 'VMambaClassifier'"]),
    (['VMambaClassifier:huge'], ['VMambaClassifier:huge cannot be built', "arch='huge'"]),
    (['configs/nowhere.py'], ['There is no config configs/nowhere.py']),
    (['VMambaClassifier:tiny', '--shape', '1', '2', '3'], ['--shape got 1 2 3', '800 1280']),
    (['VMambaClassifier:tiny', '--shape', '0'], ['--shape got 0']),
    (['VMambaClassifier:tiny', '--convention', 'papers'], ['papers', 'conv-linear, mmdet2']),
    (['VMambaClassifier:tiny', '--convention', 'localvim-released'],
     ['counts as the tables of LocalVim and Vim do', 'has no block of theirs']),
    (['LocalVimClassifier:tiny', '--convention', 'localvmamba-released'],
     ['counts as the tables of LocalVMamba do', 'has no block of theirs']),
    (['VMambaClassifier:tiny', '--backbone-only'], ['has no part called backbone']),
    ([str(TABLE), '--shape', '224'], ['say themselves']),
    (['nothing.yml'], ['no table of published numbers nothing.yml']),
])
def test_errors_finish_the_sentence(capfd, arguments, parts):
    assert cli.main(['flops', *arguments]) == 1
    error = capfd.readouterr().err
    assert 'Traceback' not in error
    for part in parts:
        assert part in error


def test_unknown_keys_of_a_table(tmp_path, capfd):
    (tmp_path / 'table.yml').write_text('Rows:\n  - {name: a, sizes: b}\n')
    assert cli.main(['flops', str(tmp_path / 'table.yml')]) == 1
    assert "row 'a' lacks or should not have" in capfd.readouterr().err
