"""Published systems beside the core: rows that a run may name, of which one is loaded when it does.

``ROWS`` is the only thing that the core reads here. A row is one file and one line of this table, and no part of the
core is written for it. Its options are the fields of its dataclass, and are settings of a run that names it.
``commands`` are of the ``fedveil`` program: functions as Typer takes them, or its groups.
"""

from __future__ import annotations

from collections.abc import Mapping

ROWS: Mapping[str, Mapping[str, str]] = {
    "adapters": {
        "lora-frozen-b": "adapters.lora_frozen_b:LoRAFrozenB",
        "lora-nested": "adapters.lora_nested:LoRANested",
        "lora-routed": "adapters.lora_routed:LoRARouted",
        "lora-increments": "adapters.lora_increments:LoRAIncrements",
        "lora-merged": "adapters.lora_merged:LoRAMerged",
        "lora-diagonal": "adapters.lora_diagonal:LoRADiagonal",
        "dora": "adapters.dora:DoRA",
        "dora-magnitude": "adapters.dora_magnitude:DoRAMagnitude",
        "dora-frozen-norm": "adapters.dora_frozen_norm:DoRAFrozenNorm",
        "randlora": "adapters.randlora:RandLoRA",
        "salt": "adapters.salt:SALT",
        "lora-mixture": "adapters.lora_mixture:LoRAMixture",
        "lora-shared": "adapters.lora_shared:LoRAShared",
        "lora-gated": "adapters.lora_gated:LoRAGated",
        "bone": "adapters.bone:Bone",
    },
    "strategies": {
        "fedex-lora": "strategies.fedex_lora:FedExLoRA",
        "flora": "strategies.flora:FLoRA",
        "rolora": "strategies.rolora:RoLoRA",
        "heterogeneous-ranks": "strategies.heterogeneous_ranks:HeterogeneousRanks",
        "flexlora": "strategies.flexlora:FlexLoRA",
        "dylora": "strategies.dylora:DyLoRA",
        "flylora": "strategies.flylora:FlyLoRA",
        "increlora": "strategies.increlora:IncreLoRA",
        "diffora": "strategies.diffora:DiffoRA",
        "switchlora": "strategies.switchlora:SwitchLoRA",
        "s2-lora": "strategies.s2_lora:S2LoRA",
        "eva-ranks": "strategies.eva_ranks:EVARanks",
        "diffora-gates": "strategies.diffora_gates:DiffoRAGates",
    },
    "controls": {"hetlora": "strategies.hetlora:HetLoRA"},
    "starts": {
        "svd-of-weights": "starts.svd_of_weights:SVDOfWeights",
        "public-gradient": "starts.public_gradient:PublicGradient",
        "shared": "starts.shared:Shared",
        "shards": "starts.shards:Shards",
        "sparse": "starts.sparse:Sparse",
        "minor-of-weights": "starts.minor_of_weights:MinorOfWeights",
        "lu-of-weights": "starts.lu_of_weights:LUOfWeights",
        "nystrom": "starts.nystrom:Nystrom",
        "eva": "starts.eva:EVA",
        "probe": "starts.probe:Probe",
        "nonprivate-gradient": "starts.nonprivate_gradient:NonprivateGradient",
        "dp-eva": "starts.dp_eva:DPEVA",
        "nonprivate-eva": "starts.nonprivate_eva:NonprivateEVA",
        "lora-ga": "starts.lora_ga:LoRAGA",
        "dp-lora-ga": "starts.dp_lora_ga:DPLoRAGA",
        "library": "starts.library:FromLibrary",
        "described": "starts.described:Described",
        "text-votes": "starts.text_votes:TextVotes",
    },
    "rules": {
        "lora-pro": "rules.lora_pro:LoRAPro",
        "allora": "rules.allora:ALLoRA",
        "align-guard": "rules.align_guard:AlignGuard",
        "soft-threshold": "rules.soft_threshold:SoftThreshold",
        "loraprune": "rules.loraprune:LoRAPrune",
    },
    "commands": {
        "library": "library.command:library",
        "compose": "library.command:compose",
        "transfer": "transfer.command:transfer",
        "judge": "tasks.judge:judge",
    },
    "tasks": {
        "grpo": "tasks.grpo:TASK",
        "audio-classification": "tasks.audio_classification:TASK",
        "speech-to-text": "tasks.speech_to_text:TASK",
        "preference": "tasks.preference:PREFERENCE",
    },
    "trackers": {
        "tensorboard": "trackers.tensorboard:TensorBoard",
        "mlflow": "trackers.mlflow:MLflow",
        "wandb": "trackers.wandb:WeightsAndBiases",
        "trackio": "trackers.trackio:Trackio",
    },
}
"""For each table of the core, the module and the class of every row beside it, by name."""
