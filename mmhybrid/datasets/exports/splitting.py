"""Dividing pictures between training and validation."""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence

import numpy as np

from .common import Export, ExportError, Picture, Questions

__all__ = ['Splits', 'same_pictures', 'split_pictures']

Splits = dict[str, list[Picture]]


def same_pictures(export: Export) -> list[list[str]]:
    """Names of pictures that are the same file, byte for byte."""
    sizes: dict[int, list[str]] = {}
    for one in export.pictures:
        sizes.setdefault(os.path.getsize(os.path.join(export.root, one.name)), []).append(one.name)
    digests: dict[str, list[str]] = {}
    for names in sizes.values():
        for name in names if len(names) > 1 else ():
            with open(os.path.join(export.root, name), 'rb') as file:
                digest = hashlib.blake2b(file.read()).hexdigest()
            digests.setdefault(digest, []).append(name)
    return [names for names in digests.values() if len(names) > 1]


def split_pictures(export: Export, held: dict[str, set[str]], copies: list[list[str]],
                   questions: Questions, fraction: float, seed: int) -> Splits:
    """The split of the export if it has one, else a random one that keeps the shares of classes.

    Args:
        export: its pictures.
        held: name of a picture -> classes that it holds.
        copies: names that must not be divided, see :func:`same_pictures`.
        questions: the option ``group`` is a pattern: pictures for which it finds the same text
            (its first group, if there is one) stay together, such as the frames of a video.
        fraction: of the pictures that go to validation.
        seed: seeds the random numbers.

    Returns:
        Pictures by 'train', 'val' and, if the export has one, 'test'.
    """
    said: Splits = {'train': [], 'val': [], 'test': []}
    free = []
    for one in export.pictures:
        (said[one.split] if one.split else free).append(one)
    if said['test'] and not any(held[one.name] for one in said['test']):
        questions.told.append(f'{len(said["test"])} pictures for testing have no annotations to '
                              'score: left out')
        said['test'] = []
    pattern = questions.given.get('group')
    if said['train'] and said['val'] and free:
        raise ExportError(f'{len(free)} pictures belong to no part, such as {free[0].name}, though '
                          f'others are in train and val, such as {said["train"][0].name}. Move '
                          'them into one of the folders.')
    if not (said['train'] and said['val']):
        pool = said['train'] + said['val'] + free
        if not pool:
            raise ExportError(f'{export.root} has pictures for testing only.')
        said['train'], said['val'] = _divide(pool, held, copies, pattern, fraction, seed)
        questions.told.append(
            f'{len(said["train"])} pictures for training and {len(said["val"])} for validation, '
            f'drawn with --seed {seed} so that each class keeps its share'
            + (f', in groups by --group {pattern}' if pattern else _series(pool)))
    elif pattern:
        raise ExportError(f'--group {pattern}: the export is already divided into train and val. '
                          'Leave it out, or merge their folders.')
    return {split: sorted(found, key=lambda one: one.name) for split, found in said.items()
            if found}


def _series(pool: Sequence[Picture]) -> str:
    """A hint where names look like the numbered frames of a few videos."""
    stems = {re.sub(r'\d+$', '', os.path.splitext(one.name)[0]) for one in pool}
    if not 1 < len(stems) <= len(pool) // 8:
        return ''
    return (f'. Their names are {len(stems)} numbered series; if these are frames of videos, '
            "neighbours are nearly the same: keep them together with --group '(.*?)\\d+\\.'")


def _divide(pool: Sequence[Picture], held: dict[str, set[str]], copies: list[list[str]],
            pattern: str | None, fraction: float, seed: int) -> tuple[list, list]:
    groups = _groups(pool, copies, pattern)
    if len(groups) < 2:
        raise ExportError(f'{len(pool)} pictures make {len(groups)} group; expected at least 2, '
                          'one for training and one for validation. Add pictures'
                          + (', or leave --group out.' if pattern else '.'))
    order = np.random.RandomState(seed).permutation(len(groups))
    groups = [groups[place] for place in order]
    classes = sorted(set().union(*(held[one.name] for one in pool)))
    counts = np.array([[sum(name in held[one.name] for one in group) for name in classes]
                       + [len(group)] for group in groups], float)
    chosen = _chosen(counts, fraction)
    train = [one for group, there in zip(groups, chosen, strict=True) if not there
             for one in group]
    val = [one for group, there in zip(groups, chosen, strict=True) if there for one in group]
    return train, val


def _groups(pool, copies, pattern) -> list[list[Picture]]:
    together = {name: names[0] for names in copies for name in names}
    try:
        finder = re.compile(pattern) if pattern else None
    except re.error as error:
        raise ExportError(f'--group {pattern} is not a regular expression: {error}.') from error
    groups: dict[str, list[Picture]] = {}
    for one in pool:
        key = together.get(one.name, one.name)
        if finder is not None:
            found = finder.search(key)
            if found is None:
                raise ExportError(f'--group {pattern} finds nothing in {key}.')
            key = found[1] if finder.groups else found[0]
        groups.setdefault(key, []).append(one)
    return [*groups.values()]


def _chosen(counts: np.ndarray, fraction: float) -> np.ndarray:
    """Which groups (G, C + 1: pictures of each class, and all) go to validation.

    The rarest class chooses first (Sechidis et al. 2011, iterative stratification); a class keeps
    at least one group for training.
    """
    wanted = counts.sum(0) * fraction
    wanted[-1] = max(1, round(wanted[-1]))
    open_, chosen = np.ones(len(counts), bool), np.zeros(len(counts), bool)
    for column in np.argsort(counts[:, :-1].sum(0), kind='stable'):
        while True:
            have = counts[chosen, column].sum()
            places = np.flatnonzero(open_ & (counts[:, column] > 0))
            full = counts[chosen, -1].sum() >= wanted[-1]
            if full or not len(places) or have + 0.5 > wanted[column]:
                break
            # Of the groups with this class the one that adds least where enough is there.
            spare = counts[places] - np.maximum(wanted - counts[chosen].sum(0), 0)
            place = places[np.maximum(spare, 0).sum(1).argmin()]
            open_[place] = False
            rest = counts[~chosen].sum(0) - counts[place]
            chosen[place] = (rest[:-1][counts[place, :-1] > 0] > 0).all() and rest[-1] > 0
    for place in np.flatnonzero(open_):
        rest = counts[~chosen].sum(0) - counts[place]
        if counts[chosen, -1].sum() + counts[place, -1] / 2 > wanted[-1] or rest[-1] <= 0:
            continue
        if not counts[place, :-1].any() or not chosen.any():
            chosen[place] = True
    if not chosen.any():  # every group is the only one of some class
        chosen[counts[:, -1].argmin()] = True
    return chosen
