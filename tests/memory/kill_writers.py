"""Kills writers at random moments and checks what they leave: run by test_faults.py.

    kill_writers.py save|shards|reshard|unshard|resume|resume_shards <directory> <kills> <seed>

``shards`` replaces a single file by four, ``reshard`` four by four, ``unshard`` four by one.

Forks from one process that has imported torch, so that fifty kills take seconds.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from mergekit_torch.checkpoint import QuantInfo, TensorSpec, open_checkpoint, save_checkpoint
from mergekit_torch.memory import convert, rewrite_checkpoint

OLD = {"x": torch.arange(1000.0), "y": torch.ones(900), "z": torch.ones(800), "u": torch.ones(700)}


def new_tensors():
    generator = torch.Generator().manual_seed(1)
    return {f"t{i}.weight": torch.randn(256, 256, generator=generator) for i in range(12)}


def specs_of(checkpoint):
    specs = {}
    for name in checkpoint:
        info = checkpoint.info(name)
        q = QuantInfo(8, 32, "affine", info.shape[-1], torch.float16, info.dtype)
        specs[name] = TensorSpec(info.dtype, info.shape, q)
    return specs


def main(mode, directory, kills, seed):
    torch.set_num_threads(1)
    convert._SAFE_EVERY = 1 << 15
    convert._PIECE = convert._MOVED_PIECE = 1 << 14
    random.seed(seed)
    source = directory / "source.safetensors"
    save_checkpoint(new_tensors(), source)
    resume_mode = mode.startswith("resume")
    shards = mode not in ("save", "resume")
    old_size = "4KB" if mode in ("reshard", "unshard", "resume_shards") else None
    new_size = {"shards": 3 << 18, "reshard": 3 << 18, "resume_shards": 220_000}.get(mode)
    target = directory / ("out" if shards else "out.safetensors")
    reference = directory / "reference.safetensors"

    def write(path, resume=False):
        if not resume_mode:
            save_checkpoint(new_tensors(), path, max_shard_size=new_size)
            return
        with open_checkpoint(source) as checkpoint:
            specs = specs_of(checkpoint)
            rewrite_checkpoint(checkpoint, path, specs, resume=resume, max_shard_size=new_size)

    def child(resume=False):
        pid = os.fork()
        if pid == 0:
            try:
                write(target, resume)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        return pid

    def finish(pid):
        _, status = os.waitpid(pid, 0)
        if status:
            raise SystemExit(f"a writer that was not killed failed: {status}")

    def state():
        """ "old", "new", or raises."""
        with open_checkpoint(target) as checkpoint:
            expected = OLD if "x" in checkpoint else wanted
            if set(checkpoint) != set(expected):
                raise SystemExit(f"a mixture: {sorted(checkpoint)}")
            for name, value in checkpoint.stored_items() if resume_mode else ():
                if "x" not in checkpoint and not torch.equal(value, stored[name]):
                    raise SystemExit(f"{name} differs")
            if not resume_mode:
                for name, value in expected.items():
                    if not torch.equal(checkpoint[name], value):
                        raise SystemExit(f"{name} differs")
            return "old" if expected is OLD else "new"

    wanted = new_tensors()
    write(reference if not shards else directory / "reference")
    if resume_mode:
        with open_checkpoint(reference if not shards else directory / "reference") as checkpoint:
            stored = {name: tensor.clone() for name, tensor in checkpoint.stored_items()}
    started = time.perf_counter()
    save_checkpoint(OLD, target, max_shard_size=old_size)
    finish(child())
    usual = time.perf_counter() - started
    seen = {}
    resumed = 0
    for _ in range(kills):
        save_checkpoint(OLD, target, max_shard_size=old_size)
        pid = child()
        time.sleep(random.random() * usual)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = state()
        seen[found] = seen.get(found, 0) + 1
        if resume_mode and found == "old":
            place = target if shards else directory
            journal = place / f".{'model.safetensors' if shards else target.name}.journal"
            resumed += journal.exists() and "at" in journal.read_text()
            finish(child(resume=True))
            if state() != "new":
                raise SystemExit("a resumed job did not put the new checkpoint in place")
            if not shards and target.read_bytes() != reference.read_bytes():
                raise SystemExit("a resumed job wrote something else")
            if list(place.glob(".*")):
                raise SystemExit(f"left behind: {list(place.glob('.*'))}")
    print(seen, "resumed in the middle:", resumed)
    if resume_mode and kills >= 20 and not resumed:
        raise SystemExit("no kill hit a job that had noted a safe point")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
