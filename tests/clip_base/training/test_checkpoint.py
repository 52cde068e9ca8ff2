from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from clip_base.runtime.errors import InputError
from clip_base.training import checkpoint
from clip_base.weights.native import load_exactly, read_weights, write_weights


def weights(value: float, size: int = 4) -> dict[str, torch.Tensor]:
    return {"a": torch.full((size, 2), value).T, "b": torch.tensor(value)}


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint.newest(folder) is None
    for step in (5, 10, 1000):
        checkpoint.save(folder, step, weights(step), {"random": torch.get_rng_state(), "sums": {}})
    assert checkpoint.steps(folder) == [10, 1000]
    found = checkpoint.newest(folder)
    assert found is not None
    step, read, training = found
    assert step == 1000
    torch.testing.assert_close(read, weights(1000), rtol=0, atol=0)
    assert torch.equal(training["random"], torch.get_rng_state())


def test_a_step_may_be_saved_twice(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, weights(1), {})
    checkpoint.save(tmp_path, 5, weights(2), {})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["b"] == 2


def test_what_a_kill_left_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".00000007.tmp").mkdir()
    (tmp_path / ".00000007.tmp" / "model.safetensors").write_text("half")
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, 7, weights(1), {})
    assert [path.name for path in tmp_path.iterdir()] == ["00000007"]


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt"])
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "gone"])
def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path, name: str, damage: str) -> None:
    for step in (5, 10):
        checkpoint.save(tmp_path, step, weights(step), {"random": torch.get_rng_state()})
    file = tmp_path / "00000010" / name
    whole = file.read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"garbage" * 40}
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(damaged[damage])
    with pytest.raises(
        InputError, match=r"00000010 is damaged \(.+delete that folder .* resume from step 5"
    ) as caught:
        checkpoint.newest(tmp_path)
    assert "\n" not in str(caught.value)
    file.parent.rename(tmp_path / "away")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0] == 5


def test_the_only_checkpoint_being_damaged_says_it_begins_anew(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, weights(5), {})
    (tmp_path / "00000005" / "training.pt").unlink()
    with pytest.raises(InputError, match="from the beginning"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("large", ["weights", "training"])
def test_a_full_disk_leaves_the_last_checkpoint(tiny_disk: Path, large: str) -> None:
    checkpoint.save(tiny_disk, 5, weights(5), {"x": torch.zeros(2)})
    sizes = (200_000, 2) if large == "weights" else (2, 200_000)
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoint.save(tiny_disk, 10, weights(10, sizes[0]), {"x": torch.rand(sizes[1])})
    assert caught.value.errno == errno.ENOSPC
    found = checkpoint.newest(tiny_disk)
    assert found is not None
    assert found[0] == 5
    assert [path.name for path in tiny_disk.iterdir()] == ["00000005"]


def test_a_full_disk_leaves_the_old_weights(tiny_disk: Path) -> None:
    path = tiny_disk / "model.safetensors"
    write_weights(path, weights(1), {"format": "test"})
    with pytest.raises(OSError, match="No space left on device"):
        write_weights(path, weights(2, 200_000), {})
    read, metadata = read_weights(path)
    assert (read["b"], metadata) == (1, {"format": "test"})
    assert [file.name for file in tiny_disk.iterdir()] == ["model.safetensors"]


def test_weights_that_share_memory_are_written(tmp_path: Path) -> None:
    shared = torch.rand(3, 3)
    write_weights(tmp_path / "w", {"a": shared, "b": shared, "c": shared[0]}, {})
    read, _ = read_weights(tmp_path / "w")
    torch.testing.assert_close(read, {"a": shared, "b": shared, "c": shared[0]})


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_a_damaged_weights_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    told = r"w\.safetensors cannot be read .*copy it again" if content else r"w\.safetensors is an empty file"
    with pytest.raises(InputError, match=told) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_listed() -> None:
    module = nn.Linear(2, 3)
    with pytest.raises(InputError) as caught:
        load_exactly(module, {"weight": torch.zeros(3, 5), "x": torch.zeros(1)}, "file")
    faults = "1 missing: bias; 1 left over: x; 1 misshapen: weight [3, 5] for [3, 2]"
    assert str(caught.value) == f"weights file do not fit the model: {faults}"
    many = {f"k{index}": torch.zeros(1) for index in range(9)}
    with pytest.raises(InputError, match="9 left over: k0, k1, k2, k3 and 5 more"):
        load_exactly(module, many, "file")
    load_exactly(module, {"weight": torch.zeros(3, 2), "bias": torch.ones(3)}, "file")
    assert module.bias.sum() == 3
