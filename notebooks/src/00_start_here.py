# %% [markdown]
# # What does a kernel do with memory?
#
# Ten minutes from here you will have predicted and measured what a processor spends its time on, run a GPU kernel, seen it quietly destroy a neighbour's memory, and stopped it. After that, five short *rungs* take you to a matrix product, and with it to everything that the kernels of this course are made of.
#
# You need Python and some PyTorch. You need no GPU, and no knowledge of Triton. Run the cells in order with Shift + Enter.

# %% tags=["setup", "folded"]
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

from course_lib import check, interpreted, progress, setup
from course_lib.notebook.figures import show
from course_lib.notebook.palette import BLUE, GRID, INK, ORANGE, SKY
from course_lib.notebook.questions import predict, reveal
from course_lib.runtime.interpreter import OutOfBounds, UnsupportedDtype
from course_lib.runtime.measure import time_interleaved
from course_lib.runtime.tile import tl, triton
from course_lib.start_here import kernels
from course_lib.start_here.labs import rung, who_owns_what
from course_lib.start_here.page import needs_triton, solved, without_end

setup("start_here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# These lines say what this machine has, what it lacks, and what that costs you. Without a GPU every kernel of the course still runs, in an interpreter: the numbers are right, and it is slow.
#
# ## Minutes 1 to 3: what takes the time?
#
# Before each main result you commit to an answer. Nobody grades it. Guessing first is what makes the result stay.

# %%
predict("slowest")

# %%
predict("matmul")

# %% [markdown]
# The next cell measures all of them here and now: one thread, in turns, the median of seven. Where the machine is too busy to be believed, it says so and shows a recorded run.

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
    threads=1,
)
ms = {name: 1000 * timing.median for name, timing in timings.items()}
RECORDED = {"copy": 6.4, "+ 1": 6.3, "exp": 17.0, "matmul": 22.1}  # AMD EPYC, one thread


def can_be_trusted(ms):
    return 0.75 < ms["+ 1"] / ms["copy"] < 1.25 and ms["matmul"] < 10 * ms["+ 1"]


where = "measured here" if can_be_trusted(ms) else "recorded: this machine is too busy now"
ms = ms if can_be_trusted(ms) else RECORDED
del x, out, timings

# %% tags=["outcome"]
MILLION = {"copy": 0, "+ 1": 20, "exp": 240, "matmul": 2147}  # operations; exp: about a dozen each


def bars():
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.3), sharey=True)
    for axis, values, unit in ((left, MILLION, "million operations"), (right, ms, "milliseconds")):
        axis.barh(list(values), list(values.values()), color=ORANGE if axis is left else BLUE)
        for row, value in enumerate(values.values()):
            axis.text(value, row, f" {value:.0f}", va="center")
        axis.set(xlabel=unit, xlim=(0, 1.2 * max(values.values())))
    right.set_title(where, fontsize=9)
    left.invert_yaxis()
    return fig


assert can_be_trusted(ms)
alt = "From adding 1 to the product, operations grow 107 times and time less than 10 times."
reveal("slowest", "as long as the copy, within a quarter", bars(), alt)

# %% tags=["outcome"]
# NBVAL_CHECK_OUTPUT
operations = 2 * 1024**3 / 20e6
assert ms["matmul"] < 10 * ms["+ 1"]
reveal("matmul", {"Operations": f"{operations:.0f} times as many", "Time": "less than 10 times"})

# %% [markdown]
# **Arithmetic is cheap, bytes are not.** This holds on your laptop, and on a GPU more so: an H200 can do some 200 operations in 16 bits in the time in which one byte arrives. So a fast kernel is one that fetches a number once and uses it often. Everything in this course follows from that sentence.
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
# A card never gives the answer away. After a second failure it asks you a question about the guilty line, and after a third it names the mistake. `hint("warm_up")` gives one hint at a time.

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
# | `BLOCK: tl.constexpr` | a number that is known when the kernel is compiled. Sizes of vectors are such, and powers of two |
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

with needs_triton():
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
# The cure is a **mask**: a vector of booleans that switches lanes off. A masked lane touches no memory. It goes into every access: `tl.load(…, mask=mask)`, `tl.store(…, mask=mask)`. Add it below, in all three places. **This check fails too, until you do.**


# %%
@triton.jit
def masked_add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)  # yours: a mask, true where offs < n
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)


def masked_add(x, y, out):
    n = x.numel()
    grid = (triton.cdiv(n, 64),)  # cdiv divides and rounds up
    masked_add_kernel[grid](x, y, out, n, BLOCK=64)


check(masked_add)

# %% [markdown]
# ## Minutes 9 to 10: the map
#
# | chapter | question | builds on |
# |---|---|---|
# | 00 | What does a kernel do with memory? | |
# | 01 | Who chooses the threshold? | |
# | 02 | How many nats can a batch see? | |
# | 03 | Why 483, and why 427? | |
# | 04 | Where exactly is the border between two faces? | |
# | 05 | Who drew the checkerboard? | |
# | 06 | Pay with time, not memory | |
# | 07 | Half of your batch is nothing | 08, as a black box |
# | 08 | Why is the exact answer cheaper? | 00 |
# | 09 | Where does the memory go? | 06 |
# | 10 | From a pixel to a name | 03, 04 |
# | 11 | What does a vision-language model do with an image? | 05, 06, 07, 08 |

# %% [markdown]
# * **Two hours:** this notebook, then 08 up to its first exercises.
# * **A weekend:** 00, 08, 07 and 06: how one GPU trains a transformer on long sequences.
# * **Vision:** 01, 03, 04, 05, 10. **Systems:** 00, 08, 07, 06, 09. **All of it:** in order; later chapters ask you about earlier ones.
#
# **Where your work lives.** `./course lab` opens a folder called `work/`. It holds your copies of the notebooks; an update of the course never overwrites them. Your progress is kept outside of them, so you can throw a notebook away and begin again.
#
# **How to restart.** Kernel → Restart Kernel and Run All Cells. Every notebook runs from top to bottom in under a minute.
#
# **When you are stuck.** Read the card's case and work it out on paper. Then `hint("name")`, up to three times. Then `solution("name")`: it opens after an attempt, and what builds on the exercise goes on. At twice the minutes on the card, move on.

# %% [markdown]
# That was the first ten minutes. What follows takes about forty more, and each part can be left and come back to.
#
# ## Why a tile
#
# A GPU has three kinds of memory that a kernel's author thinks about:
#
# | memory | size on an H200 | what lies there in Triton |
# |---|---|---|
# | HBM, shared by the whole GPU | 141 GB at 4.8 TB/s | tensors; every `tl.load` and `tl.store` goes there, through a cache of 50 MB |
# | shared memory, one for each of 132 multiprocessors | up to 227 KB, several times faster | Triton's workspace: operands of `tl.dot`, exchange between lanes |
# | registers, likewise | 256 KB, as fast as the arithmetic | every value in a kernel: `offs`, `x`, an accumulator |
#
# So a program should fetch a **tile**, a block that fits into the fast memory, do with it all there is to do, and write one result. The size of the tile decides how often the same number must be fetched. The lab below shows which program owns which tile, and how many lanes own nothing.

# %%
who_owns_what()

# %% [markdown]
# ## Rung 1: add
#
# You have written it: one axis of tiles, `program id × BLOCK + lanes`, one mask. It is the first exercise of a kernel in [the exercise notebook](../exercises/00_start_here.ipynb), where you may paste it in. The five rungs are graded there. Each is one edit away from the one before, whose solution stands folded at the head of the next.

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
def lanes_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes, mask=lanes < n, other=-1.0))
    tl.store(out_ptr + BLOCK + lanes, tl.load(x_ptr + lanes, mask=lanes < n))


# %%
# NBVAL_CHECK_OUTPUT
three, lanes = torch.tensor([5.0, 6.0, 7.0], device=DEVICE), torch.zeros(2, 4, device=DEVICE)
with needs_triton(), interpreted():
    lanes_kernel[(1,)](three, lanes, 3, BLOCK=4)
    print("other=-1.0:", lanes[0].tolist())
    print("no other:  ", lanes[1].tolist())

# %% [markdown]
# Now write `row_sum`: the address of a row is `x_ptr + row * stride_xm`, the lanes are masked by `offs_n < N`, and the result is one number, stored at `out_ptr + row`.
#
# ## Rung 3: the softmax of each row

# %%
solved("Rung 2: the sum of each row", kernels.row_sum_kernel)

# %% [markdown]
# $$\text{softmax}(x)_i = \frac{e^{x_i - \max x}}{\sum_j e^{x_j - \max x}}$$
#
# In PyTorch that is a maximum, a subtraction, an exponential, a sum and a division: five passes over memory. Here the row stays in registers between them, so the kernel reads each element once and writes it once. The maximum is subtracted because `exp` overflows in fp32 above 88.7.
#
# One row has two reductions now, and a masked lane must disturb neither. What leaves a maximum alone is not what leaves a sum alone.

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
# ## Rung 4: a ragged copy in two dimensions

# %%
solved("Rung 3: the softmax of each row", kernels.row_softmax_kernel)

# %% [markdown]
# A matrix is cut along both axes, so the grid has two: `tl.program_id(0)` counts tiles downwards, `tl.program_id(1)` to the right. Two vectors of offsets become a matrix of offsets by broadcasting, as in PyTorch: `offs_m[:, None]` is a column, `offs_n[None, :]` a row.
#
# `x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn`
#
# With both strides in the address, a transposed matrix costs nothing: `x.t()` is the same memory with its strides exchanged.

# %%
rung(4)

# %% [markdown]
# *Ragged* means that the edges do not divide. A lane is inside only if its row **and** its column are: `(offs_m < M)[:, None] & (offs_n < N)[None, :]`. Mask the rows alone, and a lane past the last column reads the beginning of the next row.

# %%
# NBVAL_CHECK_OUTPUT
offs_m, offs_n = 16 + torch.arange(8), 32 + torch.arange(16)  # program (2, 2) of the picture
mask = (offs_m < 19)[:, None] & (offs_n < 35)[None, :]
print("lanes of program (2, 2):", mask.numel(), "of which inside:", int(mask.sum()))
print("rows alone would let through:", int((offs_m < 19).sum()) * 16)

# %% [markdown]
# ## Rung 5: a matrix product

# %%
solved("Rung 4: a ragged copy", kernels.copy_kernel)

# %% [markdown]
# Each program owns one tile of the output. It needs a band of rows of `a` and a band of columns of `b`, far too much to hold, so it walks along K: load a tile of each, multiply, add to an **accumulator** that stays in registers, go on. `tl.dot(a, b, acc)` returns `acc + a @ b`; on a GPU it runs on the tensor cores, which want tiles of at least 16 in every direction and, in 16 bits, add up in fp32.


# %% tags=["folded"]
def draw_product():
    fig, axis = plt.subplots(figsize=(7.2, 3.6))
    for k in range(4):
        for x, y in ((k, 2), (7, 8 - k)):
            fill = ORANGE if k == 1 else GRID
            axis.add_patch(Rectangle((x, y), 1, 1, facecolor=fill, edgecolor="white"))
            ink = "white" if k == 1 else INK
            axis.text(x + 0.5, y + 0.5, f"{k}", ha="center", va="center", color=ink)
    for name, x, y in (("b  [K, N]", 5, 5), ("a  [M, K]", 0, 0), ("out  [M, N]", 5, 0)):
        axis.add_patch(Rectangle((x, y), 4, 4, facecolor="none", edgecolor=INK, lw=1.4))
        axis.text(x, y + 4.15, name)
    axis.add_patch(Rectangle((7, 2), 1, 1, facecolor=SKY, edgecolor=BLUE))
    axis.text(7.5, 2.5, "acc", ha="center", va="center")
    steps = "Program (1, 2), step 1 of 0 to 3:\n\n1. load tile 1 of a's band\n2. load tile 1 of b's band"
    axis.text(
        10.4, 6.2, f"{steps}\n3. acc = tl.dot(a, b, acc)\n\nAfter step 3: store acc.", va="center"
    )
    axis.set(xlim=(-0.2, 18), ylim=(-0.3, 9.8), aspect="equal")
    axis.axis("off")
    return fig


show(
    draw_product(),
    alt="Program (1, 2) owns one tile of the output. It walks along the second band of rows of a "
    "and the third band of columns of b, one pair of tiles a step, and adds each product up.",
)

# %% [markdown]
# How large should the tile be? A tile of the output that is twice as wide uses each number of `a` for twice as many results before it is fetched again. The interpreter counts the bytes:

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
# Twice the tile, half the bytes. That is the whole answer to *why a tile*, until the tile no longer fits into the fast memory.
#
# ## What the interpreter is, and is not
#
# * **It is** Triton's own, with guards: your kernel runs in Python, one program after another. Addresses, masks and numbers in fp32 and fp16 are right. Accesses outside a tensor, programs that depend on each other's order, and masked lanes without a value are found, none of which a GPU tells you.
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
# FlashAttention is the next rung. It is two matrix products with a softmax between them, in one loop: the tile of queries stays, tiles of keys and values pass by, and the reductions of rung 3 are repaired as each tile arrives. When you open its kernel you will recognise:
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
# Five rungs and three small questions. The check is the same as above, and every one is worth its minutes before chapter 08.

# %% [markdown]
# ## In five sentences
#
# Time goes with bytes more than with operations. A kernel is one short function that runs as many programs, and each finds its part by its program id. Pointers have a start and no end, so the mask is yours to write, in every access. Masked lanes need the neutral element of what comes next: 0 for a sum, −∞ for a maximum. A larger tile fetches each number less often, and that is why tiles exist.
#
# *To read on:* the Triton tutorials on vector addition, fused softmax and matrix multiplication tell the same story with timings on a GPU.
