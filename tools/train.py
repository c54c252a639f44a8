"""Train a model: python tools/train.py CONFIG [--help]."""
import sys
from pathlib import Path

# In a clone that is not installed the package is beside this folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmhybrid.engine.errors import run_command  # noqa: E402
from mmhybrid.engine.tools import train  # noqa: E402

if __name__ == '__main__':
    sys.exit(run_command(train))
