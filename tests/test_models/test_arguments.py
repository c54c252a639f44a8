"""A setting is used or refused."""
import inspect

import pytest

from mmhybrid.models.arguments import check_names, strict_arguments
from mmhybrid.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


@strict_arguments
class Toy:
    """Has arguments."""

    def __init__(self, arch, *, drop_path_rate=0., with_cp=False):
        self.given = (arch, drop_path_rate, with_cp)


@strict_arguments
class Child(Toy):
    """Has fewer."""

    def __init__(self, with_cp=False):
        super().__init__('small', with_cp=with_cp)


def test_valid_arguments_pass():
    assert Toy('a', with_cp=True).given == ('a', 0., True)
    assert Child(with_cp=True).given == ('small', 0., True)
    assert list(inspect.signature(Toy).parameters) == ['arch', 'drop_path_rate', 'with_cp']


@pytest.mark.parametrize('wrong, nearest', [('drop_path', 'drop_path_rate'), ('withcp', 'with_cp'),
                                            ('Arch', 'arch')])
def test_nearest_name_is_given(wrong, nearest):
    with pytest.raises(TypeError) as error:
        Toy(**{'arch': 'a', wrong: 1})
    assert str(error.value) == (f'Toy: unknown argument {wrong!r}; did you mean {nearest!r}? '
                                'Valid: arch, drop_path_rate, with_cp')


def test_nothing_near_still_lists_all():
    with pytest.raises(TypeError, match="'zzz'; Valid: arch, drop_path_rate, with_cp"):
        Toy('a', zzz=1)


def test_every_unknown_name_is_given():
    with pytest.raises(TypeError, match="key 'depth', 'qqq'; did you mean 'depths'"):
        check_names(['depth', 'dim', 'qqq'], ['dim', 'depths'], 'arch: unknown key')


def test_no_registered_class_swallows_keywords():
    import mmhybrid.plugin  # noqa: F401
    found = {**MODELS.module_dict, **HOOKS.module_dict, **OPTIM_WRAPPERS.module_dict,
             **OPTIM_WRAPPER_CONSTRUCTORS.module_dict}
    assert 'MambaVision' in found and 'MM_mamba_vision' in found
    for name, cls in MODELS.module_dict.items():
        kinds = [p.kind for p in inspect.signature(cls).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds, name
