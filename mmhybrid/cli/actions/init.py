"""The command ``mmhybrid init``."""
from __future__ import annotations

import argparse
import hashlib
import os
import os.path as osp
import re
import shlex
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

from mmhybrid.analysis.models.memory import GIB, step_of, usable
from mmhybrid.analysis.models.source import find_model
from mmhybrid.datasets.exports import ExportError, Questions, read_export
from mmhybrid.datasets.exports.common import MARKER
from mmhybrid.datasets.exports.preparing import Prepared, prepare, write
from mmhybrid.datasets.storage import atomic_folder, existing_recipe
from mmhybrid.engine.amp import has_accelerator
from mmhybrid.errors import UserError
from mmhybrid.starter.config_text import config_text, counted
from mmhybrid.starter.heads import Head, default_head, find_head
from mmhybrid.starter.models import Backbone, backbone_names, find_backbone, named_weights
from mmhybrid.starter.plan import Plan, default_backbone, make_plan
from mmhybrid.visualization.data_report import report_html
from mmhybrid.weights import (
    RELEASED,
    WeightsError,
    identify,
    is_known_source,
    read_file,
    strip_wrappers,
    unwrap,
)
from mmhybrid.weights.released import find_released

from .train_options.largest_batch import predicted_batch

__all__ = ['main']

FOLDER = 'mmhybrid'  # in the data folder
ABANDONED = 3600  # seconds after which an unfinished folder is taken for dead
MOST, STEPS = 16, 16  # images in a batch, and batches of an epoch, where memory leaves a choice
_ANSWERS = ('format', 'annotations', 'crowd', 'classes', 'ignore', 'group')


def main(args: argparse.Namespace) -> None:
    """Write annotations, a split, a report and a config for a folder of data.

    Args:
        args: of the command line; :mod:`mmhybrid.cli` lists them.

    Raises:
        UserError: for everything that the user can put right.
    """
    data, out = _places(args)
    questions = _questions(args)
    say(f'Reading {data} ...')
    try:
        prepared = prepare(read_export(data, questions, args.task), questions, args.task,
                           args.val_fraction, args.seed)
        backbone, head, facts = _model(args, prepared)
    except ExportError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f'{error.filename or data} cannot be read: {error.strerror}.') from error
    name = re.sub(r'\W+', '_', osp.basename(data)).strip('_') or 'data'
    recipe = _recipe(args, prepared, backbone.name, head.name)
    if _is_there(out, recipe):
        say(f'{out} holds the same already, and nothing was changed.')
    else:
        annotations = f'{out.name}/' if out.parent == Path(data) else f'{out}/'

        def text(plan: Plan) -> str:
            return config_text(prepared, backbone, head, plan, name, f'{data}/', annotations,
                               args.weights)

        plan = _fitting(make_plan(prepared, backbone, args.weights, has_accelerator()), text,
                        lambda batch: make_plan(prepared, backbone, args.weights, True, batch),
                        len(prepared.splits['train']))
        facts += plan.why
        config = text(plan)
        page = report_html(prepared, name, questions.told, facts, args.seed)
        _write(out, recipe, prepared, {f'{name}.py': config, 'report.html': page})
        _tell(prepared, questions, facts, args.weights, backbone)
    _next(out / f'{name}.py')


def _fitting(plan: Plan, text: Callable[[Plan], str], again: Callable[[int], Plan], count: int
             ) -> Plan:
    """With a GPU, a plan whose batch is predicted to fit it; at least 16 steps an epoch."""
    if not torch.cuda.is_available():
        return plan
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'config.py')
            path.write_text(text(plan), encoding='utf-8')
            source = find_model(str(path))
        found = predicted_batch(source, step_of(source), usable(memory),
                                max(plan.batch, min(MOST, count // STEPS)))
    except UserError as error:
        plan.why.append(f'the batch is a guess, because its memory could not be predicted: {error}')
        return plan
    fits = f'is predicted to fit {memory:.0f} GiB (--batch auto of train tries it)'
    if not found:
        plan.why.append(f'not even one image {fits}: take a smaller model')
    elif found != plan.batch:
        plan = again(found)
        plan.why.append(f'a batch of {plan.batch} {fits}')
    return plan


def _model(args: argparse.Namespace, prepared: Prepared) -> tuple[Backbone, Head, list[str]]:
    """Backbone and head, and a sentence on why."""
    backbone, why = _backbone(args, prepared)
    head = find_head(args.head or default_head(prepared.task, backbone.name), prepared.task)
    if backbone.plain and len(head.maps) < 4:
        raise UserError(f'--head {head.name} reads maps at strides 8 to 32, and those of '
                        f'{backbone.name} come as four. Take another head, or a backbone of '
                        'MambaVision, VMamba or LocalVMamba.')
    return backbone, head, [f'{head.title} with {backbone.name}' + (f' ({why})' if why else '')]


def _write(out: Path, recipe: dict, prepared: Prepared, texts: dict[str, str]) -> None:
    try:
        _remove_left_overs(out)
        with atomic_folder(out, recipe, MARKER) as work:
            write(prepared, work, _progress)
            for name, text in texts.items():
                (work / name).write_text(text, encoding='utf-8')
            _is_there(out, {})  # meanwhile, by another run
    except OSError as error:
        raise UserError(f'{out} could not be written: {error.strerror or error}. Nothing is left '
                        'there. Free some space, or write elsewhere: --out FOLDER.') from error


def say(text: str) -> None:
    """One line for people."""
    print(text, file=sys.stderr, flush=True)


def _progress(done: int, total: int) -> None:
    if done % max(1, total // 10) == 0 and total > 100:
        say(f'label images: {done} of {total}')


def _places(args: argparse.Namespace) -> tuple[str, Path]:
    for name in ('data', 'out', 'model', 'head', 'weights', *_ANSWERS):
        value = getattr(args, name)
        if isinstance(value, str) and not value.strip():
            option = 'DATA' if name == 'data' else f'--{name}'
            raise UserError(f'{option} is empty. Leave the option out if it is not needed. (Is a '
                            'variable of the shell not set?)')
    if not 0 < args.val_fraction < 1:
        raise UserError(f'--val-fraction is {args.val_fraction:g}; expected a part of the pictures '
                        'between 0 and 1, such as 0.2.')
    if not 0 <= args.seed < 2**32:
        raise UserError(f'--seed is {args.seed}; expected a whole number from 0 to {2**32 - 1}.')
    data = osp.abspath(osp.expanduser(args.data))
    out = Path(osp.abspath(osp.expanduser(args.out))) if args.out else Path(data, FOLDER)
    if str(out) == data:
        raise UserError(f'--out {args.out} is the data folder itself; expected a new folder, in it '
                        'or elsewhere.')
    return data, out


def _questions(args: argparse.Namespace) -> Questions:
    given = {name: getattr(args, name) for name in _ANSWERS if getattr(args, name) is not None}
    ask = _ask if sys.stdin is not None and sys.stdin.isatty() and not args.yes else None
    return Questions(given, args.yes, ask)


def _ask(text: str) -> str:
    print(text, end='', file=sys.stderr, flush=True)
    return sys.stdin.readline()


def _backbone(args: argparse.Namespace, prepared: Prepared) -> tuple[Backbone, str]:
    named = None
    if args.weights:
        named = _named(args.weights)
        if not is_known_source(args.weights):
            args.weights = osp.abspath(osp.expanduser(args.weights))  # wherever training starts
    if args.model:
        backbone = find_backbone(args.model)
        if named and named != (backbone.family, backbone.arch):
            raise UserError(f'--weights {args.weights} are of {named[0]} {named[1]!r}, and --model '
                            f'{args.model} is {backbone.family} {backbone.arch!r}. Give a pair, or '
                            'leave --model out.')
        return backbone, ''
    if named:
        fits = next(found for found in map(find_backbone, backbone_names())
                    if (found.family, found.arch) == named)
        return fits, 'that of the weights'
    name, why = default_backbone(prepared, has_accelerator() or bool(args.weights))
    return find_backbone(name), why


def _named(weights: str) -> tuple[str, str] | None:
    """Family and variant of weights; None where that shows only when they are loaded."""
    try:
        find_released(weights)
        if is_known_source(weights):
            return named_weights(weights)
        path = osp.expanduser(weights)
        if not osp.isfile(path):
            raise UserError(f'--weights {weights} is neither a file nor the short name of '
                            'published weights, such as mambavision-t-1k or vmamba-t-s1l8.')
        found = strip_wrappers(unwrap(read_file(path))[0])[0]
    except WeightsError as error:
        raise UserError(f'--weights: {error}.') from error
    identity = identify({name: tuple(tensor.shape) for name, tensor in found.items()})
    if identity is not None and not identity.ours:
        raise UserError(f'--weights {weights} are of {identity}, which is not a backbone of this '
                        'package.')
    return (identity.family, identity.variant) if identity and identity.variant else None


def _recipe(args: argparse.Namespace, prepared: Prepared, backbone: str, head: str) -> dict:
    """What decides about everything that is written."""
    digest = hashlib.sha256()
    for split, pictures in sorted(prepared.splits.items()):
        for one in pictures:
            digest.update(repr((split, one)).encode('utf-8', 'surrogateescape'))
    for one in (one for found in prepared.splits.values() for one in found if one.labels):
        status = os.stat(osp.join(prepared.export.root, one.labels))
        digest.update(repr((status.st_size, status.st_mtime_ns)).encode())
    return dict(kind='init', version=1, task=prepared.task, model=backbone, head=head,
                weights=args.weights, seed=args.seed, val_fraction=args.val_fraction,
                group=args.group, classes=prepared.classes, data=digest.hexdigest())


def _is_there(out: Path, recipe: dict) -> bool:
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    found = existing_recipe(out, MARKER)
    if found == recipe:
        return True
    if found is None:
        raise UserError(f'{out} exists and was not made by mmhybrid init; nothing was changed. '
                        'Choose another folder with --out.')
    changed = ', '.join(key for key in found if found[key] != recipe.get(key))
    raise UserError(f'{out} was made from something else ({changed} differ), and its config may '
                    'have been edited since; nothing was changed. Choose another folder with '
                    '--out, or remove this one.')


def _remove_left_overs(out: Path) -> None:
    """Remove what a killed run did not finish."""
    for folder in out.parent.glob(f'.{out.name}.*'):
        if time.time() - folder.stat().st_mtime > ABANDONED:
            shutil.rmtree(folder)


def _tell(prepared: Prepared, questions: Questions, facts: list[str], weights: str | None,
          backbone: Backbone) -> None:
    export = prepared.export
    say(f'{export.form}: {counted(prepared)} pictures, {len(prepared.classes)} classes '
        f'({", ".join(prepared.classes[:6])}{", ..." if len(prepared.classes) > 6 else ""}), task '
        f'{prepared.task}')
    for title, texts in (('decided', questions.told), ('data', export.notes),
                         ('worth a look', prepared.suspicious), ('config', facts)):
        for text in texts:
            say(f'  {title}: {text.rstrip(".")}')
    say(f'  weights: {_weights_text(weights, backbone)}')


def _weights_text(weights: str | None, backbone: Backbone) -> str:
    if weights is None:
        name = backbone.released()
        return 'random ones' + (f'; published ones start much better: --weights {name} (licence '
                                f'{RELEASED[name].license})' if name else '')
    if osp.isfile(weights):
        return f'{weights} ({osp.getsize(weights) / 1e6:.0f} MB)'
    return f'{weights} ({_licence_and_size(weights)}), fetched when training starts'


def _licence_and_size(weights: str) -> str:
    try:
        row = find_released(weights)
    except WeightsError:
        row = None
    licence = f'licence {row.license}, ' if row else ''
    return licence + _size_of(row.address if row else weights)


def _size_of(address: str) -> str:
    """Size of a file on a server, without fetching it."""
    if address.startswith('hf://'):
        organisation, repository, *file = address[5:].partition('@')[0].split('/')
        address = f'https://huggingface.co/{organisation}/{repository}/resolve/main/' + '/'.join(
            file)
    try:
        request = urllib.request.Request(address, method='HEAD')
        with urllib.request.urlopen(request, timeout=5) as answer:
            return f'{int(answer.headers["Content-Length"]) / 1e6:.0f} MB'
    except (OSError, ValueError, TypeError, urllib.error.URLError):
        return 'size not known without a connection'


def _next(config: Path) -> None:
    shown = shlex.quote(osp.relpath(config) if not osp.relpath(config).startswith('..')
                        else str(config))
    print(f'\nLook at {shlex.quote(str(config.with_name("report.html")))}, then\n'
          f'    mmhybrid train {shown}\n'
          f'    mmhybrid predict PICTURES --weights work_dirs/{config.stem}\n'
          'Options of train: --epochs N, --batch auto (the largest that fits), --image-size N, '
          '--early-stop N, ...')
