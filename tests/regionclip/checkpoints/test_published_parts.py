"""Single parts in RegionCLIP's form: class embeddings; and what is in no part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clip_base.export.convert import ConvertConfig, convert
from clip_base.runtime.errors import InputError
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.proposals.rpn.proposer import load_network


def test_pickles_with_programs_are_refused_here_too(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "rpn.pth")
    with pytest.raises(InputError, match="is refused: its pickle holds"):
        load_network(tmp_path / "rpn.pth")


def test_a_vocabulary_becomes_class_embeddings(tmp_path: Path) -> None:
    rows = torch.nn.functional.normalize(torch.randn(2, 8), dim=1)
    Vocabulary(("a", "b"), rows).save(tmp_path / "v.safetensors")
    path = tmp_path / "v.pth"
    convert(ConvertConfig(file=str(tmp_path / "v.safetensors"), out=str(path), to="regionclip"))
    torch.testing.assert_close(Vocabulary.load(path, ["a", "b"]).embeddings, rows)
