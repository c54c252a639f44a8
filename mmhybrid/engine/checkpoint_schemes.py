"""mmengine's ways to load a checkpoint, led through our reader.

``load_from``, ``--resume``, ``init_cfg`` of any module, ``init_detector`` and ``init_model`` all
ask mmengine's ``CheckpointLoader``, which has one function per kind of address.  After
``import mmhybrid`` these functions are ours: nothing that they read can run code, and besides paths
they understand ``hf://`` and the short names of published weights.
"""
from __future__ import annotations

import io
import os.path as osp

from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmhybrid.weights import WeightsError, read_checkpoint, read_file

__all__ = ['install']


def _inert(checkpoint: object) -> object:
    """Take away the text that mmengine's ``resume`` would run as a Python config.

    Its own checkpoints keep theirs under another name, which only inferencers that are given no
    config read.
    """
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)
    return checkpoint


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
