"""What a compiled function computes does not depend on what the compiler's cache holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from clip_base.runtime.precision import compiled

def function(x):
    return (x * 2).exp() / (1 + x.relu())

x = torch.arange(96.0) / 96
print(torch.allclose(compiled(function, torch.device("cpu"))(x), function(x)))
"""


@pytest.mark.slow
def test_a_graph_for_wider_vectors_in_the_cache_is_not_used(tmp_path: Path) -> None:
    for capability in ("", "avx2"):  # the processor's own, then narrower ones: a graph of 16 steps, run by 8
        narrow = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        environment = {**os.environ, **narrow, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
        )
        assert done.stdout == "True\n", done.stderr
