"""Pretrains a CLIP on image-text pairs: the job `clip-base pretrain`.

For those who start things by path. Options: `python tools/pretrain_clip.py --help`.
"""

import sys

from clip_base.jobs.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
