"""Settings that no signature names.

Where a dictionary in a config has no ``type``, some head, loop or tool reads it key by key. The
tables say which keys those are. They were taken from the code that reads them (mmengine 0.10,
mmcv 2.1, mmdet 3.3, mmseg 1.2), and hold besides what the configs of these packages set although
nothing reads it (``debug``, ``allowed_border`` of heads without anchors).

A place is the end of a path without the numbers of list items; ``^`` is the top of the config and
``*`` any last name. The longest end counts. ``...`` allows further names that resemble none here.
``two_stage`` stands between a detector with a ``roi_head`` and its parts.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
)
from mmengine.visualization import Visualizer
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from ..faster import CompileHook, CudaGraphsHook
from ..finite_loss import FiniteLossHook

__all__ = ['DEFAULT_TYPES', 'EXTRA', 'KINDS', 'KWARGS', 'OPAQUE', 'OPERATORS', 'PLACES', 'SETTINGS',
           'UNREGISTERED', 'VARIABLES']


def _arguments(*functions: Callable) -> str:
    names = [name for function in functions for name in inspect.signature(function).parameters]
    return ' '.join(name for name in names if name not in ('self', 'args', 'kwargs'))


#: Top-level names that mmengine's runner or one of our tools reads.
SETTINGS = frozenset((
    _arguments(Runner.__init__) + ' '
    'activation_checkpointing compile compile_backbone cuda_graphs custom_imports data_root '
    'efficient_conv_bn_eval extra_settings find_unused_parameters fsdp model_wrapper_cfg '
    'pretrained '
    'published_checkpoint runner_type sync_bn tta_model tta_pipeline').split()) - {'cfg'}

#: Names that configs use for parts of themselves. Nothing reads them once the config is whole.
VARIABLES = frozenset((
    'auto_scale backend_args batch_size classes crop_size dataset_type img_norm_cfg img_scale '
    'norm_cfg num_classes optimizer test_pipeline train_pipeline val_pipeline vis_backends'
).split())

_LOADER = _arguments(DataLoader.__init__) + ' num_batch_per_epoch disable_subprocess_warning'
_RPN = 'nms_pre max_per_img nms min_bbox_size nms_post max_num nms_thr nms_across_levels score_thr'
_POINTS = 'num_points oversample_ratio importance_sample_ratio'
_ASSIGN = ('assigner sampler allowed_border pos_weight debug ga_assigner ga_sampler center_ratio '
           'ignore_ratio')
_DECAY = 'lr_mult decay_mult'
_NORM_DECAYS = 'bias_lr_mult bias_decay_mult norm_decay_mult dwconv_decay_mult flat_decay_mult'
_ATTENTION = ('embed_dims num_heads attn_drop proj_drop dropout dropout_layer batch_first '
              'cross_attn num_levels num_points im2col_step norm_cfg init_cfg value_proj_ratio '
              'return_attn_map act_cfg')
_SWAP = 'nms max_per_img'

PLACES = {
    # --- around the training loop
    '^.env_cfg': 'cudnn_benchmark mp_cfg dist_cfg resource_limit',
    '^.env_cfg.mp_cfg': 'mp_start_method opencv_num_threads',
    '^.env_cfg.dist_cfg': 'backend timeout init_backend port '
                          + _arguments(torch.distributed.init_process_group),
    '^.randomness': _arguments(Runner.set_randomness),
    '^.auto_scale_lr': 'enable base_batch_size',
    '^.custom_imports': 'imports allow_failed_imports',
    '^.compile': 'target ' + _arguments(torch.compile),
    '^.compile_backbone': _arguments(CompileHook),
    '^.fsdp': 'checkpoints',
    '^.cuda_graphs': _arguments(CudaGraphsHook),
    '^.default_hooks': 'timer logger param_scheduler checkpoint sampler_seed runtime_info '
                       'visualization finite_loss ...',
    '^.train_dataloader': _LOADER,
    '^.val_dataloader': _LOADER,
    '^.test_dataloader': _LOADER,
    # --- the optimizer
    'optim_wrapper.clip_grad': 'type ' + _arguments(clip_grad_norm_, clip_grad_value_),
    'paramwise_cfg': f'custom_keys {_NORM_DECAYS} dcn_offset_lr_mult bypass_duplicate '
                     'no_decay layer_decay print_groups '
                     'num_layers decay_rate decay_type layer_decay_rate force_default_settings',
    'custom_keys.*': _DECAY,
    # --- data
    'metainfo': 'classes palette CLASSES PALETTE ...',
    'data_prefix': 'img seg img_path seg_map_path img_path2 depth_map_path sub_data_root anno '
                   'ann img_depth ...',
    'filter_cfg': 'filter_empty_gt min_size bbox_min_size',
    # --- models of ours
    'model.mixing': 'mixup_alpha cutmix_alpha cutmix_minmax prob switch_prob mode correct_lam',
    'backbone.arch': 'dim depth depths stem_width num_heads window_size mlp_ratio layer_scale '
                     'state_dim dt_rank ssm_ratio gate conv_bias channel_first stem downsample '
                     'float32_scan ...',
    # --- what detectors, segmentors and their heads read while they train
    'train_cfg': f'rpn rcnn rpn_proposal {_ASSIGN} {_POINTS} neg_pos_ratio smoothl1_beta init '
                 'refine initial_epoch initial_assigner alpha beta isr carl reg_assigner '
                 'max_num_grid mask_size mask_thr_binary pos_radius dynamic_rcnn',
    'two_stage.train_cfg': 'rpn rpn_proposal rcnn',
    'train_cfg.init': _ASSIGN,
    'train_cfg.refine': _ASSIGN,
    'train_cfg.rpn': _ASSIGN,
    'train_cfg.rpn_proposal': _RPN,
    'train_cfg.rcnn': f'assigner sampler pos_weight debug mask_size mask_thr_binary pos_radius '
                      f'max_num_grid isr carl dynamic_rcnn {_POINTS}',
    'rcnn.dynamic_rcnn': 'iou_topk beta_topk update_iter_interval initial_iou initial_beta',
    'override': 'name layer ...',
    'isr': 'k bias',
    'carl': 'k bias',
    'semi_train_cfg': 'freeze_teacher sup_weight unsup_weight pseudo_label_initial_score_thr '
                      'rpn_pseudo_thr cls_pseudo_thr reg_pseudo_thr jitter_times jitter_scale '
                      'min_pseudo_bbox_wh',
    # --- and while they predict
    'test_cfg': f'rpn rcnn {_RPN} panoptic mask_thr mask_thr_binary chunked_size filter_thr '
                'kernel sigma iou_thr panoptic_on semantic_on instance_on max_per_image '
                'filter_low_score local_maximum_kernel conf_thr subdivision_steps '
                'subdivision_num_points scale_factor corner_topk distance_threshold top_k topk '
                'score_voting object_mask_thr mask_overlap stuff_area_limit with_nms '
                'async_sleep_interval '
                'mode crop_size stride size size_divisor',
    'two_stage.test_cfg': 'rpn rcnn panoptic',
    'data_preprocessor.test_cfg': 'size size_divisor',
    'test_cfg.rpn': _RPN,
    'test_cfg.rcnn': 'score_thr nms max_per_img mask_thr_binary subdivision_steps '
                     'subdivision_num_points scale_factor async_sleep_interval',
    'test_cfg.panoptic': 'mask_overlap stuff_area_limit',
    'semi_test_cfg': 'predict_on forward_on extract_feat_on',
    'tta_cfg': _SWAP,
    # --- dictionaries that one module hands to another
    'dn_cfg': 'label_noise_scale box_noise_scale group_cfg',
    'group_cfg': 'dynamic num_groups num_dn_queries',
    'self_attn_cfg': _ATTENTION,
    'cross_attn_cfg': _ATTENTION,
    'ffn_cfg': 'embed_dims feedforward_channels ffn_drop num_fcs act_cfg dropout_layer '
               'add_identity layer_scale_init_value init_cfg',
}

#: Names beside those of the class, where the builder takes some for itself.
EXTRA = {
    'norm_cfg': 'requires_grad',
    'default_hooks.*': 'priority',
    'custom_hooks': 'priority',
    'param_scheduler': 'convert_to_iter_based',
    '^.optim_wrapper': 'constructor paramwise_cfg optimizer',
    '^.train_cfg': 'by_epoch',
    'nms': 'class_agnostic split_thr max_num',
    'dcn': 'fallback_on_stride deformable_groups',
    'upsample_cfg': 'scale_factor mode align_corners',
    'loss_cls': 'bg_cls_weight',
    'init_cfg': 'override',
}

#: What is built where a dictionary need not say its type.
DEFAULT_TYPES = {
    '^.train_cfg': (EpochBasedTrainLoop, IterBasedTrainLoop),
    '^.val_cfg': (ValLoop,),
    '^.test_cfg': (TestLoop,),
    '^.log_processor': (LogProcessor,),
    '^.visualizer': (Visualizer,),
    '^.optim_wrapper': (OptimWrapper,),
    '^.model_wrapper_cfg': (MMDistributedDataParallel,),
    '^.default_hooks.finite_loss': (FiniteLossHook,),
}

#: Kind of registry that builds what stands at a place, to judge an unknown type by.
KINDS = {
    '^.model': 'model', 'backbone': 'model', 'neck': 'model', 'rpn_head': 'model',
    'roi_head': 'model', 'bbox_head': 'model', 'mask_head': 'model', 'decode_head': 'model',
    'auxiliary_head': 'model', 'data_preprocessor': 'model', 'norm_cfg': 'model',
    'loss_cls': 'model', 'loss_bbox': 'model', 'loss_mask': 'model', 'loss_decode': 'model',
    'anchor_generator': 'task util', 'bbox_coder': 'task util', 'assigner': 'task util',
    'sampler': 'task util', '^.train_dataloader.sampler': 'data sampler',
    '^.val_dataloader.sampler': 'data sampler', '^.test_dataloader.sampler': 'data sampler',
    'batch_sampler': 'data sampler', 'dataset': 'dataset', 'pipeline': 'transform',
    'transforms': 'transform', '^.tta_pipeline': 'transform', 'optimizer': 'optimizer',
    '^.optim_wrapper': 'optim_wrapper',
    '^.param_scheduler': 'parameter scheduler', '^.custom_hooks': 'hook',
    'default_hooks.*': 'hook', '^.val_evaluator': 'metric', '^.test_evaluator': 'metric',
    '^.visualizer': 'visualizer', 'vis_backends': 'vis_backend', '^.train_cfg': 'loop',
    '^.val_cfg': 'loop', '^.test_cfg': 'loop', '^.log_processor': 'log_processor',
    '^.tta_model': 'model', 'collate_fn': 'function', 'worker_init_fn': 'function',
}

#: Places whose type is the name of something in mmcv.ops.
OPERATORS = frozenset(('nms', 'roi_layer'))

#: Places with types of their own, in no registry (mmdet's FPG).
UNREGISTERED = frozenset((
    'same_down_trans same_up_trans across_lateral_trans across_down_trans across_up_trans '
    'across_skip_trans output_trans').split())

#: Types whose arguments hold types of another library.
OPAQUE = frozenset(('Albu', 'mmdet.Albu', 'mmseg.Albu'))

_RESIZE = 'keep_ratio clip_object_border backend interpolation scale_factor ...'

#: Where the ``**kwargs`` of a class go, if not to its bases; and what stock configs set for classes
#: that ignore it.
KWARGS = {
    'CheckpointHook': _arguments(Runner.save_checkpoint),
    'RandomChoiceResize': _RESIZE,
    'RandomResize': _RESIZE,
    'MaskFormerHead': 'strides in_index ...',
    'Mask2FormerHead': 'strides in_index ...',
    'Mask2FormerTrackHead': 'strides ...',
    'QuasiDenseTrackHead': 'loss_bbox ...',
}
