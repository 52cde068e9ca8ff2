"""Evaluates detections on base and novel classes: the job `regionclip evaluate`.

For those who start things by path. Options: `python tools/evaluate_ovd.py --help`.
"""

import sys

from clip_base.jobs.cli import main_regionclip

if __name__ == "__main__":
    sys.exit(main_regionclip(["evaluate", *sys.argv[1:]]))
