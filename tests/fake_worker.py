"""A worker without a model, for tests of the supervisor: `python -m tests.fake_worker DESCRIPTOR`.

The file that `model_path` names says what becomes of each worker, one word a line; the last line holds for
all that follow. A loaded worker does what the id of a request says; ids without a meaning are answered.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from model.options import WorkerOptions
from model.protocol import GenerationRequest, SamplingParams, TokenEvent
from model.worker import main as worker
from model.worker.messages import Events, Failed, Ready, Submit
from tests.fake_engine import INFO

UNTIL_CLOSED = "import select, sys; p = select.poll(); p.register(int(sys.argv[1]), 0); p.poll()"
COMMAND = (sys.executable, "-P", "-m", "tests.fake_worker")


def fate(file: Path) -> str:
    """What is to become of this worker."""
    starts = file.with_suffix(".starts")
    number = len(starts.read_text()) if starts.exists() else 0
    starts.write_text("x" * (number + 1))
    fates = file.read_text().split()
    return fates[min(number, len(fates) - 1)]


def num_starts(file: Path) -> int:
    """How many workers have read their fate."""
    starts = file.with_suffix(".starts")
    return len(starts.read_text()) if starts.exists() else 0


def load(channel: worker.Channel, word: str, prices: bytes) -> None:
    if word == "linger":  # says no more, but stays
        channel._socket.close()
        time.sleep(1000)
    threading.Thread(target=channel.leave_at_its_end, daemon=True).start()
    if word == "die":
        os._exit(3)
    if word == "refuse":
        channel.send(Failed("no such model"))
        os._exit(worker.LOAD_FAILURE_EXIT)
    if word == "hang":
        time.sleep(1000)
    channel.send(Ready(INFO, prices + b"+"))
    if word == "die_when_ready":
        os._exit(3)


def answer(channel: worker.Channel, request: GenerationRequest) -> None:
    name = request.request_id
    if name == "die":
        os._exit(3)
    if name == "hang":
        time.sleep(1000)
    if name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == "nonsense":
        channel._socket.sendall(b"\xff" * 100)
        time.sleep(1000)
    if name == "orphan":  # leaves a child that holds the socket open
        descriptor = channel._socket.fileno()
        subprocess.Popen([sys.executable, "-c", UNTIL_CLOSED, str(descriptor)], pass_fds=[descriptor])
        os._exit(3)
    if name == "wait":
        return
    end = TokenEvent(request_id=name, token_ids=[5], finish_reason="stop")
    channel.send(Events([end, end] if name == "twice" else [TokenEvent(request_id="stranger"), end]))


def main() -> None:
    worker.ignore_parents_signals()
    faulthandler.register(worker.REPORT_SIGNAL)
    channel = worker.Channel(int(sys.argv[1]))
    options = next(channel.receive(None))
    assert isinstance(options, WorkerOptions)
    load(channel, fate(Path(options.model_path)), options.prices)
    while True:
        for message in channel.receive(0.05):
            if isinstance(message, Submit):
                answer(channel, message.request)
        channel.send(Events([]))


def request(request_id: str) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id, prompt_token_ids=[1], max_tokens=1, sampling=SamplingParams()
    )


if __name__ == "__main__":
    main()
