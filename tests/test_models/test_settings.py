"""No setting without effect: every argument changes the network, and drop-ins hand theirs on."""
import inspect
import warnings

import pytest
import torch
from torch import nn

import mmhybrid.models as models
from mmhybrid.families.vmamba import V0 as V0_FORM
from mmhybrid.models.backbones import localvim, localvmamba, mambavision, vim, vmamba
from mmhybrid.models.dropins import common as dropin

STAGED = dict(dim=16, depths=(1, 2, 1, 1))
HYBRID = dict(dim=16, depths=(1, 2, 2, 2), stem_width=4, num_heads=(1, 1, 2, 4),
              window_size=(8, 8, 4, 3))
PLAIN = dict(dim=16, depth=3)  # fewer blocks have no stochastic depth
LINES = [['h', 'v'], ['v_flip', 'w2'], ['h', 'w7']]
FILE = dict(type='Pretrained', checkpoint='w.pth')

COMMON = dict(drop_path_rate=0.4, in_channels=5, with_cp=True, scan_backend='torch',
              lora=dict(rank=1), init_cfg=FILE)
DENSE = dict(COMMON, frozen_stages=1)
VIM = dict(img_size=64, stride=8, class_token='first', rope=True, divide=False)
LOCAL_VIM = dict(img_size=64, directions=LINES, v_restore='released', norm='rms', rope=False,
                 attention='none')
LOCAL = dict(directions=[['w2', 'h']] * 5, v_restore='released', attention='channel-spatial')
ABLATIONS = dict(causal_mixer=True, mixer_branch='gate', pattern='first-half')
# class: (settings that build it, another value for each of its arguments)
SETTINGS = {
    'MambaVision': (dict(arch=HYBRID), dict(
        DENSE, **ABLATIONS, arch=dict(HYBRID, dim=8), window_size=(8, 8, 6, 3), windows='tight',
        out_indices=(1, 3),
        layer_scale=0.5, norm_eval=True, out_norm='bn', fused_mixer=False, lean_mixer=True)),
    'VMamba': (dict(arch=STAGED), dict(
        DENSE, arch=dict(STAGED, dim=8), out_indices=(1,))),
    'LocalVMamba': (dict(arch=STAGED, directions='unsearched'), dict(
        DENSE, **LOCAL, arch=dict(STAGED, dim=8), out_indices=(1,))),
    'Vim': (dict(arch=PLAIN, out_indices=(2,)), dict(
        DENSE, **VIM, arch=dict(PLAIN, dim=8), out_indices=(0,), feature='mixer', last='add_norm',
        pyramid=False, dropped_row='first')),
    'LocalVim': (dict(arch=PLAIN, out_indices=(2,), directions='unsearched'), dict(
        DENSE, **LOCAL_VIM, arch=dict(PLAIN, dim=8), out_indices=(0,))),
    'MambaVisionClassifier': (dict(arch=HYBRID), dict(
        COMMON, **ABLATIONS, arch=dict(HYBRID, dim=8), num_classes=3, window_size=(8, 8, 6, 3),
        windows='tight', layer_scale=0.5)),
    'VMambaClassifier': (dict(arch=STAGED), dict(
        COMMON, arch=dict(STAGED, dim=8), num_classes=3)),
    'LocalVMambaClassifier': (dict(arch=STAGED, directions='unsearched'), dict(
        COMMON, **LOCAL, arch=dict(STAGED, dim=8), num_classes=3)),
    'VimClassifier': (dict(arch=PLAIN), dict(
        COMMON, **VIM, arch=dict(PLAIN, dim=8), num_classes=3)),
    'LocalVimClassifier': (dict(arch=PLAIN, directions='unsearched'), dict(
        COMMON, **LOCAL_VIM | dict(norm='ln'), arch=dict(PLAIN, dim=8), num_classes=3,
        class_token=True)),
}
# module: (class, a complete arch, another value for each of its keys)
ARCHITECTURES = {
    'mambavision': (mambavision, models.MambaVision, HYBRID, dict(
        dim=32, depths=(1, 2, 2, 3), stem_width=8, num_heads=(1, 1, 2, 2),
        window_size=(8, 8, 4, 2), mlp_ratio=2, layer_scale=0.1)),
    'vmamba': (vmamba, models.VMamba, STAGED, dict(
        dim=32, depths=(1, 1, 1, 1), ssm_ratio=1.0, state_dim=2, dt_rank=3, mlp_ratio=2.0,
        gate=True, conv_bias=True, channel_first=False, stem='v1', downsample='v1',
        float32_scan=True)),
    'localvmamba': (localvmamba, models.LocalVMamba, STAGED, dict(
        dim=32, depths=(2, 1, 1, 1), ssm_ratio=1.0, state_dim=2, dt_rank=3, mlp_ratio=2.0,
        conv_bias=False, stem='v2', downsample='v3', float32_scan=False)),
    'vim': (vim, models.Vim, PLAIN, dict(dim=32, depth=4, state_dim=2, dt_rank=3)),
    'localvim': (localvim, models.LocalVim, PLAIN, dict(dim=32, depth=4, state_dim=2, dt_rank=3)),
}


def picture(model):
    """What can be seen of a network: kinds of modules, their plain settings, shapes."""
    kinds = {name: (type(module) if name else '', {
        key: value for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple))})
        for name, module in model.named_modules()}
    tensors = {name: (tuple(tensor.shape), getattr(tensor, 'requires_grad', None))
               for name, tensor in model.state_dict(keep_vars=True).items()}
    return kinds, tensors, model.init_cfg


@pytest.mark.parametrize('name', SETTINGS)
def test_every_argument_changes_the_network(name):
    cls, (base, others) = getattr(models, name), SETTINGS[name]
    assert set(others) == set(inspect.signature(cls.__init__).parameters) - {'self'}
    plain = picture(cls(**base))
    assert plain == picture(cls(**base))
    for key, value in others.items():
        given = dict(base, **{key: value})
        if key == 'last':
            given['pyramid'] = False
        assert picture(cls(**given)) != plain, f'{key}={value!r} has no effect'


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_key_of_an_architecture_changes_the_network(name):
    module, cls, base, others = ARCHITECTURES[name]
    more = dict(directions='unsearched') if name.startswith('local') else {}
    more |= dict(out_indices=(0,), pyramid=False) if name == 'vim' else {}
    more |= dict(out_indices=(0,)) if name == 'localvim' else {}
    known = {*getattr(module, '_REQUIRED', base), *module._OPTIONAL}
    assert set(others) == known - ({'gate', 'channel_first'} if name == 'localvmamba' else set())
    plain = picture(cls(base, **more))
    for key, value in others.items():
        found = picture(cls(dict(base, **{key: value}), **more))
        assert found != plain, f'arch[{key!r}]={value!r} has no effect'


DEFAULTS = {
    'MambaVision': 0.2, 'VMamba': 0.2, 'LocalVMamba': 0.2, 'Vim': 0.1, 'LocalVim': 0.1,
    'VMambaClassifier': 0.2, 'LocalVMambaClassifier': 0.2, 'VimClassifier': 0.1,
    'LocalVimClassifier': 0.1, 'MM_VSSM': 0.1, 'MM_LocalVSSM': 0.1, 'MM_LocalVim': 0.1,
    'VisionMambaSeg': 0.1}


@pytest.mark.parametrize('name', DEFAULTS)
def test_rates_that_nobody_sets_are_the_published_ones(name):
    signature = inspect.signature(getattr(models, name).__init__)
    assert signature.parameters['drop_path_rate'].default == DEFAULTS[name]


def test_gated_scans_of_the_first_release_run_in_float32():
    for table in (vmamba.ARCHITECTURES, {name: localvmamba._OPTIONAL for name in ('v0_local',)}):
        for name, arch in table.items():
            first = name.startswith('v0')
            assert arch.get('float32_scan', False) == arch.get('gate', False) == first


# --- drop-ins ------------------------------------------------------------------------------------

V0 = dict(STAGED, **V0_FORM)
VSSM = dict(dims=16, depths=(1, 2, 1, 1), mlp_ratio=0.0, downsample_version='v1')
SEG = dict(img_size=64, embed_dim=16, depth=3, out_indices=(0,))
LOCAL_SEG = dict(img_size=64, embed_dim=16, depth=3, out_indices=(0,), directions=LINES)
PARTS = [['h']] * 5
# class: (its settings, our class and settings for the same network, pairs of changes)
DROPINS = {
    'MM_mamba_vision': (
        dict(dim=16, in_dim=4, depths=(1, 2, 2, 2), num_heads=(1, 1, 2, 4),
             window_size=(8, 8, 4, 3)),
        'MambaVision', dict(arch=HYBRID, drop_path_rate=0.2), [
            (dict(dim=32), dict(arch=dict(HYBRID, dim=32))),
            (dict(in_dim=8), dict(arch=dict(HYBRID, stem_width=8))),
            (dict(depths=(1, 1, 1, 1)), dict(arch=dict(HYBRID, depths=(1, 1, 1, 1)))),
            (dict(num_heads=(1, 1, 1, 1)), dict(arch=dict(HYBRID, num_heads=(1, 1, 1, 1)))),
            (dict(window_size=(8, 8, 2, 2)), dict(window_size=(8, 8, 2, 2))),
            (dict(mlp_ratio=2), dict(arch=dict(HYBRID, mlp_ratio=2))),
            (dict(out_indices=(1, 3)), dict(out_indices=(1, 3))),
            (dict(norm_layer='bn'), dict(out_norm='bn')),
            (dict(layer_scale=0.5), dict(layer_scale=0.5)),
            (dict(pretrained='w.pth'), dict(init_cfg=FILE))]),
    'MM_VSSM': (
        VSSM, 'VMamba', dict(arch=V0, drop_path_rate=0.1), [
            (dict(dims=[32, 64, 128, 256]), dict(arch=dict(V0, dim=32))),
            (dict(depths=(1, 1, 1, 1)), dict(arch=dict(V0, depths=(1, 1, 1, 1)))),
            (dict(ssm_d_state=3), dict(arch=dict(V0, state_dim=3))),
            (dict(ssm_ratio=1.0), dict(arch=dict(V0, ssm_ratio=1.0))),
            (dict(ssm_dt_rank=3), dict(arch=dict(V0, dt_rank=3))),
            (dict(ssm_conv_bias=False), dict(arch=dict(V0, conv_bias=False))),
            (dict(forward_type='v05_noz'), dict(arch=dict(V0, gate=False, float32_scan=False))),
            (dict(forward_type='v0_no32'), dict(arch=dict(V0, float32_scan=False))),
            (dict(mlp_ratio=2.0), dict(arch=dict(V0, mlp_ratio=2.0))),
            (dict(drop_path_rate=0.4), dict(drop_path_rate=0.4)),
            (dict(norm_layer='ln2d'), dict(arch=dict(V0, channel_first=True))),
            (dict(downsample_version='v3'), dict(arch=dict(V0, downsample='v3'))),
            (dict(patchembed_version='v2'), dict(arch=dict(V0, stem='v2'))),
            (dict(out_indices=(1, 3)), dict(out_indices=(1, 3))),
            (dict(pretrained='w.pth'), dict(init_cfg=FILE))]),
    'MM_LocalVSSM': (
        dict(dims=16, depths=(1, 2, 1, 1), directions=PARTS),
        'LocalVMamba', dict(arch=STAGED, directions=PARTS, drop_path_rate=0.1,
                            v_restore='released'), [
            (dict(directions=[['v']] * 5), dict(directions=[['v']] * 5)),
            (dict(dims=32), dict(arch=dict(STAGED, dim=32))),
            (dict(depths=(1, 1, 1, 2)), dict(arch=dict(STAGED, depths=(1, 1, 1, 2)))),
            (dict(ssm_d_state=3), dict(arch=dict(STAGED, state_dim=3))),
            (dict(ssm_ratio=1.0), dict(arch=dict(STAGED, ssm_ratio=1.0))),
            (dict(ssm_dt_rank=3), dict(arch=dict(STAGED, dt_rank=3))),
            (dict(ssm_conv_bias=False), dict(arch=dict(STAGED, conv_bias=False))),
            (dict(forward_type='v0_no32'), dict(arch=dict(STAGED, float32_scan=False))),
            (dict(mlp_ratio=2.0), dict(arch=dict(STAGED, mlp_ratio=2.0))),
            (dict(drop_path_rate=0.4), dict(drop_path_rate=0.4)),
            (dict(downsample_version='v3'), dict(arch=dict(STAGED, downsample='v3'))),
            (dict(patchembed_version='v2'), dict(arch=dict(STAGED, stem='v2'))),
            (dict(out_indices=(1, 3)), dict(out_indices=(1, 3))),
            (dict(v_restore='exact'), dict(v_restore='exact')),
            (dict(pretrained='w.pth'), dict(init_cfg=FILE))]),
    'MM_LocalVim': (
        LOCAL_SEG, 'LocalVim',
        dict(arch=PLAIN, img_size=64, directions=LINES, out_indices=(0,), rope=False,
             v_restore='released'), [
            (dict(directions=None), dict(directions=None)),
            (dict(img_size=(64, 96)), dict(img_size=(64, 96))),
            (dict(embed_dim=32), dict(arch=dict(PLAIN, dim=32))),
            (dict(depth=4, directions=None), dict(arch=dict(PLAIN, depth=4), directions=None)),
            (dict(out_indices=(0, 1)), dict(out_indices=(0, 1))),
            (dict(drop_path_rate=0.4), dict(drop_path_rate=0.4)),
            (dict(rms_norm=True), dict(norm='rms')),
            (dict(if_rope=True, if_rope_residual=True), dict(rope=True)),
            (dict(v_restore='exact'), dict(v_restore='exact')),
            (dict(pretrained_ckpt='w.pth'), dict(init_cfg=FILE))]),
    'VisionMambaSeg': (
        SEG, 'Vim', dict(arch=PLAIN, img_size=64, out_indices=(0,), feature='mixer',
                         dropped_row='first'), [
            (dict(img_size=96), dict(img_size=96)),
            (dict(stride=8), dict(stride=8)),
            (dict(in_chans=1), dict(in_channels=1)),
            (dict(embed_dim=32), dict(arch=dict(PLAIN, dim=32))),
            (dict(depth=4), dict(arch=dict(PLAIN, depth=4))),
            (dict(d_state=3), dict(arch=dict(PLAIN, state_dim=3))),
            (dict(out_indices=(1,)), dict(out_indices=(1,))),
            (dict(drop_path_rate=0.4), dict(drop_path_rate=0.4)),
            (dict(if_fpn=False), dict(pyramid=False)),
            (dict(use_residual_as_feature=True, last_layer_process='add'),
             dict(feature='residual')),
            (dict(use_residual_as_feature=True, last_layer_process='add & norm',
                  out_indices=(2,)), dict(feature='residual', last='add_norm', out_indices=(2,))),
            (dict(if_rope=True, if_rope_residual=True), dict(rope=True)),
            (dict(if_divide_out=False), dict(divide=False)),
            (dict(if_cls_token=False), dict(dropped_row='middle')),
            (dict(pretrained='w.pth'), dict(init_cfg=FILE))]),
}
# Settings of the originals with one possible value, or without influence on the result.
INERT = {'ssm_conv', 'ssm_act_layer', 'ssm_init', 'mlp_act_layer', 'patch_norm', 'patch_size',
         'if_abs_pos_embed', 'bimamba_type', 'fused_add_norm', 'residual_in_fp32',
         'use_middle_cls_token', 'norm_layer', 'rms_norm'}


@pytest.mark.parametrize('name', DROPINS)
def test_dropins_hand_every_setting_on(name):
    cls, (given, ours, same, changes) = getattr(models, name), DROPINS[name]
    ours = getattr(models, ours)
    named = {key for change, _ in changes for key in change}
    counted = {key for key, parameter in inspect.signature(cls.__init__).parameters.items()
               if parameter.default is not dropin.NOT_GIVEN and key != 'self'}
    assert counted - named <= INERT and named <= counted
    for change, equal in [({}, {}), *changes]:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = picture(cls(**dict(given, **change)))
        for part, want in zip(found, picture(ours(**dict(same, **equal))), strict=True):
            assert part == want, change


@pytest.mark.parametrize(('name', 'settings'), [
    ('VimClassifier', {}), ('LocalVimClassifier', dict(directions='unsearched'))])
def test_the_last_output_of_a_plain_classifier_is_thinned_too(name, settings):
    model = getattr(models, name)(PLAIN, num_classes=3, img_size=32, drop_path_rate=0.5, **settings)
    thinned = []
    model.drop_path.register_forward_hook(lambda _, args, __: thinned.append(args[0].shape))
    assert not isinstance(model.drop_path, nn.Identity)
    model.train()(torch.rand(2, 3, 32, 32))
    assert [shape[::2] for shape in thinned] == [(2, 16)]
