"""Trains the open-vocabulary detector on base classes: the job `regionclip train-detector`.

For those who start things by path. Options: `python tools/train_detector.py --help`.
"""

import sys

from clip_base.jobs.cli import main_regionclip

if __name__ == "__main__":
    sys.exit(main_regionclip(["train-detector", *sys.argv[1:]]))
