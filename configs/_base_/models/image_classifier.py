# Cross entropy on mixed images. A config on top of this file states `backbone`.
model = dict(
    type='mmhybrid.ImageClassifier',
    num_classes=1000,
    label_smoothing=0.1,
    mixing=dict(mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.5))
