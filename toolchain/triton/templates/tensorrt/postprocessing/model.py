"""Triton model ``postprocessing``: token ids of the TensorRT-LLM backend to text.

With ``stream`` each response holds the new tokens alone and is decoded alone: a character whose bytes come in several
tokens may show as replacement characters. There is no state between responses here in which to hold them back.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from transformers import AutoTokenizer


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.tokenizer = AutoTokenizer.from_pretrained(
            parameters["tokenizer_dir"]["string_value"], trust_remote_code=False
        )
        self.skip_special_tokens = parameters["skip_special_tokens"]["string_value"] == "true"

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
        lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
        texts = [
            self.tokenizer.decode(
                beam[: max(0, int(length))].tolist(), skip_special_tokens=self.skip_special_tokens
            )
            for row, row_lengths in zip(tokens, lengths)
            for beam, length in zip(row, row_lengths)
        ]
        output = np.array([text.encode("utf-8") for text in texts], dtype=np.object_)
        shaped = output.reshape(tokens.shape[0], -1)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("OUTPUT", shaped)])
