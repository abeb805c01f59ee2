"""The sections of a run's configuration: model, data, adapter, head, privacy, training and server.

All of it is public: server and sites know it. An open value is ``None``, and ``auto`` where people write it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from fedveil.common.check import CLIP_NORM, NOT_NEGATIVE, POSITIVE, Interval, OneOf
from fedveil.common.config.fields import OPEN, RATIO, TARGET_KINDS, Section, Unit
from fedveil.common.config.flat import Columns, columns_of_jobs
from fedveil.common.errors import ConfigError
from fedveil.common.tasks import TASKS
from fedveil.privacy import MECHANISMS, UNITS, Mechanism

PARTITIONS = ("iid", "dirichlet", "natural")
NO_ADAPTER = "none"
"""``adapter.name`` of a run that trains the head alone."""
HEAD_POLICIES = ("trained", "frozen")
HEAD_POOLS = ("mean", "stock")
HEAD_METRICS = ("none", "public")
HEAD_STARTS = ("zeros", "random", "label-words")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine", "slanted")
SERVER_OPTIMIZERS = ("none", "adam", "adam-restarted", "momentum")
SCALES = ("rank", "sqrt-rank")
QUANTISE = ("none", "8bit", "4bit")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The frozen base model."""

    prefix: ClassVar[str] = "model."

    name: str = "all-MiniLM-L6-v2"
    """A named model (see ``common.model.base``), a folder, or ``hub:NAME``, which the command that names it fetches."""
    task: Annotated[str, OneOf(TASKS)] = "classification"
    """A kind of task (see ``common.tasks``): ``classification`` (encoder, mean pool, linear head), ``multi-label`` (the
    same with any of the labels a text, or none), ``token-classification`` (names in texts: a linear head on each word),
    ``causal-lm`` (prompt, completion), ``chat`` (a conversation), ``instruction`` (instruction, input, output),
    ``image-classification`` (vision transformer, linear head), ``audio-classification`` (Whisper's encoder, linear
    head), ``speech-to-text`` (Whisper; clip, words)."""
    max_length: Annotated[int, POSITIVE, Unit("tokens")] = 128
    """The length that a record is cut to. It is less where the model has no positions for so many and one of padding.
    An image is scaled to the largest square of whole patches that has at most so many, a clip cut or filled up to the
    most whole seconds, 50 tokens each."""
    feature_scale: Annotated[float, NOT_NEGATIVE, RATIO] = 1.0
    """Classification: length that the pooled features are brought to. 0 leaves them as they are, which those of words
    always are."""
    checkpointing: bool = False
    """Whether each layer is computed again in the backward pass, so that memory holds one layer's activations and the
    inputs of the others. A step takes a third to two thirds longer. It changes no gradient."""
    quantise: Annotated[str, OneOf(QUANTISE)] = "none"
    """How the base model's frozen linear layers are held: ``none`` (in full), ``8bit``, or ``4bit`` (NF4), by
    bitsandbytes (``common.adapters.low_bits``). It is part of the fingerprint, so the same at server and sites."""


@dataclass(frozen=True)
class DataConfig(Section):
    """Where records come from and how a simulated federation divides them."""

    prefix: ClassVar[str] = "data."

    name: str = "rotten-tomatoes"
    """A named data set (see ``common.data.sources``), a file or folder, or ``hub:NAME``."""
    test: str = ""
    """The server's public held-out file or hub split. Empty: a seeded part of ``data.name``."""
    slice: str = ""
    """Column of ``data.test`` by whose values scores are given as well, such as a region. Empty: none."""
    test_size: Annotated[int, POSITIVE, Unit("records")] = 1000
    """The size of the public test part when ``data.test`` is empty."""
    columns: Columns = field(default_factory=columns_of_jobs)
    """The column of the source that each role (``common.tasks.roles``) is read from: ``data.text``, ``data.label``."""
    labels: str = ""
    """Label values in order, separated by commas, with double quotes around one that holds a comma, or a list of texts.
    Empty: the sorted distinct values of the file."""
    invalid_rows: Annotated[str, OneOf(("refuse", "skip"))] = "refuse"
    """What becomes of rows, but for a site's own, that cannot be read or lack a value or a known label: an error, or
    left out."""
    records: Annotated[int, NOT_NEGATIVE, Unit("records")] = 0
    """About how many records all sites have for training together, by what their stewards have declared: a recipe goes
    by it (``recipe``). 0: as many as simulated sites divide; of real sites it is unknown, and taken for 7,500."""
    partition: Annotated[str, OneOf(PARTITIONS)] = "dirichlet"
    """How simulated sites divide the records: ``iid``, ``dirichlet`` (by label, where there is one), ``natural``
    (by ``data.key``)."""
    dirichlet_alpha: Annotated[float, POSITIVE, RATIO] = 1.0
    """Concentration of the label-Dirichlet partition: smaller is more uneven."""
    key: str = ""
    """Column of the natural partition, such as an author or a domain."""
    person: str = ""
    """Column that says whose a record is, for ``privacy.unit = "person"``; it never leaves a site. Where records are
    divided, those of one person stay together. Empty: none."""
    seed: Annotated[int, RATIO] = 45
    """Seed of the partition and of the test part; fixed, so that runs are comparable (``experiments/log`` says how
    the default was chosen)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "columns", Columns({**columns_of_jobs(), **self.columns}))
        if self.slice and not self.test:
            raise ConfigError(
                f"data.slice is {self.slice!r}, a column of data.test, which is empty: name a file, or leave both empty"
            )
        if self.partition == "natural" and not self.key:
            raise ConfigError("data.partition is 'natural' but data.key is empty: name the column to divide by")


@dataclass(frozen=True)
class AdapterConfig(Section):
    """The low-rank adapter."""

    prefix: ClassVar[str] = "adapter."

    name: str = OPEN
    """Open: the strategy's own. Any other is refused unless it trains and freezes what the strategy needs."""
    rank: Annotated[int, POSITIVE, Unit("rows")] = 8
    """How many directions of a layer the adapter has: the number of rows of A and of columns of B."""
    alpha: Annotated[float, NOT_NEGATIVE, RATIO] = 8.0
    """LoRA's alpha: the product of the factors is scaled by alpha over what ``adapter.scale`` says. 0, of the adapters
    ``lora-frozen-a``, ``lora-frozen-b``, ``lora-increments``, ``lora-diagonal`` and ``salt``: what suits the start,
    measured at the server on public phrases (``common.starts.calibration``)."""
    scale: Annotated[str, OneOf(SCALES)] = "rank"
    """``rank``: the product is scaled by ``alpha / rank`` (LoRA). ``sqrt-rank``: by ``alpha / √rank`` (rsLoRA)."""
    targets: str = "auto"
    """Names of the adapted layers, separated by commas, as PEFT's ``target_modules``. ``auto``: those that make queries
    and values, as PEFT's table or the model's own names tell; of most encoders ``query,value``. ``values``: those that
    make values alone. ``all-linear``: the linear layers of all blocks, as PEFT's word has it; a head and a
    pooler are in none."""
    start: str = "orthonormal"
    """Where the factors begin: a row of ``common.starts.STARTS``, whose options are ``start.*``."""
    site_ranks: str = ""
    """Of a simulation: how many columns each site trains at most, separated by commas, from the first on again where
    there are more sites; strategies go by it that let sites differ. A deployed site declares its own (node setting
    ``rank``). Empty: ``adapter.rank``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = self.site_ranks.split(",") if self.site_ranks else []
        if not all(part.strip().isdecimal() and int(part) > 0 for part in ranks):
            raise ConfigError(f"adapter.site-ranks is {self.site_ranks!r}: write ranks of at least 1, such as '2,4,8'")
        if not self.target_modules:
            raise ConfigError("adapter.targets is empty: name the layers to adapt, such as 'query,value', or 'auto'")
        kind = next((name for name in self.target_modules if name in TARGET_KINDS), "")
        if kind and len(self.target_modules) > 1:
            raise ConfigError(f"adapter.targets is {self.targets!r}: write {kind!r} alone, or the layers' own names")

    def rank_of_site(self, part: int) -> int:
        """Return how many columns a simulation's site trains at most that plays this part; 0: as many as the run has.

        >>> AdapterConfig(site_ranks="2,4").rank_of_site(3)
        4
        """
        ranks = self.site_ranks.split(",")
        return int(ranks[part % len(ranks)]) if self.site_ranks else 0

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The names in ``targets``."""
        return tuple(name.strip() for name in self.targets.split(",") if name.strip())


@dataclass(frozen=True)
class HeadConfig(Section):
    """The classification head."""

    prefix: ClassVar[str] = "head."
    margin: ClassVar[float] = 3.0
    """For ``label-words``: how many logits a label leads the others by on its own phrases, on average over labels."""

    policy: Annotated[str, OneOf(HEAD_POLICIES)] = "trained"
    """``trained`` (averaged, and part of the clipped vector) or ``frozen`` (kept at its start)."""
    start: Annotated[str, OneOf(HEAD_STARTS)] = "label-words"
    """``zeros`` (of a trained head only), ``random`` (seeded), or ``label-words``: from public phrases about each
    label."""
    phrases: str = ""
    """For ``label-words``: phrases of one label separated by ``|``, labels by ``;``, in label order."""
    pool: Annotated[str, OneOf(HEAD_POOLS)] = "mean"
    """``mean``: the head reads the mean of the last hidden states over tokens (an image: as its task says). ``stock``:
    what transformers' own classifier of the model reads, such as BERT's pooler, so that PEFT takes the result with its
    head (docs/guides/serve.md); it needs ``model.feature-scale = 0``."""
    metric: Annotated[str, OneOf(HEAD_METRICS)] = "none"
    """``none``, or ``public``: features are centred and whitened by public text (``adapter.start = "public-metric"``)
    before the head sees them, so that clip and noise act where records differ."""


@dataclass(frozen=True)
class PrivacyConfig(Section):
    """What the run proposes to every site; a site may be stricter, never laxer."""

    prefix: ClassVar[str] = "privacy."

    mode: Annotated[str, OneOf(MECHANISMS)] = "dp-sgd"
    """A row of ``privacy.MECHANISMS``: ``dp-sgd``, ``secure-sum`` (the sites share the noise of a sum of which
    nobody sees the parts), ``client-level`` (a trusted server noises the sum; the unit is a whole site) or ``none``,
    which makes no privacy claim and says so everywhere."""
    unit: Annotated[str, OneOf(UNITS)] = "record"
    """Whom the promise is made to: one ``record``, or one ``person`` with all records that have one value in the column
    ``data.person``. What is drawn, clipped and counted is then a person. One ``site`` with all its records: of
    ``client-level``, and of no other mechanism."""
    records_per_person: Annotated[int, POSITIVE, Unit("records")] = 8
    """Of unit ``person``: most records of a person that a site uses, the same ones in every round. It bounds time and
    memory; the promise does not depend on it."""
    epsilon: Annotated[float, POSITIVE, RATIO] = 8.0
    """Budget of a site for the mechanism's unit, add or remove one: the most that its ledger may hold of the records by
    the end of the run, earlier runs included."""
    delta: Annotated[float, Interval(0, 0.5, high_too=False), RATIO] = 1e-5
    """The δ that the budget holds at. A site refuses one above one over its public size."""
    clip_norm: Annotated[float, CLIP_NORM, Unit("L2 norm")] = 1.0
    """L2 bound of one unit's gradient over all trained tensors together; a person's is the sum of their records'. With
    ``client-level`` it bounds a site's whole change of a round."""
    noise_multiplier: Annotated[float, NOT_NEGATIVE, Unit("clip norms")] = 0.0
    """Standard deviation of the noise over the clip norm. 0: the least that keeps every round of the run within
    ``privacy.epsilon``, found by each site for its own size and for what earlier runs on its records have left."""
    honest_sites: Annotated[int, NOT_NEGATIVE, Unit("sites")] = 0
    """For ``secure-sum``: least number of sites of a sum that do as they should and share nothing with the server.
    Their parts of the noise make what is priced. 0: the run's noise is not shared."""
    colluders: Annotated[int, NOT_NEGATIVE, Unit("sites")] = 1
    """For ``secure-sum``: most sites of a sum that may tell the server all they know. A sum has at least so many sites
    beside the honest ones."""
    drop_outs: Annotated[int, NOT_NEGATIVE, Unit("sites")] = 0
    """For ``secure-sum``: most sites that may be lost from an attempt, whose sum is then that of the others. They are
    beside the honest ones and the colluders. Where some are gone for good, fewer of the others may be. 0: a missing
    vector costs the attempt, and a round has fewer messages."""
    cohort: Annotated[int, NOT_NEGATIVE, Unit("sites")] = 0
    """For ``client-level``: how many sites there are, at most; public. The noised sum is divided by it times
    ``privacy.site-rate``, however many reply. 0: the run's unit is not a site."""
    site_rate: Annotated[float, Interval(0, 1), RATIO] = 1.0
    """For ``client-level``: chance of each site to be asked in a round, drawn by the server for each on its own. Below
    1 the price counts on nobody seeing who was asked."""
    ledger: str = ""
    """For ``client-level``: the server's ledger file, which all runs on these sites share so that their prices add up;
    relative to where the program was started. Empty: one in the run's folder, for this run alone."""

    @property
    def mechanism(self) -> Mechanism:
        """The row that the mode names, by the unit."""
        return MECHANISMS[self.mode].of_unit(self.unit)

    @property
    def rows_of_unit(self) -> int:
        """Most records that belong to one unit."""
        return self.records_per_person if self.mechanism.unit.grouped else 1


@dataclass(frozen=True)
class TrainingConfig(Section):
    """What a site does with one round."""

    prefix: ClassVar[str] = "training."
    momentum: ClassVar[float] = 0.9
    """For ``momentum``; also Adam's β₁."""
    beta2: ClassVar[float] = 0.999
    """Adam's β₂, for ``adam`` and ``adamw``."""

    local_steps: Annotated[int, POSITIVE, Unit("steps")] = OPEN
    """Optimiser steps of a round. Open: 1 in a private run, else 16."""
    sample_rate: Annotated[float, Interval(0, 1), Unit("probability")] = OPEN
    """Chance of each record to be in a step's batch (Poisson), so the expected batch over the size. Open: 0.33 in a
    private run, else 0.018."""
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = OPEN
    """``sgd``, ``momentum``, ``adam``, ``adamw``. Open: Adam, or plain SGD where the server has an optimiser."""
    learning_rate: Annotated[float, POSITIVE, RATIO] = OPEN
    """The site's, at the peak of ``schedule``. Open: what suits the optimiser, 0.01 for Adam and else 1."""
    weight_decay: Annotated[float, NOT_NEGATIVE, RATIO] = 0.0
    """Of the site's optimiser: the part of a weight that a step of rate 1 takes off."""
    batch_tokens: Annotated[int, NOT_NEGATIVE, Unit("tokens")] = 0
    """The size of a forward pass without privacy, padding included. 0: what suits the device. It changes speed and
    memory, not the result. Under privacy shapes are fixed (``common.model.shapes``), and this has no say."""


@dataclass(frozen=True)
class ServerConfig(Section):
    """What the server does with the sites' averaged change."""

    prefix: ClassVar[str] = "server."

    optimizer: Annotated[str, OneOf(SERVER_OPTIMIZERS)] = OPEN
    """``none``: the average is the new model. ``adam``: the change is a gradient for the server's Adam (FedAdam).
    ``adam-restarted``: its moments of the adapter begin again in every round. ``momentum``: gradient descent with a
    heavy ball. Open: what the strategy requires; else ``adam`` under privacy, and ``none`` without."""
    learning_rate: Annotated[float, POSITIVE, RATIO] = 0.025
    """The server's optimiser's, at the peak of ``schedule``. 0.025 suits Adam."""
    adam_tau: Annotated[float, POSITIVE, RATIO] = 1e-3
    """FedAdam's τ, added to the root of Adam's second moment: changes well below it do not become full steps."""
    momentum: Annotated[float, Interval(0, 1, low_too=True, high_too=False), RATIO] = 0.5
    """For ``momentum``: how much of the last step the next one keeps."""
    rule: str = "none"
    """What stands around the optimiser: a row of ``strategies.rules.RULES``, whose options are set under its name.
    ``lora-pro`` turns the change of A and B before it, ``allora``, ``align-guard`` and ``soft-threshold`` its step.
    ``loraprune`` moves nothing: it keeps the scores that ``python -m fedveil.contrib.experiments prune --by`` takes."""
    most_noise: Annotated[float, NOT_NEGATIVE, RATIO] = 0.0
    """For ``momentum``: standard deviation that the noise of a phase may give a trained number: the head first, the
    adapter, the head again. The learning rate is lowered to keep it, of the head and of the rest each for itself
    (``server.ruled``). 0: no bound."""
