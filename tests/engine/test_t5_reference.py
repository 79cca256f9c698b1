"""T5 at any size that its config allows, with loops, against transformers' own class unrolled, in fp64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

from model import LoadedModel, load_model
from model.checkpoint.loader import CheckpointError, save_checkpoint
from tests.loose import Json

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
VOCABULARY = 23
SMALL: dict[str, Json] = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 10,
    "num_heads": 2,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "tie_word_embeddings": True,
    "decoder_start_token_id": 0,
}


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Json]:
    """The keys of a config.json that T5 and t5_loop share."""
    buckets = draw(st.integers(4, 40))
    return {
        "vocab_size": VOCABULARY,
        "d_model": draw(st.integers(1, 6)) * 4,
        "d_kv": draw(st.integers(1, 9)),
        "d_ff": draw(st.integers(1, 20)),
        "num_heads": draw(st.integers(1, 4)),
        "num_layers": draw(st.integers(1, 3)),
        "num_decoder_layers": draw(st.integers(1, 3)),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": draw(st.integers(buckets // 2 + 1, 60)),
        "feed_forward_proj": draw(st.sampled_from(["relu", "gated-gelu", "gelu", "silu", "gated-silu"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-3, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "decoder_start_token_id": draw(st.integers(0, 3)),
    }


def unrolled(shape: dict[str, Json], loops: int, seed: int) -> T5ForConditionalGeneration:
    """transformers' model whose decoder layer i is layer i mod N; random weights, far from trivial."""
    layers = shape["num_decoder_layers"]
    options = {**shape, "num_decoder_layers": layers * loops, "attn_implementation": "eager"}
    model: T5ForConditionalGeneration = T5ForConditionalGeneration(T5Config(**options)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif "relative" not in name:
                noise = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(noise.float())
        blocks = model.decoder.block
        for index in range(layers, layers * loops):
            own = blocks[index % layers].state_dict()
            blocks[index].load_state_dict({k: v for k, v in own.items() if "relative" not in k})
    return model


def on_disk(
    folder: Path, model: T5ForConditionalGeneration, shape: dict[str, Json], loops: int
) -> LoadedModel:
    """The same as a t5_loop checkpoint, loaded in fp64 but for what is fp32 in both."""
    layers, tied = shape["num_decoder_layers"], shape["tie_word_embeddings"]
    looped = {"architectures": ["T5LoopForConditionalGeneration"], "num_decoder_loops": loops}
    (folder / "config.json").write_text(json.dumps({**shape, **looped, "model_type": "t5_loop"}))
    tensors = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        is_repeated = name.startswith("decoder.block.") and int(parts[2]) >= layers
        if not (is_repeated or "embed_tokens" in name or (tied and name == "lm_head.weight")):
            tensors[name] = tensor.float().clone()
    save_file(tensors, folder / "model.safetensors")
    loaded = load_model(folder)
    loaded.model.double()
    return loaded


@few
@given(
    shapes(),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=70),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=0, max_size=70),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_logits_at_every_depth_are_those_of_transformers_unrolled(
    tmp_path_factory: pytest.TempPathFactory,
    shape: dict[str, Json],
    source: list[int],
    text: list[int],
    loops: int,
    seed: int,
) -> None:
    ids = [shape["decoder_start_token_id"], *text]
    for depth in range(1, loops + 1):
        reference = unrolled(shape, depth, seed)
        loaded = on_disk(tmp_path_factory.mktemp("t5"), reference, shape, depth)
        with torch.no_grad():
            wanted = reference(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids])).logits
        found = loaded.logits(ids, encoder_ids=source)
        np.testing.assert_allclose(found.numpy(), wanted[0].numpy(), atol=5e-4, rtol=1e-4)


def test_a_padded_batch_is_each_source_alone(tmp_path: Path) -> None:
    """What training does: sources of different length side by side."""
    shape = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 12,
        "num_heads": 3,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
    }
    loaded = on_disk(tmp_path, unrolled(shape, 2, 1), shape, 2)
    sources, text = [[4, 5, 6, 7, 8, 1], [9, 1]], [0, 3, 2]
    padded = torch.tensor([sources[0], sources[1] + [7] * 4])
    seen = torch.arange(6) < torch.tensor([[6], [2]])
    states = loaded.model.depths(torch.tensor([text, text]), source=loaded.model.encode(padded, seen))
    together = loaded.model.whole_readout(states[-1])
    for row, source in zip(together, sources, strict=True):
        alone = loaded.logits(text, encoder_ids=source)
        np.testing.assert_allclose(row.numpy(), alone.numpy(), atol=1e-5)


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    shape: dict[str, Json] = {
        "vocab_size": VOCABULARY,
        "d_model": 8,
        "d_kv": 3,
        "d_ff": 10,
        "num_heads": 2,
        "num_layers": 1,
        "num_decoder_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    first = on_disk(tmp_path, unrolled(shape, 3, 2), shape, 3)
    save_checkpoint(first.model, tmp_path / "again", torch.float32)
    second = load_model(tmp_path / "again")
    assert second.config == first.config
    wanted = first.logits([0, 1, 2], encoder_ids=[5, 6])
    np.testing.assert_allclose(second.logits([0, 1, 2], encoder_ids=[5, 6]).numpy(), wanted, atol=1e-4)


def test_a_source_is_asked_for_where_it_is_needed(tmp_path: Path) -> None:
    shape = SMALL
    loaded = on_disk(tmp_path, unrolled(shape, 1, 2), shape, 1)
    with pytest.raises(ValueError, match="needs encoder_ids"):
        loaded.logits([0])
    with pytest.raises(ValueError, match="0 tokens given"):
        loaded.logits([0], encoder_ids=[])
    with pytest.raises(ValueError, match="token id 23 is not in the vocabulary"):
        loaded.logits([0], encoder_ids=[23])


def test_the_first_checkpoints_copies_are_dropped_and_strangers_refused(tmp_path: Path) -> None:
    """t5-small stores `shared` three times and a bias that nothing reads."""
    shape = SMALL
    reference = unrolled(shape, 1, 2)
    wanted = on_disk(tmp_path, reference, shape, 1).logits([0], encoder_ids=[5])
    tensors = {
        name: tensor.float().clone()
        for name, tensor in reference.state_dict().items()
        if name != "lm_head.weight"
    }
    stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[stray] = torch.zeros(32, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    raw = {**shape, "architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    plain = load_model(tmp_path)
    assert plain.config.family == "t5"
    np.testing.assert_allclose(plain.logits([0], encoder_ids=[5]).numpy(), wanted, atol=1e-4)
    save_file({**tensors, "decoder.block.7.other": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: decoder\.block\.7\.other"):
        load_model(tmp_path)
