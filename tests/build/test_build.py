"""The binary keeps to the stable ABI, the wheel is complete, what is missing is said clearly."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import mergekit_torch

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(mergekit_torch.__file__).with_name("_C.abi3.so")


def run(command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def undefined_symbols(library: Path) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("needs binutils' nm")
    dynamic = [] if sys.platform == "darwin" else ["-D"]
    result = run(["nm", *dynamic, "-u", str(library)])
    assert result.returncode == 0, result.stderr
    return [line.split()[-1].split("@")[0] for line in result.stdout.splitlines() if line.strip()]


def test_nothing_undefined_from_c10_or_at():
    """Only the C shim, the C library and the C++ runtime: what no torch release may change."""
    symbols = undefined_symbols(LIBRARY)
    assert any(name.lstrip("_").startswith("aoti_torch_") for name in symbols)
    # Itanium mangling: namespaces c10, at and torch as name prefixes.
    unstable = [name for name in symbols if re.match(r"_+Z\w*?(3c10|2at|5torch|6caffe2)", name)]
    assert unstable == []


def test_no_unstable_headers_in_the_sources():
    allowed = re.compile(r"<torch/(csrc/stable/|headeronly/|csrc/inductor/aoti_torch/c/)")
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".cpp", ".h", ".inc", ".cu", ".cuh", ".mm"):
            continue
        for line in path.read_text().splitlines():
            if re.match(r"\s*#\s*include\s*<(torch|ATen|c10)/", line):
                assert allowed.search(line), f"{path}: {line}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built as a user would, from a copy of the tree that only holds what git tracks."""
    source = tmp_path_factory.mktemp("source")
    tracked = run(["git", "ls-files", "-z"], cwd=ROOT)
    if tracked.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    result = run([*command, "-w", str(out), str(source)])
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_serves_every_python(wheel):
    assert wheel.name.startswith(f"mergekit_torch-{mergekit_torch.__version__}-cp310-abi3-")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mergekit_torch/_C.abi3.so" in names
    assert "mergekit_torch/ops/dequant_matmul.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in names)


SMOKE = """
import torch, mergekit_torch
from mergekit_torch import ops
torch.manual_seed(0)
w = torch.randn(64, 96)
x = torch.randn(3, 96, requires_grad=True)
for bits in (8, 4, 2):
    for scheme in ("symmetric", "asymmetric", "affine"):
        codes, scale, zero = ops.quantize(w, bits, 32, scheme)
        parts = (codes, scale, zero if scheme == "asymmetric" else None,
                 zero if scheme == "affine" else None)
        dense = ops.dequantize(*parts, bits=bits, group_size=32, in_features=96)
        y = ops.dequant_matmul(x, *parts, bits=bits, group_size=32)
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-4, atol=1e-4)
        x.grad = None
        y.sum().backward()
        torch.testing.assert_close(x.grad, dense.sum(0).expand(3, 96), rtol=1e-4, atol=1e-4)
try:
    torch.ops.mkrs.quantize(torch.full((1, 16), float("nan")), 4, 16, "affine")
except RuntimeError as error:
    assert "mkrs::quantize: weight must be finite" in str(error), error
else:
    raise SystemExit("a NaN was quantized")
print("smoke", torch.__version__)
"""


@pytest.mark.slow
def test_wheel_works_where_it_is_installed(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    result = run([sys.executable, "-c", SMOKE], cwd=tmp_path)
    assert result.stdout.startswith(f"smoke {torch.__version__}"), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("release", ["2.11", "2.12", "2.14", "2.15"])
def test_wheel_works_under_another_torch(wheel, tmp_path, release):
    """The binary built here runs under torch releases it was not built against.

    Another torch is gigabytes on most platforms, so the suite does not fetch it: name
    interpreters that have one in MKRS_TEST_PYTHONS (separated by colons).
    """
    for python in filter(None, os.environ.get("MKRS_TEST_PYTHONS", "").split(":")):
        version = run([python, "-c", "import torch; print(torch.__version__)"]).stdout.strip()
        if not version.startswith(release + "."):
            continue
        zipfile.ZipFile(wheel).extractall(tmp_path)
        result = run([python, "-c", SMOKE], cwd=tmp_path)
        assert result.stdout.startswith(f"smoke {release}."), result.stderr
        return
    pytest.skip(f"no interpreter with torch {release} is named in MKRS_TEST_PYTHONS")


def import_with(tmp_path, files: dict[str, str], library: bool) -> str:
    """What importing the package prints when other modules stand in for the real ones."""
    package = tmp_path / "mergekit_torch"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(mergekit_torch.__file__).parent, package, ignore=ignore)
    if library:
        (package / "_C.abi3.so").write_bytes(b"not a library")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    result = run(
        [sys.executable, "-c", "import mergekit_torch._extension as e; e.load()"], cwd=tmp_path
    )
    assert result.returncode != 0
    return result.stderr


def test_messages_when_something_is_missing(tmp_path):
    stubs = {
        "missing": {"torch.py": "raise ImportError('no torch here')"},
        "old": {"torch.py": "__version__ = '2.9.1+cpu'"},
    }
    text = import_with(tmp_path / "a", {}, library=False)
    assert "_C.abi3.so is missing" in text
    assert "pip install --no-build-isolation -e ." in text
    text = import_with(tmp_path / "b", {}, library=True)
    assert "does not load under torch" in text
    for name, files in stubs.items():
        text = import_with(tmp_path / name, files, library=False)
        assert "mergekit_torch needs PyTorch >= 2.11" in text
    assert "got 2.9.1" in text


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ("raise ImportError('none')", "building needs torch >= 2.11"),
        ("__version__ = '2.10.0'", "building needs torch >= 2.11, got 2.10.0"),
    ],
)
def test_building_without_a_fit_torch_says_so(tmp_path, stub, message):
    package = tmp_path / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text(stub)
    (package / "utils" / "__init__.py").write_text("")
    (package / "utils" / "cpp_extension.py").write_text("")
    result = run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode != 0
    assert message in result.stderr
