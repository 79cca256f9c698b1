"""The chunked loss and its hand-made gradient equal torch's own, for every kind of loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.network.config import EncoderConfig, RelativeBias
from model.network.looped import LoopedTransformer, Source
from tests.tiny_models import tiny_model
from training import losses
from training.losses import loop_losses
from training.recipe import Stage

LOOPS, VOCAB = 3, 67


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(3))


def obvious(
    model: LoopedTransformer,
    tokens: Tensor,
    stage: Stage,
    taught: losses.Taught | None = None,
    source: Source | None = None,
) -> Tensor:
    """The same losses written down as in the paper, differentiated by torch."""
    targets = tokens[:, 1:].flatten()
    states = model.depths(tokens[:, :-1], stage.num_loops, source=source)
    readouts = [model.whole_readout(state).flatten(0, 1) for state in states]
    weights = torch.arange(1, stage.num_loops + 1) ** stage.depth_power
    weights = weights / weights.sum()
    final = readouts[-1].detach().softmax(-1)
    total = torch.zeros(())
    for logits, weight in zip(readouts, weights, strict=True):
        each = F.cross_entropy(logits, targets, reduction="none")
        if taught is not None:
            q = torch.zeros_like(logits).scatter(1, *taught)
            apart = F.kl_div(logits.log_softmax(-1), q, reduction="none").sum(-1)
            apart = torch.where(taught.probabilities.sum(-1) > 0, apart, each)
            each = (1 - stage.teacher_weight) * each + stage.teacher_weight * apart
        total = total + weight * each.mean()
    for logits in readouts[:-1]:
        pull = F.kl_div(logits.log_softmax(-1), final, reduction="batchmean")
        total = total + stage.agreement_weight / (len(readouts) - 1) * pull
    return total


def gradients(model: LoopedTransformer, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("agreement", [0.0, 0.7])
def test_loss_and_gradient_equal_the_obvious_ones(
    tokens: Tensor, with_teacher: bool, agreement: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 7)  # 24 tokens: chunks of 7, 7, 7 and 3
    model = tiny_model(vocab_size=VOCAB, num_loops=LOOPS).train().requires_grad_(True)
    stage = Stage(1, LOOPS, 12, (1.0, 1.0), 1.5, agreement, 0.6)
    given = torch.Generator().manual_seed(4)
    ids = torch.rand((24, VOCAB), generator=given).argsort(-1)[:, :5]
    q = torch.rand((24, 5), generator=given).softmax(-1) * (torch.rand((24, 1), generator=given) > 0.3)
    taught = losses.Taught(ids, q) if with_teacher else None
    wanted = obvious(model, tokens, stage, taught)
    wanted_gradients = gradients(model, wanted)
    total, per_loop = loop_losses(model, tokens, stage, taught)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model, total).items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-6)
    last = model.whole_readout(model.depths(tokens[:, :-1])[-1]).detach().flatten(0, 1)
    assert per_loop[-1].item() == pytest.approx(F.cross_entropy(last, tokens[:, 1:].flatten()).item())


def test_a_model_with_an_encoder_learns_behind_its_sources(tokens: Tensor) -> None:
    """A tied head's scale was left out of the loss; the encoder gets its gradient through the decoder."""
    model = tiny_model(
        family="t5_loop",
        vocab_size=VOCAB,
        num_loops=LOOPS,
        num_kv_heads=4,
        attention_scale=1.0,
        head_scale=0.2,
        tie_embeddings=True,
        encoder=EncoderConfig(2, 3),
        relative_bias=RelativeBias(8, 20),
    )
    model.train().requires_grad_(True)
    stage, seen = Stage(1, LOOPS, 12, (1.0, 1.0), 1.5, 0.7), torch.arange(13) < torch.tensor([[13], [5]])
    wanted = obvious(model, tokens, stage, source=model.encode(tokens, seen))
    wanted_gradients = gradients(model, wanted)
    total, _ = loop_losses(model, tokens, stage, source=model.encode(tokens, seen))
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)
    found = gradients(model, total)
    assert found["encoder.layers.0.mlp.gate_up_proj.weight"].abs().sum() > 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-6)


def test_one_loop_is_plain_cross_entropy(tokens: Tensor) -> None:
    model = tiny_model(vocab_size=VOCAB, num_loops=1).train().requires_grad_(True)
    total, per_loop = loop_losses(model, tokens, Stage(1, 1, 12, (1.0, 1.0), agreement_weight=0.5))
    assert total.item() == pytest.approx(per_loop.item())


def test_what_is_not_kept_has_no_say(tokens: Tensor) -> None:
    """Padding behind a text changes neither its loss nor its gradient."""
    model = tiny_model(vocab_size=VOCAB, num_loops=LOOPS).train().requires_grad_(True)
    stage = Stage(1, LOOPS, 12, (1.0, 1.0), agreement_weight=0.3)
    wanted, per_loop = loop_losses(model, tokens[:1, :8], stage)
    wanted_gradients = gradients(model, wanted)
    kept = torch.zeros(1, 12, dtype=torch.bool)
    kept[:, :7] = True
    total, padded = loop_losses(model, tokens[:1], stage, kept=kept)
    torch.testing.assert_close(padded, per_loop)
    for name, gradient in gradients(model, total).items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-6)
    figures = losses.evaluate(model.eval(), tokens[:1], kept)
    assert figures.loss == pytest.approx(per_loop.tolist(), rel=1e-5)
