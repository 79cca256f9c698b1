"""`python -m bench.encoder_decoder train|measure`: the table of the SPEED paper, small, on one core.

The paper (arXiv 2310.12072) compares T5-like models whose decoders share their layers, 2 x 6 and 4 x 3, with
decoders of 2, 4 and 12 layers of their own. Here each is trained by one recipe on one corpus, functions and
their docstrings (`bench.docstrings`), and then measured on functions of other files, all in one run: loss,
likeness of greedy texts (ROUGE-L), milliseconds a token plain and with speculation, and how often the last
loop corrects the first one's guess. `train` may be stopped and goes on where it was.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from bench.docstrings import END, START, Corpus, Example, encode, read_functions, train_tokenizer
from bench.options import output_file, plot_file, positive, reporting
from model.checkpoint.loader import load_model, save_checkpoint
from model.engine import Engine
from model.network.config import EncoderConfig, LoopedConfig, RelativeBias
from model.network.looped import LoopedTransformer
from model.options import EngineOptions
from model.protocol import GenerationRequest, SamplingParams
from model.schedule.drafts import Experience
from training.pyplot import pyplot

DEFAULT_FOLDER = Path("runs/encoder_decoder")
CORPUS, TOKENIZER, STATE, LOG = "corpus.json", "tokenizer.json", "state.pt", "log.jsonl"
VOCABULARY, WIDTH, HEADS, ENCODER_LAYERS = 2048, 128, 4, 2
BATCH_TOKENS = 3072  # of sources and texts, padded
WARM_UP = 0.05  # of the steps
PEAK_RATE = 2e-3
DRAFT_WEIGHT = 0.3  # of the mean loss of the loops before the last, which make the drafts
BUCKETS = {"below 16": range(16), "16 to 64": range(16, 65), "above 64": range(65, 1000)}
SEED = 3


class Decoder(NamedTuple):
    """One row of the table: so many layers with weights of their own, run so many times."""

    name: str
    layers: int
    loops: int


DECODERS = (
    Decoder("2", 2, 1),
    Decoder("4", 4, 1),
    Decoder("12", 12, 1),
    Decoder("2 x 6", 2, 6),
    Decoder("4 x 3", 4, 3),
)


def config_of(decoder: Decoder) -> LoopedConfig:
    """A T5 of this decoder: ReLU and a tied head, as in the first T5."""
    return LoopedConfig(
        family="t5_loop",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=WIDTH // HEADS,
        num_block_layers=decoder.layers,
        num_loops=decoder.loops,
        max_positions=4096,
        activation="relu",
        gated_mlp=False,
        attention_scale=1.0,
        head_scale=WIDTH**-0.5,
        tie_embeddings=True,
        encoder=EncoderConfig(ENCODER_LAYERS, START),
        relative_bias=RelativeBias(32, 128),
        eos_token_ids=(END,),
    )


# ---- the recipe ------------------------------------------------------------------------------------


def initialise(model: LoopedTransformer) -> None:
    """T5's random weights: scores aren't scaled, so queries begin smaller."""
    config = model.config
    attention = config.num_heads * config.head_dim
    for name, parameter in model.named_parameters():
        if name == "embedding.weight":
            nn.init.normal_(parameter, std=1.0)
        elif name.endswith("relative.weight"):
            nn.init.normal_(parameter, std=config.hidden_size**-0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if name.endswith(("qkv_proj.weight", "q_proj.weight")):
            with torch.no_grad():
                parameter[:attention] *= config.head_dim**-0.5


class Batch(NamedTuple):
    """Padded sources (batch, tokens), which of their tokens are real, texts, and what they are to say."""

    sources: Tensor
    seen: Tensor
    texts: Tensor
    targets: Tensor  # -100 where nothing is to be said

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Batch":
        """Examples side by side."""
        sources = _padded([example.source for example in examples], START)
        lengths = torch.tensor([len(example.source) for example in examples])
        return cls(
            sources,
            torch.arange(sources.shape[1]) < lengths[:, None],
            _padded([[START, *example.text[:-1]] for example in examples], START),
            _padded([example.text for example in examples], -100),
        )


def _padded(rows: list[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def batches(examples: list[Example]) -> list[list[Example]]:
    """All examples in batches of texts of like length, the batches in a fixed random order."""
    made: list[list[Example]] = []
    group: list[Example] = []
    width = 0
    for example in sorted(examples, key=lambda example: (len(example.text) // 4, len(example.source))):
        wanted = max(width, len(example.text) + len(example.source))
        if group and wanted * (len(group) + 1) > BATCH_TOKENS:
            made.append(group)
            group, wanted = [], len(example.text) + len(example.source)
        group.append(example)
        width = wanted
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(SEED)).tolist()
    return [made[index] for index in order]


def losses(model: LoopedTransformer, batch: Batch) -> Tensor:
    """Cross-entropy in nats a token after each loop, (loops,)."""
    source = model.encode(batch.sources, batch.seen)
    targets = batch.targets.flatten()
    states = model.depths(batch.texts, source=source)
    logits = [model.logits(model.finish(state, (), _no_coda)).flatten(0, 1) for state in states]
    return torch.stack([F.cross_entropy(depth, targets) for depth in logits])


def _no_coda(layer: int, *_: Tensor) -> Tensor:
    raise AssertionError(f"layer {layer} attended behind the loops")


@dataclass
class Run:
    """The training of one decoder, in a folder of its own."""

    decoder: Decoder
    folder: Path
    num_steps: int

    def __post_init__(self) -> None:
        torch.manual_seed(SEED)
        self.model = LoopedTransformer(config_of(self.decoder))
        initialise(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0
        if (self.folder / STATE).exists():
            state: dict[str, Any] = torch.load(self.folder / STATE, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    @property
    def is_done(self) -> bool:
        """Whether all steps were taken."""
        return self.step >= self.num_steps

    def go_on(self, order: list[list[Example]], until: float) -> None:
        """Steps until all are taken or the clock says `until`; then writes where it stands."""
        started, before = time.monotonic(), self.seconds
        while not self.is_done and time.monotonic() < until:
            loss = self._step(Batch.of(order[self.step % len(order)]))
            self.step += 1
            self.seconds = before + time.monotonic() - started
            if self.step % 50 == 0:
                self._log(loss)
        self._save()

    def _step(self, batch: Batch) -> Tensor:
        progress = self.step / self.num_steps
        rate = min(1.0, progress / WARM_UP, (1 - progress) / (1 - WARM_UP) + 0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        loss = losses(self.model, batch)
        total = loss[-1] + (DRAFT_WEIGHT * loss[:-1].mean() if len(loss) > 1 else 0.0)
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def _log(self, loss: Tensor) -> None:
        each = [round(value, 4) for value in loss.tolist()]
        entry = {"step": self.step, "seconds": round(self.seconds, 1), "loss": each}
        print(self.decoder.name, json.dumps(entry), flush=True)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.folder / f"{STATE}.partial"
        torch.save(state, partial)
        partial.replace(self.folder / STATE)
        if self.is_done:
            save_checkpoint(self.model, self.folder, torch.float32)


def corpus_of(folder: Path) -> Corpus:
    """The corpus and its tokenizer, made once for a folder."""
    if not (folder / CORPUS).exists():
        train, held_out = read_functions()
        print(f"{len(train)} functions to train on, {len(held_out)} held out", flush=True)
        tokenizer = train_tokenizer(train[::4], VOCABULARY)
        tokenizer.save(str(folder / TOKENIZER))
        made = Corpus(encode(train, tokenizer), encode(held_out, tokenizer))
        (folder / CORPUS).write_text(json.dumps(made))
    parts = json.loads((folder / CORPUS).read_text())
    return Corpus(*([Example(*example) for example in part] for part in parts))


def train(folder: Path, num_steps: int, seconds: float) -> bool:
    """Trains all decoders in turn for so long; whether all are done."""
    until = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    order = batches(corpus_of(folder).train)
    for decoder in DECODERS:
        own = folder / decoder.name.replace(" ", "")
        own.mkdir(exist_ok=True)
        run = Run(decoder, own, num_steps)
        if not run.is_done:
            run.go_on(order, until)
        if not run.is_done:
            return False
    return True


# ---- what is measured ------------------------------------------------------------------------------


class Answer(NamedTuple):
    """One greedy text: its tokens, what it took, and the passes behind its first token."""

    tokens: list[int]
    seconds: float
    passes: int


def held_out_loss(model: LoopedTransformer, examples: list[Example]) -> float:
    """Nats a token at the last depth."""
    total = count = 0.0
    with torch.inference_mode():
        for group in batches(examples):
            tokens = sum(len(example.text) for example in group)
            total += float(losses(model, Batch.of(group))[-1]) * tokens
            count += tokens
    return total / count


def answers(engine: Engine, examples: Sequence[Example], experience: Experience) -> dict[bool, list[Answer]]:
    """Greedy texts one at a time, plain and speculated, in turn who goes first."""
    found: dict[bool, list[Answer]] = {False: [], True: []}
    for index, example in enumerate(examples):
        for speculation in (index % 2 == 0, index % 2 == 1):
            engine.experience = experience if speculation else Experience.none()
            request = GenerationRequest(
                request_id="bench",
                prompt_token_ids=example.source,
                max_tokens=max(BUCKETS["16 to 64"]) * 2,
                sampling=SamplingParams(temperature=0),
                speculation=speculation,
            )
            started = time.perf_counter()
            events = engine.run([request])["bench"]
            seconds = time.perf_counter() - started
            stats = events[-1].stats
            assert stats is not None
            tokens = [token for event in events for token in event.token_ids]
            found[speculation].append(Answer(tokens, seconds, stats.passes))
    return found


def rouge_l(found: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), 0..1."""
    ours, theirs = found.split(), wanted.split()
    longest = [0] * (len(theirs) + 1)
    for word in ours:
        row = [0]
        for place, other in enumerate(theirs):
            row.append(longest[place] + 1 if word == other else max(longest[place + 1], row[-1]))
        longest = row
    return 2 * longest[-1] / max(1, len(ours) + len(theirs))


def in_buckets(examples: list[Example], each: int) -> dict[str, list[Example]]:
    """The first `each` examples of every bucket of text lengths."""
    return {
        name: [example for example in examples if len(example.text) in lengths][:each]
        for name, lengths in BUCKETS.items()
    }


def measure(folder: Path, each: int) -> dict[str, dict[str, Any]]:
    """The table's rows by decoder; all of them are measured in this run, `each` texts a bucket."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    held_out = corpus_of(folder).held_out
    return {decoder.name: _row(folder, decoder, held_out, each, tokenizer) for decoder in DECODERS}


def _row(
    folder: Path, decoder: Decoder, held_out: list[Example], each: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    own = folder / decoder.name.replace(" ", "")
    if not (own / "config.json").exists():
        raise ValueError(f"{own} has no trained model yet: run `python -m bench.encoder_decoder train`")
    model = load_model(own).model
    options = EngineOptions(
        draft_policy="single" if decoder.loops > 1 else "none",
        draft_depths=(1,) if decoder.loops > 1 else None,
        row_budget=64,
        max_num_seqs=1,
        kv_cache_tokens=1024,
        max_model_len=512,
        prefix_caching=False,
    )
    engine, experience = Engine(model, options), Experience.none()
    answers(engine, held_out[:2], Experience.none())  # warms up
    row: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": held_out_loss(model, held_out[: 20 * each]),
    }
    for name, examples in in_buckets(held_out, each).items():
        both = answers(engine, examples, experience)
        row[name] = _figures(both, examples, tokenizer, decoder.loops)
    depths = experience.depths
    if observed := depths.num_observed.get(1, 0):
        row["corrections"] = 1 - depths.num_agreed.get(1, 0) / observed
    return row


def _figures(
    both: dict[bool, list[Answer]], examples: list[Example], tokenizer: Tokenizer, loops: int
) -> dict[str, float]:
    """Of one bucket. Milliseconds a token count everything, the encoder as well."""
    plain, speculated = both[False], both[True]
    tokens = sum(len(answer.tokens) for answer in plain)
    decoded = sum(max(0, len(answer.tokens) - 1) for answer in plain)
    pairs = list(zip(plain, examples, strict=True))
    texts = [(tokenizer.decode(answer.tokens), tokenizer.decode(example.text)) for answer, example in pairs]
    figures = {
        "texts": len(plain),
        "rouge_l": sum(rouge_l(*pair) for pair in texts) / len(texts),
        "exact": sum(found == wanted for found, wanted in texts) / len(texts),
        "tokens": tokens / len(plain),
        "ms_plain": 1000 * sum(answer.seconds for answer in plain) / tokens,
    }
    if loops > 1:
        figures["ms_speed"] = 1000 * sum(answer.seconds for answer in speculated) / tokens
        figures["passes_per_token"] = sum(answer.passes for answer in speculated) / max(1, decoded)
        figures["texts_that_differ"] = sum(
            a.tokens != b.tokens for a, b in zip(plain, speculated, strict=True)
        )
    return figures


def as_table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = ["decoder", "parameters", "loss"]
    heads += [f"{title}, {name}" for title in ("ROUGE-L", "ms a token plain -> SPEED") for name in BUCKETS]
    heads.append("first loop corrected")
    lines = [heads, ["---"] * len(heads)]
    for name, row in rows.items():
        cells = [name, f"{row['parameters']:,}", f"{row['loss']:.3f}"]
        cells += [f"{row[bucket]['rouge_l']:.3f}" for bucket in BUCKETS]
        for bucket in BUCKETS:
            speed = row[bucket].get("ms_speed")
            cells.append(f"{row[bucket]['ms_plain']:.2f}" + ("" if speed is None else f" -> {speed:.2f}"))
        cells.append(f"{row['corrections']:.1%}" if "corrections" in row else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Loss over milliseconds a token, an arrow from plain decoding to SPEED."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, row in rows.items():
        plain = _mean(row, "ms_plain")
        axis.scatter([plain], [row["loss"]], color="tab:blue")
        axis.annotate(name, (plain, row["loss"]), textcoords="offset points", xytext=(6, 4))
        if not math.isnan(speed := _mean(row, "ms_speed")):
            axis.scatter([speed], [row["loss"]], color="tab:orange")
            arrow = {"arrowstyle": "->", "color": "grey"}
            axis.annotate("", (speed, row["loss"]), (plain, row["loss"]), arrowprops=arrow)
    axis.set_xlabel("ms a token, one request (blue: plain, orange: SPEED)")
    axis.set_ylabel("held-out loss, nats a token")
    figure.tight_layout()
    figure.savefig(file)


def _mean(row: dict[str, Any], key: str) -> float:
    """Over the buckets, each token counted once."""
    parts = [row[bucket] for bucket in BUCKETS]
    weights = [part["texts"] * part["tokens"] for part in parts]
    values = [part.get(key, math.nan) for part in parts]
    return float(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.encoder_decoder", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="trains what is not trained yet")
    training.add_argument("--steps", type=positive, default=2000, help="of each decoder")
    training.add_argument("--seconds", type=positive, default=3600, help="then it stops, to go on later")
    measuring = commands.add_parser("measure", help="the table")
    measuring.add_argument("--each", type=positive, default=40, help="texts of each bucket")
    measuring.add_argument("--json", type=output_file, help="a file to write the figures to")
    measuring.add_argument("--plot", type=plot_file, help="an .svg file to write")
    for command in (training, measuring):
        command.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
        command.add_argument("--threads", type=positive, default=1)
    return parser


@reporting("python -m bench.encoder_decoder")
def main() -> int:
    """Exit status 1 if training is to be gone on with, or speculation has changed a text."""
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "train":
        return int(not train(args.folder, args.steps, args.seconds))
    rows = measure(args.folder, args.each)
    print(as_table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return int(any(row[bucket].get("texts_that_differ", 0) for row in rows.values() for bucket in BUCKETS))


if __name__ == "__main__":
    raise SystemExit(main())
