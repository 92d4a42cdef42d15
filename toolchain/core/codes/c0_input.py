"""Input and files."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-000": ("Unclassified failure", "Run again with --debug and report the traceback."),
    "TC-001": (
        "The command line cannot be understood",
        "`toolchain COMMAND --help` lists the arguments and options; docs/cli.md has all of them.",
    ),
    "TC-002": (
        "The operating system refused a file or directory",
        "Check that the path exists, who owns it, and whether its file system is writable and has space.",
    ),
    "TC-003": (
        "A JSON file cannot be parsed",
        "The file is damaged or was cut off. Fetch it again, or re-run the stage that writes it.",
    ),
    "TC-004": (
        "The output directory is occupied",
        "Nothing is overwritten without being asked for. Choose another --output, or pass --force.",
    ),
    "TC-005": (
        "Not enough disk space",
        "The plan says what will be written (checkpoint_bytes). Free space, or write to a larger disk.",
    ),
    "TC-006": (
        "There is no text to train the demo on",
        "The demo is trained on the standard library's source: use a Python that has it.",
    ),
    "TC-007": (
        "A spec or an option value cannot be used",
        "Specs are YAML mappings with the names of the options of `toolchain engine`; the message lists what is off.",
    ),
    "TC-008": (
        "Another run writes to the same place",
        "Two runs in one directory would mix their files: wait for the other one, or choose another --output.",
    ),
    "TC-009": ("An argument names nothing that exists", "The message says what was expected there."),
    "TC-010": (
        "MODEL is neither a directory nor a hub id",
        "Give a Hugging Face model directory, or an id of the form owner/name.",
    ),
    "TC-011": ("MODEL is a file", "Give the directory that holds config.json and the safetensors files."),
    "TC-012": ("MODEL is an empty directory", "Fetch the model into it, or give another directory."),
    "TC-013": (
        "config.json is missing",
        "Every Hugging Face model has one: check the path, or fetch it again.",
    ),
    "TC-014": (
        "config.json names no architecture",
        'Runtimes choose the model class by `architectures`: add it, for example ["Qwen3MoeForCausalLM"].',
    ),
    "TC-015": (
        "A safetensors shard is cut off",
        "The download was interrupted: fetch the named shard again.",
    ),
    "TC-016": (
        "A safetensors header is damaged",
        "The file is no safetensors file, or was changed after it was written: fetch it again.",
    ),
    "TC-017": (
        "Index and shards disagree",
        "model.safetensors.index.json and the shards come from different or incomplete "
        "downloads: fetch all of them.",
    ),
    "TC-018": (
        "The weights are pickles",
        "Only safetensors are read, because loading a pickle runs code. Convert the model, "
        "or find a safetensors "
        "revision.",
    ),
    "TC-019": (
        "The hub cannot be read",
        "Check the id, the revision, the network and the token. With HF_HUB_OFFLINE=1 only "
        "cached models work.",
    ),
    "TC-020": (
        "Unknown architecture",
        "The message lists what was recognised. Declare the family: one file in "
        "toolchain/families and one entry in "
        "FAMILIES (CONTRIBUTING shows a complete example).",
    ),
    "TC-021": (
        "transformers cannot build the model from its config",
        "Planning from config.json alone needs a model class. With safetensors files beside "
        "it, none is needed.",
    ),
    "TC-022": (
        "config.json lacks a dimension",
        "Add the named key with the value that the model was trained with.",
    ),
    "TC-023": (
        "A quantized source whose scales do not fit its weights",
        "FP8 weights need weight_scale_inv, MXFP4 blocks need scales, in the shapes that quantization_config says.",
    ),
}
