"""Published parameters and multiply-accumulates beside what is counted here."""
from __future__ import annotations

import os.path as osp
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmengine.fileio import load

from mmhybrid.analysis import Cost
from mmhybrid.errors import UserError

from .complexity import measure
from .source import find_model

__all__ = ['CountedRow', 'agrees', 'count_row', 'markdown', 'read_published']

_KEYS = {'name', 'model', 'shape', 'published', 'source', 'convention'}
_OPTIONAL = {'options', 'why'}
NOT_PUBLISHED = '-'


@dataclass
class CountedRow:
    """A published row and what is counted.

    Attributes:
        row: of the file of published numbers.
        cost: as the row's convention counts.
    """

    row: dict
    cost: Cost

    @property
    def counted(self) -> tuple[float, float]:
        """Parameters in M and multiply-accumulates in G."""
        return self.cost.parameters / 1e6, self.cost.macs / 1e9

    @property
    def reproduces(self) -> tuple[bool, bool]:
        """Whether parameters and multiply-accumulates agree with what was printed."""
        return tuple(agrees(printed, count)
                     for printed, count in zip(self.row['published'], self.counted, strict=True))


def agrees(printed: str, count: float, tolerance: float = 0.005) -> bool:
    """Whether a count is what was printed: rounded, cut off, or within ``tolerance``."""
    if printed == NOT_PUBLISHED:
        return True
    unit = 10.0 ** -len(printed.partition('.')[2])
    value = float(printed)
    return -unit / 2 <= count - value < unit or abs(count - value) <= tolerance * value


def read_published(path: str) -> dict[str, list[dict]]:
    """Rows by section.

    Raises:
        UserError: if a row lacks a key or has one too many.
    """
    if not osp.isfile(path):
        raise UserError(f'There is no table of published numbers {path}.')
    sections = load(path)
    for rows in sections.values():
        for row in rows:
            wrong = (_KEYS - set(row)) | (set(row) - _KEYS - _OPTIONAL)
            if wrong:
                raise UserError(f'{path}: row {row.get("name")!r} lacks or should not have '
                                f'{", ".join(sorted(wrong))}.')
    return sections


def count_row(row: dict, folder: str) -> CountedRow:
    """Count what a row describes; configs are looked for in ``folder``."""
    model = row['model']
    source = find_model(osp.join(folder, model) if model.endswith('.py') else model,
                        row.get('options'))
    return CountedRow(row, measure(source, row['shape'], row['convention'], depth=0))


def markdown(sections: dict[str, Sequence[CountedRow]], path: str) -> str:
    """The table as a page.

    Args:
        sections: rows by section.
        path: of the file of published numbers, as it is named on the page.
    """
    lines = [
        '# Parameters and multiply-accumulates: published and counted', '',
        f'Made from `{path}` by `python tools/get_flops.py {path}`; change that file, not this '
        'one. Every number that is not under "published" is counted by the tool on the full-size '
        'model. Multiply-accumulates in G (papers say FLOPs); the conventions are explained by '
        '`python tools/get_flops.py --help`. "Everything" counts convolutions, linear layers, '
        'attention products, scans, norms and resizing, whatever was published. A number '
        'reproduces if it is what was printed, once rounded or cut off to the printed digits, or '
        'within 0.5 % of it.', '']
    for title, rows in sections.items():
        lines += [f'## {title}', '',
                  '| model | image | parameters M: published | counted | cost G: published '
                  '| counted | convention | everything | reproduces | source |',
                  '|---|---|---|---|---|---|---|---|---|---|']
        for it in rows:
            parameters, macs = it.counted
            lines.append('| ' + ' | '.join([
                it.row['name'], ' x '.join(map(str, it.row['shape'])),
                it.row['published'][0], f'{parameters:.3f}', it.row['published'][1],
                _digits(macs), it.row['convention'], _digits(it.cost.everything / 1e9),
                _verdict(it), it.row['source']]) + ' |')
        reasons: dict[str, list[str]] = {}
        for it in rows:
            if 'why' in it.row:
                reasons.setdefault(' '.join(it.row['why'].split()), []).append(it.row['name'])
        lines += ['', *(f'- {"; ".join(names)}: {why}' for why, names in reasons.items()), '']
    return re.sub('\n{3,}', '\n\n', '\n'.join(lines)).rstrip()


def _digits(value: float) -> str:
    return f'{value:.3f}' if value < 100 else f'{value:.1f}'


def _verdict(it: CountedRow) -> str:
    words = []
    for what, printed, good in zip(('parameters', 'cost'), it.row['published'], it.reproduces,
                                   strict=True):
        if printed != NOT_PUBLISHED:
            words.append((what, good))
    if all(good for _, good in words):
        return 'yes'
    if not any(good for _, good in words):
        return '**no**'
    return ', '.join(f'{what} {"yes" if good else "**no**"}' for what, good in words)
