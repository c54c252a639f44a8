"""Tables, figures and ablations of the papers, read from ``configs/papers.yml``."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmengine.fileio import load

from mmhybrid.config_scheme import config_dir
from mmhybrid.errors import UserError
from mmhybrid.spelling import did_you_mean, nearest_few

__all__ = ['FILE', 'NOT_MEASURED', 'STATES', 'Claim', 'Paper', 'Row', 'find_claim', 'read_papers']

FILE = 'papers.yml'
NOT_MEASURED = 'not measured'
RUNS, NOT_BUILT, DRAWING = 'runs here', 'not built', 'drawing'
#: What a check needs that is not part of this repository.
NEEDS = ('needs ImageNet', 'needs COCO', 'needs ADE20K', 'needs a GPU')
#: How far a claim can be checked.
STATES = (RUNS, *NEEDS, NOT_BUILT, DRAWING)


@dataclass(frozen=True)
class Row:
    """One published figure.

    Attributes:
        name: what it is of.
        state: one of ``STATES``.
        published: as printed; '' where the paper has no such row.
        here: what was measured or counted here.
        command: checks it; '' where there is none.
        model: class and variant, for figures that are drawn from rows.
    """

    name: str
    state: str
    published: str = ''
    here: str = NOT_MEASURED
    command: str = ''
    model: str = ''


@dataclass(frozen=True)
class Claim:
    """A table or figure.

    Attributes:
        id: paper and place, such as 'vim/figure-1'.
        about: what it shows.
        rows: its figures.
        columns: what ``published`` holds.
        note: what a reader must know.
    """

    id: str
    about: str
    rows: tuple[Row, ...]
    columns: str = ''
    note: str = ''

    @property
    def place(self) -> str:
        """Such as 'Table S.1'."""
        kind, _, number = self.id.partition('/')[2].partition('-')
        return f'{kind.capitalize()} {number.upper().replace("S", "S.")}'

    @property
    def states(self) -> tuple[str, ...]:
        """Those of its rows, each once, in the order of ``STATES``."""
        own = {row.state for row in self.rows}
        return tuple(state for state in STATES if state in own)


@dataclass(frozen=True)
class Paper:
    """One paper.

    Attributes:
        id: short name.
        title: with year and arXiv number.
        tables, figures: numbers of all that it has.
        claims: in its order.
    """

    id: str
    title: str
    tables: tuple[str, ...]
    figures: tuple[str, ...]
    claims: tuple[Claim, ...]


def read_papers(path: str | Path | None = None) -> tuple[Paper, ...]:
    """Read all claims.

    Args:
        path: another file than ours.

    Raises:
        UserError: an entry lacks a key, has one too many or a state that does not exist.
    """
    path = Path(path or config_dir() / FILE)
    return tuple(_paper(name, entry, path) for name, entry in load(str(path)).items())


def find_claim(papers: Iterable[Paper], name: str) -> Claim:
    """Find a claim by its id.

    Raises:
        UserError: there is none of this name; the nearest ones are in the text.
    """
    claims = {claim.id: claim for paper in papers for claim in paper.claims}
    if name in claims:
        return claims[name]
    near = nearest_few(name, claims) or [
        known for known in claims if known.startswith(f'{name.partition("/")[0]}/')]
    raise UserError(f'There is no claim {name}.{did_you_mean(*near)} `mmhybrid reproduce --list` '
                    'names them all.')


def _paper(name: str, entry: dict, path: Path) -> Paper:
    where = f'{path}: {name}'
    claims = tuple(_claim(f'{name}/{place}', claim, path)
                   for place, claim in entry.pop('claims').items())
    fields = {key: tuple(map(str, value)) if key in ('tables', 'figures') else value
              for key, value in entry.items()}
    return _made(Paper, where, id=name, claims=claims, **fields)


def _claim(name: str, entry: dict, path: Path) -> Claim:
    where = f'{path}: {name}'
    shared = {key: entry.pop(key) for key in ('state', 'command') if key in entry}
    rows = tuple(_row(where, {**shared, **row}) for row in entry.pop('rows', [{'name': ''}]))
    if not re.fullmatch(r'[a-z]+/(table|figure)-s?\d+', name):
        raise UserError(f'{where}: expected a place such as table-2, figure-1 or table-s1.')
    return _made(Claim, where, id=name, rows=rows, **entry)


def _row(where: str, entry: dict) -> Row:
    where = f'{where}, row {entry.get("name")!r}'
    if entry.get('state') in (NOT_BUILT, DRAWING):
        entry = {'here': '', **entry}
    row = _made(Row, where, **entry)
    if row.state not in STATES:
        raise UserError(f'{where}: got state {row.state!r}, expected one of {", ".join(STATES)}.')
    return row


def _made(kind: type, where: str, **fields):
    known = {field.name: field for field in dataclasses.fields(kind)}
    wrong = set(fields) - set(known)
    missing = {name for name, field in known.items()
               if field.default is dataclasses.MISSING} - set(fields)
    if wrong or missing:
        said = [f'unknown {", ".join(sorted(wrong))}'] if wrong else []
        said += [f'without {", ".join(sorted(missing))}'] if missing else []
        raise UserError(f'{where}: {" and ".join(said)}; keys are {", ".join(known)}.')
    return kind(**fields)
