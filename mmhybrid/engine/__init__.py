"""Everything around the training loop. Importing it registers what configs name."""
from mmhybrid import models  # noqa: F401  registers them

from .amp import AmpOptimWrapper
from .checkpoint_check import CheckpointCheckHook
from .faster import CompileHook, CudaGraphsHook
from .finite_loss import FiniteLossHook
from .graphs import use_cuda_graphs
from .optimizers import lamb
from .param_groups import HybridOptimWrapperConstructor
from .progress import ProgressHook
from .random_state import RandomStateHook
from .resume import ResumeSettingsHook
from .search import DirectionSearchHook
from .stop_signals import StopSignalHook

__all__ = [
    'AmpOptimWrapper', 'CheckpointCheckHook', 'CompileHook', 'CudaGraphsHook',
    'DirectionSearchHook', 'FiniteLossHook', 'HybridOptimWrapperConstructor', 'ProgressHook',
    'RandomStateHook', 'ResumeSettingsHook', 'StopSignalHook', 'lamb', 'use_cuda_graphs',
]
