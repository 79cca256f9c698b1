"""Distillation on tiny shapes: an exact cut of the vocabulary, an aligned teacher, resumable slices."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model import load_model
from model.families import llama
from model.training.distill import main
from model.training.distill.data import read_streams, save_shard
from model.training.distill.generate import Generation, Writer
from model.training.distill.recipe import load_distill_recipe
from model.training.distill.student import Start, student_from_teacher
from model.training.distill.task import DistillTask
from model.training.distill.teacher import halves_from_pairs
from model.training.distill.vocabulary import VocabularyError, cut_tokenizer, encode, pieces_of
from model.training.trainer import read_log
from server import cli
from tests.tiny_models import tiny_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "the rain in spain stays mainly in the plain, and the train to the mountain waits in the rain. "
FULL, CUT = 297, 276

RECIPE = """
shards = 3
start = "average"
tokens_per_step = 64
matrix_learning_rate = 0.01
other_learning_rate = 0.005
weight_decay = 0.0
seed = 3
[generation]
texts_per_shard = 40
share_of_continuations = 0.25
share_of_two_turns = 0.5
temperature = 1.0
answer_temperature = 1.0
max_question = 12
max_answer = 16
max_continuation = 24
min_distinct = 0.1
[model]
family = "nanbeige"
vocab_size = 276
hidden_size = 32
intermediate_size = 48
num_heads = 4
num_kv_heads = 2
head_dim = 8
num_block_layers = 2
num_loops = 3
max_positions = 256
tie_embeddings = true
bos_token_id = 1
eos_token_ids = [2, 0]
[[stages]]
steps = 4
num_loops = 3
sequence_length = 16
rates = [0.5, 1.0]
teacher_weight = 0.9
[[stages]]
steps = 4
num_loops = 3
sequence_length = 32
rates = [1.0, 0.0]
teacher_weight = 0.9
agreement_weight = 0.3
"""


@pytest.fixture(scope="module")
def full() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=FULL, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT * 20], trainer)
    assert tokenizer.get_vocab_size() == FULL
    return tokenizer


@pytest.fixture(scope="module")
def teacher_folder(full, tmp_path_factory) -> Path:
    """A random teacher whose turns end often, as a llama checkpoint."""
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny_model(
        7,
        family="llama",
        vocab_size=FULL,
        num_block_layers=4,
        num_loops=1,
        norm_after_loop=True,
        tie_embeddings=True,
    )
    model.embedding.weight.mul_(0.1)
    config, weights = model.config, model.state_dict()
    stored = {
        name: weights[place.parameter][place.rows(config)].contiguous()
        for name, place in llama.FAMILY.places(config)
        if place and place.parameter in weights and place.parameter != "head.weight"
    }
    save_file(stored, folder / "model.safetensors")
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": FULL,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    full.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def written(full, tmp_path) -> Path:
    """Shards of conversations about the rain, as a teacher would write them."""
    rng = np.random.default_rng(0)
    words = TEXT.split()

    def talk() -> list[int]:
        said = [" ".join(rng.choice(words, 8)) for _ in range(2)]
        text = f"<|im_start|>user\n{said[0]}<|im_end|>\n<|im_start|>assistant\n{said[1]}<|im_end|>\n"
        return full.encode(text).ids

    for number in range(3):
        save_shard(tmp_path / "run" / "texts", number, [talk() if i % 5 != 1 else [] for i in range(100)])
    return tmp_path / "run"


def test_the_cut_encoding_is_that_of_the_full_tokens_one_by_one(full) -> None:
    cut = cut_tokenizer(full, CUT)
    pieces = pieces_of(full, cut)
    for text in (TEXT, "unseen words: zebra, 123\n\té <|im_end|>", "<|im_start|>user\nrain<|im_end|>"):
        tokens = np.asarray(full.encode(text).ids, dtype=np.uint16)
        encoded = encode(tokens, pieces)
        assert encoded.ids.tolist() == cut.encode(text).ids
        assert cut.decode(encoded.ids.tolist(), skip_special_tokens=False) == text
        owned = [encoded.ids[encoded.owner == index].tolist() for index in range(len(tokens))]
        assert owned == [pieces.ids[pieces.starts[t] : pieces.starts[t + 1]].tolist() for t in tokens]
    assert len(cut.encode(TEXT).ids) > len(full.encode(TEXT).ids)


def test_a_cut_that_loses_a_byte_is_refused(full) -> None:
    with pytest.raises(VocabularyError, match="200 tokens"):
        cut_tokenizer(full, 200)


def test_the_teachers_distribution_is_that_of_the_text_so_far_summed_over_first_pieces(
    full, teacher_folder, written, tmp_path
) -> None:
    """Position by position against a teacher that reads the text's own tokens up to the target."""
    recipe = load_distill_recipe(_recipe(tmp_path))
    cut = cut_tokenizer(full, CUT)
    pieces = pieces_of(full, cut)
    stream = read_streams(written / "texts", pieces).train
    loaded = load_model(teacher_folder)
    task = DistillTask(stream, loaded.model, pieces, recipe.training)
    start, length = int(stream.starts[5]), 24
    batch = task.windows(np.asarray([stream.starts[2], start]), length)
    hidden = loaded.model.whole_finish(loaded.model.depths(batch.teacher)[-1]).flatten(0, 1)
    given = task.folded(hidden[batch.rows])[length:]
    assert 3 < int((~batch.known[length:]).sum()) < length - 3
    assert batch.student[1].tolist() == stream.student.ids[start : start + length + 1].tolist()
    for position in range(length):
        if not batch.known[length + position]:
            continue
        text = cut.decode(
            stream.student.ids[start : start + position + 1].tolist(), skip_special_tokens=False
        )
        probabilities = loaded.logits(full.encode(text).ids)[-1].softmax(-1)
        wanted = torch.zeros(CUT)
        for token, probability in enumerate(probabilities.tolist()):
            wanted[int(pieces.first[token])] += probability
        torch.testing.assert_close(given[position], wanted, rtol=1e-3, atol=1e-6)


def test_the_writer_keeps_whole_turns_that_end_and_drops_the_rest(full) -> None:
    settings = Generation(60, 0.2, 0.5, 1.0, 1.0, 8, 8, 12, min_distinct=0.5)
    end = full.token_to_id("<|im_end|>")

    def scripted(requests):
        """Even numbers are polite, 1 of 5 never ends, 1 of 7 repeats itself."""
        events = {}
        for request in requests:
            number, most = int(request.request_id), request.max_tokens
            words = [40 + (number + i) % 100 for i in range(most - 2)]
            words = [50] * most if number % 7 == 0 else words
            ended = number % 5 != 0
            tokens = [*words[: most - 1], end] if ended else (words * 2)[:most]
            events[request.request_id] = [_Event(tokens[:3]), _Event(tokens[3:])]
        return events

    texts = Writer(scripted, full, settings).shard(0)
    assert texts == Writer(scripted, full, settings).shard(0)
    talks = [text for text in texts if text and text[0] == full.token_to_id("<|im_start|>")]
    turns = {full.decode(text, skip_special_tokens=False).count("<|im_start|>assistant") for text in talks}
    assert turns == {1, 2}
    for number, text in enumerate(texts):
        ends = text.count(end)
        assert ends % 2 == 0
        if number % 7 == 0:
            assert not text
        if number % 5 == 0 and ends:
            pytest.fail("a turn without an end was kept")
    assert any(text and text[0] == full.token_to_id("<|endoftext|>") for text in texts)


def test_a_student_starts_from_its_teachers_layers(teacher_folder, tmp_path) -> None:
    recipe = load_distill_recipe(_recipe(tmp_path)).training
    teacher = load_model(teacher_folder).model
    average = student_from_teacher(recipe, teacher, Start.AVERAGE)
    stepwise = student_from_teacher(recipe, teacher, Start.STEPWISE)
    name = "mlp.down_proj.weight"
    given = [teacher.get_parameter(f"layers.{layer}.{name}") for layer in range(4)]
    torch.testing.assert_close(average.get_parameter(f"layers.1.{name}"), (given[1] + given[3]) / 2)
    assert torch.equal(stepwise.get_parameter(f"layers.0.{name}"), given[0])
    assert torch.equal(stepwise.get_parameter(f"layers.1.{name}"), given[3])
    assert torch.equal(stepwise.embedding.weight, teacher.embedding.weight[:CUT])


def test_generated_trained_and_exported_in_slices_equals_in_one(teacher_folder, written, tmp_path) -> None:
    whole = tmp_path / "whole"
    (whole / "texts").mkdir(parents=True)
    for shard in (written / "texts").iterdir():
        (whole / "texts" / shard.name).write_bytes(shard.read_bytes())
    assert _run("train", whole, teacher_folder, tmp_path, minutes=10) == 0
    slices = 0
    while _run("train", written, teacher_folder, tmp_path, minutes=0) == main.UNFINISHED:
        slices += 1
    assert slices > 5
    assert _run("export", whole, teacher_folder, tmp_path) == _run(
        "export", written, teacher_folder, tmp_path
    )
    models = [load_model(folder / "model") for folder in (whole, written)]
    assert torch.equal(models[0].logits([1, 2, 3]), models[1].logits([1, 2, 3]))
    assert len(list(read_log(whole))) == 0  # every twentieth step has an entry
    config = json.loads((whole / "model" / "config.json").read_text())
    assert (config["model_type"], config["skip_loop_final_norm"], config["eos_token_id"]) == (
        "nanbeige",
        True,
        [2, 0],
    )
    assert "chat_template" in json.loads((whole / "model" / "tokenizer_config.json").read_text())
    assert "Apache-2.0" in (whole / "model" / "README.md").read_text()


def test_generation_goes_on_where_it_stopped(teacher_folder, tmp_path) -> None:
    run = tmp_path / "new"
    assert _run("generate", run, teacher_folder, tmp_path, minutes=0) == main.UNFINISHED
    first = (run / "texts" / "shard-00000.npz").stat().st_mtime_ns
    assert _run("generate", run, teacher_folder, tmp_path) == 0
    assert (run / "texts" / "shard-00000.npz").stat().st_mtime_ns == first
    assert len(list((run / "texts").glob("shard-*.npz"))) == 3


def test_what_is_not_there_is_one_line(teacher_folder, tmp_path, capsys) -> None:
    assert _run("train", tmp_path / "empty", teacher_folder, tmp_path) == main.USAGE_ERROR
    assert _run("export", tmp_path / "empty", tmp_path / "nobody", tmp_path) == main.USAGE_ERROR
    missing = ["train", "distill", "teacher", str(tmp_path / "gone.whl"), "--output", str(tmp_path / "out")]
    assert cli.main(missing) == main.USAGE_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("speed train distill: error: ")] == []
    assert ["generate texts first" in lines[0], "nobody" in lines[1], "gone.whl" in lines[2]] == [True] * 3


def test_rotary_pairs_become_halves() -> None:
    """GGUF's order of q and k rows: head 0 holds channels 0, d/2, 1, d/2 + 1, ..."""
    halves = torch.arange(16.0).view(16, 1)
    pairs = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]).repeat(2) + torch.tensor([0] * 8 + [8] * 8)
    assert torch.equal(halves_from_pairs(halves[pairs], 8), halves)


class _Event:
    def __init__(self, tokens) -> None:
        self.token_ids = tokens


def _recipe(folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE)
    return path


def _run(action: str, run: Path, teacher: Path, tmp_path: Path, minutes: float = 10) -> int:
    parser = main.argparse.ArgumentParser()
    main.add_arguments(parser)
    options = ["--run", str(run), "--teacher", str(teacher), "--recipe", str(_recipe(tmp_path))]
    options += ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--max-minutes", str(minutes)]
    args = parser.parse_args([action, *options])
    status: int = args.run(args)
    return status
