"""The macOS build, as far as Linux can take it: every host source compiles for arm64 macOS against
the headers of torch's real macOS wheels, links into a Mach-O library with the shaders inside, and
asks for nothing that those wheels or macOS do not export.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .compiler import CACHE, HERE, JOBS, ROOT, CompileError, run, zig
from .macho import Symbols, symbols

WHEELS = CACHE.parent / "macos"
# Built against the first and loaded by all: the newest release, the one that the Makefile installs
# and the oldest that is supported.
VERSIONS = ("2.15.0", "2.13.0", "2.11.0")
TARGET = "aarch64-macos.14.0"
# What the frameworks on setup.py's link line export, as far as the sources use it.
FRAMEWORKS = {"_MTLCreateSystemDefaultDevice": "Metal"}
OBJC = re.compile(r"_objc_\w+$|_OBJC_(META)?CLASS_\$_\w+$|__objc_empty_(cache|vtable)$")
# libc++ and libc++abi: std::, operator new and delete, exception handling, type information.
CXX = re.compile(
    r"__Z(N|NK|NV|St|TI|TS|TV|TT|GV)?N?K?(St|S[abdiost]|Sa|n[wa]|d[la])|__ZT[ISV]N?S?|___cxa_|___gxx_"
)


def wheel(version: str) -> Path:
    """The unpacked macOS wheel of a torch release, downloaded once."""
    folder = WHEELS / version
    if (folder / "torch" / "lib" / "libtorch_cpu.dylib").exists():
        return folder
    WHEELS.mkdir(parents=True, exist_ok=True)
    found = sorted(WHEELS.glob(f"torch-{version}-cp311-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--platform", "macosx_14_0_arm64", "--platform", "macosx_11_0_arm64"]
        command += ["--only-binary=:all:", "--python-version", "3.11", f"torch=={version}"]
        done = subprocess.run(
            [*command, "-d", str(WHEELS)], capture_output=True, text=True, check=False
        )
        found = sorted(WHEELS.glob(f"torch-{version}-cp311-*.whl"))
        if done.returncode != 0 or not found:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"the macOS wheel of torch {version} cannot be downloaded: {reason}")
    with zipfile.ZipFile(found[0]) as archive:
        wanted = [
            n
            for n in archive.namelist()
            if n.startswith("torch/include/")
            or (n.startswith("torch/lib/") and n.endswith("dylib"))
        ]
        archive.extractall(folder, wanted)
    return folder


@pytest.fixture(scope="module")
def compiler() -> str:
    try:
        return str(zig())
    except CompileError as error:
        pytest.skip(str(error))


def compile_all(compiler: str, version: str, folder: Path, level: str = "-O2") -> list[Path]:
    """Object files of everything that setup.py compiles on macOS."""
    include = wheel(version) / "torch" / "include"
    shaders = folder / "shader_sources.cpp"
    run([sys.executable, str(ROOT / "csrc" / "mps" / "embed_shaders.py"), str(shaders)])
    csrc = ROOT / "csrc"
    folders = (csrc, csrc / "cpu", csrc / "memory", csrc / "mps")
    sources = [path for folder in folders for path in folder.glob("*.cpp")]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        flags = ["-std=gnu++20", level, "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
        flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DMKRS_MPS"]
        # zig's math.h takes a part of float.h and so keeps libc++ from reading the rest.
        flags += ["-include", "float.h"]
        flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
        if source.suffix == ".mm":
            flags += ["-x", "objective-c++", "-fblocks", "-fobjc-arc", f"-I{HERE / 'apple'}"]
            flags += ["-Wno-unused-command-line-argument"]
        # The limited API is the same everywhere; this machine's headers will do.
        flags += ["-DPy_LIMITED_API=0x030a0000", "-isystem", sysconfig.get_paths()["include"]]
        flags += [f"-I{csrc}", "-isystem", str(include)]
        run([compiler, "c++", "-target", TARGET, *flags, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(JOBS) as pool:
        return list(
            pool.map(compile_one, [*sorted(sources), *sorted(csrc.glob("mps/*.mm")), shaders])
        )


@pytest.fixture(scope="module")
def objects(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_all(compiler, VERSIONS[0], tmp_path_factory.mktemp("macos"))


def exported(version: str) -> dict[str, Symbols]:
    lib = wheel(version) / "torch" / "lib"
    return {name: symbols(lib / name) for name in ("libtorch_cpu.dylib", "libc10.dylib")}


def unresolved(objects: list[Path], version: str) -> dict[str, str]:
    """Undefined symbols, each with where it comes from ("" for nowhere)."""
    own = [symbols(path) for path in objects]
    defined = set().union(*(s.defined for s in own))
    # Private externals are one file's to another here, so definitions are read without that rule.
    libraries = exported(version)
    system = set(
        re.findall(
            r"[\w$]+", (zig().parent / "lib" / "libc" / "darwin" / "libSystem.tbd").read_text()
        )
    )
    origin: dict[str, str] = {}
    for name in set().union(*(s.undefined for s in own)) - defined:
        library = next((lib for lib, s in libraries.items() if name in s.defined), "")
        if library:
            origin[name] = library
        elif name in system:
            origin[name] = "libSystem"
        elif name in FRAMEWORKS:
            origin[name] = FRAMEWORKS[name]
        elif re.match(r"_+Py[A-Z_]\w+$", name):
            origin[name] = "the interpreter"
        elif OBJC.match(name):
            origin[name] = "libobjc"
        elif CXX.match(name) or any(name in s.undefined for s in libraries.values()):
            origin[name] = "libc++"
        else:
            origin[name] = ""
    return origin


@pytest.mark.parametrize("version", VERSIONS)
def test_every_symbol_is_exported(objects: list[Path], version: str, tmp_path: Path) -> None:
    linked = link(objects, tmp_path)
    origin = unresolved([linked], version)
    missing = sorted(name for name, where in origin.items() if not where)
    assert not missing, f"torch {version} for macOS and the system do not export {missing}"
    shim = {name for name in origin if name.startswith("_aoti_torch_mps_")}
    assert len(shim) >= 7, "the MPS host code should reach Metal through torch's C shim"
    assert all(origin[name] == "libtorch_cpu.dylib" for name in shim)
    torch_cpp = [
        name for name in origin if re.match(r"__ZN?K?\d*(2at|3c10|5torch)", name) and origin[name]
    ]
    assert not torch_cpp, f"only the stable C ABI may be used, got {torch_cpp}"


def link(objects: list[Path], folder: Path) -> Path:
    target = folder / "_C.abi3.so"
    command = [str(zig()), "c++", "-target", TARGET, "-shared", "-nostdlib++"]
    command += [*map(str, objects), "-Wl,-undefined,dynamic_lookup", "-o", str(target)]
    run(command)
    return target


def test_mach_o_library_carries_the_shaders(objects: list[Path], tmp_path: Path) -> None:
    data = link(objects, tmp_path).read_bytes()
    assert symbols(tmp_path / "_C.abi3.so").kind in ("dylib", "bundle")
    for kernel in (ROOT / "mps_kernels").glob("*.metal"):
        assert f'#line 1 "{kernel.name}"'.encode() in data


def test_a_wheel_for_macos(objects: list[Path], tmp_path: Path) -> None:
    """setup.py packs the library as it would on a Mac; pip there would take the wheel."""
    package = tmp_path / "lib" / "mergekit_torch"
    base = tmp_path / "base"
    base.mkdir()
    options = tmp_path / "setup.cfg"
    options.write_text(f"[build]\nbuild_lib={package.parent}\n[egg_info]\negg_base={base}\n")

    def setup(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", *arguments],
            cwd=ROOT,
            env={**os.environ, "DIST_EXTRA_CONFIG": str(options)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    setup("build_py")
    link(objects, package)
    setup(
        *("bdist_wheel", "--skip-build", "--plat-name", "macosx_14_0_arm64"),
        *("--bdist-dir", str(tmp_path / "bdist"), "--dist-dir", str(tmp_path / "dist")),
    )
    (path,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(r"mergekit_torch-[\w.]+-cp310-abi3-macosx_14_0_arm64\.whl", path.name)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    library = tmp_path / "unpacked" / "mergekit_torch" / "_C.abi3.so"
    assert symbols(library).kind in ("dylib", "bundle")
    data = library.read_bytes()
    for kernel in (ROOT / "mps_kernels").glob("*.metal"):
        assert f'#line 1 "{kernel.name}"'.encode() in data
    assert [n for n in names if n.endswith((".so", ".dylib"))] == ["mergekit_torch/_C.abi3.so"]
    assert {"mergekit_torch/__init__.py", "mergekit_torch/verify.py"} <= set(names)
    (info,) = (n for n in names if n.endswith(".dist-info/WHEEL"))
    wheel_text = (tmp_path / "unpacked" / info).read_text()
    assert "Tag: cp310-abi3-macosx_14_0_arm64" in wheel_text
    assert "Root-Is-Purelib: false" in wheel_text


@pytest.mark.slow
def test_sources_compile_against_the_oldest_torch(compiler: str, tmp_path: Path) -> None:
    assert compile_all(compiler, VERSIONS[-1], tmp_path, "-O0")


def test_the_check_sees_a_missing_symbol(compiler: str, tmp_path: Path) -> None:
    source = tmp_path / "bad.cpp"
    source.write_text(
        'extern "C" int aoti_torch_mps_no_such_call(void*);\n'
        'extern "C" int call() { return aoti_torch_mps_no_such_call(nullptr); }\n'
    )
    obj = tmp_path / "bad.o"
    run([compiler, "c++", "-target", TARGET, "-c", str(source), "-o", str(obj)])
    origin = unresolved([obj], VERSIONS[0])
    assert origin["_aoti_torch_mps_no_such_call"] == ""


@pytest.fixture(scope="module", autouse=True)
def remove_objects(tmp_path_factory: pytest.TempPathFactory):
    yield
    shutil.rmtree(tmp_path_factory.getbasetemp() / "macos0", ignore_errors=True)
