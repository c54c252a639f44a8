"""Foreign checkpoint files into our modules: pure functions, and nothing goes in quietly.

A file is read without running code from it, its tensors are unwrapped and renamed, compared with
the module one by one, and loaded only if they are the module's own.
"""
from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

__all__ = ['Comparison', 'compare', 'load_backbone', 'read_checkpoint', 'strip_wrappers',
           'unwrap_state_dict']

#: Names that wrapping modules put in front of a backbone's own.
WRAPPERS = ('module.', 'backbone.', 'encoder.', 'model.')
#: Below this share of matching tensors a file is taken for that of another model.
LEAST_MATCH = 0.95


@dataclass(frozen=True)
class Comparison:
    """Which tensors of a file fit a module; names of groups that may differ are left out.

    Attributes:
        matched: names with equal shapes on both sides.
        missing: names that only the module has.
        unexpected: names that only the file has.
        disagreeing: name -> (shape in the file, shape in the module).
        aside: number of the file's tensors that belong to other parts of a wrapping model.
    """

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    disagreeing: dict[str, tuple[tuple, tuple]] = field(default_factory=dict)
    aside: int = 0

    @property
    def share(self) -> float:
        """Matched names over all names of both sides, 0 to 1."""
        others = len(self.missing) + len(self.unexpected) + len(self.disagreeing)
        return len(self.matched) / max(len(self.matched) + others, 1)

    def __str__(self) -> str:
        text = f'{len(self.matched)} tensors matched ({100 * self.share:.1f} %)'
        if self.disagreeing:
            name, (theirs, ours) = next(iter(self.disagreeing.items()))
            text += (f'; {len(self.disagreeing)} have another shape (first: {name} is {theirs} in '
                     f'the file and {ours} in the model)')
        for what, names in (('missing', self.missing), ('unexpected', self.unexpected)):
            if names:
                text += f'; {what}: {_grouped(names)}'
        if self.aside:
            text += f'; {self.aside} of other parts left aside'
        return text


def read_checkpoint(path: str | os.PathLike, map_location: str = 'cpu') -> object:
    """Read a .pth or .safetensors file without executing anything in it.

    Options, loss curves and numpy numbers that trainers save beside the weights come back as empty
    objects.

    Args:
        path: a local file.
        map_location: device of the tensors, as in ``torch.load``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds more than tensors and plain values, or cannot be read.
        ImportError: for a .safetensors file without the safetensors package.
    """
    path = os.fspath(path)
    if '://' in path:
        raise ValueError(f'got the address {path} as a checkpoint, expected a local file; download '
                         'it and give its path')
    if not os.path.isfile(path):
        raise FileNotFoundError(f'there is no checkpoint file {os.path.abspath(path)}; check the '
                                'path or download the file first')
    if path.endswith('.safetensors'):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f'reading {path} needs the safetensors package; '
                              'run: pip install safetensors') from error
        return load_file(path, device=map_location)
    try:
        with _beside_weights_ignored():
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r'GLOBAL (\S+)', str(error))
        raise ValueError(
            f'{path} was not loaded: it holds {culprit[1] if culprit else "something"} besides '
            'tensors and plain values, and reading that could run code from the file. If you trust '
            "it, keep only its weights: torch.save({'state_dict': torch.load(old, "
            "weights_only=False)['state_dict']}, new)") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f'{path} is not a checkpoint that torch can read ({error}); it may be '
                         'incomplete, download it again') from error


def unwrap_state_dict(checkpoint: object) -> dict[str, Tensor]:
    """Find the tensors of a checkpoint: under 'state_dict', under 'model', or the object itself.

    Raises:
        ValueError: if there are none.
    """
    found = checkpoint
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            found = checkpoint[key]
            break
    tensors = {}
    if isinstance(found, Mapping):
        tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        kind = f'the keys {list(checkpoint)[:8]}' if isinstance(checkpoint, Mapping) else type(
            checkpoint).__name__
        raise ValueError(f'the checkpoint holds no tensors (it has {kind}), expected a state dict, '
                         "or one under 'state_dict' or 'model'")
    return tensors


def strip_wrappers(state_dict: Mapping[str, Tensor], prefix: str | None = None
                   ) -> dict[str, Tensor]:
    """Take the backbone out of a wrapping model's tensors.

    Args:
        state_dict: tensors by name.
        prefix: exact name of the part that is wanted, e.g. ``'backbone.'``; by default each of
            module., backbone., encoder. and model. is removed wherever it occurs, with everything
            that does not begin with it.

    Raises:
        ValueError: if no name begins with ``prefix``.
    """
    names = dict.fromkeys(state_dict)
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        found = {name[len(prefix):]: state_dict[name] for name in names if name.startswith(prefix)}
        if not found:
            raise ValueError(f'no tensor name begins with {prefix!r}; names begin with '
                             f'{_grouped(names, depth=1)}')
        return found
    current = dict(state_dict)
    stripped = True
    while stripped:
        stripped = False
        for wrapper in WRAPPERS:
            if any(name.startswith(wrapper) for name in current):
                current = {name[len(wrapper):]: tensor for name, tensor in current.items()
                           if name.startswith(wrapper)}
                stripped = True
    return current


def compare(module: nn.Module, state_dict: Mapping[str, Tensor], may_differ: str | None = None
            ) -> Comparison:
    """Compare names and shapes.

    Args:
        module: where the tensors should go.
        state_dict: tensors with the module's names.
        may_differ: regular expression; names that it matches from their start may be on one side
            only and are then not reported.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    free = re.compile(may_differ) if may_differ else None

    def only_in(some: dict, others: dict) -> list[str]:
        return [n for n in some if n not in others and not (free and free.match(n))]

    return Comparison(
        matched=[n for n in own if theirs.get(n) == own[n]],
        missing=only_in(own, theirs),
        unexpected=only_in(theirs, own),
        disagreeing={n: (theirs[n], own[n]) for n in own if n in theirs and theirs[n] != own[n]})


def load_backbone(module: nn.Module, path: str | os.PathLike, *, prefix: str | None = None,
                  map_location: str = 'cpu', may_differ: str | None = None,
                  describe: Callable[[Mapping[str, Tensor]], str] | None = None,
                  adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
                  ) -> Comparison:
    """Load a file into a module, or refuse it.

    Accepted are files whose names, after unwrapping, agree with the module's to at least 95 % and
    whose shapes agree everywhere.

    Args:
        module: receives the weights, in place.
        path: see :func:`read_checkpoint`.
        prefix: see :func:`strip_wrappers`.
        map_location: see :func:`read_checkpoint`.
        may_differ: see :func:`compare`.
        describe: says in words which model a state dict belongs to; used in the error message.
        adapt: gives the file's weights the names and shapes of the module before they are compared.

    Returns:
        What matched and what did not.

    Raises:
        ValueError: if the file belongs to another model.  The module is then unchanged.
    """
    found = unwrap_state_dict(read_checkpoint(path, map_location))
    state_dict = strip_wrappers(found, prefix)
    aside = len(found) - len(state_dict)
    if adapt:
        state_dict = adapt(state_dict)
    result = replace(compare(module, state_dict, may_differ), aside=aside)
    if result.disagreeing or result.share < LEAST_MATCH:
        hint = describe(state_dict) if describe else ''
        raise ValueError(f'{os.fspath(path)} does not fit {type(module).__name__}: {result}. '
                         f'{hint or "Give the file of this architecture."}')
    module.load_state_dict({name: state_dict[name] for name in result.matched}, strict=False)
    return result


def _grouped(names, depth: int = 4, most: int = 8) -> str:
    """Name groups such as 'levels.2.blocks.4 (9)' in place of every single tensor."""
    counts = Counter('.'.join(name.split('.')[:depth]) for name in names)
    shown = [f'{group} ({count})' for group, count in list(counts.items())[:most]]
    return ', '.join(shown + ([f'and {len(counts) - most} more'] if len(counts) > most else []))


class _Inert:
    """Stands for an object that is not a tensor and that nobody needs: keeps and does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


# What trainers put beside the weights: timm its options, mmengine its loss curves, both numpy
# numbers.  While a file is read, these names lead to inert classes.
_BESIDE_WEIGHTS = (
    'argparse.Namespace', 'pathlib.PosixPath', 'mmengine.logging.history_buffer.HistoryBuffer',
    'builtins.getattr', '_codecs.encode', 'numpy.dtype', 'numpy.ndarray',
    *(f'numpy.{core}.{name}' for core in ('core', '_core') for name in (
        'multiarray.scalar', 'multiarray._reconstruct', 'numeric._frombuffer')))


def _inert(name: str) -> type:
    module, _, own = name.rpartition('.')
    return type(own, (_Inert,), {'__module__': module, '__qualname__': own})


@contextlib.contextmanager
def _beside_weights_ignored() -> Iterator[None]:
    """Let ``weights_only=True`` pass over what trainers add to the weights."""
    types = [_inert(name) for name in _BESIDE_WEIGHTS]
    if hasattr(torch.serialization, 'safe_globals'):
        with torch.serialization.safe_globals(types):
            yield
        return
    # torch 2.4 has the list but not the context
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(types)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
