"""Claims as text and as a page."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .claims import NOT_MEASURED, STATES, Claim, Paper, Row

__all__ = ['as_page', 'as_text', 'overview']

_INTRODUCTION = """\
# Claims of the papers, and the commands that check them

Made from `configs/papers.yml` by `mmhybrid reproduce --page configs/papers.md`; change that file,
not this one. Each table, figure and ablation of the papers has its place here, with what was
printed, what came out here, and how far it can be checked:

{legend}

`mmhybrid reproduce CLAIM` prints a claim and runs those of its commands that run here; `--row NAME`
runs that of one row, whatever it needs. "{not_measured}" is what nobody has measured with this
package; nothing under "here" is copied from a paper. Small configs for generated data
(`configs/ablations`) show that a setting trains; differences of a few points between them are
within the noise of seeds, and they say nothing about the published ones.
"""
_MEANINGS = {
    'runs here': 'on any machine, with data that a command generates or with none',
    'needs ImageNet': 'with the data set, and GPUs where it trains',
    'needs COCO': 'the same',
    'needs ADE20K': 'the same',
    'needs a GPU': 'to be measured on one',
    'not built': 'there is no such setting here, or nothing to draw it with',
    'drawing': 'a sketch or a description, with nothing to measure',
}


def overview(papers: Iterable[Paper]) -> str:
    """One line for each claim."""
    lines = []
    for paper in papers:
        width = max(len(claim.id) for claim in paper.claims)
        lines += [f'{paper.title}']
        lines += [f'  {claim.id:{width}}  {claim.about} ({", ".join(claim.states)})'
                  for claim in paper.claims]
        lines.append('')
    return '\n'.join(lines).rstrip()


def as_text(claim: Claim) -> str:
    """A claim with its rows, for a terminal."""
    lines = [f'{claim.id}: {claim.about}']
    if claim.note:
        lines.append(claim.note)
    for row in claim.rows:
        lines.append(f'  {row.name or claim.place}: {row.state}')
        if row.published:
            columns = f' ({claim.columns})' if claim.columns else ''
            lines.append(f'    published  {row.published}{columns}')
        if row.here:
            lines.append(f'    here       {row.here}')
        if row.command:
            lines.append(f'    command    {row.command}')
    return '\n'.join(lines)


def as_page(papers: Sequence[Paper]) -> str:
    """All claims as Markdown, without a final newline."""
    legend = '\n'.join(f'- **{state}**: {_MEANINGS[state]}' for state in STATES)
    lines = [_INTRODUCTION.format(legend=legend, not_measured=NOT_MEASURED), *_counts(papers)]
    for paper in papers:
        lines += ['', f'## {paper.title}']
        for claim in paper.claims:
            lines += ['', f'### {claim.place}: {claim.about}', '', f'`{claim.id}`', '']
            if claim.note:
                lines += [claim.note, '']
            lines += _table(claim)
    return '\n'.join(lines).rstrip()


def _counts(papers: Sequence[Paper]) -> list[str]:
    """How many rows of each paper are in which state."""
    lines = [f'| rows | {" | ".join(STATES)} |', '|---|' + '---|' * len(STATES)]
    for paper in papers:
        counts = Counter(row.state for claim in paper.claims for row in claim.rows)
        lines.append(f'| {paper.id} | ' + ' | '.join(str(counts[s]) for s in STATES) + ' |')
    return lines


def _table(claim: Claim) -> list[str]:
    if len(claim.rows) == 1 and not claim.rows[0].name:
        return [f'{claim.rows[0].state}']
    published = f'published: {claim.columns}' if claim.columns else 'published'
    lines = [f'| | {published} | here | state | command |', '|---|---|---|---|---|']
    before = ''
    for row in claim.rows:
        command = 'the same' if row.command == before else f'`{row.command}`'
        lines.append('| ' + ' | '.join(_cells(row, command if row.command else '')) + ' |')
        before = row.command
    return lines


def _cells(row: Row, command: str) -> tuple[str, ...]:
    return tuple(cell.replace('|', r'\|') for cell in (
        row.name, row.published or '-', row.here or '-', row.state, command))
