"""mmengine's ways to load a checkpoint, led through our reader.

``load_from``, ``--resume``, ``init_cfg`` of any module, ``init_detector`` and ``init_model`` all
ask mmengine's ``CheckpointLoader``, which has one function per kind of address.  With this patch
these functions are ours: nothing that they read can run code, and besides paths they understand
``hf://`` and the short names of published weights.
"""
from __future__ import annotations

import io
import logging
import os.path as osp

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmhybrid.weights import (
    TRUST_VARIABLE,
    WeightsError,
    printable,
    read_checkpoint,
    read_file,
    shown,
    trusted,
)

from .embedded_config import plain_config, settled_text

__all__ = ['install', 'is_installed']


def _inert(checkpoint: object, name: str) -> object:
    """Refuse entries that are not what mmengine takes them for; take configs' teeth.

    ``resume`` runs ``meta.config``, which its own checkpoints do not have. Inferencers that are
    given no config use the one that training wrote.
    """
    if not isinstance(checkpoint, dict):
        return checkpoint
    name = printable(shown(name))
    check_entries(checkpoint, name)
    meta = checkpoint.get('meta') or {}
    meta.pop('config', None)
    hub = checkpoint.get('message_hub') or {}
    if not trusted():
        for place, holder in (('meta', meta), (
                'message_hub.runtime_info', hub.get('runtime_info') or {})):
            if 'cfg' in holder:
                _settle(holder, f'{place}.cfg', name)
    return checkpoint


def check_entries(checkpoint: dict, name: str) -> None:
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    entries = {'meta': meta, 'message_hub': hub, 'state_dict': checkpoint.get('state_dict')}
    for key, holder in (('meta', meta), ('message_hub', hub)):
        if isinstance(holder, dict):
            entries.update({f'{key}.{each}': holder.get(each) for each in (
                'dataset_meta', 'runtime_info', 'log_scalars', 'resumed_keys')})
    for key, value in entries.items():
        if value is not None and not isinstance(value, dict):
            raise WeightsError(f'{name} was not loaded: {key} is a {type(value).__name__}, '
                               'expected a dictionary; save it as mmengine does')
    odd = [key for key in entries['state_dict'] or ()
           if not isinstance(key, str) or not key.isprintable() or len(key) > 1000]
    if odd:
        raise WeightsError(f'{name} was not loaded: state_dict has {printable(odd[0], 80)} as a '
                           'key, expected names of tensors')


def _settle(holder: dict, place: str, name: str) -> None:
    values = plain_config(holder['cfg'])
    if values is None:
        del holder['cfg']
        problem = (f'The config inside the checkpoint ({place} of {name}) does more than set plain '
                   'values, so it is left out')
    else:
        holder['cfg'], dropped = settled_text(holder['cfg'], values)
        if not dropped:
            return
        problem = (f'From the config inside the checkpoint ({place} of {name}) entries that could '
                   f'run code are left out: {printable("; ".join(dropped))}')
    print_log(f'{problem}. Give the config file where one is needed, or set {TRUST_VARIABLE}=1 '
              'for files of your own.', logger='current', level=logging.WARNING)


def load_from_local(filename: str, map_location=None) -> object:
    """Read a path or a short name of published weights."""
    return _inert(read_checkpoint(filename, map_location), filename)


def load_from_http(filename: str, map_location=None, model_dir=None, progress=True) -> object:
    """Fetch and read an address; processes of one machine share the download."""
    return _inert(read_checkpoint(filename, map_location), filename)


def load_from_hub(filename: str, map_location=None) -> object:
    """Fetch and read a file of Hugging Face's hub."""
    return _inert(read_checkpoint(filename, map_location), filename)


def load_from_ceph(filename: str, map_location=None, backend: str = 'petrel') -> object:
    """Read an object of a storage cluster."""
    from mmengine.fileio import get_file_backend
    content = get_file_backend(filename, backend_args={'backend': backend}).get(filename)
    return _inert(read_file(io.BytesIO(content), map_location, name=filename), filename)


def load_from_openmmlab(filename: str, map_location=None) -> object:
    """Read a model of OpenMMLab's list, or of the user's own ``open_mmlab.json``."""
    name = filename.partition('://')[2]
    name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    known = mmengine_checkpoint.get_external_models()
    if name not in known:
        raise WeightsError(f'{shown(filename)} is not in the list of OpenMMLab; check the name')
    address = known[name]
    if '://' not in address:
        address = osp.join(mmengine_checkpoint._get_mmengine_home(), address)
    return _inert(read_checkpoint(address, map_location), filename)


def load_from_pavi(filename: str, map_location=None) -> object:
    """Refuse: what this service returns cannot be checked before it is read."""
    raise WeightsError(f'{shown(filename)} cannot be read safely; download it and give its path')


def install() -> None:
    """Put our functions in the place of mmengine's; doing it twice changes nothing."""
    for prefixes, loader in (
            ('', load_from_local), (('http://', 'https://'), load_from_http),
            ('hf://', load_from_hub),
            ((r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), load_from_ceph),
            (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
            ('pavi://', load_from_pavi)):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
    # What mmengine's torchvision:// and mmcls:// call once they know the address.
    mmengine_checkpoint.load_from_http = load_from_http


def is_installed() -> bool:
    """Whether mmengine reads paths with our reader."""
    return CheckpointLoader._schemes.get('') is load_from_local
