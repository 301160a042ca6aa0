"""Text that the newest checkpoint of a run writes: the same prompts and seeds every time."""

from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from hope_pt.evals.generation import stream
from hope_pt.train.trained import load_trained

PROMPTS = ("", "The ", "It was ")
TOKENS = 60
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation."""

    prompt: str
    text: str


def draw_samples(run: Path) -> list[Sample]:
    """One sample of each of `PROMPTS`; none for a run that is not text. Raises CheckpointError where there is no valid checkpoint."""
    trained = load_trained(run)
    if trained.tokenizer is None:
        return []
    tokenizer = SentencePieceProcessor(model_file=str(trained.tokenizer))
    end = tokenizer.eos_id()
    samples = []
    for seed, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt) or [end]
        made = stream(trained.lm, ids, num_tokens=TOKENS, temperature=TEMPERATURE, seed=seed, end=end)
        samples.append(Sample(prompt=prompt, text=tokenizer.decode([token for token, _ in made])))
    return samples
