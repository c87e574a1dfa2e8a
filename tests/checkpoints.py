"""Tiny checkpoints in the on-disk layouts of real masked-diffusion models, and what they should compute.

Three parts: the files (configs, weight names, tokenizers, chat templates), `write`, and reference forwards in
plain torch, float64. No transformers class is used here: what is right does not depend on the library.

As on the hub: the names of fields, tensors and tokens, and which file holds what. Made up: every size, and
every number a loader could drop unnoticed (RoPE base, eps, head counts, window): none is its class's default.
Weights are random and large enough for sharp logits, so each mistake shows.
"""

import json
import re
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

LAYOUTS = ("llada", "dream", "a2d-qwen3", "a2d-qwen2", "a2d-llama", "modernbert")
DROP = object()  # write(..., field=DROP): a config.json without that field

# ----------------------------------------------------------------------------------------- what the files say

# config.json. Fields "*_token_id" name the token here; its id is filled in.
CONFIGS = {
    "llada": dict(  # the matrices have embedding_size rows; published checkpoints have the same vocab_size
        model_type="llada", architectures=["LLaDAModelLM"], transformers_version="4.46.3", d_model=64,
        n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=88, mlp_ratio=4, embedding_size=320,
        vocab_size=304, max_sequence_length=1024, rope=True, rope_theta=500000.0, rope_full_precision=True,
        rms_norm_eps=0.02, activation_type="silu", block_type="llama", block_group_size=1,
        layer_norm_type="rms", layer_norm_with_affine=True, attention_layer_norm=False,
        attention_layer_norm_with_affine=True, bias_for_layer_norm=False, include_bias=False,
        include_qkv_bias=False, weight_tying=False, alibi=False, alibi_bias_max=8.0, scale_logits=False,
        input_emb_norm=False, multi_query_attention=None, flash_attention=False, attention_dropout=0.0,
        embedding_dropout=0.0, residual_dropout=0.0,
        init_device="meta", init_fn="mitchell", init_std=0.02, init_cutoff_factor=None, precision="amp_bf16",
        use_cache=False, mask_token_id="<|mdm_mask|>", eos_token_id="<|endoftext|>",
        pad_token_id="<|endoftext|>",
        auto_map={"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM",
                  "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"}),
    "dream": dict(
        model_type="Dream", architectures=["DreamModel"], transformers_version="4.46.2",
        torch_dtype="bfloat16", hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=304, max_position_embeddings=2048,
        rope_theta=1000000.0, rope_scaling=None, rms_norm_eps=0.02, hidden_act="silu",
        tie_word_embeddings=False, attention_dropout=0.0, initializer_range=0.02, use_cache=True,
        use_mrope=False, use_sliding_window=False, sliding_window=None, max_window_layers=28,
        full_attn_mult=None, bos_token_id="<|endoftext|>", eos_token_id="<|endoftext|>",
        pad_token_id="<|endoftext|>", mask_token_id="<|mask|>",
        auto_map={"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}),
    "a2d-qwen3": dict(  # no mask_token_id: the conversion gives the tokenizer a mask token and nothing else
        model_type="a2d-qwen3", architectures=["A2DQwen3LMHeadModel"], transformers_version="4.57.0",
        dtype="bfloat16", hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, vocab_size=288, max_position_embeddings=2048, rope_theta=1000000,
        rope_scaling=None, rms_norm_eps=0.02, hidden_act="silu", tie_word_embeddings=True,
        attention_bias=False, attention_dropout=0.0, initializer_range=0.02, use_cache=True,
        use_sliding_window=False,
        sliding_window=None, max_window_layers=28, layer_types=["full_attention"] * 2,
        bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>",
        auto_map={"AutoConfig": "modeling_qwen3.A2DQwen3Config", "AutoModel": "modeling_qwen3.A2DQwen3Model",
                  "AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel"}),
    "a2d-qwen2": dict(  # says tied; the file has another head (so does Qwen2.5-Coder-0.5B-...-mdlm-v0.1)
        model_type="a2d-qwen2", architectures=["A2DQwen2LMHeadModel"], transformers_version="4.57.0",
        dtype="bfloat16", hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, vocab_size=288, max_position_embeddings=2048, rope_theta=1000000.0,
        rope_scaling=None, rms_norm_eps=0.02, hidden_act="silu", tie_word_embeddings=True,
        attention_dropout=0.0, initializer_range=0.02, use_cache=True, use_sliding_window=False,
        sliding_window=None, max_window_layers=21, layer_types=["full_attention"] * 2,
        bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>",
        auto_map={"AutoConfig": "modeling_qwen2.A2DQwen2Config",
                  "AutoModelForMaskedLM": "modeling_qwen2.A2DQwen2LMHeadModel"}),
    "a2d-llama": dict(  # written by transformers 5: rope_parameters instead of rope_theta
        model_type="a2d-llama", architectures=["A2DLlamaLMHeadModel"], transformers_version="5.17.0",
        dtype="bfloat16", hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=8, vocab_size=288, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=0.02,
        hidden_act="silu", tie_word_embeddings=False, attention_bias=False, attention_dropout=0.0,
        mlp_bias=False, initializer_range=0.02, use_cache=True, pretraining_tp=1,
        bos_token_id="<|begin_of_text|>", eos_token_id="<|eot_id|>", pad_token_id="<|eot_id|>",
        mask_token_id="<|mask|>"),
    "modernbert": dict(
        model_type="modernbert", architectures=["ModernBertForMaskedLM"], transformers_version="4.48.0",
        torch_dtype="float32", hidden_size=64, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=320, max_position_embeddings=2048, global_attn_every_n_layers=3,
        global_rope_theta=50000.0, local_rope_theta=300.0, local_attention=6, norm_eps=0.02,
        layer_norm_eps=0.02, norm_bias=False, hidden_activation="gelu", attention_bias=False,
        attention_dropout=0.0, mlp_bias=False, mlp_dropout=0.0, embedding_dropout=0.0, decoder_bias=True,
        classifier_activation="gelu", classifier_bias=False, classifier_dropout=0.0,
        classifier_pooling="mean", deterministic_flash_attn=False, gradient_checkpointing=False,
        initializer_cutoff_factor=2.0, initializer_range=0.02, position_embedding_type="absolute",
        repad_logits_with_grad=False, sparse_pred_ignore_index=-100, sparse_prediction=False,
        bos_token_id="[CLS]", cls_token_id="[CLS]", eos_token_id="[SEP]", sep_token_id="[SEP]",
        pad_token_id="[PAD]"),
}

# Written anew to print what the published templates print (for system, user and assistant messages).
LLAMA3 = ("{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' +"
          " m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}")
HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SYSTEM = ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n' }}WORDS{{ '<|im_end|>\n' }}"
          "{% endif %}")
THINK = ("{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
         "{{ '<think>\n\n</think>\n\n' }}{% endif %}")

# added: tokens in the order of their ids. special: what tokenizer_config.json says. first, last: what the
# tokenizer puts around a text unless told not to.
TOKENIZERS = {
    "llada": dict(  # <|mdm_mask|> has no role; the header is appended whether it is asked for or not
        added=["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>", "<role>", "</role>",
               "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        special=dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                     cls_token="[CLS]", gmask_token="[gMASK]", tokenizer_class="PreTrainedTokenizerFast",
                     additional_special_tokens=["<role>", "</role>"], trust_remote_code=True,
                     add_bos_token=False, add_eos_token=False, fast_tokenizer=True, merges_file=None,
                     vocab_file=None),
        template=LLAMA3 + HEADER),
    "dream": dict(  # vocab.json and merges.txt, no tokenizer.json
        added=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"],
        special=dict(bos_token="<|beginoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                     mask_token="<|mask|>", unk_token=None, tokenizer_class="DreamTokenizer",
                     errors="replace", additional_special_tokens=["<|beginoftext|>", "<|mask|>"],
                     add_bos_token=False, add_prefix_space=False, split_special_tokens=False,
                     model_max_length=131072,
                     auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}),
        template=SYSTEM.replace("WORDS", "You are a helpful assistant.") + CHATML,
        generation=dict(_from_model_config=True, alg="origin", alg_temp=None, eps=0.001, mask_token_id=None,
                        output_history=False, steps=512, temperature=0.0, top_k=None, top_p=None,
                        bos_token_id="<|endoftext|>", eos_token_id="<|endoftext|>",
                        pad_token_id="<|endoftext|>", transformers_version="4.46.2")),
    "a2d-qwen3": dict(  # <think> and </think> are single tokens, but not special ones
        added=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|mask|>"],
        special=dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", mask_token="<|mask|>",
                     unk_token=None, tokenizer_class="Qwen2Tokenizer", errors="replace", add_bos_token=False,
                     additional_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=131072),
        template=CHATML + THINK),
    "a2d-qwen2": dict(  # <|mask|> is there, but is nobody's mask_token
        added=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"],
        special=dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
                     tokenizer_class="Qwen2Tokenizer", errors="replace", add_bos_token=False,
                     additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|mask|>"]),
        template=SYSTEM.replace(
            "WORDS", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.") + CHATML),
    "a2d-llama": dict(
        added=["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
               "<|eot_id|>", "<|mask|>"],
        special=dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|eot_id|>",
                     mask_token="<|mask|>", tokenizer_class="PreTrainedTokenizerFast"),
        template=LLAMA3 + "{% if add_generation_prompt %}" + HEADER + "{% endif %}",
        first="<|begin_of_text|>"),
    "modernbert": dict(
        added=["<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"],
        special=dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
                     mask_token="[MASK]", tokenizer_class="PreTrainedTokenizerFast", model_max_length=8192,
                     model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=True),
        template=None, first="[CLS]", last="[SEP]"),
}
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("e", "r"), ("Ċ", "Ċ")]  # Ġ is the space, Ċ the line feed

HF_NAMES = dict(
    embed="model.embed_tokens.weight", last="model.norm.weight", head="lm_head.weight", layer="model.layers.",
    norm1="input_layernorm", norm2="post_attention_layernorm", q="self_attn.q_proj", k="self_attn.k_proj",
    v="self_attn.v_proj", o="self_attn.o_proj", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
LLADA_NAMES = dict(
    embed="model.transformer.wte.weight", last="model.transformer.ln_f.weight",
    head="model.transformer.ff_out.weight", layer="model.transformer.blocks.", norm1="attn_norm",
    norm2="ff_norm", q="q_proj", k="k_proj", v="v_proj", o="attn_out", gate="ff_proj", up="up_proj",
    down="ff_out")


def sizes(config: dict) -> dict:
    """The numbers of a decoder, under one name each."""
    if config["model_type"] == "llada":
        names = dict(width="d_model", mlp="mlp_hidden_size", layers="n_layers", heads="n_heads",
                     kv="n_kv_heads", theta="rope_theta", eps="rms_norm_eps", rows="embedding_size")
    else:
        names = dict(width="hidden_size", mlp="intermediate_size", layers="num_hidden_layers",
                     heads="num_attention_heads", kv="num_key_value_heads", theta="rope_theta",
                     eps="rms_norm_eps", rows="vocab_size")
    flat = config | config.get("rope_parameters", {})
    found = {k: flat[name] for k, name in names.items()}
    return found | {"dim": config.get("head_dim") or found["width"] // found["heads"]}


def shapes(layout: str, config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by name."""
    if layout == "modernbert":
        d, m, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        found = {"model.embeddings.tok_embeddings.weight": (V, d), "model.embeddings.norm.weight": (d,),
                 "model.final_norm.weight": (d,), "head.dense.weight": (d, d), "head.norm.weight": (d,),
                 "decoder.bias": (V,)}  # decoder.weight is the embedding: not in the file
        for i in range(config["num_hidden_layers"]):
            block = {"attn.Wqkv": (3 * d, d), "attn.Wo": (d, d), "mlp_norm": (d,), "mlp.Wi": (2 * m, d),
                     "mlp.Wo": (d, m)} | ({"attn_norm": (d,)} if i else {})  # layer 0 has no attn_norm
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        return found
    n, s = LLADA_NAMES if layout == "llada" else HF_NAMES, sizes(config)
    d, q, kv = s["width"], s["heads"] * s["dim"], s["kv"] * s["dim"]
    found = {n["embed"]: (s["rows"], d), n["last"]: (d,), n["head"]: (s["rows"], d)}
    for i in range(s["layers"]):
        block = {"norm1": (d,), "norm2": (d,), "q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q),
                 "gate": (s["mlp"], d), "up": (s["mlp"], d), "down": (d, s["mlp"])}
        found |= {f"{n['layer']}{i}.{n[role]}.weight": shape for role, shape in block.items()}
        if layout in ("dream", "a2d-qwen2"):
            found |= {f"{n['layer']}{i}.{n[role]}.bias": block[role][:1] for role in "qkv"}
        if layout == "a2d-qwen3":
            found |= {f"{n['layer']}{i}.self_attn.{k}_norm.weight": (s["dim"],) for k in "qk"}
    return found


# ---------------------------------------------------------------------------------------------------- writing


def write(layout: str, folder: Path, seed: int = 0, *, shards: int = 1, added: list[str] | None = None,
          special: dict | None = None, **changes) -> dict:
    """Write a checkpoint. Returns config, tensors (as stored, in fp32), ids {added token: id}, base.

    Ids below `base` are text. changes: fields of config.json (DROP: without it). special: likewise, of
    tokenizer_config.json. added: instead of the layout's own added tokens. shards: number of weight files."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = TOKENIZERS[layout]
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(MERGES)}
    ids = {token: len(vocab) + i for i, token in enumerate(parts["added"] if added is None else added)}
    config = _resolve(CONFIGS[layout] | changes, ids)
    _dump(folder / "config.json", config)
    if "generation" in parts:
        _dump(folder / "generation_config.json", _resolve(parts["generation"], ids))
    special = {k: v for k, v in (parts["special"] | (special or {})).items() if v is not DROP}
    _write_tokenizer(layout, folder, vocab, ids, special)
    for module in re.findall(r"(\w+)\.\w+", json.dumps([config.get("auto_map"), special.get("auto_map")])):
        # the code that auto_map asks to run: it leaves a trace
        (folder / f"{module}.py").write_text(f"open({str(folder / 'EXECUTED')!r}, 'w').close()\n")
    dtype = torch.float32 if layout == "modernbert" else torch.bfloat16
    tensors = {k: random_tensor(k, shape, seed).to(dtype) for k, shape in shapes(layout, config).items()}
    if layout == "a2d-qwen3":  # tied: the same numbers twice
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_weights(folder, tensors, shards)
    return {"config": config, "tensors": {k: v.float() for k, v in tensors.items()}, "ids": ids,
            "base": len(vocab)}


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A function of name and seed. Norm weights around 1, the rest of a size that gives sharp logits."""
    gen = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(shape, generator=gen)
    if len(shape) == 1:
        return 0.5 * noise if name.endswith("bias") else 1 + 0.3 * noise
    return 1.5 * noise / shape[1] ** 0.5


def write_weights(folder: Path, tensors: dict[str, Tensor], shards: int = 1):
    """model.safetensors, or as many files and an index of which file holds which tensor."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({k: v for k, v in tensors.items() if files[k] == file}, folder / file, {"format": "pt"})
    total = sum(v.numel() * v.element_size() for v in tensors.values())
    _dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def _write_tokenizer(layout: str, folder: Path, vocab: dict[str, int], ids: dict[str, int], special: dict):
    parts = TOKENIZERS[layout]
    tokens = {token: dict(content=token, lstrip=token == "[MASK]", normalized=False, rstrip=False,
                          single_word=False, special="think>" not in token) for token in ids}
    settings = {"added_tokens_decoder": {str(ids[token]): entry for token, entry in tokens.items()}}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": int(1e30)} | special
    if parts["template"] and layout.startswith("a2d"):
        (folder / "chat_template.jinja").write_text(parts["template"])  # where newer versions put it
    elif parts["template"]:
        settings["chat_template"] = parts["template"]
    _dump(folder / "tokenizer_config.json", settings)
    roles = {k: v for k, v in special.items() if k.endswith(("_token", "special_tokens")) and v}
    _dump(folder / "special_tokens_map.json", roles)
    if layout in ("dream", "a2d-qwen3", "a2d-qwen2"):
        _dump(folder / "vocab.json", vocab)
        _dump(folder / "added_tokens.json", ids)
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in MERGES)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if layout == "dream":
        return
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(**entry) for entry in tokens.values()])
    around = [parts.get("first"), "$A", parts.get("last")]
    if around != [None, "$A", None]:
        used = [(token, ids[token]) for token in around if token in ids]
        tokenizer.post_processor = processors.TemplateProcessing(" ".join(filter(None, around)), None, used)
    tokenizer.save(str(folder / "tokenizer.json"))


def _resolve(fields: dict, ids: dict[str, int]) -> dict:
    return {k: ids[v] if k.endswith("_token_id") and isinstance(v, str) else v
            for k, v in fields.items() if v is not DROP}


def _dump(file: Path, value: dict):
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------- reference forwards


@torch.no_grad()
def reference_logits(layout: str, written: dict, ids, pad_mask=None) -> Tensor:
    """Logits (B, T, V), float64, of ids (B, T): not shifted, the mask token not excluded.

    pad_mask (B, T): False = padding, which nobody looks at; positions count from the first real token."""
    ids = torch.as_tensor(ids)
    real = torch.ones_like(ids, dtype=torch.bool) if pad_mask is None else torch.as_tensor(pad_mask).bool()
    w = {name: tensor.double() for name, tensor in written["tensors"].items()}
    position = (real.cumsum(1) - 1).clamp(min=0)
    forward = modernbert_logits if layout == "modernbert" else decoder_logits
    return forward(layout, written["config"], w, ids, real, position)


def decoder_logits(layout, config, w, ids, real, position):
    """LLaDA, Dream and A2D: a Llama or Qwen decoder without the causal mask."""
    s, n = sizes(config), LLADA_NAMES if layout == "llada" else HF_NAMES
    x = w[n["embed"]][ids]  # (B, T, d)
    for i in range(s["layers"]):

        def linear(role, h, i=i):
            name = f"{n['layer']}{i}.{n[role]}."
            return h @ w[name + "weight"].T + w.get(name + "bias", 0)

        def norm(name, h, i=i):
            return rms_norm(h, w[f"{n['layer']}{i}.{name}.weight"], s["eps"])

        h = norm(n["norm1"], x)
        q, k, v = (split(linear(role, h), s["dim"]) for role in "qkv")  # (B, heads or kv, T, dim)
        if layout == "a2d-qwen3":
            q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
        q, k = rotate(q, position, s["theta"]), rotate(k, position, s["theta"])
        k, v = (t.repeat_interleave(s["heads"] // s["kv"], 1) for t in (k, v))  # heads share keys and values
        x = x + linear("o", attend(q, k, v, real[:, None, None]))
        h = norm(n["norm2"], x)
        gate = linear("gate", h)
        x = x + linear("down", gate * gate.sigmoid() * linear("up", h))  # SwiGLU
    return rms_norm(x, w[n["last"]], s["eps"]) @ w[n["head"]].T


def modernbert_logits(layout, config, w, ids, real, position):
    """Every third layer sees everything, the others local_attention // 2 tokens to each side."""
    def layer_norm(name, h):
        h = h - h.mean(-1, keepdim=True)
        return w[name + ".weight"] * h / (h.square().mean(-1, keepdim=True) + config["norm_eps"]).sqrt()

    distance = (torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])).abs()
    embedding = w["model.embeddings.tok_embeddings.weight"]
    x = layer_norm("model.embeddings.norm", embedding[ids])
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        theta, seen = config["global_rope_theta"], real[:, None, None]
        if i % config["global_attn_every_n_layers"]:
            theta, seen = config["local_rope_theta"], seen & (distance <= config["local_attention"] // 2)
        h = layer_norm(name + "attn_norm", x) if i else x
        q, k, v = (split(t, config["hidden_size"] // config["num_attention_heads"])
                   for t in (h @ w[name + "attn.Wqkv.weight"].T).chunk(3, -1))
        h = attend(rotate(q, position, theta), rotate(k, position, theta), v, seen)
        x = x + h @ w[name + "attn.Wo.weight"].T
        a, b = (layer_norm(name + "mlp_norm", x) @ w[name + "mlp.Wi.weight"].T).chunk(2, -1)
        x = x + (gelu(a) * b) @ w[name + "mlp.Wo.weight"].T  # GeGLU
    h = layer_norm("model.final_norm", x)
    h = layer_norm("head.norm", gelu(h @ w["head.dense.weight"].T))
    return h @ embedding.T + w["decoder.bias"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def split(x: Tensor, dim: int) -> Tensor:
    """(B, T, heads * dim) to (B, heads, T, dim)."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """RoPE: the pair (i, i + dim/2) of each head turns by position * theta^(-2i/dim)."""
    a, b = x.chunk(2, -1)
    frequency = theta ** (-torch.arange(a.shape[-1], dtype=torch.float64) / a.shape[-1])
    angle = position[:, None, :, None] * frequency  # (B, 1, T, dim/2)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention to the keys where `seen`; (B, heads, T, dim) to (B, T, heads * dim)."""
    score = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -1e30)  # finite: a padded row
    return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)  # that sees nothing must not become NaN
