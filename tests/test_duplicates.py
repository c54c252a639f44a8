"""Copied code: how many blocks stand twice, with a ceiling that only goes down."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('pylint')
ROOT = Path(__file__).resolve().parents[1]
LINES = 8  # a block of more than that, without comments, docstrings, imports and signatures
CODE = 'mmhybrid', 'tools', 'tests'
# Of configs, which have no functions to share and say what they are in full.
CEILING = dict(code=1, configs=1)


def duplicates(files):
    """Describe each block that stands in several files."""
    options = [f'--ignore-{what}' for what in ('comments', 'docstrings', 'imports', 'signatures')]
    done = subprocess.run(
        [sys.executable, '-c', 'from pylint import run_symilar; run_symilar()', '-d', str(LINES),
         *options, *map(str, files)], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and 'TOTAL lines=' in done.stdout, done.stdout + done.stderr
    found = done.stdout.partition('TOTAL lines=')[0].split(' similar lines in ')[1:]
    return [each.rpartition('\n')[0] for each in found]


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob('*.py')
                  if '.mim' not in path.parts)


@pytest.mark.slow
@pytest.mark.parametrize(('what', 'folders'), [('code', CODE), ('configs', ['configs'])])
def test_few_blocks_stand_twice(what, folders):
    found = duplicates(python_files(*folders))
    assert len(found) <= CEILING[what], '\n\n'.join(found)
    assert len(found) == CEILING[what], f'lower the ceiling of {what} to {len(found)}'


def test_copies_are_found(tmp_path):
    block = ''.join(f'value_{number} = make({number})\n' for number in range(LINES + 1))
    for name, end in (('a', ''), ('b', 'more = 1\n'), ('c', '')):
        text = block if name != 'c' else block.replace('value_3', 'other')
        (tmp_path / f'{name}.py').write_text(f'"""{name}."""\n{text}{end}')
    (found,) = duplicates(tmp_path.glob('*.py'))
    assert 'a.py' in found and 'b.py' in found and 'c.py' not in found
