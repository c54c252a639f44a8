"""What a model costs, module by module, as text, CSV, JSON or Markdown."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .conventions import CONVENTIONS
from .macs import KINDS, Record

__all__ = ['Cost', 'Row', 'format_cost', 'summarize']

TOTAL = 'total'


@dataclass
class Row:
    """A module with all that is inside it.

    Attributes:
        module: its name; 'total' for the whole model.
        type: its class.
        parameters: number of parameters.
        macs: multiply-accumulates per kind.
        total: those that the convention counts.
    """

    module: str
    type: str
    parameters: int
    macs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    total: int = 0


@dataclass
class Cost:
    """What one forward pass of one image costs.

    Attributes:
        name: of the model.
        shape: (channels, height, width) of the image.
        convention: name in :data:`CONVENTIONS`.
        rows: the whole model first, then modules in their order.
        everything: multiply-accumulates of all kinds, whatever the convention leaves out.
        notes: what a reader has to know, such as the number of regions.
    """

    name: str
    shape: tuple[int, int, int]
    convention: str
    rows: list[Row]
    everything: int
    notes: list[str]

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.rows[0].parameters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole model, as the convention counts."""
        return self.rows[0].total

    def of_kind(self, kind: str) -> int:
        """Multiply-accumulates of one kind, whether or not the convention counts them."""
        return self.rows[0].macs[kind]


def summarize(model: nn.Module, records: Sequence[Record], convention: str, depth: int | None
           ) -> list[Row]:
    """One row for the model and one per module with parameters or cost.

    Args:
        model: the counted model.
        records: of :func:`count_macs`.
        convention: name in :data:`CONVENTIONS`.
        depth: dots in the longest name plus one; 0 for the total alone, None for everything.
    """
    rule = CONVENTIONS[convention]
    modules = dict(model.named_modules())
    rows = {'': Row(TOTAL, type(model).__name__, 0)}
    for name, module in modules.items():
        if name and (depth is None or name.count('.') < depth):
            rows[name] = Row(name, type(module).__name__, 0)
    for name, parameter in model.named_parameters():
        for ancestor in _ancestors(name.rpartition('.')[0]):
            if ancestor in rows:
                rows[ancestor].parameters += parameter.numel()
    for record in records:
        macs = rule.macs(record)
        for ancestor in _ancestors(record.module):
            if ancestor in rows:
                rows[ancestor].macs[record.kind] += macs
                rows[ancestor].total += macs if record.kind in rule.kinds else 0
    return [row for name, row in rows.items()
            if not name or row.parameters or any(row.macs.values())]


def _ancestors(name: str) -> list[str]:
    parts = name.split('.') if name else []
    return ['', *('.'.join(parts[:i + 1]) for i in range(len(parts)))]


def format_cost(cost: Cost, style: str) -> str:
    """Give a cost as 'text', 'csv' or 'json'."""
    return {'text': _text, 'csv': _csv, 'json': _json}[style](cost)


def _text(cost: Cost) -> str:
    rule = CONVENTIONS[cost.convention]
    kinds = [kind for kind in KINDS if cost.of_kind(kind)]
    # kinds that are not part of the total stand in brackets
    titles = [kind if kind in rule.kinds else f'({kind})' for kind in kinds]
    table = [['module', 'type', 'parameters M', *titles, 'total G']]
    for row in [*cost.rows[1:], cost.rows[0]]:
        name = '  ' * row.module.count('.') + row.module.rpartition('.')[2]
        table.append([name, row.type, f'{row.parameters / 1e6:.3f}',
                      *(f'{row.macs[kind] / 1e9:.3f}' for kind in kinds), f'{row.total / 1e9:.3f}'])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f'{cost.name}, image {" x ".join(map(str, cost.shape))}, multiply-accumulates in G',
             f'convention {cost.convention}: {rule.text}', *cost.notes, '']
    for i, cells in enumerate(table):
        if i in (1, len(table) - 1):
            lines.append('-' * (sum(widths) + 2 * len(widths) - 2))
        left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        lines.append('  '.join(left + right))
    return '\n'.join(lines)


def _csv(cost: Cost) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator='\n')
    writer.writerow(['module', 'type', 'parameters', *KINDS, 'total', 'convention', 'height',
                     'width'])
    for row in cost.rows:
        writer.writerow([row.module, row.type, row.parameters, *row.macs.values(), row.total,
                         cost.convention, *cost.shape[1:]])
    return stream.getvalue().rstrip('\n')


def _json(cost: Cost) -> str:
    return json.dumps(dict(
        model=cost.name, shape=cost.shape, convention=cost.convention, notes=cost.notes,
        parameters=cost.parameters, macs=cost.macs,
        macs_by_kind=cost.rows[0].macs,
        modules=[dict(module=row.module, type=row.type, parameters=row.parameters, macs=row.total,
                      macs_by_kind=row.macs) for row in cost.rows[1:]]), indent=2)
