"""Checkpoints as training writes them, with random weights."""
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import save_checkpoint, weights_to_cpu

CLASSES = ('a', 'b', 'c')


def trained(cfg, path, classes=CLASSES, change=None):
    """Write what ``Runner.save_checkpoint`` writes; returns the model.

    ``change``: called with the model before its weights are saved.
    """
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    if change is not None:
        change(model)
    hub = MessageHub.get_instance(path.stem)
    hub.update_info('cfg', cfg.pretty_text)
    hub.update_info('iter', 5)
    hub.update_scalar('train/loss', 1.5)
    meta = dict(epoch=1, iter=5, cfg=cfg.pretty_text, seed=0, experiment_name='x', time='x',
                mmengine_version='x', dataset_meta=dict(
                    classes=classes, palette=[(1 + n, 2, 3) for n in range(len(classes))]))
    save_checkpoint(dict(meta=meta, state_dict=weights_to_cpu(model.state_dict()),
                         message_hub=hub.state_dict()), str(path))
    return model
