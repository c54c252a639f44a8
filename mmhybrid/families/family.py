"""What is to be known of a model family, and of a published file of weights."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ['Family', 'Released', 'Shapes', 'count_blocks']

#: Of the tensors of a file, by their names.
Shapes = Mapping[str, tuple[int, ...]]


class Released(NamedTuple):
    """One published file.

    Attributes:
        name: short name.
        family: registered class of the backbone.
        arch: its variant.
        kind: 'classification', 'detector' or 'segmentor'.
        file: published file name.
        address: where it is, '' if nowhere.
        license: of the weights.
        source: repository that published it.
        remark: what a user must know.
        window_size: windows of a classifier with these weights, which no file tells; None for
            other kinds and for families without windows.
    """

    name: str
    family: str
    arch: str
    kind: str
    file: str
    address: str
    license: str
    source: str
    remark: str = ''
    window_size: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
        name: registered class of its backbone.
        required: settings that every architecture has.
        optional: further settings and their defaults.
        architectures: settings by the name of the variant, the smallest first. A second name of a
            variant holds the same object.
        mark: what a name begins with that only files of this family have.
        facts: names of what tells the variants apart.
        facts_of: these facts of a complete architecture.
        facts_in: these facts of a file, read from the shapes of its tensors; any of KeyError,
            IndexError, ZeroDivisionError and ValueError says that parts are missing.
        state_names: pattern of the last part of the names of state-space parameters, which the
            rule ``no_decay='ssm'`` spares from decay.
        released: its published files.
    """

    name: str
    required: tuple[str, ...]
    optional: dict[str, object]
    architectures: dict[str, dict]
    mark: str
    facts: tuple[str, ...]
    facts_of: Callable[[dict], tuple]
    facts_in: Callable[[Shapes], tuple]
    state_names: str
    released: tuple[Released, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it has one width throughout, and a table of positions."""
        return 'depths' not in self.required

    @property
    def smallest(self) -> str:
        """Name of its smallest variant."""
        return next(iter(self.architectures))

    @property
    def variants(self) -> dict[tuple, str]:
        """Names of the variants by their facts."""
        found: dict[tuple, str] = {}
        for name, arch in self.architectures.items():
            found.setdefault(self.facts_of({**self.optional, **arch}), name)
        return found


def count_blocks(shapes: Shapes, stages: str) -> tuple[int, ...]:
    """Count the blocks of each stage, where names begin with ``stages.0.blocks.0.``."""
    found = {tuple(map(int, match.groups())) for match in (
        re.match(rf'{stages}\.(\d+)\.blocks\.(\d+)\.', name) for name in shapes) if match}
    count = max(stage for stage, _ in found) + 1
    if count > 100:
        raise ValueError(f'got {count} stages')
    return tuple(sum(stage == i for stage, _ in found) for i in range(count))
