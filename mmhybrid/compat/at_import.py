"""The patches that importing the plugin applies, in this order."""

from mmhybrid import config_scheme, mmcv_ops

from . import checkpoint_loader, metrics_file, pipelines, whole_checkpoints
from .patch import Patch

__all__ = ['PATCHES']

PATCHES = (
    Patch(
        'mmcv-operators',
        'mmdet and mmseg cannot be imported where mmcv came without compiled operators, so '
        'torchvision computes the few that our models need.',
        ('sys.meta_path (a finder, last, which answers for mmcv._ext only)',),
        mmcv_ops.install,
        mmcv_ops.is_installed,
    ),
    Patch(
        'config-prefix',
        "mmengine knows a fixed list of packages whose configs may stand in _base_; 'mmhybrid::' "
        'is added.',
        ('mmengine.config.Config._get_cfg_path',),
        config_scheme.install,
        config_scheme.is_installed,
    ),
    Patch(
        'checkpoint-loader',
        'A checkpoint can run code when mmengine reads it; ours reads tensors and plain values '
        'alone, and knows hf:// and the names of released weights.',
        (
            'mmengine.runner.CheckpointLoader (its functions for paths, http, hf, s3, petrel, '
            'open-mmlab and pavi)',
            'mmengine.runner.checkpoint.load_from_http',
        ),
        checkpoint_loader.install,
        checkpoint_loader.is_installed,
    ),
    Patch(
        'whole-checkpoints',
        'mmengine removes the oldest checkpoint before the next is whole; ours is written aside '
        'and renamed, and what has to go, goes last.',
        (
            'mmengine.runner.save_checkpoint (in its three modules)',
            'mmengine.hooks.CheckpointHook (before_train, _save_checkpoint_with_step, '
            '_save_best_checkpoint)',
            'mmengine.hooks.checkpoint_hook.open',
        ),
        whole_checkpoints.install,
        whole_checkpoints.is_installed,
    ),
    Patch(
        'pipelines',
        'Detectors and segmentors in one process find the transforms of the other, and mmdet '
        'fails on an array of a grey picture.',
        ('mmengine.dataset.Compose.__init__', 'mmcv.transforms.Compose.__init__'),
        pipelines.install,
        pipelines.is_installed,
    ),
    Patch(
        'test-metrics',
        'Several processes write the metrics of a test into one file at once, which may damage '
        'it; the first does alone.',
        ('mmengine.hooks.LoggerHook.after_test_epoch',),
        metrics_file.install,
        metrics_file.is_installed,
    ),
)
