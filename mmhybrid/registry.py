"""Registries of mmhybrid: children of mmengine's root registries.

A class registered here can be written in two ways in a config::

    type='MambaVision'            after custom_imports=dict(imports=['mmhybrid'], ...)
    type='mmhybrid.MambaVision'   without it; mmengine imports this file by itself

The first way is what people type, and mmdet's and mmseg's own registries can only find it in the
root that all of them share: registries look upward to their parents, never sideways.
"""
from __future__ import annotations

from mmengine.registry import DATA_SAMPLERS as ROOT_DATA_SAMPLERS
from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import METRICS as ROOT_METRICS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as ROOT_OPTIM_WRAPPERS
from mmengine.registry import OPTIMIZERS as ROOT_OPTIMIZERS
from mmengine.registry import TRANSFORMS as ROOT_TRANSFORMS
from mmengine.registry import Registry

from . import compat

__all__ = ['DATASETS', 'DATA_SAMPLERS', 'HOOKS', 'METRICS', 'MODELS', 'OPTIMIZERS',
           'OPTIM_WRAPPERS', 'OPTIM_WRAPPER_CONSTRUCTORS', 'SharedRegistry', 'TRANSFORMS',
           'find_type']


class SharedRegistry(Registry):
    """A child registry whose entries are visible in the root registry too.

    Used like any mmengine registry: ``@MODELS.register_module()``.  Running the same module twice
    (``importlib.reload``, an import repeated after a failed one) replaces the entry instead of
    raising; a different class under a taken name still raises ``KeyError``.
    """

    def _register_module(self, module, module_name=None, force=False):
        names = [module_name] if isinstance(module_name, str) else module_name
        for name in names or [module.__name__]:
            for registry in (self, self.parent):
                taken = registry.module_dict.get(name)
                again = taken is not None and _address(taken) == _address(module)
                Registry._register_module(registry, module, name, force=force or again)


def _address(module) -> tuple[str, str]:
    return module.__module__, module.__qualname__


def _child(root: Registry, location: str) -> SharedRegistry:
    return SharedRegistry(root.name, parent=root, scope='mmhybrid', locations=[location])


MODELS = _child(ROOT_MODELS, 'mmhybrid.models')
HOOKS = _child(ROOT_HOOKS, 'mmhybrid.engine')
# Not shared: our AmpOptimWrapper must not take the name of mmengine's, nor Lamb another package's.
OPTIM_WRAPPERS = Registry(
    ROOT_OPTIM_WRAPPERS.name, parent=ROOT_OPTIM_WRAPPERS, scope='mmhybrid',
    locations=['mmhybrid.engine'])
OPTIMIZERS = Registry(
    ROOT_OPTIMIZERS.name, parent=ROOT_OPTIMIZERS, scope='mmhybrid', locations=['mmhybrid.engine'])
METRICS = _child(ROOT_METRICS, 'mmhybrid.evaluation')
DATASETS = _child(ROOT_DATASETS, 'mmhybrid.datasets.loading')
TRANSFORMS = _child(ROOT_TRANSFORMS, 'mmhybrid.datasets.loading')
OPTIM_WRAPPER_CONSTRUCTORS = _child(ROOT_OPTIM_WRAPPER_CONSTRUCTORS, 'mmhybrid.engine')
DATA_SAMPLERS = _child(ROOT_DATA_SAMPLERS, 'mmhybrid.datasets.loading')

def find_type(node, registry: Registry, scope: str | None):
    """The class or function that a dictionary of a config names by its ``type``.

    Args:
        node: the dictionary; anything else names nothing.
        registry: one of the roots or of ours.
        scope: where names without a package are looked up first; None for the present one.

    Returns:
        None if there is no such name, which building it will tell.
    """
    kind = node.get('type') if isinstance(node, dict) else None
    if not isinstance(kind, str):
        return kind
    try:
        with registry.switch_scope_and_registry(scope) as inner:
            return inner.get(kind)
    except Exception:  # whatever a package that is not whole raises
        return None


# Whoever builds something of ours comes through here, mmengine's own look-ups included.
compat.install()
