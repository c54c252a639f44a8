"""The newest checkpoint that is whole, as a resumed run looks for it."""
from __future__ import annotations

import os
import os.path as osp
import re

from mmhybrid.weights import WeightsError, read_checkpoint
from mmhybrid.weights.shards import is_folder_of_pieces

from ..errors import UserError

__all__ = ['INTERRUPTED', 'RECORD', 'newest_whole', 'recorded']

RECORD = 'last_checkpoint'  # mmengine's file with the path of the newest checkpoint
INTERRUPTED = 'interrupted.pth'

def newest_whole(work_dir: str) -> tuple[str | None, list[str]]:
    """Find the checkpoint that ``--resume`` without a path continues.

    That is the one ``last_checkpoint`` names. Where that file does not help, it is the whole
    checkpoint with the most iterations; the best ones (``best_*.pth``) and published ones do not
    count, because they lack the optimizer.

    Returns:
        Its path, or None for a folder without checkpoints, and what to say about the choice.

    Raises:
        UserError: if there are checkpoints, and none of them is whole.
    """
    record = osp.join(work_dir, RECORD)
    named, problem = _named(record)
    if named is not None:
        beside = osp.join(work_dir, osp.basename(named))  # the folder may have been moved or copied
        found = next((each for each in (beside, named) if _exists(each)), None)
        problem = f'names {named}, which does not exist'
        if found is not None:
            iterations, problem = _iterations(found)
            if iterations is not None:
                return found, []
            problem = f'names {named}: {problem or "no checkpoint of a training"}'
    best, left_out = _best_of(work_dir)
    if best is None:
        if problem is None and not left_out:
            return None, []
        unusable = [f'{record} {problem}'] if problem else []
        raise UserError(
            f'--resume finds no whole checkpoint in {work_dir}:\n  '
            + '\n  '.join(unusable + left_out) + '\nPass the checkpoint to continue from: '
            '--resume PATH, or leave --resume out to start anew.')
    path, iterations = best
    return path, [f'--resume: {record} {problem or "does not exist"}. Continuing from the newest '
                  f'whole checkpoint, {path} (iteration {iterations}).'
                  + ''.join(f' Left out: {text}.' for text in left_out)]


def recorded(work_dir: str) -> str | None:
    """The checkpoint that ``last_checkpoint`` names, if it does."""
    return _named(osp.join(work_dir, RECORD))[0]


def _named(record: str) -> tuple[str | None, str | None]:
    """What ``last_checkpoint`` holds: a path, or what is wrong with it (both None: no file)."""
    if not osp.lexists(record):
        return None, None
    if not osp.isfile(record):
        return None, 'is not a file'
    try:
        with open(record, 'rb') as file:
            content = file.read(4097)
        text = content.decode().strip()
    except OSError as error:
        return None, f'cannot be read ({error.strerror})'
    except UnicodeDecodeError:
        return None, 'is not text'
    if not text:
        return None, 'is empty'
    if len(content) > 4096 or not text.isprintable():
        return None, 'does not hold a path'
    return text, None


def _best_of(folder: str) -> tuple[tuple[str, int] | None, list[str]]:
    """The whole checkpoint with the most iterations, and which were left out and why."""
    series: dict[str, list[tuple[int, str]]] = {}
    left_out = []
    for name in sorted(os.listdir(folder)) if osp.isdir(folder) else []:
        if not name.endswith('.pth') or not _exists(osp.join(folder, name)):
            continue
        if re.search(r'-[0-9a-f]{8}\.pth$', name):
            continue
        if name.startswith('best_'):
            left_out.append(f'{osp.join(folder, name)} lacks the state of the optimizer')
            continue
        stem, number = re.fullmatch(r'(.*?)(\d*)\.pth', name).groups()
        series.setdefault(stem, []).append((int(number or 0), name))
    found = []
    for members in series.values():
        # Reading is slow and numbers mean the same within a series: down to the first whole one.
        for _, name in sorted(members, reverse=True):
            path = osp.join(folder, name)
            iterations, problem = _iterations(path)
            if iterations is not None:
                found.append((path, iterations))
                break
            left_out += [problem] if problem else []
    return max(found, key=lambda it: it[1], default=None), left_out


def _exists(path: str) -> bool:
    return osp.isfile(path) or is_folder_of_pieces(path)


def _iterations(path: str) -> tuple[int | None, str | None]:
    """Iterations of a training checkpoint that can be read to its end, or what is wrong.

    Both are None for a good file of something else, such as weights to start from.
    """
    try:
        checkpoint = read_checkpoint(path)
    except WeightsError as error:
        return None, str(error).removesuffix('; fetch it again')  # it was written, not fetched
    except OSError as error:
        return None, f'{path} cannot be read ({error.strerror})'
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    steps = meta.get('iter') if isinstance(meta, dict) else None
    whole = isinstance(steps, int) and isinstance(checkpoint.get('state_dict'), dict)
    return (steps if whole else None), None
