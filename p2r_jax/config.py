"""Every setting of a run, typed and documented. YAML files and `--name value` fill these in.

This module imports nothing of the project, so that every package may read it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

RoleName = Literal["perceiver", "reasoner", "baseline", "joint"]


@dataclasses.dataclass
class MeshConfig:
    """Device mesh; the sizes multiply to the number of devices. One of them may be -1."""

    data: int = 1
    """Copies of the model, each with its share of the prompts."""
    fsdp: int = -1
    """Ways parameters and optimizer state are split; prompts are split over these too."""
    tensor: int = 1
    """Ways heads, MLP columns and the vocabulary are split."""
    cpu_devices: int | None = None
    """On a machine without accelerator: virtual devices to make (XLA uses one core for each)."""


@dataclasses.dataclass
class DistributedConfig:
    """Several processes, one for each host; all are started with the same command."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto = on where the environment shows more than one process: Cloud TPU pods, GKE, Slurm, Open
    MPI, or the three settings below."""
    coordinator: str | None = None
    """HOST:PORT of process 0; null = what the environment says, like the next two."""
    processes: int | None = None
    process: int | None = None
    """Number of this process, from 0."""
    heartbeat_seconds: int = 100
    """A process that is silent for so long is given up, and the others stop."""


@dataclasses.dataclass
class ModelConfig:
    path: str = "tiny"
    """A Hugging Face checkpoint folder, or `tiny`: the checkpoint inside this package."""
    prompts: str | None = None
    """Prompt set: the name of a shipped one, or a YAML file; None = the one that suits the
    checkpoint (`tiny` for the embedded model, else `default`)."""
    min_pixels: int | None = None
    """Per image, crops too; None = what the checkpoint's preprocessor_config.json says."""
    max_pixels: int | None = None
    kernels: Literal["auto", "xla", "xla_cpu", "pallas_tpu", "pallas_gpu"] = "auto"
    """Implementation of attention; auto = what suits the devices."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained weights. At the authors' learning rate most updates of a bfloat16 weight round
    to nothing."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the snapshot and of the update's forward and backward pass. Losses, log-probs and gradient
    sums are float32 always."""
    rollout_dtype: Literal["float32", "bfloat16"] | None = None
    """Of rollouts and evaluations; null = as `compute_dtype`."""
    remat: bool = True
    """Recompute activations in the backward pass instead of storing them."""


@dataclasses.dataclass
class BucketConfig:
    """Padded sizes a run may use, increasing; each one used is compiled once."""

    patches: list[int] = field(default_factory=lambda: [8192, 16384, 32768])
    """Of all images of a prompt."""
    prompt_tokens: list[int] = field(default_factory=lambda: [2560, 4608, 8704])
    """Of a prompt, visual tokens included."""
    response_tokens: list[int] = field(default_factory=lambda: [64, 256, 1024])
    """Of the completions: an update takes the smallest that holds the longest of its step, and a
    rollout grows its cache through them; beyond the last one `max_new_tokens`."""
    canvas: list[int] = field(default_factory=lambda: [2048, 4096, 8192])
    """Largest side of a resized image, pixels."""
    image: list[int] = field(default_factory=lambda: [2048, 4096, 8192])
    """Largest side of a source image, pixels."""
    image_gib: float = 4.0
    """Most GiB of source images on one device: ceil(images of the batch / (mesh.data × mesh.fsdp))
    × 3 × the buckets of their largest height and width. A training batch of more is an error, an
    evaluation takes it in parts."""

    def validate(self) -> None:
        """Raise ValueError for sizes that do not increase, or no room for images."""
        if self.image_gib <= 0:
            raise ValueError(f"buckets.image_gib must be above 0, got {self.image_gib}")
        lengths = self.response_tokens
        if lengths != sorted(set(lengths)) or min(lengths, default=1) < 1:
            raise ValueError(f"buckets.response_tokens must be increasing sizes, got {lengths}")


@dataclasses.dataclass
class DataConfig:
    train: str = "visual_search"
    """`visual_search` (the procedural task) or a .jsonl / .parquet file of rows."""
    validation: str = "visual_search"
    order: Literal["phase", "run"] = "phase"
    """phase = every phase shuffles the rows anew (the authors). run = one stream of rows over the
    whole run, of which each phase takes up where the one before stopped: runs of one `seed` then
    see the same questions in the same order, however they are divided into phases and steps."""
    max_bad_fraction: float = 0.01
    """Rows that cannot be read are listed, counted and skipped up to this fraction; in training the
    next row takes their place."""


@dataclasses.dataclass
class PhaseConfig:
    """One phase: one role learns, the other is frozen at the weights of the phase's start."""

    role: RoleName = "perceiver"
    """perceiver, reasoner; baseline (single-stage control: the plain image, the reasoning prompt);
    joint (control: both roles learn in every step, each against the frozen other one)."""
    steps: int | None = None
    epochs: float | None = None
    """Length: `steps`, or passes over the training rows (the last partial batch of a pass is
    dropped). Neither = 1 epoch."""
    prompts: int = 64
    """Questions per step."""
    group: int = 8
    """Completions per question."""
    max_new_tokens: int = 1024
    reasoner_max_new_tokens: int | None = None
    """`joint`: of the reasoner's samples; null = as `max_new_tokens`."""
    temperature: float = 1.0
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 = all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    penalize_prompt: bool = True
    """The penalty counts tokens of the prompt as seen."""
    partner_max_new_tokens: int = 2048
    """The partner decodes greedily."""
    partner: Literal["phase", "step"] = "phase"
    """Weights of the partner: of the phase's start (the authors), or the live ones of each step."""
    microbatch: int = 0
    """Prompts per gradient microbatch, at least one for each part that the mesh splits a batch
    into (data × fsdp); 0 = all at once. The gradient does not depend on it."""
    minibatches: int = 1
    """Optimizer updates that share the questions of a step."""
    inner_epochs: int = 1
    """Passes of those updates over a step's experience. With more than one update the ratio is
    taken against the policy that the step began with, and clipping acts."""
    dynamic_sampling: int = 0
    """Groups whose rewards all agree are replaced from up to so many further batches of questions;
    what is still missing then is filled up with them. 0 = they stay (the authors)."""
    role_anchor: float = 0.0
    """Role anchor, an addition to the paper: weight of the cross-entropy on the phase snapshot's
    own greedy outputs for the idle role. 0 = the authors' method; the loss is logged all the same,
    as the drift of the role that does not learn."""
    role_anchor_prompts: int = 16
    """Prompts of the idle role that it is taken on in each step, at most `prompts`; 0 = none, and
    nothing is logged, as with `partner: step`."""
    start: Literal["last", "best"] = "last"
    """Weights that the phase starts with: the last ones of the phase before (the authors), or its
    best ones by `checkpoint.keep_best`, of its evaluations and of the one of its own start; with
    `optimizer.reset: false` the optimizer's state of that step, too. If these are not the last
    ones, the phase begins with a full evaluation of its own, by which it is judged at its end. Not
    for the first phase, which in later rounds follows the last one."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates that one step makes."""
        return self.minibatches * self.inner_epochs

    def validate(self) -> None:
        """Raise ValueError naming the first field that cannot work."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both set: set one of them")
        for name in ("steps", "reasoner_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or null, got {value}")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")
        counts = "prompts group max_new_tokens partner_max_new_tokens minibatches inner_epochs"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dynamic_sampling", "role_anchor_prompts", "microbatch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.prompts % self.minibatches:
            raise ValueError(
                f"prompts = {self.prompts} must be a multiple of minibatches = {self.minibatches}"
            )
        if self.microbatch and (self.prompts // self.minibatches) % self.microbatch:
            raise ValueError(
                f"prompts / minibatches = {self.prompts // self.minibatches} must be a multiple of "
                f"microbatch = {self.microbatch}"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.role_anchor and not self.role_anchor_prompts:
            raise ValueError("role_anchor needs role_anchor_prompts of at least 1")
        if self.role_anchor and self.partner == "step":
            raise ValueError(
                "role_anchor holds the idle role at the snapshot: set partner to phase"
            )
        if self.role_anchor and self.role in ("baseline", "joint"):
            raise ValueError(f"role_anchor: {self.role!r} has no idle role to anchor")
        if self.reasoner_max_new_tokens is not None and self.role != "joint":
            raise ValueError("reasoner_max_new_tokens is for role 'joint'; set max_new_tokens")
        if self.dynamic_sampling and self.role == "joint":
            raise ValueError("dynamic_sampling: 'joint' samples both roles on the same questions")


@dataclasses.dataclass
class RolloutConfig:
    """How many completions decode at once. Changes speed and memory, never a completion."""

    slots: int | None = None
    """Prompts of a step that the policy decodes at once; a slot whose completions have all ended
    takes the next prompt. null = all."""
    columns: int | None = None
    """Completions of a prompt that decode at once; null = the whole group."""
    refill: int | None = None
    """Free slots that are filled together, of the policy and of `greedy_slots`; null = a
    quarter of the slots, or all at once if every prompt of the policy has a slot."""
    greedy_slots: int = 64
    """As `slots`, for the partner and for evaluations while training."""


@dataclasses.dataclass
class OptimizerConfig:
    """The authors' AdamW by default."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps row and column means of the second moment and no first one (beta1, beta2 and
    eps do not apply): the optimizer then takes next to no memory."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of AdamW's first moment. The second stays float32: steps of 1 - beta2 would round away."""
    reset: bool = True
    """A fresh optimizer and learning-rate schedule for each phase; false = one for the run."""
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    final_fraction: float = 1.0
    """Learning rate at the phase's end relative to its peak; below 1 it decays along a cosine."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    freeze_vision: bool = False
    """Leave the vision tower as it is (no gradient, no weight decay)."""
    max_skipped: int = 20
    """Updates with a non-finite gradient are skipped; more than this many in a phase stop the
    run."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The authors' objective by default (P2R §2)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    ratio_level: Literal["token", "sequence"] = "token"
    """sequence = GSPO; it wants clips near 3e-4."""
    kl_weight: float = 0.01
    """0 skips the reference pass."""
    kl_kind: Literal["k1", "k2", "k3", "abs"] = "k3"
    reference: Literal["phase", "start"] = "phase"
    """What the KL is taken to: the weights of the phase's start, or those of the run's (one more
    copy in memory)."""
    entropy_weight: float = 0.0
    """Of the mean entropy, as a bonus."""
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: of the group, of all rewards of the step,
    or no division (Dr. GRPO)."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss. Their rewards still count in
    their group's mean."""
    sampler_correction: float | None = None
    """Weigh tokens by min(trainer / sampler probability, this), against rollouts whose numbers
    differ from the update's. null = no weights; the gap is logged all the same."""


@dataclasses.dataclass
class VerifierConfig:
    """Who judges answers of the form `free_form`. Mode `none` refuses data that has any."""

    kind: Literal["none", "callable", "endpoint", "model"] = "none"
    """callable = your own function; endpoint = an OpenAI-compatible server; model = the frozen
    weights of the phase's start, in this process."""
    function: str | None = None
    """`callable`: PACKAGE.MODULE:NAME of a function (question, answer, response) -> bool."""
    base_url: str | None = None
    """`endpoint`: up to and with /v1."""
    model: str | None = None
    """`endpoint`: name of the model there."""
    api_key_variable: str = "OPENAI_API_KEY"
    """`endpoint`: environment variable that holds the key, if the server wants one."""
    timeout_seconds: float = 60.0
    """`endpoint`: of one request."""
    attempts: int = 3
    """A judgement that fails so often is dropped from the loss and counted."""
    concurrency: int = 16
    """Judgements that run at the same time (callable, endpoint)."""

    def validate(self) -> None:
        """Raise ValueError naming the field that is missing for this kind."""
        needed = {"callable": ["function"], "endpoint": ["base_url", "model"]}.get(self.kind, [])
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"verifier.{name} must be set for verifier.kind {self.kind!r}")
        for name in ("attempts", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"verifier.{name} must be at least 1, got {getattr(self, name)}")
        if self.timeout_seconds <= 0:
            raise ValueError(
                f"verifier.timeout_seconds must be above 0, got {self.timeout_seconds}"
            )


@dataclasses.dataclass
class RewardConfig:
    """The authors' penalties (P2R §1), and the answer rule of evaluations."""

    overlap_penalty: bool = True
    """A box list in which two boxes have IoU > 0.5 earns 0."""
    label_penalty: bool = True
    """A box list with an empty label, or the label `description`, earns 0."""
    answer_rule: Literal["evaluation", "authors"] = "evaluation"
    """What counts as an answer. `evaluation`: the first closed <answer>…</answer> and nothing else,
    among the options that the question has, exactly as evaluations score. `authors`: without a
    closed tag the whole completion, and A to E are options always. It can be gamed: completions
    that never close their tag earn by it and score 0 in evaluations."""
    max_dropped_fraction: float = 0.2
    """A step in which more samples than this could not be graded stops the run."""


@dataclasses.dataclass
class EvalDuringTraining:
    every: int = 10
    """Steps between greedy evaluations of the live weights; 0 = only where a phase begins and
    ends."""
    questions: int = 200
    """Questions of those evaluations."""
    final_questions: int = 1000
    """Questions of the evaluations before training and after each phase."""
    modes: list[str] = field(
        default_factory=lambda: ["p2r", "live_perceiver", "live_reasoner", "default"]
    )
    """p2r = both roles by the live weights; live_perceiver, live_reasoner = one of them, the other
    by the snapshot of the phase's start, so that it shows which role drifts; default = the direct
    answer to the plain image, without boxes, so that it shows what training does to the model
    itself."""
    final_modes: list[str] = field(
        default_factory=lambda: ["default", "p2r", "oracle_box", "random_box"]
    )
    """Modes before training and at its end; `modes` in between."""
    batch: int = 64
    """Questions whose images are uploaded together."""
    image_cache_gib: float = 1.0
    """As of `p2r eval`: host memory of a process for decoded images that rows share."""
    repetition_penalty: float = 1.0
    """On tokens of the prompt and the completion; the authors evaluate with 1.05."""
    penalize_prompt: bool = True


@dataclasses.dataclass
class LogConfig:
    samples_every: int = 1
    """Steps between sample files (every completion of some prompts, with pictures)."""
    sample_prompts: int = 4
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclasses.dataclass
class CheckpointConfig:
    every: int = 30
    """Steps; the end of a phase has one too."""
    keep: int = 2
    """Newest checkpoints that stay."""
    keep_best: str | None = "p2r"
    """Evaluation mode by whose accuracy weights are best; their checkpoint stays too, and a step
    that is the best so far has one. `p2r` stands for the first of `eval.modes` where they lack it;
    null = no best. Compared are all evaluations of the run, the one before training included, on
    the questions that they share: the first min(eval.questions, eval.final_questions) of the
    validation rows; of equal ones the later is taken. With 200 questions the standard error of an
    accuracy is up to 3.5 points, so the choice between close ones is by chance, and the figure of
    the one chosen is too good: eval.questions sets by how much."""
    keep_phase_ends: bool = True
    """The checkpoints of the phases' last steps stay too."""


@dataclasses.dataclass
class HealthConfig:
    """When a run is not well: thresholds on what it measures of itself, null = not watched.

    Values are medians of the last `window` steps of a phase, so that one noisy step says nothing,
    and of evaluations the newest one; "first" are the medians of the phase's first `window` steps.
    A rule warns when its threshold is crossed, and again only after `window` steps on the right
    side. In a joint phase each role is watched by itself.
    """

    action: Literal["warn", "stop_phase", "stop"] = "warn"
    """warn = a line on the console, a row in RUN/warnings.jsonl, the metric `health/warnings`;
    stop_phase = also end the phase there, so that its evaluation and the next phase follow; stop =
    also save and end the run with exit code 2. The same command then stops again at once: go on
    with another action or threshold, which may change in a run."""
    window: int = 5
    """Steps."""
    kl: float | None = 0.5
    """Most `kl/mean`: nats per token to the reference, the weights of the phase's start."""
    truncated: float | None = 0.2
    """Most `completion/truncated_fraction`: completions cut at max_new_tokens."""
    entropy_collapse: float | None = 0.1
    """Least `entropy/mean` relative to the first."""
    entropy_rise: float | None = 2.5
    """Most `entropy/mean` relative to the first, of which less than 0.04 nats count as 0.04."""
    teaching_groups: float | None = 0.25
    """Least `reward/teaching_groups`: groups of an update whose rewards differ; others teach
    nothing."""
    only_training: float | None = 0.1
    """Most `reward/only_training`: completions that the rewarding rule calls right and the rule of
    evaluations wrong."""
    reward_gap: float | None = 0.15
    """Most that the accuracy of `p2r` (else of `baseline`) in a short evaluation may fall behind
    its highest of the phase, plus what `reward/mean` gained since; only if the accuracy fell by
    more than its 95 % interval reaches up."""
    anchor_rise: float | None = 0.5
    """Most that `loss/anchor` may rise over the first: nats per token by which the idle role leaves
    what it wrote at the phase's start."""
    idle_drop: float | None = 0.15
    """Most that the accuracy with the idle role live and the learning one frozen (`live_reasoner`
    in a perceiver phase, `live_perceiver` in a reasoner phase) may fall behind its highest of the
    phase; only if by more than its 95 % interval reaches up."""
    grad_norm: float | None = None
    """Most `grad_norm`, before clipping."""
    grad_norm_rise: float | None = 10.0
    """Most `grad_norm` relative to the median of the phase so far."""

    def validate(self) -> None:
        """Raise ValueError naming the first field that cannot work."""
        if self.window < 1:
            raise ValueError(f"health.window must be at least 1, got {self.window}")
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if isinstance(value, (int, float)) and value <= 0:
                raise ValueError(
                    f"health.{part.name} must be above 0, or null to switch the rule off; "
                    f"got {value}"
                )
        for name in ("truncated", "entropy_collapse", "teaching_groups", "only_training"):
            value = getattr(self, name)
            if value is not None and value >= 1:
                raise ValueError(f"health.{name} is a share and must be below 1, got {value}")
        for name in ("entropy_rise", "grad_norm_rise"):
            value = getattr(self, name)
            if value is not None and value <= 1:
                raise ValueError(f"health.{name} is a factor and must be above 1, got {value}")


@dataclasses.dataclass
class TrainConfig:
    """A PRA-GRPO run."""

    run: str = "runs/p2r"
    """Folder of everything the run writes; with several processes, one that all of them see."""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    buckets: BucketConfig = field(default_factory=BucketConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    phases: list[PhaseConfig] = field(
        default_factory=lambda: [
            PhaseConfig(role="perceiver"),
            PhaseConfig(role="reasoner", max_new_tokens=2048),
        ]
    )
    """The authors' schedule by default: one perceiver epoch, then one reasoner epoch."""
    rounds: int = 1
    """Times that the phases are gone through."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalDuringTraining = field(default_factory=EvalDuringTraining)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    export: Literal["best", "last", "none"] | bool = "best"
    """Weights that a finished run writes to RUN/export in Hugging Face format: the best ones by
    `checkpoint.keep_best` (the last ones if nothing tells), the last ones, or none. true and false
    of earlier versions are best and none."""

    def __post_init__(self) -> None:
        if isinstance(self.export, bool):
            self.export = "best" if self.export else "none"

    def validate(self) -> None:
        """Raise ValueError naming the first field that cannot work."""
        if not self.phases:
            raise ValueError("phases: at least one phase is needed")
        for i, phase in enumerate(self.phases):
            if phase.start == "best" and i == 0 and self.rounds == 1:
                raise ValueError("phases[0].start: best, but there is no phase before it")
            if phase.start == "best" and self.checkpoint.keep_best is None:
                raise ValueError(f"phases[{i}].start: best needs checkpoint.keep_best")
        for name in ("eval.batch", "log.samples_every", "checkpoint.every", "checkpoint.keep"):
            part, field_name = name.split(".")
            if getattr(getattr(self, part), field_name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.eval.image_cache_gib < 0:
            raise ValueError(f"eval.image_cache_gib is negative: {self.eval.image_cache_gib}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        for name in ("slots", "columns", "refill", "greedy_slots"):
            value = getattr(self.rollout, name)
            if value is not None and value < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {value}")
        if self.loss.dual_clip is not None and self.loss.dual_clip <= 1:
            raise ValueError(f"loss.dual_clip must be above 1 or null, got {self.loss.dual_clip}")
        if self.loss.sampler_correction is not None and self.loss.sampler_correction <= 0:
            raise ValueError("loss.sampler_correction must be above 0 or null")
        self.buckets.validate()
        self.verifier.validate()
        self.health.validate()
        for i, phase in enumerate(self.phases):
            try:
                phase.validate()
            except ValueError as error:
                raise ValueError(f"phases[{i}].{error}") from error


@dataclasses.dataclass
class EvalConfig:
    """An evaluation."""

    model: str = "tiny"
    """A Hugging Face checkpoint folder, a run folder (its export), or `tiny`."""
    benchmark: str = "visual_search"
    """`visual_search`, a benchmark that `p2r data prepare` made (vstar, hrbench_4k, ...), or a
    .jsonl / .parquet file of rows."""
    data: str = "data"
    """Folder of the prepared benchmarks."""
    preset: Literal["ours", "authors"] = "ours"
    """Where pixel budget, lengths and penalty below are null. `ours`: the budget of the run or
    checkpoint, no penalty. `authors`: what the published numbers were made with, 16384 to 4194304
    pixels an image, a repetition penalty of 1.05, questions worded as in their code."""
    split: Literal["train", "validation", "test"] = "test"
    modes: list[str] = field(default_factory=lambda: ["default", "p2r", "oracle_box", "random_box"])
    """default (direct answer), baseline (or thinking), p2r, oracle_box (true boxes), random_box,
    shuffled_box, grid, annotated_only, crops_only; with options, such as `p2r:crops=1` or
    `p2r:padding=0,crops=5`."""
    samples: int = 0
    """Answers to each question, drawn at `temperature`, for maj@k and pass@k; 0 = one, greedy."""
    temperature: float = 1.0
    prompts: str | None = None
    """As `model.prompts` of training."""
    limit: int | None = None
    """Questions; None = 1000 of `visual_search`, all rows of a file."""
    offset: int = 0
    seed: int = 0
    batch: int = 64
    """Questions whose images are uploaded, and which decode, at once."""
    image_cache_gib: float = 1.0
    """Host memory of a process for the decoded images that were used last: rows that share one, as
    the rotations of an HR-Bench question do, decode it once. 0 = none."""
    out: str = "runs/eval"
    """Folder for `eval/<name>.jsonl` (every sample) and `eval/<name>.json` (the summary)."""
    name: str = "eval"
    resume: bool = False
    """Go on with the records that OUT/eval/NAME.jsonl holds; without it, an evaluation that was not
    finished is refused and a finished one is made again."""
    pictures: int = 60
    """Samples whose picture is saved for the report."""
    perceiver_max_new_tokens: int = 256
    reasoner_max_new_tokens: int = 1024
    direct_max_new_tokens: int = 16
    repetition_penalty: float | None = None
    """On tokens of the prompt and the completion; null = by the preset."""
    penalize_prompt: bool = True
    min_pixels: int | None = None
    max_pixels: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    kernels: Literal["auto", "xla", "xla_cpu", "pallas_tpu", "pallas_gpu"] = "auto"
    """As `model.kernels` of training."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    buckets: BucketConfig | None = None
    """None = sizes that fit the model's pixel budget."""

    def validate(self) -> None:
        """Raise ValueError naming the first field that cannot work."""
        caps = ("perceiver_max_new_tokens", "reasoner_max_new_tokens", "direct_max_new_tokens")
        for name in ("batch", *caps):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.image_cache_gib < 0:
            raise ValueError(f"image_cache_gib must not be negative, got {self.image_cache_gib}")
        if self.samples < 0 or (self.samples and self.temperature <= 0):
            raise ValueError("samples must be at least 0, and temperature above 0 to draw them")
        self.verifier.validate()
        if self.buckets is not None:
            self.buckets.validate()
