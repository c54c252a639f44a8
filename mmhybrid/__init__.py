"""mmhybrid: dense prediction with hybrid Mamba-Transformer backbones."""

__version__ = '0.1.0'
