"""What the public function promises besides numbers: messages, dispatch, compile, import cost."""

import subprocess
import sys

import pytest
import torch

from course_lib.flash_attention import flash_attention, reference_attention
from course_lib.flash_attention.cases import CASES, make_inputs
from course_lib.flash_attention.launches import block_d, launch_config, table_architecture
from course_lib.runtime.interpreter import interpreted
from course_lib.runtime.tile import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")
BY_NAME = {case.name: case for case in CASES}


def tensors(*, dtype=torch.float32, q=(1, 4, 5, 16), k=(1, 2, 7, 16), v=None):
    shapes = (q, k, k if v is None else v)
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (4, 5, 16)}, r"q must have 4 dimensions \[B, H, T, D\], got shape \(4, 5, 16\)"),
        ({"k": (7, 16)}, r"k must have 4 dimensions"),
        ({"k": (2, 2, 7, 16)}, r"k must have the batch size of q, 1, got 2"),
        ({"k": (1, 2, 7, 8)}, r"k must have the head dimension of q, 16, got 8"),
        ({"v": (1, 2, 6, 16)}, r"same length, got 7 keys and 6 values"),
        ({"v": (1, 1, 7, 16)}, r"same number of heads, got 2 and 1"),
        ({"k": (1, 3, 7, 16)}, r"heads of q must be a multiple .* got 4 and 3"),
        ({"k": (1, 0, 7, 16)}, r"heads of q must be a multiple .* got 4 and 0"),
        ({"q": (1, 4, 5, 0), "k": (1, 2, 7, 0)}, r"head dimension of at least 1"),
    ],
)
def test_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*tensors(**shapes))


def test_dtypes_and_devices():
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"v must have the dtype of q, torch.float32, got torch.f"):
        flash_attention(q, k, v.half())
    with pytest.raises(TypeError, match=r"q must be fp16, bf16, fp32 or fp64, got torch.int64"):
        flash_attention(q.long(), k.long(), v.long())
    with pytest.raises(ValueError, match=r"k must be on the device of q, cpu, got meta"):
        flash_attention(q, k.to("meta"), v)
    with pytest.raises(TypeError, match=r"k must be a torch.Tensor, got list"):
        flash_attention(q, [1.0], v)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"q must be a dense \(strided\) tensor"):
        flash_attention(q.to_sparse(), k, v)


def test_options():
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"one of \('auto', 'triton', 'torch'\), got 'cuda'"):
        flash_attention(q, k, v, implementation="cuda")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"causal must be a bool, got 1"):
        flash_attention(q, k, v, causal=1)  # pyright: ignore[reportArgumentType]
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scale must be positive and finite"):
            flash_attention(q, k, v, scale=scale)
    with pytest.raises(TypeError, match=r"scale must be a float or None"):
        flash_attention(q, k, v, scale="0.1")  # pyright: ignore[reportArgumentType]


@needs_triton
def test_triton_runs_triton_or_raises():
    with pytest.raises(RuntimeError, match=r'"triton" needs CUDA tensors, got device cpu.*interp'):
        flash_attention(*tensors(), implementation="triton")
    with interpreted():
        with pytest.raises(TypeError, match=r"must be fp16, bf16 or fp32 .* got torch.float64"):
            flash_attention(*tensors(dtype=torch.float64), implementation="triton")
        for D in (8, 257):
            q, k, v = tensors(q=(1, 4, 5, D), k=(1, 2, 7, D))
            with pytest.raises(ValueError, match=rf"head dimension of 16 to 256 .* got {D}"):
                flash_attention(q, k, v, implementation="triton")
            assert flash_attention(q, k, v).shape == (1, 4, 5, D)
        many = tensors(q=(65536, 1, 0, 16), k=(65536, 1, 0, 16))
        with pytest.raises(ValueError, match=r"at most 65535 sequences and heads"):
            flash_attention(*many, implementation="triton")


@needs_triton
@pytest.mark.parametrize(("implementation", "launches"), [("auto", 0), ("torch", 0), ("triton", 1)])
def test_dispatch_on_cpu(implementation, launches):
    with interpreted() as run:
        flash_attention(*tensors(), implementation=implementation)
    assert len(run.launches) == launches


def test_the_launch_table_covers_every_gpu_and_head_dimension():
    wanted = {(7, 0): None, (7, 5): 75, (8, 0): 80, (8, 6): 86, (8, 7): 86, (8, 9): 86}
    wanted |= {(9, 0): 90, (10, 0): 100, (10, 3): 100, (11, 0): 86, (12, 0): 86, (12, 1): 86}
    for capability, arch in wanted.items():
        assert table_architecture(capability) == arch, capability
        for kernel in ("fwd", "bwd_preprocess", "bwd_dkdv", "bwd_dkdv_grouped", "bwd_dq"):
            for itemsize in (2, 4):
                for D in (16, 17, 64, 72, 80, 128, 129, 256)[: 6 if arch == 75 else 8]:
                    config = launch_config(kernel, arch, D, itemsize)
                    assert config.num_warps in (4, 8)
    assert [block_d(D) for D in (16, 17, 64, 72, 80, 129, 256)] == [16, 32, 64, 128, 128, 256, 256]


# ---- torch.library and torch.compile -------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(implementation, requires_grad):
    x = make_inputs(BY_NAME["one_query"], torch.float32)
    q, k, v = (t.requires_grad_(requires_grad) for t in (x.q, x.k, x.v))
    with interpreted():
        torch.library.opcheck(
            torch.ops.course_lib.flash_attention_fwd, (q, k, v, -1, 0, 0.25, implementation)
        )
        out, lse = flash_attention(q, k, v, return_lse=True, implementation=implementation)
        saved = [t.detach() for t in (q, k, v, out, lse)]
        torch.library.opcheck(
            torch.ops.course_lib.flash_attention_bwd,
            (*saved, x.dout, x.dlse, -1, -1, 0.25, implementation),
        )


@needs_triton
@pytest.mark.parametrize("implementation", ["auto", "torch", "triton"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_compile_fullgraph(implementation, return_lse):
    def step(q, k, v):
        result = flash_attention(
            2.0 * q, k, v, causal=True, return_lse=return_lse, implementation=implementation
        )
        out = result[0] + result[1][..., None] if return_lse else result
        return out.sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = make_inputs(BY_NAME["block_plus_one"], torch.float32)
    x = make_inputs(BY_NAME["causal"], torch.float32) if return_lse else x
    with interpreted():
        results = []
        for function in (step, compiled):
            q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
            out = function(q, k, v)
            mask = out.isfinite()
            results.append((out, *torch.autograd.grad(out[mask].sum(), (q, k, v))))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_compile_follows_a_change_of_length():
    torch._dynamo.reset()
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (5, 9, 17):
        q, k, v = tensors(q=(1, 4, T, 16), k=(1, 2, T + 1, 16))
        assert torch.equal(compiled(q, k, v), flash_attention(q, k, v))


def test_reference_and_op_have_one_signature():
    import inspect

    ours = inspect.signature(flash_attention).parameters
    reference = inspect.signature(reference_attention).parameters
    assert list(ours)[:-1] == list(reference)
    assert all(ours[name].kind == reference[name].kind for name in reference)


# ---- import --------------------------------------------------------------------------------


def test_import_needs_torch_only():
    """Neither Triton nor anything of a notebook is imported before it is used."""
    code = (
        "import sys, torch; before = set(sys.modules); import course_lib.flash_attention;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'triton', 'numpy', 'matplotlib', 'IPython', 'ipywidgets', 'plotly'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
