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
from asr.export.modules import PackedStreamingEncoder, geometry, offline_encoder, search_parts
from asr.export.onnx_graph import onnx_graph
from asr.export.onnx_int8 import OnnxDevelopment, layers_of, quantized
from asr.export.quantize import QUANTIZED, choose_int8
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
        return onnx_graph(
            *offline_encoder(model),
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
            "T": sizes.feature_frames,
            "decode_chunk_len": sizes.shift_frames,
            "pad_length": sizes.feature_frames - sizes.shift_frames,
            # what the runtime makes its first caches by: both [R, 1, N, L D]
            "num_encoder_layers": sizes.num_rows,
            "left_context": 1,
            "encoder_dim": sizes.row_size,
            "cnn_module_kernel": 2,
        },
    )


def search_graphs(loaded: Loaded) -> dict[str, Any]:
    """Of the predictor, y [N, context_size] int64 to decoder_out [N, J], and of the joiner, encoder_out and decoder_out
    [N, J] to logit [N, V]."""
    config = loaded.config.model
    about: dict[str, tuple[str, dict[str, object]]] = {
        "decoder": (
            "decoder_out",
            {"context_size": config.predictor.context_size, "vocab_size": loaded.model.vocab_size},
        ),
        "joiner": ("logit", {"joiner_dim": config.joiner.dim}),
    }
    graphs = {}
    for part, (module, examples) in search_parts(loaded.model, 2).items():
        result, metadata = about[part]
        axes = {name: {0: "N"} for name in (*examples, result)}
        graphs[part] = onnx_graph(module, examples, [result], axes, metadata)
    return graphs


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

    write_tokens(loaded.tokenizer, folder)
    graphs = {"encoder": encoder_graph(loaded, spec.chunk_ms, spec.left_context_ms), **search_graphs(loaded)}
    files = {"fp32": {part: f"{part}.onnx" for part in PARTS}}
    for part, graph in graphs.items():
        onnx.save(graph, folder / files["fp32"][part])
    if "int8" not in spec.precisions:
        return Written(files, [])
    development = OnnxDevelopment(loaded, graphs, folder, spec)
    choice = choose_int8(development, layers_of(loaded.model, graphs), spec.max_wer_increase)
    choice.save(folder)
    chosen = {part: quantized(graphs[part], choice.int8_nodes(part)) for part in QUANTIZED}
    files["int8"] = files["fp32"] | {part: f"{part}.int8.onnx" for part in chosen}
    for part, graph in chosen.items():
        onnx.save(graph, folder / files["int8"][part])
    if "fp32" not in spec.precisions:
        whole = files.pop("fp32")
        for part in chosen:
            (folder / whole[part]).unlink()
    return Written(files, choice.float_layers)
