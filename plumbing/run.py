"""What happens around a method: the command line, model and task, evaluation, and a run with its folder.

`main` is what each script calls. It hands `train` of the method a FolderRun, which extends the plain Run of
common.py with checkpoints, evaluation, a clock, counters, a log and ctrl-C. The table, the boards, the curve
and the trace at the end of a run are in report.py.
"""

import fcntl
import importlib
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import tasks
from common import Denoiser, Run, Task, encode, reward_rows, roll_out
from plumbing import parallel
from plumbing.flags import parse_args
from plumbing.parallel import one_line, refuse
from plumbing.report import SHOWN, plot, print_report, trace


def main(train: Callable, Args: type, sudoku: dict, countdown: dict, llm: dict, **variants: tuple) -> float:
    """`python method.py ...`: parse, load, train or resume, evaluate, report. Returns the held-out accuracy.

    train(args, model, task, run) is the method, Args its settings. sudoku, countdown, llm and variants: what
    a run starts from, see flags.parse_args."""
    method = Path(inspect.getfile(train)).stem
    args, settings = parse_args(Args, method, sudoku, countdown, llm, **variants)
    model, task = setup(settings)
    if settings.eval_only:
        return evaluate_only(settings, model, task)
    run = FolderRun(settings, method, task)
    train(args, model, task, run)
    return run.finish()


# --------------------------------------------------------------------- model and task of the command line


def setup(settings: SimpleNamespace) -> tuple[Denoiser, Task]:
    """The model and the task, after saying what they take. Refuses what cannot work before it is loaded."""
    # here, because transformers takes seconds, and --help does without
    from plumbing.models import load_model, plan

    name = settings.model
    if name == "tiny":
        from plumbing.pretrain import kept_base

        name = str(kept_base(settings.task))
    device = parallel.start()
    arithmetic = "fp32 weights, bf16 matrix products" if device.type == "cuda" else "fp32 (no CUDA GPU found)"
    others = f", rank 0 of {parallel.world()}" if "WORLD_SIZE" in os.environ else ""
    print(f"device {device}{others}: {arithmetic}", flush=True)
    sharded, keep_whole = plan(name, settings, device)
    model = load_model(name, "cpu" if sharded else device, settings.revision, settings.mask_id,
                       settings.gradient_checkpointing)
    with_twin = vars(settings).get("beta", 0) > 0 and not settings.eval_only
    model = parallel.spread(model, device, sharded, keep_whole, with_twin)
    return model, load_task(settings, model)


def load_task(settings: SimpleNamespace, model: Denoiser) -> Task:
    """The task of the command line. Refuses prompts that do not fit the model: nothing is ever cut."""
    try:
        task = tasks.load(settings.task, chat=bool(model.tokenizer.chat_template), data=settings.data,
                          test_data=settings.test_data, train=not settings.eval_only)
    except ValueError as error:
        refuse(str(error))
    task.test = task.test[: settings.eval_rows]
    longest = sorted((row["prompt"] for row in task.train + task.test), key=len)[-256:]
    P = encode(model, longest)[0].shape[1]
    room = model.network.config.max_position_embeddings
    if P + settings.L > room:
        refuse(f"the longest prompt has {P} tokens, --L is {settings.L}: "
               f"{settings.model} reads {room} at most")
    if settings.prompts > len(task.train) and not settings.eval_only:
        refuse(f"--prompts {settings.prompts}: {settings.task} has only {len(task.train)} training prompts")
    return task


# --------------------------------------------------------------------------------------------- evaluation


def evaluate(
    settings: SimpleNamespace, model: Denoiser, task: Task, adaptive: bool = True
) -> tuple[dict, list[tuple], dict]:
    """Greedy, order top_prob, every held-out row: the same for all methods. Returns metrics, eval_* of fixed
    S and threshold_* of adaptive decoding; and of fixed S, of each row the text and whether it is correct,
    and what report.trace shows of it."""
    prompt, prompt_mask = encode(model, [row["prompt"] for row in task.test])
    metrics, answers, shown = {}, [], {}
    for kind, threshold in (("eval", None), ("threshold", settings.eval_threshold * adaptive)):
        if threshold == 0:
            continue
        before = model.counts["nfe_rollout"]
        roll = roll_out(model, prompt, prompt_mask, [], L=settings.L, S=settings.S, block=settings.block,
                        temperature=0, threshold=threshold, budget=settings.budget)
        forwards = model.total(model.counts["nfe_rollout"] - before)
        reward, parts, texts = reward_rows(model, task, roll.completion, task.test)
        answers = answers or list(zip(texts, parts["correct"].tolist(), strict=True))
        everything = vars(roll) | parts | {"reward": reward}
        shown = shown or {name: everything[name].cpu() for name in SHOWN}
        means = {"accuracy": parts["correct"], "reward": reward, "parse_fail": parts["parse_fail"]}
        metrics |= {f"{kind}_{name}": values.double().mean().item() for name, values in means.items()}
        metrics[f"{kind}_nfe_per_row"] = forwards / len(task.test)
    return metrics, answers, shown


def keep_answers(
    settings: SimpleNamespace, model: Denoiser, update: int, metrics: dict, answers: list[tuple]
):
    """Add an evaluation with every setting and answer to evals.jsonl."""
    if parallel.rank():
        return
    on_gpu = model.device.type == "cuda"
    line = metrics | {
        "update": update, "rows": len(answers), "order": "top_prob", "eval_temperature": 0.0,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        "torch": torch.__version__, "commit": git_commit(), "args": vars(settings), "answers": answers}
    with open(Path(settings.out) / "evals.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def evaluate_only(settings: SimpleNamespace, model: Denoiser, task: Task) -> float:
    """--eval_only: print the report of the model as it is; returns the held-out accuracy."""
    out, update = Path(settings.out), 0
    if settings.resume and (out / "state.pt").is_file():
        update = load_state(out, model)["update"]
    metrics, answers, shown = evaluate(settings, model, task)
    print_report(task, settings, {f"update {update}": metrics}, answers)
    out.mkdir(parents=True, exist_ok=True)
    keep_answers(settings, model, update, metrics, answers)
    write_trace(settings, model, task, update, shown)
    print(f"\n{out}/evals.jsonl has this evaluation with its settings and answers; "
          f"{out}/trace.html shows the step that revealed each token")
    return metrics["eval_accuracy"]


def write_trace(settings: SimpleNamespace, model: Denoiser, task: Task, update: int, shown: dict):
    """trace.html in the run folder: `shown` of an evaluation beside that of update 0, if it is there."""
    if parallel.rank():
        return
    name = f"after update {update}" if update else "the model as it is"
    columns, before = {name: shown}, Path(settings.out) / "before.pt"
    if update and before.exists():
        try:
            kept = torch.load(before, weights_only=True)
            columns = {"before": {name: kept[name] for name in SHOWN}} | columns
        except Exception as error:  # of any kind: the file may be anything
            print(f"{before} cannot be read, trace.html shows update {update} alone: {one_line(error)}")
    trace(before.with_name("trace.html"), model, task, settings, columns)


# -------------------------------------------------------------------------------------------------- a run


def load_state(out: Path, model: Denoiser, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Read the checkpoint of a run folder into the model and, if given, the optimizer; returns the rest."""
    try:  # mmap: without an optimizer two thirds of the file are never read
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True,
                           mmap=optimizer is None or isinstance(model, parallel.Sharded))
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


NFE = ("nfe_rollout", "nfe_rollout_full", "nfe_update", "nfe_update_full")  # as Denoiser.counts has them


class FolderRun(Run):
    """A run with a folder (args.json, metrics.jsonl, before.pt, state.pt, curve.png, trace.html, model/), a
    clock, counters and ctrl-C. Every process has one, and process 0 writes the folder."""

    def __init__(self, settings: SimpleNamespace, method: str, task: Task):
        """Take hold of the folder."""
        super().__init__(settings.updates)
        self.settings, self.method, self.task = settings, method, task
        self.out = Path(settings.out)
        self.update = 0  # updates done
        self.saved = 0  # the update of the newest checkpoint; 0 is the model the run started from
        self.counters = Counter(dict.fromkeys((*NFE, "optimizer_steps", "skipped", "seconds"), 0))
        self.skipped_in_a_row = 0
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

    def updates(self, model: Denoiser, optimizer: torch.optim.Optimizer) -> Iterator[int]:
        """Yield the updates that are still to be made. Between them: save and evaluate where due.

        The weights of a checkpoint are read here, when the loop begins, so that whatever the method copied
        from the model before it is the model before training."""
        self.model, self.optimizer = model, optimizer
        self.begin()
        while not self.boundary():
            self.counts_before, self.update_began = model.counts.copy(), time.perf_counter()
            yield self.update

    def begin(self):
        """Start the clock, in a new folder or where its checkpoint (none: the first update) left it."""
        logged = 0
        if (self.out / "state.pt").is_file():
            state = load_state(self.out, self.model, self.optimizer)
            self.update, logged = state["update"], state["metrics_bytes"]
            self.counters = Counter(state["counters"])
        if self.writes:
            self.prepare(logged)
        self.saved = self.update
        self.started = time.perf_counter() - self.counters["seconds"]
        signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.interrupt)
        self.bar = tqdm(total=self.settings.updates, initial=self.update, desc=self.method, unit="update",
                        dynamic_ncols=True)

    def prepare(self, logged: int):
        """Bring the folder to where its checkpoint left it, with `logged` bytes of metrics.jsonl."""
        log = self.out / "metrics.jsonl"
        log.touch()
        if log.stat().st_size < logged:
            refuse(f"{log} is shorter than it was at the checkpoint: {log.stat().st_size} of {logged} bytes")
        os.truncate(log, logged)  # what was logged after the checkpoint will be logged again
        (self.out / "state.new").unlink(missing_ok=True)
        settings = vars(self.settings) | {"resume": "", "method": self.method, "commit": git_commit()}
        (self.out / "args.tmp").write_text(json.dumps(settings, indent=1))
        os.replace(self.out / "args.tmp", self.out / "args.json")
        if self.settings.track:
            mark = self.out / "track_id"  # not the folder's name: another run may have had it before
            if not mark.exists():
                mark.write_text(uuid.uuid4().hex[:8])
            track_id = mark.read_text()
            own = {"id": track_id, "dir": self.out} if self.settings.track == "wandb" else {}
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
            if self.settings.track and self.writes:
                tell(importlib.import_module(self.settings.track))
        except (Exception, SystemExit) as error:
            tqdm.write(f"--track {self.settings.track} has failed, the run goes on without it: "
                       f"{one_line(error)}")
            self.settings.track = None

    def close(self):
        """Give terminal, ctrl-C, folder and tracker back."""
        self.track(lambda tracker: tracker.finish())
        self.bar.close()
        give_signals_back()
        os.close(self.lock)

    def boundary(self) -> bool:
        """Between updates: save and evaluate where due. True when all are done; exit 130 after ctrl-C.

        It saves before it evaluates, since a resumed run evaluates again, by its own schedule."""
        self.interrupted = bool(parallel.total(int(self.interrupted)))  # of any process: all stop here
        over = self.update >= self.settings.updates
        ending = over or self.interrupted
        if self.skipped_in_a_row == 0:
            self.keep()
            if self.update > self.saved and (ending or self.update % self.settings.save_every == 0):
                self.save()
        if ending:
            self.keep()
        if self.interrupted:
            parallel.total(0)  # wait for rank 0 to have written: torchrun ends it once another one has left
            self.close()
            print(f"stopped after {self.update} updates; go on: python {sys.argv[0]} --resume {self.out}")
            raise SystemExit(130)
        if over or self.update % self.settings.eval_every == 0:
            self.evaluate()
        return over

    def save(self):
        """Write state.new, if the weights are finite: a checkpoint once it has led to a finite update. It is
        the same file for any number of processes, and whether weights are sharded or not."""
        weights = parallel.weights(self.model)  # sharded: on process 0 alone
        if parallel.total(sum(not v.isfinite().all() for v in weights.values() if v is not None)):
            return tqdm.write(f"update {self.update}: weights are not finite, not saved")
        state = {"network": weights, "optimizer": parallel.moments(self.optimizer)}
        self.saved = self.update
        if not self.writes:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            os.fsync(file.fileno())  # before the checkpoint that counts its bytes
        state |= {
            "update": self.update,
            "counters": dict(self.counters),
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
        begin, counts = time.perf_counter(), self.model.counts.copy()
        adaptive = self.update in (0, self.settings.updates)
        metrics, self.answers, self.shown = evaluate(self.settings, self.model, self.task, adaptive)
        if self.update == 0 and self.writes:
            try:
                torch.save(self.shown, self.out / "before.pt")  # for trace.html, also of a resumed run
            except (OSError, RuntimeError) as error:
                self.fail(f"before.pt cannot be written: {error}")
        self.write(metrics)
        self.accuracy = metrics["eval_accuracy"]
        tqdm.write(f"update {self.update}: {self.accuracy:.1%} of the held-out rows correct")
        self.started += time.perf_counter() - begin
        self.model.counts.clear()
        self.model.counts.update(counts)

    def step(self, loss: float, max_grad_norm: float) -> float:
        """A step that is not finite is counted, on all processes alike; exit 1 after three in a row."""
        norm = super().step(loss, max_grad_norm)
        if math.isfinite(norm) and math.isfinite(loss):
            self.counters["optimizer_steps"] += 1
            self.skipped_in_a_row = 0
        else:
            self.counters["skipped"] += 1
            self.skipped_in_a_row += 1
            tqdm.write(f"update {self.update + 1}: loss {loss}, gradient norm {norm}: optimizer step skipped")
        if self.skipped_in_a_row == 3:
            self.fail("three optimizer steps in a row not finite")
        return norm

    def log(self, metrics: dict, infos: list[dict]):
        """Count an update; log it with the means of infos, the counters, the clock and the memory."""
        from plumbing.models import release_memory

        self.update += 1
        spent = self.model.counts - self.counts_before  # of this update
        nfe = {k: int(v) for k, v in parallel.total({k: spent[k] for k in NFE}).items()}
        self.counters.update(nfe)
        self.counters["seconds"] = time.perf_counter() - self.started
        seconds = {k: spent[k] for k in ("seconds_rollout", "seconds_reward")}
        seconds["seconds_update"] = time.perf_counter() - self.update_began - sum(seconds.values())
        infos = infos or [{"loss": 0.0, "grad_norm": 0.0}]  # nothing could move a weight
        means = {k: sum(info[k] for info in infos) / len(infos) for k in infos[0]}
        tokens = metrics["length"] * self.settings.prompts * self.settings.G
        speed = {"tokens_per_second": tokens / seconds["seconds_rollout"]}
        peak = torch.cuda.max_memory_allocated() if self.model.device.type == "cuda" else 0
        memory = {"peak_memory_gib": peak / 2**30}
        self.write(metrics | means | self.counters | seconds | speed | memory)
        release_memory()
        self.bar.set_postfix_str(f"reward {metrics['reward']:.3f}, {self.counters['skipped']} skipped")
        self.bar.update()

    def write(self, metrics: dict):
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
        from plumbing.models import save_model

        if self.counters["skipped"] and not self.counters["optimizer_steps"]:
            self.fail("no optimizer step was finite")
        weights = parallel.weights(self.model)
        if not self.writes:
            self.close()
            return self.accuracy
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        evals, curve = [line for line in lines if "eval_accuracy" in line], self.out / "curve.png"
        try:
            keep_answers(self.settings, self.model, self.update, evals[-1], self.answers)
            save_model(self.model, self.out / "model", weights)
            plot(lines, curve, f"{self.method} on {self.settings.task}")
            write_trace(self.settings, self.model, self.task, self.update, self.shown)
        except OSError as error:
            self.fail(f"evals.jsonl, model/, curve.png or trace.html cannot be written: {error}")
        self.track(lambda tracker: tracker.log({"curve": tracker.Image(str(curve))}, step=self.update))
        self.close()
        print_report(self.task, self.settings, {"before": evals[0], "after": evals[-1]}, self.answers)
        nfe, updates, seconds = (self.counters[k] for k in ("nfe_rollout", "nfe_update", "seconds"))
        print(f"\n{seconds / 60:.1f} minutes of RL; NFE (canvases evaluated): "
              f"{nfe:,} in rollouts, {updates:,} in updates")
        print(f"{self.out}/ has trace.html (how it denoised), curve.png, metrics.jsonl, evals.jsonl (every "
              "answer), state.pt and model/ (a transformers folder)")
        print(f"next: --resume {self.out} --updates {2 * self.settings.updates} goes on, "
              f"--seed {self.settings.seed + 1} repeats, --help lists every setting")
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
