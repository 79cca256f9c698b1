"""transformers' `generate` as a peer of `bench.peers`: `python -m bench.peer_transformers MODEL THREADS`.

Our model unrolled, as engines without loops run it: a Llama of prelude + loops x block layers whose loops
share one block's weights in memory. Llama has no adapter between loops and puts its norms elsewhere: the
time is that of such a model, the text is not ours.
"""

import sys

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.peer_jobs import Figures, Job, Watch, answer_jobs
from model.checkpoint.loader import load_model
from model.network.layers import GatedMLP, Layer
from model.network.looped import LoopedTransformer


def unrolled(model: LoopedTransformer) -> LlamaForCausalLM:
    """A Llama whose layers hold our layers' weights, those of the block once for each loop."""
    config = model.config
    order = [*config.prelude, *[*config.block] * config.num_loops, *config.coda]
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=len(order),
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=True,
        )
    ).eval()
    llama.model.embed_tokens.weight = model.embedding.weight
    llama.lm_head.weight = model.embedding.weight
    pieces = {index: _pieces(model.layers[index]) for index in range(config.num_layers)}
    for layer, index in zip(llama.model.layers, order, strict=True):
        for name, weight in pieces[index].items():
            layer.get_submodule(name).weight = weight
    return llama


def _pieces(layer: nn.Module) -> dict[str, nn.Parameter]:
    assert isinstance(layer, Layer)
    assert isinstance(layer.mlp, GatedMLP)
    attention, mlp = layer.attn, layer.mlp
    kv_size = attention.num_kv_heads * attention.head_dim
    sizes = [attention.num_heads * attention.head_dim, kv_size, kv_size]
    q, k, v = attention.qkv_proj.weight.split(sizes)
    gate, up = mlp.gate_up_proj.weight.chunk(2)
    named = {
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "self_attn.o_proj": attention.o_proj.weight,
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": mlp.down_proj.weight,
    }
    return {name: nn.Parameter(weight, requires_grad=False) for name, weight in named.items()}


class _Counter(BaseStreamer):
    """Counts what `generate` writes; its first call brings the prompt."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._is_prompt = watch, True

    def put(self, value: torch.Tensor) -> None:
        """Takes in one token for each request."""
        if not self._is_prompt:
            self._watch.count(value.numel())
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is held back."""


class Transformers:
    """`generate` over the unrolled model, in fp32: on a CPU without bf16 products its fastest."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = unrolled(load_model(folder, "cpu", torch.float32).model)

    @torch.inference_mode()
    def run(self, job: Job) -> Figures:
        """Does the job. Shorter prompts are filled up on the left."""
        watch = Watch()
        longest = max(len(prompt) for prompt in job.token_ids)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in job.token_ids])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in job.token_ids])
        streamer = _Counter(watch) if len(ids) == 1 else None  # it takes no batch
        result = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=job.max_tokens,
            min_new_tokens=job.max_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        )
        if streamer is None:
            watch.count(result[:, longest:].numel())
        return watch.figures()


if __name__ == "__main__":
    answer_jobs(Transformers(sys.argv[1], int(sys.argv[2])).run)
