"""The Plan: Model x Format x Policy x Target x Gpu, fully resolved. Serialised as ``plan.json``.

The plan is the only thing that later stages read about the user's wishes: re-running a stage from it needs
nothing else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from toolchain.core.findings import Finding
from toolchain.families.base import Family
from toolchain.plan.policy import PolicyOptions
from toolchain.plan.steps import Sparsity, Training

SCHEMA_VERSION = 1
SOURCE_DTYPE = "source"
"""Pseudo format of parts that keep the dtype of the source."""
KV_FRACTION = 0.85
"""Share of the memory left after the weights that the KV cache may take, for ``kv_cache_config``. TensorRT-LLM's
default is 0.9, its own configurations (examples/configs) have 0.75 to 0.9: CUDA graphs and workspaces need the rest."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One part of one decoder layer (or of the whole model, ``layer`` None) and the format that it gets."""

    role: str
    layer: int | None
    format: str
    """A format name, or ``source``."""
    reason: str
    source: str
    """The rule, option or document that decided."""
    modules: int
    parameters: int
    source_bytes: int
    planned_bytes: int
    projections: tuple[str, ...] = ()
    """Projections that it speaks about; empty: all of this role in this layer."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    data: str | tuple[str, ...]
    """``PATH`` of a text or JSONL file or a directory of them, or a hub data set name, or several of these, drawn from
    evenly; empty: the model directory's own ``calibration.jsonl`` if it has one."""
    samples: int = 128
    length_tokens: int = 512
    seed: int = 0
    chat_template: bool = False
    batch_size: int = 8
    mode: str = "routed"
    """Which experts see a token: ``routed`` (the router's own choice), ``topk`` (``topk_ratio`` of all experts, the
    likeliest first) or ``all``."""
    topk_ratio: float = 1.0
    """Share of the experts that see each token in mode ``topk``, at least the model's own top-k."""
    min_tokens_per_expert: int = 0
    """Draw more samples, up to ``max_samples``, until every expert saw so many tokens."""
    max_samples: int = 1024
    sampling: str = "random"
    """``random``, or ``balanced``: choose from a larger pool the samples that fill starved experts."""
    strict: bool = False
    """Fail when an expert saw fewer than ``min_tokens_per_expert`` tokens (at least one) in the end."""
    allow_tf32: bool = False
    """TensorFloat-32 in matmuls of calibration: faster on GPUs, with 10 bits of mantissa."""

    def __post_init__(self) -> None:
        if isinstance(self.data, list):  # as JSON and YAML have it
            object.__setattr__(self, "data", tuple(self.data))

    @property
    def sources(self) -> tuple[str, ...]:
        """``data`` as a tuple; empty for the model's own."""
        return (self.data,) if self.data and isinstance(self.data, str) else tuple(self.data)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Limits and parallelism that the engine is planned for."""

    max_batch_size: int
    """Requests at once; with ``attention_dp`` on each rank, as TensorRT-LLM's option of this name counts them."""
    max_seq_len: int
    tp: int = 1
    ep: int = 1
    pp: int = 1
    attention_dp: bool = False
    """Every rank of tp runs attention, dense MLPs and shared experts whole, for requests of its own."""
    max_num_tokens: int = 8192
    """Tokens of one forward step of a rank: the default of TensorRT-LLM's LLM API."""
    chunked_prefill: bool = True
    """Prompts longer than ``max_num_tokens`` are prefilled in several steps."""
    moe_backend: str = ""
    """``moe_config.backend`` that is wished for; empty: chosen from format, GPU and release."""
    eplb_slots: int = 0
    """Expert slots of a layer over all ranks of ep, replicas included (expert load balancing); 0: none."""
    eplb_layer_updates: int = 0
    """Layers whose experts are placed anew in each iteration; 0: the placement stays as at start."""
    llm_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the LLM API, merged over all others; unknown ones are refused when they are rendered."""

    @property
    def kv_fraction(self) -> float:
        """``free_gpu_memory_fraction`` of the KV cache: ``KV_FRACTION`` unless ``llm_args`` says otherwise."""
        config = self.llm_args.get("kv_cache_config")
        asked = config.get("free_gpu_memory_fraction") if isinstance(config, dict) else None
        return float(asked) if isinstance(asked, (int, float)) and 0 < asked <= 1 else KV_FRACTION

    @property
    def speculative(self) -> dict[str, Any]:
        """``speculative_config`` of ``llm_args``; empty: none."""
        found = self.llm_args.get("speculative_config")
        return found if isinstance(found, dict) else {}

    @property
    def mtp_layers(self) -> int:
        """Layers of multi-token prediction that draft: the model's own, loaded only when they are asked for."""
        if str(self.speculative.get("decoding_type", "")).upper() != "MTP":
            return 0
        return max(1, int(self.speculative.get("num_nextn_predict_layers") or 1))

    @property
    def attention_tp(self) -> int:
        """Ranks that attention, dense MLPs, shared experts and the vocabulary are cut over."""
        return 1 if self.attention_dp else self.tp


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Planned figures. Bytes unless the name says otherwise; ``per_gpu`` figures are for the fullest rank."""

    parameters: int
    active_parameters: int
    """Parameters that one token uses (top-k experts instead of all)."""
    quantized_parameters: int
    source_bytes: int
    checkpoint_bytes: int
    effective_bits: float
    """Checkpoint bits per parameter, scales included."""
    weights_per_gpu_bytes: int
    kv_cache_per_gpu_bytes: int
    activations_per_gpu_bytes: int
    gpu_memory_bytes: int
    """Memory of one GPU; 0 when planned for the CPU."""
    quantize_memory_bytes: int
    """Host (or GPU) memory that quantization in memory needs."""
    quantize_seconds: float
    """Rough time of the quantize stage on this kind of machine; the basis is in ``basis``."""
    basis: str
    stream_way: str = ""
    """How it is quantized without the whole model in memory: ``data-free``, tensor by tensor, or by ``layers``."""
    stream_memory_bytes: int = 0
    """Memory that this takes beside the libraries, which take about 0.7 GB."""
    stream_disk_bytes: int = 0
    """Disk for hidden states between layers, beside the checkpoint."""
    training_memory_bytes: int = 0
    """Memory of the fullest device while it trains; 0: nothing is trained."""
    training_memory: dict[str, int] = field(default_factory=dict)
    """What of it takes how much."""
    training_disk_bytes: int = 0
    """Disk for the trained model, the student before the first step and the checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    model: str
    """What the user typed; a local directory is made absolute."""
    family: str
    architecture: str
    model_identity: str
    """SHA-256 over config.json and the shard headers: the plan refuses another model of the same name."""
    format: str
    policy: str
    policy_options: PolicyOptions
    recipe: str
    """How scales and codes are chosen, resolved: ``max``, or ingredients joined by ``+``."""
    kv_cache: str
    gpu: str
    target: str
    target_version: str
    serving: Serving
    calibration: Calibration
    assignments: tuple[Assignment, ...] = field(repr=False)
    estimates: Estimates
    findings: tuple[Finding, ...] = ()
    auto: dict[str, Any] | None = field(default=None, repr=False)
    """How a search for mixed precision came to these formats (``toolchain.auto``); None where nothing was searched."""
    sparsity: Sparsity | None = None
    training: Training | None = field(default=None, repr=False)
    schema_version: int = SCHEMA_VERSION

    def format_of(self, family: Family, checkpoint_name: str) -> str:
        """Format of a module by its checkpoint name; ``source`` when it keeps its dtype."""
        part = family.classify(checkpoint_name)
        found = self._by_part.get((part.role.value, part.layer, part.projection))
        return found or self._by_part.get((part.role.value, part.layer, ""), SOURCE_DTYPE)

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats that some part gets, without ``source``."""
        return tuple(sorted({item.format for item in self.assignments} - {SOURCE_DTYPE}))

    @cached_property
    def _by_part(self) -> dict[tuple[str, int | None, str], str]:
        return {
            (item.role, item.layer, projection): item.format
            for item in self.assignments
            for projection in item.projections or ("",)
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """Inverse of ``to_json``.

        Raises KeyError/TypeError on a document that is not a plan (callers wrap it).
        """
        known = {item.name for item in fields(cls)}
        data = {key: value[key] for key in known if key in value}
        data["serving"] = Serving(**value["serving"])
        data["calibration"] = Calibration(**value["calibration"])
        data["estimates"] = Estimates(**value["estimates"])
        for name, kind in (("sparsity", Sparsity), ("training", Training)):
            data[name] = kind(**value[name]) if value.get(name) else None
        data["policy_options"] = PolicyOptions(**value["policy_options"])
        data["assignments"] = tuple(
            Assignment(**{**item, "projections": tuple(item["projections"])}) for item in value["assignments"]
        )
        data["findings"] = tuple(Finding(**item) for item in value["findings"])
        return cls(**data)
