# The layers that mmdet counts in ConvNeXt-T for rates that decay with depth: two stages, thirds of
# the third stage, and what follows it.
layers = dict(
    {f'stages_2.blocks.{block}': 3 + block // 3 for block in range(9)},
    **{'stem_': 0, 'stages_0': 1, 'stages_1': 2, 'stages_2': 3, 'stages_3': 6})
