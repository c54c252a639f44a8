"""BatchNorm that keeps its statistics, in any backbone."""
from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from ..registry import HOOKS

__all__ = ['FrozenNormsHook']


@HOOKS.register_module()
class FrozenNormsHook(Hook):
    """BatchNorm layers of the backbone use and keep the statistics that training starts with.

    Their weights and biases go on learning. Unlike a backbone's own ``norm_eval`` it works with all
    backbones.

    Raises:
        UserError: when training begins, if the backbone has no BatchNorm.
    """

    priority = 'LOW'

    def before_train(self, runner) -> None:
        """Find the layers."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        part = getattr(model, 'backbone', model)
        self._layers = [layer for layer in part.modules() if isinstance(layer, _BatchNorm)]
        if not self._layers:
            raise UserError(f'--norms frozen: the backbone ({type(part).__name__}) has no '
                            'BatchNorm. Leave the option out.')

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Loops put the whole model into training mode when they begin and after validations."""
        for layer in self._layers:
            layer.eval()
