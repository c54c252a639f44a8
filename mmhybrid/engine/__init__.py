"""Everything around the training loop. Importing it registers what configs name."""
from mmhybrid import models  # noqa: F401  registers them

from .amp import AmpOptimWrapper
from .checkpoint_check import CheckpointCheckHook
from .early_stop import EarlyStopHook
from .faster import CompileHook, CudaGraphsHook
from .finite_loss import FiniteLossHook
from .frozen_norms import FrozenNormsHook
from .graphs import use_cuda_graphs
from .optimizers import lamb
from .param_groups import HybridOptimWrapperConstructor
from .progress import ProgressHook
from .random_state import RandomStateHook
from .resume import ResumeSettingsHook
from .run_report import RunReportHook
from .search import DirectionSearchHook
from .sharding import ShardedRunner
from .stop_signals import StopSignalHook

__all__ = [
    'AmpOptimWrapper', 'CheckpointCheckHook', 'CompileHook', 'CudaGraphsHook',
    'DirectionSearchHook', 'EarlyStopHook', 'FiniteLossHook', 'FrozenNormsHook',
    'HybridOptimWrapperConstructor', 'ProgressHook', 'RandomStateHook', 'ResumeSettingsHook',
    'RunReportHook', 'ShardedRunner', 'StopSignalHook', 'lamb', 'use_cuda_graphs',
]
