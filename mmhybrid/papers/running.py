"""Run the commands of claims."""
from __future__ import annotations

import shlex
import subprocess
import sys

from mmhybrid.config_scheme import config_dir
from mmhybrid.errors import UserError

from .claims import RUNS, Claim, Row

__all__ = ['chosen_rows', 'run_rows', 'words_of']


def chosen_rows(claim: Claim, name: str | None) -> list[Row]:
    """Rows whose commands are to run: that of a name, or all that run here, each command once.

    Raises:
        UserError: there is no such row, it has no command, or nothing of the claim runs here.
    """
    if name is not None:
        rows = [row for row in claim.rows if row.name == name]
        if not rows:
            raise UserError(f'{claim.id} has no row {name!r}; its rows are '
                            f'{", ".join(repr(row.name) for row in claim.rows)}.')
        if not rows[0].command:
            raise UserError(f'{name} of {claim.id} has no command: {rows[0].state}.')
        return rows
    rows = {row.command: row for row in claim.rows if row.state == RUNS and row.command}
    if not rows:
        raise UserError(f'Nothing of {claim.id} runs on any machine: {", ".join(claim.states)}. '
                        'Where that is at hand, --row NAME runs the command of one row.')
    return [*rows.values()]


def words_of(command: str, extra: list[str]) -> list[str]:
    """A command as words for a new process: this Python, and our files from any folder."""
    root = config_dir().parent
    words = [str(root / word) if word.startswith(('configs/', 'tools/')) else word
             for word in shlex.split(command)]
    start = {'python': [sys.executable], 'mmhybrid': [sys.executable, '-m', 'mmhybrid']}[words[0]]
    return [*start, *words[1:], *extra]


def run_rows(rows: list[Row], extra: list[str]) -> int:
    """Run commands one after the other.

    Args:
        rows: of :func:`chosen_rows`.
        extra: words behind each command.

    Returns:
        The status of the first command that fails, else 0.
    """
    for row in rows:
        print(f'\n$ {row.command} {shlex.join(extra)}'.rstrip(), flush=True)
        status = subprocess.run(words_of(row.command, extra)).returncode
        if status:
            return status if status > 0 else 128 - status
    return 0
