"""Checkpoints in other containers: clean safetensors or mm files, slim ones, and back again.

A clean file has the weights under the model's own names and says where they are from.  What was
taken away, the entry and the prefix, is noted in it, so that the original naming can be restored.
"""
from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .adapters import adapters_of, merge_adapters
from .addresses import shown
from .download import sha256_of
from .errors import WeightsError
from .nesting import strip_parallel, strip_wrappers, unwrap
from .reading import read_file, safetensors_metadata
from .recognition import identify, kind_of
from .released import RELEASED
from .shards import put_together
from .sources import fetch

__all__ = ['convert', 'merge_lora', 'provenance_of', 'publish', 'restore']

_KEPT = ('dataset_meta', 'cfg', 'epoch', 'iter', 'mmengine_version')  # of mmengine's meta
_NOTE = 'mmhybrid'  # entry of an mm file's meta, prefix of safetensors' keys


def convert(source: str | os.PathLike, target: str | os.PathLike, *, key: str | None = None,
            licence: str | None = None, trust: bool = False) -> dict[str, str]:
    """Write the weights of a file cleanly, with their provenance.

    Args:
        source: see :func:`mmhybrid.weights.fetch`.
        target: file to write; its suffix .safetensors or .pth decides the format.
        key: entry to take; see :func:`mmhybrid.weights.unwrap`.
        licence: of the weights; known for published files.
        trust: see :func:`mmhybrid.weights.read_file`.

    Returns:
        The provenance: source, sha256, licence, family, arch, kind and how to restore the original.

    Raises:
        WeightsError: if the source cannot be read or the target has another suffix.
    """
    path, target, name = fetch(source), _checked_target(target), shown(os.fspath(source))
    found, where = unwrap(read_file(path, trust=trust, name=name), key)
    kind = kind_of(found)
    # A whole detector stays whole; only what wraps the model is taken away.
    state_dict, prefix = strip_wrappers(found) if kind not in ('detector', 'segmentor') else (
        strip_parallel(found))
    aside = sorted(set(found) - {prefix + name for name in state_dict})
    if aside:
        raise WeightsError(f'{name} holds tensors beside the model that would be lost '
                           f'({", ".join(aside[:3])}); load the part that you want with '
                           'load_weights and save that')
    inner = strip_wrappers(state_dict)[0]
    identity = identify({name: tuple(t.shape) for name, t in inner.items()})
    row = _released(os.fspath(source), path)
    facts = dict(
        source=path.name if os.path.isfile(source) else name,
        sha256=sha256_of(path),
        published=row.address if row else '',
        licence=licence or (row.license if row else 'unknown'),
        repository=row.source if row else '', kind=kind,
        family=identity.family if identity else '', arch=(identity and identity.variant) or '',
        original=json.dumps(dict(entry=where, prefix=prefix)))
    facts = {name: value for name, value in facts.items() if value}
    with _aside(target) as part:
        _write(state_dict, part, facts)
        os.replace(part, target)
    return facts


def join(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """Write a checkpoint in pieces (``--fsdp sharded``) as one .pth file, with all that is in it.

    Raises:
        WeightsError: if the pieces do not fit each other, or the target has another suffix.
    """
    if not os.fspath(target).endswith('.pth'):
        raise WeightsError(f'{target}: pieces of a checkpoint become a .pth file, which '
                           'mmhybrid convert brings into other containers')
    checkpoint = put_together(folder, read_file)
    with _aside(Path(target)) as part:
        torch.save(checkpoint, part)
        os.replace(part, target)


def restore(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Write a converted file under its original names and entry, as a .pth file.

    Raises:
        WeightsError: if the file was not written by :func:`convert`.
    """
    path = fetch(source)
    facts, name = provenance_of(path), shown(os.fspath(source))
    if 'original' not in facts:
        raise WeightsError(f'{name} does not say how it was named originally; expected a file '
                           'that tools/convert_checkpoint.py wrote')
    original = _noted(facts['original'], name)
    state_dict = {original['prefix'] + name: tensor
                  for name, tensor in unwrap(read_file(path))[0].items()}
    for entry in reversed(original['entry'].split('.') if original['entry'] else []):
        state_dict = {entry: state_dict}
    with _aside(Path(target)) as part:
        torch.save(state_dict, part)
        os.replace(part, target)


def _noted(text: str, name: str) -> dict[str, str]:
    """Entry and prefix that were noted, as JSON."""
    try:
        noted = json.loads(text)
        if all(type(noted[key]) is str for key in ('entry', 'prefix')):
            return noted
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise WeightsError(f'{name} says in its note "original" {text[:80]!r}, expected the entry '
                       'and the prefix that tools/convert_checkpoint.py notes; convert it again')


def provenance_of(path: str | os.PathLike) -> dict[str, str]:
    """Read what :func:`convert` noted in a file; nothing for other files."""
    metadata = safetensors_metadata(path)
    if metadata:
        return {name.partition('.')[2]: value for name, value in metadata.items()
                if name.startswith(f'{_NOTE}.')}
    checkpoint = read_file(path)
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    notes = meta.get(_NOTE) if isinstance(meta, Mapping) else None
    return {name: value for name, value in notes.items() if isinstance(value, str)} if isinstance(
        notes, Mapping) else {}


def publish(source: str | os.PathLike, target: str | os.PathLike, *, trust: bool = False) -> Path:
    """Slim a checkpoint of training: weights and their description, no optimizer and no curves.

    Where ``EMAHook`` was on, the averaged weights are what mmengine saves as the model.

    Args:
        source: file that mmengine wrote.
        target: file to write; the first eight digits of its SHA-256 are added to its name, so that
            downloads can be checked.
        trust: see :func:`mmhybrid.weights.read_file`.

    Returns:
        Path of the file.

    Raises:
        WeightsError: if the source cannot be read or the target has another suffix.
    """
    target = _checked_target(target)
    state_dict, kept = _slim(source, trust)
    with _aside(target) as part:
        _write_slim(state_dict, kept, part)
        final = target.with_name(f'{target.stem}-{sha256_of(part)[:8]}{target.suffix}')
        os.replace(part, final)
    return final


def merge_lora(source: str | os.PathLike, target: str | os.PathLike, *, trust: bool = False) -> int:
    """Merge the adapters of a checkpoint into its weights: a slim file for the ordinary model.

    Args:
        source: file that mmengine wrote.
        target: file to write.
        trust: see :func:`mmhybrid.weights.read_file`.

    Returns:
        Number of weights that had adapters.

    Raises:
        WeightsError: if the source has no adapters or cannot be read, or the target has another
            suffix.
    """
    target = _checked_target(target)
    state_dict, kept = _slim(source, trust)
    count = len(adapters_of(state_dict))
    merged = merge_adapters(state_dict)
    if not count:
        raise WeightsError(f'{shown(os.fspath(source))} has no adapters to merge; expected a '
                           'checkpoint of a training with --lora; this one loads as it is')
    with _aside(target) as part:
        _write_slim(merged, kept, part)
        os.replace(part, target)
    return count


def _slim(source: str | os.PathLike, trust: bool) -> tuple[dict[str, Tensor], dict]:
    """The weights of a checkpoint of training, and what describes them."""
    checkpoint = read_file(fetch(source), trust=trust, name=os.fspath(source))
    found, where = unwrap(checkpoint)
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) and where else None
    meta = meta if isinstance(meta, Mapping) else {}
    return strip_parallel(found)[0], {name: meta[name] for name in _KEPT if name in meta}


def _write_slim(state_dict: Mapping[str, Tensor], kept: dict, target: Path) -> None:
    if target.suffix == '.pth':
        torch.save(dict(meta=kept, state_dict=_own(state_dict)), target)
        return
    described = kept.get('dataset_meta')
    names = described.get('classes') if isinstance(described, Mapping) else None
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        names = ()
    _write(state_dict, target, dict(classes=json.dumps(list(names))) if names else {})


def _checked_target(target: str | os.PathLike) -> Path:
    target = Path(target)
    if target.suffix not in ('.safetensors', '.pth'):
        raise WeightsError(f'got {target} to write to, expected a name that ends in .safetensors '
                           'or .pth')
    return target


def _released(source: str, path: Path):
    for row in RELEASED.values():
        if source.lower() == row.name or row.address == source or row.file and (
                path.name == row.file or path.name.endswith(f'-{row.file}')):
            return row
    return None


def _own(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every tensor memory of its own and no more than it needs."""
    return {name: tensor.detach().cpu().clone().contiguous()
            for name, tensor in state_dict.items()}


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Give a name in a folder of our own beside the target, for a file until it is whole."""
    with tempfile.TemporaryDirectory(prefix='.part-', dir=target.parent) as folder:
        yield Path(folder) / target.name


def _write(state_dict: Mapping[str, Tensor], target: Path, facts: dict[str, str]) -> None:
    if target.suffix == '.pth':
        torch.save(dict(meta={_NOTE: facts}, state_dict=_own(state_dict)), target)
        return
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError('writing .safetensors needs that package; run: pip install safetensors, '
                          'or write a .pth file') from error
    metadata = {f'{_NOTE}.{name}': value for name, value in facts.items()}
    save_file(_own(state_dict), target, metadata={'format': 'pt', **metadata})
