# Everything around the training loop of a classifier.
default_scope = 'mmengine'
custom_imports = dict(imports=['mmhybrid'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=3, save_best='accuracy/top1'),
    finite_loss=dict(type='mmhybrid.FiniteLossHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'))
custom_hooks = [dict(type='mmhybrid.RandomStateHook')]

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))

visualizer = dict(
    type='Visualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
log_level = 'INFO'

load_from = None
resume = False
# Backbone weights to start from; `tools/train.py --pretrained PATH` sets it.
pretrained = None
