"""Weights of a file into our modules: nothing goes in quietly.

Tensors are compared with the module one by one, fitted where the module knows how, and loaded only
if they are the module's own.  Finding and reading files is :mod:`mmhybrid.weights`.
"""
from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from mmengine.logging import print_log
from torch import Tensor, nn

from mmhybrid.weights import (
    Identity,
    WeightsError,
    identify,
    kind_of,
    read_checkpoint,
    released_as,
    shown,
    strip_parallel,
    strip_wrappers,
    unwrap,
)
from mmhybrid.weights.adapters import fit_adapters

__all__ = ['Comparison', 'LoadReport', 'check_windows', 'compare', 'fit_weights', 'load_backbone',
           'load_weights']

#: Below this share of matching tensors a file is taken for that of another model.
LEAST_MATCH = 0.95
# The last layer of our classifiers; its first dimension is the number of classes.
_HEAD = r'(classifier\.)?head\.'


@dataclass(frozen=True)
class Comparison:
    """Which tensors of a file fit a module.

    Attributes:
        matched: names with equal shapes on both sides.
        missing: names that only the module has.
        unexpected: names that only the file has.
        disagreeing: name -> (shape in the file, shape in the module).
        fresh: names that only the module has, as expected: they keep their initial values.
        unused: names that only the file has, as expected.
        values: number of values of the matched tensors.
        wanted: number of values of all tensors of the module, without the fresh ones.
    """

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    disagreeing: dict[str, tuple[tuple, tuple]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    values: int = 0
    wanted: int = 0

    @property
    def share(self) -> float:
        """Matched names over all names of both sides that should match, 0 to 1."""
        others = len(self.missing) + len(self.unexpected) + len(self.disagreeing)
        return len(self.matched) / max(len(self.matched) + others, 1)

    @property
    def fits(self) -> bool:
        """Whether the file is taken for the module's own."""
        return not self.disagreeing and self.share >= LEAST_MATCH

    def __str__(self) -> str:
        text = f'{len(self.matched)} tensors match ({100 * self.share:.1f} %)'
        if self.disagreeing:
            name, (theirs, ours) = next(iter(self.disagreeing.items()))
            text += (f'; {len(self.disagreeing)} have another shape (first: {name} is {theirs} in '
                     f'the file and {ours} in the model)')
        for what, names in (('missing', self.missing), ('unexpected', self.unexpected)):
            if names:
                text += f'; {what}: {_grouped(names)}'
        return text


@dataclass(frozen=True)
class LoadReport:
    """What became of a file: its text is a table for people.

    Attributes:
        source: as it was given, without the secrets of an address.
        module: name of the class that was loaded into.
        holds: what the file holds, in words.
        comparison: after fitting.
        resized: name -> (shape in the file, shape in the module) of tensors that were resampled.
        aside: names in the file that belong to other parts of a wrapping model.
    """

    source: str
    module: str
    holds: str
    comparison: Comparison
    resized: dict[str, tuple[tuple, tuple]] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the file was taken for the module's own."""
        return self.comparison.fits

    def __str__(self) -> str:
        found = self.comparison
        rows = [('holds', self.holds), (
            'loaded', f'{len(found.matched)} of '
            f'{len(found.matched) + len(found.missing) + len(found.disagreeing)} tensors, '
            f'{100 * found.values / max(found.wanted, 1):.1f} % of {found.wanted / 1e6:.2f} M '
            f'values (match {100 * found.share:.1f} %)')]
        rows += [('resized', f'{name} {_shape(theirs)} -> {_shape(ours)}')
                 for name, (theirs, ours) in self.resized.items()]
        rows += [('other shape', f'{name} {_shape(theirs)}, the model has {_shape(ours)}')
                 for name, (theirs, ours) in list(found.disagreeing.items())[:8]]
        rows += [(what, _grouped(names)) for what, names in (
            ('missing', found.missing), ('unexpected', found.unexpected)) if names]
        rows += [(what, _grouped(names, depth=1)) for what, names in (
            ('starts fresh', found.fresh), ('not needed', found.unused),
            ('left aside', self.aside)) if names]
        return f'{self.module} loaded from {self.source}\n' + '\n'.join(
            f'    {what:<12}  {text}' for what, text in rows)


def compare(module: nn.Module, state_dict: Mapping[str, Tensor], may_differ: str | None = None
            ) -> Comparison:
    """Compare names and shapes.

    Args:
        module: where the tensors should go.
        state_dict: tensors with the module's names.
        may_differ: regular expression; names that it matches from their start may be on one side
            only.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    sizes = {name: tensor.numel() for name, tensor in module.state_dict().items()}
    free = re.compile(may_differ) if may_differ else None

    def only_in(some: dict, others: dict) -> tuple[list[str], list[str]]:
        names = [n for n in some if n not in others]
        expected = [n for n in names if free and free.match(n)]
        return [n for n in names if n not in expected], expected

    missing, fresh = only_in(own, theirs)
    unexpected, unused = only_in(theirs, own)
    matched = [n for n in own if theirs.get(n) == own[n]]
    return Comparison(
        matched=matched, missing=missing, unexpected=unexpected,
        disagreeing={n: (theirs[n], own[n]) for n in own if n in theirs and theirs[n] != own[n]},
        fresh=fresh, unused=unused, values=sum(sizes[n] for n in matched),
        wanted=sum(sizes[n] for n in own if n not in fresh))


def load_weights(model: nn.Module, source: str | os.PathLike, **options) -> LoadReport:
    """Load a file into a model, whole or only its backbone, whatever the file holds.

    Files of classification networks and bare backbones go into ``model.backbone``, if there is
    one; files of whole detectors and segmentors into the whole model.

    Args:
        model: receives the weights, in place.
        source: see :func:`mmhybrid.weights.fetch`.
        options: see :func:`load_backbone`.

    Returns:
        What matched and what did not.

    Raises:
        WeightsError: if the file cannot be used.  The model is then unchanged.
    """
    backbone = getattr(model, 'backbone', None)
    if backbone is None:
        return load_backbone(model, source, **options)
    checkpoint = read_checkpoint(source, options.get('map_location', 'cpu'),
                                 options.get('trust', False))
    whole = kind_of(unwrap(checkpoint, options.get('key'))[0]) in ('detector', 'segmentor')
    return _load(model if whole and not options.get('prefix') else backbone, checkpoint,
                 os.fspath(source), **options)


def load_backbone(module: nn.Module, source: str | os.PathLike, *, prefix: str | None = None,
                  key: str | None = None, strict: bool = True, map_location='cpu',
                  trust: bool = False, new_classes: bool = False) -> LoadReport:
    """Load a file into a backbone, or refuse it.

    Accepted are files whose names, after unwrapping, agree with the module's to at least 95 % and
    whose shapes agree everywhere, once the module has fitted what depends on the size of the grid
    (position embeddings, rotary tables) and the first convolution was fitted to the number of
    input channels.

    Args:
        module: receives the weights, in place.
        source: path, http(s) address, ``hf://organisation/repository[/file][@revision]`` or short
            name; see :func:`mmhybrid.weights.fetch`.
        prefix: see :func:`mmhybrid.weights.strip_wrappers`.
        key: entry of the checkpoint, e.g. 'state_dict_ema'; see :func:`mmhybrid.weights.unwrap`.
        strict: False loads whatever fits, however little, but not nothing.
        map_location: device on which the file is read.
        trust: read pickles that may run code, too.
        new_classes: see :func:`fit_weights`.

    Returns:
        What matched and what did not.

    Raises:
        FileNotFoundError: if there is no such file.
        WeightsError: if it cannot be used, saying why in one line.  The module is then unchanged.
    """
    checkpoint = read_checkpoint(source, map_location, trust)
    return _load(module, checkpoint, os.fspath(source), prefix=prefix, key=key, strict=strict,
                 new_classes=new_classes)


def fit_weights(module: nn.Module, checkpoint: object, source: str, *, prefix: str | None = None,
                key: str | None = None, strict: bool = True, new_classes: bool = False
                ) -> tuple[dict[str, Tensor], LoadReport]:
    """Bring the weights of a checkpoint into the form of a module without loading them.

    Args:
        module: whole model, backbone or classifier.
        checkpoint: what a file holds.
        source: what messages call it.
        prefix: see :func:`load_backbone`.
        key: see :func:`load_backbone`.
        strict: see :func:`load_backbone`.
        new_classes: let a classifier's last layer keep its initial values if the file has it for
            another number of classes.

    Returns:
        The tensors that match, and the report.

    Raises:
        WeightsError: if they do not fit.
    """
    named, source = source, shown(source)
    found, where = unwrap(checkpoint, key)
    whole = hasattr(module, 'backbone') and not prefix
    state_dict, removed = strip_parallel(found) if whole else strip_wrappers(found, prefix)
    inside = {removed + name for name in state_dict}
    aside = [name for name in found if name not in inside]
    state_dict = fit_adapters(state_dict, module.state_dict())
    original = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    adapt = getattr(module, 'adapt_state_dict', None)
    fitted = _fit_input(module, adapt(state_dict) if adapt else state_dict)
    resized = {name: (original[name], tuple(tensor.shape)) for name, tensor in fitted.items()
               if name in original and original[name] != tuple(tensor.shape)
               and len(original[name]) == tensor.dim()}
    may_differ = getattr(module, 'may_differ', None)
    if new_classes:
        others = _of_other_classes(module, fitted)
        fitted = {name: tensor for name, tensor in fitted.items() if name not in others}
        aside += others
        may_differ = '|'.join([may_differ or r'\Z', *map(re.escape, others)])
    result = compare(module, fitted, may_differ)
    if not result.matched or strict and not result.fits:
        raise WeightsError(_refusal(module, original, result, source))
    check_windows(module, named)
    identity = identify(_part(original) if whole else original)
    places = [f'in {where!r}'] if where else []
    places += [f'without {removed!r}'] if removed else []
    holds = f'{identity or "a network of another family"}, {kind_of(found)}'
    report = LoadReport(
        source, type(module).__name__, holds + (f' ({", ".join(places)})' if places else ''),
        result, resized, aside)
    return {name: fitted[name] for name in result.matched}, report


def check_windows(module: nn.Module, source: str) -> None:
    """Warn if a classifier has other windows than the published one whose file it loads.

    Windows are in no file, so this goes by the name: see :func:`mmhybrid.weights.released_as`.
    """
    network = getattr(module, 'backbone', module)
    ours, row = getattr(network, 'window_size', None), released_as(source)
    if ours is None or row is None or row.window_size is None:
        return
    # stages 1 and 2 have no windows; dense networks are trained with others than classifiers
    if kind_of(network.state_dict()) == 'classification' and ours[2:] != row.window_size[2:]:
        print_log(f'{shown(source)} is the classifier {row.name}, which needs '
                  f'window_size={row.window_size}, but the model has {ours}, so that it gives '
                  'other results; set window_size if you did not mean to change it.',
                  logger='current', level=logging.WARNING)


def _load(module: nn.Module, checkpoint: object, source: str, *, map_location=None, trust=False,
          **options) -> LoadReport:
    weights, report = fit_weights(module, checkpoint, source, **options)
    module.load_state_dict(weights, strict=False)
    return report


def _fit_input(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fit a first convolution for colour images to another number of channels.

    A single channel gets the sum of the three, so that a grey image gives what it gave before; more
    channels repeat the three at 3 / channels of their weight.
    """
    fitted = dict(state_dict)
    for name, own in module.state_dict().items():
        weight = state_dict.get(name)
        if weight is None or weight.dim() != 4 or not re.match(r'(backbone\.)?patch_embed\.', name):
            continue
        channels = own.shape[1]
        if weight.shape[1] == 3 != channels and weight.shape[::2] == own.shape[::2]:
            if channels == 1:
                fitted[name] = weight.sum(dim=1, keepdim=True)
            else:
                repeated = weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
                fitted[name] = repeated * (3 / channels)
    return fitted


def _of_other_classes(module: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of the last layer, where nothing but the number of classes differs."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return [name for name, tensor in state_dict.items()
            if re.match(_HEAD, name) and name in own and tensor.dim() == len(own[name]) > 0
            and tensor.shape[0] != own[name][0] and tuple(tensor.shape[1:]) == own[name][1:]]


def _refusal(module: nn.Module, shapes: Mapping[str, tuple], result: Comparison, source: str
             ) -> str:
    """Say in one line why a file does not fit."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs, ours = identify(_part(shapes)), identify(_part(own))
    wanted = str(ours) if ours else type(module).__name__
    if theirs is None:
        names = _grouped(shapes, depth=1)
        return (f'{source} holds no network that is known here (its names begin with {names}), '
                f'expected {wanted}; give a file of that network{_files(ours)}')
    if ours is not None and theirs.family != ours.family:
        instead = f'build the model with mmhybrid.{theirs.family}, or ' if theirs.ours else ''
        return (f'{source} holds another family, {theirs}, expected {wanted}; {instead}give a '
                f'file of {ours.family}{_files(ours)}')
    if ours is not None and theirs.facts and theirs.facts != ours.facts:
        hint = f'set arch={theirs.variant!r}, or ' if theirs.variant else ''
        return (f'{source} holds another variant, {_in_full(theirs)}, expected {_in_full(ours)}; '
                f'{hint}give a file of this variant{_files(ours)}')
    if result.disagreeing and all(re.match(_HEAD, name) for name in result.disagreeing):
        classes, wanted = (shapes[0] for shapes in next(iter(result.disagreeing.values())))
        return (f'{source} is a classifier of {classes} classes, expected {wanted}; set '
                f'num_classes={classes}, or start a training from it, which leaves its last layer '
                'out (--pretrained)')
    return (f'{source} does not fit {type(module).__name__}: {result}; compare its settings, or '
            'load whatever fits with strict=False')


def _part(shapes: Mapping[str, tuple]) -> dict[str, tuple]:
    inner = {n.removeprefix('backbone.'): s for n, s in shapes.items() if n.startswith('backbone.')}
    return inner or dict(shapes)


def _in_full(identity: Identity) -> str:
    return f'{identity} ({identity.facts})' if identity.variant else str(identity)


def _files(identity: Identity | None) -> str:
    names = identity.released if identity else []
    return f', e.g. {" or ".join(names[:2])}' if names else ''


def _shape(shape: tuple[int, ...]) -> str:
    return 'x'.join(map(str, shape)) or 'one value'


def _grouped(names, depth: int = 4, most: int = 8) -> str:
    """Name groups such as 'levels.2.blocks.4 (9)' in place of every single tensor."""
    counts = Counter('.'.join(name.split('.')[:depth]) for name in names)
    shown = [f'{group} ({count})' for group, count in list(counts.items())[:most]]
    return ', '.join(shown + ([f'and {len(counts) - most} more'] if len(counts) > most else []))
