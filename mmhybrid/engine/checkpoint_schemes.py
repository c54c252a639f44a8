"""mmengine's ways to load a checkpoint, led through our reader.

``load_from``, ``--resume``, ``init_cfg`` of any module, ``init_detector`` and ``init_model`` all
ask mmengine's ``CheckpointLoader``, which has one function per kind of address.  After
``import mmhybrid`` these functions are ours: nothing that they read can run code, and besides paths
they understand ``hf://`` and the short names of published weights.
"""
from __future__ import annotations

import ast
import io
import logging
import os.path as osp

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmhybrid.weights import TRUST_VARIABLE, WeightsError, read_checkpoint, read_file, trusted

__all__ = ['install']


def _inert(checkpoint: object) -> object:
    """Take away texts that mmengine would run as a Python config.

    ``resume`` runs ``meta.config``, which its own checkpoints do not have. Inferencers that are
    given no config run the one that training wrote; it stays if it only sets plain values.
    """
    if not isinstance(checkpoint, dict):
        return checkpoint
    meta = checkpoint.get('meta')
    if isinstance(meta, dict):
        meta.pop('config', None)
    hub = checkpoint.get('message_hub')
    for holder in (meta, hub.get('runtime_info') if isinstance(hub, dict) else None):
        if not isinstance(holder, dict) or 'cfg' not in holder:
            continue
        if not trusted() and not _sets_plain_values(holder['cfg']):
            del holder['cfg']
            print_log('The config inside the checkpoint does more than set plain values, so it is '
                      'left out; give the config file where one is needed (or set '
                      f'{TRUST_VARIABLE}=1 for files of your own).', logger='current',
                      level=logging.WARNING)
    return checkpoint


def _sets_plain_values(text: object) -> bool:
    """Whether a config's text is nothing but names that are set to literals and ``dict(...)``."""
    try:
        return all(
            isinstance(line, ast.Assign) and _plain(line.value)
            and all(isinstance(target, ast.Name) for target in line.targets)
            for line in ast.parse(text).body)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return False


def _plain(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return all(map(_plain, node.elts))
    if isinstance(node, ast.Dict):
        return all(key is not None and _plain(key) for key in node.keys) and all(
            map(_plain, node.values))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        # float: infinities
        return node.func.id in ('dict', 'float') and all(
            map(_plain, [*node.args, *(item.value for item in node.keywords)]))
    return False


def load_from_local(filename: str, map_location=None) -> object:
    """Read a path or a short name of published weights."""
    return _inert(read_checkpoint(filename, map_location))


def load_from_http(filename: str, map_location=None, model_dir=None, progress=True) -> object:
    """Fetch and read an address; processes of one machine share the download."""
    return _inert(read_checkpoint(filename, map_location))


def load_from_hub(filename: str, map_location=None) -> object:
    """Fetch and read a file of Hugging Face's hub."""
    return _inert(read_checkpoint(filename, map_location))


def load_from_ceph(filename: str, map_location=None, backend: str = 'petrel') -> object:
    """Read an object of a storage cluster."""
    from mmengine.fileio import get_file_backend
    content = get_file_backend(filename, backend_args={'backend': backend}).get(filename)
    return _inert(read_file(io.BytesIO(content), map_location, name=filename))


def load_from_openmmlab(filename: str, map_location=None) -> object:
    """Read a model of OpenMMLab's list, or of the user's own ``open_mmlab.json``."""
    name = filename.partition('://')[2]
    name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    known = mmengine_checkpoint.get_external_models()
    if name not in known:
        raise WeightsError(f'{filename} is not in the list of OpenMMLab; check the name')
    address = known[name]
    if not address.startswith(('http://', 'https://')):
        address = osp.join(mmengine_checkpoint._get_mmengine_home(), address)
    return _inert(read_checkpoint(address, map_location))


def load_from_pavi(filename: str, map_location=None) -> object:
    """Refuse: what this service returns cannot be checked before it is read."""
    raise WeightsError(f'{filename} cannot be read safely; download it and give its path')


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
