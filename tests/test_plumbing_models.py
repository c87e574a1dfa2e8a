"""models.py on all six layouts: logits equal to a hand-written forward, ids, saving, templates, refusals.

Expected values come from checkpoints.py, which shares no code with models.py or with transformers' models."""

import copy
import dataclasses
import importlib
import itertools
import json
import os
import random
import re
import shutil
import time
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from checkpoints import DROP, LAYOUTS, reference_logits, write
from helpers import METHODS, launch, recording
from safetensors.torch import load_file
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, Qwen3Config,
                          Qwen3ForCausalLM)

import common
import gdsd
from plumbing import models
from plumbing.models import load_model

X = torch.randint(0, 250, (2, 22), generator=torch.Generator().manual_seed(0))
PAD = 9  # more than half a local window: some padded rows see nothing at all

# layout: mask, eos and pad token, further tokens that end an answer, shift, model_type once saved
FACTS = {
    "llada": ("<|mdm_mask|>", "<|endoftext|>", "<|endoftext|>", ["<|eot_id|>"], False, "llama"),
    "dream": ("<|mask|>", "<|endoftext|>", "<|endoftext|>", ["<|im_end|>"], True, "qwen2"),
    "a2d-qwen3": ("<|mask|>", "<|im_end|>", "<|endoftext|>", ["<|endoftext|>"], False, "qwen3"),
    "a2d-qwen2": ("<|mask|>", "<|im_end|>", "<|endoftext|>", ["<|endoftext|>"], False, "qwen2"),
    "a2d-llama": ("<|mask|>", "<|eot_id|>", "<|eot_id|>", [], False, "llama"),
    "modernbert": ("[MASK]", "[PAD]", "[PAD]", ["<|endoftext|>"], False, "modernbert"),
}
LLAMA3_PROMPT = ("<|start_header_id|>user<|end_header_id|>\n\ntext<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n")
CHATML_PROMPT = "<|im_start|>user\ntext<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {
    "llada": "<|startoftext|>" + LLAMA3_PROMPT,
    "dream": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML_PROMPT,
    "a2d-qwen3": CHATML_PROMPT + "<think>\n\n</think>\n\n",
    "a2d-qwen2": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
                 "<|im_end|>\n" + CHATML_PROMPT,
    "a2d-llama": "<|begin_of_text|>" + LLAMA3_PROMPT,
    "modernbert": "[Question]\ntext\n[/Question]\n\n[Answer]\n",
}


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request, tmp_path_factory):
    """A checkpoint, loaded, saved, loaded again, saved and loaded once more. Not to be changed."""
    layout, folder = request.param, tmp_path_factory.mktemp(request.param)
    written = write(layout, folder / "hub")
    model = load_model(str(folder / "hub"))
    models.save_model(model, folder / "saved")
    again = load_model(str(folder / "saved"))
    models.save_model(again, folder / "twice")
    twice = load_model(str(folder / "twice"))
    yield SimpleNamespace(layout=layout, folder=folder, written=written, model=model, again=again,
                          twice=twice)
    assert not list(folder.rglob("EXECUTED"))


@pytest.fixture(autouse=True)
def no_remote_code(monkeypatch, tmp_path):
    """In every test: no code of a checkpoint runs, and nobody is asked whether it may."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    assert not asked
    assert not list(tmp_path.rglob("EXECUTED"))


@torch.no_grad()
def logits(model, x=X, attn=None):
    return model.head(model.body(x, attn))


def expected(layout, written, x=X, pad_mask=None):
    """The reference, shifted the way load_model's models are (position 0 of a shifted one has no meaning)."""
    z = reference_logits(layout, written, x, pad_mask)
    return torch.cat([z[:, :1], z[:, :-1]], 1) if FACTS[layout][4] else z


def assert_same(z, want, model, tolerance=1e-4):
    """Logits (B, T, V) equal, except for the mask token and ids that are no tokens, which have -inf, and a
    shifted model's position 0."""
    start = int(model.shift)
    tokens = torch.tensor(list(model.tokenizer.get_vocab().values()))
    ids = torch.arange(z.shape[-1])
    keep = torch.isin(ids, tokens) & (ids != model.mask_id)
    assert (z[..., ~keep] == -torch.inf).all()
    assert z[..., keep].isfinite().all()
    z, want = (t[:, start:, keep].double() for t in (z, want))
    torch.testing.assert_close(z, want, rtol=tolerance, atol=tolerance)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not DROP}))


def edit_weights(folder, edit):
    """`edit` changes the dictionary of tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    checkpoints.write_weights(folder, tensors)


# ------------------------------------------------------------------------------------------------ the network


def test_logits_equal_the_hand_written_forward(case):
    z = logits(case.model)
    assert z.dtype == torch.float32
    want = expected(case.layout, case.written)
    assert_same(z, want, case.model)
    double = dataclasses.replace(case.model, network=copy.deepcopy(case.model.network).double())
    assert_same(logits(double), want, case.model, 1e-5)  # norms and RoPE compute in fp32 even here


WRONG = {  # a field and what it would be if it were dropped: its class's default
    "llada": {"rope_theta": 1e4, "rms_norm_eps": 1e-6},
    "dream": {"rope_theta": 1e4, "rms_norm_eps": 1e-6},
    "a2d-qwen3": {"rope_theta": 1e4, "rms_norm_eps": 1e-6},
    "a2d-qwen2": {"rope_theta": 1e4, "rms_norm_eps": 1e-6},
    "a2d-llama": {"rope_parameters": {"rope_theta": 1e4}, "rms_norm_eps": 1e-6},
    "modernbert": {"global_rope_theta": 160000.0, "local_rope_theta": 1e4, "local_attention": 128,
                   "global_attn_every_n_layers": 1, "norm_eps": 1e-5},
}


@pytest.mark.parametrize(("layout", "field"), [(k, field) for k in LAYOUTS for field in WRONG[k]])
def test_a_dropped_field_would_be_seen(layout, field, tmp_path):
    """Of the test above: it tells the right value of a field from the default."""
    written = write(layout, tmp_path)
    changed = written | {"config": written["config"] | {field: WRONG[layout][field]}}
    difference = reference_logits(layout, written, X) - reference_logits(layout, changed, X)
    assert difference.abs().max() > 0.01


def test_shift(case):
    """Dream's network predicts a position at the one before (load_model undoes it); the others in place."""
    z, plain = logits(case.model)[:, 1:], reference_logits(case.layout, case.written, X)
    here, before = ((z - want).abs().nan_to_num(posinf=0).max() for want in (plain[:, 1:], plain[:, :-1]))
    assert (here < 1e-3) == (case.layout != "dream")
    assert (before < 1e-3) == (case.layout == "dream")


def test_every_position_sees_every_other(case):
    """Of the loaded and of the saved model. Through local layers too: one layer is global."""
    other = X.clone()
    other[:, -1] = (X[:, -1] + 1) % 250
    first = int(case.model.shift)  # where the prediction from the first position is
    for model in (case.model, case.again):
        difference = logits(model, other)[:, first] - logits(model)[:, first]
        assert difference.nan_to_num().abs().amax(-1).min() > 0.01


def test_padding_changes_nothing(case):
    """Left-padded rows equal the same rows alone; a row without padding is not touched by its neighbour's."""
    model, T = case.model, X.shape[1]
    padded = torch.cat([torch.full((2, PAD), model.pad_id), X], 1)
    padded[1] = torch.cat([X[1], X[1, :PAD]])
    attn = torch.ones(2, PAD + T, dtype=torch.bool)
    attn[0, :PAD] = False
    z = logits(model, padded, attn)
    assert_same(z[:1, PAD:], logits(model)[:1], model, 1e-5)
    assert_same(z[1:], logits(model, padded[1:]), model, 1e-5)
    want = expected(case.layout, case.written, padded, attn)
    assert_same(z[:1, PAD:], want[:1, PAD:], model)
    assert_same(z[1:], want[1:], model)
    unmasked = (logits(model, padded)[0, PAD + 1 :] - z[0, PAD + 1 :]).nan_to_num().abs().max()
    assert unmasked > 0.01  # without the mask it would have


def test_parameters(case):
    """fp32 whatever the file's dtype, all trainable, eval mode."""
    tensors = load_file(case.folder / "hub" / "model.safetensors").values()
    assert {t.dtype for t in tensors} == {torch.float32 if case.layout == "modernbert" else torch.bfloat16}
    assert {p.dtype for p in case.model.network.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in case.model.network.parameters())
    assert not any(module.training for module in case.model.network.modules())


def test_tied_weights(case):
    """Equal matrices are one parameter, two different ones stay two, whatever config.json says; saved too."""
    for model in (case.model, case.twice):
        head = model.network.get_output_embeddings().weight
        embedding = model.network.get_input_embeddings().weight
        assert (head is embedding) == (case.layout in ("a2d-qwen3", "modernbert"))
        if case.layout == "a2d-qwen2":
            assert torch.equal(head, case.written["tensors"]["lm_head.weight"])
            assert not torch.equal(head, embedding)


@pytest.mark.parametrize(("layout", "tied"), [("a2d-qwen3", {}), ("llada", {"weight_tying": True})])
def test_a_tied_head_may_be_absent(layout, tied, tmp_path):
    written = write(layout, tmp_path, **tied)
    names = checkpoints.LLADA_NAMES if layout == "llada" else checkpoints.HF_NAMES
    edit_weights(tmp_path, lambda tensors: tensors.pop(names["head"]))
    written["tensors"][names["head"]] = written["tensors"][names["embed"]]
    model = load_model(str(tmp_path))
    assert model.network.lm_head.weight is model.network.model.embed_tokens.weight
    assert_same(logits(model), expected(layout, written), model)


WINDOWS = [{}, {"layer_types": ["full_attention", "sliding_attention"]}, {"layer_types": None}]


@pytest.mark.parametrize("layout", ["dream", "a2d-qwen3", "a2d-qwen2"])
@pytest.mark.parametrize("how", WINDOWS)
def test_no_window(layout, how, tmp_path):
    """The hub's modelling code of these lets every token see every other, whatever config.json says."""
    window = dict(use_sliding_window=True, sliding_window=2, max_window_layers=0)
    written = write(layout, tmp_path / "hub", **window, **how)
    model = load_model(str(tmp_path / "hub"))
    assert_same(logits(model), expected(layout, written), model)
    models.save_model(model, tmp_path / "saved")
    assert torch.equal(logits(load_model(str(tmp_path / "saved"))), logits(model))


def test_sharded_weights(tmp_path, capfd):
    written = write("llada", tmp_path, shards=2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    model = load_model(str(tmp_path))
    assert_same(logits(model), expected("llada", written), model)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(capfd, tmp_path)


# -------------------------------------------------------------------------------------------------------- ids


def test_special_ids(case):
    mask, eos, pad, ends, shift, _ = FACTS[case.layout]
    ids = case.written["ids"]
    for model in (case.model, case.again, case.twice):
        assert (model.mask_id, model.eos_id, model.pad_id) == (ids[mask], ids[eos], ids[pad])
        assert isinstance(model.end_ids, tuple)
        assert sorted(model.end_ids) == sorted(ids[token] for token in (eos, *ends))
        assert model.shift == shift


NO_MASK = {"added": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
           "special": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "unk_token": DROP}}
MASKS = [  # layout, how it is written, mask_id=, the id or token that counts
    ("a2d-qwen3", {"mask_token_id": 7}, None, 7),  # config.json before the tokenizer
    ("a2d-qwen3", {"mask_token_id": 0}, None, 0),  # 0 is an id like others
    ("a2d-qwen3", {"mask_token_id": None}, None, "<|mask|>"),
    ("a2d-qwen3", {"special": {"mask_token": "<|im_start|>"}}, None, "<|im_start|>"),  # its mask token next
    ("a2d-qwen2", {}, None, "<|mask|>"),  # then a token of that name
    ("llada", {"mask_token_id": DROP}, None, "<|mdm_mask|>"),
    ("llada", {}, 265, "<|mdm_mask|>"),  # an argument may repeat it
    ("a2d-qwen3", {"mask_token_id": 7}, 266, "<|mask|>"),  # or choose where the two disagree
    ("a2d-qwen2", NO_MASK, 9, 9),  # or say what nobody says
    ("a2d-qwen2", NO_MASK, 0, 0),
    ("a2d-qwen2", NO_MASK, 287, 287),  # a row of the matrices that is no token
]


@pytest.mark.parametrize(("layout", "how", "argument", "want"), MASKS)
def test_mask_id(layout, how, argument, want, tmp_path):
    """Where it comes from; it is the one that is excluded; it is kept by save_model."""
    written = write(layout, tmp_path / "hub", **how)
    model = load_model(str(tmp_path / "hub"), mask_id=argument)
    want = written["ids"].get(want, want)
    assert model.mask_id == want
    assert_same(logits(model), expected(layout, written), model)
    models.save_model(model, tmp_path / "saved")
    assert load_model(str(tmp_path / "saved")).mask_id == want


NO_MASKS = {
    "a2d-qwen2": NO_MASK,
    "dream": {"added": NO_MASK["added"], "mask_token_id": DROP,
              "special": NO_MASK["special"] | {"bos_token": DROP, "mask_token": DROP}},
    "modernbert": {"added": ["[UNK]", "[CLS]", "[SEP]", "[PAD]"], "special": {"mask_token": DROP}},
}


@pytest.mark.parametrize("layout", NO_MASKS)
def test_no_mask_token_anywhere(layout, tmp_path, capfd):
    """The token for unknown words is not the mask: [UNK], or Qwen2Tokenizer's default, <|endoftext|>."""
    write(layout, tmp_path, **NO_MASKS[layout])
    assert "--mask_id" in refused(capfd, tmp_path)


def test_only_tokens_of_the_tokenizer_are_sampled(case):
    """The network has more rows than the tokenizer has tokens, the random weights prefer no id to another."""
    for model in (case.model, case.twice):
        tokens = set(model.tokenizer.get_vocab().values())
        assert set(model.excluded) == set(range(model.V)) - tokens and model.excluded
        prompt = X[:1].expand(8, -1)
        roll = common.denoise(
            model, prompt, prompt >= 0, [common.generator("cpu", 0)], L=64, S=64, block=64, guess="sampled")
        for found in (roll.completion, roll.guess):
            assert set(found.unique().tolist()) <= tokens - {model.mask_id}
        assert roll.logp.isfinite().all() and roll.entropy.isfinite().all()


def test_a_hole_in_the_vocabulary_is_not_sampled(tmp_path):
    """Ids that are no token may also lie between two tokens."""
    write("a2d-llama", tmp_path)
    file = tmp_path / "tokenizer.json"
    kept = json.loads(file.read_text())
    kept["model"]["vocab"]["ĊĊ"], hole = 280, kept["model"]["vocab"]["ĊĊ"]
    file.write_text(json.dumps(kept))
    model = load_model(str(tmp_path))
    assert hole in model.excluded and 280 not in model.excluded and 281 in model.excluded
    assert_same(logits(model), logits(model).nan_to_num(neginf=0), model)


def test_gradients_beside_excluded_ids_are_finite(case):
    """Through log_prob and GDSD's centred logit; what is excluded gets none."""
    model = case.model
    z = model.head(model.body(X, None)).flatten(0, 1)
    z.retain_grad()
    at, token = torch.arange(len(z)), X.flatten()
    (common.log_prob(z, at, token) + gdsd.centred_logit(z, at, token)).sum().backward()
    model.network.zero_grad()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
    assert not z.grad[:, [model.mask_id, *model.excluded]].any()


def test_end_of_an_answer_as_a_single_token(tmp_path):
    """[/Answer]; and a tokenizer whose eos is its padding, as dllm's training saves it."""
    added = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[/Answer]"]
    ids = write("modernbert", tmp_path, added=added, special={"eos_token": "[PAD]"})["ids"]
    model = load_model(str(tmp_path))
    assert model.eos_id == model.pad_id == ids["[PAD]"]
    assert sorted(model.end_ids) == sorted([ids["[PAD]"], ids["[/Answer]"]])


# ----------------------------------------------------------------------------------------------------- saving


def test_saved_and_loaded_again_it_is_the_same_model(case):
    """Bit for bit, padded and not, after one and two round trips."""
    attn = torch.ones_like(X, dtype=torch.bool)
    attn[0, :PAD] = False
    for mask in (None, attn):
        z = logits(case.model, X, mask)
        assert torch.equal(logits(case.again, X, mask), z)
        assert torch.equal(logits(case.twice, X, mask), z)


def test_saved_files(case):
    """An ordinary transformers folder: stock model_type and names, no remote code; decoders not causal."""
    for name in ("saved", "twice"):
        config = json.loads((case.folder / name / "config.json").read_text())
        assert config["model_type"] == FACTS[case.layout][5]
        if case.layout != "modernbert":
            assert config["is_causal"] is False
        for file in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((case.folder / name / file).read_text())
        assert not list((case.folder / name).glob("*.py"))
        stored = load_file(case.folder / name / "model.safetensors").keys()
        head = case.model.network.get_output_embeddings().weight
        names = set(case.model.network.state_dict())
        if head is case.model.network.get_input_embeddings().weight:
            names -= {"lm_head.weight", "decoder.weight"}
        assert set(stored) == names
        assert not any("transformer" in key for key in stored)  # LLaDA's names


def test_saved_folder_in_plain_transformers(case):
    auto = AutoModelForMaskedLM if case.layout == "modernbert" else AutoModelForCausalLM
    network = auto.from_pretrained(case.folder / "saved").eval()
    with torch.no_grad():
        z = network(X).logits
        assert torch.equal(z, case.model.network(X).logits)
    want = reference_logits(case.layout, case.written, X)
    torch.testing.assert_close(z.double(), want, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(case.folder / "saved")
    text = PROMPTS[case.layout] + "the other 31"
    ids = case.model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    if case.layout != "modernbert":  # what a loader that drops the field would get
        config = AutoConfig.from_pretrained(case.folder / "saved")
        config.is_causal = True
        with torch.no_grad():
            causal = auto.from_pretrained(case.folder / "saved", config=config).eval()(X).logits
        assert (causal - z)[:, 0].abs().max() > 0.1


# ------------------------------------------------------------------------------------------- text and prompts


def test_chat_prompt(case):
    """Of the loaded and the saved model; LLaDA's header once, though its template ignores the question."""
    for model in (case.model, case.again, case.twice):
        assert common.chat_prompt(model, "text") == PROMPTS[case.layout]


def test_a_template_in_the_folder_counts(tmp_path):
    write("modernbert", tmp_path, special={"chat_template": "{{ messages[0].content }}!"})
    assert common.chat_prompt(load_model(str(tmp_path)), "text") == "text!"


def test_prompts_become_ids(case):
    """Each special token of the prompt is one id, none is added, and the ids spell the prompt."""
    prompt, ids = PROMPTS[case.layout], case.written["ids"]
    special = [ids[token] for token in re.findall(r"<\|\w+\|>|</?think>", prompt)]
    for model in (case.model, case.again):
        tokens, mask = common.encode(model, ["text"])
        assert mask.all()
        assert tokens[tokens >= case.written["base"]].tolist() == special
        assert model.tokenizer.decode(tokens[0]) == prompt


def test_special_tokens_are_not_part_of_an_answer(case):
    text = "the other 31\n\nthere"
    for model in (case.model, case.again):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert max(ids) < case.written["base"] and len(ids) < len(text)  # merged: "he", "er", " the"
        ids += [*model.end_ids, model.mask_id, model.pad_id]
        assert model.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_special_token_stays_in_the_text_of_an_answer(case):
    """All but the end: left out, it would join what stands before and behind it."""
    task = SimpleNamespace(reward=lambda text, row: (0.0, {}), parallel=False)
    for model in (case.model, case.again):
        one, eight = model.tokenizer("18", add_special_tokens=False)["input_ids"]
        others = set(case.written["ids"].values()) - {*model.end_ids, model.mask_id}
        rows = torch.tensor([[one, other, eight, end, one] for other in others for end in model.end_ids])
        texts = common.reward_rows(model, task, rows, [{}] * len(rows))[2]
        tokens = [model.tokenizer.convert_ids_to_tokens(other) for other in others for _ in model.end_ids]
        assert texts == [f"1{token}8" for token in tokens]


# ------------------------------------------------------------------------------------------ bf16 on a CPU


@pytest.mark.parametrize("amx, parameters, on",
                         [(True, 5e7, True), (True, 4.9e7, False), (False, 1e9, False)])
def test_bf16_where_a_cpu_gains_by_it(amx, parameters, on, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert models.bf16_on_this_cpu(parameters) == on


@pytest.mark.parametrize("layout", ["a2d-qwen3", "dream", "modernbert"])
def test_recorded_and_scored_log_probs_agree_in_bf16(layout, tmp_path, monkeypatch):
    """Scored all together, and each row alone and behind padding.

    Measured on a CPU with AVX512-BF16: 1e-6 nats apart at most, both ways. From the same rows in fp32 it is
    0.06 at most and 0.01 on average, of networks as sharp as these."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    write(layout, tmp_path)
    assert not load_model(str(tmp_path)).bf16  # it is small
    monkeypatch.setattr(models, "LARGE", 0)
    model = load_model(str(tmp_path))
    assert model.bf16 and model.frozen().bf16
    prompt = torch.cat([torch.full((16, PAD), model.pad_id), X.repeat_interleave(8, 0)], 1)
    real = torch.arange(prompt.shape[1]).expand_as(prompt) >= PAD

    def scored(model, rows):
        """Log-probs of these rows of the rollout, step by step: (R, L)."""
        some, total = roll[rows], 0
        for s in range(8):
            x = common.canvas(some, some.revealed_at >= s)
            shown = some.revealed_at == s
            total = total + common.score(model, x, some.prompt_mask, some.completion, shown, 1.0)
        return total

    gens = [common.generator("cpu", i) for i in range(2)]
    roll = common.denoise(model, prompt, real, gens, L=32, S=8, block=32)
    together = scored(model, slice(None))
    alone = torch.cat([scored(model, slice(i, i + 1)) for i in range(16)])
    assert together.requires_grad and together.dtype == torch.float32
    assert (together - roll.logp).abs().max() < 1e-3
    assert (alone - roll.logp).abs().max() < 0.1
    rounded = (scored(dataclasses.replace(model, bf16=False), slice(None)) - roll.logp).abs()
    assert 1e-3 < rounded.mean() < 0.1  # bf16 was on, and is no more than a rounding


# ------------------------------------------------------------------------------------- gradient checkpointing

DROPOUT = {"llada": ["attention", "residual", "embedding"], "modernbert": ["attention", "mlp", "embedding"]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing(layout, tmp_path):
    """Same gradients, each layer computed twice; and still no dropout, though config.json has some."""
    names = [f"{part}_dropout" for part in DROPOUT.get(layout, ["attention"])]
    written = write(layout, tmp_path, **dict.fromkeys(names, 0.5))
    grads, counts = [], []
    for checkpointing in (False, True):
        model = load_model(str(tmp_path), gradient_checkpointing=checkpointing)
        count = [0, 0]
        for i, layer in enumerate(model.network.model.layers):  # pre: a recomputation may end in the mlp
            layer.mlp.register_forward_pre_hook(lambda *_, i=i, n=count: n.__setitem__(i, n[i] + 1))
        assert not model.network.training
        z = model.head(model.body(X, None))
        assert_same(z.detach(), expected(layout, written), model)
        z.logsumexp(-1).mean().backward()
        grads.append({k: p.grad for k, p in model.network.named_parameters()})
        counts.append(list(count))
        assert torch.equal(logits(model), z.detach())  # without gradients: nothing is computed twice
        assert count == [counts[-1][0] + 1, counts[-1][1] + 1]
    assert counts == [[1, 1], [2, 2]]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-6)


def test_checkpointed_layers_keep_no_random_state(tmp_path, monkeypatch):
    """Nothing in them is random. Kept, it would be copied from the GPU and wait for it, in every layer."""
    asked = []
    write("dream", tmp_path)
    model = load_model(str(tmp_path), gradient_checkpointing=True)
    state = torch.get_rng_state()
    monkeypatch.setattr(torch, "get_rng_state", lambda: asked.append(0) or state)
    model.body(X, None).sum().backward()
    assert not asked


# ------------------------------------------------------------------------------------------- hub and refusals


def test_revision(tmp_path, monkeypatch):
    """Config, tokenizer and weights are those of the revision. A hub cache on disk, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, written = tmp_path / "models--somebody--dream", {}
    (repo / "refs").mkdir(parents=True)
    for ref, letter, special in (("main", "a", {}), ("other", "b", {"eos_token": "<|im_end|>"})):
        (repo / "refs" / ref).write_text(40 * letter)
        written[ref] = write("dream", repo / "snapshots" / (40 * letter), seed=ord(letter), special=special,
                             mask_token_id=ord(letter))
    for revision, ref in ((None, "main"), ("main", "main"), ("other", "other"), (40 * "b", "other")):
        model = load_model("somebody/dream", revision=revision)
        assert model.mask_id == written[ref]["config"]["mask_token_id"]
        assert model.eos_id == written[ref]["ids"]["<|im_end|>" if ref == "other" else "<|endoftext|>"]
        assert_same(logits(model), expected("dream", written[ref]), model)


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach a host, which fails at once."""
    attempts = []

    def fail(*address, **_):
        attempts.append(address)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    monkeypatch.setattr("socket.create_connection", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return attempts


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("layout", ["llada", "dream", "a2d-qwen3"])
def test_a_cached_model_needs_no_network(layout, shards, tmp_path, monkeypatch, no_network):
    """Nothing is asked, or it would be asked again and again for minutes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--somebody--model", 40 * "c"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    written = write(layout, repo / "snapshots" / commit, shards=shards)
    models.read_config("somebody/model", None)
    for revision in (None, "main", commit):
        model = load_model("somebody/model", revision=revision)
        assert_same(logits(model), expected(layout, written), model)
    assert not no_network
    assert models.locate("somebody/model", "other") == "somebody/model"
    next((repo / "snapshots" / commit).glob("*.safetensors")).unlink()  # a download that was interrupted
    assert models.locate("somebody/model", None) == "somebody/model"


def refused(capfd, name, **arguments) -> str:
    """The line with which load_model refuses, less the name; nothing else is printed, exit status 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        load_model(str(name), **arguments)
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert out == ""
    assert str(name) in err
    return err.replace(str(name), "")


REFUSED = {  # how it is written, and what the line must name
    "plain Qwen3": ("a2d-qwen3", {"model_type": "qwen3", "auto_map": DROP}, "qwen3"),
    "plain Qwen2": ("a2d-qwen2", {"model_type": "qwen2", "auto_map": DROP}, "qwen2"),
    "plain Llama": ("a2d-llama", {"model_type": "llama"}, "llama"),
    "causal": ("a2d-qwen3", {"model_type": "qwen3", "auto_map": DROP, "is_causal": True}, "causal"),
    "perhaps causal": ("a2d-qwen3", {"model_type": "qwen3", "auto_map": DROP, "is_causal": None}, "qwen3"),
    "causal ModernBERT": ("modernbert", {"is_causal": True}, "causal"),
    "unknown type": ("a2d-llama", {"model_type": "gpt2"}, "gpt2"),
    "foreign type": ("dream", {"model_type": "sdar"}, "sdar"),
    "no type": ("a2d-llama", {"model_type": DROP}, "a2d-qwen3"),  # it lists what there is
    "mask outside": ("llada", {"mask_token_id": 320}, "320"),
    "mask negative": ("llada", {"mask_token_id": -1}, "-1"),
    "alibi": ("llada", {"alibi": True, "rope": False}, "alibi"),
    "no rope": ("llada", {"rope": False}, "rope"),
    "scaled logits": ("llada", {"scale_logits": True}, "scale_logits"),
    "input norm": ("llada", {"input_emb_norm": True}, "input_emb_norm"),
    "another activation": ("llada", {"activation_type": "gelu"}, "activation_type"),
    "another norm": ("llada", {"layer_norm_type": "default"}, "layer_norm_type"),
    "fewer layers": ("a2d-llama", {"num_hidden_layers": 1}, "layers.1."),
    "more layers": ("llada", {"n_layers": 3}, "layers.2."),
    "more rows": ("dream", {"vocab_size": 400}, "embed_tokens"),
    "text for a number": ("dream", {"hidden_size": "64"}, "hidden_size"),
    "text in LLaDA": ("llada", {"rope_theta": "500000"}, ""),
    "a list of layers": ("a2d-qwen3", {"num_hidden_layers": [2]}, "num_hidden_layers"),
    "null": ("a2d-llama", {"intermediate_size": None}, "intermediate_size"),
    "null in LLaDA": ("llada", {"n_layers": None}, "num_hidden_layers"),
    "a fraction": ("modernbert", {"num_attention_heads": 1.5}, "num_attention_heads"),
    "a negative size": ("modernbert", {"vocab_size": -1}, ""),
    "a width of 0": ("dream", {"intermediate_size": 0}, "without weights"),
    "heads that do not divide": ("a2d-qwen2", {"num_key_value_heads": 3}, ""),
    "no such activation": ("dream", {"hidden_act": "wat"}, "wat"),
    "no such RoPE": ("dream", {"rope_scaling": {"rope_type": "wat"}}, "wat"),
    "RoPE list": ("dream", {"rope_scaling": [1]}, "rope_parameters"),
    "no such dtype": ("modernbert", {"torch_dtype": [2]}, ""),
    "eps NaN": ("dream", {"rms_norm_eps": float("nan")}, "NaN"),
    "type is a list": ("a2d-llama", {"model_type": ["llama"]}, ""),
    "RoPE of infinity": ("dream", {"rope_theta": float("inf")}, "Infinity"),
    "shift is a number": ("a2d-llama", {"logits_shift": 2}, "logits_shift"),
    "mask is text": ("dream", {"mask_token_id": "5"}, "'5'"),
    "mask is true": ("dream", {"mask_token_id": True}, "True"),
    "mask is a fraction": ("dream", {"mask_token_id": 5.0}, "5.0"),
    "mask ends the answer": ("dream", {"mask_token_id": 261}, "261"),
    "BD3LM once": ("a2d-qwen3", {"_name_or_path": "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"}, "block"),
    "BD3LM class": ("a2d-qwen2", {"architectures": ["A2DQwen2BD3LM"]}, "block"),
    "blocks": ("a2d-llama", {"block_size": 32}, "block"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_config(what, tmp_path, capfd):
    """The files are right but for config.json."""
    layout, changes, needle = REFUSED[what]
    write(layout, tmp_path)
    edit_config(tmp_path, **changes)
    assert needle in refused(capfd, tmp_path)


WIDTHS = {"llada": "d_model", **dict.fromkeys(LAYOUTS[1:], "hidden_size")}
MIDDLES = {"llada": "mlp_hidden_size", **dict.fromkeys(LAYOUTS[1:], "intermediate_size")}
DEPTHS = {"llada": "n_layers", **dict.fromkeys(LAYOUTS[1:], "num_hidden_layers")}
WORDS = {"llada": "embedding_size", **dict.fromkeys(LAYOUTS[1:], "vocab_size")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names, value", [
    (DEPTHS, 10**4), (DEPTHS, 10**6), (DEPTHS, 10**12), (DEPTHS, 10**30), (WIDTHS, 64 * 10**6),
    (WIDTHS, 64 * 10**9), (MIDDLES, 10**9), (MIDDLES, 10**15), (WORDS, 10**8), (WORDS, 10**12),
    (WORDS, 10**20),
])
def test_a_network_far_larger_than_its_files_is_refused_at_once(layout, names, value, tmp_path, capfd):
    """Nothing of that size is made, nor counted one by one; with the files, and as from a hub without."""
    write(layout, tmp_path)
    edit_config(tmp_path, **{names[layout]: value, "layer_types": None})
    begun = time.process_time()
    assert re.search("layers in its config|numbers in its files|cannot be loaded", refused(capfd, tmp_path))
    (tmp_path / "model.safetensors").unlink()
    args = SimpleNamespace(revision=None, L=16, block=16, G=2, prompts=2, eval_rows=4, budget=64, model="it",
                           S=4, gradient_checkpointing=False, eval_only=False, shard=False,
                           out=str(tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        models.plan(str(tmp_path), args, torch.device("cpu"))
    assert stop.value.code == 2 and capfd.readouterr().err.count("\n") == 1
    assert time.process_time() - begun < 3


@pytest.mark.parametrize("layout", ["a2d-llama", "dream", "modernbert"])
def test_labels_of_a_classifier_are_not_ours(layout, tmp_path):
    """Of their number transformers would make a list, for hours and in all memory."""
    write(layout, tmp_path, num_labels=10**12)
    load_model(str(tmp_path))


def test_a_pipe_in_the_place_of_weights_is_refused(tmp_path, capfd):
    write("a2d-llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "no file" in refused(capfd, tmp_path)


def test_as_many_layers_as_any_model_has(tmp_path, capfd):
    """A thousand are counted: it is the weights that lack."""
    write("a2d-llama", tmp_path)
    edit_config(tmp_path, num_hidden_layers=300)
    assert "missing_keys" in refused(capfd, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin",
                                  "adapters.safetensors", "pytorch_lora_weights.safetensors",
                                  "ADAPTER_CONFIG.JSON", "lora.pt"])
@pytest.mark.parametrize("alone", [True, False])
def test_refused_adapter(layout, file, alone, tmp_path, capfd):
    """Beside the weights of the whole model it would be left out without a word."""
    write(layout, tmp_path)
    (tmp_path / file).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/model"}))
    if alone:
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "config.json").unlink()
    assert "merge it" in refused(capfd, tmp_path)


def test_refused_adapter_of_the_hub(tmp_path, monkeypatch, capfd):
    """In a cache, offline: with the weights of a model that is whole, and alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("whole", "alone"):
        repo, commit = tmp_path / f"models--somebody--{name}", 40 * "c"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        folder = repo / "snapshots" / commit
        write("dream", folder)
        (folder / "adapter_config.json").write_text("{}")
        if name == "alone":
            (folder / "model.safetensors").unlink()
            (folder / "config.json").unlink()
        assert "merge it" in refused(capfd, f"somebody/{name}")


@pytest.mark.parametrize("layout", ["llada", "a2d-qwen2"])
@pytest.mark.parametrize("mask_id", [320, -1, 10**6])
def test_refused_mask_argument(layout, mask_id, tmp_path, capfd):
    write(layout, tmp_path, **NO_MASK if layout == "a2d-qwen2" else {})
    assert str(mask_id) in refused(capfd, tmp_path, mask_id=mask_id)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_argument_does_not_contradict(layout, tmp_path, capfd):
    """An id of a letter, of the end of an answer, and of another special token."""
    ids = write(layout, tmp_path)["ids"]
    for mask_id in (4, ids[FACTS[layout][1]], min(ids.values())):
        assert f"{ids[FACTS[layout][0]]}" in refused(capfd, tmp_path, mask_id=mask_id)


@pytest.mark.parametrize("name", ["Qwen3-0.6B-diffusion-bd3lm-v0.1", "BD3LM", "checkpoint-final",
                                  "models--dllm-hub--Qwen3-0.6B-diffusion-bd3lm-v0.1/snapshots/" + 40 * "a"])
def test_refused_block_diffusion(name, tmp_path, capfd):
    """dllm's layout of MDLM and BD3LM is the same: the name tells, or the arguments its trainer saves."""
    write("a2d-qwen3", tmp_path / name)
    if name == "checkpoint-final":
        load_model(str(tmp_path / name))
        torch.save(SimpleNamespace(block_size=32), tmp_path / name / "training_args.bin")
    assert "block" in refused(capfd, tmp_path / name)


def test_a_name_on_the_way_is_no_sign(tmp_path):
    write("a2d-qwen3", tmp_path / "bd3lm" / "mdlm")
    torch.save(SimpleNamespace(learning_rate=1.0), tmp_path / "bd3lm" / "mdlm" / "training_args.bin")
    load_model(str(tmp_path / "bd3lm" / "mdlm"))
    write("dream", tmp_path / "not-bd3lm")
    load_model(str(tmp_path / "not-bd3lm"))


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1000])


def every(function):
    return lambda tensors: tensors.update({k: function(v.float()) for k, v in tensors.items()})


def fill(key, value):
    """One number of one tensor: the last."""
    def edit(tensors):
        tensors[key] = tensors[key].double()
        tensors[key].view(-1)[-1] = value
    return edit


QUANTISED = {"int8": torch.int8, "uint8": torch.uint8, "fp8": torch.float8_e4m3fn, "bool": torch.bool}
DAMAGE = {
    "NaN": ("dream", fill("model.layers.1.mlp.up_proj.weight", torch.nan), "layers.1.mlp.up_proj.weight"),
    "inf": ("llada", fill("model.transformer.ff_out.weight", torch.inf), "lm_head.weight"),
    "-inf": ("a2d-qwen3", fill("model.layers.0.self_attn.q_norm.weight", -torch.inf), "q_norm"),
    "NaN in a bias": ("modernbert", fill("decoder.bias", torch.nan), "decoder.bias"),
    "inf once fp32": ("dream", fill("model.norm.weight", 1e300), "model.norm.weight"),
    "overflow": ("dream", lambda t: t["lm_head.weight"].sign_().mul_(3e38), "NaN or inf"),
    "overflow everywhere": ("dream", every(lambda v: v * 1e30), "its predictions are"),  # of a norm: NaN or 0
    "all NaN": ("a2d-llama", every(lambda v: v * torch.nan), "NaN or inf"),
    "one matrix of zeros": ("dream", lambda t: t["lm_head.weight"].zero_(), "zero"),
    "no embeddings": ("a2d-llama", lambda t: t["model.embed_tokens.weight"].zero_(), "zero"),
    **{f"zeros, {layout}": (layout, every(torch.zeros_like), "zero") for layout in LAYOUTS},
    **{what: ("dream", every(lambda v, t=t: (40 * v).clamp(0, 127).to(t)), "quantised")
       for what, t in QUANTISED.items()},
    "one in int8": ("llada", lambda t: t.update({"model.transformer.ln_f.weight": torch.ones(64).char()}),
                    "ln_f.weight is I8"),
    "missing key": ("llada", lambda t: t.pop("model.transformer.blocks.1.up_proj.weight"), "up_proj"),
    "missing head": ("dream", lambda t: t.pop("lm_head.weight"), "lm_head"),
    "missing bias": ("a2d-qwen2", lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"), "k_proj"),
    "missing head norm": ("modernbert", lambda t: t.pop("head.norm.weight"), "head.norm"),
    "unexpected key": ("a2d-qwen3", lambda t: t.update(extra=torch.ones(2)), "extra"),
    "unexpected in LLaDA": ("llada", lambda t: t.update({"model.transformer.wpe.weight": X[0]}), "wpe"),
    "wrong shape": ("dream", lambda t: t.update({"model.norm.weight": torch.ones(32)}), "model.norm"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_refused_weights(what, tmp_path, capfd):
    """Anything else would leave random weights, with no more than a line in a log."""
    layout, edit, needle = DAMAGE[what]
    write(layout, tmp_path)
    edit_weights(tmp_path, edit)
    assert needle in refused(capfd, tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_refused_quantised(method, tmp_path, capfd):
    """With the field and the tensors of such a checkpoint. (transformers asks to install something first.)"""
    write("dream", tmp_path, quantization_config={"quant_method": method, "bits": 4, "load_in_8bit": True})
    load_model(str(tmp_path))  # a field alone does nothing: these weights are weights
    name = "model.layers.0.mlp.up_proj."
    edit_weights(tmp_path, lambda t: t.update({name + "qweight": t.pop(name + "weight").to(torch.int32)}))
    assert "quantised" in refused(capfd, tmp_path)


@pytest.mark.parametrize("kind", [torch.float16, torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_safetensors(kind, tmp_path, capfd):
    """What torch.save wrote; codes among it would be taken for weights there as well."""
    written = write("a2d-llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({k: v.float().mul(8).to(kind) if k.endswith("up_proj.weight") and kind != torch.float16 else v
                for k, v in tensors.items()}, tmp_path / "pytorch_model.bin")
    if kind == torch.float16:
        model = load_model(str(tmp_path))
        assert_same(logits(model), expected("a2d-llama", written), model)
    else:
        assert "quantised" in refused(capfd, tmp_path)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_attention_is_ours(field, tmp_path):
    """Not that of the machine where a model was trained, which this one may lack."""
    write("dream", tmp_path)
    before = logits(load_model(str(tmp_path)))
    edit_config(tmp_path, **{field: "flash_attention_2"})
    assert torch.equal(logits(load_model(str(tmp_path))), before)


def test_a_folder_around_a_model_is_told(tmp_path, capfd):
    """A run's folder, one of several checkpoints, one of a cache; and an empty one."""
    for inner in ("model", "checkpoint-100", "snapshots/" + 40 * "a", ""):
        outer = tmp_path / f"outer-{len(inner)}"
        outer.mkdir()
        if inner:
            write("dream", outer / inner)
        assert "has no config.json" in refused(capfd, outer)


def test_refused_names_of_another_layout(tmp_path, capfd):
    """LLaDA's tensors beside a Llama config, which is what an ordinary save_pretrained leaves behind."""
    write("a2d-llama", tmp_path)
    tensors = write("llada", tmp_path / "llada")["tensors"]
    checkpoints.write_weights(tmp_path, tensors)
    refused(capfd, tmp_path)
    edit_config(tmp_path, model_type="llama", is_causal=False)
    refused(capfd, tmp_path)


def tokenizer_config(**changes):
    def edit(folder):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return edit


PROMPTS_BROKEN = {
    "template raises": ("dream", {"chat_template": "{{ raise_exception('no user') }}"}, "no user"),
    "template does not parse": ("dream", {"chat_template": "{% for m in messages %}"}, "endfor"),
    "template of another form": ("dream", {"chat_template": "{{ messages[0].parts[0].text }}"}, "parts"),
    "template is a number": ("dream", {"chat_template": 5}, "TypeError"),
    "template for tools alone": ("dream", {"chat_template": [{"name": "tools", "template": ""}]}, "default"),
    "template without end": ("llada", {"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"},
                             "recursion"),
    "template without the message": ("llada", {"chat_template": "Answer:"}, "message"),
    "a length that is text": ("a2d-llama", {"model_max_length": "long"}, "TypeError"),
    "an end that is a number": ("a2d-llama", {"eos_token": 5}, "eos_token"),
    "tokens the network lacks": ("a2d-llama", {"additional_special_tokens": [f"<{i}>" for i in range(60)]},
                                 "288"),
}


@pytest.mark.parametrize("what", PROMPTS_BROKEN)
def test_refused_tokenizer(what, tmp_path, capfd):
    """Before the weights are looked for: they may be large."""
    layout, changes, needle = PROMPTS_BROKEN[what]
    write(layout, tmp_path)
    tokenizer_config(**changes)(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert needle in refused(capfd, tmp_path)


CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = {  # each writes the message, too; and what the line must name
    "nested loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                     "seconds"),
    "a loop over pairs of letters": ("{% set m = messages[0].content %}"
                                     "{% for a in m %}{% for b in m %}{% endfor %}{% endfor %}", "seconds"),
    "a number without end": ("{{ (10 ** (10 ** 9)) % 7 }}", "seconds"),
    "a text without end": ("{{ ('x' * 10 ** 11) | length }}", "MemoryError"),
    "a list without end": ("{{ ([0] * 10 ** 11) | length }}", "MemoryError"),
    "the date": ("{{ strftime_now('%d %b %Y') }}", "date"),
    "the date, if there is none": ("{% if not date_string is defined %}{% if strftime_now is defined %}"
                                   "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
                                   "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
                                   "{{ date_string }}", "date"),
    "the hour": ("{% if strftime_now('%H') | int < 12 %}Good morning.{% endif %}", "date"),
    "a random word": ("{{ ['yes', 'no'] | random }}", "random"),
    "mostly the same word": ("{{ (['yes'] * 10000 + ['no']) | random }}", "random"),
    "random text": ("{{ lipsum(1) }}", "random"),
    "an address": ("{{ raise_exception }}", "address"),
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_refused_template(what, tmp_path, capfd):
    """Within seconds: it does not end, takes all memory, or says something else another day."""
    template, needle = TEMPLATES[what]
    write("dream", tmp_path, special={"chat_template": CHAT})
    load_model(str(tmp_path))
    tokenizer_config(chat_template=CHAT + template)(tmp_path)
    begun = time.process_time(), time.perf_counter()
    assert needle in refused(capfd, tmp_path)
    assert time.process_time() - begun[0] < 3 and time.perf_counter() - begun[1] < 60


@pytest.mark.parametrize("template", ["{{ messages[0].content[:40] }}",
                                      "{{ messages[0].content | truncate(99) }}",
                                      "{{ messages[0].content | replace('1', '') }}"])
def test_a_template_that_loses_some_of_the_message_is_refused(template, tmp_path, capfd):
    write("a2d-llama", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer_config(chat_template=template)(tmp_path)
    assert "message" in refused(capfd, tmp_path)


def test_trying_a_template_draws_nothing_here(tmp_path):
    before = random.getstate(), torch.get_rng_state()
    write("dream", tmp_path)
    load_model(str(tmp_path))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


REMOVE = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
TOKENIZER_FILES = {  # changes of tokenizer.json
    "dropout": ({"model": {"dropout": 0.1}}, "random"),
    "little dropout": ({"model": {"dropout": 1e-6}}, "random"),
    "all text is lost": ({"normalizer": REMOVE}, "loses"),
    "digits are lost": ({"normalizer": REMOVE | {"pattern": {"Regex": "[0-9]"}}}, "loses"),
    "one sign is lost": ({"normalizer": REMOVE | {"pattern": {"String": "*"}}}, "loses"),
    "words are lost": ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[0-9]+"},
                                          "behavior": "Removed", "invert": True}}, "loses"),
    "capitals are lost": ({"normalizer": REMOVE | {"pattern": {"Regex": "[A-Z]"}}}, "loses"),
    "braces are lost": ({"normalizer": REMOVE | {"pattern": {"Regex": "[{}]"}}}, "loses"),
    "a backslash is lost": ({"normalizer": REMOVE | {"pattern": {"String": "\\"}}}, "loses"),
    "other alphabets are lost": ({"normalizer": REMOVE | {"pattern": {"Regex": "[^\\x00-\\x7f]"}}}, "loses"),
    "letters are changed": ({"normalizer": REMOVE | {"pattern": {"String": "3"}, "content": "8"}}, "loses"),
}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("what", TOKENIZER_FILES)
def test_refused_tokenizer_file(what, chat, tmp_path, capfd):
    """It gives other ids for the same text, or not all of a text: with a chat template and without."""
    changes, needle = TOKENIZER_FILES[what]
    write("a2d-llama", tmp_path)
    if not chat:
        (tmp_path / "chat_template.jinja").unlink()
    load_model(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    kept = json.loads(file.read_text())
    for key, value in changes.items():
        kept[key] = kept[key] | value if key == "model" else value
    file.write_text(json.dumps(kept))
    assert needle in refused(capfd, tmp_path)


def test_a_panic_of_the_tokenizer_ends_in_one_line(tmp_path, capfd):
    """It is no Exception. Rust itself says where it was, before."""
    write("a2d-llama", tmp_path)
    file = tmp_path / "tokenizer.json"
    junk = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | junk))
    with pytest.raises(SystemExit) as stop:
        load_model(str(tmp_path))
    said = capfd.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: {tmp_path} cannot be loaded: PanicException")


def test_refused_template_file(tmp_path, capfd):
    write("a2d-qwen3", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    assert "ZeroDivisionError" in refused(capfd, tmp_path)


@pytest.mark.parametrize("gone", [["vocab.json"], ["merges.txt"], ["vocab.json", "merges.txt"],
                                  ["vocab.json", "merges.txt", "added_tokens.json"]])
def test_refused_without_a_vocabulary(gone, tmp_path, capfd):
    """Dream's files: without both, transformers makes a tokenizer of the special tokens alone."""
    write("dream", tmp_path)
    for file in gone:
        (tmp_path / file).unlink()
    assert re.search("vocab|ordinary", refused(capfd, tmp_path))


BROKEN = {
    "config deep": lambda folder: (folder / "config.json").write_text("[" * 10**5),
    "config not text": lambda folder: (folder / "config.json").write_bytes(b'{"model_type": "\xe9"}'),
    "config of many digits": lambda folder: (folder / "config.json").write_text("9" * 5000),
    "pointer": lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com"),
    "empty weights": lambda folder: (folder / "model.safetensors").write_text(""),
    "tokenizer of nothing": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "tokenizer is a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "index of nothing": lambda folder: (folder / "model.safetensors").rename(folder / "x.safetensors")
    and (folder / "model.safetensors.index.json").write_text("{}"),
    "weights cut off": truncate("model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config cut off": lambda folder: (folder / "config.json").write_text('{"model_type": '),
    "tokenizer cut off": truncate("tokenizer.json"),
    "no tokenizer": lambda folder: [file.unlink() for file in folder.glob("*token*")],
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("what", BROKEN)
def test_refused_folder(what, tmp_path, capfd):
    folder = tmp_path / "checkpoint"
    write("a2d-llama", folder)
    BROKEN[what](folder)
    refused(capfd, folder)


def test_refused_hub_id(capfd):
    """Offline (see no_remote_code): it cannot be reached."""
    refused(capfd, "nobody/no-such-model")


def test_the_trap_works(tmp_path, monkeypatch):
    """Of every test here: trusted, the code in the folder would have left its trace."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    write("llada", tmp_path / "hub")
    with pytest.raises(AttributeError):
        AutoConfig.from_pretrained(tmp_path / "hub", trust_remote_code=True)
    (tmp_path / "hub" / "EXECUTED").unlink()


# ---------------------------------------------------------------------------------------------------- memory


def peak(work) -> float:
    """The most memory that torch holds at once while work() runs, beyond what it held before, in GiB."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**30


WIDE = {"vocab_size": 8000, "hidden_size": 256}
HEADS = {  # layout and config: where the head's gradient is most of what an update takes
    "chunks": ("a2d-llama", WIDE),
    "chunks, tied": ("a2d-qwen3", WIDE),
    "chunks of ModernBERT": ("modernbert", WIDE),
}
RUNS = [(method, "chunks") for method in METHODS] + [("gdsd", head) for head in HEADS if head != "chunks"]


@pytest.mark.parametrize("method, head", RUNS)
def test_no_run_takes_more_memory_than_predicted(method, head, tmp_path, monkeypatch, with_a_gradient):
    """From loading to the last evaluation, with several micro-batches in an update."""
    layout, config = HEADS[head]
    write(layout, tmp_path / "model", **config)
    rows = [{"question": f"What is {a} plus {a}?", "ground_truth_answer": str(2 * a)} for a in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    monkeypatch.setattr(common, "LOGITS", 2**17)
    monkeypatch.setattr(models, "LOGITS", 2**17)
    monkeypatch.setattr("plumbing.run.plot", lambda *_: None)
    said = []
    monkeypatch.setattr(models, "predict_memory", recording(models.predict_memory, said))
    argv = ["--model", tmp_path / "model", "--task", "gsm8k", "--data", tmp_path / "data.json",
            *"--prompts 1 --G 4 --L 16 --S 8 --block 8 --budget 150 --eval_rows 2 --updates 2".split(),
            "--out", tmp_path / "run"]
    has = {field.name for field in dataclasses.fields(importlib.import_module(method).Args)}
    argv += [f"--{name}={value}" for name, value in (("beta", 0.1), ("passes", 1)) if name in has]
    measured, predicted = peak(lambda: launch(method, *argv)), sum(said[0].values())
    assert measured <= predicted, said[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("width", [32, 512])
def test_predicted_logits_are_an_upper_estimate_and_no_fantasy(tied, chunks, width, monkeypatch):
    """A forward of the whole budget, after another one has left its gradients; and the largest of three
    rollouts: sampled, sampled with guesses that are sampled too, and greedy."""
    V, L, rows = 8000, 64, 8
    for module in (common, models):
        monkeypatch.setattr(module, "LOGITS", V * (rows * L + 8) // chunks)
    config = Qwen3Config(
        vocab_size=V, hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, is_causal=False, use_cache=False)
    model = common.Denoiser(Qwen3ForCausalLM(config).eval(), None, V - 1, V - 2, V - 2, (V - 2,), False)
    settings = dict(L=L, block=16, G=rows, budget=rows * (L + 1), gradient_checkpointing=False, train=True,
                    reference=False, bf16=False, S=8, rows=rows)
    parts = models.predict_memory(config, **settings)
    prompt = torch.randint(V - 9, (1, 1)).expand(rows, 1)
    target = torch.randint(V - 9, (rows, L))
    x = torch.cat([prompt, torch.full_like(target, model.mask_id)], 1)
    x[:, 1] = torch.arange(rows)  # eight canvases
    where = target >= 0

    def update():
        common.score(model, x, prompt >= 0, target, where, 0.7).sum().backward()

    update()
    scored = peak(update)
    rollouts = [peak(lambda t=t, guess=guess: common.denoise(
        model, prompt, prompt >= 0, [common.generator("cpu", 0)] * (t > 0), L=L, S=8, block=16,
        temperature=t, guess=guess)) for t, guess in ((0.7, None), (0.7, "sampled"), (0.0, None))]
    predicted = parts["activations"] + parts["logits"]
    assert max(scored, *rollouts) <= predicted <= 1.6 * max(scored, *rollouts)


SMOLLM2 = dict(model_type="llama", is_causal=False, vocab_size=49152, hidden_size=576, intermediate_size=1536,
               num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """What plan prints for SmolLM2-135M on a device, with settings changed; and the parts it counts."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2**30, 24 * 2**30))

    def planned(device, **changes):
        args = dict(model="it", revision=None, L=16, S=8, block=16, G=8, prompts=4, eval_rows=64, budget=4096,
                    gradient_checkpointing=True, eval_only=False, shard=False, out=str(tmp_path / "run"))
        models.plan(str(tmp_path), SimpleNamespace(**args | changes), torch.device(device))
        said = capsys.readouterr().out
        return said, {part: float(gib) for part, gib in re.findall(r"[(,] ?(\w+) ([\d.]+)", said)}

    return planned


def test_no_more_logits_are_predicted_than_there_are_rows(planned):
    """37 bytes for each of 64 rows, 16 places and 49,152 ids: 1.7 GiB, and not 6.8 for as many rows as a
    budget of 4096 tokens would hold."""
    assert planned("cpu")[1]["logits"] == pytest.approx(37 * 64 * 16 * 49152 / 2**30, abs=0.05)
    many = planned("cpu", eval_rows=1024)[1]["logits"]  # now it is the budget that limits them
    assert many == pytest.approx(37 * (4096 // 17) * 16 * 49152 / 2**30, abs=0.05)


def test_a_gpu_is_not_planned_to_the_brim(planned, monkeypatch):
    """For fragments, workspaces and NCCL there is a reserve, which counts and is said; a CPU needs none."""
    said, parts = planned("cuda")
    assert parts["reserve"] >= 0.5 + 0.1 * parts["logits"] and "reserve: " in said and "NCCL" not in said
    monkeypatch.setattr(models.parallel, "world", lambda: 2)
    monkeypatch.setattr(models.parallel, "total", lambda value, op: value)
    both, shared = planned("cuda")
    assert shared["reserve"] == pytest.approx(parts["reserve"] + 1, abs=0.11) and "NCCL" in both
    need = float(re.search(r"predicted peak: ([\d.]+)", both)[1])
    assert need == pytest.approx(sum(shared.values()), abs=0.3)
    monkeypatch.undo()
    assert "reserve" not in planned("cpu")[0]


def test_bf16_on_a_cpu_is_said_at_the_start(planned, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    said, parts = planned("cpu", gradient_checkpointing=False)
    assert "matrix products in bf16" in said
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    plain, fp32 = planned("cpu", gradient_checkpointing=False)
    assert "matrix products in bf16" not in plain and parts["activations"] < fp32["activations"]
