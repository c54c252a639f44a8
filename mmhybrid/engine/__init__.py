"""Everything around the training loop. Importing it registers what configs name."""
from mmhybrid import models  # noqa: F401  registers them

from ..errors import UserError
from .amp import AmpOptimWrapper
from .classification import (
    ImageFolder,
    LoadPicture,
    RepeatedAugmentSampler,
    TimmTransform,
    TopAccuracy,
)
from .dump import DumpSegmentation
from .faster import CompileHook, CudaGraphsHook
from .finite_loss import FiniteLossHook
from .graphs import use_cuda_graphs
from .param_groups import HybridOptimWrapperConstructor
from .preflight import CheckpointCheckHook
from .progress import ProgressHook
from .random_state import RandomStateHook
from .resume import ResumeSettingsHook
from .search import DirectionSearchHook
from .stop_signals import StopSignalHook

__all__ = [
    'AmpOptimWrapper', 'CheckpointCheckHook', 'CompileHook', 'CudaGraphsHook',
    'DirectionSearchHook', 'DumpSegmentation', 'FiniteLossHook', 'HybridOptimWrapperConstructor',
    'ImageFolder', 'LoadPicture', 'ProgressHook', 'RandomStateHook', 'RepeatedAugmentSampler',
    'ResumeSettingsHook', 'StopSignalHook', 'TimmTransform', 'TopAccuracy', 'UserError',
    'use_cuda_graphs',
]
