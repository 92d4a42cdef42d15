"""Triton repositories and serving."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-601": ("config.pbtxt cannot be parsed", "Line and column are given. Render the repository again."),
    "TC-602": ("config.pbtxt says something impossible", "Correct the named field, or render again."),
    "TC-603": (
        "A ${placeholder} was left unfilled",
        "Fill it, or render the repository again: Triton takes the text as it stands and fails later.",
    ),
    "TC-604": ("A file of the model repository is missing", "Render the repository again."),
    "TC-605": ("The model's name differs from its directory", "Triton goes by the directory: rename one."),
    "TC-606": (
        "config.pbtxt sets what belongs in model.yaml",
        "In the llmapi layout max_batch_size and decoupled stand under triton_config in 1/model.yaml.",
    ),
    "TC-607": ("Unknown backend", "The Python backend is what both targets use: `backend: \"python\"`."),
    "TC-608": (
        "Instances and GPUs do not match",
        "With n instances, gpu_device_ids has n lists, such as \"0,1;2,3\" for two instances of two GPUs.",
    ),
    "TC-609": ("model.yaml cannot be used", "It must be YAML with the LLM() arguments and triton_config."),
    "TC-610": (
        "The engine that the repository names is gone",
        "The repository holds absolute paths. After moving the engine or the environment, render it again.",
    ),
    "TC-611": ("Not an engine directory", "Give a directory that `toolchain engine` wrote."),
    "TC-612": (
        "The repository was rendered for another engine or target",
        "Serving it would serve that one. Render it again: `toolchain triton ENGINE --force`.",
    ),
    "TC-613": ("A version policy that is none", "Give latest:N, all, or the numbers of versions, such as 1,3."),
    "TC-614": (
        "Models of one repository need names of their own",
        "Several engines are models named after themselves. One engine may have --model-name.",
    ),
    "TC-615": (
        "This model cannot be updated in place",
        "A rolling update needs a running server, an engine of the same target and a policy that loads new versions.",
    ),
    "TC-616": (
        "The new version does not load, or does not answer",
        "The version before goes on serving and the new one was removed. The end of the log says what was wrong.",
    ),
    "TC-617": (
        "The old version was not unloaded",
        "The new one serves. Requests still run on the old one; its directory is kept.",
    ),
    "TC-618": (
        "Options of rendering that would not be heeded",
        "Those of a repository that is there stand in its files: --force renders it again. Queue limits, kernels and "
        "KV cache are of target local; TensorRT-LLM has its own in the engine's llm_args.yaml.",
    ),
    "TC-620": (
        "No tritonserver on this machine",
        "`make tritonserver` installs one for CPU machines; NVIDIA's containers have one on PATH.",
    ),
    "TC-621": ("tritonserver could not be installed", "The last lines of the failing step are shown."),
    "TC-622": ("tritonserver exited while starting", "The end of its log is shown; the whole log is named."),
    "TC-623": ("tritonserver does not answer an inference", "See in its log what the model waits for."),
    "TC-624": ("A port is already in use", "Choose another port, or 0 for any free one."),
    "TC-626": (
        "This engine is served by NVIDIA's Triton with the TensorRT-LLM backend",
        "The command is shown. `toolchain serve` starts servers for targets local and trtllm only.",
    ),
    "TC-630": (
        "A model is down and could not be brought back",
        "It was unloaded and loaded as often as --max-recoveries allows. The end of the log is shown. Exit status 4.",
    ),
    "TC-631": ("A model could not be loaded or unloaded", "What tritonserver said is shown; see its log."),
    "TC-632": (
        "tritonserver ended by itself, as often as --max-recoveries allows",
        "The end of its log is shown. Exit status 4.",
    ),
    "TC-633": ("A server does not answer", "Its metrics or its repository index could not be read."),
    "TC-634": (
        "The directory of running servers cannot be trusted",
        "Another user could write it. Remove it, or name another with TOOLCHAIN_RUNTIME_DIR.",
    ),
    "TC-636": (
        "The supervision of a server failed",
        "Nobody would have noticed a dead model any more, so the server was ended. This is a defect: please report it.",
    ),
    "TC-635": ("Not the address of a server", "Give HOST:PORT, or a URL such as http://127.0.0.1:8000."),
    "TC-625": ("tritonserver did not stop cleanly", "It was killed; requests that still ran are lost."),
    "TC-641": (
        "The OpenAI endpoint does not serve this target",
        "It serves targets local and trtllm. Build the engine for one of them.",
    ),
    "TC-642": ("The API keys cannot be used", "One key per line, at least 8 printable ASCII characters, no spaces."),
    "TC-643": (
        "The OpenAI endpoint would be open to everyone",
        "Give it API keys, or let it listen on 127.0.0.1 behind a proxy that asks for them.",
    ),
    "TC-644": ("The chat template cannot be read", "Give a Jinja file as transformers' tokenizers have it."),
    "TC-645": ("The OpenAI endpoint did not start", "The reason is shown; choose another port or address."),
    "TC-650": (
        "A file or directory of the model repository cannot be read",
        "Remove dangling links and directories that are no models: tritonserver refuses to start with them.",
    ),
    "TC-651": ("The model's code or settings cannot be used", "Line and column are given where there is one."),
    "TC-652": (
        "Version directories and version policy do not match",
        "Versions are directories with plain numbers; the policy must load at least one that is there.",
    ),
    "TC-653": (
        "The scheduler's settings contradict each other",
        "See the named field: dynamic batching, priorities, sequences or the response cache.",
    ),
    "TC-654": ("A warm-up sample cannot run", "A model whose warm-up fails is not loaded. Correct the sample."),
    "TC-655": (
        "Responses of decoupled models would be mixed in an ensemble",
        "All inputs of a step come from one side of a decoupled model.",
    ),
    "TC-656": ("The repository asks for more than its engine was built for", "Lower it, or build the engine for it."),
    "TC-657": ("A real tritonserver does not serve the model", "What it said is shown."),
    "TC-658": (
        "A model was not checked on the real server",
        "The server lacks its backend or devices, or no request can be made up for it.",
    ),
}  # fmt: skip
