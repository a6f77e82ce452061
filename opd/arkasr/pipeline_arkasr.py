"""`pipeline("automatic-speech-recognition", model=..., trust_remote_code=True)` for ARK-ASR; named in config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from transformers.pipelines.base import ChunkPipeline

from .audio_arkasr import check_waveform, load_waveform
from .windows_arkasr import cut_at_silences, join_transcripts

SOURCES = ("array", "raw", "bytes", "audio", "path", "url")  # keys of a dictionary, in this order
MAX_NEW_TOKENS = 256


class ArkasrPipeline(ChunkPipeline):
    """Audio in, {"text": ...} out; greedy unless generate_kwargs say otherwise, without control tokens.

    Each input is a path, an http(s) address, the bytes of a file, mono floats (at `sampling_rate`, by default 16 kHz),
    or a dictionary with one of them under "array", "raw", "bytes", "audio", "path" or "url" and its "sampling_rate";
    a list or generator of them gives a list.

    batch_size       windows decoded at a time
    chunk_length_s   longer audio is cut at pauses into windows of at most so many seconds (default 30)
    sampling_rate    of arrays that do not say it themselves
    generate_kwargs  for the model's `generate`; max_new_tokens (of a window, default 256) also by itself

    Raises ValueError for audio that cannot be read and for options it cannot honour.
    """

    _load_processor = True
    _load_tokenizer = True  # transformers refuses batches to a pipeline without one
    _load_feature_extractor = False
    _load_image_processor = False

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        chunk_length_s: float | None = None,
        sampling_rate: int | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        return_timestamps: bool | str | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if return_timestamps:
            raise ValueError("return_timestamps: ARK-ASR writes no times; leave out")
        if unknown:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"pipeline: {names} cannot be honoured; what is for `generate` goes into generate_kwargs")
        generate = dict(generate_kwargs or {})
        if max_new_tokens is not None and generate.setdefault("max_new_tokens", max_new_tokens) != max_new_tokens:
            raise ValueError("max_new_tokens: has another value in generate_kwargs; give it once")
        if generate.get("return_dict_in_generate") or generate.get("num_return_sequences", 1) != 1:
            raise ValueError(
                "generate_kwargs: the pipeline gives one text per clip; call the model's generate for more"
            )
        preprocess = {"chunk_length_s": chunk_length_s, "sampling_rate": sampling_rate}
        return {name: value for name, value in preprocess.items() if value is not None}, generate, {}

    def preprocess(
        self, input_: Any, chunk_length_s: float | None = None, sampling_rate: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """The windows of a clip: {"samples": float32 (S,), "is_last": ...}."""
        extractor = self.processor.feature_extractor
        rate = extractor.sampling_rate
        source, own_rate = _source(input_, rate if sampling_rate is None else sampling_rate)
        samples = check_waveform(load_waveform(source, rate, own_rate), extractor.n_fft // 2, "audio")
        windows = cut_at_silences(samples, rate, extractor.chunk_length if chunk_length_s is None else chunk_length_s)
        for start, stop in windows:
            yield {"samples": samples[start:stop], "is_last": stop == len(samples)}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        """Ids written for each window. A batch has lists of samples; features are made here, padding is masked."""
        samples = model_inputs["samples"]
        single = isinstance(samples, np.ndarray)
        inputs = self.processor.build_inputs([samples] if single else samples)
        options = {
            "max_new_tokens": MAX_NEW_TOKENS,
            "do_sample": False,
            "suppress_tokens": self._blocked_token_ids,
            "pad_token_id": self.processor.tokenizer.pad_token_id,
        }
        on_device = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        ids_BL = self.model.generate(**on_device, **(options | generate_kwargs))
        responses = ids_BL[:, inputs["input_ids"].shape[1] :].tolist()
        return {"ids": responses[0] if single else responses, "is_last": model_inputs["is_last"]}

    @cached_property
    def _blocked_token_ids(self) -> list[int]:
        return self.processor.blocked_token_ids(self.model.config.vocab_size)

    def postprocess(self, model_outputs: list[dict[str, Any]]) -> dict[str, str]:
        return {"text": join_transcripts([self.processor.clean_text(window["ids"]) for window in model_outputs])}


def _source(given: Any, rate: int) -> tuple[Any, int]:
    """(path, address, bytes or samples; the rate of the samples) of a pipeline's input."""
    if not isinstance(given, Mapping):
        return given, rate
    found = [given[key] for key in SOURCES if given.get(key) is not None]
    if not found:
        raise ValueError(f"audio: the dictionary has none of {', '.join(SOURCES)} but {', '.join(map(str, given))}")
    own_rate = given.get("sampling_rate")
    return _source(found[0], rate if own_rate is None else own_rate)


__all__ = ["ArkasrPipeline"]
