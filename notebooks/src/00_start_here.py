# %% [markdown]
# # What does a kernel do with memory?
#
# Ten minutes from here you will have predicted and measured what a processor spends its time on, run a GPU kernel, seen it quietly destroy a neighbour's memory, and stopped it. After that, five *rungs* take you to a matrix product, and with it to everything that the kernels of this course are made of.
#
# You need Python and some PyTorch. You need no GPU, and no knowledge of Triton. Run the cells in order with Shift + Enter. Reading takes about 40 minutes, these first ten among them; the exercises take another hour.

# %% tags=["setup"]
import torch

from course_lib import check, interpreted, progress, setup
from course_lib.notebook.figures import show
from course_lib.notebook.questions import predict, reveal
from course_lib.runtime.interpreter import OutOfBounds, UnsupportedDtype
from course_lib.runtime.measure import time_interleaved
from course_lib.runtime.tile import tl, triton
from course_lib.start_here import kernels
from course_lib.start_here.labs import rung, who_owns_what
from course_lib.start_here.page import (
    believed,
    course_map,
    needs_triton,
    operations_and_times,
    solved,
    walk_along_k,
    without_end,
)

setup("start_here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# These lines say what this machine has, what it lacks, and what that costs you. Without a GPU every kernel of the course still runs, in an interpreter: the numbers are right, and it is slow. (A cell that begins with `# NBVAL_CHECK_OUTPUT` states a claim; the course's own tests compare its output.)
#
# ## Minutes 1 to 3: what takes the time?
#
# Before each main result you commit to an answer. Nobody grades it. Guessing first is what makes the result stay.

# %%
predict("slowest")

# %%
predict("matmul")

# %% [markdown]
# The next cell measures all of them here and now: one thread, in turns, the median of eleven. Whether the times can be believed is decided by how much repeats of the same call differ, and not by what they say. On a machine that is too busy you see a recorded run, and are told so.

# %%
x, out = torch.rand(20_000_000), torch.empty(20_000_000)
a, b, product = torch.rand(1024, 1024), torch.rand(1024, 1024), torch.empty(1024, 1024)

timings = time_interleaved(
    {
        "copy": lambda: out.copy_(x),
        "+ 1": lambda: torch.add(x, 1, out=out),
        "exp": lambda: torch.exp(x, out=out),
        "matmul": lambda: torch.mm(a, b, out=product),
    },
    repeats=11,
    threads=1,
)
times = believed(timings)
del x, out

# %% tags=["outcome"]
alt = f"From + 1 to the product: 107 times the operations, {times.of('matmul', '+ 1'):.1f} × the time."
reveal("slowest", times.against_the_copy(), operations_and_times(times), alt)

# %% tags=["outcome"]
assert round(2 * 1024**3 / 20e6) == 107
reveal("matmul", times.against_the_addition())

# %% [markdown]
# **Arithmetic is cheap, bytes are not.** Cheap is not free: `exp` needs about a dozen operations a number, and on one core they take longer than the bytes do. It costs two to three copies; `+ 1` costs one. On a GPU the gap is wider: an H200 can do some 200 operations in 16 bits in the time in which one byte arrives. So a fast kernel is one that fetches a number once and uses it often. Everything in this course follows from that sentence.
#
# ## Minutes 3 to 5: a check that fails
#
# Exercises are checked by `check`. The function below is wrong on purpose, so **the card below it says "Not yet" on purpose**. Read the card: it shows a case, what was expected, and what your function gave. Then change one character, run the cell again, and see it pass.


# %%
def warm_up(values):
    """Return every value plus 1."""
    return values - 1


check(warm_up)

# %% [markdown]
# A card shows the case. For common mistakes, the second failure adds a question and the third names the mistake. `hint("warm_up")` gives one hint at a time.

# %%
progress()

# %% [markdown]
# ## Minutes 5 to 9: one kernel
#
# A GPU runs one short function, the **kernel**, many times at once. Each run is a **program**, and it finds out by its **program id** which part of the work is its own. Below, program 0 adds elements 0 to 63, and program 1 adds elements 64 to 127.


# %%
@triton.jit
def add_without_mask(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)  # which program am I? 0, 1, 2, …
    offs = pid * BLOCK + tl.arange(0, BLOCK)  # my BLOCK offsets: a vector
    x = tl.load(x_ptr + offs)  # BLOCK addresses, read at once
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)  # and BLOCK numbers written back


# %% [markdown]
# | in the code | what it is |
# |---|---|
# | `@triton.jit` | compiles the function for the GPU, when it is first launched |
# | `x_ptr` | a **pointer**: the address of a tensor's first element. A launch turns each tensor into one. It has no shape and no end |
# | `offs` | **offsets**, counted in elements. One program works on a whole vector of them; each place in the vector is a *lane* |
# | `BLOCK: tl.constexpr` | a number that is known when the kernel is compiled. The size of a vector must be known then, and it must be a power of two |
# | `kernel[(2,)](…)` | the **launch**: two programs. `(2,)` is the **grid** |
#
# Now 100 elements, with `BLOCK = 64` and two programs. As on a GPU, tensors lie side by side in one memory: right behind `out` begins a tensor called `neighbour`, and it is full of sevens.

# %%
memory = torch.full((512,), 7.0, device=DEVICE)
out, neighbour = memory[0:100], memory[100:200]
x, y = memory[200:300], memory[300:400]
x.copy_(torch.arange(100.0))
y.copy_(1000 + torch.arange(100.0))
out.zero_()

with needs_triton():  # where there is no Triton, it says so and goes on
    # `without_end` hands over bare pointers, which is all that a GPU gets.
    add_without_mask[(2,)](without_end(x), without_end(y), without_end(out), BLOCK=64)
    print("out is right:", torch.equal(out, x + y))

# %%
predict("overwritten")

# %% tags=["outcome"]
# NBVAL_CHECK_OUTPUT
with needs_triton():
    overwritten = int((neighbour != 7).sum())
    assert overwritten == 28
    values = ", ".join(f"{value:.0f}" for value in neighbour[:3].tolist())
    reveal(
        "overwritten",
        {
            "`out` is right": torch.equal(out, x + y),
            "`neighbour`, no longer 7": f"{overwritten} of {neighbour.numel()} elements",
            "Its first three": values,
        },
    )

# %% [markdown]
# The result is right, no error was raised, and a tensor that the kernel never heard of is damaged. On a GPU you would meet this an hour later, as a loss that turns NaN somewhere else.
#
# In this course kernels run under a **guarded interpreter** when there is no GPU, and wherever you ask for it with `with interpreted():`. It knows where each tensor ends. Here is the same launch with the tensors themselves:

# %%
with needs_triton(), interpreted():
    try:
        add_without_mask[(2,)](x, y, out, BLOCK=64)
    except OutOfBounds as error:
        print(error)

# %% [markdown]
# It names the program, the tensor and the line. Program `(1, 0, 0)` is program 1 of a grid that may have three axes.
#
# **To look inside, print.** `print(offs)` or `print(x)` in a kernel works under the interpreter, once for each program. Wrap the launch in `with interpreted():` where you have a GPU.
#
# The cure is a **mask**: a vector of booleans that switches lanes off. A masked lane touches no memory. It goes into every access: `tl.load(…, mask=mask)`, `tl.store(…, mask=mask)`. It must be true for the lanes that have an element, those with `offs < n`. Add it below, in all three places. **This check fails too, until you do.**


# %%
@triton.jit
def masked_add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)  # yours: a mask, here and below
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)


def masked_add(x, y, out):
    n = x.numel()
    grid = (triton.cdiv(n, 64),)  # cdiv divides and rounds up
    masked_add_kernel[grid](x, y, out, n, BLOCK=64)


check(masked_add)

# %% [markdown]
# ## Minutes 9 to 10: the map

# %%
course_map()

# %% [markdown]
# * **Two hours:** this notebook with exercises 1 to 6, then read 08.
# * **A weekend:** 00 and 08 with every exercise.
# * **Later**, with the planned chapters. Vision: 01, 03, 04, 05, 10. Systems: 00, 08, 07, 06, 09. All of it: in order; later chapters ask you about earlier ones.
#
# **Where your work lives.** `./course lab` opens a folder called `work/`. It holds your copies of the notebooks; an update of the course never overwrites them. Your progress is kept outside of them, so you can throw a notebook away and begin again.
#
# **How to restart.** Kernel → Restart Kernel and Run All Cells. Every notebook runs from top to bottom in under a minute.
#
# **When you are stuck.** Read the card's case and work it out on paper. Then `hint("name")`, up to four times; the fourth plugs in the solution, so that what builds on the exercise goes on. It opens after three failed checks, or when the minutes on the card are over. At twice those minutes, move on.

# %% [markdown]
# That was the first ten minutes. What follows takes half an hour to read, and the eight exercises about an hour (you have met two of them). Each part can be left and come back to.
#
# ## Why a tile
#
# A GPU has three kinds of memory that a kernel's author thinks about:
#
# | memory | size on an H200 | what lies there in Triton |
# |---|---|---|
# | main memory (called HBM), shared by the whole GPU | 141 GB at 4.8 TB/s | tensors; every `tl.load` and `tl.store` goes there, through a cache of 50 MB |
# | shared memory, one for each of 132 multiprocessors | up to 227 KB, several times faster | Triton's own workspace, where lanes exchange numbers |
# | registers, likewise | 256 KB, as fast as the arithmetic | every value in a kernel: `offs`, `x`, a running sum |
#
# A *multiprocessor* is one of the 132 processors on the chip. It takes programs from the grid and runs a few of them at a time.
#
# So a program should fetch a **tile**, a block that fits into the fast memory, do with it all there is to do, and write one result. The size of the tile decides how often the same number must be fetched. The lab below shows which program owns which tile, and how many lanes own nothing.

# %%
who_owns_what()

# %% [markdown]
# ## Rung 1: add
#
# You have written it: one axis of tiles, `program id × BLOCK + lanes`, one mask. It is [exercise 3](../exercises/00_start_here.ipynb#Rung-1%3A-the-mask) of the exercise notebook, where the rungs are written. A check counts in either notebook: if you passed it here, skip it there. The solution of each rung stands folded at the head of the next.

# %%
rung(1)

# %% [markdown]
# ## Rung 2: the sum of each row

# %%
solved("Rung 1: add", kernels.add_kernel)

# %% [markdown]
# Two things change. A program owns a **row**, so its lanes are the columns of that row. And the lanes are added up: `tl.sum(x, axis=0)` makes one number of a vector. The lanes must be a power of two, so a row of 7 takes 8.

# %%
rung(2)

# %% [markdown]
# Where does a row begin? A tensor's **stride** is the distance, in elements, between neighbours along an axis. It is not always the width:

# %%
# NBVAL_CHECK_OUTPUT
wide = torch.zeros(5, 9)
part = wide[:, :7]
print("shape", tuple(part.shape), "strides", part.stride())
print("element (2, 3) lies", 2 * part.stride(0) + 3 * part.stride(1), "elements behind the first")
assert part[2, 3].data_ptr() - part.data_ptr() == 4 * (2 * 9 + 3)

# %% [markdown]
# And what does a masked lane hold? On a GPU: whatever was there. `other=` says what it should be. The guarded interpreter makes it NaN where you do not say, so that you notice. For a sum the lane must hold 0.


# %%
@triton.jit
def lanes_kernel(x_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    print("other=-1.0:", tl.load(x_ptr + lanes, mask=lanes < n, other=-1.0))
    print("no other:  ", tl.load(x_ptr + lanes, mask=lanes < n))


# %%
# NBVAL_CHECK_OUTPUT
with needs_triton(), interpreted():
    lanes_kernel[(1,)](torch.tensor([5.0, 6.0, 7.0], device=DEVICE), 3, BLOCK=4)

# %% [markdown]
# In this rung a NaN in your result can mean two things: nobody wrote that element (the checks fill `out` with NaN beforehand), or a masked lane without a value was added up. Print `x` in the kernel, and you know which.
#
# **Now write `row_sum`** ([exercise 4](../exercises/00_start_here.ipynb#Rung-2%3A-the-sum-of-each-row)). The address of a row is `x_ptr + row * stride_xm`, the lanes are masked by `offs_n < N`, and the result is one number, stored at `out_ptr + row`. Then decide [exercise 5](../exercises/00_start_here.ipynb#What-a-masked-lane-should-hold), which has another operation.

# %% [markdown]
# ## Rung 3: the softmax of each row

# %%
solved("Rung 2: the sum of each row", kernels.row_sum_kernel)

# %% [markdown]
# $$\text{softmax}(x)_i = \frac{e^{x_i - \max x}}{\sum_j e^{x_j - \max x}}$$
#
# Written out in PyTorch, that is a maximum, a subtraction, an exponential, a sum and a division: five passes over memory. Here the row stays in registers between them, so the kernel reads each element once and writes it once. The maximum is subtracted because `exp` overflows in fp32 above 88.7.
#
# `tl.max(x, axis=0)` makes one number of a vector, as `tl.sum` does. `tl.exp(x)` works on every lane. So one row has two reductions now, a maximum and a sum, and it is loaded once. One fill must serve both: it must leave the maximum alone, and what does `tl.exp` make of it before the sum?

# %%
rung(3)

# %%
# NBVAL_CHECK_OUTPUT
row = torch.tensor([-3.0, -5.0, -4.0])
truth = torch.softmax(row, 0)
for fill in (0.0, float("-inf")):
    four = torch.cat([row, torch.tensor([fill])])
    weights = torch.exp(four - four.max())
    error = (weights[:3] / weights.sum() - truth).abs().max()
    print(f"fourth lane {fill:4}: maximum {four.max():4}, largest error {error:.3f}")

# %% [markdown]
# **Now write `row_softmax`** ([exercise 6](../exercises/00_start_here.ipynb#Rung-3%3A-the-softmax-of-each-row)). The result is a whole row this time, so the store has lanes and a mask too, and a row stride of its own.

# %% [markdown]
# ## Rung 4: a ragged copy in two dimensions

# %%
solved("Rung 3: the softmax of each row", kernels.row_softmax_kernel)

# %% [markdown]
# A matrix is cut along both axes, so the grid has two: `tl.program_id(0)` counts tiles downwards, `tl.program_id(1)` to the right. Launching is yours too, from here on: the grid is `triton.cdiv` along each axis. Two vectors of offsets become a matrix of offsets by broadcasting, as in PyTorch: `offs_m[:, None]` is a column, `offs_n[None, :]` a row.
#
# `x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn`
#
# With both strides in the address, a transposed matrix costs nothing: `x.t()` is the same memory with its strides exchanged.

# %%
rung(4)

# %% [markdown]
# *Ragged* means that the edges do not divide. A lane is inside only if its row **and** its column are: `(offs_m < M)[:, None] & (offs_n < N)[None, :]`. (It is `&`, which looks at each lane, and not `and`, which does not.) Mask the rows alone, and a lane past the last column reads the beginning of the next row.

# %%
# NBVAL_CHECK_OUTPUT
offs_m, offs_n = 16 + torch.arange(8), 32 + torch.arange(16)  # program (2, 2) of the picture
mask = (offs_m < 19)[:, None] & (offs_n < 35)[None, :]
print("lanes of program (2, 2):", mask.numel(), "of which inside:", int(mask.sum()))
print("rows alone would let through:", int((offs_m < 19).sum()) * 16)

# %% [markdown]
# **Now write `ragged_copy`** ([exercise 7](../exercises/00_start_here.ipynb#Rung-4%3A-a-ragged-copy-in-two-dimensions)), the kernel and its grid.

# %% [markdown]
# ## Rung 5: a matrix product

# %%
solved("Rung 4: a ragged copy", kernels.copy_kernel)

# %% [markdown]
# Each program owns one tile of the output. It needs a band of rows of `a` and a band of columns of `b`, far too much to hold, so it walks along K: load a tile of each, multiply, add to an **accumulator** that stays in registers, go on. `tl.dot(a, b, acc)` returns `acc + a @ b`. On a GPU it runs on the *tensor cores*, units that do nothing but multiply small matrices: they want tiles of at least 16 in every direction and, in 16 bits, add up in fp32.
#
# An ordinary `for start in range(0, K, BLOCK):` works; K need not be a `constexpr`. In a's tile, `offs_k` runs along the row: `offs_k[None, :]`. In b's tile, `offs_k` is the column vector: `offs_k[:, None]`. The last step may be ragged, so both masks look at K, and a masked lane must leave a sum of products alone.

# %%
show(
    walk_along_k(),
    alt="Program (1, 2) owns one tile of the output. It walks along the second band of rows of a "
    "and the third band of columns of b, one pair of tiles a step, and adds each product up.",
)

# %% [markdown]
# **Now write `matmul`** ([exercise 8](../exercises/00_start_here.ipynb#Rung-5%3A-a-matrix-product)), or read on first: the rest of this section says what the size of the tile is worth.

# %% [markdown]
# How large should the tile be? A tile of the output that is twice as wide uses each number of `a` for twice as many results before it is fetched again. With `trace=True` the interpreter records every access, and its count of bytes can be read afterwards:

# %%
a, b = torch.rand(64, 64, device=DEVICE).half(), torch.rand(64, 64, device=DEVICE).half()
product = torch.empty(64, 64, device=DEVICE)
read = {}
with needs_triton():
    for block in (16, 32, 64):
        with interpreted(trace=True) as run:
            kernels.matmul_kernel[(64 // block, 64 // block)](
                a, b, product, 64, 64, 64, *a.stride(), *b.stride(), *product.stride(),
                BLOCK_M=block, BLOCK_N=block, BLOCK_K=16,
            )  # fmt: skip
        read[block] = run.bytes_loaded
        torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5)

# %%
# NBVAL_CHECK_OUTPUT
for block, count in read.items():
    intensity = 2 * 64**3 / count
    print(f"tiles of {block} × {block}: {count:6,} bytes, {intensity:2.0f} operations a byte")
    assert count == 2 * 64 * 64 * 2 * (64 // block)

# %% [markdown]
# Twice the tile, half the bytes. That is *why a tile*, and two things end it. The first is that tiles are also how work is shared out: the last line is one program, and on an H200 it leaves 131 of 132 multiprocessors idle. The second is room:

# %%
# NBVAL_CHECK_OUTPUT
# A tile of B × B gives B / 2 operations a byte in 16 bits: 32 of them for B = 64, as above.
B = 2 * 200
print(f"200 operations a byte need tiles of {B} × {B}: {4 * B * B // 1000} KB of fp32 sums")
assert read[64] * 64 / 2 == 2 * 64**3
assert 4 * B * B > 256 * 1024  # the registers of one multiprocessor

# %% [markdown]
# So a tile alone cannot reach the 200 operations a byte that an H200 wants. Real kernels take tiles of 128 or 256 and leave the rest to the cache: programs that run at the same time share bands of `a` and `b`, and a band that a neighbour has just fetched need not come from main memory.
#
# ## What the interpreter is, and is not
#
# * **It is** Triton's own, with guards: your kernel runs in Python, one program after another. Addresses, masks and numbers in fp32 and fp16 are right. Accesses outside a tensor, programs that depend on each other's order, and masked lanes without a value are found, none of which a GPU tells you. `print` works in a kernel.
# * **It is not** a clock. A kernel that is slow here may be fast on a GPU, and the other way round. Count bytes instead, as above.
# * **It does not do arithmetic in bf16**: the interpreter would return wrong numbers, so the guard refuses. Use fp32 or fp16 here.

# %%
# NBVAL_CHECK_OUTPUT
half = torch.ones(64, dtype=torch.bfloat16, device=DEVICE)
with needs_triton(), interpreted():
    try:
        kernels.add_kernel[(1,)](half, half, torch.empty_like(half), 64, BLOCK=64)
    except UnsupportedDtype as error:
        print(type(error).__name__)

# %% [markdown]
# ## From here to chapter 08

# %%
solved("Rung 5: a matrix product", kernels.matmul_kernel)

# %% [markdown]
# FlashAttention is the next step. It is two matrix products with a softmax between them, in one loop: the tile of queries stays, tiles of keys and values pass by, and the maximum and the sum of rung 3 are repaired as each tile arrives. When you open its kernel you will recognise:
#
# | in the kernel | from rung |
# |---|---|
# | `tl.program_id`, `offs_m`, a mask for the last tile | 1 |
# | `stride_qt`, `tl.sum(…, axis=1)` | 2 |
# | `tl.max(…, axis=1)`, `float("-inf")` where a key is hidden | 3 |
# | `q_ptr + offs_m[:, None] * stride_qt + offs_d[None, :]` | 4 |
# | `acc = tl.dot(p, v, acc)` in a loop, fp32 | 5 |
#
# What is new there is one idea, and the chapter is about it.

# %% [markdown] exercises="start_here"
# ## Exercises
#
# Five rungs and three small questions. The check is the same as above. The minutes are those of a reader who had only these notebooks.

# %% [markdown]
# ## In five sentences
#
# Time goes with bytes more than with operations. A kernel is one short function that runs as many programs, and each finds its part by its program id. Pointers have a start and no end, so the mask is yours to write, in every access. Masked lanes need the neutral element of what comes next: 0 for a sum, −∞ for a maximum. A larger tile fetches each number less often, and that is why tiles exist, as far as the fast memory goes.
#
# *To read on:* the Triton tutorials on vector addition, fused softmax and matrix multiplication tell the same story with timings on a GPU.
