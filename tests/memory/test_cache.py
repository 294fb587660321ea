import gc
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mergekit_torch.checkpoint import CheckpointError, open_checkpoint, save_checkpoint
from mergekit_torch.memory import BudgetError, TensorCache, places
from mergekit_torch.memory.cache import tensor_parts
from mergekit_torch.tensor import QuantizedTensor

PAGE = 4096


def source_tensors():
    torch.manual_seed(11)
    tensors = {f"t{i}": torch.randn(4 + 3 * i, 128) for i in range(8)}
    for i, scheme in enumerate(("symmetric", "asymmetric", "affine")):
        tensors[f"q{i}"] = QuantizedTensor.from_float(torch.randn(2, 30, 100), 4, 32, scheme)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 7)
    return tensors


SOURCE = source_tensors()
NAMES = sorted(SOURCE)
BUDGET = 12 * PAGE


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "model.safetensors"
    save_checkpoint(SOURCE, path)
    return path


@pytest.fixture(params=["mmap", "pread"])
def checkpoint(path, request):
    with open_checkpoint(path, read=request.param) as checkpoint:
        yield checkpoint


def same(a, b):
    assert type(a) is type(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    parts = tensor_parts(a), tensor_parts(b)
    assert parts[0].keys() == parts[1].keys()
    for name, part in parts[0].items():
        assert torch.equal(part, parts[1][name])


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("budget", ["1GiB", BUDGET])
def test_tensors_are_the_checkpoints(checkpoint, backend, budget):
    with TensorCache(checkpoint, "cpu", budget, backend=backend) as tensors:
        for _ in range(2):
            for name in NAMES:
                same(tensors[name], SOURCE[name])
        assert tensors.stats().peak <= tensors.budget


def test_host_budget_is_for_cuda(checkpoint):
    with pytest.raises(ValueError, match="host_budget is for CUDA"):
        TensorCache(checkpoint, "cpu", "1MiB", host_budget="1MiB")


def test_counters(checkpoint):
    with TensorCache(checkpoint, "cpu", 3 * PAGE) as tensors:
        a = tensors["t0"]  # 2 KiB
        tensors["t1"]  # 3.5 KiB
        tensors["t0"]
        stats = tensors.stats()
        assert (stats.misses, stats.hits, stats.evictions, stats.entries) == (2, 1, 0, 2)
        assert stats.bytes_read == stats.resident == tensors.nbytes("t0") + tensors.nbytes("t1")
        tensors["t4"]  # 8 KiB: t1 goes, t0 is held
        stats = tensors.stats()
        assert (stats.misses, stats.evictions) == (3, 1)
        assert stats.bytes_evicted == tensors.nbytes("t1")
        assert "t0" in tensors
        assert "t1" not in tensors
        same(a, SOURCE["t0"])
        assert stats.peak <= 3 * PAGE


def test_least_recently_used_goes_first(checkpoint):
    with TensorCache(checkpoint, "cpu", 3 * 2048) as tensors:
        # t0 takes 2 KiB; the scalar and the empty one 64 bytes.
        for name in ("t0", "scalar", "empty", "t0", "t1"):
            tensors[name]
        assert {name for name in NAMES if name in tensors} == {"t0", "scalar", "empty", "t1"}
        tensors["t1"]
        tensors["q0"]  # 3 KiB of codes and scales: the oldest go until it fits
        assert "t1" in tensors or "t0" not in tensors


def test_held_views_keep_their_memory(checkpoint):
    with TensorCache(checkpoint, "cpu", 6 * PAGE) as tensors:
        view = tensors["t4"][3:, ::2]  # 8 KiB
        row = tensors["q2"][1]
        for name in ("t5", "t0", "t1", "t2", "t5"):
            tensors[name]
        same(view, SOURCE["t4"][3:, ::2])
        same(row, SOURCE["q2"][1])
        with pytest.raises(
            BudgetError, match=r"'t7'.* does not fit.*budget is 24576.*0 tensors are"
        ):
            tensors["t7"]
        same(view, SOURCE["t4"][3:, ::2])
        del view, row
        same(tensors["t7"], SOURCE["t7"])


def test_pins(checkpoint):
    with TensorCache(checkpoint, "cpu", 5 * PAGE) as tensors:
        with pytest.raises(ValueError, match="must be pinned"):
            tensors.unpin("t5")
        tensors.pin("t5")
        tensors.pin("t5")
        tensors.unpin("t5")
        with pytest.raises(BudgetError, match="1 tensors are pinned"):
            tensors["t7"]
        with tensors.lease("t1") as tensor:
            same(tensor, SOURCE["t1"])
            del tensor
            tensors.clear()
            assert "t1" in tensors
        tensors.clear()
        assert "t5" in tensors
        assert "t1" not in tensors
        tensors.unpin("t5")
        tensors["t7"]
        assert "t5" not in tensors


def test_prefetching(checkpoint):
    with TensorCache(checkpoint, "cpu", "1MiB") as tensors:
        tensors.prefetch(["t0", "q1", "t1"])
        wait_for(lambda: tensors.stats().prefetched == 3)
        assert tensors.stats().misses == 0
        same(tensors["q1"], SOURCE["q1"])
        same(tensors["q1"], SOURCE["q1"])
        stats = tensors.stats()
        assert (stats.hits, stats.misses, stats.prefetch_used) == (2, 0, 1)
        with pytest.raises(KeyError, match="nothing"):
            tensors.prefetch(["nothing"])


def test_prefetching_gives_way_and_waits(checkpoint):
    with TensorCache(checkpoint, "cpu", 5 * PAGE) as tensors:
        held = tensors["t4"]  # 2 pages and a bit: 3
        tensors.prefetch(["t0", "t1", "t7"])  # t7 does not fit beside what is held
        wait_for(lambda: tensors.stats().prefetched == 2)
        time.sleep(0.02)
        assert "t0" in tensors  # prefetched tensors do not push each other out
        assert "t7" not in tensors
        same(tensors["t2"], SOURCE["t2"])  # a request takes the place of a prefetched one
        del held
        tensors["t0"], tensors["t1"], tensors["t2"]
        wait_for(lambda: tensors.stats().prefetched == 3)  # the waiting one comes by itself
        same(tensors["t7"], SOURCE["t7"])
        assert tensors.stats().peak <= 5 * PAGE


def test_a_tensor_is_loaded_once_for_many_readers(checkpoint, monkeypatch):
    original = places.read_rows

    def slow(*arguments, **keywords):
        time.sleep(0.05)
        original(*arguments, **keywords)

    monkeypatch.setattr(places, "read_rows", slow)
    with TensorCache(checkpoint, "cpu", "1MiB") as tensors:
        found = []
        threads = [threading.Thread(target=lambda: found.append(tensors["t3"])) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({tensor.data_ptr() for tensor in found}) == 1
        stats = tensors.stats()
        assert (stats.misses, stats.hits) == (1, 5)
        assert stats.bytes_read == tensors.nbytes("t3")


@pytest.mark.parametrize("checkpoint", ["pread"], indirect=True)
def test_a_failed_load_is_everybodys_and_can_be_tried_again(checkpoint, monkeypatch):
    original = places.read_rows

    def failing(*arguments, **keywords):
        time.sleep(0.02)
        raise OSError(5, "cannot read at offset 77", "model")

    with TensorCache(checkpoint, "cpu", "1MiB") as tensors:
        monkeypatch.setattr(places, "read_rows", failing)
        errors = []

        def work():
            try:
                tensors["t3"]
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 3
        tensors.prefetch(["t3"])
        wait_for(lambda: "t3" not in tensors)
        monkeypatch.setattr(places, "read_rows", original)
        same(tensors["t3"], SOURCE["t3"])
        assert tensors.stats().resident == tensors.nbytes("t3")


def test_a_changed_file_is_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(SOURCE, path)
    with open_checkpoint(path) as checkpoint, TensorCache(checkpoint, "cpu", "1MiB") as tensors:
        taken = tensors["t1"]
        save_checkpoint({"t1": torch.zeros(7, 128)}, path)
        with pytest.raises(CheckpointError, match=r"replaced|truncated"):
            tensors["t2"]
        same(tensors["t1"], SOURCE["t1"])  # loaded before
        same(taken, SOURCE["t1"])


def test_closing(checkpoint):
    tensors = TensorCache(checkpoint, "cpu", "1MiB")
    held = tensors["q1"]
    tensors.prefetch(NAMES)
    tensors.close()
    tensors.close()
    same(held, SOURCE["q1"])
    for call in (tensors.get, tensors.pin, lambda name: tensors.prefetch([name])):
        with pytest.raises(ValueError, match="the cache must be open"):
            call("t0")
    assert not any(thread.name == "mkrs-prefetch" for thread in threading.enumerate())


def test_other_devices_are_loaded_through_a_buffer(checkpoint, monkeypatch):
    """The path of CUDA and MPS, on a device whose copies do nothing."""
    monkeypatch.setattr(places, "_STAGING", 2048)
    with TensorCache(checkpoint, "meta", "1MiB") as tensors:
        assert tensors["t7"].device.type == "meta"
        assert tensors["q1"].codes.device.type == "meta"
        assert tensors.stats().resident >= 12_800
    with TensorCache(checkpoint, "cpu", "1MiB", backend="torch") as tensors:
        tensors.device = torch.device("cuda")  # only says: not straight into memory
        for name in NAMES:
            same(tensors[name], SOURCE[name])


class CacheMachine(RuleBasedStateMachine):
    """Random requests, holds, pins, prefetches and bursts of threads against a plain dictionary."""

    path = None
    read = "mmap"

    def __init__(self):
        super().__init__()
        self.checkpoint = open_checkpoint(self.path, read=self.read)
        self.tensors = TensorCache(self.checkpoint, "cpu", BUDGET)
        self.held = []  # (what the cache gave, what it must be)
        self.pinned = []
        self.asked = 0

    def teardown(self):
        self.tensors.close()
        self.checkpoint.close()
        for tensor, expected in self.held:
            same(tensor, expected)

    def in_use(self):
        """An upper bound of what cannot be evicted."""
        names = set(self.pinned) | {name for name, _ in self.owners()}
        return sum(self.tensors.nbytes(name) for name in names)

    def owners(self):
        return [(tensor.source, tensor) for tensor, _ in self.held if hasattr(tensor, "source")]

    def request(self, name):
        self.asked += 1
        try:
            tensor = self.tensors[name]
        except BudgetError:
            # Only when it really did not fit beside what is held and pinned.
            assert self.in_use() + self.tensors.nbytes(name) > BUDGET - 2 * PAGE
            return None
        same(tensor, SOURCE[name])
        tensor.source = name
        return tensor

    @rule(name=st.sampled_from(NAMES))
    def get(self, name):
        self.request(name)

    @rule(name=st.sampled_from(NAMES), first=st.integers(0, 3))
    def hold(self, name, first):
        tensor = self.request(name)
        if tensor is not None:
            if first and tensor.dim() and tensor.shape[0] > first:
                view = tensor[first:]
                view.source = name
                self.held.append((view, SOURCE[name][first:]))
            else:
                self.held.append((tensor, SOURCE[name]))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 1000))
    def drop(self, which):
        self.held.pop(which % len(self.held))

    @rule(name=st.sampled_from(NAMES))
    def pin(self, name):
        self.asked += 1
        try:
            self.tensors.pin(name)
        except BudgetError:
            assert self.in_use() + self.tensors.nbytes(name) > BUDGET - 2 * PAGE
        else:
            self.pinned.append(name)

    @precondition(lambda self: self.pinned)
    @rule(which=st.integers(0, 1000))
    def unpin(self, which):
        self.tensors.unpin(self.pinned.pop(which % len(self.pinned)))

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=4))
    def prefetch(self, names):
        self.tensors.prefetch(names)

    @rule()
    def clear(self):
        self.tensors.clear()

    @rule(seed=st.integers(0, 1 << 20))
    def burst(self, seed):
        """Three threads at once; each checks what it gets."""
        wrong = []
        counts = []

        def work(seed):
            generator = random.Random(seed)
            count = 0
            for _ in range(6):
                name = generator.choice(NAMES)
                count += 1
                try:
                    same(self.tensors[name], SOURCE[name])
                except BudgetError:
                    pass
                except BaseException as error:
                    wrong.append(error)
            counts.append(count)

        threads = [threading.Thread(target=work, args=(seed + i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.asked += sum(counts)
        assert not wrong

    @invariant()
    def the_budget_holds_and_the_counters_agree(self):
        stats = self.tensors.stats()
        assert stats.peak <= BUDGET
        assert stats.resident <= BUDGET
        assert stats.hits + stats.misses == self.asked
        assert stats.prefetch_used <= stats.hits
        for name in self.pinned:
            assert name in self.tensors

    @invariant()
    def held_tensors_do_not_change(self):
        for tensor, expected in self.held:
            same(tensor, expected)


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_the_cache_against_a_model(path, read):
    from hypothesis.stateful import run_state_machine_as_test

    CacheMachine.path, CacheMachine.read = path, read
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(max_examples=60, stateful_step_count=25, deadline=None),
    )
    gc.collect()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_what_is_in_the_page_cache_is_mapped_and_dropped(tmp_path):
    def mapped():
        """Resident bytes of the file's maps."""
        total, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            field, _, rest = line.partition(" ")
            if not field.endswith(":"):
                inside = line.endswith(str(path))
            elif inside and field == "Rss:":
                total += int(rest.split()[0]) * 1024
        return total

    path = tmp_path / "model.safetensors"
    source = {f"t{i}": torch.randn(1 << 20) for i in range(4)}
    source["q"] = QuantizedTensor.from_float(torch.randn(1024, 4096))
    save_checkpoint(source, path)
    with open_checkpoint(path) as checkpoint, TensorCache(checkpoint, "cpu", "9MiB") as tensors:
        for _ in range(2):
            for name, tensor in source.items():
                same(tensors[name], tensor)
                assert tensors.stats().resident <= tensors.budget
        assert mapped() > 0
        held = tensors["t1"]
        tensors.clear()
        assert tensors.stats().resident == held.nbytes
        same(held, source["t1"])
        view = held[5:]
        del held
        tensors.clear()
        same(view, source["t1"][5:])
        del view
        tensors.clear()
        # The pages at a tensor's ends are its neighbours' too, and are large ones in some systems.
        assert tensors.stats().resident == 0
        last = tensors["q"]
    same(last, source["q"])
    del last
    assert mapped() == 0


def test_a_file_that_changes_is_noticed_before_it_is_mapped(path, tmp_path):
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(path.read_bytes())
    with open_checkpoint(copy) as checkpoint, TensorCache(checkpoint, "cpu", "1MiB") as tensors:
        first = tensors["t3"]
        save_checkpoint({"t3": torch.zeros(2)}, copy)
        same(first, SOURCE["t3"])  # of the file that was opened
        with pytest.raises(CheckpointError, match="after it was opened"):
            tensors["t4"]
