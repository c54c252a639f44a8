"""Scan directions of the published LocalMamba networks, one line per block.

Lines are in the order of the blocks; the place of a direction in its line is the index of its
weights.
"""
from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from mmengine.logging import print_log

from mmhybrid.ops.cross_scan import scan_plan

__all__ = ['ColumnRestore', 'LOCAL_VIM', 'LOCAL_VMAMBA_SMALL', 'LOCAL_VMAMBA_TINY', 'UNSEARCHED',
           'resolve_directions']


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(line.split()) for line in text.strip().splitlines())


#: What the networks without search use in each block.
UNSEARCHED = ('h', 'h_flip', 'w2', 'w2_flip')

#: LocalVim-T, its form with a middle class token, and LocalVim-S for dense tasks.
LOCAL_VIM = _table("""
    h v_flip w7 w7_flip
    h_flip w2_flip w7 w7_flip
    h h_flip v w7
    h h_flip v v_flip
    h h_flip v v_flip
    h h_flip v v_flip
    h_flip v v_flip w7
    h_flip v v_flip w2_flip
    h h_flip v v_flip
    h h_flip v v_flip
    h v v_flip w2
    h v v_flip w2_flip
    h h_flip v_flip w7
    h_flip v v_flip w2
    h h_flip v v_flip
    h v w2 w2_flip
    v v_flip w2 w7
    h h_flip v w2
    h h_flip w2_flip w7
    v v_flip w2 w2_flip
""")

#: Depths 2, 2, 9, 2.
LOCAL_VMAMBA_TINY = _table("""
    h h_flip w7 w7_flip
    h_flip v_flip w2 w2_flip
    h_flip v_flip w2_flip w7
    h_flip v v_flip w2
    h h_flip v_flip w2_flip
    h_flip v_flip w2 w2_flip
    h w2_flip w7 w7_flip
    h h_flip v v_flip
    h v_flip w7 w7_flip
    h_flip v w2 w7_flip
    v v_flip w2 w7_flip
    h h_flip v_flip w2_flip
    v_flip w2_flip w7 w7_flip
    h_flip v_flip w2_flip w7_flip
    h_flip v w7 w7_flip
""")

#: Depths 2, 2, 27, 2.
LOCAL_VMAMBA_SMALL = _table("""
    h v v_flip w7_flip
    h h_flip v w7
    h_flip v v_flip w7
    h_flip v w2_flip w7
    h_flip v w2_flip w7
    h_flip v_flip w2 w7_flip
    h_flip v v_flip w7
    h v v_flip w7
    h v v_flip w7
    h v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w2
    v v_flip w2_flip w7
    h h_flip v w2
    h_flip v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w7_flip
    h v v_flip w7_flip
    h h_flip v_flip w7
    h_flip v_flip w2_flip w7
    h_flip v v_flip w7_flip
    v v_flip w7 w7_flip
    h v v_flip w7_flip
    h_flip v v_flip w2
    h v v_flip w2_flip
    h h_flip v w7
    h h_flip w7 w7_flip
    h v_flip w2 w2_flip
    h v_flip w2 w7
    h v v_flip w7_flip
    h_flip v w2_flip w7
    h_flip v_flip w7 w7_flip
    h v w7 w7_flip
""")


def resolve_directions(given: str | Sequence[Sequence[str]] | None, depth: int,
                       searched: Sequence[Sequence[str]] | None
                       ) -> list[tuple[str, ...] | None]:
    """Turn the argument ``directions`` of a backbone into one list per block.

    Args:
        given: 'searched', 'unsearched', one list of names per block, or None for the form in which
            directions are searched.
        depth: number of blocks.
        searched: published lists of the architecture, if there are any.

    Returns:
        Per block the names, or None for all eight in learned shares.

    Raises:
        TypeError: for another type.
        ValueError: for an unknown name, or where the number of lists is not that of the blocks.
    """
    if given is None:
        return [None] * depth
    if isinstance(given, str):
        if given == 'unsearched':
            return [UNSEARCHED] * depth
        if given != 'searched':
            raise ValueError(f"got directions={given!r}, expected 'searched', 'unsearched', a list "
                             'of names per block, or None to search')
        if searched is None or len(searched) != depth:
            raise ValueError(f"got directions='searched' for {depth} blocks, for which none have "
                             "been published; give one list of names per block, or 'unsearched'")
        given = searched
    if not isinstance(given, (list, tuple)) or not all(
            isinstance(names, (list, tuple)) and names for names in given):
        raise TypeError(f'got directions={given!r}, expected one list of names per block')
    if len(given) != depth:
        raise ValueError(f'got directions for {len(given)} blocks, expected {depth} lists')
    for names in given:
        scan_plan(names, 1, 1)  # refuses unknown names
    return [tuple(names) for names in given]


# Networks that have told.  Not an attribute of theirs: one that changes is another network to
# whoever records CUDA graphs.
_told: weakref.WeakSet[ColumnRestore] = weakref.WeakSet()


class ColumnRestore:
    """A backbone that says which column restore it has, once, where the two kinds differ.

    Expects ``directions``, one list of names per block or None for all.
    """

    v_restore = 'exact'

    def tell_restore(self, height: int, width: int) -> None:
        """Write one line to the log at the first map of this size that is not square."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self in _told:
            return
        if height == width or 1 in (height, width):  # one row or column has one order
            return
        if all(names is not None and not {'v', 'v_flip'} & set(names) for names in self.directions):
            return
        _told.add(self)
        how = (
            "put back exactly; the published code puts them on wrong pixels, which "
            "v_restore='released' repeats" if self.v_restore == 'exact' else
            "put on wrong pixels, as the published code does; v_restore='exact' puts them right")
        print_log(f'{type(self).__name__}: column scans of maps that are not square (the first one '
                  f'is {height} x {width}) are {how}.', logger='current')
