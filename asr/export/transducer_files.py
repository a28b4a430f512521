"""The ONNX files of a transducer in the interface of sherpa-onnx's model type "conformer".

Three graphs, bound by the order of their inputs; tokens.txt; and for sentencepiece tokenizers bpe.model and bpe.vocab,
by which runtimes encode hotwords. onnxruntime alone runs the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from asr.checkpoint import Loaded
from asr.data.tokenizer import Tokenizer
from asr.errors import UserError
from asr.export.modules import (
    JoinerLogits,
    OfflineEncoder,
    PackedStreamingEncoder,
    Predictor,
    geometry,
)
from asr.export.onnx_graph import onnx_graph
from asr.export.spec import Spec, Written
from asr.models.context import Milliseconds, context

PARTS = ("encoder", "decoder", "joiner")
"""Names of the files, as runtimes call the parts: their decoder is the predictor."""


def check_model(loaded: Loaded, target: str) -> None:
    """Raises UserError for a model that the interface cannot hold."""
    config, decoding = loaded.config.model, loaded.config.decoding
    if config.predictor.kind != "stateless":
        raise UserError(
            f"{target} cannot hold model.predictor.kind={config.predictor.kind}: its predictor is a function of the "
            "last tokens; train with model.predictor.kind=stateless"
        )
    if config.encoder_type != "conformer":
        raise UserError(f"{target} cannot hold model.encoder_type={config.encoder_type}; train a conformer")
    if config.encoder.conv_kernel < 2:
        raise UserError(
            f"{target} cannot hold model.encoder.conv_kernel={config.encoder.conv_kernel}, a convolution without "
            "memory; train with 2 or more"
        )
    if decoding.max_symbols_per_frame != 1:
        raise UserError(
            f"{target} emits at most one token a frame, and decoding.max_symbols_per_frame="
            f"{decoding.max_symbols_per_frame}; export with --set decoding.max_symbols_per_frame=1"
        )


def encoder_graph(loaded: Loaded, chunk_ms: Milliseconds, left_context_ms: Milliseconds) -> Any:
    """The streaming encoder, or with a full chunk that of whole utterances."""
    model = loaded.model
    bins, batch_size = model.config.num_mel_bins, 2
    common = {"model_type": "conformer", "version": 1, "vocab_size": model.vocab_size}
    if chunk_ms == "full":
        lens = torch.tensor([67, 59])
        return onnx_graph(
            OfflineEncoder(model),
            {"x": torch.zeros(batch_size, 67, bins), "x_lens": lens},
            ["encoder_out", "encoder_out_lens"],
            {
                "x": {0: "N", 1: "T"},
                "x_lens": {0: "N"},
                "encoder_out": {0: "N", 1: "frames"},
                "encoder_out_lens": {0: "N"},
            },
            common,
        )
    sizes = geometry(model, *context(chunk_ms, left_context_ms))
    module = PackedStreamingEncoder(model, sizes)
    attn, conv, processed = module.first_state(batch_size)
    caches = {0: "N"}, {2: "N"}
    return onnx_graph(
        module,
        {
            "x": torch.zeros(batch_size, sizes.feature_frames, bins),
            "cached_attn": attn,
            "cached_conv": conv,
            "processed_lens": processed,
        },
        ["encoder_out", "new_cached_attn", "new_cached_conv"],
        {
            "x": caches[0],
            "cached_attn": caches[1],
            "cached_conv": caches[1],
            "processed_lens": caches[0],
            "encoder_out": caches[0],
            "new_cached_attn": caches[1],
            "new_cached_conv": caches[1],
        },
        {
            **common,
            "num_encoder_layers": 2 * sizes.num_layers + 1,  # rows of the packed caches
            "T": sizes.feature_frames,
            "decode_chunk_len": sizes.shift_frames,
            "pad_length": sizes.feature_frames - sizes.shift_frames,
            "left_context": sizes.left_frames,
            "encoder_dim": sizes.dim,
            "cnn_module_kernel": sizes.conv_rows + 1,
        },
    )


def predictor_graph(loaded: Loaded) -> Any:
    """y [N, context_size] int64 to decoder_out [N, J]."""
    size = loaded.model.config.predictor.context_size
    return onnx_graph(
        Predictor(loaded.model),
        {"y": torch.zeros(2, size, dtype=torch.int64)},
        ["decoder_out"],
        {"y": {0: "N"}, "decoder_out": {0: "N"}},
        {"context_size": size, "vocab_size": loaded.model.vocab_size},
    )


def joiner_graph(loaded: Loaded) -> Any:
    """encoder_out and decoder_out [N, J] to logit [N, V]."""
    dim = loaded.model.config.joiner.dim
    return onnx_graph(
        JoinerLogits(loaded.model),
        {"encoder_out": torch.zeros(2, dim), "decoder_out": torch.zeros(2, dim)},
        ["logit"],
        {"encoder_out": {0: "N"}, "decoder_out": {0: "N"}, "logit": {0: "N"}},
        {"joiner_dim": dim},
    )


def write_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """tokens.txt, and bpe.model and bpe.vocab where sentencepiece made the tokens."""
    tokenizer.write_tokens_txt(folder / "tokens.txt")
    if tokenizer.sentencepiece_model:
        (folder / "bpe.model").write_bytes(tokenizer.sentencepiece_model)
        pieces = tokenizer.sentencepiece_scores
        (folder / "bpe.vocab").write_text("".join(f"{name}\t{score:g}\n" for name, score in pieces), encoding="utf-8")


def write_transducer(loaded: Loaded, folder: Path, spec: Spec) -> Written:
    """Writes tokens and graphs of each precision."""
    import onnx

    from asr.export.quantize import choose_int8, save_choice

    write_tokens(loaded.tokenizer, folder)
    graphs = {
        "encoder": encoder_graph(loaded, spec.chunk_ms, spec.left_context_ms),
        "decoder": predictor_graph(loaded),
        "joiner": joiner_graph(loaded),
    }
    for part, graph in graphs.items():
        onnx.save(graph, folder / f"{part}.onnx")
    files = {"fp32": {part: f"{part}.onnx" for part in PARTS}}
    if "int8" not in spec.precisions:
        return Written(files)
    chosen, choice = choose_int8(loaded, graphs, folder, spec)
    save_choice(choice, folder)
    files["int8"] = dict(files["fp32"])
    for part, graph in chosen.items():
        files["int8"][part] = f"{part}.int8.onnx"
        onnx.save(graph, folder / files["int8"][part])
    if "fp32" not in spec.precisions:
        del files["fp32"]
        for part in chosen:
            (folder / f"{part}.onnx").unlink()
    return Written(files, choice.float_layers)
