"""Distillation on tiny shapes: an exact cut of the vocabulary, an aligned teacher, resumable slices."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.questions import QUESTIONS
from cli import main as cli
from model import load_model
from model.checkpoint.families import llama
from tests.tiny_models import tiny_model
from training.distill import labels as labelling
from training.distill import main
from training.distill.batch import BatchWriter, Written
from training.distill.data import Heads, batches, save_shard
from training.distill.generate import Generation, Writer, turn
from training.distill.labels import Labeller
from training.distill.primer import primer
from training.distill.pruning import Pruner
from training.distill.questions import QuestionBank, load_questions
from training.distill.recipe import load_distill_recipe
from training.distill.student import student_from_teacher
from training.distill.teacher import halves_from_pairs
from training.distill.vocabulary import VocabularyError, cut_tokenizer, encode, pieces_of
from training.reporting import USAGE_ERROR
from training.trainer import read_log

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "the rain in spain stays mainly in the plain, and the train to the mountain waits in the rain. "
FULL, CUT = 297, 276

RECIPE = """
shards = 3
teacher_layers = [0, 1, 3]
primer_share = 0.2
tokens_per_step = 128
matrix_learning_rate = 0.01
other_learning_rate = 0.005
weight_decay = 0.0
seed = 3
[generation]
system = "Be kind."
texts_per_shard = 40
share_of_continuations = 0.25
share_of_bank = 0.5
share_of_two_turns = 0.5
temperature = 1.0
answer_temperatures = [0.0, 1.0]
max_question = 12
max_answer = 16
max_continuation = 24
min_distinct = 0.1
[model]
family = "raven"
num_prelude_layers = 1
input_injection = true
initial_state_std = 0.1
vocab_size = 276
hidden_size = 32
intermediate_size = 48
num_heads = 4
num_kv_heads = 2
head_dim = 8
num_block_layers = 2
num_loops = 3
max_positions = 1024
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
def teacher_folder(full: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def written(full: Tokenizer, teacher_folder: Path, tmp_path: Path) -> Path:
    """Shards of conversations about the rain, as a teacher would write them, and labelled by it."""
    rng = np.random.default_rng(0)
    words = TEXT.split()

    def talk() -> list[int]:
        said = [" ".join(rng.choice(words, 8)) for _ in range(2)]
        text = f"<|im_start|>user\n{said[0]}<|im_end|>\n<|im_start|>assistant\n{said[1]}<|im_end|>\n"
        return full.encode(text).ids

    for number in range(3):
        save_shard(tmp_path / "run" / "texts", number, [talk() if i % 5 != 1 else [] for i in range(60)])
    assert _run("label", tmp_path / "run", teacher_folder, tmp_path) == 0
    return tmp_path / "run"


def test_the_cut_encoding_is_that_of_the_full_tokens_one_by_one(full: Tokenizer) -> None:
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


def test_a_cut_that_loses_a_byte_is_refused(full: Tokenizer) -> None:
    with pytest.raises(VocabularyError, match="200 tokens"):
        cut_tokenizer(full, 200)


@pytest.mark.parametrize("start", ["<|im_start|>", "<|endoftext|>"])
def test_labels_are_the_teachers_distribution_of_the_text_so_far_summed_over_first_pieces(
    full: Tokenizer, teacher_folder: Path, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Position by position against a teacher that reads the system prompt and the text's own tokens."""
    monkeypatch.setattr(labelling, "LIKELIEST", likeliest := 200)  # of a teacher that holds all for likely
    cut, loaded = cut_tokenizer(full, CUT), load_model(teacher_folder)
    pieces = pieces_of(full, cut)
    system = turn(full, "system", "Be kind.")
    begin = full.token_to_id("<|im_start|>")
    assert begin is not None
    labeller = Labeller(loaded.model, pieces, system, begin)
    text = full.encode(start + "the train waits in the mountain, it stays").ids
    short = full.encode("<|endoftext|>rain").ids
    labels, _ = labeller.labels([np.asarray(each, dtype=np.uint16) for each in (text, short)])
    encoded = encode(np.asarray(text, dtype=np.uint16), pieces)
    assert labels.ids.shape == (len(encoded.ids) - 1, likeliest)
    unknown = 0
    for place, (ids, probabilities) in enumerate(zip(labels.ids, labels.probabilities, strict=True)):
        owner, target = encoded.owner[place : place + 2]
        if owner == target:
            unknown += 1
            assert not probabilities.any()
            continue
        read = [*(system if start == "<|im_start|>" else []), *text[:target]]
        wanted = torch.zeros(CUT).index_add_(
            0, torch.from_numpy(pieces.first), loaded.logits(read)[-1].softmax(-1)
        )
        best = wanted.topk(likeliest).values
        got = torch.from_numpy(probabilities.astype(np.float32))
        torch.testing.assert_close(got, best / best.sum(), rtol=5e-3, atol=1e-4)
        torch.testing.assert_close(wanted[ids.astype(np.int64)], best, rtol=1e-3, atol=1e-5)
    assert 2 < unknown < len(labels.ids) - 4


def test_a_batch_writes_what_each_prompt_alone_would_get(teacher_folder: Path) -> None:
    """Greedy, prompts of many lengths, most ended early, against the slow forward pass."""
    loaded = load_model(teacher_folder)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, FULL, int(rng.integers(1, 9))).tolist() for _ in range(11)]

    def alone(prompt: list[int], stops: frozenset[int]) -> Written:
        tokens: list[int] = []
        while len(tokens) < 12:
            token = int(loaded.logits([*prompt, *tokens])[-1].argmax())
            if token in stops:
                return Written(tokens, True)
            tokens.append(token)
        return Written(tokens, False)

    endless = [alone(prompt, frozenset()) for prompt in prompts]
    stops = frozenset(each.tokens[index % 9] for index, each in enumerate(endless) if index % 4)
    written = BatchWriter(loaded.model, stops, rows=4).write(prompts, 12, [0.0] * 11, 0)
    assert written == [alone(prompt, stops) for prompt in prompts]
    assert sum(each.ended for each in written) > 3
    warm = BatchWriter(loaded.model, frozenset(), rows=4)
    mixed = [warm.write(prompts, 12, [0.0, 5.0] * 5 + [0.0], seed) for seed in (3, 3, 4)]
    assert mixed[0] == mixed[1] != mixed[2]
    assert [each.tokens for each in mixed[0][::2]] == [each.tokens for each in endless[::2]]


def test_the_writer_keeps_whole_turns_and_sentences(full: Tokenizer) -> None:
    bank = QuestionBank(("rain in spain?", "the train?"), ("the", "mountain"), frozenset({"the in the"}))
    settings = Generation("Be kind.", 90, 0.2, 0.5, 0.5, 1.0, (0.0,), 8, 8, 12, min_distinct=0.5)
    words = [full.encode(" " + word).ids[0] for word in ("stays", "rain", "spain", "waits", "mainly")]
    stop, the = full.encode(".").ids[0], full.encode(" in the").ids

    def scripted(
        prompts: Sequence[object], most: int, temperatures: Sequence[float], seed: int
    ) -> list[Written]:
        """By turns: a text that ends, one that is cut behind a sentence, one without a sentence, a circle."""
        assert len(temperatures) == len(prompts)
        kinds = [
            Written(words[:4], True),
            Written([*words[:2], stop, *words[2:]][:most], False),
            Written(words * 2, False),
            Written([words[0]] * most, True),
            Written(the, True),
        ]
        return [kinds[(index + seed) % 5] for index in range(len(prompts))]

    texts = Writer(scripted, full, settings, bank).shard(0)
    assert (
        texts
        == Writer(scripted, full, settings, bank).shard(0)
        != Writer(scripted, full, settings, bank).shard(1)
    )
    said = [full.decode(text, skip_special_tokens=False) for text in texts if text]
    talks = [text for text in said if text.startswith("<|im_start|>user\n")]
    assert {text.count("<|im_start|>assistant") for text in talks} == {1, 2}
    for text in talks:
        assert text.endswith("<|im_end|>\n")
        assert "Be kind" not in text
        assert "user\nthe in the<|im_end|>" not in text
        turns = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>")[1:]]
        assert all(turn.split("\n", 1)[1].strip() for turn in turns)
        assert not any("stays stays stays" in turn for turn in turns[1::2])
        assert all(turn.endswith((".", "waits", "the")) for turn in turns[1::2])
    plain = [text for text in said if text.startswith("<|endoftext|>")]
    assert len(plain) > 3
    assert all(text.endswith("<|endoftext|>") for text in plain)
    assert 30 < len(said) < 90


def test_no_question_of_the_twenty_is_taught() -> None:
    bank = load_questions()
    assert not any(bank.may_ask(question) for question in QUESTIONS)
    assert all(map(bank.may_ask, bank.whole))
    exchanges = primer()
    assert len(exchanges) == len(set(exchanges)) > 1000
    assert all(bank.may_ask(exchange.question) for exchange in exchanges)
    assert not bank.may_ask("hello how ARE you")


def test_answers_are_what_the_assistant_says(full: Tokenizer) -> None:
    cut = cut_tokenizer(full, CUT)
    heads = Heads(cut, "<|im_start|>", "<|im_end|>")
    talk = [("user", "rain"), ("assistant", "the train"), ("user", "in"), ("assistant", "spain.")]
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in talk)
    ids = np.asarray(cut.encode(text).ids, dtype=np.uint16)
    answers = cut.decode(ids[heads.answers(ids)].tolist(), skip_special_tokens=False)
    assert answers == "the train<|im_end|>spain.<|im_end|>"
    assert heads.answers(np.asarray(cut.encode("<|endoftext|>rain").ids, dtype=np.uint16)).all()


def test_batches_hold_every_text_once_and_few_enough_tokens() -> None:
    lengths = np.random.default_rng(0).integers(5, 90, 300)
    made = list(batches(lengths, 400, np.random.default_rng(1)))
    assert sorted(np.concatenate(made).tolist()) == list(range(300))
    assert all(len(part) * lengths[part].max() <= 400 for part in made)
    assert sum(len(part) * lengths[part].max() for part in made) < 1.4 * lengths.sum()
    assert [part.tolist() for part in made] != [
        part.tolist() for part in batches(lengths, 400, np.random.default_rng(2))
    ]
    assert [len(part) for part in batches(np.asarray([500, 500]), 400, np.random.default_rng(0))] == [1, 1]


def test_a_student_is_its_teachers_layers_and_at_first_every_loop_computes_the_same(
    teacher_folder: Path, tmp_path: Path
) -> None:
    recipe = load_distill_recipe(_recipe(tmp_path)).training
    teacher = load_model(teacher_folder).model
    student = student_from_teacher(recipe, teacher, (0, 1, 3))
    ids = torch.randint(CUT, (1, 9), generator=torch.Generator().manual_seed(0))
    readouts = [student.whole_readout(state) for state in student.depths(ids)]
    for readout in readouts[1:]:
        torch.testing.assert_close(readout, readouts[0])
    pruned = Pruner(teacher, [ids[0].numpy().astype(np.uint16)])
    logits = torch.cat((readouts[0], torch.full((1, 9, FULL - CUT), -torch.inf)), -1)[0, :-1]
    hidden = student.whole_finish(student.depths(ids)[0])[0, :-1]
    full_logits = hidden @ teacher.head.weight.t()
    torch.testing.assert_close(full_logits[:, :CUT], logits[:, :CUT])
    wanted = torch.nn.functional.cross_entropy(full_logits, ids[0, 1:])
    assert pruned.loss([0, 1, 3]) == pytest.approx(wanted.item(), rel=1e-5)
    with pytest.raises(ValueError, match="3 of the teacher's 4 layers"):
        student_from_teacher(recipe, teacher, (0, 1))


def test_the_layer_that_costs_least_goes_first(teacher_folder: Path, full: Tokenizer) -> None:
    pruner = Pruner(load_model(teacher_folder).model, [np.asarray(full.encode(TEXT).ids, dtype=np.uint16)])
    removed = list(pruner.removals())
    assert len(removed) == 3
    left = list(range(4))
    for layer, loss in removed:
        assert loss == min(pruner.loss([each for each in left if each != without]) for without in left)
        left.remove(layer)


def test_generated_trained_and_exported_in_slices_equals_in_one(
    teacher_folder: Path, written: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    (whole / "texts").mkdir(parents=True)
    for shard in (written / "texts").glob("*.npz"):
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
    assert (config["model_type"], config["eos_token_id"]) == ("huginn_raven", [2, 0])
    assert config["quantization_config"]["format"] == "int-quantized"
    assert "chat_template" in json.loads((whole / "model" / "tokenizer_config.json").read_text())
    assert "Apache-2.0" in (whole / "model" / "README.md").read_text()
    assert "Apache License" in (whole / "model" / "NOTICE").read_text()
    assert json.loads((whole / "model" / "generation_config.json").read_text())["temperature"] < 1


def test_generation_goes_on_where_it_stopped(teacher_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "new"
    assert _run("generate", run, teacher_folder, tmp_path, minutes=0) == main.UNFINISHED
    first = (run / "texts" / "shard-00000.npz").stat().st_mtime_ns
    assert _run("generate", run, teacher_folder, tmp_path) == 0
    assert (run / "texts" / "shard-00000.npz").stat().st_mtime_ns == first
    assert len(list((run / "texts").glob("shard-*.npz"))) == 3
    assert _run("label", run, teacher_folder, tmp_path, minutes=0) == main.UNFINISHED
    assert _run("label", run, teacher_folder, tmp_path) == 0
    assert len(list((run / "texts").glob("labels-*.npz"))) == 3


def test_texts_without_labels_are_not_trained_on(
    full: Tokenizer, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_shard(tmp_path / "bare" / "texts", 0, [full.encode("<|endoftext|>rain").ids] * 60)
    assert _run("train", tmp_path / "bare", teacher_folder, tmp_path) == USAGE_ERROR
    assert "label the texts first" in capsys.readouterr().err


def test_what_is_not_there_is_one_line(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("train", tmp_path / "empty", teacher_folder, tmp_path) == USAGE_ERROR
    assert _run("export", tmp_path / "empty", tmp_path / "nobody", tmp_path) == USAGE_ERROR
    missing = ["train", "distill", "teacher", str(tmp_path / "gone.whl"), "--output", str(tmp_path / "out")]
    assert cli.main(missing) == USAGE_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("speed train distill: error: ")] == []
    assert ["generate texts first" in lines[0], "nobody" in lines[1], "gone.whl" in lines[2]] == [True] * 3


def test_rotary_pairs_become_halves() -> None:
    """GGUF's order of q and k rows: head 0 holds channels 0, d/2, 1, d/2 + 1, ..."""
    halves = torch.arange(16.0).view(16, 1)
    pairs = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]).repeat(2) + torch.tensor([0] * 8 + [8] * 8)
    assert torch.equal(halves_from_pairs(halves[pairs], 8), halves)


def _recipe(folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE)
    return path


def _run(action: str, run: Path, teacher: Path, tmp_path: Path, minutes: float = 10) -> int:
    parser = argparse.ArgumentParser()
    main.add_arguments(parser)
    options = ["--run", str(run), "--teacher", str(teacher), "--recipe", str(_recipe(tmp_path))]
    options += ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--max-minutes", str(minutes)]
    args = parser.parse_args([action, *options])
    status: int = args.run(args)
    return status
