"""LocalVim: Huang et al., 2024."""
from __future__ import annotations

from .family import Family
from .localvmamba import released_with_localmamba
from .vim import VIM, facts_in, facts_of

__all__ = ['LOCALVIM']

ARCHITECTURES = {
    'tiny': dict(dim=192, depth=20),
    'small': dict(dim=384, depth=20),
}

LOCALVIM = Family(
    'LocalVim',
    required=VIM.required,
    optional=VIM.optional,
    architectures=ARCHITECTURES,
    mark=r'layers\.\d+\.mixer\.A_log_\d+\Z',
    facts=VIM.facts,
    facts_of=facts_of,
    facts_in=facts_in,
    state_names=r'A_log_\d+|D_\d+',
    released=released_with_localmamba('LocalVim'))
