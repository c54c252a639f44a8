"""From a run or a checkpoint to a model and its config.

A checkpoint of training holds its config as a text.  It is read under the rules of
:mod:`mmhybrid.engine.embedded_config`: what could run code is left out, and if the model needs it,
the user is asked for the config or for trust.
"""
from __future__ import annotations

import os
import os.path as osp
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import nn

from mmhybrid.errors import UserError
from mmhybrid.weights import (
    TRUST_VARIABLE,
    WeightsError,
    kind_of,
    printable,
    read_checkpoint,
    shown,
    strip_parallel,
    trusted,
    unwrap,
)

from ..compat.checkpoint_loader import check_entries
from ..compat.embedded_config import plain_config, settled_text
from ..datasets.loading.checks import classes_of, num_classes_of
from ..engine.building import building
from ..engine.checkpoint_check import check_checkpoint_file, check_whole
from ..engine.checkpointing import recorded
from ..engine.config import apply_tta, load_config
from ..engine.options import check_options
from ..models.checkpoints import check_windows

__all__ = ['Loaded', 'find_checkpoint', 'load_model', 'untrained']

# Entries of a config that decide what a model says of a picture; custom_imports may.
_NEEDED = (r'(model|default_scope|_base_|tta_model|tta_pipeline)\b|'
           r'(test|val)_dataloader\.(.+\.)?pipeline\b')


@dataclass
class Loaded:
    """A model with its weights, and what it takes to use it.

    Attributes:
        name: path or address of the weights, for messages.
        model: in evaluation mode on its device.
        cfg: the whole config.
        pipeline: settings of the steps from a file to the model's input, without annotations.
        names: of the classes.
        palette: colours of the classes, where the checkpoint or the config has some.
        notes: what the user should know.
    """

    name: str
    model: nn.Module
    cfg: Config
    pipeline: list[dict]
    names: tuple[str, ...]
    palette: tuple | None
    notes: list[str] = field(default_factory=list)


def load_model(weights: str | os.PathLike, config: str | os.PathLike | None = None,
               device: str | torch.device | None = None, tta: bool = False, trust: bool = False,
               options: dict | None = None) -> Loaded:
    """Build the model that weights belong to; see :func:`mmhybrid.load`."""
    target = _device(device)
    name, notes = find_checkpoint(os.fspath(weights))
    check_checkpoint_file(name)
    checkpoint = read_checkpoint(name, trust=trust)
    name = printable(shown(name))
    if not isinstance(checkpoint, dict):
        raise WeightsError(f'{name} holds a {type(checkpoint).__name__}, expected the weights of '
                           'a detector or a segmentor with its config')
    check_entries(checkpoint, name)
    if config is not None:
        cfg, more = load_config(os.fspath(config), options)
        notes, dropped, source = notes + more, [], os.fspath(config)
    else:
        cfg, dropped = _config_inside(checkpoint, name, trust)
        source = f'The config inside {name}'
        check_options(cfg, options or {})
        cfg.merge_from_dict(options or {})
    pipeline, tta_notes = _prepare(cfg, source, tta)
    model = _built(cfg, source, dropped)
    network = model.module if tta else model
    extra = check_whole(network, checkpoint)
    if extra and not tta:
        notes.append(f'{len(extra)} tensors of {name} have no place in the model and are left '
                     f'out: {", ".join(extra[:3])}{", ..." if len(extra) > 3 else ""}')
    check_windows(network, name)
    _fill(network, checkpoint, name)
    names, unnamed = _names(cfg, checkpoint)
    return Loaded(name, model.to(target).eval(), cfg, pipeline, names,
                  _palette(checkpoint, len(names)), notes + tta_notes + unnamed)


def untrained(config: str, options: dict | None = None) -> Loaded:
    """The model of a config with its initial weights, on the CPU.

    Raises:
        UserError: if there is no such config, or it describes nothing that predicts.
    """
    cfg, notes = load_config(config, options)
    pipeline, _ = _prepare(cfg, config, False)
    model = _built(cfg, config, [])
    names, unnamed = _names(cfg, {})
    return Loaded(config, model.eval(), cfg, pipeline, names, None, [
        *notes, *unnamed, 'The weights are initial ones, for nothing named others'])


def _device(device) -> torch.device:
    if device is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # the device 'meta' has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        there = ', '.join(['cpu', *(f'cuda:{number}' for number in range(count))])
        raise UserError(f'The device {str(device)!r} cannot be used '
                        f'({str(error).splitlines()[0].rstrip(".")}). This machine has {there}.'
                        ) from error
    return found


# --- finding and reading --------------------------------------------------------------------------

def find_checkpoint(source: str) -> tuple[str, list[str]]:
    """The checkpoint that a run's folder stands for; everything else as it is.

    That is the best one if the run kept one (``best_*.pth``), else the last.

    Returns:
        Its path and a note that says which it is.

    Raises:
        UserError: for a folder without checkpoints.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source, []
    files = sorted((each for each in folder.glob('*.pth') if each.is_file()),
                   key=lambda each: each.stat().st_mtime)
    best = [each for each in files if each.name.startswith('best_')]
    last = folder / osp.basename(recorded(str(folder)) or ' ')
    if best:
        found, which = best[-1], 'the best checkpoint'
    elif last in files:
        found, which = last, 'the last checkpoint'
    elif files:
        found, which = files[-1], 'the newest checkpoint'
    else:
        runs = sorted({each.parent.name for each in folder.glob('*/*.pth')})
        there = f' Its folders {", ".join(runs[:5])} hold some: name one of them.' if runs else (
            ' Give the work directory of a training, or a checkpoint.')
        raise UserError(f'The folder {source} holds no checkpoint (*.pth).{there}')
    return str(found), [f'{found} is {which} of this run']


def _config_inside(checkpoint: dict, name: str, trust: bool) -> tuple[Config, list[str]]:
    """The config that training wrote, and which of its entries are left out and why."""
    text = (checkpoint.get('meta') or {}).get('cfg')
    if text is None:
        hub = checkpoint.get('message_hub') or {}
        text = (hub.get('runtime_info') or {}).get('cfg')
    if text is None:
        raise UserError(f'{name} holds no config{_what_instead(checkpoint)}. Give the config file '
                        'it was trained with: --config FILE (in Python config=FILE).')
    if trust or trusted():
        return _parsed(text, name), []
    values = plain_config(text)
    if values is None:
        raise UserError(f'The config inside {name} does more than set plain values, so it is not '
                        f'read. {_ASK}')
    text, dropped = settled_text(text, values)
    needed = [each for each in dropped if re.match(_NEEDED, each)]
    if needed:
        raise UserError(f'The config inside {name} has entries that could run code, which are not '
                        f'followed in a file: {printable("; ".join(needed))}. {_ASK}')
    return _parsed(text, name), dropped


_ASK = ('Give the config file it was trained with (--config FILE, in Python config=FILE); or, only '
        'if you trust where the checkpoint comes from, use --trust (trust=True, or '
        f'{TRUST_VARIABLE}=1).')


def _what_instead(checkpoint: dict) -> str:
    try:
        kind = kind_of(unwrap(checkpoint)[0])
    except WeightsError:
        return ''
    return {'classification': '; it is a classifier, which finds nothing in pictures',
            'backbone': '; it is a backbone alone, which finds nothing in pictures'}.get(kind, '')


def _parsed(text: str, name: str) -> Config:
    try:
        values = plain_config(text)
        if values is None or '_base_' in values:
            return Config.fromstring(text, '.py')
        # No file is needed for that, as mmengine does.
        if values.get('custom_imports'):
            import_modules_from_strings(**values['custom_imports'])
        return Config(values, cfg_text=text)
    except ImportError as error:
        raise UserError(f'The config inside {name} needs a module that cannot be imported: '
                        f'{_cause(error)}. Install it, or set PYTHONPATH to its folder.') from error
    except OSError as error:
        raise UserError(f'The config inside {name} was not read, for want of a temporary file: '
                        f'{error.strerror or error}. Make room, or name another folder with the '
                        'environment variable TMPDIR.') from error
    except Exception as error:  # a trusted text may raise anything
        raise UserError(f'The config inside {name} cannot be read. {type(error).__name__}: '
                        f'{printable(error)}. Give the config file: --config FILE.') from error


def _cause(error: ImportError) -> BaseException:
    """mmengine's own text about ``custom_imports`` lists all of ``sys.path``."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


# --- building -------------------------------------------------------------------------------------

def _prepare(cfg: Config, source: str, tta: bool) -> tuple[list[dict], list[str]]:
    """Make a config ready for prediction; returns the pipeline and notes."""
    model = cfg.get('model')
    if not isinstance(model, dict) or 'type' not in model:
        raise UserError(f'{source} has no model=dict(type=...), so there is nothing to predict '
                        'with.')
    if cfg.get('default_scope') not in ('mmdet', 'mmseg'):
        raise UserError(f'{source} describes {model["type"]} (default_scope='
                        f'{cfg.get("default_scope")!r}); expected a detector of mmdet or a '
                        'segmentor of mmseg.')
    loader = next((cfg[key] for key in ('test_dataloader', 'val_dataloader') if cfg.get(key)), None)
    dataset = _innermost((loader or {}).get('dataset'))
    if not dataset or not dataset.get('pipeline'):
        raise UserError(f'{source} has no test_dataloader.dataset.pipeline, which says how a '
                        'picture becomes the input of the model.')
    notes = []
    if tta:
        cfg.test_dataloader = ConfigDict(dataset=dataset)
        cfg.test_evaluator = [ConfigDict()]
        masks = (model.get('roi_head') or {}).get('mask_head') is not None
        apply_tta(cfg)
        if masks:
            notes.append('Test-time augmentation merges boxes only (mmdet has no rule for masks), '
                         'so there are no masks.')
    if model.get('pretrained'):
        model.pretrained = None
    return _without_annotations(cfg.test_dataloader.dataset.pipeline if tta else dataset.pipeline
                                ), notes


def _innermost(dataset):
    while isinstance(dataset, dict) and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset.get('dataset') or dataset['datasets'][0]
    return dataset


def _without_annotations(steps) -> list:
    """Leave out transforms that read annotations, also within others."""
    kept = []
    for step in steps:
        if isinstance(step, dict):
            kind = str(step.get('type')).rpartition('.')[2]
            if kind.startswith('Load') and 'Annotation' in kind or kind == 'LoadProposals':
                continue
            if 'transforms' in step:
                step = ConfigDict(step, transforms=_without_annotations(step['transforms']))
        elif isinstance(step, (list, tuple)):
            step = _without_annotations(step)
            if not step:
                continue  # TestTimeAug combines all lists, and would have no combination left
        kept.append(step)
    return kept


def _built(cfg: Config, source: str, dropped: list[str]) -> nn.Module:
    try:
        with DefaultScope.overwrite_default_scope(cfg.default_scope), building(source, cfg):
            return revert_sync_batchnorm(MODELS.build(cfg.model))
    except UserError as error:
        imports = [each for each in dropped if each.startswith('custom_imports')]
        if not imports:
            raise
        raise UserError(f'{error}\nThe config asks for a module of its own, which is not imported '
                        f'because a file says so: {printable(imports[0])}. {_ASK}') from error


def _fill(network: nn.Module, checkpoint: dict, name: str) -> None:
    state = strip_parallel(checkpoint.get('state_dict', checkpoint))[0]
    bad = next((key for key, value in state.items() if isinstance(value, torch.Tensor)
                and value.is_floating_point() and not value.isfinite().all()), None)
    if bad is not None:
        raise UserError(f'{name}: the tensor {bad} holds numbers that are not finite (NaN or '
                        'infinity), so the model can find nothing. Its training has failed; take '
                        'an earlier checkpoint.')
    network.load_state_dict(state, strict=False)


def _names(cfg: Config, checkpoint: dict) -> tuple[tuple[str, ...], list[str]]:
    """Names of all classes, and what to say about those without a name."""
    heads = [count for _, count in num_classes_of(cfg.model)]
    wanted = max(heads, default=0)
    names = _meta(checkpoint).get('classes')
    if not isinstance(names, (list, tuple)) or not names or not all(
            isinstance(each, str) for each in names):
        dataset = _innermost((cfg.get('test_dataloader') or cfg.get('val_dataloader'))['dataset'])
        names = classes_of(dataset, cfg.default_scope) or ()
    names = tuple(printable(each, 100) for each in names)
    if len(names) >= wanted:
        return names, []
    more = tuple(f'class {number}' for number in range(len(names), wanted))
    return (*names, *more), [f'The checkpoint and its config name {len(names)} of {wanted} classes;'
                             f' the others are called {more[0]} and so on']


def _meta(checkpoint: dict) -> dict:
    meta = checkpoint.get('meta') or {}
    found = meta.get('dataset_meta') or {}
    return {str(key).lower(): value for key, value in found.items()}


def _palette(checkpoint: dict, count: int) -> tuple | None:
    given = _meta(checkpoint).get('palette')
    if not isinstance(given, (list, tuple)) or len(given) < count:
        return None
    fits = all(isinstance(color, (list, tuple)) and len(color) == 3
               and all(isinstance(part, int) and 0 <= part <= 255 for part in color)
               for color in given)
    return tuple(tuple(color) for color in given[:count]) if fits else None
