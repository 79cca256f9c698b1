"""This project's engine as a peer of `bench.peers`: `python -m bench.peer_ours MODEL THREADS REQUESTS`."""

import sys

from bench.peer_jobs import Figures, Job, Watch, answer_jobs
from model.options import WorkerOptions
from model.protocol import GenerationRequest, SamplingParams
from model.worker.build import build_engine


class Ours:
    """The engine as it is served: its own policy, its own row budget."""

    def __init__(self, model: str, threads: int, requests: int) -> None:
        self._engine = build_engine(
            WorkerOptions(model_path=model, threads=threads, max_num_seqs=requests, prefix_caching=False)
        )

    def run(self, job: Job) -> Figures:
        """Does the job with this project's engine."""
        watch = Watch()
        for index, prompt in enumerate(job.token_ids):
            self._engine.add(
                GenerationRequest(
                    request_id=str(index),
                    prompt_token_ids=prompt,
                    max_tokens=job.max_tokens,
                    sampling=SamplingParams(temperature=0.0),
                    ignore_eos=True,
                )
            )
        while self._engine.has_requests:
            for event in self._engine.step():
                watch.count(len(event.token_ids))
        return watch.figures()


if __name__ == "__main__":
    answer_jobs(Ours(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).run)
