"""What happens around a method: the command line, model and task, evaluation, and a run with its folder.

`main` is what each script calls. It hands `train` of the method a FolderRun, which extends the plain Run of
common.py with checkpoints, evaluation, a clock, counters, a log and ctrl-C. The table, the boards, the curve
and the trace at the end of a run are in report.py, the files of a run folder in folder.py.
"""

import contextlib
import functools
import importlib
import inspect
import json
import math
import os
import shlex
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
from safetensors import SafetensorError
from tqdm import tqdm

import tasks
from common import Denoiser, Run, Task, attention, chat_prompt, encode, reward_rows, roll_out, step_means
from plumbing import parallel
from plumbing.flags import parse_args, reads_data
from plumbing.folder import fingerprint, hold, load_checked, read_lines, write_through, write_whole
from plumbing.parallel import one_line, refuse, refused
from plumbing.report import SHOWN, comparable, plot, print_report, trace
from plumbing.surroundings import settle


def main(train: Callable, Args: type, sudoku: dict, countdown: dict, llm: dict, **variants: tuple) -> float:
    """`python method.py ...`: parse, load, train or resume, evaluate, report. Returns the held-out accuracy.

    train(args, model, task, run) is the method, Args its settings. sudoku, countdown, llm and variants: what
    a run starts from, see flags.parse_args."""
    settle()
    method, begun, run = Path(inspect.getfile(train)).stem, False, None
    try:
        args, settings = parse_args(Args, method, sudoku, countdown, llm, **variants)
        model, task = setup(settings)
        begun = True
        if settings.eval_only:
            return evaluate_only(settings, model, task)
        run = FolderRun(settings, method, task)
        train(args, model, task, run)
        return run.finish()
    except KeyboardInterrupt:  # before the first update or after the last one; between them see interrupt()
        print("\nstopped by ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    except tasks.OwnError as error:  # a reward of one's own met a text that it cannot read
        end(run, str(error))
    except OSError as error:  # a name too long, a folder that was moved, deleted or made read-only meanwhile
        if not begun:
            refuse(one_line(error))
        end(run, one_line(error))


def end(run: "FolderRun | None", why: str):
    """Exit status 1, with one line that begins behind the progress bar and not in it."""
    if run and run.bar:
        run.bar.close()
    parallel.after_rank_0()
    sys.exit(f"error: {why}")


# --------------------------------------------------------------------- model and task of the command line


def setup(settings: SimpleNamespace) -> tuple[Denoiser, Task]:
    """The model and the task, after saying what they take. Refuses what cannot work before it is loaded."""
    # here, because transformers takes seconds, and --help does without
    from plumbing.models import load_model, locate, plan

    name = settings.model
    if name == "tiny":
        from plumbing.pretrain import kept_base

        name = str(kept_base(settings.task))
    check_files(settings, {
        "model": name, "task": settings.task if settings.task.endswith(".py") else "",
        "data": settings.data if reads_data(settings) else "", "test_data": settings.test_data})
    device = parallel.start()
    arithmetic = "fp32 weights, bf16 matrix products" if device.type == "cuda" else "no CUDA GPU found"
    others = f", rank 0 of {parallel.world()}" if "WORLD_SIZE" in os.environ else ""
    print(f"device {device}{others}: {arithmetic}", flush=True)
    sharded, keep_whole = plan(name, settings, device)
    model = load_model(name, "cpu" if sharded else device, settings.revision, settings.mask_id,
                       settings.gradient_checkpointing)
    if not os.path.isdir(name):
        check_files(settings, {"model": locate(name, settings.revision)})  # of the hub, and only now here
    with_twin = vars(settings).get("beta", 0) > 0 and not settings.eval_only
    model = parallel.spread(model, device, sharded, keep_whole, with_twin)
    return model, load_task(settings, model)


def check_files(settings: SimpleNamespace, places: dict[str, str]):
    """Take the fingerprints of what the run reads; refuse what is not what a resumed run began with.

    places: of a setting, the file or folder that is meant; what is none, or not here yet, has none."""
    try:
        found = {name: fingerprint(place) for name, place in places.items() if os.path.exists(place)}
    except OSError as error:
        refuse(f"cannot read what the run needs: {one_line(error)}")
    changed = [name for name in found if found[name] != settings.fingerprints.get(name, found[name])]
    if changed:
        refuse("; ".join(f"--{name} {places[name]} is not what the run began with" for name in changed))
    settings.fingerprints = settings.fingerprints | found


def load_task(settings: SimpleNamespace, model: Denoiser) -> Task:
    """The task of the command line. Refuses prompts that do not fit the model: nothing is ever cut."""
    try:
        task = tasks.load(settings.task, chat=bool(model.tokenizer.chat_template), data=settings.data,
                          test_data=settings.test_data, train=not settings.eval_only)
    except ValueError as error:
        refuse(str(error))
    task.test = task.test[: settings.eval_rows]
    P = longest_prompt(model, [row["prompt"] for row in task.train + task.test])
    room = model.network.config.max_position_embeddings
    if P + settings.L > room:
        refuse(f"the longest prompt has {P} tokens, --L is {settings.L}: "
               f"{settings.model} reads {room} at most")
    if settings.prompts > len(task.train) and not settings.eval_only:
        refuse(f"--prompts {settings.prompts}: {settings.task} has only {len(task.train)} training prompts")
    return task


def longest_prompt(model: Denoiser, texts: list[str]) -> int:
    """Tokens of the longest prompt. All are looked at: characters do not tell, one may be several tokens.

    Refuses a text that the tokenizer has no tokens for."""
    longest = 0
    for first in range(0, len(texts), 1024):  # at once, in its threads: 1.5 s for all of gsm8k
        part = texts[first : first + 1024]
        rows = f"a prompt between row {first + 1} and {first + len(part)}"
        with refused(f"{rows} cannot be read by the model"):
            if model.tokenizer.chat_template:
                part = [chat_prompt(model, text) for text in part]
            longest = max(longest, *map(len, model.tokenizer(part, add_special_tokens=False)["input_ids"]))
    return longest


# --------------------------------------------------------------------------------------------- evaluation


def evaluate(
    settings: SimpleNamespace, model: Denoiser, task: Task, adaptive: bool = True
) -> tuple[dict, list[tuple], dict]:
    """Greedy, order top_prob, every held-out row: the same for all methods. Returns metrics, eval_* of fixed
    S and threshold_* of adaptive decoding; and of fixed S, of each row the text and whether it is correct,
    and what report.trace shows of it."""
    prompt, prompt_mask = encode(model, [row["prompt"] for row in task.test])
    metrics, answers, shown = {}, [], {}
    for kind, threshold in (("eval", None), ("threshold", settings.eval_threshold if adaptive else 0)):
        if threshold == 0:
            continue
        before = model.counts["nfe_rollout"]
        roll = roll_out(model, prompt, prompt_mask, [], L=settings.L, S=settings.S, block=settings.block,
                        temperature=0, threshold=threshold, budget=settings.budget)
        forwards = model.total(model.counts["nfe_rollout"] - before)
        reward, parts, texts = reward_rows(model, task, roll.completion, task.test)
        if kind == "eval":
            answers = list(zip(texts, parts["correct"].tolist(), strict=True))
            everything = parts | vars(roll) | {"reward": reward}  # a part may be called "entropy", too
            shown = {name: everything[name].cpu() for name in SHOWN}
        means = {"accuracy": parts["correct"], "reward": reward, "parse_fail": parts["parse_fail"]}
        metrics |= {f"{kind}_{name}": values.double().mean().item() for name, values in means.items()}
        metrics[f"{kind}_nfe_per_row"] = forwards / len(task.test)
    metrics["eval_rows"] = len(task.test)  # only evaluations of equally many rows are compared
    if adaptive:
        metrics["eval_threshold"] = settings.eval_threshold
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
    file = Path(settings.out) / "evals.jsonl"
    with open(file, "ab+") as opened:  # at its end
        opened.seek(max(0, opened.tell() - 1))
        cut_off = opened.read() not in (b"", b"\n")  # by a kill, or a full disk
        opened.write(b"\n" * cut_off + json.dumps(line).encode() + b"\n")


def evaluate_only(settings: SimpleNamespace, model: Denoiser, task: Task) -> float:
    """--eval_only: print the report of the model as it is; returns the held-out accuracy."""
    out = Path(settings.out)
    update = load_checkpoint(settings, model)["update"] if settings.resume else 0
    metrics, answers, shown = evaluate(settings, model, task)
    out.mkdir(parents=True, exist_ok=True)
    keep_answers(settings, model, update, metrics, answers)
    write_trace(settings, model, task, update, shown)
    print_report(task, settings, {f"update {update}": metrics}, answers)
    print(f"\n{out}/evals.jsonl has this evaluation with its settings and answers; "
          f"{out}/trace.html shows the step that revealed each token")
    return metrics["eval_accuracy"]


def write_trace(settings: SimpleNamespace, model: Denoiser, task: Task, update: int, shown: dict):
    """trace.html in the run folder: `shown` of an evaluation beside that of update 0, if it is there."""
    if parallel.rank():
        return
    columns = {f"after update {update}" if update else "the model as it is": shown}
    file, before = Path(settings.out) / "trace.html", Path(settings.out) / "before.pt"
    if update and before.exists():
        try:
            return trace(file, model, task, settings, {"before": read_shown(before, shown)} | columns)
        except Exception as error:  # of any kind: the file may hold anything
            print(f"{before} cannot be read, trace.html shows update {update} alone: {one_line(error)}")
    trace(file, model, task, settings, columns)


def read_shown(file: Path, like: dict) -> dict:
    """What an evaluation showed, of as many rows as `like` or other ones; ValueError for other shapes."""
    kept = load_checked(file)
    for name in SHOWN:
        if kept[name].dtype != like[name].dtype or kept[name].shape[1:] != like[name].shape[1:]:
            raise ValueError(f"{name} is {kept[name].dtype} of {tuple(kept[name].shape)}")
    if len({len(kept[name]) for name in SHOWN}) > 1:
        raise ValueError("its parts are of different rows")
    return {name: kept[name] for name in SHOWN}


# -------------------------------------------------------------------------------------------------- a run


NFE = ("nfe_rollout", "nfe_rollout_full", "nfe_update", "nfe_update_full")  # as Denoiser.counts has them
COUNTED = (*NFE, "optimizer_steps", "skipped", "seconds")  # over the whole run


def load_checkpoint(
    settings: SimpleNamespace, model: Denoiser, optimizer: torch.optim.Optimizer | None = None
) -> dict:
    """load_state() of the run's newest checkpoint. A run without one is at update 0, unless it had saved one:
    that is missed, then, and nothing is begun."""
    file, rest = Path(settings.out) / "state.pt", {"update": 0, "counters": {}, "metrics_bytes": 0}
    if file.exists():
        rest = load_state(file.parent, model, optimizer)
    if rest["update"] < settings.saved:
        there = f"of update {rest['update']}" if file.exists() else "not there"
        refuse(f"{settings.out} has saved update {settings.saved}, and {file} is {there}: put it back")
    return rest


def load_state(out: Path, model: Denoiser, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Read the checkpoint of a run folder into the model and, if given, the optimizer; returns the rest.
    Refuses what is not as it was written."""
    file = out / "state.pt"
    try:  # mmap: 96 GB at 8 B parameters, which are never in the machine's memory all at once
        state = load_checked(file, map_location="cpu", check=parallel.rank() == 0, mmap=True)
        shards, saved = model.network.state_dict(), state.pop("network")
        if parallel.rank() == 0 and not all(v.isfinite().all() for v in saved.values()):
            raise ValueError("its weights are not finite")
        if rounded := [k for k, v in saved.items() if k in shards and v.dtype != shards[k].dtype]:
            raise ValueError(f"its {rounded[0]} is {saved[rounded[0]].dtype}")  # loaded without a word
        model.network.load_state_dict({k: parallel.like(v, shards.get(k)) for k, v in saved.items()})
        if optimizer:
            all_moments = state["optimizer"]["state"]
            if state["counters"]["optimizer_steps"] and not all_moments:
                raise ValueError("it lacks the moments of Adam")
            for i, p in enumerate(optimizer.param_groups[0]["params"]):
                moments = all_moments.get(i, {})
                form = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                if moments and ({k: v.shape for k, v in moments.items()} != form or
                                {moments[k].dtype for k in ("exp_avg", "exp_avg_sq")} != {p.dtype}):
                    raise ValueError(f"moments of Adam do not fit to parameter {i}")
                moments.update({k: parallel.like(v, p) for k, v in moments.items() if v.shape == p.shape})
            optimizer.load_state_dict(state["optimizer"])
        rest = {k: state[k] for k in ("update", "counters", "metrics_bytes")}
        numbers = [rest["update"], rest["metrics_bytes"], *(rest["counters"][k] for k in COUNTED)]
        if {type(n) for n in numbers[:2]} != {int} or not all(0 <= n < math.inf for n in numbers):
            raise ValueError(f"its counters are {numbers}")
        return rest
    except Exception as error:  # of any kind: the file may be anything
        refuse(f"{file} cannot be used: {one_line(error)}")


# A signal after which a run saves and stops: ctrl-C, kill, a closed terminal, and what schedulers warn with.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class FolderRun(Run):
    """A run with a folder (args.json, metrics.jsonl, evals.jsonl, before.pt, state.pt, curve.png, trace.html,
    model/), a clock, counters and ctrl-C. Every process has one, and process 0 writes the folder."""

    def __init__(self, settings: SimpleNamespace, method: str, task: Task):
        """Take hold of the folder."""
        super().__init__(settings.updates)
        self.settings, self.method, self.task = settings, method, task
        self.out = Path(settings.out)
        self.update = 0  # updates done
        self.saved = 0  # the update of the newest state.new or state.pt; 0: the model the run started from
        self.counters = Counter(dict.fromkeys(COUNTED, 0))
        self.skipped_in_a_row = 0
        self.interrupted = 0.0  # when it was asked to stop
        self.bar = None  # until the first update
        self.tracker = settings.track  # None once it has failed; a resumed run tries again
        self.writes = parallel.rank() == 0
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self.lock = hold(self.out) if self.writes else os.open(self.out, os.O_RDONLY)
        except BlockingIOError:
            refuse(f"another process is at work in {self.out}")

    def updates(self, model: Denoiser, optimizer: torch.optim.Optimizer) -> Iterator[int]:
        """Yield the updates that are still to be made. Between them: save and evaluate where due.

        The weights of a checkpoint are read here, when the loop begins, so that whatever the method copied
        from the model before it is the model before training."""
        self.model, self.optimizer, self.lr = model, optimizer, optimizer.param_groups[0]["lr"]
        self.begin()
        while not self.boundary():
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.counts_before, self.update_began = model.counts.copy(), time.perf_counter()
            yield self.update

    def begin(self):
        """Start the clock, in a new folder or where its checkpoint (none: the first update) left it."""
        state = load_checkpoint(self.settings, self.model, self.optimizer)
        self.update = self.saved = self.first = state["update"]
        self.counters.update(state["counters"])
        if self.update > self.settings.updates:
            refuse(f"{self.out} has made {self.update} updates, more than --updates {self.settings.updates}")
        if self.writes:
            try:
                self.prepare(state["metrics_bytes"])
            except OSError as error:
                refuse(f"{self.out} cannot be written to: {one_line(error)}")
        self.seconds_before = self.counters["seconds"]
        self.started = time.perf_counter() - self.seconds_before
        heard = [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]  # nohup
        self.handlers = {n: signal.signal(n, self.interrupt) for n in heard}
        self.bar = tqdm(total=self.settings.updates, initial=self.update, desc=self.method, unit="update",
                        dynamic_ncols=True)

    def prepare(self, logged: int):
        """Bring the folder to where its checkpoint left it, with `logged` bytes of metrics.jsonl. Nothing is
        changed before all is known to fit together."""
        log = self.out / "metrics.jsonl"
        if log.exists() and not log.is_file():
            refuse(f"{log} is no file")
        held = log.read_bytes()[:logged] if log.exists() else b""
        if len(held) < logged:
            refuse(f"{log} is shorter than it was at the checkpoint: {len(held)} of {logged} bytes")
        try:
            lines = read_lines(held)
        except ValueError as error:
            refuse(f"{log} cannot be used: {error}")
        if (lines[-1]["update"] if lines else 0) != self.update:
            refuse(f"{log} is not that of the checkpoint, which was made after update {self.update}")
        (self.out / "state.new").unlink(missing_ok=True)
        self.write_settings()
        with open(log, "ab") as file:
            file.truncate(logged)  # what was logged after the checkpoint will be logged again
        if self.tracker:
            mark = self.out / "track_id"  # not the folder's name: another run may have had it before
            if not mark.exists():
                mark.write_text(uuid.uuid4().hex[:8])
            track_id = mark.read_text(errors="replace")
            own = {"id": track_id, "dir": self.out} if self.tracker == "wandb" else {}
            config = {k: v for k, v in self.kept().items() if k != "saved"}
            self.track(lambda tracker: tracker.init(
                project="diffusion-rl", name=f"{self.out.resolve().name}-{track_id}", config=config,
                resume="allow", **own))

    def kept(self) -> dict:
        """What args.json holds."""
        return vars(self.settings) | {"resume": "", "method": self.method, "commit": git_commit()}

    def write_settings(self):
        """Write args.json."""
        text = json.dumps(self.kept(), indent=1)
        write_whole(self.out / "args.json", lambda file: file.write(text.encode()))

    def interrupt(self, number: int, frame):
        """First ctrl-C, or another of SIGNALS: finish this update and save. Second ctrl-C or kill: stop at
        once, the last checkpoint stays."""
        name = signal.Signals(number).name
        again = time.monotonic() - self.interrupted if self.interrupted else None
        self.interrupted = self.interrupted or time.monotonic()
        if again is None:
            self.tell(f"{name}: finishing this update, then saving (once more: stop at once)")
        elif again > 1 and number in (signal.SIGINT, signal.SIGTERM):  # `timeout` sends two at a time
            self.tell(f"{name}: stopped at once, the last checkpoint stays")
            raise SystemExit(128 + number)

    def tell(self, text: str):
        """Print from inside a signal handler, unless that fell into the middle of another print."""
        with contextlib.suppress(RuntimeError):
            tqdm.write(text)

    def track(self, tell: Callable):
        """tell(the module of --track), if there is one. A tracker that fails is left, and the run goes on."""
        try:
            if self.tracker and self.writes:
                tell(importlib.import_module(self.tracker))
        except (Exception, SystemExit) as error:
            tqdm.write(f"--track {self.tracker} has failed, the run goes on without it: {one_line(error)}")
            self.tracker = None

    def close(self):
        """Give terminal, signals, folder and tracker back."""
        self.track(lambda tracker: tracker.finish())
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        os.close(self.lock)

    def boundary(self) -> bool:
        """Between updates: save and evaluate where due. True when all are done or --minutes are over; exit
        130 after ctrl-C.

        It saves before it evaluates, since a resumed run evaluates again, by its own schedule."""
        spent = self.counters["seconds"] - self.seconds_before
        late = self.update > self.first and 0 < 60 * self.settings.minutes <= spent
        asked = parallel.total({"stop": bool(self.interrupted), "late": late})  # any process: all stop here
        over = self.update >= self.settings.updates or bool(asked["late"])
        ending = over or bool(asked["stop"])
        if self.skipped_in_a_row == 0:
            self.keep()
            if self.update > self.saved and (ending or self.update % self.settings.save_every == 0):
                self.save()
        if ending:
            self.keep_last()
        if asked["stop"]:
            parallel.total(0)  # wait for rank 0 to have written: torchrun ends it once another one has left
            self.close()
            print(f"stopped after {self.update} updates; go on: {self.command()}")
            raise SystemExit(130)
        if over or self.update % self.settings.eval_every == 0:
            self.evaluate(adaptive=over or self.update == 0)
        return over

    def command(self) -> str:
        """The command that goes on with this run."""
        return f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(self.out))}"

    def save(self):
        """Write state.new, if the weights are finite. It becomes the checkpoint once a finite update follows.
        It is the same file for any number of processes, and whether weights are sharded or not."""
        weights = parallel.weights(self.model)  # sharded: on process 0 alone
        if parallel.total(sum(not v.isfinite().all() for v in weights.values() if v is not None)):
            return tqdm.write(f"update {self.update}: weights are not finite, not saved")
        state = {"network": weights, "optimizer": parallel.moments(self.optimizer)}
        self.saved = self.update
        if not self.writes:
            return
        with self.writing(f"the checkpoint of update {self.update}"):
            with open(self.out / "metrics.jsonl", "rb+") as file:
                os.fsync(file.fileno())  # before the checkpoint that counts its bytes
                state |= {"update": self.update, "counters": dict(self.counters),
                          "metrics_bytes": file.seek(0, os.SEEK_END)}
            write_through(self.out / "state.new", lambda file: torch.save(state, file))

    def keep(self):
        """Make state.new the checkpoint: on disk is either the old one or the new one, never half of one."""
        if self.writes and (self.out / "state.new").exists():
            with self.writing("the checkpoint"):
                os.replace(self.out / "state.new", self.out / "state.pt")
                self.settings.saved = self.saved
                self.write_settings()

    def keep_last(self):
        """As keep(), where no update follows to show that the weights are good: they must be finite, and so
        must be what they predict of a held-out prompt. Else exit 1, and the checkpoint before stays."""
        prompt, prompt_mask = encode(self.model, [self.task.test[0]["prompt"]])
        hidden = torch.full((1, self.settings.L), self.model.mask_id, device=prompt.device)
        with torch.no_grad(), self.model.rolling_out():
            h = self.model.body(torch.cat([prompt, hidden], 1), attention(prompt_mask, self.settings.L))
            predicted = self.model.head(h[:, -1]).logsumexp(-1)  # of probabilities without a NaN it is finite
        weights = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.network.parameters()]
        if parallel.total(sum(not t.isfinite().all() for t in [predicted, *weights])):
            if self.writes:
                with contextlib.suppress(OSError):
                    (self.out / "state.new").unlink()
            self.fail(f"after update {self.update} the weights, or what they predict, are NaN or inf")
        self.keep()

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """What keeps files from being written inside (a full disk, a folder that was moved) ends the run."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own for a disk
            self.fail(f"{what} cannot be written: {one_line(error)}")

    def fail(self, why: str):
        """Stop with exit status 1 and say what is left."""
        self.close()
        parallel.after_rank_0()
        kept = "keeps the last good checkpoint" if (self.out / "state.pt").exists() else "has no checkpoint"
        sys.exit(f"error: {why}; {self.out} {kept}")

    def evaluate(self, adaptive: bool):
        """Evaluate (adaptively at the start and the end alone) and log; the run's clock stands still."""
        begin, counts = time.perf_counter(), self.model.counts.copy()
        metrics, self.answers, self.shown = evaluate(self.settings, self.model, self.task, adaptive)
        if self.update == 0 and self.writes:
            with self.writing("before.pt"):  # for trace.html, also of a resumed run
                write_whole(self.out / "before.pt", lambda file: torch.save(self.shown, file))
        self.write(metrics)
        self.accuracy = metrics["eval_accuracy"]
        tqdm.write(f"update {self.update}: {self.accuracy:.1%} of the held-out rows correct")
        self.started += time.perf_counter() - begin
        self.model.counts.clear()
        self.model.counts.update(counts)

    def step(self, loss: float, max_grad_norm: float, warmup: int = 0) -> float:
        """A step that is not finite is counted, on all processes alike; exit 1 after three in a row."""
        norm = super().step(loss, max_grad_norm, warmup)
        if math.isfinite(norm) and math.isfinite(loss):
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
        tokens = metrics["length"] * self.settings.prompts * self.settings.G
        speed = {"tokens_per_second": tokens / seconds["seconds_rollout"]}
        peak = torch.cuda.max_memory_allocated() if self.model.device.type == "cuda" else 0
        memory = {"peak_memory_gib": peak / 2**30}
        self.write(metrics | step_means(infos) | self.counters | seconds | speed | memory)
        release_memory()
        self.bar.set_postfix_str(f"reward {metrics['reward']:.3f}, {self.counters['skipped']} skipped")
        self.bar.update()

    def write(self, metrics: dict):
        """Append one line to metrics.jsonl; a number that is not finite becomes null."""
        if not self.writes:
            return
        row = {k: v if math.isfinite(v) else None for k, v in ({"update": self.update} | metrics).items()}
        with self.writing("metrics.jsonl"), open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
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
        curve = self.out / "curve.png"
        with self.writing("evals.jsonl, model/, curve.png or trace.html"):
            save_model(self.model, self.out / "model", weights)
            try:
                lines = comparable(read_lines((self.out / "metrics.jsonl").read_bytes()))
            except ValueError as error:  # another program has written into it since the run began
                self.fail(f"model/ is written, and metrics.jsonl cannot be used: {error}")
            evals = [line for line in lines if "eval_accuracy" in line]
            keep_answers(self.settings, self.model, self.update, evals[-1], self.answers)
            plot(lines, curve, f"{self.method} on {Path(self.settings.task).stem}")
            write_trace(self.settings, self.model, self.task, self.update, self.shown)
        self.track(lambda tracker: tracker.log({"curve": tracker.Image(str(curve))}, step=self.update))
        self.close()
        before = {"before": evals[0]} if evals[0]["update"] == 0 and self.update else {}
        print_report(self.task, self.settings, before | {"after": evals[-1]}, self.answers)
        if evals[0]["update"]:
            print("(the model before training was evaluated on other rows, which are not comparable)")
        print(f"\n{self.counters['seconds'] / 60:.1f} minutes of RL; NFE (canvases evaluated): "
              f"{self.counters['nfe_rollout']:,} in rollouts, {self.counters['nfe_update']:,} in updates")
        print(f"{self.out}/ has trace.html (how it denoised), curve.png, metrics.jsonl, evals.jsonl (every "
              "answer), state.pt and model/ (a transformers folder)")
        wanted = self.settings.updates
        if self.update < wanted:
            print(f"--minutes {self.settings.minutes:g} are over after {self.update} of {wanted} updates")
        longer = f" --updates {2 * wanted}" if self.update == wanted else ""
        print(f"next: --resume {shlex.quote(str(self.out))}{longer} goes on, "
              f"--seed {self.settings.seed + 1} repeats, --help lists every setting")
        return self.accuracy


@functools.cache
def git_commit() -> str:
    """The commit these files are at, or "" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
