"""What README and docs show runs as it is written; only training is shortened."""
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[1]
# In reading order: commands of a page use what those of earlier pages wrote.
PAGES = ('README', *(f'docs/{name}' for name in (
    'getting_started', 'train', 'small_gpus', 'many_gpus', 'own_data', 'predict', 'export',
    'weights', 'backbones', 'configs', 'speed', 'scan', 'plugin', 'patches', 'measuring', 'papers',
    'api', 'extending', 'troubleshooting', 'limits')))
TEXT = {page: (ROOT / f'{page}.md').read_text() for page in PAGES}
README = TEXT['README']
ALL = '\n'.join(TEXT.values())

# Run by .ci/run itself (asserted below): they make an environment.
SET_UP = ('bash tools/quickstart.sh', 'bash tools/run_tests.sh')
# They change the environment that the tests run in, or need what only a user has, or another test
# runs the same command.
NOT_HERE = {
    'pip install': 'tests/test_packaging.py installs the package',
    'git clone': 'the tests run in a clone',
    'mmhybrid doctor': 'tests/test_doctor.py runs it on this environment',
    'python tools/get_flops.py': 'tests/test_tools/test_get_flops.py runs it on the same config',
    'mmhybrid export': 'tests/test_export/test_whole.py runs it',
    'mmhybrid predict data/mini_coco/val2017/ --weights mini.onnx':
        'tests/test_export/test_whole.py runs it',
    'bash tools/dist_test.sh configs/cascade_mambavision_mini_coco.py':
        'tests/test_tools/test_distributed.py compares its metrics with those of one process',
}
SHORTER = {
    'cascade_mambavision_mini_coco': 'train_cfg.max_epochs=1 train_cfg.val_interval=1',
    'upernet_mambavision_mini_ade20k':
        'train_cfg.max_iters=4 train_cfg.val_interval=4 default_hooks.checkpoint.interval=4',
    'upernet_localvmamba_mini_ade20k':
        'train_cfg.max_iters=4 train_cfg.val_interval=4 default_hooks.checkpoint.interval=4',
    'localvmamba_mini_imagenet': 'train_cfg.max_epochs=1 train_cfg.val_interval=1',
}


def commands() -> list[str]:
    """Of all pages, each once."""
    blocks = re.findall(r'```bash\n(.*?)```', ALL, re.S)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    lines = [re.sub(r'\s+#.*', '', line).strip() for line in lines]
    lines = [re.sub(r'\s+', ' ', line) for line in lines if line and not line.startswith('#')]
    return list(dict.fromkeys(lines))


def epochs() -> int:
    from mmengine.config import Config
    return Config.fromfile(ROOT / 'configs/cascade_mambavision_mini_coco.py').train_cfg.max_epochs


def python_block(first_line: str) -> str:
    for block in re.findall(r'```python\n(.*?)```', ALL, re.S):
        if block.startswith(first_line):
            return block
    raise AssertionError(f'no page has a python block that starts with {first_line!r}')


def test_every_page_is_read():
    assert {f'docs/{path.stem}' for path in (ROOT / 'docs').glob('*.md')} == set(PAGES[1:])
    names = re.findall(r'\bdocs/(\w+)\.md\)', README)
    assert {f'docs/{name}' for name in names} == set(PAGES[1:])  # README leads to all of them
    site = re.findall(r'^ +- (.*)\.md$', (ROOT / 'mkdocs.yml').read_text(), re.M)
    assert set(PAGES) < set(site)
    for page in site:
        assert (ROOT / f'{page}.md').exists(), page


def test_links_lead_somewhere():
    for page, text in TEXT.items():
        folder = (ROOT / page).parent
        for link in re.findall(r'\]\(((?!https?:)[^)\s]+)\)', text):
            path, _, anchor = link.partition('#')
            target = folder / path if path else ROOT / f'{page}.md'
            assert target.exists(), f'{page}.md: {link}'
            if anchor:
                heads = re.findall(r'^#+ (.*)$', target.read_text(), re.M)
                assert anchor in [re.sub(r'[^\w -]', '', head.lower()).replace(' ', '-')
                                  for head in heads], f'{page}.md: {link}'


def test_messages_are_those_of_the_code():
    """Troubleshooting quotes what the package says; '...' is what differs."""
    said = ['']
    for path in (ROOT / 'mmhybrid').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    said = '\n'.join(said)
    messages = re.findall(r'^\| `([^`]+)` \|', TEXT['docs/troubleshooting'], re.M)
    theirs = {"No module named 'mmcv._ext'", 'is not in the ... registry',
              'mmengine does not support to load mmhybrid config'}
    assert theirs < set(messages) and len(messages) > 20
    for message in set(messages) - theirs:
        for part in message.split('...'):
            assert part in said, message


def test_readme_is_one_screen():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert sum(line.startswith('| `') for line in lines) <= 10
    for path in (ROOT / 'docs/images').iterdir():
        assert path.stat().st_size < 300_000 and path.name in ALL


def test_a_backbone_in_six_lines():
    code = python_block('import torch\n')
    assert len(code.splitlines()) == 6
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    maps = ['(1, 80, 56, 56)', '(1, 160, 28, 28)', '(1, 320, 14, 14)', '(1, 640, 7, 7)']
    assert [line for line in done.stdout.splitlines() if line.startswith('(')] == maps


def test_the_checkpoint_is_the_last_one():
    assert set(re.findall(r'epoch_(\d+)\.pth', ALL)) == {str(epochs())}


def test_ci_runs_the_set_up_commands():
    ci = (ROOT / '.ci' / 'run').read_text()
    written = [line for line in commands() if line.startswith(SET_UP)]
    assert {'bash tools/quickstart.sh', 'bash tools/run_tests.sh'} <= set(written)
    for command in SET_UP:
        assert re.search(rf'^(\w+=\w+ )?{re.escape(command)}\b', ci, re.M), command


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A copy of the tracked files, as a user's clone."""
    folder = tmp_path_factory.mktemp('readme') / 'mmhybrid'
    for name in ('mmhybrid', 'configs', 'tools'):
        shutil.copytree(ROOT / name, folder / name,
                        ignore=shutil.ignore_patterns('__pycache__', '.mim'))
    return folder


def test_commands_run(clone, tmp_path):
    """In order, in one folder: later commands use what earlier ones wrote."""
    env = dict(os.environ, PYTHONPATH=str(clone), PYTHON=sys.executable, OMP_NUM_THREADS='1',
               PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    for command in commands():
        if command.startswith(SET_UP) or command.startswith(tuple(NOT_HERE)):
            continue
        # the shortened training ends with its first epoch
        words = shlex.split(command.replace(f'epoch_{epochs()}.pth', 'epoch_1.pth'))
        if 'train' in words[1] or 'search' in words[1]:
            options = next(SHORTER[name] for name in SHORTER if name in command)
            words += options.split() if '--cfg-options' in words else ['--cfg-options',
                                                                       *options.split()]
        if 'prepare_data' in words[1]:
            # every class needs an image, and a batch of classification 20
            words += ['--train', '20' if 'imagenet' in command else '8', '--val', '5']
        done = warm.run(words, clone, env, tmp_path / 'output')
        assert done.returncode == 0, f'{command}\n{done.stdout[-6000:]}'
    shown = ' '.join(commands())
    for tool in ('tools/prepare_data.py', 'tools/train.py', 'tools/test.py', 'tools/dist_test.sh',
                 'tools/visualize.py', 'tools/search_directions.py', 'tools/get_flops.py',
                 'tools/benchmark/model.py'):
        assert tool in shown, f'no page shows {tool}'


def test_costs_are_those_of_the_whole_table():
    whole = (ROOT / 'configs/complexity.md').read_text().splitlines()
    rows = re.findall(r'^\| .* \| (?:yes|.*\*\*no\*\*.*) \| .* \|$', ALL, re.M)
    assert len(rows) > 8
    assert set(rows) <= set(whole)


def test_plugin_config_builds_elsewhere(tmp_path):
    """The lines for an mm project, in a folder of their own, on a detector with a ResNet."""
    (tmp_path / 'your_detector.py').write_text(
        "model = dict(backbone=dict(type='ResNet', depth=50, frozen_stages=1, init_cfg=dict("
        "type='Pretrained', checkpoint='torchvision://resnet50')),\n"
        "             neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048]))\n")
    (tmp_path / 'mine.py').write_text(python_block("_base_ = './your_detector.py'"))
    code = (
        'from mmengine.config import Config; from mmengine.registry import MODELS;'
        "c = Config.fromfile('mine.py'); m = MODELS.build(c.model.backbone);"
        'print(m.out_channels, c.model.neck.in_channels)')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True,
                          text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert '(80, 160, 320, 640) [80, 160, 320, 640]' in done.stdout


@pytest.mark.parametrize('base, task, classes', [
    ('mmhybrid::cascade_mambavision_t_coco.py', 'detector', 3),
    ('mmhybrid::upernet_mambavision_t_ade20k.py', 'segmentor', 2)])
def test_own_data(tmp_path, monkeypatch, base, task, classes):
    """The configs for own data: everything that is checked before training fits."""
    pytest.importorskip('mmdet' if task == 'detector' else 'mmseg')
    from mmengine.config import Config
    from mmengine.registry import DATASETS, MODELS, init_default_scope
    from PIL import Image

    from mmhybrid.datasets.loading.checks import check_classes, check_data
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(python_block(f"_base_ = '{base}'"))
    cfg = Config.fromfile('mine.py')
    names = cfg.metainfo.classes
    assert len(names) == classes
    folder = tmp_path / cfg.data_root
    for split in ('train', 'val'):
        images = folder / ('images' if task == 'detector' else f'images/{split}')
        images.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 48)).save(images / f'{split}.jpg')
        if task == 'detector':
            (folder / f'{split}.json').write_text(json.dumps(dict(
                images=[dict(id=1, file_name=f'{split}.jpg', width=64, height=48)],
                annotations=[dict(id=1, image_id=1, category_id=30, bbox=[0, 0, 40, 40], area=1600,
                                  segmentation=[[0, 0, 40, 0, 40, 40]], iscrowd=0)],
                categories=[dict(id=10 * (i + 1), name=name) for i, name in enumerate(names)])))
        else:
            labels = folder / f'labels/{split}'
            labels.mkdir(parents=True)
            Image.new('L', (64, 48), 1).save(labels / f'{split}.png')
    init_default_scope(cfg.default_scope)
    check_data(cfg, ['train', 'val', 'test'])
    assert check_classes(cfg, ['train', 'val', 'test']) == []
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        sample = DATASETS.build(loader.dataset)[0]['data_samples']
        labels = sample.gt_instances.labels if task == 'detector' else sample.gt_sem_seg.data
        assert labels.max() == classes - 1
    if task == 'detector':
        for path in folder.glob('*.json'):
            path.write_text(path.read_text().replace('"segmentation"', '"unused"'))
        with pytest.raises(ValueError, match='without a segmentation'):
            check_classes(cfg, ['train'])
        options = re.search(r'mine.py --cfg-options (.*?)```', ALL, re.S)[1].replace('\\\n', '')
        cfg.merge_from_dict(dict(
            (key, {'None': None, 'False': False}.get(value, value))
            for key, value in (option.split('=') for option in options.split())))
        assert check_classes(cfg, ['train', 'val', 'test']) == []
        head = MODELS.build(dict(cfg.model.roi_head, train_cfg=cfg.model.train_cfg.rcnn,
                                 test_cfg=cfg.model.test_cfg.rcnn))
        assert not head.with_mask and len(head.bbox_head) == 3
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            assert 'masks' not in DATASETS.build(loader.dataset)[0]['data_samples'].gt_instances
        assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == 'bbox'


def test_backbone_table_is_measured():
    """Every variant has a row, with what the built model says of itself."""
    import torch

    from mmhybrid.models.backbones import localvim, localvmamba, mambavision, vim, vmamba
    modules = dict(MambaVision=mambavision, VMamba=vmamba, LocalVMamba=localvmamba, Vim=vim,
                   LocalVim=localvim)
    rows, family = {}, ''
    for name, arch, alias, *facts in re.findall(
            r'^\| (?:`(\w+)`)? ?\| `(\w+)`(?: \(`(\w+)`\))? '
            r'\| ([\d, ]+) \| ([\d, ]+) \| ([\d,]+) \|$', ALL, re.M):
        family = name or family
        for spelling in filter(None, (arch, alias)):
            rows[family, spelling] = facts
    assert set(rows) == {(family, arch) for family, module in modules.items()
                         for arch in module.ARCHITECTURES}
    for (family, arch), (channels, strides, parameters) in rows.items():
        with torch.device('meta'):
            model = getattr(modules[family], family)(arch)
        assert channels == ', '.join(map(str, model.out_channels)), (family, arch)
        assert strides == ', '.join(map(str, model.out_strides)), (family, arch)
        assert parameters == f'{sum(p.numel() for p in model.parameters()):,}', (family, arch)


def test_config_table_is_measured():
    """Rows have the parameter counts of tests/data/recipes.json; so many configs have none."""
    recipes = json.loads((ROOT / 'tests/data/recipes.json').read_text())
    rows = dict(re.findall(r'^\| `(\w+)\.py` \| [^|]*\| ([\d,]+) \|', ALL, re.M))
    names = {path.stem for path in (ROOT / 'configs').glob('*.py')}
    published = {name for name in names if not re.search('_(mini|tight)_', name)}
    more, = re.findall(r'(\d+) configs more', ALL)
    assert set(rows) < published and len(published - set(rows)) == int(more)
    for name, count in rows.items():
        assert int(count.replace(',', '')) == recipes[name]['parameters'], name
