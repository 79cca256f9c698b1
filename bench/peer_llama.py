"""The peer llama.cpp of `bench.peers`, by xllamacpp: `python -m bench.peer_llama GGUF THREADS REQUESTS`.

With `ids` behind them the model has our tokenizer, and gets a job's token ids, not its texts. Runs in the
environment that scripts/peers makes, with nothing else of this project installed.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

from bench.peer_jobs import Figures, Job, Watch, answer_jobs

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # of SmolLM2
CONTEXT = 1024  # positions of a request


class Llama:
    """A llama.cpp server without its sockets."""

    def __init__(self, file: str, threads: int, requests: int, by: str = "texts") -> None:
        self._takes_texts = by == "texts"
        parameters = xllamacpp.CommonParams()
        parameters.model.path = file
        parameters.n_ctx = CONTEXT * requests
        parameters.n_parallel = requests
        parameters.cpuparams.n_threads = threads
        parameters.cpuparams_batch.n_threads = threads
        parameters.cache_ram_mib = 0
        parameters.verbosity = -1
        self._server = xllamacpp.Server(parameters)
        self._pool = ThreadPoolExecutor(requests)

    def run(self, job: Job) -> Figures:
        """Does the job; a piece of a stream is a token."""
        watch = Watch()
        texts = [TEMPLATE.format(text) for text in job.texts] if self._takes_texts else []
        prompts = texts or job.token_ids

        def one(prompt: str | list[int]) -> None:
            body = {
                "prompt": prompt,
                "n_predict": job.max_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "cache_prompt": False,
            }

            def note(piece: dict[str, Any]) -> bool:
                if "error" in piece:
                    raise RuntimeError(str(piece))
                watch.count(0 if piece["choices"][0]["finish_reason"] else 1)
                return False

            self._server.handle_completions(body, note)

        for result in [self._pool.submit(one, prompt) for prompt in prompts]:
            result.result()
        return watch.figures()


if __name__ == "__main__":
    answer_jobs(Llama(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]).run)
