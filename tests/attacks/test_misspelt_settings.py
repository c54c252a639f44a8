"""A misspelt setting fails, wherever it is: with its whole path and the name that was meant."""
import copy
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import DATASETS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

from mmhybrid.cli.actions.running import run_command
from mmhybrid.cli.actions.training import test as run_test
from mmhybrid.cli.actions.training import train as run_train
from mmhybrid.engine.config import load_config
from mmhybrid.engine.settings import check_custom_keys, check_settings
from mmhybrid.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
MASK_RCNN = str(CONFIGS / 'mask_rcnn_vmamba_t_coco.py')
CASCADE = str(CONFIGS / 'cascade_mambavision_t_coco.py')
VITDET = str(CONFIGS / 'cascade_vim_ti_coco.py')
UPERNET = str(CONFIGS / 'upernet_vmamba_t_ade20k.py')
IMAGENET = str(CONFIGS / 'classification' / 'localvim_t_imagenet.py')
CLASSIFIER = str(CONFIGS / 'classification' / 'localvmamba_mini_imagenet.py')

# Where [wrong>right] stands, a slip of the pen was made.
SLIPS = {
    MASK_RCNN: """
        [modle>model].backbone.arch
        [find_unused_parameter>find_unused_parameters]
        [compil>compile]
        [resum>resume]
        [load_form>load_from]
        [randomnes>randomness].seed
        [custom_hook>custom_hooks]
        [val_evalutor>val_evaluator].classwise
        [train_dataloder>train_dataloader].batch_size
        [sync_bm>sync_bn]
        [log_levle>log_level]
        model.[bakbone>backbone].arch
        model.[rpn_haed>rpn_head].feat_channels
        model.[data_preprocesor>data_preprocessor].mean
        model.backbone.[drop_path>drop_path_rate]
        model.backbone.[with_pc>with_cp]
        model.backbone.[archs>arch]
        model.neck.[num_out>num_outs]
        model.neck.[out_chanels>out_channels]
        model.data_preprocessor.[pad_size_divisr>pad_size_divisor]
        model.data_preprocessor.[bgr2rgb>bgr_to_rgb]
        model.rpn_head.[num_conv>num_convs]
        model.rpn_head.anchor_generator.[scale>scales]
        model.rpn_head.bbox_coder.[target_std>target_stds]
        model.rpn_head.loss_cls.[loss_wieght>loss_weight]
        model.rpn_head.loss_bbox.[weight>loss_weight]
        model.roi_head.[box_head>bbox_head].num_classes
        model.roi_head.bbox_head.[num_clases>num_classes]
        model.roi_head.bbox_head.[reg_class_agnostik>reg_class_agnostic]
        model.roi_head.bbox_head.bbox_coder.[target_stdds>target_stds]
        model.roi_head.bbox_head.loss_cls.[use_sigmoids>use_sigmoid]
        model.roi_head.bbox_roi_extractor.[out_chanels>out_channels]
        model.roi_head.bbox_roi_extractor.roi_layer.[sample_ratio>sampling_ratio]
        model.roi_head.mask_head.[conv_out_channel>conv_out_channels]
        model.[test_cgf>test_cfg].rcnn.score_thr
        model.test_cfg.[rcn>rcnn].score_thr
        model.test_cfg.rcnn.[score_thrs>score_thr]
        model.test_cfg.rcnn.[score_threshold>score_thr]
        model.test_cfg.rcnn.[max_per_image>max_per_img]
        model.test_cfg.rcnn.[mask_thr_binery>mask_thr_binary]
        model.test_cfg.rcnn.[nsm>nms].iou_threshold
        model.test_cfg.rcnn.nms.[iou_thr>iou_threshold]
        model.test_cfg.rcnn.nms.[class_agnostik>class_agnostic]
        model.test_cfg.rpn.[nms_per>nms_pre]
        model.test_cfg.rpn.[min_box_size>min_bbox_size]
        model.test_cfg.rpn.nms.[iou_treshold>iou_threshold]
        model.train_cfg.[rpn_proposals>rpn_proposal].nms_pre
        model.train_cfg.rpn_proposal.[max_per_imgs>max_per_img]
        model.train_cfg.rpn.[pos_weigth>pos_weight]
        model.train_cfg.rpn.[allowed_boarder>allowed_border]
        model.train_cfg.rpn.[asigner>assigner].pos_iou_thr
        model.train_cfg.rpn.assigner.[pos_iou_th>pos_iou_thr]
        model.train_cfg.rpn.assigner.[match_low_qualty>match_low_quality]
        model.train_cfg.rpn.sampler.[nums>num]
        model.train_cfg.rpn.sampler.[pos_fracton>pos_fraction]
        model.train_cfg.rcnn.[mask_sizes>mask_size]
        model.train_cfg.rcnn.sampler.[add_gt_as_proposal>add_gt_as_proposals]
        model.train_cfg.rcnn.assigner.[min_pos_iuo>min_pos_iou]
        default_hooks.[checkpont>checkpoint].interval
        default_hooks.checkpoint.[max_keep_ckpt>max_keep_ckpts]
        default_hooks.checkpoint.[intervall>interval]
        default_hooks.checkpoint.[safe_best>save_best]
        default_hooks.checkpoint.[by_epochs>by_epoch]
        default_hooks.logger.[intervals>interval]
        default_hooks.visualization.[drew>draw]
        custom_hooks.0.[prioirty>priority]
        optim_wrapper.[clip_gard>clip_grad].max_norm
        optim_wrapper.[acumulative_counts>accumulative_counts]
        optim_wrapper.[paramwise_cgf>paramwise_cfg].no_decay
        optim_wrapper.paramwise_cfg.[no_decays>no_decay]
        optim_wrapper.paramwise_cfg.[custom_key>custom_keys]
        optim_wrapper.paramwise_cfg.[bypass_duplicates>bypass_duplicate]
        optim_wrapper.clip_grad.[max_nrom>max_norm]
        optim_wrapper.clip_grad.[norm_typ>norm_type]
        optim_wrapper.optimizer.[weigth_decay>weight_decay]
        optim_wrapper.optimizer.[beta>betas]
        param_scheduler.0.[start_facter>start_factor]
        param_scheduler.1.[milestone>milestones]
        env_cfg.[cudnn_benchmarks>cudnn_benchmark]
        env_cfg.mp_cfg.[opencv_num_thread>opencv_num_threads]
        env_cfg.mp_cfg.[mp_start_methd>mp_start_method]
        env_cfg.dist_cfg.[backed>backend]
        auto_scale_lr.[enabled>enable]
        auto_scale_lr.[base_batchsize>base_batch_size]
        default_hooks.[finite_los>finite_loss].stop
        default_hooks.finite_loss.[pacience>patience]
        train_cfg.[max_epoch>max_epochs]
        train_cfg.[val_intervall>val_interval]
        val_cfg.[fp61>fp16]
        log_processor.[window_sizes>window_size]
        visualizer.[vis_backend>vis_backends]
        randomness.[seeds>seed]
        randomness.[determinstic>deterministic]
        tta_model.[tta_cgf>tta_cfg].max_per_img
        tta_model.tta_cfg.[max_per_image>max_per_img]
        tta_model.tta_cfg.nms.[iou_thresh>iou_threshold]
        tta_pipeline.1.[transfroms>transforms]
        train_dataloader.[batchsize>batch_size]
        train_dataloader.[num_worker>num_workers]
        train_dataloader.[droplast>drop_last]
        train_dataloader.sampler.[shufle>shuffle]
        train_dataloader.[batch_samplr>batch_sampler]
        train_dataloader.dataset.[annfile>ann_file]
        train_dataloader.dataset.[data_prefx>data_prefix].img
        train_dataloader.dataset.data_prefix.[imgs>img]
        train_dataloader.dataset.[filter_cgf>filter_cfg].min_size
        train_dataloader.dataset.filter_cfg.[filter_emty_gt>filter_empty_gt]
        train_dataloader.dataset.filter_cfg.[minsize>min_size]
        train_dataloader.dataset.metainfo.[clases>classes]
        train_dataloader.dataset.pipeline.1.[with_maks>with_mask]
        train_dataloader.dataset.pipeline.2.[keep_ratios>keep_ratio]
        train_dataloader.dataset.pipeline.3.[probability>prob]
        val_evaluator.[metrics>metric]
        val_evaluator.[class_wise>classwise]
        val_evaluator.[proposal_num>proposal_nums]
        """,
    CASCADE: """
        model.roi_head.[num_stage>num_stages]
        model.roi_head.[stage_loss_weight>stage_loss_weights]
        model.roi_head.bbox_head.1.[reg_decoded_box>reg_decoded_bbox]
        model.roi_head.bbox_head.2.loss_bbox.[loss_wight>loss_weight]
        model.roi_head.bbox_head.0.norm_cfg.[require_grad>requires_grad]
        model.train_cfg.rcnn.2.assigner.[neg_iou_th>neg_iou_thr]
        model.train_cfg.rcnn.1.sampler.[neg_pos_up>neg_pos_ub]
        model.train_cfg.rcnn.0.[pos_wieght>pos_weight]
        model.backbone.[window_sizes>window_size]
        train_dataloader.dataset.pipeline.3.transforms.0.0.[scals>scales]
        train_dataloader.dataset.pipeline.3.transforms.1.0.[keep_ration>keep_ratio]
        train_dataloader.dataset.pipeline.3.transforms.1.1.[crop_types>crop_type]
        """,
    VITDET: """
        model.neck.[backbone_channels>backbone_channel]
        model.roi_head.mask_head.norm_cfg.[ep>eps]
        default_hooks.logger.[log_metric_by_epochs>log_metric_by_epoch]
        """,
    UPERNET: """
        model.test_cfg.[modes>mode]
        model.test_cfg.[crop_sizes>crop_size]
        model.test_cfg.[strides>stride]
        model.decode_head.[pool_scale>pool_scales]
        model.decode_head.[align_corner>align_corners]
        model.decode_head.[dropout>dropout_ratio]
        model.decode_head.loss_decode.[use_sigmod>use_sigmoid]
        model.auxiliary_head.[num_conv>num_convs]
        model.auxiliary_head.[concat_inputs>concat_input]
        model.data_preprocessor.[seg_pad_value>seg_pad_val]
        train_dataloader.dataset.data_prefix.[seg_map_pth>seg_map_path]
        train_dataloader.dataset.[reduce_zero_labels>reduce_zero_label]
        train_dataloader.dataset.pipeline.3.[cat_max_ratios>cat_max_ratio]
        train_dataloader.dataset.pipeline.2.[ratio_rang>ratio_range]
        train_cfg.[max_iter>max_iters]
        param_scheduler.1.[eta_mn>eta_min]
        val_evaluator.[iou_metric>iou_metrics]
        default_hooks.checkpoint.[intervl>interval]
        optim_wrapper.[loss_scales>loss_scale]
        """,
    IMAGENET: """
        model.mixing.[mixup_alfa>mixup_alpha]
        model.mixing.[switch_prop>switch_prob]
        """,
    CLASSIFIER: """
        model.[label_smothing>label_smoothing]
        model.backbone.arch.[depth_s>depths]
        model.backbone.[direction>directions]
        train_dataloader.dataset.data_prefix.[img_pth>img_path]
        train_dataloader.dataset.pipeline.1.[input_sizes>input_size]
        train_dataloader.collate_fn.[typ>type]
        val_evaluator.[topks>topk]
        param_scheduler.1.[T_maxx>T_max]
        param_scheduler.1.[convert_to_iter_base>convert_to_iter_based]
        """,
}
ROWS = [(path, row) for path, rows in SLIPS.items() for row in rows.split()]
MARK = re.compile(r'\[(\w+)>(\w+)\]')


@functools.cache
def whole(path):
    return load_config(path)[0]


def check(path, options):
    """What load_config does with options, without reading the file again."""
    cfg = copy.deepcopy(whole(path))
    names = set(cfg)
    cfg.merge_from_dict(options)
    check_settings(cfg, path, names, options)


def refusal(path, options):
    with pytest.raises(UserError) as caught:
        check(path, options)
    return str(caught.value)


@pytest.mark.parametrize('path, row', ROWS, ids=lambda value: Path(value).stem[:40])
def test_slip(path, row):
    wrong, right = MARK.search(row).groups()
    text = refusal(path, {MARK.sub(wrong, row): 1})
    assert f'\n  {row.partition("[")[0]}{wrong}=' in text
    assert f'Did you mean {right!r}?' in text
    assert path in text
    check(path, {MARK.sub(right, row): 1})


def test_number_of_slips():
    assert len(ROWS) >= 110


@pytest.mark.parametrize('path, place, right, what', [
    (MASK_RCNN, 'model.type', 'MaskRCNN', 'model'),
    (MASK_RCNN, 'model.backbone.type', 'mmhybrid.VMamba', 'model'),
    (MASK_RCNN, 'model.roi_head.bbox_head.loss_cls.type', 'CrossEntropyLoss', 'model'),
    (MASK_RCNN, 'model.train_cfg.rpn.assigner.type', 'MaxIoUAssigner', 'task util'),
    (MASK_RCNN, 'model.train_cfg.rpn.sampler.type', 'RandomSampler', 'task util'),
    (MASK_RCNN, 'model.test_cfg.rcnn.nms.type', 'nms', 'class'),
    (MASK_RCNN, 'model.roi_head.mask_roi_extractor.roi_layer.type', 'RoIAlign', 'class'),
    (MASK_RCNN, 'train_dataloader.dataset.type', 'CocoDataset', 'dataset'),
    (MASK_RCNN, 'train_dataloader.sampler.type', 'DefaultSampler', 'data sampler'),
    (MASK_RCNN, 'train_dataloader.dataset.pipeline.3.type', 'RandomFlip', 'transform'),
    (MASK_RCNN, 'val_evaluator.type', 'CocoMetric', 'metric'),
    (MASK_RCNN, 'optim_wrapper.type', 'mmhybrid.AmpOptimWrapper', 'optim_wrapper'),
    (MASK_RCNN, 'optim_wrapper.optimizer.type', 'AdamW', 'optimizer'),
    (MASK_RCNN, 'param_scheduler.1.type', 'MultiStepLR', 'parameter scheduler'),
    (MASK_RCNN, 'default_hooks.checkpoint.type', 'CheckpointHook', 'hook'),
    (MASK_RCNN, 'custom_hooks.0.type', 'mmhybrid.RandomStateHook', 'hook'),
    (MASK_RCNN, 'visualizer.vis_backends.0.type', 'LocalVisBackend', 'vis_backend'),
    (MASK_RCNN, 'tta_model.type', 'DetTTAModel', 'model'),
    (CASCADE, 'model.roi_head.bbox_head.1.norm_cfg.type', 'SyncBN', 'model'),
    (UPERNET, 'model.decode_head.type', 'UPerHead', 'model'),
    (UPERNET, 'train_cfg.type', 'IterBasedTrainLoop', 'loop'),
    (UPERNET, 'test_cfg.type', 'TestLoop', 'loop'),
    (CLASSIFIER, 'train_dataloader.collate_fn.type', 'default_collate', 'function'),
])
def test_slip_in_a_type(path, place, right, what):
    text = refusal(path, {place: right[:-1] + right[-2:]})
    assert f'\n  {place}=' in text and f'no {what} of this name is registered' in text
    assert f'Did you mean {right!r}?' in text
    check(path, {place: right})


@pytest.mark.parametrize('place', [
    'model.test_cfg.score_thr', 'model.test_cfg.max_per_img', 'model.train_cfg.assigner',
    'model.test_cfg.rpn.mask_thr_binary', 'model.train_cfg.rcnn.allowed_border'])
def test_a_valid_name_in_the_wrong_place(place):
    assert f'\n  {place}=1: nothing reads this.' in refusal(MASK_RCNN, {place: 1})


def test_all_at_once():
    text = refusal(MASK_RCNN, {'model.nek.num_outs': 4, 'train_cfg.max_epoch': 1, 'compil': True})
    for part in ('model.nek={', "'neck'", 'train_cfg.max_epoch=1', "'max_epochs'", 'compil=True'):
        assert part in text
    assert 'extra_settings=compil,model.nek,train_cfg.max_epoch ' in text


@pytest.mark.parametrize('given', [
    'model.test_cfg.rcnn.mine', ['model.test_cfg.rcnn.mine'], ('a', 'model.test_cfg.rcnn.mine')])
def test_meant(given):
    options = {'model.test_cfg.rcnn.mine': 3}
    assert 'rcnn.mine=3: nothing reads this' in refusal(MASK_RCNN, options)
    check(MASK_RCNN, {**options, 'extra_settings': given})
    for others in ('model.test_cfg.rcnn', 'model.test_cfg.rcnn.*', 'mine'):  # exact paths only
        refusal(MASK_RCNN, {**options, 'extra_settings': others})


@pytest.mark.parametrize('given', [3, [3], dict(a=1)])
def test_meant_wrongly(given):
    assert "must be a list of paths such as ['model.test_cfg.mine']" in refusal(
        MASK_RCNN, dict(extra_settings=given))


def test_the_tools_refuse(tmp_path, capfd):
    option = 'model.test_cfg.rcnn.score_thrs=0.1'
    for tool, *argv in ((run_train,), (run_test, str(tmp_path / 'none.pth'))):
        assert run_command(tool, [MASK_RCNN, *argv, '--work-dir', str(tmp_path),
                                  '--cfg-options', option]) == 1
        output = capfd.readouterr().err
        assert 'Traceback' not in output
        assert "score_thrs=0.1: nothing reads this. Did you mean 'score_thr'?" in output


# --- the config's own file ------------------------------------------------------------------------

def load(tmp_path, source, options=None):
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = {MASK_RCNN!r}\n{source}')
    return load_config(str(path), options)


@pytest.mark.parametrize('source, wrong, right', [
    ('find_unused_parameter = True', 'find_unused_parameter', 'find_unused_parameters'),
    ('modle = dict(neck=dict(num_outs=4))', 'modle', 'model'),
    ('train_cgf = dict(max_epochs=1)', 'train_cgf', 'train_cfg'),
    ('model = dict(test_cfg=dict(rcnn=dict(score_thresh=0.1)))',
     'model.test_cfg.rcnn.score_thresh', 'score_thr'),
    ('default_hooks = dict(checkpoints=dict(interval=2))', 'default_hooks.checkpoints',
     'checkpoint'),
])
def test_slip_in_a_file(tmp_path, source, wrong, right):
    with pytest.raises(UserError) as caught:
        load(tmp_path, source)
    text = str(caught.value)
    assert 'mine.py has settings' in text and f'\n  {wrong}=' in text
    assert f'Did you mean {right!r}?' in text


@pytest.mark.parametrize('source', [
    'models = dict(num_outs=5)\nmodel = dict(neck=models)',  # a variable, and read
    "side = 3\nmy_thing = [1, 2]\nclasses = ('a', 'b')",  # names that resemble no setting
    'extra_settings = ["model.neck.mine"]\nmodel = dict(neck=dict(mine=1))',
    "model = dict(backbone=dict(_delete_=True, type='mmpretrain.ConvNeXt', whatever=1))",
    "model = dict(backbone=dict(_delete_=True, type='another.Net', part=dict(type='Y', z=1)))",
    "model = dict(neck=dict(_delete_=True, type='SomethingOfMine', width=1))",
    "model = dict(neck=dict(init_cfg=[dict(type='Xavier', layer='Conv2d', distribution='uniform'),"
    "dict(type='Normal', std=0.1, override=dict(name='fpn_convs'))]))",
    "custom_hooks = [dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=1e-4, priority=49)]",
    "default_hooks = dict(mine=dict(type='EarlyStoppingHook', monitor='x', priority='LOW'))",
    "optim_wrapper = dict(_delete_=True, constructor='Mine', first=dict(type='OptimWrapper',"
    "optimizer=dict(type='SGD', lr=1)), second=dict(optimizer=dict(type='SGD', lr=1)))",
    "optim_wrapper = dict(clip_grad=dict(type='value', clip_value=1.0))",
    "train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=2, "
    "dataset=dict(type='CocoDataset', metainfo=dict(classes=('a',), anything=1), pipeline=[])))",
    "train_dataloader = dict(dataset=dict(pipeline=[dict(type='Albu', transforms=["
    "dict(type='RandomCrop', height=3, width=3)], keymap=dict(img='image'))]))",
    "model = dict(test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms', min_score=0.1))))",
    "model = dict(roi_head=dict(bbox_head=dict(conv_cfg=dict(type='DCNv2', deform_groups=1))))",
    "model = dict(neck=dict(_scope_='mmseg', norm_cfg=dict(type='GN', num_groups=4)))",
    "val_evaluator = [dict(type='CocoMetric', metric='bbox')]",
    "launcher = 'none'\nexperiment_name = 'x'\nsync_bn = 'torch'\nactivation_checkpointing = ['a']",
    'compile = dict(mode="default", dynamic=True, target="forward")',
    'env_cfg = dict(dist_cfg=dict(timeout=7200, port=29501), resource_limit=8192)',
    "model_wrapper_cfg = dict(type='MMDistributedDataParallel', find_unused_parameters=True)",
    'data_root = None\nval_dataloader = None\nval_cfg = None\nval_evaluator = None',
])
def test_odd_but_valid(tmp_path, source):
    load(tmp_path, source)


def test_variables_of_bases_in_pure_python(tmp_path):
    (tmp_path / 'below').mkdir()
    (tmp_path / 'below' / 'part.py').write_text('models = dict(num_outs=5)\n')
    (tmp_path / 'base.py').write_text(
        'from mmengine.config import read_base\nwith read_base():\n'
        '    from .below.part import *\nmodel = dict(type="Mine", neck=models)\n')
    path = tmp_path / 'mine.py'
    head = 'from mmengine.config import read_base\nwith read_base():\n    from .base import *\n'
    path.write_text(head + 'model.update(width=3)\n')
    cfg, notes = load_config(str(path))
    assert cfg.model.neck == dict(num_outs=5) and notes == []
    path.write_text(head + 'val_evaluators = dict()\n')
    with pytest.raises(UserError, match='val_evaluators={}: nothing reads this. Did you mean'):
        load_config(str(path))


def test_options_name_what_the_file_has(tmp_path):
    _, (note,) = load(tmp_path, 'side = 3', dict(side=4))
    assert note.startswith('--cfg-options side: this is a variable of the config files')
    assert load(tmp_path, 'side = 3', dict(resume=True))[1] == []
    with pytest.raises(UserError, match="sidee=4: nothing reads this. Did you mean 'side'"):
        load(tmp_path, 'side = 3', dict(sidee=4))


def test_a_class_of_another_kind_of_registry_is_not_meant():
    MODELS.register_module(name='AttackWrapper', module=torch.nn.Identity)
    try:
        check(MASK_RCNN, {'optim_wrapper.type': 'AttackWrapper'})  # building it says what is wrong
    finally:
        MODELS.module_dict.pop('AttackWrapper')


class Base(torch.nn.Module):
    def __init__(self, width, init_cfg=None):
        super().__init__()


class Middle(Base):
    def __init__(self, *args, depth=1, **kwargs):
        self.early = kwargs.pop('early', None)
        super().__init__(*args, **kwargs)


class Drop(torch.nn.Module):
    """As released classes do: what it does not know is let through on purpose."""

    def __init__(self, width=1, **kwargs):
        super().__init__()


class Elsewhere(torch.nn.Module):
    def __init__(self, width=1, **kwargs):
        super().__init__()
        self.net = torch.nn.Linear(width, **kwargs)


@pytest.fixture
def registered():
    names = [MODELS.register_module(name=f'Attack{cls.__name__}', module=cls) and cls.__name__
             for cls in (Middle, Drop, Elsewhere)]
    yield
    for name in names:
        MODELS.module_dict.pop(f'Attack{name}')


@pytest.mark.parametrize('kind, valid, wrong', [
    ('Middle', 'width depth early init_cfg', 'widht depths earlly other'),
    ('Drop', 'width other', 'widht'),
    ('Elsewhere', 'width out_features other', 'wdth'),
])
def test_keywords_of_a_class_through_its_bases(registered, kind, valid, wrong):
    def neck(name):
        cfg = Config(dict(model=dict(type='MaskRCNN', neck={'type': f'Attack{kind}', name: 1}),
                          default_scope='mmdet'))
        check_settings(cfg, 'mine.py', set(cfg), {})

    for name in valid.split():
        neck(name)
    for name in wrong.split():
        with pytest.raises(UserError, match=f'model.neck.{name}=1'):
            neck(name)


# --- classes of the user's own ------------------------------------------------------------------

class OwnData(BaseDataset):
    """A data set of a project."""


class OwnRules(DefaultOptimWrapperConstructor):
    """A constructor of a project."""


class OwnPair(NamedTuple):
    first: int
    second: int = 1


class OwnNet(torch.nn.Module):
    def __init__(self, encoder=None, test_cfg=None, train_cfg=None, data_preprocessor=None):
        super().__init__()


@pytest.fixture
def own():
    registered = ((MODELS, OwnNet), (MODELS, OwnPair), (DATASETS, OwnData),
                  (OPTIM_WRAPPER_CONSTRUCTORS, OwnRules))
    for registry, cls in registered:
        registry.register_module(module=cls)
    yield
    for registry, cls in registered:
        registry.module_dict.pop(cls.__name__)


def refuse_own(**settings):
    check_settings(Config(dict(default_scope='mmdet', **settings)), 'mine.py', set(settings), {})


@pytest.mark.parametrize('settings', [
    dict(model=dict(type='OwnNet', test_cfg=dict(my_thr=0.5, rcnn=dict(mine=1)),
                    train_cfg=dict(steps=[1]))),
    dict(model=dict(type=OwnNet, test_cfg=dict(my_thr=0.5))),
    dict(model=dict(type=functools.partial(OwnNet), test_cfg=dict(my_thr=0.5))),
    # of a registry of the user's own, with names as elsewhere
    dict(model=dict(type='OwnNet', encoder=dict(type='ResNet', layers=50, norm_cfg=dict(
        type='BN', width=3)), data_preprocessor=dict(type='DetDataPreprocessors'))),
    dict(model=dict(type='OwnPair', first=1)),
    dict(train_dataloader=dict(batch_size=2, dataset=dict(
        type='OwnData', filter_cfg=dict(mine=1), metainfo=dict(classes2=('a',)), data_prefix=dict(
            img='a', img2='b', img_path1='c')))),
    dict(optim_wrapper=dict(constructor='OwnRules', optimizer=dict(type='SGD', lr=1.),
                            paramwise_cfg=dict(mine=3, custom_keys=dict(a=dict(wd=3))))),
    dict(model2=dict(type='OwnNet'), val_dataloader1=dict(), val_evaluator_2=dict()),
    dict(default_hooks=dict(checkpoint2=dict(type='CheckpointHook', interval=3))),
])
def test_what_classes_of_the_user_read_is_not_known(own, settings):
    refuse_own(**settings)


@pytest.mark.parametrize('settings, wrong', [
    (dict(model=dict(type='OwnNet', test_cfgs=3)), 'model.test_cfgs'),
    (dict(model=dict(type='OwnNet', test_cfg=dict(score_thrs=3))), 'model.test_cfg.score_thrs'),
    (dict(model=dict(type='OwnNet', encoder=dict(type='ResNet', dept=3))), 'model.encoder.dept'),
    (dict(optim_wrapper=dict(constructor='OwnRules', paramwise_cfg=dict(norm_decay_mlt=3))),
     'optim_wrapper.paramwise_cfg.norm_decay_mlt'),
    (dict(optim_wrapper=dict(paramwise_cfg=dict(mine=3))), 'optim_wrapper.paramwise_cfg.mine'),
    (dict(train_dataloader=dict(dataset=dict(type='CocoDataset', filter_cfg=dict(mine=1)))),
     'train_dataloader.dataset.filter_cfg.mine'),
])
def test_slips_are_told_there_too(own, settings, wrong):
    with pytest.raises(UserError, match=rf'\n  {wrong}=.*nothing reads this'):
        refuse_own(**settings)


# --- names of parameters --------------------------------------------------------------------------

NAMES = ['backbone.stages.0.blocks.0.norm1.weight', 'backbone.stages.0.blocks.1.mixer.A_logs',
         'backbone.pos_embed', 'backbone.relative_position_bias_table', 'decode_head.conv_seg.bias']


def keys(*names, **more):
    return Config(dict(optim_wrapper=dict(paramwise_cfg=dict(custom_keys={
        name: dict(lr_mult=0.1) for name in names})), **more))


@pytest.mark.parametrize('wrong, near', [
    ('bakbone', 'backbone'), ('decode_haed', 'decode_head'), ('pos_embd', 'pos_embed'),
    ('relative_positon_bias_table', 'relative_position_bias_table'),
    ('backbone.stage.0', 'backbone.stages.0'), ('stages.0.blokcs.1', 'stages.0.blocks.1'),
])
def test_custom_keys_that_miss(wrong, near):
    with pytest.raises(UserError) as caught:
        check_custom_keys(keys('backbone', wrong), 'mine.py', NAMES)
    place = f'optim_wrapper.paramwise_cfg.custom_keys.{wrong}'
    assert f'{place}: no parameter has this' in str(caught.value)
    assert f'Did you mean {near!r}?' in str(caught.value) and 'mine.py' in str(caught.value)
    warning, = check_custom_keys(keys('backbone', wrong, extra_settings=[place]), 'mine.py', NAMES)
    assert warning == f'{place} is not part of any parameter name.'


def test_custom_keys_for_other_variants_of_a_network():
    honest = ('absolute_pos_embed', 'cls_token', 'stages.0.blocks.17.norm1', 'query_embed', 'ln')
    assert len(check_custom_keys(keys('norm', *honest), 'mine.py', NAMES)) == len(honest)
    assert check_custom_keys(keys('norm', 'head', 'A_log', 'stages.0'), 'mine.py', NAMES) == []
    for empty in (Config(dict(optim_wrapper=None)), Config(dict()),
                  Config(dict(optim_wrapper=dict(paramwise_cfg=None)))):
        assert check_custom_keys(empty, 'mine.py', NAMES) == []
