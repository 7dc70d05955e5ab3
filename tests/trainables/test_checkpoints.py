"""Checkpoints: flipped bits are found before anything is made of them."""

from pathlib import Path

import pytest
import torch

from trainables.checkpoints import CheckpointError, damaged_member, load_state, save_state


def test_every_flipped_bit_of_the_weights_is_found(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_state(path, {"average": {"w": torch.arange(4096.0)}, "epoch": 3})
    whole = path.read_bytes()
    assert damaged_member(path) is None
    start = whole.index(torch.arange(4096.0).numpy().tobytes())
    for place in range(start, start + 4 * 4096, 997):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(bytes(flipped))
        assert not torch.equal(  # torch itself loads it
            torch.load(path, weights_only=True)["average"]["w"], torch.arange(4096.0)
        )
        with pytest.raises(CheckpointError, match=r"best\.pt: damaged, .*wrong checksum of"):
            load_state(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_checkpoint_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
        load_state(tmp_path / "best.pt")
