"""One change in another package, with a name and a switch."""

import os
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ['NAMES', 'VARIABLE', 'Patch', 'apply', 'switched_off']

VARIABLE = 'MMHYBRID_WITHOUT'
#: The last one is applied by our commands alone, all others when the plugin is imported.
NAMES = ('mmcv-operators', 'config-prefix', 'checkpoint-loader', 'whole-checkpoints', 'pipelines',
         'test-metrics', 'image-files')


@dataclass(frozen=True)
class Patch:
    """One change.

    Attributes:
        name: one of :data:`NAMES`; with it ``MMHYBRID_WITHOUT`` switches the patch off.
        why: one sentence.
        touches: dotted names of what is replaced or added to.
        apply: makes the change; a second time changes nothing.
        is_active: whether it is made.
    """

    name: str
    why: str
    touches: tuple[str, ...]
    apply: Callable[[], object]
    is_active: Callable[[], bool]


def switched_off() -> set[str]:
    """Names of the patches that ``MMHYBRID_WITHOUT`` switches off.

    Raises:
        ValueError: it names something else.
    """
    text = os.environ.get(VARIABLE, '')
    wanted = {name.strip() for name in text.split(',')} - {''}
    unknown = sorted(wanted - {*NAMES})
    if unknown:
        raise ValueError(
            f'The environment variable {VARIABLE}={text} switches off {" and ".join(unknown)}, '
            f'which mmhybrid does not have. Its patches are {", ".join(NAMES)}; write a comma '
            'between several.'
        )
    return wanted


def apply(patch: Patch) -> bool:
    """Apply a patch unless it is switched off; returns whether it is active."""
    if patch.name not in switched_off():
        patch.apply()
    return patch.is_active()
