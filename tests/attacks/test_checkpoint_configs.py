"""Configs inside checkpoints are data: what could run code is taken out and named."""
import io
import logging
import sys

import hostile_files as hostile
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

import mmhybrid.plugin  # noqa: F401  (its import installs what is tested)
from mmhybrid.compat import embedded_config
from mmhybrid.compat.embedded_config import plain_config, settled_text
from mmhybrid.models.checkpoints import load_weights
from mmhybrid.weights import WeightsError, read_checkpoint
from mmhybrid.weights.conversion import convert, publish, restore


@pytest.fixture
def logged(monkeypatch):
    """What the log says of a checkpoint."""
    lines = []
    monkeypatch.setattr('mmhybrid.compat.checkpoint_loader.print_log',
                        lambda text, logger, level: lines.append((level, text)))
    return lines


def load(path, content):
    torch.save(content, path)
    return CheckpointLoader.load_checkpoint(str(path))


def settled(tmp_path, text, place='hub'):
    content = dict(state_dict={}, meta=dict(epoch=1), message_hub=dict(runtime_info=dict(iter=1)))
    holder = content['meta'] if place == 'meta' else content['message_hub']['runtime_info']
    holder['cfg'] = text
    back = load(tmp_path / 'w.pth', content)
    assert back['meta']['epoch'] == 1 and back['message_hub']['runtime_info']['iter'] == 1
    return (back['meta'] if place == 'meta' else back['message_hub']['runtime_info']).get('cfg')


# text -> what is named in the log, and what must be left of it
DROPPED = {
    'model=dict(type="os.system", command="true")': ("model (type='os.system'", {}),
    'model=dict(type="torch.hub.load", repo="x")': ("model (type='torch.hub.load'", {}),
    'model=dict(type="torch.nn.Linear.__init__")': ('is not a name', {}),
    'model=dict(type="mmengine.load", file="x.json")': ("type='mmengine.load'", {}),
    'model=dict(type="mmengine.fileio.load", file="x.json")': ('mmengine.fileio.io.load', {}),
    'model=dict(type="mmengine.utils.misc.subprocess.Popen", args="true")': (
        'leads to nothing', {}),
    'model=dict(type="mmdet.utils.setup_env.os.system")': ('leads to nothing', {}),
    'model=dict(type="mmengine.runner.Runner", work_dir="x")': ('starts a program of its own', {}),
    'model=dict(type="mmengine.config.LazyObject", module="os")': ('LazyObject', {}),
    'model=dict(type="torch.nn.functional.warnings.os.system")': ('leads to nothing', {}),
    'model=dict(type="torch.nn.modules")': ('leads to', {}),
    'model=dict(type="mmdet.apis.inference.Path")': ('leads to pathlib.Path', {}),
    'model=dict(type="np.load")': ("type='np.load' is nothing of", {}),
    'model=dict(type="mmengine.hub.get_model", cfg_path="x")': ('mmengine.hub', {}),
    'model=dict(type="mmhybrid.cli.actions.training.main")': (
        "type='mmhybrid.cli.actions.training.main'", {}),
    'model=dict(type="mmdet.apis.DetInferencer", weights="x")': ('DetInferencer', {}),
    'model=dict(type="evil_package.registry.X")': ("type='evil_package.registry.X'", {}),
    'model=dict(type="mmdet_evil.X")': ("type='mmdet_evil.X'", {}),
    'model=dict(type="antigravity")': ('a module of Python', {}),
    'model=dict(type="exec")': ('a function or a module of Python', {}),
    'model=dict(type="..os.system")': ('is not a name', {}),
    'model=dict(type="")': ('is not a name', {}),
    'model=dict(type="mmdet..os.system")': ('is not a name', {}),
    # mmcv finds its operator by running this text
    'model=dict(test_cfg=dict(nms=dict(type="__import__(\'os\').system(\'true\')")))': (
        'model.test_cfg.nms (type=', dict(model=dict(test_cfg={}))),
    'model=dict(neck=[dict(type="ReLU"), dict(type="os.system")])': (
        'model.neck[1] (type=', dict(model=dict(neck=[dict(type='ReLU')]))),
    'model=dict(type="RFSearchHook", op="x")': ('runs texts of its settings', {}),
    'custom_imports=dict(imports=["evil"])': ("custom_imports={'imports': ['evil']}", {}),
    'custom_imports=dict(imports="mmhybrid_evil")': ('imports another package', {}),
    'custom_imports=dict(imports=["mmhybrid", "os"])': (
        'custom_imports=', dict(custom_imports=dict(imports=['mmhybrid'],
                                                    allow_failed_imports=True))),
    'custom_imports=dict(imports=["mmdet/../evil"])': ('custom_imports=', {}),
    'custom_imports=dict(imports=["mmhybrid.__main__"])': ('custom_imports=', {}),
    'custom_imports=dict(imports=["mmhybrid\\nimport os"])': ('custom_imports=', {}),
    'custom_imports=["mmhybrid"]': ('custom_imports=', {}),
    'custom_imports=dict(imports=[["os"]])': ('custom_imports=', {}),
    '_base_="/elsewhere/evil.py"': ("_base_='/elsewhere/evil.py' (runs a file)", {}),
    '_base_=["mmdet::a.py", "evil.py"]': ('runs a file', {}),
    '_base_="mmdet::../../../elsewhere/evil.py"': ('runs a file', {}),
    '_base_="mmdet::/elsewhere/evil.py"': ('runs a file', {}),
    '_base_="evil::a.py"': ('runs a file', {}), '_base_=5': ('runs a file', {}),
    'default_scope="evil"': ("default_scope='evil' (imports", {}),
    'default_scope="os.path"': ("default_scope='os.path'", {}),
    'model=dict(_scope_="evil", type="X")': ("model._scope_='evil'", dict(model=dict(type='X'))),
    'data=dict(ann_file="http://x/y.pkl")': ('unpickled', dict(data={})),
    'data=dict(files=["y.pickle", "z.json"])': ('data.files[0]', dict(data=dict(files=['z.json']))),
    'data=dict(backend="pickle", hierarchy_file="a.np")': ('unpickled', dict(data={})),
    'data=dict(split_file="y.txt")': ('unpickled', dict(data={})),
    # mmengine reads YAML with the loader that makes any object of Python
    'model=dict(loss=dict(type="CrossEntropyLoss", class_weight="https://x/y.yaml"))': (
        'YAML, which mmengine lets run code', dict(model=dict(loss=dict(type='CrossEntropyLoss')))),
    'data=dict(files=["y.YML"], file_format="yaml")': ('YAML', dict(data=dict(files=[]))),
    'model=dict(teacher_config="/elsewhere/evil.py", x=1)': (
        'names a config that is run', dict(model=dict(x=1))),
    'model=dict(MODEL=dict(WEIGHTS="/elsewhere/evil"))': ('without our checks', dict(
        model=dict(MODEL={}))),
    'model=dict(lang_model_name="/elsewhere/evil", name="evil/x", tokenizer_name="hf:y")': (
        'names a model elsewhere', dict(model={})),
    'model=dict(warp_mode="print(1)", x="cv2.MOTION_X")': (
        'is run as Python', dict(model=dict(x='cv2.MOTION_X'))),
    'model=dict(checkpoint_path="a.pth", model_name="hf-hub:evil/x")': (
        'without our checks', dict(model={})),
    'load=dict(backend_args=dict(backend="memcached", sys_path="/elsewhere/x"))': (
        'sys_path', dict(load=dict(backend_args=dict(backend='memcached')))),
    'test_dataloader=dict(collate_fn="os.system", x=1)': (
        "collate_fn='os.system'", dict(test_dataloader=dict(x=1))),
    'model=dict(norm_layer="subprocess.call")': ("norm_layer='subprocess.call'", dict(model={})),
    'visualizer=dict(save_dir="/root/x")': ('names a place to write to', dict(visualizer={})),
}


@pytest.mark.parametrize('place', ['meta', 'hub'])
@pytest.mark.parametrize('text', DROPPED)
def test_what_could_run_code_is_named_and_left_out(text, place, tmp_path, logged):
    named, left = DROPPED[text]
    whole = f'kept = [float("-inf"), -1, (2,), {{3: None}}, "\\n"]\n{text}\n'
    after = settled(tmp_path, whole, place)
    (level, line), = logged
    where = 'meta.cfg' if place == 'meta' else 'message_hub.runtime_info.cfg'
    assert level == logging.WARNING and named in line and f'{where} of {tmp_path}/w.pth' in line
    assert 'MMHYBRID_TRUST_CHECKPOINTS=1' in line
    values = plain_config(after)
    assert values.pop('kept') == [float('-inf'), -1, (2,), {3: None}, '\n']
    assert values == left
    assert settled_text(after, values) == (after, [])


# --- texts that are not taken at all ---

@pytest.mark.parametrize('text', [
    # mmengine replaces {{ }} before Python reads the text, so that strings end elsewhere
    "x = ['{{$A:\\\\}}', ', __import__(\"os\").mkdir(\"ran\")] #']\n",
    "x = '{{ fileDirname }}'\n", "x = '{{_base_.y}}'\n", "x = {'a': '{{$HOME:}}'}\n",
    "_base_ = '/elsewhere/x.py'\n_base_ = 'mmdet::a.py'\n", 'a = _base_ = "x"\na = 1\n',
    'import os\n', 'from mmhybrid import x\n', 'with read_base():\n    pass\n', "f'{x}'\n",
    "x = f'{1}'\n", "x = rf'{open(1)}'\n", 'x = 1 + 1\n', 'x = "a" * 9\n', 'x = a\n', 'x = a.b\n',
    'x: int = 1\n', 'x += 1\n', 'x = (y := 1)\n', 'x = lambda: 1\n', 'x = [i for i in ()]\n',
    'x = not 1\n', 'x = 1 if 1 else 2\n', 'x = -' * 9 + '1\n', 'x = ' + '-' * 100_000 + '1\n',
    'x = ' + '+1' * 100_000 + '\n', 'x = ' + 'a.' * 100_000 + 'b\n', 'x = ' + '[' * 5000 + '\n',
    'x = ' + '[' * 5000 + ']' * 5000 + '\n', 'x = ' + 'not ' * 100_000 + '1\n', 'dict = 1\n',
    'x = (\n', 'x = "\n', 'x = 1\n  y = 2\n', '\x00', 'x = "\ud800"\n', '# ' + 'a' * 2**21, 'x\n',
    'x = dict(a)\n', 'x = dict(**{})\nx = float("a")\n', 'x = {1: 2, **{}}\n', 'x = {[]: 1}\n',
    'x = open("a")\n', 'x = float\n', 'del x\n', 'x = ...a\n', '@x\ndef f(): pass\n', b'x = 1\n',
    5, None, ['x = 1'], {'x': 1},
])
def test_texts_that_do_more(text, tmp_path, logged):
    if not isinstance(text, str) or '\ud800' not in text:
        assert settled(tmp_path, text) is None
        (_, line), = logged
        assert 'does more than set plain values, so it is left out' in line and '\n' not in line
    assert plain_config(text) is None


def test_trust_leaves_everything(tmp_path, logged, monkeypatch):
    monkeypatch.setenv('MMHYBRID_TRUST_CHECKPOINTS', '1')
    text = 'import os\nmodel = dict(type="os.system")\n'
    assert settled(tmp_path, text) == text and logged == []


HONEST = """
default_scope = 'mmdet'
custom_imports = dict(allow_failed_imports=False, imports=['mmhybrid', 'mmdet.models'])
model = dict(
    _scope_='mmseg', type='mmdet.CascadeRCNN',
    backbone=dict(type='mmhybrid.MambaVision', arch='tiny', init_cfg=dict(
        type='Pretrained', checkpoint='https://example.org/w.pth')),
    neck=dict(type='mmdet.models.necks.fpn.FPN', norm_cfg=dict(type='torch.nn.BatchNorm2d')),
    act=[dict(type='ReLU', inplace=True), dict(type='GELU')], conv=dict(type='conv'),
    roi=dict(type='RoIAlign', sampling_ratio=0), layer=dict(type='mmcv.ops.RoIAlign'),
    test_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), soft=dict(type='soft_nms')),
    fast=dict(type='mmcv.ops.nms'), other=dict(type='NotInstalledNet', x=1), track=dict(
        warp_mode='cv2.MOTION_EUCLIDEAN'), net=dict(model_name='resnet50', pretrained=True),
    language_model=dict(type='BertModel', name='bert-base-uncased'),
    lang_model_name='bert-base-uncased', weights=[1., 2.],
    loss=dict(name='loss_ce', class_weight='weights.json'))
optim_wrapper = dict(optimizer=dict(type='torch.optim.AdamW', lr=1e-4), type='OptimWrapper')
other_optimizer = dict(type='torch.optim.adamw.AdamW')
load = dict(collate_fn=dict(type='pseudo_collate'), norm_layer='ln2d')
new_style = dict(type='mmengine.runner.loops.EpochBasedTrainLoop', max_epochs=1)
vis_backends = [dict(type='LocalVisBackend', save_dir='vis')]
data = dict(ann_file='annotations/a.json', type='CocoDataset', backend_args=None, pkl=1, npy='x')
type = 'not a class'
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', 'mmhybrid::upernet_vim_ti_ade20k.py']
"""


def test_honest_settings_pass_untouched(tmp_path, logged):
    pytest.importorskip('mmdet')
    assert settled(tmp_path, HONEST) == HONEST and logged == []
    assert plain_config(HONEST)['model']['act'][0] == dict(type='ReLU', inplace=True)


def test_looking_runs_and_imports_nothing_new():
    names = set(sys.modules)
    for text in DROPPED:
        values = plain_config(text)
        settled_text(text, values)
    new = {name.partition('.')[0] for name in set(sys.modules) - names}
    assert not new & {'antigravity', 'evil', 'evil_package', 'mmdet_evil', 'mmhybrid_evil'}
    assert embedded_config.PACKAGES == ('mmhybrid', 'mmengine', 'mmcv', 'mmdet', 'mmseg')


def test_a_settled_text_is_what_mmengine_reads(tmp_path):
    text = ('a = dict(b=[float("inf"), -float_ ] , c=(1,))\n'.replace('-float_', '-1e-5')
            + 'model = dict(type="os.system")\nd = {"x y": {1, 2}, 3: b"z", "q": "\'\\n\\\\"}\n')
    after, dropped = settled_text(text, plain_config(text))
    assert len(dropped) == 1
    config = Config.fromstring(after, '.py')
    assert config.a == dict(b=[float('inf'), -1e-5], c=(1,))
    assert config.d == {'x y': {1, 2}, 3: b'z', 'q': "'\n\\"} and 'model' not in config


# --- entries that are not what mmengine takes them for ---

@pytest.mark.parametrize(('content', 'message'), [
    (dict(meta=[1]), 'meta is a list'), (dict(meta='config'), 'meta is a str'),
    (dict(meta=(('config', 'import os'),)), 'meta is a tuple'),
    (dict(meta={}, message_hub=[1]), 'message_hub is a list'),
    (dict(message_hub=dict(runtime_info=[1])), 'message_hub.runtime_info is a list'),
    (dict(message_hub=dict(log_scalars=3)), 'message_hub.log_scalars is a int'),
    (dict(meta=dict(dataset_meta='x')), 'meta.dataset_meta is a str'),
    (dict(state_dict=[torch.ones(1)]), 'state_dict is a list'),
    (dict(state_dict={3: torch.ones(1)}), 'state_dict has 3 as a key'),
    (dict(state_dict={'a\nb': torch.ones(1)}), r'state_dict has a\\nb as a key'),
])
def test_entries_of_another_kind(content, message, tmp_path):
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(WeightsError, match=rf'w.pth was not loaded: {message}.*expected'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'w.pth'))


def test_a_record_in_place_of_meta_runs_nothing(tmp_path):
    for kind in ('record', 'array of records', 'objects'):
        hostile.archive(tmp_path / 'w.pth', hostile.program(
            {'state_dict': {}, 'meta': hostile.RECORDS[kind]}))
        with pytest.raises(WeightsError, match='w.pth was not loaded: meta is a numpy'):
            CheckpointLoader.load_checkpoint(str(tmp_path / 'w.pth'))


# --- addresses in messages, and in the lists of models ---

REFUSED = slice(3)


def test_secrets_of_addresses_are_not_shown(tmp_path, monkeypatch, logged):
    address, path = 'https://me:secret@h/w.pth?token=secret#secret', tmp_path / 'w.pth'
    monkeypatch.setattr('mmhybrid.weights.fetch', lambda source: path)
    monkeypatch.setattr('mmhybrid.weights.conversion.fetch', lambda source: path)
    for content, act in (
            ('import os', lambda: read_checkpoint(address)),
            (dict(a=REFUSED), lambda: read_checkpoint(address)),
            (dict(meta=3), lambda: CheckpointLoader.load_checkpoint(address)),
            (dict(state_dict={'x': torch.ones(1)}), lambda: load_weights(torch.nn.ReLU(), address)),
            (dict(state_dict={'x': torch.ones(1)}), lambda: restore(address, tmp_path / 'r.pth')),
            (dict(a=REFUSED), lambda: convert(address, tmp_path / 'c.pth')),
            (dict(a=REFUSED), lambda: publish(address, tmp_path / 'c.pth'))):
        path.write_bytes(b'zz' if isinstance(content, str) else _saved(content))
        with pytest.raises(WeightsError) as caught:
            act()
        assert 'https://***@h/w.pth?...' in str(caught.value) and 'secret' not in str(caught.value)
    path.write_bytes(_saved(dict(state_dict={}, meta=dict(cfg='import os'))))
    CheckpointLoader.load_checkpoint(address)
    (_, line), = logged
    assert 'meta.cfg of https://***@h/w.pth?...' in line and 'secret' not in line


def _saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize('address', ['http://h/w.pth', 'HTTPS://H/w.pth', 'hf://a/b/w.pth'])
def test_lists_of_models_hold_addresses_in_any_case(address, monkeypatch):
    asked = []
    monkeypatch.setattr('mmengine.runner.checkpoint.get_external_models', lambda: {'x': address})
    monkeypatch.setattr('mmhybrid.compat.checkpoint_loader.read_checkpoint',
                        lambda *args: asked.append(args[0]))
    CheckpointLoader.load_checkpoint('open-mmlab://x')
    assert asked == [address]


def test_lists_of_models_hold_paths_below_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr('mmengine.runner.checkpoint.get_external_models', lambda: {'x': 'a/w.pth'})
    monkeypatch.setattr('mmengine.runner.checkpoint._get_mmengine_home', lambda: '/home/of/mm')
    monkeypatch.setattr('mmhybrid.compat.checkpoint_loader.read_checkpoint',
                        lambda *args: asked.append(args[0]))
    CheckpointLoader.load_checkpoint('openmmlab://x')
    assert asked == ['/home/of/mm/a/w.pth']
