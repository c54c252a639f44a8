"""Networks as files for runtimes without PyTorch: ``mmhybrid export``."""
