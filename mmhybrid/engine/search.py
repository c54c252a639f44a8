"""Search for scan directions, as LocalMamba does it.

From Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan" (arXiv
2403.09338), section 3.4: every block scans in all eight directions and mixes the results in the
shares softmax(alphas).  Alphas and weights are trained together, by the same optimizer with the
same learning rate and weight decay; then each block keeps the directions with the largest alphas.
"""
from __future__ import annotations

import json
import math
import os.path as osp
import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmhybrid.layers import DirectionMixture
from mmhybrid.ops.cross_scan import DIRECTIONS
from mmhybrid.weights import read_checkpoint, unwrap

from ..errors import UserError
from ..models.backbones.localvim import LocalVimTrunk
from ..models.backbones.localvmamba import LocalVMamba
from ..registry import HOOKS, find_type

__all__ = ['ALPHAS_FILE', 'DirectionSearchHook', 'alphas_table', 'check_finite', 'check_pick',
           'checkpoint_alphas', 'choose_directions', 'make_supernet', 'model_alphas',
           'searched_backbone', 'direction_weights', 'supernet_blocks', 'write_searched_config']

#: Record of the alphas in the work directory: one JSON object per line.
ALPHAS_FILE = 'alphas.jsonl'
# Where configs of the registered backbones name weights to start from.
_WEIGHTS = ('init_cfg', 'pretrained', 'pretrained_ckpt')


# --- alphas ---------------------------------------------------------------------------------------

def check_pick(pick: int) -> None:
    """Refuse a number of directions that a block cannot keep."""
    if not isinstance(pick, int) or isinstance(pick, bool) or not 1 <= pick <= len(DIRECTIONS):
        raise UserError(f'A block can keep 1 to {len(DIRECTIONS)} directions, got pick={pick!r}.')


def choose_directions(alphas: Sequence[float], pick: int = 4) -> tuple[str, ...]:
    """Directions with the largest alphas.

    Args:
        alphas: one number per direction, in the order of ``DIRECTIONS``.
        pick: how many to choose.

    Returns:
        Names in the order of ``DIRECTIONS``, as in all published lists.  Of equal alphas the one
        that comes first in that order is taken.
    """
    ranked = sorted(range(len(DIRECTIONS)), key=lambda k: (-alphas[k], k))
    return tuple(DIRECTIONS[k] for k in sorted(ranked[:pick]))


def direction_weights(alphas: Sequence[float]) -> list[float]:
    """Shares in which a block mixes its directions; their sum is 1."""
    return torch.tensor(alphas, dtype=torch.float64).softmax(dim=0).tolist()


def model_alphas(backbone: nn.Module) -> dict[str, list[float]]:
    """Alphas of a network that is being searched, per block in the order of the blocks."""
    return {_block(name): module.weights.detach().float().flatten().tolist()
            for name, module in backbone.named_modules() if isinstance(module, DirectionMixture)}


def checkpoint_alphas(source: str, blocks: Sequence[str]) -> dict[str, list[float]]:
    """Alphas in a checkpoint of a searched network, or of a model around one.

    Args:
        source: see :func:`mmhybrid.weights.read_checkpoint`.
        blocks: what :func:`supernet_blocks` says of the config.

    Raises:
        UserError: if there are none, they are those of another network, or not finite.
    """
    tensors, _ = unwrap(read_checkpoint(source))
    found = {}
    for name, tensor in tensors.items():
        match = re.search(r'(?:^|\.)(layers\.\d.*\.multi_scan)\.weights$', name)
        if match:
            found[_block(match[1])] = tensor.detach().float().flatten().tolist()
    if not found:
        raise UserError(
            f'{source} holds no alphas (tensors named ...multi_scan.weights): the network in it '
            'was not searched. Expected a checkpoint that tools/search_directions.py wrote.')
    if list(found) != list(blocks):
        absent = [block for block in blocks if block not in found]
        raise UserError(
            f'{source} holds alphas for {len(found)} blocks ({_first(found)}), but the backbone '
            f'of the config has {len(blocks)} ({_first(absent or blocks)}). Use the config that '
            'was searched.')
    return found


def check_finite(alphas: Mapping[str, Sequence[float]]) -> None:
    """Refuse the alphas of a training that diverged."""
    bad = [block for block, values in alphas.items() if not all(map(math.isfinite, values))]
    if bad:
        raise UserError(f'The alphas of {len(bad)} of {len(alphas)} blocks ({_first(bad)}) are not '
                        'finite, so the training has diverged. Take an earlier checkpoint with '
                        '--from, or search with a smaller learning rate.')


def alphas_table(alphas: Mapping[str, Sequence[float]], pick: int = 4) -> str:
    """One line per block with the shares in percent; a star marks the chosen directions."""
    width = max(map(len, alphas))
    lines = ['block'.ljust(width) + ''.join(name.rjust(9) for name in DIRECTIONS)]
    for block, values in alphas.items():
        chosen = choose_directions(values, pick)
        lines.append((block.ljust(width) + ''.join(
            f'{100 * share:7.2f} {"*" if name in chosen else " "}'
            for name, share in zip(DIRECTIONS, direction_weights(values), strict=True))).rstrip())
    return '\n'.join(lines)


def _block(name: str) -> str:
    """Name of the block that a mixture belongs to."""
    return re.sub(r'\.(mixer|op)\.multi_scan$', '', name)


def _first(names, count: int = 3) -> str:
    names = list(names)
    return ', '.join(names[:count]) + (', ...' if len(names) > count else '')


# --- configs --------------------------------------------------------------------------------------

def make_supernet(cfg: Config) -> list[str]:
    """Let the backbone of a config scan in all directions, in learned shares.

    Returns:
        Warnings for the log.

    Raises:
        UserError: if the backbone is none that can be searched.
    """
    backbone, notes = _local_backbone(cfg), []
    given = [f'model.backbone.{key}' for key in _WEIGHTS if backbone.get(key)]
    given += ['pretrained'] if cfg.get('pretrained') else []
    if given:
        notes.append(f'{" and ".join(given)} of the config is left out: a search starts from '
                     'random weights, because files of networks with chosen directions do not fit '
                     'one with all of them. --pretrained FILE takes a file of a searched network.')
    for key in _WEIGHTS:
        backbone.pop(key, None)
    cfg.pretrained = cfg.published_checkpoint = None
    backbone.directions = None
    return notes + supernet_blocks(cfg)[1]


def supernet_blocks(cfg: Config) -> tuple[list[str], list[str]]:
    """Names of the blocks whose directions a config's backbone would search.

    Returns:
        The names, in order, and warnings.

    Raises:
        UserError: if the backbone is none that can be searched, or cannot be built.
    """
    node = {**_local_backbone(cfg), 'directions': None}
    try:
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the real one will say it again
            backbone = MODELS.build(node)
    except (TypeError, ValueError) as error:
        raise UserError(f'The backbone of {cfg.filename} cannot be built for a search. '
                        f'{type(error).__name__}: {error}') from error
    found = {_block(name): module.weights.requires_grad
             for name, module in backbone.named_modules() if isinstance(module, DirectionMixture)}
    fixed = [block for block, learns in found.items() if not learns]
    if fixed and backbone.frozen_stages > 0:
        raise UserError(f'frozen_stages={backbone.frozen_stages} keeps {_first(fixed)} from '
                        'learning which directions to prefer. Set '
                        '--cfg-options model.backbone.frozen_stages=-1')
    notes = [f'{_first(fixed)}: not run, because no later map is in out_indices, so the directions '
             'chosen for them mean nothing.'] if fixed else []
    return list(found), notes


def _local_backbone(cfg: Config):
    """The backbone of a config, if it is one with directions to choose."""
    backbone = (cfg.get('model') or {}).get('backbone')
    if backbone is None:
        raise UserError(f'{cfg.filename} has no model.backbone, so there is nothing to search.')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    found = find_type(backbone, MODELS, None)
    if not (isinstance(found, type) and issubclass(found, (LocalVMamba, LocalVimTrunk))):
        raise UserError(
            f'The backbone of {cfg.filename} is {backbone.get("type")}, whose scan directions '
            'cannot be searched. Expected LocalVMamba, LocalVim, one of their drop-in names '
            '(MM_LocalVSSM, MM_LocalVim), or in a classifier LocalVMambaClassifier or '
            'LocalVimClassifier.')
    return backbone


def write_searched_config(path: str, base: str, chosen: Mapping[str, Sequence[str]], *,
                          remark: str, model: Mapping | None = None) -> None:
    """Write a config that trains a network with the chosen directions.

    Args:
        path: the new file.
        base: the config whose backbone gets the directions.
        chosen: names per block, in the order of the blocks.
        remark: where the directions come from.
        model: the model, if it is not that of ``base`` (options on the command line changed it).

    Raises:
        UserError: if the config that was written does not build a backbone with these directions.
    """
    original = Config.fromfile(base)
    folder = osp.dirname(osp.abspath(path))
    target = osp.abspath(base)
    # A relative path survives moving or copying a project as a whole.
    together = osp.commonpath([folder, target]) != osp.abspath(osp.sep)
    target = osp.relpath(target, folder) if together else target
    lines = [f'# Scan directions per block, {remark}.',
             '# Train from scratch, as published: weights for other directions would fit by shape',
             '# and mean something else.',
             f'_base_ = {target!r}', '']
    if original.get('pretrained'):
        lines += ['pretrained = None']
    if original.get('published_checkpoint'):
        lines += ['published_checkpoint = None']
    lines += ['directions = [',
              *(f'    {list(names)!r},  # {block}' for block, names in chosen.items()), ']', '']
    backbone = original.model.backbone if model is None else model['backbone']
    empty = {key: None for key in _WEIGHTS if backbone.get(key)}
    if model is None:
        extra = ''.join(f', {key}=None' for key in empty)
        lines += [f'model = dict(backbone=dict(directions=directions{extra}))']
    else:
        whole = Config(dict(model={'_delete_': True, **model, 'backbone': {
            **backbone, **empty, 'directions': 'DIRECTIONS'}}))
        lines += ['# Options of the search changed the model, so it stands here in full.',
                  whole.pretty_text.replace("'DIRECTIONS'", 'directions').rstrip()]
    with open(path, 'w', encoding='utf-8') as file:
        file.write('\n'.join(lines) + '\n')
    _check_searched_config(path, chosen)


def _check_searched_config(path: str, chosen: Mapping[str, Sequence[str]]) -> None:
    try:
        cfg = Config.fromfile(path)
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            backbone = MODELS.build(_local_backbone(cfg))
    except Exception as error:
        raise UserError(f'{path} was written, but its backbone cannot be built. '
                        f'{type(error).__name__}: {error}') from error
    assert [tuple(names) for names in backbone.directions] == list(chosen.values())


# --- while training -------------------------------------------------------------------------------

@HOOKS.register_module()
class DirectionSearchHook(Hook):
    """Records the alphas of a network that is being searched.

    Writes one line to ``alphas.jsonl`` in the work directory at the start, every ``interval``
    iterations and at the end: ``{"iter": ..., "epoch": ..., "directions": [...], "alphas":
    {block: [...]}}`` with the iterations and epochs that are complete and the alphas before the
    softmax.  The same numbers go to the visualizer's backends (``alpha/<block>/<direction>``),
    and a table of the shares to the log whenever a checkpoint is written.  A resumed run continues
    the file at the iteration that it resumes from.

    Args:
        interval: iterations between two records.
        pick: directions per block that the table marks.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int = 200, pick: int = 4):
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a positive integer, got {interval!r}.')
        check_pick(pick)
        self.interval, self.pick = interval, pick
        self._shown: dict | None = None  # alphas of the last table

    @master_only
    def before_train(self, runner) -> None:
        """Begin the record, or continue that of the run that is resumed."""
        path, kept = self._path(runner), []
        if runner.iter and osp.isfile(path):
            with open(path, encoding='utf-8') as file:
                kept = [line for line in file if _iteration(line) <= runner.iter]
        with open(path, 'w', encoding='utf-8') as file:
            file.writelines(kept)
        if not kept or _iteration(kept[-1]) < runner.iter:
            self._record(runner, runner.iter, runner.epoch)

    @master_only
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Record at the interval and at the end."""
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            self._record(runner, runner.iter + 1, runner.epoch)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Log the table (rank 0: nobody else saves)."""
        alphas, changes = model_alphas(searched_backbone(runner)), ''
        if alphas == self._shown:
            return  # a second checkpoint of the same state: the best one
        if self._shown is not None:
            changed = sum(choose_directions(values, self.pick)
                          != choose_directions(self._shown[block], self.pick)
                          for block, values in alphas.items())
            changes = f'; {changed} of {len(alphas)} blocks changed since the last table'
        self._shown = alphas
        runner.logger.info(f'Shares of the scan directions in %, * = the {self.pick} largest'
                           f'{changes}\n{alphas_table(alphas, self.pick)}')

    def _record(self, runner, iteration: int, epoch: int) -> None:
        alphas = model_alphas(searched_backbone(runner))
        with open(self._path(runner), 'a', encoding='utf-8') as file:
            file.write(json.dumps(dict(iter=iteration, epoch=epoch, directions=DIRECTIONS,
                                       alphas=alphas)) + '\n')
        runner.visualizer.add_scalars(
            {f'alpha/{block}/{name}': value for block, values in alphas.items()
             for name, value in zip(DIRECTIONS, values, strict=True)}, step=iteration)

    @staticmethod
    def _path(runner) -> str:
        return osp.join(runner.work_dir, ALPHAS_FILE)


def _iteration(line: str) -> float:
    """Iteration of a record; infinity for a line that was cut off."""
    try:
        return json.loads(line)['iter']
    except (ValueError, KeyError):
        return math.inf


def searched_backbone(runner) -> nn.Module:
    """The backbone that a runner trains."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model.backbone
