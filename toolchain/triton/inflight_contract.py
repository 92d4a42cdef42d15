"""Tensors of TensorRT-LLM's ``inflight_batcher_llm`` models, their text part for decoders.

Names, types and dims as published in NVIDIA/TensorRT-LLM, config.pbtxt of each model below
``triton_backend/all_models/inflight_batcher_llm``: tensorrt_llm at 0c8de69, ensemble at 2a9abd9, preprocessing at
08dc37e, postprocessing at 89fd9b7. Left out: images, encoders, LoRA, drafts, prompt tables, guided decoding,
logits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Field:
    name: str
    kind: str
    """``DataType`` without TYPE_."""
    dims: tuple[int, ...] = (1,)
    optional: bool = True
    scalar: bool = False
    """Reshaped to []: the backend wants one number for each request."""
    ragged: bool = False


def _fields(kind: str, names: str, *, scalar: bool = False, optional: bool = True) -> tuple[Field, ...]:
    return tuple(Field(name=name, kind=kind, scalar=scalar, optional=optional) for name in names.split())


BACKEND_INPUTS: tuple[Field, ...] = (
    Field(name="input_ids", kind="INT32", dims=(-1,), ragged=True),
    *_fields("INT32", "input_lengths request_output_len", scalar=True, optional=False),
    *_fields("INT32", "num_return_sequences end_id pad_id beam_width runtime_top_k min_tokens", scalar=True),
    Field(name="stop_words_list", kind="INT32", dims=(2, -1), ragged=True),
    Field(name="bad_words_list", kind="INT32", dims=(2, -1), ragged=True),
    *_fields(
        "FP32",
        "temperature runtime_top_p len_penalty repetition_penalty presence_penalty frequency_penalty",
        scalar=True,
    ),
    *_fields("UINT64", "seed", scalar=True),
    *_fields("BOOL", "early_stopping return_log_probs return_perf_metrics", scalar=True),
    *_fields("BOOL", "exclude_input_in_output stop streaming", scalar=True),
)
_COUNTERS = (
    *_fields("INT32", "batch_index sequence_index kv_cache_alloc_new_blocks kv_cache_reused_blocks"),
    *_fields("INT32", "kv_cache_alloc_total_blocks"),
    *_fields("INT64", "arrival_time_ns first_scheduled_time_ns first_token_time_ns last_token_time_ns"),
)
_LOG_PROBS = (
    Field(name="cum_log_probs", kind="FP32", dims=(-1,)),
    Field(name="output_log_probs", kind="FP32", dims=(-1, -1)),
)
BACKEND_OUTPUTS: tuple[Field, ...] = (
    Field(name="output_ids", kind="INT32", dims=(-1, -1)),
    Field(name="sequence_length", kind="INT32", dims=(-1,)),
    *_LOG_PROBS,
    *_COUNTERS,
)

PREPROCESSING_INPUTS: tuple[Field, ...] = (
    Field(name="QUERY", kind="STRING", optional=False),
    Field(name="REQUEST_OUTPUT_LEN", kind="INT32", optional=False),
    Field(name="BAD_WORDS_DICT", kind="STRING", dims=(-1,)),
    Field(name="STOP_WORDS_DICT", kind="STRING", dims=(-1,)),
    *_fields("INT32", "END_ID PAD_ID"),
)
PREPROCESSING_OUTPUTS: tuple[Field, ...] = (
    Field(name="INPUT_ID", kind="INT32", dims=(-1,)),
    Field(name="REQUEST_INPUT_LEN", kind="INT32"),
    Field(name="BAD_WORDS_IDS", kind="INT32", dims=(2, -1)),
    Field(name="STOP_WORDS_IDS", kind="INT32", dims=(2, -1)),
    Field(name="REQUEST_OUTPUT_LEN", kind="INT32", dims=(-1,)),
    *_fields("INT32", "OUT_END_ID OUT_PAD_ID"),
)
POSTPROCESSING_INPUTS: tuple[Field, ...] = (
    Field(name="TOKENS_BATCH", kind="INT32", dims=(-1, -1), optional=False),
    Field(name="SEQUENCE_LENGTH", kind="INT32", dims=(-1,), optional=False),
)
POSTPROCESSING_OUTPUTS: tuple[Field, ...] = (Field(name="OUTPUT", kind="STRING", dims=(-1,)),)

ENSEMBLE_INPUTS: tuple[Field, ...] = (
    Field(name="text_input", kind="STRING", optional=False),
    Field(name="max_tokens", kind="INT32", optional=False),
    Field(name="bad_words", kind="STRING", dims=(-1,)),
    Field(name="stop_words", kind="STRING", dims=(-1,)),
    *_fields("INT32", "num_return_sequences end_id pad_id top_k min_tokens beam_width"),
    *_fields(
        "FP32", "top_p temperature length_penalty repetition_penalty presence_penalty frequency_penalty"
    ),
    *_fields("UINT64", "seed"),
    *_fields("BOOL", "exclude_input_in_output return_log_probs return_perf_metrics stream"),
)
ENSEMBLE_OUTPUTS: tuple[Field, ...] = (
    Field(name="text_output", kind="STRING", dims=(-1,)),
    *_LOG_PROBS,
    *_COUNTERS,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One model of the ensemble: its tensors -> the ensemble's, or names of its own that begin with ``_``."""

    model: str
    inputs: dict[str, str]
    outputs: dict[str, str]


def _same(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


STEPS: tuple[Step, ...] = (
    Step(
        model="preprocessing",
        inputs={
            "QUERY": "text_input",
            "REQUEST_OUTPUT_LEN": "max_tokens",
            "BAD_WORDS_DICT": "bad_words",
            "STOP_WORDS_DICT": "stop_words",
            "END_ID": "end_id",
            "PAD_ID": "pad_id",
        },
        outputs={field.name: f"_{field.name}" for field in PREPROCESSING_OUTPUTS},
    ),
    Step(
        model="tensorrt_llm",
        inputs={
            "input_ids": "_INPUT_ID",
            "input_lengths": "_REQUEST_INPUT_LEN",
            "request_output_len": "_REQUEST_OUTPUT_LEN",
            "end_id": "_OUT_END_ID",
            "pad_id": "_OUT_PAD_ID",
            "stop_words_list": "_STOP_WORDS_IDS",
            "bad_words_list": "_BAD_WORDS_IDS",
            "runtime_top_k": "top_k",
            "runtime_top_p": "top_p",
            "len_penalty": "length_penalty",
            "streaming": "stream",
            **_same(
                "num_return_sequences beam_width temperature repetition_penalty min_tokens presence_penalty"
            ),
            **_same("frequency_penalty seed return_log_probs return_perf_metrics exclude_input_in_output"),
        },
        outputs={
            "output_ids": "_TOKENS_BATCH",
            "sequence_length": "_SEQUENCE_LENGTH",
            **{field.name: field.name for field in (*_LOG_PROBS, *_COUNTERS)},
        },
    ),
    Step(
        model="postprocessing",
        inputs={"TOKENS_BATCH": "_TOKENS_BATCH", "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH"},
        outputs={"OUTPUT": "text_output"},
    ),
)
MODELS = ("ensemble", "preprocessing", "tensorrt_llm", "postprocessing")
