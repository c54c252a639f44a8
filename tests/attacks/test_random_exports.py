"""Exports with one value replaced, or a file cut short: read, or refused by name; never a crash."""
import json
import os
import random
import shutil

import exports
import pytest

from mmhybrid.datasets.exports import ExportError, Questions, read_export
from mmhybrid.datasets.exports.preparing import prepare, write

ROUNDS = int(os.environ.get('EXPORT_ROUNDS', '30'))  # more by hand
ODD = (None, True, -1, 0, 3, 10**30, 1e308, float('nan'), float('inf'), '', 'text', '\u00e4\n', [],
       [[]], {}, {'a': 1}, [1, 2], ['x'])


def places(node, path=()):
    """Where values are in what JSON holds."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(
        node) if isinstance(node, list) else ()
    for key, value in children:
        yield from places(value, (*path, key))


def replaced(text, rng):
    content = json.loads(text)
    every = [path for path in places(content) if path]
    # As many from the few places near the top as from all coordinates.
    depth = rng.choice(sorted({len(path) for path in every}))
    *path, last = rng.choice([path for path in every if len(path) == depth])
    node = content
    for key in path:
        node = node[key]
    if rng.random() < 0.2:
        del node[last]
    else:
        node[last] = rng.choice(ODD)
    return json.dumps(content)


def cut(text, rng):
    place = rng.randrange(len(text))
    return text[:place] + rng.choice(('', '\0', '<', '9999', '{', 'nan')) + (
        text[place + rng.randrange(9):] if rng.random() < 0.7 else '')


@pytest.mark.parametrize(('make', 'options', 'pattern', 'change'), [
    (exports.coco, {}, '*.json', replaced), (exports.coco, dict(kind='cvat'), '*.json', replaced),
    (exports.labelme, {}, '*.json', replaced), (exports.labelme, {}, '*.json', cut),
    (exports.voc, {}, '*.xml', cut), (exports.yolo, {}, '*.txt', cut),
    (exports.yolo, dict(outlines=True), '*.yaml', cut),
], ids=lambda it: getattr(it, '__name__', str(it)))
def test_nothing_crashes(make, options, pattern, change, tmp_path):
    folder = make(tmp_path / 'data', 4, **options)
    out, refused = tmp_path / 'out', 0
    files = sorted(folder.rglob(pattern))
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        path = rng.choice(files)
        before = path.read_text()
        path.write_text(change(before, rng))
        try:
            questions = Questions({}, True)
            prepared = prepare(read_export(str(folder), questions), questions, None, 0.3, 0)
            out.mkdir()
            write(prepared, out)
        except ExportError as error:
            refused += 1
            assert str(error).endswith('.') and len(str(error)) > 40, str(error)
        except Exception as error:
            raise AssertionError(f'seed {seed}: {path.read_text()[:3000]}') from error
        shutil.rmtree(out, ignore_errors=True)
        path.write_text(before)
    assert refused < ROUNDS
