"""What crosses between grader and child: everything plain arrives, and nothing else gets in."""

from __future__ import annotations

import io
import json
import math
import pickle
import socket
import struct
import threading
import time

import numpy as np
import pytest
import torch

from course_lib.grading import wire


def there_and_back(value, *, strict: bool = False):
    tree, blob = wire.pack(wire.plain(value) if strict else value)
    return wire.unpack(json.loads(json.dumps(tree)), blob, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**70),
        1.5,
        math.inf,
        "text with ünïcode and \n",
        ...,
        [1, [2.0, "3"], ()],
        (1, None),
        {"a": 1, "b": [True]},
        {1: "one", 2.5: "more"},
        [],
        {},
    ],
)
def test_plain_values_arrive_as_they_were(value, strict: bool) -> None:
    again = there_and_back(value, strict=strict)
    assert again == value
    assert type(again) is type(value)


def test_nan_arrives() -> None:
    assert math.isnan(there_and_back(math.nan))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float32", "float64", "int8", "int64", "bool", "uint8", "complex64"],
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_tensors_arrive_bit_for_bit(dtype: str, shape, strict: bool) -> None:
    value = (torch.randn(shape) * 3).to(getattr(torch, dtype))
    again = there_and_back([value], strict=strict)[0]
    assert again.dtype == value.dtype
    assert again.shape == value.shape
    assert torch.equal(again, value)


def test_strides_of_inputs_are_kept_and_outputs_are_dense() -> None:
    wide = torch.arange(40.0).reshape(5, 8)
    for view in (wide[:, 2:5], wide.t(), wide[::2, ::3], wide[1].expand(4, 8)):
        again = there_and_back(view)
        assert again.stride() == view.stride()
        assert torch.equal(again, view)
        assert there_and_back(view, strict=True).is_contiguous()


def test_special_floats_keep_their_bits() -> None:
    value = torch.tensor([math.nan, -math.inf, -0.0, 1e-45])
    again = there_and_back(value, strict=True)
    assert torch.equal(again.view(torch.int32), value.view(torch.int32))


def test_what_is_not_plain_arrives_as_its_name_only() -> None:
    class Evil:
        def __reduce__(self):
            raise AssertionError("it was pickled")

    named = there_and_back([Evil(), np.zeros(3), len, Evil])
    assert type(named[0]).__name__ == "Evil"
    assert (type(named[1]).__module__, type(named[1]).__name__) == ("numpy", "ndarray")
    assert callable(named[2])
    assert callable(named[3])
    with pytest.raises(TypeError, match="another process"):
        named[2]([])
    assert there_and_back(np.float32(1.5)) == 1.5


def test_values_without_end_are_refused() -> None:
    endless: list = []
    endless.append(endless)
    with pytest.raises(wire.WireError):
        wire.pack(endless)
    with pytest.raises(wire.WireError):
        wire.pack([0] * (wire.MAX_NODES + 1))


def tensor_node(**changes) -> tuple[dict, bytes]:
    tree, blob = wire.pack(torch.zeros(2, 3))
    return {**tree, **changes}, blob


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2, 4]},
        {"shape": [1 << 40], "stride": [0]},
        {"shape": [-6], "stride": [1]},
        {"shape": [2.0, 3]},
        {"shape": "23"},
        {"shape": [1] * 60, "stride": [1] * 60},
        {"stride": [3]},
        {"offset": -1},
        {"offset": 10**30},
        {"offset": True},
        {"tensor": "1"},
        {"tensor": 0},
        {"complex": True},
        {"more": 1},
    ],
)
def test_a_tensor_that_claims_what_it_has_not_is_refused(changes) -> None:
    tree, blob = tensor_node(**changes)
    with pytest.raises(wire.WireError):
        wire.unpack(tree, blob, strict=True)


def test_an_expanded_tensor_is_refused_from_the_child_only() -> None:
    tree, blob = wire.pack(torch.zeros(1).expand(1 << 20))
    assert wire.unpack(tree, blob).shape == (1 << 20,)
    with pytest.raises(wire.WireError, match="differ"):
        wire.unpack(tree, blob, strict=True)


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {"list": 1},
        {"dict": [[1]]},
        {"dict": [[{"list": []}, 1]]},
        {"set": []},
        {"list": [], "tuple": []},
        {"ellipsis": 1},
        {"opaque": ["os"]},
        {"__reduce__": "os.system"},
    ],
)
def test_unknown_trees_are_refused(tree) -> None:
    with pytest.raises(wire.WireError):
        wire.unpack(tree, b"", strict=True)


def test_deep_trees_are_refused() -> None:
    tree: dict = {"list": []}
    for _ in range(wire.MAX_DEPTH + 1):
        tree = {"list": [tree]}
    with pytest.raises(wire.WireError, match="deep"):
        wire.unpack(tree, b"")


def test_names_from_the_child_are_names() -> None:
    value = wire.unpack({"opaque": ["os; rm -rf", "a\nb"]}, b"", strict=True)
    assert (type(value).__module__, type(value).__name__) == ("unnamed", "unnamed")


class Planted:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_no_blob_is_ever_unpickled() -> None:
    saved = io.BytesIO()
    torch.save({"0": torch.zeros(1)}, saved)
    hostile = [pickle.dumps(Planted()), saved.getvalue(), b"\x80\x04.", b"x" * 7]
    hostile += [struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{}" + b"x" * 100]
    for blob in hostile:
        with pytest.raises(wire.WireError):
            wire.unpack({"tensor": "0", "shape": [1], "stride": [1], "offset": 0}, blob)


# Frames.


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_frames_arrive_in_order(pair) -> None:
    ours, theirs = pair
    blob = bytes(range(256)) * 20_000
    writing = threading.Thread(target=lambda: [wire.send(theirs, {"n": n}, blob) for n in range(3)])
    writing.start()
    assert [wire.receive(ours) for _ in range(3)] == [({"n": n}, blob) for n in range(3)]
    writing.join()


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"CGW1" + struct.pack(">IQ", wire.MAX_HEADER + 1, 0),
        b"CGW1" + struct.pack(">IQ", 2, wire.MAX_BLOB + 1) + b"{}",
        b"CGW1" + struct.pack(">IQ", 1, 0) + b"{",
        b"CGW1" + struct.pack(">IQ", 2, 0) + b"[]",
        b"CGW1" + struct.pack(">IQ", 2, 0) + b"\xff\xfe",
        b"CGW1" + struct.pack(">IQ", 100_000, 0) + b"[" * 100_000,
        b"CGW1" + struct.pack(">IQ", 6000, 0) + b'{"n":' + b"9" * 5994 + b"}",
    ],
)
def test_bytes_that_are_no_frame_are_refused(pair, raw: bytes) -> None:
    ours, theirs = pair
    theirs.sendall(raw)
    with pytest.raises(wire.WireError):
        wire.receive(ours, deadline=time.monotonic() + 5)


def test_a_frame_that_stops_halfway_ends_by_deadline_or_by_the_other_end(pair) -> None:
    ours, theirs = pair
    theirs.sendall(b"CGW1" + struct.pack(">IQ", 10, 0) + b"{}")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        wire.receive(ours, deadline=began + 0.2)
    assert time.monotonic() - began < 2
    theirs.close()
    with pytest.raises(wire.Closed):
        wire.receive(ours, deadline=time.monotonic() + 5)


def test_whoever_watches_may_end_the_wait(pair) -> None:
    def watch() -> None:
        raise OverflowError("seen enough")

    with pytest.raises(OverflowError):
        wire.receive(pair[0], deadline=time.monotonic() + 5, watch=watch)
