# Other directions in each block under channel attention, in place of a search's result.
_base_ = './localvmamba_mini_ade20k.py'

model = dict(backbone=dict(
    attention='channel',
    directions=[['h', 'v_flip', 'w2', 'w7_flip'], ['h', 'v', 'w2_flip', 'w7']] * 3
    + [['h', 'v_flip', 'w2', 'w7_flip']]))
