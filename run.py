"""The plumbing the four methods share; nothing here is about a method.

In order: flags and their checks; model and task of the command line; evaluation; a run with its folder,
checkpoints, clock and log. The table, the boards, the curve and the trace at its end are in report.py.
"""

import argparse
import copy
import fcntl
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import parallel
import tasks
from common import Denoiser, Rollout, Task, denoise, encode, one_line, refuse, reward_rows
from report import SHOWN, plot, print_report, trace


@dataclass
class Flags:
    """What every method's command line has; the Args of a method add what its reader needs to see."""

    model: str = "tiny"  # "tiny" (the base of the task, built on first use), a transformers folder or hub id
    revision: str | None = None  # of the hub id; without one a cached copy is used as it is
    mask_id: int | None = None  # for a checkpoint that does not say which token is its mask
    task: str = "sudoku"  # sudoku, gsm8k, math, countdown, mbpp or humaneval
    data: str = ""  # local training rows (.json, .jsonl, .csv) in place of the hub's
    test_data: str = ""  # local held-out rows
    seed: int = 1  # decides every random draw of the run, not the tiny base
    out: str = ""  # run folder; empty: runs/<method>-<task>-<seed>
    resume: str = ""  # go on with this run folder
    eval_only: bool = False  # evaluate --resume RUN, or the model as it is, and stop
    eval_every: int = 50  # updates between evaluations on the held-out rows
    eval_threshold: float = 0.9  # evaluate adaptive decoding, too, before and after training; 0: do not
    eval_rows: int = 1024  # held-out rows evaluated, at most
    save_every: int = 10  # updates between checkpoints
    track: Literal["wandb", "trackio"] | None = None  # log there, too; after pip install of it
    budget: int = 8448  # most tokens in one forward
    gradient_checkpointing: bool = False  # less memory for activations, a third more time per update
    shard: bool = False  # torchrun: split weights, gradients and Adam over the GPUs also where one holds them


def parse_args(Args: type, method: str, countdown: dict, llm: dict, sudoku: dict | None = None):
    """The command line as an Args. The defaults are those of Args, changed by `sudoku` or `countdown` for a
    tiny model, by `llm` for a --model that reads words; with --resume RUN they are its settings, and few may
    change."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what the defaults hang on
    first.add_argument("--model", default="tiny")
    first.add_argument("--task", default="sudoku")
    first.add_argument("--resume", default="")
    said, _ = first.parse_known_args()
    if not said.resume:
        tiny = said.model == "tiny" or tiny_task(said.model)
        changes = llm if not tiny else countdown if said.task == "countdown" else sudoku or {}
        return check(tyro.cli(Args, default=Args(**changes)), method)
    before = saved_args(Args, method, Path(said.resume))
    args = tyro.cli(Args, default=before)
    free = {"updates", "eval_every", "eval_threshold", "eval_rows", "save_every", "budget",
            "gradient_checkpointing", "shard", "resume", "eval_only", "track"}
    changed = [k for k, v in vars(args).items() if k not in free and v != getattr(before, k)]
    if changed:
        refuse(f"a resumed run keeps its {', '.join(changed)}; free to change: {', '.join(sorted(free))}")
    return check(args, method)


def saved_args(Args: type, method: str, folder: Path):
    """The settings of the run in `folder`."""
    file = folder / "args.json"
    if not file.is_file():
        refuse(f"{folder} holds no run to resume (no args.json)")
    try:
        saved = json.loads(file.read_text())
        made_by = saved.pop("method")
        saved.pop("commit")
        args = Args(**saved | {"resume": str(folder), "shard": False})  # the processes now may be others
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"{file} cannot be read: {one_line(error)}")
    if made_by != method:
        refuse(f"{folder} is a run of another method: resume it with the script that made it")
    return args


def tiny_task(name: str) -> str | None:
    """The task of a tiny base or of a folder trained from one, as its config says; None: another model."""
    try:
        return json.loads((Path(name) / "config.json").read_text()).get("tiny_task")
    except (OSError, ValueError, AttributeError):  # not such a folder: load_model says what is wrong
        return None


def check(args, method: str):
    """Stop early on settings that cannot work; fill in the default --out. Returns args."""
    if args.task not in tasks.TASKS:
        refuse(f"unknown task {args.task!r}: choose from {', '.join(tasks.TASKS)}")
    if args.model == "tiny" and args.task not in tasks.TINY_TASKS:
        refuse(f"--model tiny knows {' and '.join(tasks.TINY_TASKS)}: {args.task} needs another --model")
    made_for = tiny_task(args.model)
    if made_for not in (None, args.task):
        refuse(f"{args.model} is a tiny model of --task {made_for}")
    if args.track and not importlib.util.find_spec(args.track):
        refuse(f"--track {args.track} needs it: pip install {args.track}")
    if args.shard and "WORLD_SIZE" not in os.environ:
        refuse(f"--shard is for several processes: torchrun --nproc_per_node 2 {sys.argv[0]} ...")
    for name in ("prompts", "minibatches", "passes", "L", "S", "block", "eval_every", "eval_rows",
                 "save_every", "budget"):
        if getattr(args, name) < 1:
            refuse(f"--{name} must be at least 1")
    for name, value in vars(args).items():
        if isinstance(value, float) and not 0 <= value < math.inf:
            refuse(f"--{name} must be a finite number, at least 0")
    if args.G < 2:
        refuse("--G must be at least 2: an advantage compares the samples of one prompt")
    if args.updates < 0 or not 0.01 <= args.temperature <= 100:
        refuse("--updates must be at least 0 and --temperature from 0.01 to 100: rollouts have to explore")
    if args.grad_norm == 0 or args.eval_threshold > 1:
        refuse("--grad_norm must be above 0, and --eval_threshold is a probability, at most 1")
    if args.prompts % args.minibatches:
        refuse(f"--minibatches {args.minibatches} must divide --prompts {args.prompts}: groups stay whole")
    if args.L % args.block:
        refuse(f"--L {args.L} is not a multiple of --block {args.block}")
    if args.L % args.S or args.S % (args.L // args.block):
        refuse(f"--S {args.S} does not fit: it must divide --L {args.L} and be a multiple of its "
               f"{args.L // args.block} blocks")
    default = f"runs/eval-{args.task}" if args.eval_only else f"runs/{method}-{args.task}-{args.seed}"
    args.out = args.resume or args.out or default
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and args.eval_only or args.resume):
        refuse(f"{out} exists: go on with --resume {out}, or choose another --out")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=there))
    except OSError as error:
        refuse(f"--out {out} cannot be written to: {one_line(error)}")
    return args


# ------------------------------------------------------------------- model and task of the command line


def setup(args) -> tuple[Denoiser, Task]:
    """The model and the task, after saying what they take. Refuses what cannot work before it is loaded."""
    from models import load_model, plan  # here, because transformers takes seconds, and --help does without

    name = args.model
    if name == "tiny":
        from pretrain import kept_base

        name = str(kept_base(args.task))
    device = parallel.start()
    arithmetic = "fp32 weights, bf16 matrix products" if device.type == "cuda" else "fp32 (no CUDA GPU found)"
    others = f", rank 0 of {parallel.world()}" if "WORLD_SIZE" in os.environ else ""
    print(f"device {device}{others}: {arithmetic}", flush=True)
    sharded, keep_whole = plan(name, args, device)
    model = load_model(name, "cpu" if sharded else device, args.revision, args.mask_id,
                       args.gradient_checkpointing)
    if sharded:
        needed = vars(args).get("beta", 0) > 0 and not args.eval_only
        model.twin = copy.deepcopy(model.network) if needed else None
        for network in filter(None, (model.network, model.twin)):
            parallel.shard(network, device, keep_whole)
    return model, load_task(args, model)


def load_task(args, model: Denoiser) -> Task:
    """The task of the command line. Refuses prompts that do not fit the model: nothing is ever cut."""
    try:
        task = tasks.load(args.task, chat=bool(model.tokenizer.chat_template), data=args.data,
                          test_data=args.test_data, train=not args.eval_only)
    except ValueError as error:
        refuse(str(error))
    task.test = task.test[: args.eval_rows]
    longest = sorted((row["prompt"] for row in task.train + task.test), key=len)[-256:]
    P = encode(model, longest)[0].shape[1]
    room = model.network.config.max_position_embeddings
    if P + args.L > room:
        refuse(f"the longest prompt has {P} tokens, --L is {args.L}: {args.model} reads {room} at most")
    if args.prompts > len(task.train) and not args.eval_only:
        refuse(f"--prompts {args.prompts}: {args.task} has only {len(task.train)} training prompts")
    return task


# --------------------------------------------------------------------------------------------- evaluation


def evaluate(args, model: Denoiser, task: Task, adaptive: bool = True) -> tuple[dict, list[tuple], dict]:
    """Greedy, order top_prob, every held-out row: the same for all methods. Returns metrics, eval_* of fixed
    S and threshold_* of adaptive decoding; and of fixed S, of each row the text and whether it is correct,
    and what report.trace shows of it."""
    prompt, prompt_mask = encode(model, [row["prompt"] for row in task.test])
    metrics, answers, shown = {}, [], {}
    for kind, threshold in (("eval", None), ("threshold", args.eval_threshold * adaptive)):
        if threshold == 0:
            continue
        roll = denoise(model, prompt, prompt_mask, [], L=args.L, S=args.S, block=args.block, temperature=0,
                       threshold=threshold, budget=args.budget)
        reward, parts, texts = reward_rows(model, task, roll.completion, task.test)
        answers = answers or list(zip(texts, parts["correct"].tolist(), strict=True))
        everything = vars(roll) | parts | {"reward": reward}
        shown = shown or {name: everything[name].cpu() for name in SHOWN}
        means = {"accuracy": parts["correct"], "reward": reward, "parse_fail": parts["parse_fail"]}
        metrics |= {f"{kind}_{name}": values.double().mean().item() for name, values in means.items()}
        metrics[f"{kind}_nfe_per_row"] = roll.nfe / len(task.test)
    return metrics, answers, shown


def keep_answers(args, model: Denoiser, update: int, metrics: dict, answers: list[tuple]):
    """Add an evaluation with every setting and answer to evals.jsonl."""
    if parallel.rank():
        return
    on_gpu = model.device.type == "cuda"
    line = metrics | {
        "update": update, "rows": len(answers), "order": "top_prob", "eval_temperature": 0.0,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        "torch": torch.__version__, "commit": git_commit(), "args": vars(args), "answers": answers}
    with open(Path(args.out) / "evals.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def evaluate_only(args, model: Denoiser, task: Task) -> float:
    """--eval_only: print the report of the model as it is; returns the held-out accuracy."""
    out, update = Path(args.out), 0
    if args.resume and (out / "state.pt").is_file():
        update = load_state(out, model)["update"]
    metrics, answers, shown = evaluate(args, model, task)
    print_report(task, args, {f"update {update}": metrics}, answers)
    out.mkdir(parents=True, exist_ok=True)
    keep_answers(args, model, update, metrics, answers)
    write_trace(args, model, task, update, shown)
    print(f"\n{out}/evals.jsonl has this evaluation with its settings and answers; "
          f"{out}/trace.html shows the step that revealed each token")
    return metrics["eval_accuracy"]


def write_trace(args, model: Denoiser, task: Task, update: int, shown: dict):
    """trace.html in the run folder: `shown` of an evaluation beside that of update 0, if it is there."""
    if parallel.rank():
        return
    name = f"after update {update}" if update else "the model as it is"
    columns, before = {name: shown}, Path(args.out) / "before.pt"
    if update and before.exists():
        try:
            kept = torch.load(before, weights_only=True)
            columns = {"before": {name: kept[name] for name in SHOWN}} | columns
        except Exception as error:  # of any kind: the file may be anything
            print(f"{before} cannot be read, trace.html shows update {update} alone: {one_line(error)}")
    trace(before.with_name("trace.html"), model, task, args, columns)


# -------------------------------------------------------------------------------------------------- a run


def load_state(out: Path, model: Denoiser, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Read the checkpoint of a run folder into the model and, if given, the optimizer; returns the rest."""
    try:  # mmap: without an optimizer two thirds of the file are never read
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True,
                           mmap=optimizer is None or parallel.is_sharded(model.network))
        shards, saved = model.network.state_dict(), state.pop("network")
        model.network.load_state_dict({k: parallel.like(v, shards.get(k)) for k, v in saved.items()})
        if optimizer:
            for i, p in enumerate(optimizer.param_groups[0]["params"]):
                moments = state["optimizer"]["state"].get(i, {})
                moments.update({k: parallel.like(v, p) for k, v in moments.items() if v.shape == p.shape})
            optimizer.load_state_dict(state["optimizer"])
        return {k: state[k] for k in ("update", "counters", "metrics_bytes")}
    except Exception as error:  # of any kind: the file may be anything
        refuse(f"{out / 'state.pt'} cannot be used: {one_line(error)}")


class Run:
    """One run: folder (args.json, metrics.jsonl, before.pt, state.pt, curve.png, trace.html, model/), clock,
    counters, ctrl-C. Of several ranks all make one, and the folder is written by rank 0."""

    summed = staticmethod(parallel.summed)  # what a method counts or scores on its micro-batches is a share

    def __init__(self, args, method: str, model: Denoiser, task: Task, optimizer: torch.optim.Optimizer):
        """Take hold of the folder. Weights of a checkpoint are read when the loop begins, so that whatever is
        copied from the model before it is the model before training."""
        self.args, self.method, self.model, self.task, self.optimizer = args, method, model, task, optimizer
        self.out = Path(args.out)
        self.update = 0  # updates done
        self.saved = 0  # the update of the newest checkpoint; 0 is the model the run started from
        nfe = {"nfe_rollout": 0, "nfe_rollout_full": 0, "nfe_update": 0, "nfe_update_full": 0}
        self.counters = {**nfe, "optimizer_steps": 0, "skipped": 0, "seconds": 0}
        self.skipped_in_a_row = 0
        self.laps = {}
        self.bar = None
        self.interrupted = False
        self.writes = parallel.rank() == 0
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.out, os.O_RDONLY)
        try:
            if self.writes:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(f"another process is at work in {self.out}")
        except OSError:  # a network file system that cannot lock a folder
            pass

    def begin(self):
        """Start the clock, in a new folder or where its checkpoint (none: the first update) left it."""
        logged = 0
        if (self.out / "state.pt").is_file():
            state = load_state(self.out, self.model, self.optimizer)
            self.update, self.counters, logged = state["update"], state["counters"], state["metrics_bytes"]
        if self.writes:
            self.prepare(logged)
        self.saved = self.update
        self.lapped = time.perf_counter()
        self.started = self.lapped - self.counters["seconds"]
        signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.interrupt)
        self.bar = tqdm(total=self.args.updates, initial=self.update, desc=self.method, unit="update",
                        dynamic_ncols=True)

    def prepare(self, logged: int):
        """Bring the folder to where its checkpoint left it, with `logged` bytes of metrics.jsonl."""
        log = self.out / "metrics.jsonl"
        log.touch()
        if log.stat().st_size < logged:
            refuse(f"{log} is shorter than it was at the checkpoint: {log.stat().st_size} of {logged} bytes")
        os.truncate(log, logged)  # what was logged after the checkpoint will be logged again
        (self.out / "state.new").unlink(missing_ok=True)
        settings = vars(self.args) | {"resume": "", "method": self.method, "commit": git_commit()}
        (self.out / "args.tmp").write_text(json.dumps(settings, indent=1))
        os.replace(self.out / "args.tmp", self.out / "args.json")
        if self.args.track:
            mark = self.out / "track_id"  # not the folder's name: another run may have had it before
            if not mark.exists():
                mark.write_text(uuid.uuid4().hex[:8])
            track_id = mark.read_text()
            own = {"id": track_id, "dir": self.out} if self.args.track == "wandb" else {}
            self.track(lambda tracker: tracker.init(
                project="diffusion-rl", name=f"{self.out.resolve().name}-{track_id}", config=settings,
                resume="allow", **own))

    def interrupt(self, number: int, frame):
        """First ctrl-C, or SIGTERM: finish this update and save. Second: stop at once, the last checkpoint
        stays."""
        self.interrupted = True
        name = signal.Signals(number).name
        tqdm.write(f"{name}: finishing this update, then saving (once more: stop at once)")
        give_signals_back()

    def track(self, tell: Callable):
        """tell(the module of --track), if there is one. A tracker that fails is left, and the run goes on."""
        try:
            if self.args.track and self.writes:
                tell(importlib.import_module(self.args.track))
        except (Exception, SystemExit) as error:
            tqdm.write(f"--track {self.args.track} has failed, the run goes on without it: {one_line(error)}")
            self.args.track = None

    def close(self):
        """Give terminal, ctrl-C, folder and tracker back."""
        self.track(lambda tracker: tracker.finish())
        self.bar.close()
        give_signals_back()
        os.close(self.lock)

    def boundary(self) -> bool:
        """Between updates: save and evaluate where due. True when all are done; exit 130 after ctrl-C.

        Saved first: a resumed run repeats the evaluation, so it inherits none that its own schedule lacks."""
        if self.bar is None:
            self.begin()
        self.interrupted = bool(self.summed(int(self.interrupted)))  # of any rank: all stop here
        over = self.update >= self.args.updates
        ending = over or self.interrupted
        if self.skipped_in_a_row == 0:
            self.keep()
            if self.update > self.saved and (ending or self.update % self.args.save_every == 0):
                self.save()
        if ending:
            self.keep()
        if self.interrupted:
            self.summed(0)  # wait for rank 0 to have written: torchrun ends it once another one has left
            self.close()
            print(f"stopped after {self.update} updates; go on: python {sys.argv[0]} --resume {self.out}")
            raise SystemExit(130)
        if over or self.update % self.args.eval_every == 0:
            self.evaluate()
        return over

    def save(self):
        """Write state.new, if the weights are finite: a checkpoint once it has led to a finite update. It is
        the same file for any number of processes, and whether weights are sharded or not."""
        weights = parallel.weights(self.model.network)  # sharded: of rank 0 alone
        if self.summed(sum(not v.isfinite().all() for v in weights.values() if v is not None)):
            return tqdm.write(f"update {self.update}: weights are not finite, not saved")
        state = {"network": weights, "optimizer": parallel.moments(self.optimizer)}
        self.saved = self.update
        if not self.writes:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            os.fsync(file.fileno())  # before the checkpoint that counts its bytes
        state |= {
            "update": self.update,
            "counters": self.counters,
            "metrics_bytes": (self.out / "metrics.jsonl").stat().st_size,
        }
        try:
            with open(self.out / "state.new", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # a full disk
            (self.out / "state.new").unlink(missing_ok=True)
            self.fail(f"the checkpoint of update {self.update} cannot be written: {error}")

    def keep(self):
        """Make state.new the checkpoint: on disk is either the old one or the new one, never half of one."""
        if self.writes and (self.out / "state.new").exists():
            os.replace(self.out / "state.new", self.out / "state.pt")

    def fail(self, why: str):
        """Stop with exit status 1 and say what is left."""
        self.close()
        parallel.after_rank_0()
        kept = "keeps the last good checkpoint" if (self.out / "state.pt").exists() else "has no checkpoint"
        sys.exit(f"error: {why}; {self.out} {kept}")

    def evaluate(self):
        """Evaluate (adaptively at the start and the end alone) and log; the run's clock stands still."""
        begin = time.perf_counter()
        adaptive = self.update in (0, self.args.updates)
        metrics, self.answers, self.shown = evaluate(self.args, self.model, self.task, adaptive)
        if self.update == 0 and self.writes:
            try:
                torch.save(self.shown, self.out / "before.pt")  # for trace.html, also of a resumed run
            except (OSError, RuntimeError) as error:
                self.fail(f"before.pt cannot be written: {error}")
        self.log(metrics)
        self.accuracy = metrics["eval_accuracy"]
        tqdm.write(f"update {self.update}: {self.accuracy:.1%} of the held-out rows correct")
        self.started += time.perf_counter() - begin
        self.lapped = time.perf_counter()

    def lap(self, phase: str):
        """Note the seconds since the last lap as those of `phase`."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        before, self.lapped = self.lapped, time.perf_counter()
        self.laps[f"seconds_{phase}"] = self.lapped - before

    def rolled_out(self, roll: Rollout):
        """Count the forwards of a rollout and note its seconds."""
        self.counters["nfe_rollout"] += roll.nfe
        self.counters["nfe_rollout_full"] += roll.nfe_full
        self.before_update = self.model.forwards["rows"]
        self.lap("rollout")

    def optimizer_step(self, loss: float, max_grad_norm: float) -> float:
        """Sum the gradients of the ranks, clip and step; returns the norm before clipping. Not finite: skip
        the step and count it, on all ranks alike; exit 1 after three in a row. loss: summed, too."""
        norm = parallel.clip(self.model.network, max_grad_norm)
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            self.counters["optimizer_steps"] += 1
            self.skipped_in_a_row = 0
        else:
            self.counters["skipped"] += 1
            self.skipped_in_a_row += 1
            tqdm.write(f"update {self.update + 1}: loss {loss}, gradient norm {norm}: optimizer step skipped")
        self.optimizer.zero_grad()
        if self.skipped_in_a_row == 3:
            self.fail("three optimizer steps in a row not finite")
        return norm

    def log_update(self, metrics: dict, infos: list[dict]):
        """Count an update; log it with the means of `infos`, a dict of each optimizer step, the counters, the
        clock and the memory."""
        from models import release_memory

        self.lap("update")
        self.update += 1
        self.counters["nfe_update"] += int(self.summed(self.model.forwards["rows"] - self.before_update))
        self.counters["seconds"] = time.perf_counter() - self.started
        infos = infos or [{"loss": 0.0, "grad_norm": 0.0}]  # nothing could move a weight
        means = {k: sum(info[k] for info in infos) / len(infos) for k in infos[0]}
        tokens = metrics["length"] * self.args.prompts * self.args.G
        speed = {"tokens_per_second": tokens / self.laps["seconds_rollout"]}
        peak = torch.cuda.max_memory_allocated() if self.model.device.type == "cuda" else 0
        memory = {"peak_memory_gib": peak / 2**30}
        self.log(metrics | means | self.counters | self.laps | speed | memory)
        release_memory()
        self.bar.set_postfix_str(f"reward {metrics['reward']:.3f}, {self.counters['skipped']} skipped")
        self.bar.update()

    def log(self, metrics: dict):
        """Append one line to metrics.jsonl; a number that is not finite becomes null."""
        if not self.writes:
            return
        row = {k: v if math.isfinite(v) else None for k, v in ({"update": self.update} | metrics).items()}
        try:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            self.fail(f"metrics.jsonl cannot be written: {error}")
        self.track(lambda tracker: tracker.log(row, step=self.update))

    def finish(self) -> float:
        """Write what a run leaves behind, print the report; returns the final held-out accuracy."""
        from models import save_model

        if self.counters["skipped"] and not self.counters["optimizer_steps"]:
            self.fail("no optimizer step was finite")
        weights = parallel.weights(self.model.network)
        if not self.writes:
            self.close()
            return self.accuracy
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        evals, curve = [line for line in lines if "eval_accuracy" in line], self.out / "curve.png"
        try:
            keep_answers(self.args, self.model, self.update, evals[-1], self.answers)
            save_model(self.model, self.out / "model", weights)
            plot(lines, curve, f"{self.method} on {self.args.task}")
            write_trace(self.args, self.model, self.task, self.update, self.shown)
        except OSError as error:
            self.fail(f"evals.jsonl, model/, curve.png or trace.html cannot be written: {error}")
        self.track(lambda tracker: tracker.log({"curve": tracker.Image(str(curve))}, step=self.update))
        self.close()
        print_report(self.task, self.args, {"before": evals[0], "after": evals[-1]}, self.answers)
        nfe, updates, seconds = (self.counters[k] for k in ("nfe_rollout", "nfe_update", "seconds"))
        print(f"\n{seconds / 60:.1f} minutes of RL; NFE (canvases evaluated): "
              f"{nfe:,} in rollouts, {updates:,} in updates")
        print(f"{self.out}/ has trace.html (how it denoised), curve.png, metrics.jsonl, evals.jsonl (every "
              "answer), state.pt and model/ (a transformers folder)")
        print(f"next: --resume {self.out} --updates {2 * self.args.updates} goes on, "
              f"--seed {self.args.seed + 1} repeats, --help lists every setting")
        return self.accuracy


def give_signals_back():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def git_commit() -> str:
    """The commit these files are at, or "" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
