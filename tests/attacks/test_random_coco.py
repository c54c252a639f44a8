"""Random damage to a valid annotation file: refused with a sentence that names it, or harmless.

What is accepted is loaded with masks by mmdet and scored by pycocotools to the end.
"""
import copy
import json
import random
import re
import resource

import pytest
from coco_cases import good, outcome
from PIL import Image

VALUES = (None, [], {}, '', 'x', '1', True, False, -1, 0, 1, 2, 0.5, 1e30, float('nan'),
          float('inf'), 10**30, 10**400, [1], [None], {'a': 1}, [[1, 2], [3, 4]], [1, 2, 3, 4],
          [[1, 2, 3, 4, 5, 6]], '\ud800', 'a\0b', 'ä')
BYTE_CASES, VALUE_CASES = 120, 220


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    pytest.importorskip('mmdet')
    from mmengine.registry import init_default_scope
    init_default_scope('mmdet')
    path = tmp_path_factory.mktemp('coco')
    for number in (1, 2):
        Image.new('RGB', (120, 100)).save(path / f'{number}.jpg')
    return path


def damaged_bytes(rng, data):
    """One to three flipped, inserted or removed bytes, or a cut."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data))
        kind = rng.randrange(7)
        if kind < 4:
            data[at] ^= 1 << rng.choice((0, 0, 1, 2, 5, 7))
        elif kind == 4:
            data[at:at] = bytes([rng.choice(b'\0\xff\xfe{}[],:"0e-')])
        elif kind == 5:
            del data[at:at + rng.randint(1, 4)]
        else:
            del data[at + 1:]
    return bytes(data)


def places(node, path=()):
    """Paths of all values below a node."""
    items = node.items() if isinstance(node, dict) else (
        enumerate(node) if isinstance(node, list) else ())
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def damaged_values(rng, content):
    """One to three values replaced, removed, doubled or exchanged."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = list(places(content))
        *path, key = rng.choice(paths)
        node = content
        for step in path:
            node = node[step]
        kind = rng.randrange(12)
        if kind > 9 and type(node[key]) in (int, float):
            node[key] *= rng.choice((-1, 0.5, 2, 100))
        elif kind < 6:
            node[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 6:
            del node[key]
        elif kind == 7 and isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        elif kind == 8:
            for _ in range(rng.choice((1, 1, 3, 3, 2000))):
                node[key] = [node[key]]
            return content  # nobody walks through this one again
        else:
            *path, other = rng.choice(paths)
            node[key] = copy.deepcopy(_at(content, (*path, other)))
    return content


def _at(node, path):
    for step in path:
        try:
            node = node[step]
        except (KeyError, IndexError, TypeError):
            return None
    return node


def dumped(content):
    """JSON of a tree that may be too deep for the json module."""
    try:
        return json.dumps(content)
    except RecursionError:
        return json.dumps(good()).replace('"width": 120', '"width": ' + '[' * 2000 + ']' * 2000, 1)


CATCH_ALL = re.compile(r'Traceback|\w+Error|\w+Exception|cannot be read')
NAMED = re.compile(
    r'line \d+, column \d+|position \d+|\bid -?[\d"]|(images|annotations|categories)\[\d+\]|"\w+" '
    r'(is|\d+ times)|is (a|an|just|encoded|empty) |lists no images|has no annotations?|'
    r'has (none of|no category for|more than one category|its categories)|the key "|does not exist')


@pytest.fixture
def bounded_memory():
    """No damage makes reading take a gigabyte more than the undamaged file."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def check_refusals(outcomes):
    for seed, text in outcomes.items():
        if text != 'used':
            assert 'a.json' in text and NAMED.search(text), (seed, text)
            assert not CATCH_ALL.search(text), (seed, text)
            assert len(text) < 3000, (seed, text)


def test_the_undamaged_file_is_used(folder):
    (folder / 'a.json').write_text(json.dumps(good()))
    assert outcome(folder) == 'used'


def test_damaged_bytes(folder, bounded_memory):
    data = json.dumps(good()).encode()
    outcomes = {}
    for seed in range(BYTE_CASES):
        (folder / 'a.json').write_bytes(damaged_bytes(random.Random(seed), data))
        outcomes[seed] = outcome(folder)
    check_refusals(outcomes)
    assert 5 < list(outcomes.values()).count('used') < BYTE_CASES // 2


def test_damaged_values(folder, bounded_memory):
    outcomes = {}
    for seed in range(VALUE_CASES):
        (folder / 'a.json').write_text(dumped(damaged_values(random.Random(seed), good())))
        outcomes[seed] = outcome(folder)
    check_refusals(outcomes)
    assert 20 < list(outcomes.values()).count('used') < VALUE_CASES * 0.7
