"""Mines region-phrase pairs from captioned images: the job `regionclip mine`.

For those who start things by path. Options: `python tools/mine_pseudo_labels.py --help`.
"""

import sys

from clip_base.jobs.cli import main_regionclip

if __name__ == "__main__":
    sys.exit(main_regionclip(["mine", *sys.argv[1:]]))
