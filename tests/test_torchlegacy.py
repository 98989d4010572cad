"""Torch files from before 1.6, read without torch: the same numbers, and nothing of the file is run."""

from collections import OrderedDict

import numpy as np
import pytest
import torch

from convert.torchfile import read
from convert.torchpickle import TorchFileError


def old(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def test_old_files_hold_the_same_numbers(tmp_path):
    base = torch.arange(24.0)
    state = OrderedDict(
        turned=base.view(4, 6).T, part=base[5:9], scalar=base[3], empty=torch.zeros(0, 3), half=base.half()[::2],
        parameter=torch.nn.Parameter(base.view(2, 12).clone()), count=torch.tensor(7),
    )  # fmt: skip
    for name, value in {"bare": state, "wrapped": {"state_dict": state}}.items():
        path = old(value, tmp_path / f"{name}.pth")
        found = read(path)
        assert list(found) == list(state)
        for key, tensor in state.items():
            assert found[key].dtype == tensor.detach().numpy().dtype
            assert not found[key].flags.writeable or not found[key].size
            np.testing.assert_array_equal(found[key], tensor.detach().numpy())


def test_the_oldest_way_to_write_a_tensor(tmp_path):
    """torch 0.2 and 0.3, of which I3D's weights are: `_rebuild_tensor` of storage, offset, size and stride."""
    tensor = torch.arange(6.0).view(2, 3)
    path = old(OrderedDict(x=_OldTensor(tensor)), tmp_path / "x.pth")
    assert b"_rebuild_tensor\n" in path.read_bytes() and b"_rebuild_tensor_v2" not in path.read_bytes()
    np.testing.assert_array_equal(read(path)["x"], tensor)


class _OldTensor:
    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        t = self.tensor
        parts = (torch.storage.TypedStorage(wrap_storage=t.untyped_storage(), dtype=t.dtype, _internal=True), 0)
        return (torch._utils._rebuild_tensor, (*parts, tuple(t.shape), t.stride()))


@pytest.mark.parametrize("part", [0.05, 0.1, 0.3, 0.5, 0.8, 0.999])
def test_old_files_cut_off_anywhere(part, tmp_path):
    whole = old(OrderedDict(x=torch.arange(40.0), y=torch.zeros(3)), tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(TorchFileError, match="damaged or truncated"):
        read(path)
