"""Models; importing this package registers them."""
from .backbones import *  # noqa: F403
