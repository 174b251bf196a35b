"""Checkpoints that are valid but for one thing, and the pattern that the error of each must match."""

import codecs
import json

import torch
from file_makers import (
    Call,
    Make,
    adapter,
    changed,
    charsmap,
    codec_field,
    deflated,
    demucs,
    diffusion,
    json_fields,
    lm,
    lm_field,
    nested,
    one_storage,
    pickled,
    stride_0,
    tensors,
    yaml_after,
)  # fmt: skip

from musicgen_svc.checkpoints.field_types import quoted

NAN, HUGE = float("nan"), 10**400

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 50))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 50))
CHAIN = "".join(f"c{i}: '${{c{i + 1}}}${{c{i + 1}}}'\n" for i in range(60)) + "c60: xxxxxxxx\n"
BRANCHES = "".join(f"d{i}: ['${{d{i + 1}}}', '${{d{i + 1}}}']\n" for i in range(60)) + "d60: 1\n"
COPIED = list(range(10_000))
TRANSFORMER, UNET = "transformer_lm.", "diffusion_unet."
CHROMA = "conditioners.self_wav.chroma_stem."

CASES: dict[str, tuple[Make, str]] = {
    # Configurations and pickles that expand.
    "aliases": (yaml_after(BOMB), "expands to more than"),
    "merge keys": (yaml_after(MERGES), "merge keys"),
    "chained references": (yaml_after(CHAIN), "expands to more than"),
    "branching references": (yaml_after(BRANCHES), "expands to more than"),
    "a reference to itself": (lm_field("dataset", {"segment_duration": "${dataset}"}), "refers to itself"),
    "shared lists": (lm_field("dataset.x", nested(60)), "expands to more than"),
    "shared lists in a codec": (codec_field("seanet.ratios", nested(60)), "expands to more than"),
    "deep lists": (yaml_after("deep: " + "[" * 1500 + "]" * 1500), "cannot be read"),
    "much YAML": (yaml_after("x: " + "y" * (1 << 20)), "at most 262144 are read"),
    "a long number": (yaml_after("x: " + "9" * 20_000), "a value of 20000 characters"),
    "a wide number": (yaml_after("x: 0x" + "f" * 9_000), "an integer of"),
    "an open reference": (lm_field("dataset.segment_duration", "${gone}"), "refers to nothing"),
    "a deflated pickle": (deflated, "is compressed"),
    "a pickle of many bytes": (pickled(Call(bytearray, 10**11)), "calls __builtin__.bytearray"),
    "a pickle that doubles": (pickled(Call(codecs.encode, "x", "hex")), "calls _codecs.encode"),
    "a pickle that copies": (
        pickled([Call(list, COPIED) for _ in range(2000)]), "more than 10000000 entries"
    ),
    "an older pickle that copies": (
        pickled([Call(list, COPIED) for _ in range(2000)], _use_new_zipfile_serialization=False),
        "more than 10000000 entries",
    ),
    "a pickle with a tuple for a name": (pickled({(1, (2, 3)): 1}), "a tuple for a name"),
    # Numbers of the language model.
    **{
        f"{path} {quoted(value):.14}": (lm_field(path, value), message)
        for path, value, message in (
            (TRANSFORMER + "num_layers", 10**7, "num_layers 10000000; it must be an integer from 1 to 512"),
            (TRANSFORMER + "num_layers", 400, "num_layers is 400 there, and the tensors have 2"),
            (TRANSFORMER + "num_layers", 0, "num_layers 0; it must be"),
            (TRANSFORMER + "n_q", 10**7, "n_q 10000000; it must be an integer"),
            (TRANSFORMER + "n_q", 60, "one for each of the 60 codebooks"),
            (TRANSFORMER + "num_heads", 0, "num_heads 0; it must be"),
            (TRANSFORMER + "num_heads", 3, "a multiple of num_heads"),
            (TRANSFORMER + "num_heads", "4", "num_heads '4'; it must be an integer"),
            (TRANSFORMER + "dim", 10**9, "dim 1000000000; it must be"),
            (TRANSFORMER + "dim", 6400, "dim is 6400 there, and the tensors have 64"),
            (TRANSFORMER + "card", HUGE // 10**330, "card an integer of more than 40 digits"),
            (TRANSFORMER + "card", 401, "card is 401 there, and the tensors have 400"),
            (TRANSFORMER + "hidden_scale", 1e9, "hidden_scale 1000000000.0; it must be"),
            (TRANSFORMER + "hidden_scale", NAN, "hidden_scale nan; it must be"),
            (TRANSFORMER + "activation", "Transformer", "activation 'Transformer'; it must be"),
            (TRANSFORMER + "norm", 3, "norm 3; it must be"),
            (TRANSFORMER + "layer_class", "x", "the field transformer_lm.layer_class"),
            (TRANSFORMER + "max_period", 0, "max_period 0; it must be"),
            (TRANSFORMER + "positional_scale", NAN, "positional_scale nan; it must be"),
            (TRANSFORMER + "past_context", 3, "past was expected"),
            (TRANSFORMER + "positional_embedding", "rope", "positional_embedding 'rope'; it must be 'sin'"),
            ("dataset.segment_duration", NAN, "segment_duration nan; it must be a number above 0"),
            ("dataset.segment_duration", 0, "segment_duration 0; it must be"),
            ("dataset.segment_duration", -5, "segment_duration -5; it must be"),
            ("dataset.segment_duration", 1e9, "segment_duration 1000000000.0; it must be"),
            ("dataset.segment_duration", 0.03, "which is 1 frames of its codec"),
            ("codebooks_pattern.delay.delays", [0, 1, 2, 10**9], "delays .*it must be"),
            ("codebooks_pattern.delay.delays", [3, 2, 1, 0], "in ascending order"),
            ("codebooks_pattern.delay.delays", [0, 1], "one for each of the 4 codebooks"),
            ("codebooks_pattern.delay.delays", [1, 2, 3, 4], "a delay pattern was expected"),
            ("codebooks_pattern.modeling", 7, "modeling 7; it must be 'delay' or null"),
            ("codebooks_pattern.modeling", None, "names no codebooks pattern"),
            ("codebooks_pattern.modeling", "unroll", "modeling 'unroll'; it must be"),
            ("codebooks_pattern.delay", None, "has None for codebooks_pattern.delay"),
            ("fuser.cross", [], "each of the conditioners once"),
            ("fuser.cross", 3, "fuser.cross 3; it must be"),
            ("fuser.cross", ["description"] * 3, "each of the conditioners once"),
            ("fuser.sum", None, "fuser.sum None; it must be"),
            ("conditioners.description", 3, "conditioners.description 3; it must be a mapping"),
            ("conditioners.description.t5", 3, "has 3 for conditioners.description.t5"),
            ("conditioners.description.t5.name", None, "t5.name None|no name"),
            ("conditioners.description.model", "clap", "is conditioned on"),
            ("interleave_stereo_codebooks", 3, "has 3 for interleave_stereo_codebooks"),
            ("interleave_stereo_codebooks", {"use": True}, "its codec has 8"),
            ("compression_model_n_q", 10**9, "compression_model_n_q 1000000000; it must be"),
            ("compression_model_n_q", 60, "which its codec cannot have"),
            ("compression_model_checkpoint", [1], "compression_model_checkpoint"),
            ("sample_rate", 0, "sample_rate 0; it must be"),
        )
    },
    **{
        f"{path} {quoted(value):.14}": (lm_field(CHROMA + path, value, "melody"), message)
        for path, value, message in (
            ("radix2_exp", 32, "radix2_exp 32; it must be an integer from 4 to 16"),
            ("radix2_exp", 15, r"spec.window is \[16384\]"),
            ("n_chroma", 10**7, "n_chroma 10000000; it must be"),
            ("n_chroma", 100, "output_proj.weight"),
            ("winhop", 1, "1/16 of winlen up to winlen"),
            ("nfft", 64, "winlen at most nfft"),
            ("norm", NAN, "norm nan; it must be"),
            ("argmax", "no", "argmax 'no'; it must be true or false"),
        )
    },
    "a melody at another rate": (lm_field("sample_rate", 16_000, "melody"), "follows melodies at 16000 Hz"),
    # Numbers of the codec.
    **{
        f"codec {path} {quoted(value):.14}": (codec_field(path, value), message)
        for path, value, message in (
            ("seanet.lstm", 10**7, "lstm 10000000; it must be"),
            ("seanet.n_residual_layers", 10**7, "n_residual_layers 10000000; it must be"),
            ("seanet.n_filters", 10**7, "n_filters 10000000; it must be"),
            ("seanet.n_filters", 4096, "channels; at most 32768 are accepted"),
            ("seanet.ratios", [1] * 100, "ratios .*it must be a list"),
            ("seanet.ratios", [], "ratios .*it must be a list"),
            ("seanet.ratios", [64] * 6, "channels|frames a second"),
            ("seanet.ratios", [5, 5, 4, 4], "does not fit"),
            ("seanet.activation", "Transformer", "activation 'Transformer'; it must be"),
            ("seanet.activation_params", {"beta": 1}, "builds no EnCodec"),
            ("seanet.kernel_size", 10**7, "kernel_size 10000000; it must be"),
            ("seanet.dilation_base", 10**7, "dilation_base 10000000; it must be"),
            ("seanet.compress", 0, "compress 0; it must be"),
            ("seanet.compress", 100, "which leaves none"),
            ("seanet.pad_mode", "x", "pad_mode 'x'; it must be"),
            ("seanet.encoder", {"dimension": 7}, "dimension .*for encoder and decoder"),
            ("rvq.n_q", 10**7, "n_q 10000000; it must be"),
            ("rvq.n_q", 5, "n_q is 5 there, and the tensors have 4"),
            ("rvq.bins", 10**9, "bins 1000000000; it must be"),
            ("encodec.quantizer", "no_quant", "quantizer 'no_quant'; it must be 'rvq'"),
            ("encodec.sample_rate", 0, "sample_rate 0; it must be"),
            ("encodec.sample_rate", 192_000, "frames a second"),
            ("encodec.channels", 2, "they must be equal"),
            ("encodec", 3, "has 3 for encodec"),
        )
    },
    **{
        f"EnCodec {name} {quoted(value):.14}": (
            json_fields("encodec_32khz", "config.json", "hf-codec", **{name: value}), message
        )
        for name, value, message in (
            ("target_bandwidths", [1e12], "target_bandwidths .*it must be"),
            ("target_bandwidths", [9000.0], "codebooks; 1 to 64 are accepted"),
            ("target_bandwidths", [1.8, 0.9], "the last must be the greatest"),
            ("num_lstm_layers", 10**7, "num_lstm_layers 10000000; it must be"),
            ("num_residual_layers", 10**7, "num_residual_layers 10000000; it must be"),
            ("codebook_size", 500, "it must be a power of 2"),
            ("codebook_dim", 5, "they must be equal"),
            ("upsampling_ratios", [8, 0], "upsampling_ratios .*it must be"),
            ("sampling_rate", 0, "sampling_rate 0; it must be"),
            ("norm_type", 1, "norm_type 1; it must be"),
        )
    },
    # T5 and its tokenizer.
    **{
        f"T5 {name} {quoted(value):.14}": (json_fields("t5-small", "config.json", **{name: value}), message)
        for name, value, message in (
            ("num_layers", 10**7, "num_layers 10000000; it must be"),
            ("num_layers", 100, "num_layers is 100 there, and the tensors have 1"),
            ("vocab_size", 10**9, "vocab_size 1000000000; it must be"),
            ("d_ff", 10**9, "d_ff 1000000000; it must be"),
            ("num_heads", 0, "num_heads 0; it must be"),
            ("relative_attention_max_distance", 0, "relative_attention_max_distance 0; it must be"),
            ("relative_attention_num_buckets", 3, "relative_attention_num_buckets 3; it must be"),
            ("layer_norm_epsilon", -1, "layer_norm_epsilon -1; it must be"),
            ("feed_forward_proj", ["relu"], "feed_forward_proj .*it must be"),
            ("model_type", ["t5"], "must be a 't5'"),
        )
    },
    **{
        f"tokenizer {name} {quoted(value):.14}": (
            json_fields("t5-small", "tokenizer_config.json", **{name: value}), message
        )
        for name, value, message in (
            ("extra_ids", 10**8, "extra_ids 100000000; it must be"),
            ("extra_ids", "many", "extra_ids 'many'; it must be"),
            ("eos_token", 3, "eos_token 3; it must be"),
            ("pad_token", None, "does not hold T5's tokenizer"),
            ("additional_special_tokens", 3, "additional_special_tokens 3; it must be"),
            ("added_tokens_decoder", [1], "added_tokens_decoder .*it must be"),
            ("model_max_length", "x", "model_max_length 'x'; it must be"),
        )
    },
    "a tokenizer that panics": (
        charsmap(b"\x08\0\0\0" + bytes(8) + b"a\0"), "does not hold T5's tokenizer: index out of bounds"
    ),
    "a tokenizer that asks for memory": (charsmap(b"\xff\xff\xff\x7f" + bytes(5)), "is cut short"),
    "an empty vocabulary": (
        json_fields("t5-small", "tokenizer.json", model={"type": "Unigram", "unk_id": 2, "vocab": []}),
        "does not hold T5's tokenizer",
    ),
    "a vocabulary of something else": (
        json_fields("t5-small", "tokenizer.json", model={"type": "Unigram", "vocab": {"a": "b"}}),
        "does not hold T5's tokenizer",
    ),
    # Demucs and MultiBand Diffusion.
    "many parts of Demucs": (
        demucs(listing=json.dumps({"models": ["955717e8"] * 2000})), "models .*it must be a list"
    ),
    "no parts of Demucs": (demucs(listing="models: []"), "models .*it must be a list"),
    "Demucs with weights that cancel out": (
        demucs(listing="models: ['955717e8']\nweights: [[0, 0, 0, 0]]"), "do not cancel out"
    ),
    "a bomb for Demucs": (demucs(listing="models: ['955717e8']\n" + BOMB), "expands to more than"),
    **{
        f"Demucs {name} {quoted(value):.14}": (demucs(**{name: value}), message)
        for name, value, message in (
            ("depth", 10**7, "depth 10000000; it must be"),
            ("channels", 10**7, "channels 10000000; it must be"),
            ("channels", 512, "numbers, and its configuration needs"),
            ("segment", 0, "segment 0; it must be"),
            ("segment", {"_type": "fraction", "numerator": 1, "denominator": 0}, "does not hold a Demucs"),
            ("samplerate", 0, "samplerate 0; it must be"),
            ("sources", 4, "sources 4; it must be"),
            ("norm_groups", "x" * 1000, "norm_groups .*it must be"),
            ("wrong", 1, "does not hold a Demucs"),
        )
    },
    "quantized Demucs": (demucs(metadata={"structure": '{"_dict": [["__quantized", true]]}'}), "needs diffq"),
    **{
        f"diffusion {path} {quoted(value):.14}": (
            diffusion(lambda p, path=path, value=value: changed(p, path, value)), message
        )
        for path, value, message in (("n_bands", 10**7, "n_bands 10000000; it must be"),
                                     ("sample_rate", 0, "sample_rate 0; it must be"))
    },
    **{
        f"diffusion {path} {quoted(value):.14}": (
            diffusion(lambda p, path=path, value=value: changed(p[0]["cfg"], path, value)), message
        )
        for path, value, message in (
            (UNET + "depth", 10**7, "depth 10000000; it must be"),
            (UNET + "res_blocks", 10**7, "res_blocks 10000000; it must be"),
            (UNET + "hidden", 10**7, "hidden 10000000; it must be"),
            (UNET + "kernel", 7, "larger by an even number"),
            (UNET + "codec_dim", None, "codec_dim None; it must be"),
            ("schedule.num_steps", 10**9, "num_steps 1000000000; it must be"),
            ("schedule.beta_t1", NAN, "beta_t1 nan; it must be"),
            ("processor.n_bands", 10**7, "n_bands 10000000; it must be"),
            ("filter", nested(60), "expands to more than"),
        )
    },
    "diffusion fitted on nothing": (
        diffusion(lambda p: p[0]["processor_state"]["counts"].zero_()), "not finite"
    ),
    "diffusion of NaN": (
        diffusion(lambda p: p[0]["model_state"]["conv_codec.bias"].fill_(NAN)), "not finite .*conv_codec.bias"
    ),
    "diffusion that holds itself": (diffusion(lambda p: p.update(x=p, n_bands=0)), "n_bands 0"),
    # Tensors.
    "stride 0": (tensors(stride_0), "bytes, of which 4 are stored"),
    "one storage": (tensors(one_storage), "save them with a copy each"),
    "complex numbers": (
        tensors(lambda s: s.update({"out_norm.weight": torch.ones(64, dtype=torch.complex64)})), "complex"
    ),
    "integers": (
        tensors(lambda s: s.update({"out_norm.weight": torch.ones(64, dtype=torch.int64)})),
        r"1 tensor \(out_norm.weight is int64\) that are not in floating point",
    ),
    "sparse": (
        tensors(lambda s: s.update({"out_norm.weight": torch.ones(64).to_sparse()})),
        "plain array|cannot be read",
    ),
    "NaN": (
        tensors(lambda s: s["out_norm.weight"].fill_(NAN)),
        r"not finite \(NaN or infinity\) in 1 tensor \(out_norm.weight\)",
    ),
    "infinity in a layer": (
        tensors(lambda s: s["transformer.layers.1.linear2.weight"][3, 5].fill_(float("-inf"))),
        r"in 1 tensor \(transformer.layers.1.linear2.weight\)",
    ),
    "NaN in a head": (
        tensors(lambda s: s["linears.2.weight"][0, 0].fill_(NAN)), r"in 1 tensor \(linears.2.weight\)"
    ),
    "NaN in a projection": (
        tensors(lambda s: s["condition_provider.conditioners.description.output_proj.bias"][0].fill_(NAN)),
        "description.output_proj.bias",
    ),
    "no numbers": (
        tensors(lambda s: s.update({"out_norm.weight": torch.ones(0)})), r"out_norm.weight is \[0\]"
    ),
    "no dimension": (
        tensors(lambda s: s.update({"emb.0.weight": torch.tensor(1.0)})), r"emb.0.weight is \[\]"
    ),
    # Adapters.
    "an adapter's product": (
        adapter(torch.ones(1, 40_000), torch.ones(40_000, 1)), "of another shape than the base's"
    ),
    "an adapter of complex numbers": (
        adapter(torch.ones(1, 64, dtype=torch.complex64), torch.ones(400, 1)), "not in floating point"
    ),
    "an adapter of NaN": (
        adapter(torch.full((1, 64), NAN), torch.ones(400, 1)), "not finite .*linears.0.weight"
    ),
    "an adapter's pattern": (
        adapter(torch.ones(1, 64), torch.ones(400, 1), alpha_pattern={"a?" * 40 + "a" * 40: 1}), "not read"
    ),
    "an adapter's alpha": (adapter(torch.ones(1, 64), torch.ones(400, 1), lora_alpha=HUGE), "lora_alpha"),
}  # fmt: skip

VALID: dict[str, Make] = {
    "export": lambda files: files.copy("small"),
    "codec in transformers' format": lambda files: files.copy("hf-codec"),
    "melody with parts of its own": lambda files: (files.copy("melody"), files.beside("htdemucs")),
    "diffusion": diffusion(lambda package: None),
    "adapter": adapter(torch.ones(1, 64), torch.ones(400, 1)),
    "references": lm(lambda p: p["xp.cfg"].update(duration=30, dataset={"segment_duration": "${duration}"})),
}
"""The makers without a change: they show that the errors of CASES have no other cause."""
