"""What goes to the device in one copy comes out of it as it went in."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quire.engine.transfer import ALIGNMENT, Download, buffer_size, send, upload, views

any_array = st.sampled_from([np.int64, np.int32, np.float32]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=9))
)


@given(st.lists(any_array, max_size=6), st.booleans())
def test_every_array_survives_the_common_buffer(some, transposed):
    some = [array.T if transposed else array for array in some]
    sent = send([torch.from_numpy(array) for array in some], torch.device("cpu"))
    for array, tensor in zip(some, sent, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_the_parts_of_a_buffer_are_aligned_and_apart():
    fields = [((3,), torch.int64), ((0, 4), torch.int32), ((2, 5), torch.int32), ((1,), torch.float32)]
    buffer = torch.zeros(buffer_size(fields), dtype=torch.uint8)
    parts = views(buffer, fields)
    for number, part in enumerate(parts):
        assert part.storage_offset() * part.element_size() % ALIGNMENT == 0
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(parts))


def test_on_the_cpu_nothing_is_copied():
    array = np.arange(3)
    (tensor,) = upload([array], torch.device("cpu"))
    array[0] = 7
    assert tensor.tolist() == [7, 1, 2]
    (host,) = Download([tensor]).wait()
    assert host is tensor
