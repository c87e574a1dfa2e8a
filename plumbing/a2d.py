r"""From a causal language model to a masked diffusion model that RL can start from, by fine-tuning.

A causal Llama, Qwen2 or Qwen3 (a folder, a hub id, or a GGUF file) is given a mask token, if it has none, and
bidirectional attention, and then learns to fill masks from demonstrations: questions in its own chat template
and answers. Without --data these are the training rows of the task with their right answers, such as
\boxed{7}. It stops once it solves a share (--until) of the task's validation rows, decoded as an RL run
evaluates, or after --minutes. What it leaves, out/model, is what --model of every method takes.

Objective (MDLM / LLaDA): hide k ~ uniform{1..L} of the L answer tokens; mean cross-entropy of the hidden.
All weights learn, by AdamW at a rate that is constant after a warm-up, so that no end has to be known.

A2D ("autoregressive to diffusion") is the name that dllm gives to this, and its checkpoints on the hub are
loaded by models.py. Equal: stock Llama and Qwen networks without the causal mask, a new <|mask|> token,
fine-tuning on demonstrations, EOS behind an answer. Different: theirs predict position i at position i; and
theirs were trained for hours on GPUs with general data, so they answer anything, while this one learns
one task in minutes.

--shift: the prediction for position i stays at position i - 1, where the causal model made it (as in Dream).
Measured on SmolLM2-135M (word problems, L 8, batch 8, lr 2e-4, one seed; from the same weights, on the same
demonstrations): mean loss of the first 320 demonstrations 1.64 with it and 1.99 without; validation loss
after them 0.59 and 0.58, a tie. It begins faster, so it is the default.

Killed or stopped, the same command goes on, bit for bit on a CPU.

python plumbing/a2d.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/base   (pip install gguf accelerate)
python egspo.py --model runs/base/model --task word_problems --L 16 --S 8 --block 16 --lr 1e-5 --beta 0
"""

import importlib.util
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script of this folder, started from anywhere

import tasks  # noqa: E402
from common import Denoiser, Task, chat_prompt  # noqa: E402
from plumbing import parallel  # noqa: E402
from plumbing.flags import check_shape  # noqa: E402
from plumbing.folder import fingerprint, hold, load_checked, write_whole  # noqa: E402
from plumbing.models import (KINDS, MASKS, NO_WINDOW, NOT_OURS, STOCK, check_prompts,  # noqa: E402
                             check_stored, check_weights, is_bidirectional, locate, raw_config, read_ids,
                             release_memory, save_model, stock_config, unused_ids)
from plumbing.parallel import one_line, refuse, refused  # noqa: E402
from plumbing.pretrain import loss_of  # noqa: E402
from plumbing.run import evaluate, longest_prompt  # noqa: E402
from plumbing.surroundings import settle  # noqa: E402

CAUSAL = ("llama", "qwen2", "qwen3")  # the kinds that can be converted


@dataclass
class Settings:
    """Every setting of a conversion."""

    model: str  # a causal Llama, Qwen2 or Qwen3: a transformers folder, a hub id, or a .gguf file
    revision: str | None = None  # of the hub id
    chat_template: str = ""  # a .jinja file in place of the model's own: short prompts are learned faster
    task: str = "word_problems"  # its validation rows tell when to stop
    data: str = ""  # demonstrations (.jsonl: question, answer, both as they are) in place of the task's own
    test_data: str = ""  # validation rows of the task in place of its own
    out: str = ""  # folder; empty: runs/a2d-<task>-<seed>
    seed: int = 1
    shift: bool = True  # the prediction for position i stays at i - 1, where the causal model made it

    # What is learned.
    L: int = 16  # tokens of an answer, those behind it EOS
    batch: int = 8  # demonstrations per step
    lr: float = 2e-4
    warmup: int = 20  # steps over which the rate rises to lr
    grad_norm: float = 1.0

    # When it ends, and how it is measured.
    until: float = 0.3  # stop when this share of the validation rows is solved
    minutes: float = 60.0  # of fine-tuning, evaluation included; then stop
    S: int = 8  # denoising steps of an evaluation
    block: int = 16
    eval_every: int = 100  # steps
    eval_rows: int = 64  # validation rows evaluated, at most
    budget: int = 4096  # most tokens in one forward of an evaluation
    save_every: int = 50  # steps between checkpoints


FREE = {"out", "until", "minutes", "save_every", "budget"}  # what may change when it goes on


# -------------------------------------------------------------------------------------- the causal model


def load_causal(
    name: str, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The network of a causal Llama, Qwen2 or Qwen3 in fp32, with bidirectional attention, and its tokenizer.

    Refuses (exit 2) another kind, a masked diffusion model, weights that are missing, and an adapter."""
    gguf = name.endswith(".gguf")
    if gguf:
        if not Path(name).is_file():
            refuse(f"there is no file {name}")
        missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
        if missing:
            refuse(f"to read {name}: pip install {' '.join(missing)}")
        where, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    else:
        if not Path(name).is_dir() and (name.count("/") != 1 or name[0] in "./~"):
            refuse(f"unknown model {name!r}: use a transformers folder, a hub id, or a .gguf file")
        where, options = locate(name, revision), {"revision": revision or "main"}
    with refused(f"{name} cannot be loaded"):
        raw = PreTrainedConfig.get_config_dict(where, **options)[0] if gguf else raw_config(
            name, where, revision)
        kind = raw.get("model_type")
        if kind in KINDS or raw.get("is_causal") is False:
            refuse(f"{name} is a masked diffusion model as it is: give it to --model of a method")
        if kind not in CAUSAL:
            refuse(f"{name} is a {kind!r} model; the kinds that can be converted are: {', '.join(CAUSAL)}")
        fields = {k: v for k, v in raw.items() if k not in NOT_OURS}
        fields |= NO_WINDOW if kind != "llama" else {}
        config = stock_config(name, kind, fields)
        if not gguf:
            check_stored(name, where, config)
        tokenizer = (AutoTokenizer if gguf else PreTrainedTokenizerFast).from_pretrained(where, **options)
        network, report = STOCK[kind][0].from_pretrained(
            where, config=config, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True, **options)
        network.hf_quantizer = None  # a GGUF file's codes are plain numbers by now
        network.config.__dict__.pop("quantization_config", None)
        check_weights(name, network, report, where)
    return network, tokenizer


@torch.no_grad()
def add_mask(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
    """Give the model a mask token if it has none, and the token an embedding if it lacks one: the mean of
    those before it. Ids up to the size of the embedding may be free (Qwen); otherwise the embedding grows,
    and so does an untied head."""
    vocabulary, V = tokenizer.get_vocab(), network.config.vocab_size
    named = [tokenizer.mask_token_id, *map(vocabulary.get, MASKS)]
    mask = next((i for i in named if i is not None), None)
    if mask is not None and mask < V:
        return
    if mask is None:
        tokenizer.add_special_tokens({"mask_token": MASKS[0]})
        mask = tokenizer.mask_token_id
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    # A file may hold a head of its own although its config says that there is none.
    network.config.tie_word_embeddings = head.weight is embedding.weight
    with torch.random.fork_rng(devices=[]):  # of what resizing draws, nothing stays
        network.resize_token_embeddings(max(V, mask + 1), mean_resizing=False)
    for matrix in {network.get_input_embeddings().weight, network.get_output_embeddings().weight}:
        matrix[mask] = matrix[:mask].mean(0)


def convert(settings: Settings) -> Denoiser:
    """The model before fine-tuning: causal weights, a mask token, bidirectional attention."""
    network, tokenizer = load_causal(settings.model, settings.revision)
    if settings.chat_template:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            refuse(f"--chat_template {settings.chat_template} cannot be read: {one_line(error)}")
    add_mask(network, tokenizer)
    config = network.config
    config.logits_shift = settings.shift
    ids = read_ids(settings.model, config.to_dict(), tokenizer, config.vocab_size, None)
    model = Denoiser(None, tokenizer, *ids, settings.shift)
    check_prompts(settings.model, model, reads_words=True)
    config.mask_token_id = model.mask_id
    model.excluded = unused_ids(tokenizer, config.vocab_size)
    model.network = network.eval()
    if not is_bidirectional(model):
        refuse(f"{settings.model} stays causal: a masked position does not see the tokens after it")
    return model


# ---------------------------------------------------------------------------------------- the demonstrations


def demonstrations(settings: Settings, chat: bool) -> tuple[list[str], list[str], Task]:
    """(prompts, answers) to learn from, and the task with its validation rows."""
    try:
        task = tasks.load(settings.task, chat=chat, test_data=settings.test_data, train=not settings.data,
                          held_out="validation")
        if settings.data:
            rows = tasks.read_file(settings.data)
            pairs = [(tasks.written(row, "question"), tasks.written(row, "answer")) for row in rows]
        else:
            right = tasks.find(settings.task).TASK.right
            pairs = [(row["prompt"], answer) for row in task.train if (answer := right(row)) is not None]
    except ValueError as error:
        refuse(str(error))
    if not pairs:
        refuse(f"{settings.task} knows no right answers to learn from: give demonstrations with --data")
    held = {row["prompt"] for row in task.test}
    pairs = [pair for pair in pairs if pair[0] not in held]
    if len(pairs) < settings.batch:
        refuse(f"there are {len(pairs)} demonstrations apart from the validation rows, --batch is "
               f"{settings.batch}")
    task.test = task.test[: settings.eval_rows]
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs], task


def check_lengths(model: Denoiser, prompts: list[str], answers: list[str], task: Task, settings: Settings):
    """Refuse what does not fit: nothing is ever cut."""
    longest = max(map(len, model.tokenizer(answers, add_special_tokens=False)["input_ids"]))
    if longest > settings.L:
        refuse(f"the longest answer to learn from has {longest} tokens, --L is {settings.L}")
    P, room = longest_prompt(model, prompts + [row["prompt"] for row in task.test]), model.network.config
    if P + settings.L > room.max_position_embeddings:
        refuse(f"the longest prompt has {P} tokens, --L is {settings.L}: {settings.model} reads "
               f"{room.max_position_embeddings} at most")


def batches_of(lengths: np.ndarray, batch: int, seed: int, epoch: int) -> np.ndarray:
    """(batches, batch) indices of one epoch, in random order. Batches of 16 in a row share demonstrations of
    their own, sorted by length, so that little is padded. The last few, too few for a batch, are left out."""
    rng = np.random.default_rng([4, seed, epoch])
    order = rng.permutation(len(lengths))[: len(lengths) // batch * batch]
    parts = [order[i : i + 16 * batch] for i in range(0, len(order), 16 * batch)]
    sorted_parts = [part[lengths[part].argsort(kind="stable")].reshape(-1, batch) for part in parts]
    return np.concatenate([rng.permutation(part) for part in sorted_parts])


# ------------------------------------------------------------------------------------------------ the loop


class Conversion:
    """A model that learns to fill masks, and its folder: args.json, log.jsonl, state.pt."""

    def __init__(
        self, settings: Settings, model: Denoiser, prompts: list[str], answers: list[str], task: Task
    ):
        self.settings, self.model, self.task, self.out = settings, model, task, Path(settings.out)
        self.prompts, self.answers = prompts, answers
        texts = [chat_prompt(model, prompt) for prompt in prompts]
        ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.lengths = np.array([len(row) for row in ids])
        self.optimizer = torch.optim.AdamW(
            model.network.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        # What a checkpoint has beside weights and moments: steps made, seconds taken, the losses since the
        # last evaluation, and the evaluations.
        self.progress = {"step": 0, "seconds": 0.0, "losses": [], "log": []}

    def learn(self) -> int:
        """One optimizer step. What it learns from is a function of the seed and the step alone. Returns the
        tokens read."""
        step, batch = self.progress["step"], self.settings.batch
        epoch, number = divmod(step, len(self.prompts) // batch)
        chosen = batches_of(self.lengths, batch, self.settings.seed, epoch)[number]
        rng = np.random.default_rng([5, self.settings.seed, step])
        prompts, answers = [self.prompts[i] for i in chosen], [self.answers[i] for i in chosen]
        loss = loss_of(self.model, prompts, answers, self.settings.L, rng)
        loss.backward()
        norm = self.model.clip_gradient(self.settings.grad_norm)
        if not math.isfinite(norm + loss.item()):
            sys.exit(f"error: loss {loss.item()}, gradient norm {norm} after {step * batch} demonstrations; "
                     f"{self.out} keeps the last checkpoint: try a lower --lr")
        share = min(1.0, (step + 1) / max(1, self.settings.warmup))
        self.optimizer.param_groups[0]["lr"] = self.settings.lr * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress["step"] += 1
        self.progress["losses"].append(loss.item())
        return batch * (int(self.lengths[chosen].max()) + self.settings.L)

    @torch.no_grad()
    def measure(self):
        """Add an evaluation on the validation rows to the log: the share that is solved, decoded as an RL run
        evaluates, and the loss of right answers, where they are known, under always the same masks."""
        settings, progress, right = self.settings, self.progress, tasks.find(self.settings.task).TASK.right
        as_a_run = SimpleNamespace(**vars(settings), eval_threshold=0.0)
        found, _, _ = evaluate(as_a_run, self.model, self.task, adaptive=False)
        known = [(row["prompt"], answer) for row in self.task.test if (answer := right(row)) is not None]
        rng, losses = np.random.default_rng(6), []
        for i in range(0, len(known), settings.batch):
            part = known[i : i + settings.batch]
            losses += [loss_of(self.model, *zip(*part, strict=True), settings.L, rng).item()] * len(part)
        progress["log"].append({
            "examples": progress["step"] * settings.batch, "seconds": round(progress["seconds"], 1),
            "loss": sum(progress["losses"]) / max(1, len(progress["losses"])),
            "validation_loss": sum(losses) / len(losses) if losses else None,
            "solved": found["eval_accuracy"], "unread": found["eval_parse_fail"],
            "rows": found["eval_rows"]})
        progress["losses"] = []

    def save(self):
        """Write the checkpoint, then the log that belongs to it."""
        state = {"network": self.model.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        write_whole(self.out / "state.pt", lambda file: torch.save(state | self.progress, file))
        text = "".join(json.dumps(line) + "\n" for line in self.progress["log"])
        write_whole(self.out / "log.jsonl", lambda file: file.write(text.encode()))

    def load(self):
        """Go on from the checkpoint, if there is one."""
        file = self.out / "state.pt"
        if not file.exists():
            return
        try:
            state = load_checked(file, map_location="cpu", mmap=True)
            self.model.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = {name: state[name] for name in self.progress}
        except Exception as error:  # of any kind: the file may be anything
            refuse(f"{file} cannot be used: {one_line(error)}")
        print(f"goes on after {self.progress['step'] * self.settings.batch} demonstrations")

    def enough(self) -> bool:
        """Is the wanted share solved, or the time over?"""
        last = self.progress["log"][-1:]
        solved = last and last[0]["examples"] == self.progress["step"] * self.settings.batch and (
            last[0]["solved"] >= self.settings.until)
        return bool(solved) or self.progress["seconds"] >= 60 * self.settings.minutes

    def run(self):
        """Learn until it is enough, from the checkpoint on."""
        self.load()
        settings, progress, read = self.settings, self.progress, 0
        begin, spent = time.perf_counter(), progress["seconds"]
        bar = tqdm(initial=progress["step"] * settings.batch, unit=" examples", desc="a2d",
                   dynamic_ncols=True)
        while not self.enough():
            read += self.learn()
            progress["seconds"] = spent + time.perf_counter() - begin
            late = progress["seconds"] >= 60 * settings.minutes
            step = progress["step"]
            if late or step % settings.eval_every == 0:
                self.measure()
                tqdm.write(json.dumps(progress["log"][-1]))
                progress["seconds"] = spent + time.perf_counter() - begin
            if late or step % settings.save_every == 0 or step % settings.eval_every == 0:
                self.save()
            release_memory()
            speed = read / (progress["seconds"] - spent)
            left = max(0.0, settings.minutes - progress["seconds"] / 60)
            recent = progress["losses"][-20:]
            bar.set_postfix_str(f"{speed:.0f} tokens/s, loss {sum(recent) / max(1, len(recent)):.3f}, "
                                f"at most {left:.0f} min left")
            bar.update(settings.batch)
        bar.close()


def check(settings: Settings):
    """Stop early on settings that cannot work."""
    for name in ("L", "batch", "S", "block", "eval_every", "eval_rows", "budget", "save_every"):
        if getattr(settings, name) < 1:
            refuse(f"--{name} must be at least 1")
    if settings.seed < 0 or settings.warmup < 0:
        refuse("--seed and --warmup must be at least 0")
    for name in ("lr", "grad_norm", "minutes"):
        if not 0 < getattr(settings, name) < math.inf:
            refuse(f"--{name} must be a finite number above 0")
    if not 0 <= settings.until <= 1:
        refuse("--until is a share, from 0 to 1")
    check_shape(settings.L, settings.S, settings.block)


def take_folder(settings: Settings) -> int:
    """Make the folder and write args.json; refuse one that holds something else, or another conversion, or
    that another process works in. Returns what holds it for this process: an open folder."""
    out = Path(settings.out)
    places = {"model": locate(settings.model, settings.revision), "chat_template": settings.chat_template,
              "data": settings.data, "test_data": settings.test_data}
    try:
        found = {name: fingerprint(place) for name, place in places.items()
                 if place and Path(place).exists()}
        wanted = vars(settings) | {"fingerprints": found}
        if (out / "args.json").exists():
            there = json.loads((out / "args.json").read_text())
            changed = sorted(name for name in there.keys() | wanted.keys()
                             if name not in FREE and there.get(name) != wanted.get(name))
            if changed:
                refuse(f"{out} holds a conversion with other {', '.join(changed)}: choose another --out")
        elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
            refuse(f"{out} exists and holds no conversion to go on with: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        lock = hold(out)
        text = json.dumps(wanted, indent=1)
        write_whole(out / "args.json", lambda file: file.write(text.encode()))
    except BlockingIOError:
        refuse(f"another process is at work in {out}")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        refuse(f"--out {out} cannot be used: {one_line(error)}")
    return lock


def main():
    """Convert, and say where the model is and how to train it."""
    settle()
    settings = tyro.cli(Settings)
    check(settings)
    settings.out = settings.out or f"runs/a2d-{Path(settings.task).stem}-{settings.seed}"
    device = parallel.start()
    model = convert(settings)
    model.network.to(device)
    prompts, answers, task = demonstrations(settings, bool(model.tokenizer.chat_template))
    check_lengths(model, prompts, answers, task, settings)
    lock = take_folder(settings)
    conversion = Conversion(settings, model, prompts, answers, task)
    try:
        conversion.run()
        save_model(model, Path(settings.out) / "model")
    except KeyboardInterrupt:
        print(f"\nstopped by ctrl-C; the same command goes on from the checkpoint in {settings.out}",
              file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, RuntimeError) as error:  # a full disk, or memory
        sys.exit(f"error: {one_line(error)}; {settings.out} keeps the last checkpoint")
    finally:
        os.close(lock)
    last = conversion.progress["log"][-1]
    print(f"{last['solved']:.1%} of {last['rows']} validation rows solved after {last['examples']} "
          f"demonstrations and {last['seconds'] / 60:.0f} minutes; to train it:\npython egspo.py --model "
          f"{shlex.quote(settings.out)}/model --task {settings.task} --L {settings.L} --S {settings.S} "
          f"--block {settings.block} --lr 1e-5 --beta 0")


if __name__ == "__main__":
    main()
