"""Evaluations on models whose right answer is known: uniform, lookup and copying models, a hand-made corpus."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hope_pt.config import load
from hope_pt.config.schema import TokenClockConfig
from hope_pt.data import open_source
from hope_pt.errors import CheckpointError, EvalError
from hope_pt.evals import Trigram, Unigram, baselines, bits_per_byte, documents, evaluate, heldout, lm_losses, read_documents, recall
from hope_pt.evals.generation import load_memory, save_memory, stream
from hope_pt.evals.language import context_length
from hope_pt.evals.passkey import _score_batch, build, score
from hope_pt.evals.scoring import batches, evaluating
from hope_pt.nn import HopeLM
from hope_pt.nn.token_clock import ClockedLM
from hope_pt.testing.models import small_config

VOCAB = 128


class FakeSource:
    """A stream of tokens cut in windows that overlap by one token, as the shards are."""

    def __init__(self, stream, *, seq_len=32, starts=(), mask=None, bytes_per_token=2.0):
        self.stream, self.seq_len, self.mask = np.asarray(stream, dtype=np.int64), seq_len, mask
        self.num_samples = (len(self.stream) - 1) // seq_len
        self.vocab_size, self.bytes_per_token, self.tokenizer_path = VOCAB, bytes_per_token, None
        self.starts = np.isin(np.arange(len(self.stream)), starts)

    def read(self, indices):
        at = np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len)
        mask = np.ones(at.shape, dtype=np.float32) if self.mask is None else np.broadcast_to(self.mask, at.shape).astype(np.float32)
        return SimpleNamespace(
            tokens_BT=torch.from_numpy(self.stream[at]),
            targets_BT=torch.from_numpy(self.stream[at + 1]),
            loss_mask_BT=torch.from_numpy(mask.copy()),
            doc_start_BT=torch.from_numpy(self.starts[at]),
        )


@dataclass(frozen=True)
class History:
    """All tokens of a row; the state of a copying model."""

    tokens_BT: torch.Tensor

    def rows(self, index_B):
        return History(self.tokens_BT[index_B])


class CopyLM(torch.nn.Module):
    """Predicts what followed the longest earlier occurrence of the current suffix (at most 8 tokens); `blind` forgets instead."""

    def __init__(self, *, blind=False):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(5.0))
        self.dropout = torch.nn.Dropout(0.5)
        self.blind = blind

    def forward(self, tokens_BT, *, state=None, doc_start_BT=None, return_state=False):
        past = torch.zeros(len(tokens_BT), 0, dtype=torch.long) if state is None else state.tokens_BT
        full_BN = torch.cat([past, tokens_BT], dim=1)
        logits = torch.zeros(*tokens_BT.shape, VOCAB)
        for row, tokens in enumerate(full_BN.tolist()):
            for t in range(past.shape[1], len(tokens)):
                guess = self._guess(tokens[max(0, t - 8) if self.blind else 0 : t + 1])
                if guess is not None:
                    logits[row, t - past.shape[1], guess] = 1.0
        logits = self.dropout(logits) * self.scale
        return logits, History(full_BN) if return_state else None

    @staticmethod
    def _guess(tokens):
        for length in range(min(8, len(tokens) - 1), 0, -1):
            for end in range(len(tokens) - 1, length - 1, -1):
                if tokens[end - length : end] == tokens[-length:]:
                    return tokens[end]
        return None


def uniform_losses(batch):
    return torch.full(batch.targets_BT.shape, math.log(VOCAB))


def text_source(*, length=4000, seed=0):
    """Lower-case noise, so that digits occur in needles only."""
    return FakeSource(np.random.default_rng(seed).integers(97, 123, length), seq_len=64)


def encode(text):
    return list(text.encode())


def test_a_uniform_model_scores_log_vocabulary():
    source = FakeSource(np.random.default_rng(0).integers(0, VOCAB, 1000))
    result = heldout(uniform_losses, source, sequences=16)
    assert result["eval/loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert result["eval/bits_per_byte"] == pytest.approx(math.log2(VOCAB) / 2)
    assert result["eval/tokens"] == 16 * 32
    assert bits_per_byte(math.log(2), bytes_per_token=1.0) == pytest.approx(1.0)


def test_masked_tokens_do_not_count():
    mask = np.zeros(32)
    mask[:4] = 1
    source = FakeSource(np.arange(129) % VOCAB, mask=mask)

    def losses(batch):
        return torch.where(torch.arange(32) < 4, 1.0, 1000.0).expand(batch.targets_BT.shape)

    result = heldout(losses, source)
    assert (result["eval/loss"], result["eval/tokens"]) == (pytest.approx(1.0), 16)
    source.mask = np.zeros(32)
    with pytest.raises(EvalError, match="loss mask"):
        heldout(losses, source)


def test_context_length_restarts_at_documents():
    doc_start_BT = torch.tensor([[False, False, True, False, False], [True, False, False, True, True]])
    assert context_length(doc_start_BT).tolist() == [[1, 2, 1, 2, 3], [1, 2, 3, 1, 1]]


def test_loss_by_context_has_one_key_for_each_doubling():
    source = FakeSource(np.zeros(129), starts=(16,))

    def losses(batch):
        return context_length(batch.doc_start_BT).float()

    result = heldout(losses, source, sequences=1)
    ranges = {key.rpartition("/")[2]: value for key, value in result.items() if "at_context" in key}
    assert ranges == {"0001-0001": 1.0, "0002-0002": 2.0, "0003-0004": 3.5, "0005-0008": 6.5, "0009-0016": 12.5}


def test_batches_are_spread_over_the_source_and_repeatable():
    source = FakeSource(np.arange(32 * 100 + 1) % VOCAB)
    first = [batch.tokens_BT for batch in batches(source, sequences=10, batch_size=4)]
    again = [batch.tokens_BT for batch in batches(source, sequences=10, batch_size=4)]
    assert [len(tokens) for tokens in first] == [4, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[-1][-1], source.read([90]).tokens_BT[0])
    with pytest.raises(EvalError, match="no samples"):
        list(batches(FakeSource([1]), sequences=1, batch_size=1))


def test_trigram_probabilities_sum_to_one_in_seen_and_unseen_contexts():
    rng = np.random.default_rng(1)
    model = Trigram.fit(FakeSource(rng.zipf(1.5, 5000) % 100))
    target = np.arange(VOCAB)
    for before, last in [(1, 2), (1, 1), (99, 98), (120, 1), (120, 121), (-1, 3), (-1, 121)]:
        probability = model.probability(np.full(VOCAB, before), np.full(VOCAB, last), target)
        assert probability.min() > 0
        assert probability.sum() == pytest.approx(1.0, abs=1e-9)


def test_trigram_learns_what_two_tokens_determine_and_the_unigram_does_not():
    rng = np.random.default_rng(2)
    stream = [0, 1]
    for noise in rng.random(20_000):
        stream.append((3 * stream[-1] + 7 * stream[-2] + 1) % 61 if noise < 0.9 else int(rng.integers(61)))
    train, held = FakeSource(stream[:18_000]), FakeSource(stream[18_000:])
    result = baselines(train, held)
    # The source's own entropy: 0.9 certain, 0.1 uniform over 61, nats.
    entropy = -(0.9 + 0.1 / 61) * math.log(0.9 + 0.1 / 61) - (60 * 0.1 / 61) * math.log(0.1 / 61)
    assert entropy < result["eval/trigram_loss"] < entropy + 0.5
    assert abs(result["eval/unigram_loss"] - math.log(61)) < 0.1
    assert result["eval/trigram_bits_per_byte"] == pytest.approx(result["eval/trigram_loss"] / math.log(2) / 2)


def test_trigram_beats_a_plain_bigram_estimate_on_its_training_distribution():
    rng = np.random.default_rng(3)
    transition = rng.dirichlet(np.full(40, 0.1), size=(40, 40))
    stream = [0, 1]
    for _ in range(30_000):
        stream.append(int(rng.choice(40, p=transition[stream[-2], stream[-1]])))
    train, held = FakeSource(stream[:28_000]), FakeSource(stream[28_000:])
    model = Trigram.fit(train)
    tri = heldout(model.losses, held)["eval/loss"]

    def bigram_losses(batch):
        last = batch.tokens_BT.numpy()
        return torch.from_numpy(-np.log(model.probability(np.full_like(last, -1), last, batch.targets_BT.numpy())))

    assert tri < heldout(bigram_losses, held)["eval/loss"] - 0.5


def test_trigram_windows_continue_the_stream():
    """A trigram that spans two windows is counted: [5, 6 | 7] occurs at every window end here and nowhere else."""
    window = [1] * 30 + [5, 6]
    model = Trigram.fit(FakeSource([*([7, *window[1:]] * 50), 7]))
    assert model.probability(np.array([6]), np.array([7]), np.array([1]))[0] > 0.9


def test_unigram_gives_every_token_a_probability():
    model = Unigram.fit(FakeSource(np.ones(65)))
    assert model.probability_V.sum() == pytest.approx(1.0)
    assert model.probability_V.min() > 0


def test_passkey_prompts_have_the_asked_length_and_one_needle():
    probe = build(text_source(), encode, samples=8, context=256)
    assert probe.prompt_ST.shape == (8, 256)
    assert probe.candidates_SAL.shape == (8, 10, 6)
    for sample in range(8):
        text = bytes(probe.prompt_ST[sample].tolist()).decode()
        key = bytes(probe.candidates_SAL[sample, 0].tolist()).decode().strip()
        assert text.count(f"The pass key is {key}.") == 1
        assert text.endswith("The pass key is")
        distance = len(text) - text.index(f" The pass key is {key}. Remember it.") - len(" The pass key is 12345. Remember it.")
        assert distance == probe.distance_S[sample]
        others = {bytes(ids.tolist()).decode().strip() for ids in probe.candidates_SAL[sample, 1:]}
        assert len(others) == 9 and not any(other in text for other in others)
    assert set(probe.depth_S) == {0.0, 0.25, 0.5, 0.75}
    assert probe.distance_S.min() > 64
    again = build(text_source(), encode, samples=8, context=256)
    assert torch.equal(again.prompt_ST, probe.prompt_ST) and torch.equal(again.candidates_SAL, probe.candidates_SAL)


def test_passkey_finds_a_model_that_copies_and_one_that_forgets():
    probe = build(text_source(), encode, samples=16, context=192)
    good = score(CopyLM(), probe, batch_size=5)
    assert good["eval/passkey_accuracy"] == 1.0
    assert good["eval/passkey_exact"] == 1.0
    assert good["eval/passkey_margin"] > 1.0
    assert good["eval/passkey_chance"] == pytest.approx(0.1)
    assert {key for key in good if "depth" in key} == {f"eval/passkey_accuracy_at_depth/{d:.2f}" for d in (0, 0.25, 0.5, 0.75)}
    blind = score(CopyLM(blind=True), probe, batch_size=5)
    assert blind["eval/passkey_accuracy"] <= 0.2
    assert blind["eval/passkey_exact"] == 0.0


def test_passkey_refuses_a_context_without_room():
    with pytest.raises(EvalError, match="too short"):
        build(text_source(), encode, samples=1, context=64)


def recall_source():
    """Pairs k v k v, then the keys again in the other order with their values: queries at the last two keys."""
    rows = []
    rng = np.random.default_rng(0)
    for _ in range(20):
        keys, values = rng.choice(20, 2, replace=False), 30 + rng.integers(0, 20, 2)
        rows += [keys[0], values[0], keys[1], values[1], keys[1], values[1], keys[0], values[0]]
    mask = np.array([0, 0, 0, 0, 1, 0, 1, 0])
    return FakeSource([*rows, 0], seq_len=8, mask=mask, bytes_per_token=0.0)


def test_recall_scores_query_positions_only():
    result = recall(CopyLM(), recall_source(), chance=1 / 20)
    assert result["eval/recall_accuracy"] == 1.0
    assert result["eval/recall_queries"] == 40
    assert result["eval/recall_chance"] == 0.05
    assert "eval/bits_per_byte" not in heldout(lm_losses(CopyLM()), recall_source())


def test_evaluation_leaves_mode_and_random_state_alone_and_repeats():
    lm = CopyLM()
    lm.train()
    lm.dropout.eval()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    source = text_source(length=300)
    losses = lm_losses(lm)
    first, second = heldout(losses, source, sequences=3), heldout(losses, source, sequences=3)
    probe = build(source, encode, samples=4, context=160)
    scores = [score(lm, probe, batch_size=size) for size in (2, 4)]
    assert first == second
    assert scores[0] == pytest.approx(scores[1])
    assert lm.training and not lm.dropout.training
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert lm.scale.grad is None


def test_mode_comes_back_after_an_error():
    lm = CopyLM().train()
    with pytest.raises(RuntimeError), evaluating(lm):
        assert not lm.training
        raise RuntimeError
    assert lm.training


CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_real_models_probe_like_one_pass(mixer):
    """The prompt's state, copied for every candidate, must give the log-probabilities of reading prompt and candidate in one call."""
    config = load(CONFIGS / "mqar_hope.toml", [f"model.mixer={mixer}", "model.vocab_size=128"])
    lm = HopeLM(config.model)
    probe = build(text_source(), encode, samples=4, context=163)
    logprob_SA = torch.cat([_score_batch(lm, probe, rows=slice(start, start + 3))[0] for start in (0, 3)])
    with evaluating(lm):
        for sample in range(4):
            for candidate, ids in enumerate(probe.candidates_SAL[sample]):
                text = torch.cat([probe.prompt_ST[sample], ids])
                logits = lm(text[None])[0][0].log_softmax(-1)
                expected = logits[162:-1].gather(-1, ids[:, None]).sum()
                torch.testing.assert_close(logprob_SA[sample, candidate], expected, rtol=1e-4, atol=1e-4)


def test_a_fresh_model_starts_at_log_vocabulary_and_at_chance():
    config = load(CONFIGS / "mqar_hope.toml", ["eval.sequences=64"])
    source = open_source(config.data, split="heldout", vocab_size=config.model.vocab_size)
    lm = HopeLM(config.model)
    first, second = evaluate(lm, source, config=config), evaluate(lm, source, config=config)
    assert first == second
    assert first["eval/loss"] == pytest.approx(math.log(64), rel=0.05)
    assert first["eval/recall_loss"] == pytest.approx(first["eval/loss"])
    assert first["eval/recall_accuracy"] < 0.2
    assert first["eval/recall_chance"] == pytest.approx(1 / 32)
    assert first["eval/recall_queries"] == 64 * 8


def test_documents_are_whole_and_in_order_across_samples_and_reads(monkeypatch):
    monkeypatch.setattr(sys.modules["hope_pt.evals.documents"], "READ_AT_ONCE", 2)
    stream = np.arange(32 * 7 + 1) % VOCAB
    source = FakeSource(stream, starts=(0, 3, 40, 64, 200))
    cuts = [(3, 40), (64, 200)]
    found = documents(source, count=2, least=30, most=100)
    assert [text.tolist() for text in found] == [stream[a:b][:100].tolist() for a, b in cuts]
    everything = documents(source, count=9, least=1, most=1000)
    assert torch.cat(everything).tolist() == stream[:-1].tolist() and len(everything) == 5
    with pytest.raises(EvalError, match="no held-out document has 500 tokens, the longest has 136"):
        documents(source, count=1, least=500, most=500)


CLOCK = TokenClockConfig(periods=(8, 16), lr=(0.05, 0.05))


def test_reading_documents_does_not_depend_on_the_window_and_starts_afresh():
    lm = HopeLM(small_config("paper"))
    texts = [torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(length)) for length in (33, 25, 17)]
    expected = torch.cat([lm.token_losses(text[None, :-1], text[None, 1:])[0] for text in texts]).detach()
    result = read_documents(lm, texts, bytes_per_token=2.0, window=25)
    assert result["eval/document_loss"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert (result["eval/document_tokens"], result["eval/document_bits_per_byte"]) == (72, pytest.approx(expected.mean() / math.log(4)))
    first = [loss for text in texts for loss in lm.token_losses(text[None, :2], text[None, 1:3])[0, :1].tolist()]
    assert result["eval/document_loss_at_context/0001-0001"] == pytest.approx(sum(first) / 3, rel=1e-5)
    by_window = [read_documents(ClockedLM(lm, CLOCK), texts, bytes_per_token=2.0, window=window, name="") for window in (64, 25)]
    for other in by_window[1:]:
        assert other == pytest.approx(by_window[0], rel=1e-5)
    assert abs(by_window[0]["eval/loss"] - result["eval/document_loss"]) > 1e-3


def test_a_model_with_a_token_clock_learns_a_document_that_repeats_itself():
    """What the levels learn in the first lines helps in the later ones; the control reads the same text without it."""
    lm = HopeLM(small_config("attention"))
    text = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(0)).repeat(12)
    frozen = read_documents(lm, [text], bytes_per_token=0.0)
    clocked = read_documents(ClockedLM(lm, CLOCK), [text], bytes_per_token=0.0, name="clock_")
    assert clocked["eval/clock_loss_at_context/0065-0128"] < 0.85 * frozen["eval/document_loss_at_context/0065-0128"]
    none = read_documents(ClockedLM(lm, TokenClockConfig(periods=(8, 16), lr=(0.0, 0.0))), [text], bytes_per_token=0.0)
    assert none == frozen


def test_a_stream_with_a_token_clock_goes_on_from_its_file(tmp_path):
    lm = HopeLM(small_config("paper"))
    model, path = ClockedLM(lm, CLOCK), tmp_path / "memory"
    prompt = list(range(21))
    settings = {"temperature": 0.0, "seed": 0, "end": None}
    whole = [token for token, _ in stream(model, prompt, num_tokens=16, **settings)]
    *_, (_, memory) = stream(model, prompt, num_tokens=13, **settings)
    save_memory(memory, path, lm=lm)
    loaded = load_memory(path, lm=lm)
    assert loaded.learnt.clock == CLOCK and loaded.last == whole[12]
    for name, moved in memory.learnt.state.levels.moved.items():
        assert torch.equal(loaded.learnt.state.levels.moved[name], moved) and moved.norm() > 0
    assert [token for token, _ in stream(model, [], num_tokens=3, memory=loaded, **settings)] == whole[13:]
    # without the clock the same file is a plain memory
    assert len(list(stream(lm, [], num_tokens=2, memory=loaded, **settings))) == 2
    with pytest.raises(CheckpointError, match="another model"):
        load_memory(path, lm=HopeLM(small_config()))
