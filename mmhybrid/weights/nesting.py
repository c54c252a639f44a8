"""Where in a checkpoint the weights are, and under which prefixes."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .errors import WeightsError, printable
from .recognition import recognized_family

__all__ = ['EMA_KEYS', 'WRAPPERS', 'strip_parallel', 'strip_wrappers', 'top_names', 'unwrap']

#: Entries under which trainers put weights, in the order in which they are looked for.
KEYS = ('state_dict', 'model')
#: Entries with averaged weights; taken only if they are asked for.
EMA_KEYS = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'ema_model')
#: Names that wrapping modules put in front of a backbone's own: data parallelism, compilation,
#: detectors, self-supervision, transformers and lightning, detectron2.
WRAPPERS = ('module.', '_orig_mod.', 'backbone.', 'encoder.', 'model.', 'net.')

#: Those of them that leave the model whole.
_PARALLEL = ('module.', '_orig_mod.')


def unwrap(checkpoint: object, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Find the tensors of a checkpoint.

    Args:
        checkpoint: what was saved.
        key: the entry to take, e.g. ``'state_dict_ema'``; by default 'state_dict', else 'model',
            else the checkpoint itself.

    Returns:
        Tensors by name, and the entry that they were found under ('' for the checkpoint itself).

    Raises:
        WeightsError: if there are none.
    """
    found, where = checkpoint, ''
    if key is not None:
        if not isinstance(checkpoint, Mapping) or key not in checkpoint:
            raise WeightsError(f'got key={key!r}, but the checkpoint has {_content(checkpoint)}')
        found, where = checkpoint[key], key
    elif isinstance(checkpoint, Mapping):
        where = next((k for k in KEYS if isinstance(checkpoint.get(k), Mapping)), '')
        found = checkpoint[where] if where else checkpoint
    tensors = {}
    if isinstance(found, Mapping):
        if where and isinstance(found.get('state_dict'), Mapping):  # an entry of entries
            found, where = found['state_dict'], f'{where}.state_dict'
        tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        only = [k for k in EMA_KEYS if isinstance(checkpoint, Mapping) and k in checkpoint]
        hint = f'; averaged weights are taken on request: key={only[0]!r}' if only else ''
        raise WeightsError(f'the checkpoint holds no tensors (it has {_content(checkpoint)}), '
                           f"expected a state dict, or one under 'state_dict' or 'model'{hint}")
    odd = next((name for name in tensors if len(name) > 1000 or not name.isprintable()), None)
    if odd is not None:
        raise WeightsError(f'the checkpoint has {printable(odd, 80)} as the name of a tensor, '
                           'expected names of parts of a model')
    return tensors, where


def _content(checkpoint: object) -> str:
    if isinstance(checkpoint, Mapping):
        return printable(f'the keys {list(checkpoint)[:8]}', 400)
    return type(checkpoint).__name__


def strip_wrappers(state_dict: Mapping[str, Tensor], prefix: str | None = None
                   ) -> tuple[dict[str, Tensor], str]:
    """Take the backbone out of a wrapping model's tensors.

    Args:
        state_dict: tensors by name.
        prefix: exact name of the part that is wanted, e.g. ``'backbone.'``; by default each of
            ``WRAPPERS`` is removed wherever it occurs, with everything that does not begin with
            it, until the names are those of one of our families or no wrapper is left.

    Returns:
        The part's tensors by their own names, and the prefix that was removed.

    Raises:
        WeightsError: if no name begins with ``prefix``.
    """
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        found = {name[len(prefix):]: tensor for name, tensor in state_dict.items()
                 if name.startswith(prefix)}
        if not found:
            raise WeightsError(f'no tensor name begins with {prefix!r}; names begin with '
                               f'{", ".join(top_names(state_dict))}')
        return found, prefix
    current, removed, stripped = dict(state_dict), '', True
    while stripped and recognized_family(current) is None:
        stripped = False
        for wrapper in WRAPPERS:
            if any(name.startswith(wrapper) for name in current):
                current = {name[len(wrapper):]: tensor for name, tensor in current.items()
                           if name.startswith(wrapper)}
                removed, stripped = removed + wrapper, True
                break
    return current, removed


def strip_parallel(state_dict: Mapping[str, object]) -> tuple[dict[str, object], str]:
    """Take away what data parallelism and compilation put in front of every name, in any order.

    Returns:
        Tensors by the model's own names, and the prefix that was removed, e.g.
        ``'module._orig_mod.'``.
    """
    current, removed = dict(state_dict), ''
    while current:
        wrapper = next((wrapper for wrapper in _PARALLEL
                        if all(str(name).startswith(wrapper) for name in current)), None)
        if wrapper is None:
            break
        current = {name[len(wrapper):]: tensor for name, tensor in current.items()}
        removed += wrapper
    return current, removed


def top_names(names) -> list[str]:
    """Give the first parts of dotted names, each once, in order."""
    return list(dict.fromkeys(name.split('.')[0] for name in names))
