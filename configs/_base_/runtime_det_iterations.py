# Everything around the training loop of a detector that is trained by iterations.
_base_ = './runtime_det.py'

default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=5000))
log_processor = dict(by_epoch=False)
# Parts of ViTDet's detectors that need mmdet to be imported.
custom_imports = dict(
    imports=['mmhybrid', 'mmhybrid.models.roi_heads', 'mmhybrid.models.data_preprocessors'])
