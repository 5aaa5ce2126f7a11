"""Every setting of a run, typed and documented. YAML files and `--name value` fill these in.

This module imports nothing of the project, so that every package may read it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

RoleName = Literal["perceiver", "reasoner", "baseline"]


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
class ModelConfig:
    path: str = "tiny"
    """A Hugging Face checkpoint folder, or `tiny`: the checkpoint inside this package."""
    prompts: str | None = None
    """Prompt set: the name of a shipped one, or a YAML file; None = the one that suits the
    checkpoint (`tiny` for the embedded model, else `default`)."""
    min_pixels: int | None = None
    """Per image, crops too; None = what the checkpoint's preprocessor_config.json says."""
    max_pixels: int | None = None
    kernels: Literal["auto", "xla", "pallas_tpu", "pallas_gpu"] = "auto"
    """Implementation of attention; auto = what suits the devices."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of rollouts, the reference and the update's forward and backward pass. The trained weights
    and the optimizer are float32 always."""
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

    def validate(self) -> None:
        """Raise ValueError for sizes that do not increase."""
        lengths = self.response_tokens
        if lengths != sorted(set(lengths)) or min(lengths, default=1) < 1:
            raise ValueError(f"buckets.response_tokens must be increasing sizes, got {lengths}")


@dataclasses.dataclass
class DataConfig:
    train: str = "visual_search"
    """`visual_search` (the procedural task) or a .jsonl / .parquet file of rows."""
    validation: str = "visual_search"
    max_bad_fraction: float = 0.01
    """Rows that cannot be read are listed, counted and skipped up to this fraction."""


@dataclasses.dataclass
class PhaseConfig:
    """One phase: one role learns, the other is frozen at the weights of the phase's start."""

    role: RoleName = "perceiver"
    steps: int = 156
    prompts: int = 64
    """Questions per step."""
    group: int = 8
    """Completions per question."""
    max_new_tokens: int = 1024
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
    microbatch: int = 0
    """Prompts per gradient microbatch; 0 = all at once. The gradient does not depend on it."""
    role_anchor: float = 0.0
    """Role anchor, an addition to the paper: weight of the cross-entropy on the phase snapshot's
    own greedy outputs for the idle role. 0 = the authors' method."""
    role_anchor_prompts: int = 16


@dataclasses.dataclass
class RolloutConfig:
    """How many completions decode at once. Changes speed and memory, never a completion."""

    slots: int | None = None
    """Prompts of a step that the policy decodes at once; a slot whose completions have all ended
    takes the next prompt. null = all."""
    columns: int | None = None
    """Completions of a prompt that decode at once; null = the whole group."""
    refill: int | None = None
    """Free slots that are filled together; null = a quarter of the slots, or all at once if every
    prompt has a slot."""
    greedy_slots: int = 64
    """As `slots`, for the partner and for evaluations."""


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW on float32 weights, reset at each phase start."""

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
    """Steps with a non-finite gradient are skipped; more than this many stop the run."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The authors' objective by default (P2R §2)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    kl_weight: float = 0.01
    """0 skips the reference pass."""
    kl_kind: Literal["k1", "k2", "k3", "abs"] = "k3"
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    normalize_by_std: bool = True
    max_dropped_fraction: float = 0.2
    """A step in which more samples than this could not be graded stops the run."""


@dataclasses.dataclass
class EvalDuringTraining:
    every: int = 0
    """Steps between greedy evaluations of the live weights in both roles; 0 = only where a phase
    begins and ends."""
    questions: int = 200
    """Questions of those evaluations."""
    final_questions: int = 1000
    """Questions of the evaluations before training and after each phase."""
    modes: list[str] = field(default_factory=lambda: ["p2r"])
    final_modes: list[str] = field(
        default_factory=lambda: ["default", "p2r", "oracle_box", "random_box"]
    )
    """Modes before training and at its end; `modes` in between."""
    batch: int = 64
    """Questions whose images are uploaded together."""
    repetition_penalty: float = 1.0
    """On tokens of the prompt and the completion; the authors evaluate with 1.05."""
    penalize_prompt: bool = True


@dataclasses.dataclass
class LogConfig:
    samples_every: int = 10
    """Steps between sample files (every completion of some prompts, with pictures)."""
    sample_prompts: int = 4
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclasses.dataclass
class CheckpointConfig:
    every: int = 30
    keep: int = 2


@dataclasses.dataclass
class TrainConfig:
    """A PRA-GRPO run."""

    run: str = "runs/p2r"
    """Folder of everything the run writes."""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    buckets: BucketConfig = field(default_factory=BucketConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    phases: list[PhaseConfig] = field(
        default_factory=lambda: [
            PhaseConfig(role="perceiver"),
            PhaseConfig(role="reasoner", max_new_tokens=2048),
        ]
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalDuringTraining = field(default_factory=EvalDuringTraining)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: bool = True
    """Write the final weights in Hugging Face format to RUN/export."""

    def validate(self) -> None:
        """Raise ValueError naming the first field that cannot work."""
        if not self.phases:
            raise ValueError("phases: at least one phase is needed")
        for name in ("eval.batch", "log.samples_every", "checkpoint.every", "checkpoint.keep"):
            part, field_name = name.split(".")
            if getattr(getattr(self, part), field_name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("slots", "columns", "refill", "greedy_slots"):
            value = getattr(self.rollout, name)
            if value is not None and value < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {value}")
        if self.loss.dual_clip is not None and self.loss.dual_clip <= 1:
            raise ValueError(f"loss.dual_clip must be above 1 or null, got {self.loss.dual_clip}")
        self.buckets.validate()
        for i, phase in enumerate(self.phases):
            for name in ("steps", "prompts", "group", "max_new_tokens", "partner_max_new_tokens"):
                if getattr(phase, name) < 1:
                    raise ValueError(f"phases[{i}].{name} must be at least 1")
            if phase.microbatch and phase.prompts % phase.microbatch:
                raise ValueError(
                    f"phases[{i}].prompts = {phase.prompts} must be a multiple of "
                    f"phases[{i}].microbatch = {phase.microbatch}"
                )
            if phase.temperature <= 0:
                raise ValueError(f"phases[{i}].temperature must be above 0: training samples")
            if phase.role_anchor and not 1 <= phase.role_anchor_prompts <= phase.prompts:
                raise ValueError(
                    f"phases[{i}].role_anchor_prompts must be 1 to phases[{i}].prompts"
                )
            if phase.role_anchor and phase.role == "baseline":
                raise ValueError(f"phases[{i}]: the baseline has no idle role to anchor")


@dataclasses.dataclass
class EvalConfig:
    """An evaluation."""

    model: str = "tiny"
    """A Hugging Face checkpoint folder, a run folder (its export), or `tiny`."""
    benchmark: str = "visual_search"
    """`visual_search`, or a .jsonl / .parquet file of rows."""
    split: Literal["train", "validation", "test"] = "test"
    modes: list[str] = field(default_factory=lambda: ["default", "p2r", "oracle_box", "random_box"])
    """default (direct answer), baseline, p2r, oracle_box (true boxes), random_box."""
    prompts: str | None = None
    """As `model.prompts` of training."""
    limit: int | None = None
    """Questions; None = 1000 of `visual_search`, all rows of a file."""
    offset: int = 0
    seed: int = 0
    batch: int = 64
    """Questions whose images are uploaded, and which decode, at once."""
    out: str = "runs/eval"
    """Folder for `eval/<name>.jsonl` (every sample) and `eval/<name>.json` (the summary)."""
    name: str = "eval"
    pictures: int = 60
    """Samples whose picture is saved for the report."""
    perceiver_max_new_tokens: int = 256
    reasoner_max_new_tokens: int = 1024
    direct_max_new_tokens: int = 16
    repetition_penalty: float = 1.0
    """On tokens of the prompt and the completion; the authors evaluate with 1.05."""
    penalize_prompt: bool = True
    min_pixels: int | None = None
    max_pixels: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    kernels: Literal["auto", "xla", "pallas_tpu", "pallas_gpu"] = "auto"
    """As `model.kernels` of training."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    buckets: BucketConfig | None = None
    """None = sizes that fit the model's pixel budget."""

    def validate(self) -> None:
        """Raise ValueError naming the first field that cannot work."""
        caps = ("perceiver_max_new_tokens", "reasoner_max_new_tokens", "direct_max_new_tokens")
        for name in ("batch", *caps):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.buckets is not None:
            self.buckets.validate()
