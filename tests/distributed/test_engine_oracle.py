"""The engine against the plain HopeLM: same initial weights, same losses, same gradients, on one process."""

import contextlib

import pytest
import torch

from hope_pt.engine import TrainEngine, start, stop
from hope_pt.nn import HopeLM
from hope_pt.testing import EXACT, GRADIENT, LAYOUT, ROUNDING, difference, random_batch, tiny_model, tiny_run, worst_difference


@contextlib.contextmanager
def running(config):
    plan = start(config)
    try:
        yield TrainEngine(config, plan)
    finally:
        stop(plan)


def batch_for(config, *, seed=0):
    return random_batch(batch=config.train.global_batch_size, length=config.data.seq_len, vocab_size=config.model.vocab_size, seed=seed)


def model_of(mixer, *, tied=True):
    return tiny_model(mixer=mixer).model_copy(update={"tie_embeddings": tied})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_initial_weights_are_hopelms_bit_for_bit(mixer, tied):
    config = tiny_run(model=model_of(mixer, tied=tied))
    with running(config) as trainer:
        weights = trainer.export()
    reference = HopeLM(config.model, seed=config.train.seed).state_dict()
    assert difference(weights, reference) == EXACT


def oracle(config, batch, *, dtype):
    """HopeLM's token losses, loss and gradients by autograd."""
    lm = HopeLM(config.model, seed=config.train.seed).to(dtype)
    losses = lm.token_losses(batch.tokens_BT, batch.targets_BT, doc_start_BT=batch.doc_start_BT)
    loss = (losses * batch.loss_mask_BT).sum() / batch.loss_mask_BT.sum()
    loss.backward()
    return losses.detach(), loss.item(), {name: parameter.grad for name, parameter in lm.named_parameters()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_loss_and_gradients_are_hopelms(mixer, tied):
    config = tiny_run(model=model_of(mixer, tied=tied), micro_batch_size=2, clip=1e9)
    batch = batch_for(config)
    losses, loss, reference = oracle(config, batch, dtype=torch.float32)
    _, _, truth = oracle(config, batch, dtype=torch.float64)
    with running(config) as trainer:
        token_losses = trainer.token_losses(batch)
        result = trainer.step(batch)
        gradients = {name: parameter.main_grad.clone() for name, parameter in trainer.parameters.items()}
    assert difference({"losses": token_losses}, {"losses": losses}) <= LAYOUT
    assert result.loss == pytest.approx(loss, rel=LAYOUT)
    assert all(gradient.abs().max() > 0 for gradient in reference.values())
    assert difference(gradients, truth) <= ROUNDING * difference(reference, truth)
    assert worst_difference(gradients, reference) <= (GRADIENT, "")
    norm = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
    assert result.grad_norm == pytest.approx(norm.item(), rel=LAYOUT)


def test_documents_are_ignored_where_the_configuration_says_so():
    config = tiny_run()
    config = config.model_copy(update={"data": config.data.model_copy(update={"document_reset": False})})
    batch = batch_for(config)
    lm = HopeLM(config.model, seed=config.train.seed)
    with running(config) as trainer:
        losses = trainer.token_losses(batch)
    whole = lm.token_losses(batch.tokens_BT, batch.targets_BT).detach()
    reset = lm.token_losses(batch.tokens_BT, batch.targets_BT, doc_start_BT=batch.doc_start_BT).detach()
    assert difference({"losses": losses}, {"losses": whole}) <= LAYOUT
    assert difference({"losses": losses}, {"losses": reset}) > 100 * LAYOUT


def test_token_losses_take_any_number_of_rows_and_change_nothing():
    config = tiny_run(micro_batch_size=2)
    batch = random_batch(batch=5, length=config.data.seq_len, vocab_size=config.model.vocab_size, seed=3)
    with running(config) as trainer:
        before = trainer.state()
        losses = trainer.token_losses(batch)
        after = trainer.state()
    assert losses.shape == batch.tokens_BT.shape and losses.dtype == torch.float32
    assert before[1] == after[1]
    assert difference(after[0], before[0]) == EXACT


def test_to_lm_computes_what_the_engine_computes_after_training():
    config = tiny_run()
    batch = batch_for(config)
    with running(config) as trainer:
        for _ in range(3):
            trainer.step(batch)
        losses = trainer.token_losses(batch)
        lm = trainer.to_lm()
    reference = lm.token_losses(batch.tokens_BT, batch.targets_BT, doc_start_BT=batch.doc_start_BT).detach()
    assert difference({"losses": losses}, {"losses": reference}) <= LAYOUT


def test_training_learns_a_repeated_batch():
    config = tiny_run(steps=30)
    batch = batch_for(config)
    with running(config) as trainer:
        losses = [trainer.step(batch).loss for _ in range(30)]
        assert trainer.num_steps_done == 30
    assert losses[-1] < 0.5 * losses[0]
