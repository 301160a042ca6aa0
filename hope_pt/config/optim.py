"""The `[optim]` section: the outer optimizer, its update rules and its schedule."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hope_pt.config.section import DecayRate, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section

OptimizerName = Literal["adamw", "muon", "m3", "momentum", "delta_momentum", "deep_momentum", "dgd"]
"""Rules of the outer optimizer (`hope_pt.optim`); all but "adamw" are for matrices."""


class MuonConfig(Section):
    """Muon: Nesterov momentum, orthogonalised."""

    momentum: DecayRate = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Orthogonalise the momentum looked ahead by one step."""
    ns_steps: PositiveInt = 5
    """Newton-Schulz steps."""
    scale: Literal["rms", "spectral"] = "rms"
    """"rms" gives updates the root mean square of AdamW's, 0.2 sqrt(max(rows, columns)), "spectral" sqrt(max(1, rows / columns))."""


class M3Config(Section):
    """Multi-scale momentum Muon (NL Algorithm 1): a fast and a slow momentum, both orthogonalised, over a second moment."""

    mode: Literal["ema", "literal"] = "ema"
    """"ema": decaying averages and updates of the size of Muon's with scale = "rms"; "literal": sums without decay, as printed."""
    betas: tuple[DecayRate, DecayRate, DecayRate] = (0.95, 0.95, 0.9)
    """Decay rates of the fast momentum, the second moment and the slow momentum."""
    slow_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the slow momentum; 0 switches it off."""
    slow_every: PositiveInt = 8
    """Steps between updates of the slow momentum, which takes the sum of their gradients."""
    nesterov: bool = True
    """Orthogonalise the fast momentum looked ahead by one step (not in "literal")."""
    second_moment: bool = True
    """Divide by the root of the second moment. Off, and with slow_weight = 0, M3 is Muon."""
    ns_steps: PositiveInt = 5
    """Newton-Schulz steps."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


class MomentumConfig(Section):
    """Momentum as an associative memory: m <- m D - P g, with D = decay I, or for delta momentum decay I - delta g^T g (NL eq. 48-49)."""

    decay: DecayRate = 0.95
    """Decay rate of the momentum."""
    preconditioner: Literal["none", "adam", "newton_schulz"] = "adam"
    """P: nothing, division by the root of the second moment, or orthogonalisation of the gradient. The latter two give entries around 1."""
    delta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Strength of the delta term, for "delta_momentum"; g is normalised to length 1."""
    side: Literal["right", "left"] = "right"
    """Side of the factor decay I - delta g^T g ("right", arXiv) or decay I - delta g g^T ("left", NeurIPS eq. 22)."""
    beta2: DecayRate = 0.95
    """Decay rate of the second moment, with preconditioner = "adam"."""
    eps: PositiveFloat = 1e-8
    """Added to its root."""


class DeepMomentumConfig(Section):
    """Deep momentum (DMGD, NL eq. 50): the momentum is a small MLP trained on the gradients while the model trains."""

    hidden: NonNegativeInt = 16
    """Hidden width F of the MLP beside its linear path; 0 leaves that alone, which is momentum."""
    decay: DecayRate = 0.95
    """Decay rate of the MLP's weights towards their start, 0 but for its first layer."""
    inner_lr: PositiveFloat = 1.0
    """Learning rate of the hidden layer; it bounds the layer's weights."""
    output: Literal["linear", "newton_schulz"] = "linear"
    """Nonlinearity of the output: none, or orthogonalisation with the root mean square of AdamW's updates."""
    preconditioner: Literal["none", "adam"] = "adam"
    """What the gradient passes before the MLP sees it."""
    beta2: DecayRate = 0.95
    """Decay rate of the second moment, with preconditioner = "adam"."""
    eps: PositiveFloat = 1e-8
    """Added to its root."""


class OptimConfig(Section):
    """The outer optimizer and its schedule (SPEC 4)."""

    name: OptimizerName = "adamw"
    """Rule of the matrices: projections of the mixers and CMS levels. Embedding, head, norms, gates and readouts have AdamW."""
    levels: tuple[OptimizerName, ...] = ()
    """Rule of every CMS level, highest frequency first; empty: all have `name`."""
    memory: OptimizerName = "adamw"
    """Rule of the initial states of the memories: a matrix for every head."""
    muon: MuonConfig = MuonConfig()
    """Settings of "muon"."""
    m3: M3Config = M3Config()
    """Settings of "m3"."""
    momentum: MomentumConfig = MomentumConfig()
    """Settings of "momentum" and "delta_momentum"."""
    deep_momentum: DeepMomentumConfig = DeepMomentumConfig()
    """Settings of "deep_momentum"."""
    matrix_lr: Annotated[float, Field(ge=0)] = 0.0
    """Peak learning rate of the matrices that do not have AdamW; 0 means `lr`. One for all rules: where levels have rules of different
    rates ("dgd" beside "muon"), they cannot both have their best."""
    base_width: NonNegativeInt = 0
    """Width at which `lr` was tuned: matrices have lr (base_width / width)^e, with e by rule (docs/optimizers.md). 0 switches it off."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate as a share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Shape after warm-up: cosine decay, or stable then linear decay over the last decay_steps."""
    warmup_steps: NonNegativeInt = 100
    """Linear warm-up."""
    decay_steps: NonNegativeInt = 0
    """Length of the final decay of "wsd"; 0 means a tenth of the run."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """AdamW moment decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of in_proj, out_proj and the CMS matrices; every other parameter has none."""
    clip: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""
    freeze_levels: tuple[NonNegativeInt, ...] = ()
    """CMS levels (from 0, highest frequency first) whose parameters never move."""
    level_step_cap: Annotated[float, Field(ge=0)] = 0.0
    """Most that one update may move a matrix of a CMS level with a period above 1, relative to its norm before, or to that of a newly
    initialised one if that is larger; 0 means no limit."""
    level_total_cap: Annotated[float, Field(ge=0)] = 0.0
    """Most that such a matrix may be away from where the run started, relative to its norm there, or to that of a new one; 0 means no
    limit."""

    @model_validator(mode="after")
    def _check(self):
        if self.memory == "dgd":
            raise ValueError('memory = "dgd" needs the inputs of a linear layer, and the initial states have none; choose another rule')
        return self
