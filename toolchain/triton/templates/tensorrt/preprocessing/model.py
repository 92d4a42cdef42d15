"""Triton model ``preprocessing``: text to token ids for the TensorRT-LLM backend.

Runs in the Python stub of NVIDIA's container, which has transformers. Every prompt of a batch is tokenized by itself
and filled up with the pad id; the lengths say where it ends.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from transformers import AutoTokenizer


def word_list(words):
    """[prompt][word][token id] -> int32 [prompts, 2, n]: all ids of a prompt, and the index behind each word.

    Rows are filled up with 0 and -1. That is the layout of ``stop_words_list`` and ``bad_words_list``.
    """
    flat = [[token for word in prompt for token in word] for prompt in words]
    ends = [list(np.cumsum([len(word) for word in prompt], dtype=int)) if prompt else [] for prompt in words]
    width = max((len(row) for row in (*flat, *ends)), default=0)
    made = np.zeros((len(words), 2, width), dtype=np.int32)
    made[:, 1] = -1
    for place, (ids, stops) in enumerate(zip(flat, ends)):
        made[place, 0, : len(ids)] = ids
        made[place, 1, : len(stops)] = stops
    return made


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.tokenizer = AutoTokenizer.from_pretrained(
            parameters["tokenizer_dir"]["string_value"], trust_remote_code=False
        )
        self.add_special_tokens = parameters["add_special_tokens"]["string_value"] == "true"
        self.end_id = self.tokenizer.eos_token_id
        pad_id = self.tokenizer.pad_token_id
        self.pad_id = self.end_id if pad_id is None else pad_id
        if self.end_id is None:
            raise pb_utils.TritonModelException("the tokenizer has no eos_token: no answer would ever end")

    def execute(self, requests):
        responses = []
        for request in requests:
            try:
                responses.append(pb_utils.InferenceResponse(output_tensors=self.prepare(request)))
            except (ValueError, UnicodeDecodeError) as error:
                refused = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(output_tensors=[], error=refused))
        return responses

    def prepare(self, request):
        """Output tensors of one request. ValueError for an empty prompt."""
        prompts = [text.decode("utf-8") for text in self.given(request, "QUERY").reshape(-1)]
        lengths = self.given(request, "REQUEST_OUTPUT_LEN").reshape(-1)
        encoded = [
            self.tokenizer.encode(text, add_special_tokens=self.add_special_tokens) for text in prompts
        ]
        if any(not ids for ids in encoded):
            raise ValueError("text_input has no tokens: expected a prompt")
        count = len(prompts)
        end_ids = self.ids(request, "END_ID", self.end_id, count)
        pad_ids = self.ids(request, "PAD_ID", self.pad_id, count)
        input_ids = np.zeros((count, max(len(ids) for ids in encoded)), dtype=np.int32)
        for place, ids in enumerate(encoded):
            input_ids[place] = pad_ids[place, 0]
            input_ids[place, : len(ids)] = ids
        outputs = {
            "INPUT_ID": input_ids,
            "REQUEST_INPUT_LEN": np.array([[len(ids)] for ids in encoded], dtype=np.int32),
            "REQUEST_OUTPUT_LEN": lengths.astype(np.int32).reshape(count, -1),
            "BAD_WORDS_IDS": self.words(request, "BAD_WORDS_DICT", count),
            "STOP_WORDS_IDS": self.words(request, "STOP_WORDS_DICT", count),
            "OUT_END_ID": end_ids,
            "OUT_PAD_ID": pad_ids,
        }
        return [pb_utils.Tensor(name, value) for name, value in outputs.items()]

    def given(self, request, name):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    def ids(self, request, name, default, count):
        """int32 [prompts, 1]: what the request says, or the tokenizer's."""
        given = self.given(request, name)
        value = np.full(count, default) if given is None else given
        return value.astype(np.int32).reshape(count, 1)

    def words(self, request, name, count):
        given = self.given(request, name)
        if given is None:
            return word_list([[] for _ in range(count)])
        rows = given.reshape(count, -1)
        texts = [[word.decode("utf-8") for word in row if word] for row in rows]
        return word_list(
            [[self.tokenizer.encode(word, add_special_tokens=False) for word in row] for row in texts]
        )
