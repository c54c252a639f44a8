"""mmhybrid as a plugin of mmengine: importing this registers everything and applies the patches.

``custom_imports = dict(imports=['mmhybrid.plugin'])`` in a config does so in any process;
``imports=['mmhybrid']`` does unless a part of mmhybrid, such as ``mmhybrid.ops``, has been imported
before.
"""

from . import engine, evaluation, models  # noqa: F401
from .datasets import loading  # noqa: F401
