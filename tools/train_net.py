#!/usr/bin/env python
"""Trains and evaluates the detector inside detectron2.

    tools/train_net.py --config-file configs/detectron2/coco/rn50.yaml [--eval-only] [--resume] [--num-gpus N]
        [KEY VALUE …]

See docs/detectron2.md.
"""

from __future__ import annotations

import sys

from clip_base.runtime.errors import InputError


def run() -> int:
    """Returns the exit code: 2 when what was given cannot be used."""
    try:
        from regionclip.detectron2 import training  # noqa: PLC0415 (says what is missing)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from detectron2.engine import default_argument_parser, launch  # noqa: PLC0415

    arguments = default_argument_parser().parse_args()
    try:
        launch(
            training.main,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
