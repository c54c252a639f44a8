"""Random damage to valid configs: refused in a sentence that names file and key, or harmless."""
import copy
import functools
import random
import re
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmhybrid.engine.config import load_config
from mmhybrid.engine.settings import check_settings
from mmhybrid.engine.settings.tables import SETTINGS
from mmhybrid.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
NAMES = ('mask_rcnn_vmamba_t_coco.py', 'cascade_mambavision_t_coco.py',
         'upernet_swin_t_ade20k.py', 'classification/localvmamba_mini_imagenet.py')
HOSTILE = (None, -1, 'x', [], {}, float('nan'), dict(a=dict(b=[dict(type=3), None])), [[[]]],
           dict(type=None), dict(type='os.system', command='exit 3'), 10**400, b'\0', '../..')
LETTERS = 'abcdefghijklmnopqrstuvwxyz_'


@functools.cache
def contents(name):
    """A whole config as plain values. It was never written as one file, so nothing is a base."""
    content = load_config(str(CONFIGS / name))[0].to_dict()
    return {key: value for key, value in content.items() if key != 'work_dir'}


def paths(node, path=()):
    """Paths of all dictionary entries, however deep."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*path, key)
            yield from paths(value, (*path, key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from paths(value, (*path, index))


def owner(content, path):
    for key in path[:-1]:
        content = content[key]
    return content


def source(content):
    text = '\n'.join(f'{key} = {value!r}' for key, value in content.items())
    return re.sub(r'\bnan\b', "float('nan')", text) + '\n'


def load(tmp_path, text):
    """What the tools do with a config; returns the text of the refusal or None."""
    path = tmp_path / 'mutated.py'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        load_config(str(path))
    except UserError as error:
        assert str(path) in str(error), error
        return str(error)
    return None


def judge(tmp_path, content, seed):
    """Every third through a file, as the tools do it; the others from memory, which is faster."""
    if seed % 3 == 0:
        return load(tmp_path, source(content))
    cfg = Config(copy.deepcopy(content))
    try:
        check_settings(cfg, 'a config', set(cfg), {})
    except UserError as error:
        return str(error)
    return None


def edited(rng, name):
    """A name with one letter dropped, added or changed, or two neighbours swapped."""
    new = name
    while new == name or not new.isidentifier():
        at = rng.randrange(len(name))
        letter = rng.choice(LETTERS)
        new = rng.choice((
            name[:at] + name[at + 1:], name[:at] + letter + name[at:],
            name[:at] + letter + name[at + 1:],
            name[:at] + name[at + 1:at + 2] + name[at:at + 1] + name[at + 2:]))
    return new


def mutant(seed, wanted=lambda path: True):
    """(random source, a config's content, the path of one of its entries)."""
    rng = random.Random(seed)
    content = copy.deepcopy(contents(NAMES[seed % len(NAMES)]))
    return rng, content, rng.choice([path for path in paths(content) if wanted(path)])


def is_setting(path):
    """No variable of the files, and no part of a parameter's name, which takes a model to judge."""
    return path[0] in SETTINGS and path[-2:-1] != ('custom_keys',)


@pytest.mark.parametrize('seed', range(150))
def test_renamed(tmp_path, seed):
    rng, content, path = mutant(seed, is_setting)
    node = owner(content, path)
    new = edited(rng, path[-1])
    node[new] = node.pop(path[-1])
    text = judge(tmp_path, content, seed)
    where = '.'.join(map(str, (*path[:-1], new)))
    assert text is not None and f'\n  {where}=' in text, (where, path[-1], text)
    assert f'Did you mean {path[-1]!r}?' in text


def is_type(path):
    return path[0] in SETTINGS and path[-1] == 'type'


@pytest.mark.parametrize('seed', range(50))
def test_a_type_with_a_letter_twice(tmp_path, seed):
    rng, content, path = mutant(seed, is_type)
    node = owner(content, path)
    at = rng.randrange(node['type'].rfind('.') + 1, len(node['type']))
    right = node['type']
    node['type'] = right[:at] + right[at] + right[at:]
    text = judge(tmp_path, content, seed)
    assert text is not None and f'\n  {".".join(map(str, path))}=' in text, (right, text)
    assert 'is registered. Did you mean' in text


@pytest.mark.parametrize('seed', range(70))
def test_replaced(tmp_path, seed):
    rng, content, path = mutant(seed)
    owner(content, path)[path[-1]] = rng.choice(HOSTILE)
    text = judge(tmp_path, content, seed)
    assert text is None or str(path[0]) in text, text


@pytest.mark.parametrize('seed', range(20))
def test_deleted(tmp_path, seed):
    _, content, path = mutant(seed)
    del owner(content, path)[path[-1]]
    text = judge(tmp_path, content, seed)
    assert text is None or str(path[0]) in text, text


@pytest.mark.parametrize('seed', range(50))
def test_damaged_text(tmp_path, seed):
    rng = random.Random(seed)
    text = source(contents(NAMES[seed % len(NAMES)])).encode()
    at = rng.randrange(len(text))
    brackets = [match.start() for match in re.finditer(rb'[(){}\[\]]', text)]
    lines = [match.start() for match in re.finditer(rb'\n', text)][:-1]
    bracket, line = rng.choice(brackets), rng.choice(lines) + 1
    damage = ('bracket', 'cut', 'tab', 'binary', 'null')[seed // 10]
    damaged = dict(
        bracket=text[:bracket] + text[bracket + 1:], cut=text[:at],
        tab=text[:line] + b'\t' + text[line:], binary=text[:at] + b'\xff\xfe\x80' + text[at:],
        null=text[:at] + b'\0' + text[at:])[damage]
    said = load(tmp_path, damaged)
    if damage == 'cut' and said is None:
        return  # between two lines
    assert said is not None
    assert re.search(r'line \d+|byte|null bytes|is empty', said), said


@pytest.mark.parametrize('value', ['this.Zen', 'antigravity.fly', 'mmhybrid_attack.registry.X'])
def test_looking_up_a_type_imports_nothing(tmp_path, monkeypatch, value):
    package = tmp_path / 'mmhybrid_attack'
    package.mkdir()
    (package / '__init__.py').write_text('raise SystemExit("ran")')
    (package / 'registry.py').write_text('')
    monkeypatch.syspath_prepend(str(tmp_path))
    content = copy.deepcopy(contents(NAMES[0]))
    content['model']['neck'] = dict(type=value, anything=1)
    content['model']['backbone'] = dict(type='Net', _scope_='mmhybrid_attack')
    assert load(tmp_path, source(content)) is None
    assert value.partition('.')[0] not in sys.modules


def test_the_default_scope_imports_nothing_of_strangers(tmp_path, monkeypatch):
    (tmp_path / 'mmhybrid_scope').mkdir()
    (tmp_path / 'mmhybrid_scope' / '__init__.py').write_text('raise SystemExit("ran")')
    monkeypatch.syspath_prepend(str(tmp_path))
    content = {**contents(NAMES[0]), 'default_scope': 'mmhybrid_scope'}
    assert load(tmp_path, source(content)) is None
