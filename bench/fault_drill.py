"""What clients see of faults: `python -m bench.fault_drill --rounds 50`, with the real server.

In each round a fault strikes while 16 streams run. Every request must end (with its whole text or with an
error), and the server must answer a new request within 15 seconds. Exit status 1 if anything of that fails.
Full and read-only folders need a mount of their own; without the right to one (root), limits on the size of
files and the mode of the folder stand in for them.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from bench.make_checkpoint import NANBEIGE, write
from bench.options import Extra, reporting
from bench.server_process import ServerProcess

if TYPE_CHECKING:
    import psutil
else:
    psutil = Extra("psutil")


NUM_STREAMS, NUM_TOKENS, CONTEXT = 16, 128, 512
SERVING_SECONDS = 15.0  # in which the server must answer again
END_SECONDS = 60.0  # a request that has not ended so long after the fault hangs
HOLD_SECONDS = 3.0  # that a fault which keeps workers from starting lasts
FEW_DESCRIPTORS = 8  # fewer than a server has open: none can be added
SCRATCH_BYTES = 2**20
# Fast to load, while a stream takes long enough for a fault to strike.
TINY = NANBEIGE | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_loops": 4,
    "max_position_embeddings": CONTEXT,
}


class Drill:
    """A server, and the places where faults can be made."""

    server: ServerProcess

    def __init__(
        self, model: Path, scratch: Path, log: Path, server_flags: list[str], *, is_mounted: bool
    ) -> None:
        """`scratch` becomes TMPDIR and the folder of caches; `is_mounted`: it is a small disk of its own."""
        self.server_flags = server_flags
        self.model = model
        self.scratch = scratch
        self.log = log
        self.is_mounted = is_mounted

    @property
    def api(self) -> "psutil.Process":
        """The process that clients speak to."""
        return psutil.Process(self.server.process.pid)

    @property
    def worker(self) -> "psutil.Process":
        """The engine's process."""
        workers = [child for child in self.api.children() if "model.worker" in child.cmdline()]
        return min(workers, key=lambda worker: worker.create_time())  # a later one stands by

    def start(self) -> None:
        """Starts a server and waits until it is ready."""
        environment = {"TMPDIR": str(self.scratch), "XDG_CACHE_HOME": str(self.scratch)}
        flags = [str(self.model), "--served-model-name", "default", "--max-model-len", str(CONTEXT)]
        flags += self.server_flags
        with open(self.log, "ab") as log:
            self.server = ServerProcess(
                *flags, "--shutdown-timeout", "60", environment=environment, stderr=log, own_group=True
            )
        self.server.__enter__()

    def stop(self) -> None:
        """Ends the server."""
        self.server.__exit__()


Fault = Callable[[Drill], "contextlib.AbstractContextManager[None]"]


@contextlib.contextmanager
def killed(drill: Drill) -> Iterator[None]:
    """The worker is gone, as after the kernel ran out of memory."""
    drill.worker.kill()
    yield


@contextlib.contextmanager
def stopped(drill: Drill) -> Iterator[None]:
    """The worker stands still."""
    drill.worker.suspend()
    yield


@contextlib.contextmanager
def no_descriptors(drill: Drill) -> Iterator[None]:
    """The worker is gone, and for some seconds none can be started: there is no descriptor for its socket."""
    before = resource.prlimit(drill.api.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(drill.api.pid, resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, before[1]))
    drill.worker.kill()
    time.sleep(HOLD_SECONDS)
    resource.prlimit(drill.api.pid, resource.RLIMIT_NOFILE, before)
    yield


@contextlib.contextmanager
def model_gone(drill: Drill) -> Iterator[None]:
    """The worker is gone, and for some seconds each that is started finds no model."""
    away = drill.model.with_name("away")
    drill.model.rename(away)
    drill.worker.kill()
    time.sleep(HOLD_SECONDS)
    away.rename(drill.model)
    yield


@contextlib.contextmanager
def disk_full(drill: Drill) -> Iterator[None]:
    """The worker is gone, and nothing can be written, not even the log (which lies on that disk)."""
    filler = drill.scratch / "filler"
    if drill.is_mounted:
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    else:
        resource.prlimit(drill.api.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    drill.worker.kill()
    yield
    filler.unlink(missing_ok=True)
    resource.prlimit(drill.api.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def read_only(drill: Drill) -> Iterator[None]:
    """The worker is gone, and TMPDIR and the folder of caches can't be written to."""

    def set_mode(mode: str) -> None:
        if drill.is_mounted:
            subprocess.run(["mount", "-o", f"remount,{mode}", drill.scratch], check=True)
        else:
            drill.scratch.chmod(0o500 if mode == "ro" else 0o700)

    set_mode("ro")
    drill.worker.kill()
    yield
    set_mode("rw")


@contextlib.contextmanager
def group_signal(drill: Drill) -> Iterator[None]:
    """The whole group is told to end, as `timeout` and a shell do; then a new server starts."""
    os.killpg(drill.api.pid, signal.SIGTERM)
    yield


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (killed, stopped, no_descriptors, model_gone, disk_full, read_only, group_signal)
}


@dataclass
class Tally:
    """What the rounds of one fault brought."""

    ends: Counter[str] = field(default_factory=Counter)  # whole, error, abort; cut and hung are wrong
    end_seconds: list[float] = field(default_factory=list)  # from the fault to the end of the last stream
    serving_seconds: list[float] = field(default_factory=list)  # from the fault to the next answer
    worker_seconds: list[float] = field(default_factory=list)  # of CPU, of the new worker until then

    @property
    def is_good(self) -> bool:
        """Whether every request ended as it should and the server was back in time."""
        return not self.ends["cut"] + self.ends["hung"] and max(self.serving_seconds) < SERVING_SECONDS


class Stream:
    """One streamed completion over a plain socket."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()

    async def run(self, port: int) -> str:
        """How it ended: whole, error, abort, or cut where the connection broke off without a word."""
        body = {"model": "default", "prompt": [3, 1, 4], "max_tokens": NUM_TOKENS, "ignore_eos": True}
        # Ids, lest the first frame of a model without a tokenizer come at the end.
        content = json.dumps({**body, "stream": True, "return_token_ids": True}).encode()
        head = ["Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(content)}"]
        lines = ["POST /v1/completions HTTP/1.1", *head, "Connection: close", "", ""]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write("\r\n".join(lines).encode() + content)
        tail = b""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                tail = (tail + data)[-4096:]
                if b"data: {" in tail and b'"error"' not in tail:
                    self.has_begun.set()
        writer.close()
        words = {
            b'"finish_reason":"length"': "whole",
            b'"error"': "error",
            b'"finish_reason":"abort"': "abort",
        }
        return next((end for word, end in words.items() if word in tail), "cut")


async def run_round(drill: Drill, fault: Fault, tally: Tally) -> None:
    """Streams, the fault, the ends of the streams, the next answer."""
    streams = [Stream() for _ in range(NUM_STREAMS)]
    tasks = [asyncio.create_task(stream.run(drill.server.port)) for stream in streams]
    begun = [asyncio.create_task(stream.has_begun.wait()) for stream in streams]
    _, late = await asyncio.wait(begun, timeout=END_SECONDS)
    if late:
        raise TimeoutError(f"{len(late)} of {NUM_STREAMS} streams have not begun in {END_SECONDS} s")
    with contextlib.ExitStack() as stack:
        struck = time.monotonic()
        await asyncio.to_thread(stack.enter_context, fault(drill))
        done, hung = await asyncio.wait(tasks, timeout=END_SECONDS)
        tally.end_seconds.append(time.monotonic() - struck)
        tally.ends.update(task.result() for task in done)
        tally.ends["hung"] += len(hung)
        for task in hung:
            task.cancel()
        if fault is group_signal:
            await asyncio.to_thread(drill.server.process.wait, END_SECONDS)
            struck = time.monotonic()
            await asyncio.to_thread(drill.start)
        await asyncio.to_thread(answer, drill.server)
        tally.serving_seconds.append(time.monotonic() - struck)
        tally.worker_seconds.append(sum(drill.worker.cpu_times()[:2]))


def answer(server: ServerProcess) -> None:
    """Asks until there is an answer; raises OSError if there is none for long."""
    deadline = time.monotonic() + END_SECONDS
    while True:
        try:
            server.post("/v1/completions", {"model": "default", "prompt": [1], "max_tokens": 2})
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a file system of a megabyte; says whether that could be done."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SCRATCH_BYTES}", "tmpfs", str(folder)]
    is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def run_fault(name: str, args: argparse.Namespace, progress: "tqdm[None]") -> Tally:
    """All rounds of one fault, with a server of its own."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="drill-") as place:
        scratch, model = Path(place, "scratch"), Path(place, "model")
        scratch.mkdir()
        prepare_model(model, args.model)
        with small_disk(scratch) as is_mounted:
            log = (scratch if name == "disk_full" else Path(place)) / "log"
            drill = Drill(model, scratch, log, args.server_flags.split(), is_mounted=is_mounted)
            drill.start()
            try:
                for _ in range(args.rounds):
                    asyncio.run(run_round(drill, FAULTS[name], tally))
                    progress.update()
            finally:
                drill.stop()
    return tally


def prepare_model(folder: Path, source: Path | None) -> None:
    """A copy in links, which the drill may take away; without a source a tiny model with random weights."""
    if source is None:
        write(folder, TINY, torch.float32)
    else:
        shutil.copytree(
            source, folder, copy_function=lambda file, link: os.symlink(Path(file).resolve(), link)
        )


HEADINGS = ("fault", "rounds", "whole", "error", "abort", "cut", "hung", "ended", "serving", "longest", "cpu")


def report(tallies: dict[str, Tally]) -> None:
    """Prints a table; `ended`, `serving` (a median) and `longest` are seconds after the fault.

    `cpu` is how much of that (a median) the new worker computed: on a busy machine the rest is waiting.
    """
    print("".join(f"{heading:>9}" if i else f"{heading:<16}" for i, heading in enumerate(HEADINGS)))
    for name, tally in tallies.items():
        counts = [len(tally.end_seconds), *(tally.ends[end] for end in HEADINGS[2:7])]
        again = tally.serving_seconds
        cpu = statistics.median(tally.worker_seconds)
        seconds = [max(tally.end_seconds), statistics.median(again), max(again), cpu]
        row = [f"{count:>9}" for count in counts] + [f"{second:>9.1f}" for second in seconds]
        print(f"{name:<16}" + "".join(row) + ("" if tally.is_good else "  WRONG"))


@reporting("python -m bench.fault_drill")
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fault_drill",
        description="Faults under load: does every request end, is it served again?",
    )
    parser.add_argument("--rounds", type=int, default=50, help="of each fault; default: 50")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all")
    parser.add_argument(
        "--model", type=Path, help="folder of a checkpoint; default: a tiny one, made on the spot"
    )
    parser.add_argument("--server-flags", default="", help="more options of the server, in one string")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    with tqdm(total=args.rounds * len(args.faults), unit="round") as progress:
        tallies = {}
        for name in args.faults:
            progress.set_description(name)
            tallies[name] = run_fault(name, args, progress)
    report(tallies)
    if args.json:
        args.json.write_text(json.dumps({name: vars(tally) for name, tally in tallies.items()}) + "\n")
    return int(not all(tally.is_good for tally in tallies.values()))


if __name__ == "__main__":
    raise SystemExit(main())
