"""Names that were probably meant, and how to say so."""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ['did_you_mean', 'is_slip', 'nearest', 'nearest_few', 'suggestion']


def edits(left: str, right: str) -> int:
    """Letters to add, drop or change, or neighbours to swap, to get from one name to the other."""
    before, row = [], list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        before, last, row = row, before, [i]
        for j, b in enumerate(right, start=1):
            cost = min(last_cost := before[j - 1] + (a != b), before[j] + 1, row[-1] + 1)
            if i > 1 < j and a == right[j - 2] and b == left[i - 2] and a != b:
                cost = min(cost, last[j - 2] + 1, last_cost)
            row.append(cost)
    return row[-1]


def is_slip(name: str, valid: str, most: int | None = None) -> bool:
    """Whether ``name`` is so near to ``valid`` that it is hardly a name of its own.

    Who numbers names, such as ``img`` and ``img2``, means every one of them.

    Args:
        name: what came.
        valid: a known name.
        most: edits; None allows 1, and 2 in names of eight letters and more.
    """
    if most is None:
        most = 2 if min(len(name), len(valid)) >= 8 else 1
    if abs(len(name) - len(valid)) > most or len(valid) < 2:
        return False
    return _unnumbered(name) != _unnumbered(valid) and edits(name, valid) <= most


def _unnumbered(name: str) -> str:
    return re.sub(r'_?\d+', '', name)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that was probably meant: fewest edits, then most in common."""
    valid = sorted({str(each) for each in valid})
    slips = [each for each in valid if is_slip(name, each)]
    if slips:
        return min(slips, key=lambda each: edits(name, each))
    near = nearest_few(name, valid, 1) or [
        each for each in valid if len(each) > 2 and name.startswith(each)]
    return near[0] if near else None


def nearest_few(name: str, valid: Iterable[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """Up to ``count`` valid names that have most in common with ``name``, the nearest first."""
    return difflib.get_close_matches(name, list(map(str, valid)), n=count, cutoff=cutoff)


def did_you_mean(*names: str) -> str:
    """Ask for these names in a sentence that follows another; '' if there are none."""
    return f' Did you mean {" or ".join(map(repr, names))}?' if names else ''


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Say which valid name is nearest to ``name`` and list all of them.

    Returns:
        For example ``"did you mean 'with_cp'? Valid: arch, with_cp"``.
    """
    valid = list(valid)
    nearest = nearest_few(str(name).lower(), valid, 1, 0.4)
    question = f'did you mean {nearest[0]!r}? ' if nearest else ''
    return f'{question}Valid: {", ".join(valid)}'
