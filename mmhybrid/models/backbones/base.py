"""What all backbones share: checked arguments, freezing, checkpoints, declared depth."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmhybrid.layers import casts_weights, recomputed
from mmhybrid.weights.adapters import fit_adapters

from ..arguments import check_integers
from ..initialization import initialize_from_checkpoint
from ..lora import Lora, adapt

__all__ = ['DenseBackbone', 'StagedBackbone', 'checked_recomputation', 'drop_path_rates',
           'keeps_for_backward', 'run_blocks']


class DenseBackbone(BaseModule):
    """Base of the backbones: freezing, checkpoints and the depth of each parameter.

    A subclass implements :meth:`frozen_parts`, :meth:`unused_parts` and :meth:`depth_of`, and
    calls :meth:`freeze` at the end of its constructor.

    Under autocast on a GPU all weights are cast in one call when ``forward`` begins
    (:mod:`mmhybrid.layers.weight_casts`).  Layers that turn autocast off for themselves, or read
    weights otherwise, must say so there, or the class sets ``casts_together = False``.

    Args:
        init_cfg: mmengine initialisation.
        lora: settings of low-rank adapters, see :class:`mmhybrid.models.lora.Lora`; None for none.
    """

    casts_together = True

    # Names that only one of the classification and dense forms has.
    may_differ = r'(outnorm\d|norm|head|classifier)\.'

    def __init__(self, init_cfg: dict | list[dict] | None = None, lora: dict | None = None):
        super().__init__(init_cfg=init_cfg)
        self.lora = None if lora is None else Lora.of(lora)

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if cls.casts_together and 'forward' in vars(cls):
            cls.forward = casts_weights(cls.forward)

    def frozen_parts(self) -> Iterable[nn.Module | nn.Parameter]:
        """Parts that stay in eval mode and need no gradient."""
        raise NotImplementedError

    def unused_parts(self) -> Iterable[nn.Module | nn.Parameter]:
        """Parts that are there only so that weights fit: not run, hence without gradient."""
        return ()

    def depth_of(self, name: str) -> int | None:
        """Depth of one of the backbone's own parameters; None for what follows the last block."""
        raise NotImplementedError

    @property
    def num_depths(self) -> int:
        """Number of depths: the embedding, the blocks, and what follows them."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Put frozen parts into eval mode and take the gradient from frozen and unused ones.

        With ``lora`` all that it leaves as it is loses its gradient, too, and keeps its mode.
        """
        if self.lora is not None:
            adapt(self, self.lora, [*self.frozen_parts(), *self.unused_parts()], self.may_differ)
        for part in self.frozen_parts():
            if isinstance(part, nn.Module):
                part.eval()
            part.requires_grad_(False)
        # Without gradients of its own a parameter would stop distributed training.
        for part in self.unused_parts():
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> DenseBackbone:
        """Switch the mode; frozen parts stay in eval mode."""
        super().train(mode)
        self.freeze()
        return self

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``; without one the weights stay as built."""
        initialize_from_checkpoint(self, super().init_weights)

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the weights of a file the names and shapes of this module.

        Called for every way of loading, so weights that fit already must stay as they are.
        """
        return state_dict

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own = {k: state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
        own = self.adapt_state_dict({k[len(prefix):]: v for k, v in own.items()})
        own = fit_adapters(own, self.state_dict())
        state_dict.update({prefix + k: v for k, v in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Say how deep a parameter lies, for layer-wise learning rates.

        Args:
            param_name: name as in ``named_parameters`` of the whole model.
            prefix: part of the name in front of the backbone's own, e.g. ``'backbone.'``.

        Returns:
            (depth, number of depths): 0 for the embedding, one more for each block, and what
            follows the last block (output norms, names that are not the backbone's) has the
            largest depth.
        """
        last = self.num_depths - 1
        depth = self.depth_of(param_name[len(prefix):]) if param_name.startswith(prefix) else None
        return (last if depth is None else depth), self.num_depths


class StagedBackbone(DenseBackbone):
    """A stem and four stages of blocks at strides 4 to 32, one norm per returned map.

    Expects ``patch_embed``, the stages (with ``blocks`` and ``downsample``), ``out_indices`` and
    ``frozen_stages``.
    """

    # The attribute that holds the stages; part of the weights' names.
    stages_name = 'layers'

    @property
    def stages(self) -> nn.ModuleList:
        """The stages in order."""
        return getattr(self, self.stages_name)

    def frozen_parts(self) -> Iterable[nn.Module]:
        """The stem and the first ``frozen_stages`` stages."""
        if self.frozen_stages >= 0:
            yield self.patch_embed
            yield from self.stages[:self.frozen_stages]

    def unused_parts(self) -> Iterable[nn.Module]:
        """What follows the last returned stage."""
        last = self.out_indices[-1]
        if last < len(self.stages) - 1:
            yield self.stages[last].downsample
            yield from self.stages[last + 1:]

    def depth_of(self, name: str) -> int | None:
        """Count blocks; a downsampling belongs to the block before it."""
        parts = name.split('.')
        if parts[0] == 'patch_embed':
            return 0
        if parts[0] != self.stages_name:
            return None
        depths = [len(stage.blocks) for stage in self.stages]
        stage = int(parts[1])
        if parts[2] == 'downsample':
            return sum(depths[:stage + 1])
        return sum(depths[:stage]) + int(parts[3]) + 1

    @property
    def num_depths(self) -> int:
        """Stem, blocks, and what follows them."""
        return sum(len(stage.blocks) for stage in self.stages) + 2


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, with_cp: bool, *more) -> Tensor:
    """Apply blocks in order, recomputing them in the backward pass if ``with_cp``.

    ``more`` are further arguments of every block, numbers drawn at random among them.
    """
    for block in blocks:
        again = with_cp and keeps_for_backward(block, x)
        x = recomputed(block, x, *more, draws=False) if again else block(x, *more)
    return x


def keeps_for_backward(block: nn.Module, x: Tensor) -> bool:
    """Whether a block keeps tensors for a backward pass: for its input, or what learns in it."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in block.parameters()))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth rates per stage and block, growing linearly from 0 to ``rate``."""
    total = sum(depths)
    rates = iter(rate * j / max(total - 1, 1) for j in range(total))
    return [[next(rates) for _ in range(depth)] for depth in depths]


def checked_recomputation(with_cp: bool | Sequence[bool] | Sequence[int], count: int,
                          what: str = 'stage') -> tuple[bool, ...]:
    """Turn ``with_cp`` into one flag for each of ``count`` stages or blocks.

    Raises:
        TypeError: if it is neither a flag, nor flags, nor integers.
        ValueError: for another number of flags, or a stage that does not exist.
    """
    if isinstance(with_cp, bool):
        return (with_cp,) * count
    given = list(with_cp) if isinstance(with_cp, (list, tuple)) else None
    if given is None or not (all(isinstance(each, bool) for each in given) or all(
            isinstance(each, int) and not isinstance(each, bool) for each in given)):
        raise TypeError(f'got with_cp={with_cp!r}, expected True or False, one of these for each '
                        f'{what}, or the numbers of the {what}s to recompute, from 0')
    if given and isinstance(given[0], bool):
        if len(given) != count:
            raise ValueError(f'got {len(given)} flags for with_cp ({with_cp}), expected {count}, '
                             f'one per {what}')
        return tuple(given)
    check_integers('with_cp', given, 0, count - 1)
    return tuple(i in given for i in range(count))
