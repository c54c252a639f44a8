"""The model families, each described once, as plain data.

What builds, recognises, loads, lists or draws networks of all families reads it here. Importing
this needs nothing but the standard library.
"""
from .family import Family, Released
from .localvim import LOCALVIM
from .localvmamba import LOCALVMAMBA
from .mambavision import MAMBAVISION
from .vim import VIM
from .vmamba import VMAMBA

__all__ = ['FAMILIES', 'Family', 'Released']

#: By name, and in the order in which marks are tried: VMamba's is in files of LocalVMamba, too.
FAMILIES: dict[str, Family] = {
    family.name: family for family in (MAMBAVISION, LOCALVMAMBA, VMAMBA, VIM, LOCALVIM)}
