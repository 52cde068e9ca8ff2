"""Without detectron2 everything else works, and asking for it says how to install it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BLOCKED = "import sys; sys.modules['detectron2'] = None; "


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_importing_the_package_says_how_to_install_detectron2() -> None:
    done = run("import regionclip.detectron2")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("clip_base.runtime.errors.InputError: detectron2 is not installed")
    official, script = last.index("--no-build-isolation"), last.index("make detectron2")
    assert official < script


def test_the_proposer_says_how_to_install_detectron2(world: Path, tmp_path: Path) -> None:
    done = run(
        "from clip_base.jobs.cli import main_regionclip; sys.exit(main_regionclip(sys.argv[1:]))",
        "propose",
        f"annotations={world / 'instances_val.json'}",
        f"images={world / 'images'}",
        "proposer.name=detectron2",
        "proposer.config=model.yaml",
        f"out={tmp_path / 'out'}",
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: detectron2 is not installed; install it from its repo"
    )


def test_the_training_script_says_how_to_install_detectron2() -> None:
    script = Path(__file__).parents[3] / "tools" / "train_net.py"
    done = run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert done.returncode == 2
    assert done.stderr.startswith("error: detectron2 is not installed")


def test_nothing_else_imports_it() -> None:
    done = run(
        "import regionclip.inference.detect, regionclip.evaluation.evaluate, regionclip.mining.mine; "
        "import regionclip.training.train_detector"
    )
    assert done.returncode == 0, done.stderr
