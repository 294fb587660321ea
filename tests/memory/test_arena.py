import gc
import itertools
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_torch._C import arena_empty
from mergekit_torch.checkpoint.info import SAFETENSORS_DTYPES
from mergekit_torch.memory import Arena, BudgetError

ROOT = Path(__file__).parents[2]
BACKENDS = ["native", "torch"]


@pytest.fixture(scope="session")
def stress(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("arena") / "arena_stress"
    command = [compiler, "-O2", "-std=c++17", "-pthread", f"-I{ROOT / 'csrc'}", "-o", program]
    sources = [ROOT / "tests/memory/arena_stress.cpp", ROOT / "csrc/memory/arena.cpp"]
    subprocess.run([*map(str, command + sources)], check=True)
    return program


def test_a_million_cycles_from_four_threads(stress):
    result = subprocess.run(
        [str(stress), "check", "4", "1000000", "7"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_returns_with_the_last_view(backend):
    arena = Arena("cpu", "1MiB", backend=backend)
    tensor = arena.empty(8, 16)
    view = tensor[3:].T
    assert arena.stats().requested == 512
    del tensor
    assert arena.stats().live == 1
    del view
    assert arena.stats().live == arena.stats().active == 0
    assert arena.stats().peak >= 512


@pytest.mark.parametrize("backend", BACKENDS)
def test_budget(backend):
    arena = Arena("cpu", "1MiB", backend=backend)
    held = arena.empty(3 << 18, dtype=torch.uint8)
    with pytest.raises(BudgetError, match=r"needs 524288 bytes .* 786432 in use.* 1048576 bytes"):
        arena.empty(1 << 19, dtype=torch.uint8)
    assert arena.stats().live == 1
    del held
    arena.empty(1 << 19, dtype=torch.uint8)
    assert issubclass(BudgetError, MemoryError)


def test_free_blocks_make_room_for_new_ones():
    arena = Arena("cpu", 1 << 20)
    for size in range(300_000, 700_000, 50_000):
        arena.empty(size, dtype=torch.uint8)
    stats = arena.stats()
    assert stats.reserved_peak <= 1 << 20
    assert stats.active == 0 < stats.cached


def test_reuse_is_bounded():
    arena = Arena("cpu")
    arena.empty(1 << 20, dtype=torch.uint8)
    assert arena.empty(1 << 20, dtype=torch.uint8) is not None
    assert arena.stats().hits == 1
    # Half the size, and more than two pages less, must not take the large block.
    small = arena.empty((1 << 19) + 4096, dtype=torch.uint8)
    assert arena.stats().hits == 1
    assert arena.stats().waste < 1.01
    del small
    assert arena.trim(keep=arena.stats().cached) == 0
    cached = arena.stats().cached
    assert arena.trim() == cached
    assert arena.stats().cached == 0


def test_alignment_and_huge_pages():
    arena = Arena("cpu")
    for nbytes in (1, 63, 100, 4096, 5000, 1 << 20, (2 << 20) + 5):
        tensor = arena.empty(nbytes, dtype=torch.uint8)
        assert tensor.data_ptr() % 64 == 0
        if nbytes >= 4096:
            assert tensor.data_ptr() % 4096 == 0


def test_large_blocks_share_huge_pages_with_their_neighbours():
    arena = Arena("cpu")
    step = (7 << 20) + (16 << 10)
    blocks = [arena.empty(step - 100, dtype=torch.uint8) for _ in range(200)]  # more than 1 GiB
    addresses = [block.data_ptr() for block in blocks]
    assert addresses[0] % (2 << 20) == 0
    gaps = [b - a for a, b in itertools.pairwise(addresses)]
    assert sum(gap != step for gap in gaps) <= 1  # where the reserved addresses end
    for i, block in enumerate(blocks[:8]):
        block.fill_(i)
    del blocks[1::2]
    arena.trim()
    for i, block in enumerate(blocks[:4]):
        assert (block == 2 * i).all()
    assert arena.empty(64 << 20, dtype=torch.uint8).data_ptr() % (2 << 20) == 0


def test_strategy_none_keeps_nothing():
    arena = Arena("cpu", "1MiB", strategy="none")
    arena.empty(1000)
    assert arena.stats().cached == 0
    assert arena.stats().hits == 0
    with arena.frame():
        arena.empty(10)
    assert arena.stats().cached == arena.stats().active == 0


def test_max_cached():
    arena = Arena("cpu", max_cached=0)
    arena.empty(1000)
    assert arena.stats().cached == 0
    arena = Arena("cpu", max_cached="8KiB")
    tensors = [arena.empty(4096, dtype=torch.uint8) for _ in range(4)]
    tensors.clear()
    assert arena.stats().cached == 8192


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames(backend):
    arena = Arena("cpu", "1MiB", strategy="bump", backend=backend)
    with pytest.raises(ValueError, match="frame"):
        arena.empty(4)
    with arena.frame():
        outer = arena.empty(100).fill_(1)
        with arena.frame("128KiB"):
            inner = arena.empty(100).fill_(2)
            escaped = arena.empty(7, dtype=torch.int64).fill_(3)
        del inner
        more = arena.empty(100).fill_(4)
        assert abs(more.data_ptr() - outer.data_ptr()) in (448, 512)  # one piece, bumped
        assert (outer == 1).all()
    del outer, more
    assert arena.stats().live == 1  # the piece of the tensor that got out
    assert (escaped == 3).all()
    del escaped
    assert arena.stats().active == 0
    with pytest.raises(ValueError, match="frame"):
        arena.empty(4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_takes_one_piece_the_second_time(backend):
    arena = Arena("cpu", backend=backend)
    for expected in (3, 1):
        before = arena.stats().allocations
        with arena.frame():
            tensors = [arena.empty(20_000) for _ in range(4)]
            assert arena.stats().allocations - before == expected
            del tensors


def test_frames_fall_back_to_what_the_budget_allows():
    arena = Arena("cpu", "256KiB")
    with arena.frame("1MiB"):
        tensor = arena.empty(1000)
        assert tensor.numel() == 1000
        with pytest.raises(BudgetError):
            arena.empty(1 << 20)


def test_frames_belong_to_their_thread():
    arena = Arena("cpu", strategy="bump")
    errors = []

    def other():
        try:
            arena.empty(4)
        except ValueError as error:
            errors.append(error)

    with arena.frame():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_outlive_the_arena(backend):
    arena = Arena("cpu", backend=backend)
    tensor = arena.empty(1000).fill_(5)
    with arena.frame():
        framed = arena.empty(1000).fill_(6)
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        arena.empty(1)
    with pytest.raises(ValueError, match="closed"):
        arena.block(1)
    arena.stats()
    del arena
    gc.collect()
    assert (tensor == 5).all()
    assert (framed == 6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_count_their_tensors(backend):
    arena = Arena("cpu", backend=backend)
    block = arena.block(1000)
    assert block.tensors == 0
    first = block.tensor(0, (5, 10), torch.float32)
    again = block.tensor(0, (50,), torch.float32)
    again.fill_(7)
    assert (first == 7).all()  # the same bytes
    view = first[1]
    held = block.tensors
    assert held >= 2
    del first, again
    assert 0 < block.tensors < held or backend == "native"
    block.release()
    assert (view == 7).all()
    del view
    assert arena.stats().active == 0


def test_native_blocks_check_their_bounds():
    block = Arena("cpu").block(1024)
    for offset, size in ((-1, 4), (1020, 4), (2000, 0)):
        with pytest.raises(RuntimeError, match="must lie in the block"):
            block.tensor(offset, (size,), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"budget": 0}, "at least one byte"),
        ({"budget": "12 apples"}, "a size must be"),
        ({"strategy": "best"}, "strategy must be"),
        ({"backend": "cuda"}, "backend must be"),
        ({"device": "meta", "backend": "native"}, "cpu"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        Arena(**arguments)


@pytest.mark.parametrize("size", [(-1,), (2, -3), (1 << 40, 1 << 40)])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match=r"sizes? must"):
        Arena("cpu").empty(*size)


def test_more_than_the_system_has_is_an_error():
    with pytest.raises(MemoryError):
        Arena("cpu").empty(1 << 55, dtype=torch.uint8)


@pytest.mark.parametrize(
    "dtype",
    list(SAFETENSORS_DTYPES.values()),
)
def test_dtypes_and_empty_tensors(dtype):
    arena = Arena("cpu")
    tensor = arena.empty(3, 5, dtype=dtype)
    assert tensor.dtype == dtype
    assert arena.stats().requested == 15 * dtype.itemsize
    assert arena.empty(0, 5, dtype=dtype).shape == (0, 5)
    assert arena.empty(dtype=dtype).shape == ()
    assert arena.empty_like(tensor).shape == (3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.float8_e4m3fn])
def test_sizes_as_torch_empty_takes_them(dtype):
    arena = Arena("cpu")
    for size in [(5,), (2, 3, 4), (0, 3), ([2, 3],), ((4,),), (torch.Size([2, 5]),), ([],)]:
        found, expected = arena.empty(*size, dtype=dtype), torch.empty(*size, dtype=dtype)
        assert found.shape == expected.shape
        assert found.stride() == expected.stride()
        assert found.dtype == dtype
        assert found.is_contiguous()
    for size in [("ab",), (2.5,), (2, None)]:
        with pytest.raises(TypeError, match="sizes must be integers"):
            arena.empty(*size, dtype=dtype)
    assert arena.stats().live == 1  # `found`


def test_a_size_beyond_64_bits():
    with pytest.raises(ValueError, match=r"less than 2\*\*60"):
        Arena("cpu").empty(1 << 70)


def test_a_capsule_that_nobody_takes_returns_its_block():
    arena = Arena("cpu")
    capsule = arena_empty(arena._direct, (1000,), 8)
    assert arena.stats().live == 1
    del capsule
    assert arena.stats().live == 0
    for arguments in ((), (1, [2], 8), (1, (2,)), ("1", (2,), 8)):
        with pytest.raises(TypeError):
            arena_empty(*arguments)
    with pytest.raises(RuntimeError, match="must be open"):
        arena_empty(-1, (2,), 8)


def test_another_threads_frame_is_not_ours():
    arena = Arena("cpu")
    with arena.frame():
        before = arena.stats().allocations
        shapes = []
        thread = threading.Thread(target=lambda: shapes.append(arena.empty([3, 4]).shape))
        thread.start()
        thread.join()
        assert shapes == [(3, 4)]
        assert arena.stats().allocations == before + 1
    arena.empty(3)
    assert arena.stats().allocations == before + 2


@given(
    st.lists(
        st.tuples(st.sampled_from(["new", "drop", "view", "trim"]), st.integers(0, 1 << 18)),
        max_size=60,
    ),
    st.sampled_from(BACKENDS),
)
@settings(max_examples=80, deadline=None)
def test_live_tensors_never_share_memory(steps, backend):
    budget = 1 << 20
    arena = Arena("cpu", budget, backend=backend)
    live = []
    for step, (action, number) in enumerate(steps):
        if action == "new":
            try:
                tensor = arena.empty(number, dtype=torch.uint8).fill_(step)
            except BudgetError:
                assert arena.stats().active + number > budget - 8192
                continue
            live.append((tensor, step))
        elif action == "drop" and live:
            live.pop(number % len(live))
        elif action == "view" and live:
            tensor, value = live[number % len(live)]
            live[number % len(live)] = (tensor[: number % (tensor.numel() + 1)], value)
        elif action == "trim":
            arena.trim(number)
            assert arena.stats().cached <= number
        tensor = None
        assert all(bool((held == value).all()) for held, value in live)
        stats = arena.stats()
        assert stats.live == len(live)
        assert stats.active + stats.cached <= stats.reserved_peak <= budget
        assert stats.active <= max(2 * stats.requested, 64 * len(live) + stats.requested + 64)
    live.clear()
    assert arena.stats().active == 0


def test_threads_share_an_arena():
    arena = Arena("cpu", "64MiB")
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        live = []
        for i in range(400):
            n = int(torch.randint(1, 40_000, (), generator=generator))
            live.append(
                (arena.empty(n, dtype=torch.uint8).fill_((seed + i) % 251), (seed + i) % 251)
            )
            if len(live) > 10:
                tensor, value = live.pop(n % 10)
                if not bool((tensor == value).all()):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    stats = arena.stats()
    assert stats.active == 0
    assert stats.allocations == 1600
