"""No false alarm: all configs of this project, of mmdet and of mmseg pass the check of settings."""
import importlib.util
import time
import warnings
from pathlib import Path

import pytest
from mmengine.config import Config

from mmhybrid.engine.settings import check_settings
from mmhybrid.errors import UserError

OURS = Path(__file__).resolve().parents[2] / 'configs'
# What is really wrong in them: a class without this argument (none of these can be built), a class
# that is not there, or a name that nothing reads.
FAULTS = {
    'bytetrack/bytetrack_yolox_x_8xb4-amp-80e_crowdhuman-mot20train_test-mot20test.py':
        'test_evaluator.type',
    'bytetrack/bytetrack_yolox_x_8xb4-80e_crowdhuman-mot20train_test-mot20test.py':
        'test_evaluator.type',
    'cascade_rpn/cascade-rpn_r50-caffe_fpn_1x_coco.py': 'model.rpn_head.stages.1.sampling',
    'dnlnet/dnl_r101-d8_4xb2-80k_cityscapes-769x769.py':
        'optim_wrapper.paramwise_cfg.custom_keys.theta.wd_mult',
    'dnlnet/dnl_r50-d8_4xb2-80k_cityscapes-769x769.py':
        'optim_wrapper.paramwise_cfg.custom_keys.theta.wd_mult',
    'pascal_voc/faster-rcnn_r50_fpn_1x_voc0712-cocofmt.py': 'val_evaluator.eval_mode',
    'v3det/fcos_swinb_fpn_8x4_sample1e-3_mstrain_v3det_2x.py': 'model.neck.force_grad_on_level',
    'bisenetv2/bisenetv2_fcn_4xb4-ohem-160k_cityscapes-1024x1024.py': 'models',
}


def stock():
    """(folder, name) of all configs that come with mmdet and mmseg."""
    for package in ('mmdet', 'mmseg'):
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent / '.mim' / 'configs' if spec else Path('nowhere')
        yield from ((folder, path.relative_to(folder).as_posix())
                    for path in sorted(folder.rglob('*.py')))


def verdict(path):
    """None, what the check says, or False for a file that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            cfg = Config.fromfile(path, import_custom_modules=False)
    except Exception:  # a base that was not packed, or of a package that is not installed
        return False
    try:
        check_settings(cfg, str(path), set(cfg), {})
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize('path', sorted(
    [*OURS.glob('*.py'), *OURS.glob('classification/*.py')]), ids=lambda path: path.stem)
def test_ours(path):
    assert verdict(path) is None


def judge(chosen):
    """Names with a wrong verdict, and how many were read."""
    wrong, read = {}, 0
    for folder, name in chosen:
        text = verdict(folder / name)
        read += text is not False
        if FAULTS.get(name):
            assert f'\n  {FAULTS[name]}=' in (text or ''), (name, text)
        elif text:
            wrong[name] = text
    return wrong, read


def test_a_spread_of_stock_configs():
    names = list(stock())
    if not names:
        pytest.skip('mmdet and mmseg are installed without their configs')
    chosen = names[::len(names) // 60][:60]
    wrong, read = judge(chosen)
    assert wrong == {} and read > 50


@pytest.mark.slow
def test_all_stock_configs():
    names, start = list(stock()), time.perf_counter()
    if not names:
        pytest.skip('mmdet and mmseg are installed without their configs')
    wrong, read = judge(names)
    print(f'{read} of {len(names)} configs were read in {time.perf_counter() - start:.0f} s')
    assert wrong == {} and read > 1500
    assert set(FAULTS) <= {name for _, name in names}
