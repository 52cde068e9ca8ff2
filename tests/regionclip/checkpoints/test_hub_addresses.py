"""Detectors and proposal networks are loaded by their address on the hub, as CLIPs are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clip_base.weights.fetching import hub
from regionclip.checkpoints.interpolate import read
from regionclip.checkpoints.load import load_detector
from regionclip.proposals.rpn.proposer import load_network


@pytest.fixture
def repository(detector_file: Path, rpn_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts two files where the hub's are."""
    places = {"me/detector": detector_file, "me/rpn": rpn_file}
    monkeypatch.setattr(hub, "fetch", lambda address, _: places[address.repository])


@pytest.mark.usefixtures("repository")
def test_a_detector_is_loaded_by_its_address(detector_file: Path) -> None:
    found, own = load_detector("hf://me/detector"), load_detector(str(detector_file))
    assert found.trained
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), own.parameters(), strict=True))
    assert read("hf://me/detector").is_detector


@pytest.mark.usefixtures("repository")
def test_a_proposal_network_is_loaded_by_its_address(rpn_file: Path) -> None:
    found, own = load_network("hf://me/rpn"), load_network(rpn_file)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), own.parameters(), strict=True))
