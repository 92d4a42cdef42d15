"""Quantization."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-201": (
        "ModelOpt quantized other modules than planned",
        "Checked on the quantizers themselves before anything is exported: nothing was written.",
    ),
    "TC-202": (
        "A format that computes on quantized activations has no calibrated input range",
        "Calibration reached no such module. Use more samples, or a weight-only format.",
    ),
    "TC-203": (
        "The experts of this model are stored in a layout that cannot be split into per-expert matrices",
        "Known are the usual gated MLP, gpt-oss and Llama 4; another one needs an entry in "
        "toolchain/modeling/expert_variants.py.",
    ),
    "TC-204": (
        "Calibration data is missing, unreadable or too short",
        "Give a text or JSONL file (`text` or `messages`), a directory of them, or a hub data set name.",
    ),
    "TC-205": (
        "The tokenizer has no chat template",
        "Omit --chat-template, or add a template to the tokenizer.",
    ),
    "TC-206": (
        "KV cache scales could not be calibrated",
        "ModelOpt observes keys and values only in attention that uses transformers' attention interface.",
    ),
    "TC-207": (
        "The model has no usable tokenizer, or one with ids that the model does not have",
        "Calibration needs the tokenizer that the model was trained with, beside its config.json.",
    ),
    "TC-220": (
        "No text is left to judge on",
        "Sensitivity is measured on tokens that no range was taken from: give --data, or more calibration text.",
    ),
    "TC-222": (
        "The architecture cannot be walked layer by layer",
        "Sensitivity runs layers, final norm and output head one after the other; this model does more.",
    ),
    "TC-225": (
        "ModelOpt's auto_quantize scored other groups than there are",
        "Its grouping of this architecture differs: --auto-method sensitivity does not depend on it.",
    ),
    "TC-221": (
        "Experts saw too few calibration tokens, and --strict accepts none",
        "Nothing was written. More or more varied text, --min-tokens-per-expert with a larger --calib-max-samples, or "
        "--sampling balanced may reach them; without --strict the manifest says what was done for them.",
    ),
    "TC-223": (
        "The router of a layer was not recognised",
        "Calibration of more experts than the routed ones needs its scores. Use --calibrate-experts routed.",
    ),
    "TC-209": (
        "The model has no list of decoder layers",
        "Recipes that look at inputs walk through the layers one by one: use --recipe max.",
    ),
    "TC-208": (
        "Experts that are stored in one tensor have different scales",
        "Fused storage holds one scale for all experts of a layer. This is a bug of the export, not of the model.",
    ),
    "TC-231": (
        "A streamed output was begun with other settings",
        "What is finished was made with the settings named in the message. Run with those, choose another --output, or "
        "begin anew with --force.",
    ),
    "TC-232": (
        "The plan needs calibration data",
        "Streaming without data is for weight-only formats, formats that scale activations at run time, and NVFP4 "
        "under --recipe pinned. Other plans are streamed layer by layer.",
    ),
    "TC-233": (
        "What a streamed run left behind was changed",
        "A layer builds on what the layers before it computed, so a run can only go on with exactly that: remove the "
        "directory in the message to begin anew.",
    ),
    "TC-234": (
        "One layer of a streamed model could not be quantized",
        "The message names the layer and the reason. The layers before it are kept: mend the reason and run the same "
        "command again.",
    ),
    "TC-235": (
        "A layer gave other tensors than its plan says",
        "Names, shapes and dtypes of a streamed checkpoint are fixed before it is made. This is a bug: report it with "
        "the plan, and use --no-stream.",
    ),
    "TC-236": (
        "Packing cannot be spread over a Ray cluster as asked",
        "--executor ray needs the extra `ray` (pip install 'toolchain[ray]') on every node, an address host:port, and "
        "no more CPUs per task than a node has. It streams: not with --no-stream.",
    ),
    "TC-237": (
        "There is no Ray cluster",
        "--executor ray joins a cluster that is there: at --ray-address, at RAY_ADDRESS, or on this machine. `ray "
        "start --head` starts one.",
    ),
    "TC-238": (
        "A node of the Ray cluster cannot take part",
        "It has other versions or other code, or does not see the model or the output under the same path: its bytes "
        "would be others, or elsewhere. What is finished is kept.",
    ),
    "TC-239": (
        "A shard was given up",
        "Its worker died again and again (memory, most often), or failed with an error of its own; the message names "
        "it. What is finished is kept: run the same command again.",
    ),
    "TC-260": (
        "No block scales that could be learned",
        "--learned-scales is for NVFP4 weights (nvfp4, w4a16_nvfp4, w4a8_nvfp4_fp8) among the trained matrices; other "
        "formats take their scales from the weights in every step.",
    ),
    "TC-261": (
        "Learned scales do not fit",
        "The saved block scales are of other matrices than this plan's. Start the training anew, or give the directory "
        "that belongs to the plan.",
    ),
    "TC-266": (
        "Teacher and student have other routers",
        "--router-weight compares the routers layer by layer, expert by expert. Leave it out with a teacher of another "
        "make.",
    ),
    "TC-250": (
        "The recipe cannot be trained under",
        "It chooses codes, block scales or target weights after calibration, which scales that follow the weights "
        "would undo. For NVFP4 add --learned-scales and train all quantized roles; else use --recipe max, or "
        "transforms and input scales alone (awq, smoothquant, headroom, pinned).",
    ),
    "TC-251": (
        "Nothing of the model has the role that is to be trained",
        "The message lists the roles that its parameters have.",
    ),
    "TC-252": (
        "A trained model, or the start of a training, is not one of this plan or was changed",
        "Quantizers belong to the weights that were trained under them. Train again, or give the plan that it was "
        "trained by.",
    ),
    "TC-253": (
        "The teacher has another tokenizer than the student",
        "Distillation compares distributions over the same tokens: use a teacher of the same family, or "
        "--method qat.",
    ),
    "TC-254": (
        "The loss of training is not finite",
        "Nothing was written. A smaller --learning-rate or --precision fp32 helps most often; the message names the "
        "step.",
    ),
    "TC-255": (
        "Memory ran out while training",
        "A smaller --batch-size with more --accumulate computes the same step; --gradient-checkpointing, --lora and "
        "--parallel fsdp2 need less, too.",
    ),
    "TC-256": (
        "A training cannot go on from what is there",
        "A training is only continued with the settings, data and model that it was begun with; the message names what "
        "is different. --force begins anew.",
    ),
    "TC-257": (
        "A process of the training ended",
        "Training over several devices runs one process per device, and none can go on alone: all were ended. The "
        "message has the last lines of the one that failed. Run the same command again to go on from the newest "
        "checkpoint.",
    ),
    "TC-258": (
        "Adapters do not fit the model",
        "LoRA needs matrices among the trained roles, and a rank no larger than any of them; a head that is tied to "
        "the embedding takes none.",
    ),
    "TC-259": (
        "Training over several devices cannot start",
        "One process per device is started on this machine, with --devices as many as there are. Inside accelerate "
        "launch or torchrun (under srun: start torchrun) the number of processes must be that of --devices.",
    ),
    "TC-262": (
        "A checkpoint that says it is 2:4 sparse is not",
        "Some groups of four weights along the input have more than two that are not zero: GPUs take such a matrix as "
        "a dense one. The message names the worst; quantize again, or find out what changed the bytes.",
    ),
    "TC-263": (
        "2:4 sparsity gains nothing",
        "An error where no part of the model runs faster for it with this target, format and GPU; a warning for parts "
        "that become sparse for nothing, and for gains that nobody has reported. The hint lists what gains.",
    ),
    "TC-264": (
        "ModelOpt did not make the planned matrices sparse",
        "Nothing was written. The message says which, and why if ModelOpt said so.",
    ),
    "TC-265": (
        "Sparsity cannot be had as asked",
        "--sparsity takes 2:4, --sparsity-method magnitude or sparsegpt (in memory only). Not for sources whose "
        "numbers are kept as they are, for recipes that solve the weights again (compensate), or for matrices whose "
        "sizes ModelOpt passes over.",
    ),
}
