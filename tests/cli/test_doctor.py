"""``mkrs doctor --device``: right kernels, a broken one, a kernel that raises, the report."""

import json

import pytest
import torch

from mergekit_torch import chips, selftest
from mergekit_torch.cli import doctor
from mergekit_torch.cli.main import main

CPU = torch.device("cpu")


def mkrs(capsys, *arguments):
    code = main(["doctor", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class Broken:
    """The ops, one of which is wrong in its last element or raises."""

    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def __getattr__(self, op):
        good = getattr(torch.ops.mkrs, op)
        if op != self.name:
            return good

        def call(*arguments):
            if self.error:
                raise RuntimeError(self.error)
            result = good(*arguments)
            result.view(-1)[-1] += 1000
            return result

        return call


def test_every_kernel_is_among_the_cases():
    for device, int8 in (("cpu", True), ("mps", False)):
        full, quick = selftest.cases(device), selftest.cases(device, quick=True)
        assert (
            {c.op for c in full}
            == {c.op for c in quick}
            == set(selftest.verify.CHECKS) - {"gguf_unpack", "dequantize_into"}
        )
        for found in (full, quick):
            kernels = {(c.op, c.regime) for c in found}
            formats = {(c.op, c.regime, c.bits, c.scheme) for c in found}
            assert len(formats) == 9 * len(kernels)
            assert any(c.option == "int8" for c in found) == int8
            assert {c.aligned for c in found} == {True, False}
            assert len({(c.scale_dtype, c.dtype) for c in found}) == 9
        assert len(full) == 9 * len(quick)


def test_right_kernels(capsys):
    code, out, _ = mkrs(capsys, "--device", "cpu", "--quick", "--no-speed", "--seed", "5")
    assert code == 0
    assert "all 369 cases are right" in out
    assert "WRONG" not in out
    assert "seed 5" in out
    assert "for a bug report" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_broken_kernel_is_found(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "_OPS", Broken("dequantize"))
    code, out, _ = mkrs(capsys, "--device", "cpu", "--quick", "--no-speed")
    assert code == 1
    assert "9 of 369 cases are wrong" in out
    (row,) = (line for line in out.splitlines() if line.startswith("dequantize "))
    assert row.split()[1:4] == ["all", "9", "9"]
    assert row.endswith("WRONG")
    assert "wrong           dequantize all: 8-bit symmetric" in out
    assert "must be" in out


def test_a_kernel_that_raises_is_found_and_said(capsys, monkeypatch):
    message = "mkrs::quantize: Metal (macOS 14 or later) must compile the kernel quantize_float"
    monkeypatch.setattr(selftest, "_OPS", Broken("quantize", message))
    code, out, _ = mkrs(capsys, "--device", "cpu", "--quick", "--no-speed", "--json")
    assert code == 1
    data = json.loads(out)
    assert data["failed"] == 18
    assert all(message in text for text in data["correctness"]["failures"])


def test_speeds(monkeypatch):
    speeds = selftest.measure(CPU, size=64, total=1 << 20)
    names = [row.what for row in speeds.rows]
    assert {name.split(",")[0] for name in names} >= {"dequant_matmul", "quantize", "dequantize"}
    for row in speeds.rows:
        assert row.seconds > 0
        assert row.gigabytes > 0
        assert row.of_copy > 0
    text = doctor.speed_table(speeds, "float32")
    assert max(map(len, text.splitlines())) <= 100
    assert "a copy moves" in text


def test_chips():
    assert chips.chip_name(CPU)
    assert not chips.is_simulated(CPU)
    assert chips.APPLE_BANDWIDTH["Apple M2 Pro"] == 200


@pytest.mark.skipif("torch.cuda.is_available()", reason="there is a GPU")
def test_a_device_that_is_not_there(capsys):
    code, _, err = mkrs(capsys, "--device", "cuda")
    assert code == 1
    assert "'cuda' must be present" in err
    assert mkrs(capsys, "--device", "tpu")[0] == 1


@pytest.mark.skipif("torch.backends.mps.is_available()", reason="there is a GPU")
def test_a_mac_without_metal(capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    code, _, err = mkrs(capsys, "--device", "mps")
    assert code == 1
    assert "'mps' must have a Metal GPU and macOS 14 or later" in err
    assert "everything also runs on the CPU" in err
