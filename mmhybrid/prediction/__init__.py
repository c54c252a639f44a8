"""From weights and pictures to what is in the pictures: ``mmhybrid predict``, ``mmhybrid.load``."""
import importlib

_HOMES = {'Detection': 'results', 'Predictor': 'predictor', 'Segmentation': 'results',
          'load': 'predictor'}
__all__ = ['Detection', 'Predictor', 'Segmentation', 'load']  # noqa: F822  see __getattr__


def __getattr__(name):
    """Parts at their first use: some need PyTorch, others must do without."""
    if name in _HOMES:
        return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
