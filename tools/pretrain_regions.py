"""Pretrains regions on mined pairs: the job `regionclip pretrain`.

For those who start things by path. Options: `python tools/pretrain_regions.py --help`.
"""

import sys

from clip_base.jobs.cli import main_regionclip

if __name__ == "__main__":
    sys.exit(main_regionclip(["pretrain", *sys.argv[1:]]))
