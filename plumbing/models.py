"""How a model is loaded and saved, and how much memory it will take.

Real checkpoints, LLaDA, Dream, A2D and ModernBERT-chat, are loaded by stock transformers classes alone.

`trust_remote_code` is never used: with a current transformers the hub's modelling code fails or, worse,
gives silently wrong logits. It is not needed either: LLaDA is a Llama whose parameters have other names,
Dream is a Qwen2 whose prediction for position i sits at i - 1, A2D is Qwen3, Qwen2 or Llama; all of them with
a bidirectional attention mask. `config.is_causal = False` asks for it (transformers >= 5.2; before that it is
ignored without a word, so load_model looks whether the last token moves the first prediction).

    model_type                  for example
    llada                       GSAI-ML/LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5
    Dream                       Dream-org/Dream-v0-Instruct-7B, Dream-Coder-v0-*, apple/DiffuCoder-7B-*
    a2d-qwen3, -qwen2, -llama   dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1
    modernbert                  dllm-hub/ModernBERT-base-chat-v0.1, "tiny"
    llama, qwen2, qwen3         what save_model wrote of one of these
"""

import ctypes
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import string
import unicodedata
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import (GenerationConfig, LlamaConfig, LlamaForCausalLM, ModernBertConfig,
                          ModernBertForMaskedLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3Config,
                          Qwen3ForCausalLM)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import chat_template_utils, find_adapter_config_file
from transformers.utils import logging as transformers_logging

from common import LOGITS, Denoiser, chat_prompt
from plumbing import parallel
from plumbing.folder import pipes
from plumbing.parallel import one_line, refuse, refused

transformers_logging.disable_progress_bar()  # one bar at a time: ours
transformers_logging.set_verbosity_error()  # what it would warn of, load_model refuses

# ------------------------------------------------------------------------------------------ load and save

STOCK = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig),
}
KINDS = {"llada": "llama", "Dream": "qwen2", "a2d-qwen3": "qwen3", "a2d-qwen2": "qwen2", "a2d-llama": "llama"}

# LLaDA's parameter names as Llama's. from_pretrained substitutes \1 only: one group per rule.
LLADA_BLOCK = {
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}
LLADA_NAMES = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    **{rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{ours}."
       for theirs, ours in LLADA_BLOCK.items()},
}
LLADA_CONFIG = {
    "hidden_size": "d_model", "intermediate_size": "mlp_hidden_size", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "max_position_embeddings": "max_sequence_length",
    "attention_bias": "include_qkv_bias", "mlp_bias": "include_bias", "tie_word_embeddings": "weight_tying",
    "pad_token_id": "pad_token_id", "eos_token_id": "eos_token_id",
}
# check_weights tells the fourth; of a classifier's labels a list would be made, as long as they say; and
# where it was trained, there may have been another attention than here
NOT_OURS = ("auto_map", "architectures", "model_type", "quantization_config", "num_labels", "id2label",
            "label2id", "attn_implementation", "_attn_implementation")
NO_WINDOW = {"use_sliding_window": False, "layer_types": None}  # of Qwen's attention
LLADA_FIXED = {  # in every release; another value would change the network but not the parameters' names
    "alibi": False, "scale_logits": False, "input_emb_norm": False, "attention_layer_norm": False,
    "activation_type": "silu", "layer_norm_type": "rms", "rope": True,
}

LAYERS = 1000  # some 8 times as many as the largest models have; of more, even the count would take long
MASKS = ("<|mask|>", "<|mdm_mask|>")
ENDS = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>", "[/Answer]")  # any of them ends an answer
# dllm's, and set in code there. (A template loses one newline at its end.)
MODERNBERT_CHAT = "[Question]\n{{ messages[0]['content'] | trim }}\n[/Question]\n\n[Answer]\n\n"


def locate(name: str, revision: str | None) -> str:
    """The cached folder of a hub id whose weights are all in the cache, otherwise the name itself. What is
    there is not asked for again: without network each question costs half a minute of retries."""
    wanted = ["*.json", "*.jinja", "*.txt", "model*.safetensors"]
    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=wanted)
        index = Path(folder, "model.safetensors.index.json")
        files = json.loads(index.read_text())["weight_map"] if index.exists() else {"": "model.safetensors"}
        return folder if all(Path(folder, file).exists() for file in files.values()) else name
    except Exception:  # not there, or not whole; or a local folder, which is no hub id
        return name


def is_block_diffusion(name: str, raw: dict, where: str) -> bool:
    """dllm's BD3LM is its A2D trained under a block-causal mask, and no field of config.json says so: only a
    name does (the hub's, or of its folder in a cache), or the trainer's arguments, a pickle never loaded."""
    named = re.search(r"bd3lm[^/]*(/snapshots/[^/]*)?$", str(Path(name).absolute()), re.IGNORECASE)
    return bool(named or re.search('bd3lm|"block_size": [1-9]', json.dumps(raw), re.IGNORECASE)
                or any(b"block_size" in f.read_bytes() for f in Path(where).glob("training_args.bin")))


def refuse_adapter(name: str, where: str, revision: str | None):
    """Refuse an adapter in the folder or under the hub id, alone or beside the weights of a whole model."""
    if Path(where).is_dir():
        found = any(re.search(r"^adapter|(^|[^a-z])lora", file.name, re.IGNORECASE)
                    and file.suffix.lower() in (".json", ".safetensors", ".bin", ".pt")
                    for file in Path(where).iterdir())
    else:
        found = find_adapter_config_file(where, revision=revision or "main") is not None
    if found:
        refuse(f"{name} holds an adapter (LoRA), which is not loaded: merge it into its model first")


def unused_ids(tokenizer: PreTrainedTokenizerFast, V: int) -> tuple[int, ...]:
    """Ids of a vocabulary of V that are no token of the tokenizer."""
    return tuple(sorted(set(range(V)) - set(tokenizer.get_vocab().values())))


def without_memory(config: PreTrainedConfig) -> PreTrainedModel:
    """The network of a config, on torch's meta device: its shapes and no numbers."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return STOCK[config.model_type][0](config)


def count(module: torch.nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in module.parameters())


def count_stored(folder: str) -> int:
    """The numbers in a folder's safetensors files, as their headers tell; 0 where there is no such file."""
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    return total


def check_finite(name: str, raw: dict):
    """Refuse a config.json with a number that JSON does not know, on which a network would quietly go on."""
    try:
        json.dumps(raw, allow_nan=False)
    except ValueError:
        refuse(f"{name} has NaN or Infinity in its config.json")


def check_layers(name: str, fields: dict):
    """Refuse more layers than any model has, before a network is built from the fields of a config.json."""
    layers = fields.get("num_hidden_layers")
    if type(layers) is int and layers > LAYERS:
        refuse(f"{name} has {layers} layers in its config.json; at most {LAYERS} can be loaded")


def check_stored(name: str, where: str, config: PreTrainedConfig):
    """Refuse a config whose network needs many more numbers than the files in the folder have. Where little
    is missing, check_weights says what."""
    network = without_memory(config)
    assert all(p.numel() for p in network.parameters()), "a network without weights"
    stored, needed = count_stored(where), count(network)
    if stored and needed > 2 * stored + 10**8:
        refuse(f"{name} has {stored:.1e} numbers in its files, the network of its config.json {needed:.1e}")


def raw_config(name: str, where: str, revision: str | None) -> dict:
    """config.json of a folder or hub id, as it is. Refuses an adapter, a pipe, and NaN."""
    refuse_adapter(name, where, revision)
    if found := pipes(Path(where)):
        refuse(f"{name} holds what is no file: {found[0]}")
    if Path(where).is_dir() and not Path(where, "config.json").exists():  # the folder around that of a model
        refuse(f"{name} has no config.json: a model is the folder that holds one, such as model/ of a run")
    raw, _ = PreTrainedConfig.get_config_dict(where, revision=revision or "main")
    check_finite(name, raw)
    return raw


def stock_config(name: str, kind: str, fields: dict) -> PreTrainedConfig:
    """The config of the stock class of that kind, bidirectional, from the fields of a config.json."""
    check_layers(name, fields)
    config = STOCK[kind][1].from_dict(fields)
    config.is_causal = config.use_cache = False
    return config


def read_config(name: str, revision: str | None) -> tuple[str, dict, PreTrainedConfig]:
    """(model_type, config.json as it is, config for the stock class). Refuses what is no such model."""
    hub_id = name.count("/") == 1 and name[0] not in "./~"
    if not Path(name).is_dir() and not hub_id:
        refuse(f"unknown model {name!r}: use 'tiny', a transformers folder, or a hub id such as "
               "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1")
    where = locate(name, revision)
    with refused(f"{name} cannot be loaded"):
        raw = raw_config(name, where, revision)
        kind = raw.get("model_type")
        if kind not in STOCK and kind not in KINDS:
            refuse(f"{name} is a {kind!r} model; the kinds that can be loaded are: "
                   f"{', '.join([*KINDS, *STOCK])}")
        stays_causal = kind in ("llama", "qwen2", "qwen3") and raw.get("is_causal") is not False
        if stays_causal or raw.get("is_causal"):
            refuse(f"{name} is a causal {kind!r} model, never trained to fill masks")
        if kind.startswith("a2d") and is_block_diffusion(name, raw, where):
            refuse(f"{name} is a block-diffusion model (BD3LM), never trained to see what follows a block")
        fields = {k: v for k, v in raw.items() if k not in NOT_OURS}
        if kind == "llada":
            beyond = [k for k, v in LLADA_FIXED.items() if raw.get(k, v) != v]
            if beyond:
                refuse(f"{name} is a LLaDA that is no Llama: {', '.join(f'{k} {raw[k]!r}' for k in beyond)}")
            fields = {ours: raw[theirs] for ours, theirs in LLADA_CONFIG.items()}
            fields["vocab_size"] = raw.get("embedding_size") or raw["vocab_size"]
        if KINDS.get(kind) in ("qwen2", "qwen3"):  # the hub's code has no window, whatever config.json says
            fields |= NO_WINDOW
        config = stock_config(name, KINDS.get(kind, kind), fields)
        config.logits_shift = raw.get("logits_shift", kind == "Dream")  # saved with the model
        assert type(config.logits_shift) is bool, f"logits_shift {config.logits_shift!r}"
        check_stored(name, where, config)
    return kind, raw, config


def read_ids(
    name: str, raw: dict, tokenizer: PreTrainedTokenizerBase, V: int, mask_id: int | None
) -> tuple[int, int, int, tuple[int, ...]]:
    """(mask_id, eos_id, pad_id, end_ids). A mask token is named in config.json, by the tokenizer, or by what
    everybody calls it; an explicit one is for a model without, or chooses. Refuses what cannot be right."""
    vocabulary = tokenizer.get_vocab()
    words, last = len(vocabulary.keys() - tokenizer.get_added_vocab()), max(vocabulary.values(), default=-1)
    if words < 2 or last >= V:
        refuse(f"{name} has a tokenizer of {words} ordinary tokens, ids up to {last}; its network has {V}")
    named = (raw.get("mask_token_id"), tokenizer.mask_token_id, *map(vocabulary.get, MASKS))
    masks = [i for i in named if i is not None] or [mask_id]
    if mask_id not in (None, *masks):
        refuse(f"--mask_id {mask_id} is not the mask token of {name}: that is {masks[0]}")
    mask = masks[0] if mask_id is None else mask_id
    if mask is None:
        refuse(f"{name} does not say which token is its mask: give its id with --mask_id")
    if type(mask) is not int or mask not in range(V):
        refuse(f"mask id {mask!r} is outside {name}'s vocabulary of {V}")
    eos = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None]  # ModernBERT: pad
    if not eos:
        refuse(f"{name} has no token that ends an answer; it has {tokenizer.special_tokens_map}")
    end_ids = tuple(dict.fromkeys([eos[0], *(vocabulary[t] for t in ENDS if t in vocabulary)]))
    if mask in end_ids:
        refuse(f"{name} has {mask} for its mask, a token that ends an answer")
    return mask, eos[0], eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id, end_ids


def load_model(
    name: str,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    mask_id: int | None = None,
    gradient_checkpointing: bool = False,
) -> Denoiser:
    """Load a transformers folder or a hub id, in fp32.

    revision: commit or branch on the hub. mask_id: for a checkpoint that does not name its mask token.
    Refuses (exit 2) what is no masked diffusion model, lacks a weight or has one too many, or is causal."""
    kind, raw, config = read_config(name, revision)
    where, hub = locate(name, revision), {"revision": revision or "main"}
    with refused(f"{name} cannot be loaded"):
        # Dream's own tokenizer class is remote code over Qwen2's files
        tokenizer_class = Qwen2Tokenizer if kind == "Dream" else PreTrainedTokenizerFast
        tokenizer = tokenizer_class.from_pretrained(where, **hub)
        ids = read_ids(name, raw, tokenizer, config.vocab_size, mask_id)
        if kind == "modernbert" and tokenizer.chat_template is None and "[CLS]" in tokenizer.get_vocab():
            tokenizer.chat_template = MODERNBERT_CHAT  # "tiny" has no words to chat with
        model = Denoiser(None, tokenizer, *ids, config.logits_shift)  # prompts first: weights take minutes
        check_prompts(name, model, reads_words="tiny_task" not in raw)
        network, report = STOCK[config.model_type][0].from_pretrained(
            where, config=config, key_mapping=LLADA_NAMES if kind == "llada" else None, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True, **hub)
        check_weights(name, network, report, locate(name, revision))
        model.excluded = unused_ids(tokenizer, config.vocab_size)
        model.network = network.eval().to(device)
        if not is_bidirectional(model):
            refuse(f"{name} is causal: a masked position does not see the tokens after it")
        model.bf16 = bf16_on_this_cpu(count(network))
    network.config.mask_token_id = ids[0]
    network.generation_config = GenerationConfig()  # theirs is for generate(), and Dream's cannot be saved
    tokenizer.init_kwargs.pop("auto_map", None)  # names a file that is not saved
    if gradient_checkpointing:
        checkpoint_layers(network)
    return model


def apart(work: Callable[[], list], seconds: int = 2, gib: int = 2) -> list | str:
    """What work() returns (of text, numbers and lists), made in a process of its own; a line that says what
    is wrong where it raises, or takes more processor time or memory than that.

    For templates and patterns that come with a checkpoint: nobody knows what they will take."""
    read, write = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # of threads, which do not exist in the child
        child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            if (statm := Path("/proc/self/statm")).exists():
                size = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + gib * 2**30
                resource.setrlimit(resource.RLIMIT_AS, (size, size))
            for timer, number, limit in ((signal.ITIMER_PROF, signal.SIGPROF, seconds),
                                         (signal.ITIMER_REAL, signal.SIGALRM, 20 * seconds)):
                signal.signal(number, signal.SIG_DFL)  # ends the process, in whatever code it is
                signal.setitimer(timer, limit)
            try:
                answer = work()
            except BaseException as error:  # of any kind: a template raises whatever it likes
                answer = one_line(error)
            with open(write, "w") as pipe:
                json.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0 and answer:
        return json.loads(answer)
    return f"it takes more than {seconds} seconds, or {gib} GiB of memory"


def check_prompts(name: str, model: Denoiser, reads_words: bool):
    """Refuses a chat template or a tokenizer that does not end, loses what it is given, or gives another
    prompt for the same message another day. reads_words: it is not the tokenizer of a tiny task."""
    tokenizer = model.tokenizer
    line = "what is (12 + 34) * 5 - 67 / 89 for the other one "
    signs = string.ascii_uppercase + string.punctuation + "\u00e9\u03b1\u2264\u5b57"
    # the last of 10,000 characters: loops multiply
    messages = ["one", "two", line, signs, line * 200] if reads_words else [""]

    def no_date():
        raise ValueError("it reads the date, so no run could be repeated: write a date in its place")

    def prompts() -> list[str]:
        if not tokenizer.chat_template:
            return messages
        chat_template_utils.datetime = SimpleNamespace(now=no_date)  # of this process, which is not the run's
        before = random.getstate()
        made = [chat_prompt(model, message) for message in messages]
        if random.getstate() != before or any(re.search(r" at 0x[0-9a-f]+>", text) for text in made):
            raise ValueError("it draws at random, or writes an address, so no run could be repeated")
        return made

    def squeezed(text: str) -> str:
        return "".join(unicodedata.normalize("NFKC", text).lower().split())

    made = apart(prompts)
    if isinstance(made, str):
        refuse(f"{name} has a chat template that cannot be used: {made}")
    ids = apart(lambda: [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in made]
                         for _ in range(2)])
    if isinstance(ids, str):
        refuse(f"{name} has a tokenizer that cannot be used: {ids}")
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None) or ids[0] != ids[1]:
        refuse(f"{name} has a tokenizer that draws at random (dropout), so no run could be repeated")
    if not all(squeezed(message) in squeezed(text) for message, text in zip(messages, made, strict=True)):
        refuse(f"{name} has a chat template that leaves the user's message out, or some of it")
    for message, row in zip(messages, ids[0], strict=True):
        if squeezed(message) not in squeezed(tokenizer.decode(row)):
            refuse(f"{name} has a tokenizer that loses text: {message[:60]!r} cannot be read from its tokens")


def check_weights(name: str, network: PreTrainedModel, report: dict, folder: str):
    """from_pretrained draws a missing matrix at random, and takes codes of int8 or fp8 for the weights."""
    files = sorted(Path(folder).glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                if (stored := tensors.get_slice(key).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                    refuse(f"{name} holds no weights but codes of a quantised model: {key} is {stored}")
    for file in [] if files else sorted(Path(folder).glob("pytorch_model*.bin")):
        for key, stored in torch.load(file, map_location="meta", weights_only=True).items():
            if not stored.is_floating_point() or stored.dtype.itemsize < 2:
                refuse(f"{name} holds no weights but codes of a quantised model: {key} is {stored.dtype}")
    wrong = {k: sorted(map(str, v))[:4] for k, v in report.items() if v}
    if wrong:
        refuse(f"{name} does not hold the weights of its config.json: {wrong}")
    for key, p in network.named_parameters():
        if not p.isfinite().all():
            refuse(f"{name} has NaN or inf among its weights, first in {key}")


def checkpoint_layers(network: PreTrainedModel):
    """Keep each layer's input alone and compute the layer again for backward."""
    with warnings.catch_warnings(action="ignore"):  # of a name newer versions change
        network.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for layer in network.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # asks for it; its submodules stay in eval mode: no dropout


@torch.no_grad()
def is_bidirectional(model: Denoiser) -> bool:
    """Does changing tokens move the predictions before them? (Measured: a causal mask fails silently.)

    Raises ValueError where that tells nothing: predictions are NaN, or do not move behind them either."""
    x = torch.full((2, 8), model.mask_id, device=model.device)
    x[1, 2:6] = model.eos_id
    z = model.head(model.body(x, None)[:, [1, -1]])  # made at positions 0 and 6 of a shifted network
    never = torch.tensor((model.mask_id, *model.excluded))
    if not z[..., ~torch.isin(torch.arange(model.V), never)].isfinite().all():
        raise ValueError("its predictions are NaN or inf")
    if torch.equal(*z[:, 1]):
        raise ValueError("its predictions are the same whatever the other tokens: is a matrix all zero?")
    return not torch.equal(*z[:, 0])


def save_model(model: Denoiser, folder: Path, weights: dict | None = None):
    """Write a transformers folder that load_model reads; only a complete new one replaces an old one.
    weights: of a sharded network, gathered."""
    folder = folder.resolve()  # of a link to another disk, what it points to is replaced
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)  # where a file is in the way, transformers would save nothing, without a word
    model.network.save_pretrained(
        fresh, state_dict=weights, save_original_format=False)  # else LLaDA's names, a Llama config
    model.tokenizer.save_pretrained(fresh)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a save that was killed
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# -------------------------------------------------------------------------------------- precision and memory

LARGE = 5e7  # parameters of a network that is worth bf16 on a CPU


def predict_memory(
    config: PreTrainedConfig, *, L: int, block: int, G: int, budget: int,
    gradient_checkpointing: bool, reference: bool, train: bool, bf16: bool, ranks: int = 0,
    S: int = 1, rows: int = 10**9,
) -> dict[str, float]:
    """Upper estimate of the peak of a device, in GiB by part, from arithmetic alone: nothing is loaded.

    Weights, gradients and Adam's two moments are fp32 (16 bytes per parameter). Activations: what one
    micro-batch of `budget` tokens keeps for backward, measured with saved_tensors_hooks: at most
    16 d + 8 f + 13 (q + 2 kv) bytes per token and layer in bf16 autocast, and the bf16 copies of the layers'
    weights; with gradient checkpointing one layer of that, and the fp32 input of each.

    Logits: the larger of what scoring and what a rollout takes, by the allocator's events. Scoring a chunk
    takes four copies of its logits and a gradient of the head, or two copies and three such gradients: where
    the head runs in two chunks or more, or is the embedding, too, autograd adds a new one to the sum of those
    before it, into a third. A rollout's block takes 36 bytes per row, place and id, and 8 more for each place
    that a step reveals. rows: most rows there are to denoise at once, whatever the budget.

    ranks: weights, gradients, moments and reference are sharded over so many. Gathered are then, in fp32,
    what is not in layers, with its gradient and the reference's, and two layers with their gradients (whose
    weights nothing keeps for backward). "layers" are those of a rollout that has all gathered; it has no
    gradients, so this is beside the sum."""
    network = without_memory(config)
    d, layers, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d // heads  # ModernBERT has neither
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    in_layers, N = count(network.model.layers), count(network)
    if config.tie_word_embeddings and config.model_type != "modernbert":
        N += V * d  # a hub file may hold both and untie them
    per_token = 16 * d + 8 * config.intermediate_size + 13 * (heads * head_dim + 2 * kv)
    kept = layers * budget * per_token * (1 if bf16 else 2) + (2 * in_layers if bf16 and not ranks else 0)
    if gradient_checkpointing:
        kept = kept / layers + 4 * d * budget * layers
    kept += 16 * d * budget  # the embeddings and the last norm
    denoised = min(rows, max(G, budget // (L + 1)))  # a prompt has a token at least
    rollout = (36 + 8 * min(1, L / S / block)) * denoised * block * V
    chunk, head = 4 * min(LOGITS, budget * V), 4 * V * d
    copies = 3 if config.tie_word_embeddings or budget * V > LOGITS else 1
    counted = 0 if not ranks else 1 if config.tie_word_embeddings else 2  # are in "gathered", below
    scoring = max(4 * chunk + max(0, 1 - counted) * head, 2 * chunk + max(0, copies - counted) * head)
    parts = {"weights": 4 * N, "gradients": 4 * N, "Adam": 8 * N, "reference": 4 * N * reference,
             "activations": kept, "logits": max(rollout, scoring)}
    if not train:
        parts = {"weights": 4 * N, "activations": budget * (per_token * (1 if bf16 else 2) + 16 * d),
                 "logits": rollout}
    if ranks:
        parts |= {k: parts[k] / ranks for k in ("weights", "gradients", "Adam", "reference") if k in parts}
        outside = 4 * (N - in_layers) * (1 + train + reference * train)
        parts["gathered"] = outside + 2 * (8 if train else 4) * in_layers / layers
        parts["layers"] = (2 if bf16 else 4) * in_layers
    return {k: v / 2**30 for k, v in parts.items()}


def reserve(parts: dict[str, float]) -> float:
    """GiB of a GPU to leave to others than tensors: a tenth of what comes and goes in ever new sizes, lost to
    fragments; half a GiB for the workspaces of cuBLAS and its like; one for the buffers of NCCL."""
    passing = parts.get("activations", 0) + parts["logits"]
    return 0.1 * passing + 0.5 + (parallel.world() > 1)


def plan(name: str, args, device: torch.device) -> tuple[bool, bool]:
    """Print what the run will take of memory, on each device, and of disk before anything is loaded; refuse
    what cannot fit. Returns whether to shard the weights over the ranks: if asked to, or if they do not fit
    otherwise; and whether, sharded, all layers fit at once during a rollout.

    Disk: two checkpoints of 12 bytes per parameter (the old one until the new one is whole), and model/."""
    _, _, config = read_config(name, args.revision)
    cuda = device.type == "cuda"
    bf16 = cuda or bf16_on_this_cpu(count(without_memory(config)))
    if bf16 and not cuda:
        print("matrix products in bf16, which this CPU has instructions for (AMX); weights and head in fp32")
    predict = partial(
        predict_memory, config, L=args.L, S=args.S, block=args.block, G=args.G,
        rows=max(args.prompts * args.G, args.eval_rows), budget=args.budget,
        gradient_checkpointing=args.gradient_checkpointing, train=not args.eval_only, bf16=bf16,
        reference=vars(args).get("beta", 0) > 0)  # wd1 has none
    if cuda:
        have = torch.cuda.mem_get_info(device)[0]
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // parallel.on_this_machine()
    have, parts = parallel.total(have, "min") / 2**30, predict()
    full, sharded, keep_whole = parts["weights"], args.shard, False
    if cuda:
        parts["reserve"] = reserve(parts)
    if parallel.world() > 1 and sum(parts.values()) > have:
        sharded = True
    if sharded:
        parts = predict(ranks=parallel.world())
        if cuda:
            parts["reserve"] = reserve(parts)
        layers = parts.pop("layers")
        in_updates = parts.get("gradients", 0) + parts.get("activations", 0)
        keep_whole = sum(parts.values()) - in_updates + layers <= have
    if "reserve" in parts:
        print(f"reserve: {parts['reserve']:.1f} GiB for what nobody can predict: fragments between tensors, "
              "workspaces of cuBLAS" + (" and buffers of NCCL" if parallel.world() > 1 else ""))
    need = sum(parts.values())
    listed = ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items() if gib >= 0.05)
    each = f" on each of {parallel.world()} devices" if parallel.world() > 1 else ""
    print(f"memory, predicted peak: {need:.1f} GiB of {have:.1f}{each} ({listed})", flush=True)
    if sharded:
        print("weights are sharded; in rollouts " + ("all are gathered once" if keep_whole else
                                                     "layer by layer, at every step"))
    if need > have:
        fixed = sum(gib for name, gib in parts.items() if name not in ("activations", "logits", "reference"))
        remedy = "lower --budget or --G, add --gradient_checkpointing, or set --beta 0 (no reference)"
        if fixed > have:
            remedy = ("no setting helps: choose a smaller model or a larger GPU, or more GPUs with torchrun "
                      "(plumbing/README.md has a table)")
        refuse(f"{args.model} needs {need:.1f} GiB and {device} has {have:.1f}; {remedy}")
    if not args.eval_only:
        out = Path(args.out).absolute()
        there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 2**30
        free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free / 2**30
        need = 7 * full - there
        if need >= 0.05:
            print(f"disk: checkpoints and model take up to {need:.1f} GiB in {args.out}, {free:.1f} are free")
        if need > free:
            refuse(f"{args.out} needs {need:.1f} GiB of disk and {free:.1f} are free: choose another --out")
    return sharded, keep_whole


def bf16_on_this_cpu(parameters: int) -> bool:
    """Are matrix products in bf16 worth their rounding for a network of so many parameters?

    Only with AMX. Measured without it, on a Xeon that has AVX512-BF16: 85 GFLOP/s in bf16, 157 in fp32. A
    small network gains nothing from either, and stays what it is on every CPU, bit for bit."""
    return parameters >= LARGE and torch.cpu._is_amx_tile_supported()  # private, but in 2.11 as in 2.13


def release_memory():
    """Give freed memory back to the system. glibc keeps it: batches of ever new sizes add up to gigabytes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
