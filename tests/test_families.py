"""Families as data: what is said of them once is what their networks are."""
import inspect
import re

import pytest
import torch

from mmhybrid import models
from mmhybrid.families import FAMILIES
from mmhybrid.weights import RELEASED, identify

every_family = pytest.mark.parametrize('name', FAMILIES)


@pytest.fixture(scope='module')
def networks():
    """The smallest network of each family, without memory."""
    made = {}

    def make(name):
        if name not in made:
            with torch.device('meta'):
                made[name] = getattr(models, name)(FAMILIES[name].smallest)
        return made[name]
    return make


@every_family
def test_facts_tell_the_variants_apart(name):
    family = FAMILIES[name]
    different = {id(arch): key for key, arch in reversed(family.architectures.items())}
    assert set(family.variants.values()) == set(different.values())
    for facts in family.variants:
        assert len(facts) == len(family.facts)


@every_family
def test_a_network_is_recognised_by_its_names_and_shapes(name, networks):
    shapes = {key: tuple(tensor.shape) for key, tensor in networks(name).state_dict().items()}
    identity = identify(shapes)
    assert (identity.family, identity.variant) == (name, FAMILIES[name].smallest)


@every_family
def test_odd_shapes_have_a_family_and_no_variant(name, networks):
    for cut in (lambda shape: shape[:1], lambda shape: (0, *shape[1:]), lambda shape: ()):
        shapes = {key: cut(tuple(tensor.shape))
                  for key, tensor in networks(name).state_dict().items()}
        identity = identify(shapes)
        assert (identity.family, identity.variant) in ((name, None), (name, 'tiny'))
        assert identity.variant is None or FAMILIES[name].is_plain  # one number tells its width


@every_family
def test_state_names_are_those_of_the_marked_parameters(name, networks):
    named = {key.rpartition('.')[2]: parameter
             for key, parameter in networks(name).named_parameters()}
    marked = {key for key, parameter in named.items()
              if getattr(parameter, '_no_weight_decay', False)}
    state = {key for key in named if re.fullmatch(FAMILIES[name].state_names, key)}
    # the bias of VMamba's steps has two dimensions, but is a bias to others
    assert marked and state - {'dt_projs_bias'} == marked


@every_family
def test_architectures_are_complete_and_files_are_of_known_ones(name):
    family = FAMILIES[name]
    for arch in family.architectures.values():
        assert set(family.required) <= set(arch) <= {*family.required, *family.optional}
    assert family.released
    for row in family.released:
        assert row.family == name and row.arch in family.architectures
        assert RELEASED[row.name] == row
    assert family.is_plain == ('img_size' in inspect.signature(getattr(models, name)).parameters)
