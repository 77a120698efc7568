"""From a command line to a run that is ready to be warmed up: checks, data, weights, folder, checkpoint."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import aurora
from aurora.config import ROOT, Config, ModelConfig, is_path, parse_config, read_track
from aurora.errors import Exit, HarnessError
from aurora.fast import hopper
from aurora.fast.float8 import check_float8
from aurora.fast.mirror import edits
from aurora.schedule import ROLES, pieces_of
from aurora.tokens.loader import RunData, TokenLoader, open_run_data
from aurora.tokens.shards import ShardError
from aurora.trainer.batch import BatchPlan, plan_batch, stage
from aurora.trainer.checkpoint import check_may_begin, newest_checkpoint, take_over
from aurora.trainer.clock import Clock
from aurora.trainer.cost import time_lines
from aurora.trainer.describe import check_same_start, device_name, dry_run_report, greeting, run_event
from aurora.trainer.memory import params_by_role
from aurora.trainer.momentum import Dump, checked_dump
from aurora.trainer.optimizers import (
    build_optimizers,
    checked_hparams,
    fix_polar_dtype,
    is_rule_of_ours,
    probe_rule,
    stand_ins,
)
from aurora.trainer.probe import force_eager
from aurora.trainer.process import check_writable, lock_folder
from aurora.trainer.ranks import Ranks, digest
from aurora.trainer.state import Run

if TYPE_CHECKING:
    from train_gpt import GPT

MakeModel = Callable[[ModelConfig], "GPT"]
Scheduled = Callable[[int, dict[str, Any], Config], dict[str, float]]  # of train_gpt.py


class Checked(NamedTuple):
    """What to run, once it is checked."""

    config: Config
    plan: BatchPlan
    dump: Dump | None  # what --dump-momentum asks for
    track: str = ""  # the text that was parsed
    no_resume: str = ""  # see Run


def check_run(args: argparse.Namespace, ranks: Ranks, make_model: MakeModel, scheduled: Scheduled) -> Checked:
    """Check the command line and its config before anything is read or written; prints a dry run's report. Collective.

    Raises:
        HarnessError: CONFIG.
    """

    def check() -> Checked:
        if not 0 <= args.seed < 2**63:
            raise HarnessError(Exit.CONFIG, f"--seed must be in [0, 2^63), got {args.seed}")
        track = read_track(args.config)
        config = parse_config(track, args.config, args.optimizer, args.overrides)
        config, plan, params, optimizers = check_config(config, ranks.world_size, make_model, scheduled)
        used = (f"optimizer.{config.optimizer}.", *(["optimizer.adamw."] if is_path(config.rule) else []))
        for override in args.overrides:
            is_of_another = override.startswith("optimizer.") and not override.startswith(used)
            if is_of_another or is_superseded(override, track, args):
                ranks.say(f"--set {override} changes nothing for {config.optimizer}")
        no_resume = "" if aurora.is_ours(optimizers[0]) else probe_rule(config, params, ranks.device)
        if no_resume:
            check_no_checkpoints(config, no_resume)
            ranks.say(f"{config.optimizer} is not resumable, so no checkpoint is written: {no_resume}")
        if config.model.head_dtype == "float8":
            check_float8(ranks.device)
        if config.train.shard == "fsdp2" or config.train.recompute:
            from aurora.trainer.fsdp import check_fsdp

            check_fsdp(config, bool(args.dump_momentum))
        dump = args.dump_momentum and checked_dump(optimizers[0], config.train.steps, *args.dump_momentum)
        if args.dry_run:
            ranks.say(dry_run_report(config, params, optimizers, ranks.world_size, plan.micro_steps, plan.micro_batch))
            terms = params_by_role(params), ranks.world_size, device_name(ranks.device), args.price_per_gpu_hour
            ranks.say("\n".join(time_lines(config, *terms)))
        return Checked(config, plan, dump, track, no_resume)

    return ranks.all_or_none(check)


def is_superseded(override: str, track: str, args: argparse.Namespace) -> bool:
    """Whether it is of [schedule], and the optimizer's own schedule stands in its place."""
    if not override.startswith("schedule."):
        return False
    others = [other for other in args.overrides if other != override]
    try:
        without = parse_config(track, args.config, args.optimizer, others)
    except HarnessError:  # it is needed
        return False
    return without == parse_config(track, args.config, args.optimizer, args.overrides)


def check_config(
    config: Config, world_size: int, make_model: MakeModel, scheduled: Scheduled
) -> tuple[Config, BatchPlan, list[aurora.Param], list[torch.optim.Optimizer]]:
    """The config with all hyper-parameters, its batch, parameters and optimizers without memory. Or HarnessError."""
    config = dataclasses.replace(config, hparams=checked_hparams(config))
    check_schedule(config, scheduled)
    plan = plan_batch(config, world_size)
    with torch.device("meta"):
        params = make_model(config.model).roles()
    optimizers = build_optimizers(config, params if is_rule_of_ours(config) else stand_ins(params))
    return config, plan, params, optimizers


def check_no_checkpoints(config: Config, no_resume: str) -> None:
    """Raise HarnessError where a run that cannot go on from a checkpoint shall write one."""
    if config.train.checkpoint_every:
        message = f"train.checkpoint_every is {config.train.checkpoint_every}, but {config.optimizer} is not resumable"
        raise HarnessError(Exit.CONFIG, f"{message}: {no_resume}; set it to 0")


def check_schedule(config: Config, scheduled: Scheduled) -> None:
    """Raise HarnessError for a learning rate of the short form that never gets to its peak."""
    roles = [role for role in ROLES if not pieces_of(vars(config.schedule), role, "lr")]
    if not roles:
        return
    steps, group = config.train.steps, {"role": roles[0], "peak_lr": 1.0}
    looks = {*range(0, steps, 1 + steps // 10_000), config.warmup_steps - 1, config.warmup_steps}  # where it may peak
    scales = [scheduled(step, group, config)["lr"] for step in looks if 0 <= step < steps]
    if not all(0 <= scale <= 1 for scale in scales) or max(scales) < 1:
        raise HarnessError(
            Exit.CONFIG,
            f"the learning rate goes up to {max(scales):.3g} of its peak: optimizer.{config.optimizer}.warmup_steps = "
            f"{config.warmup_steps} and schedule.cooldown_frac = {config.schedule.cooldown_frac} leave no step for it "
            f"in train.steps = {config.train.steps}",
        )


@contextlib.contextmanager
def open_run(
    args: argparse.Namespace, checked: Checked, ranks: Ranks, clock: Clock, make_model: MakeModel
) -> Iterator[Run]:
    """The run, in a folder that no other process uses meanwhile: before its first step, or before it goes on from
    run.checkpoint. Collective.

    Raises:
        HarnessError: data, folder or checkpoint cannot be used, or ranks differ.
    """
    ranks.all_or_none(lambda: check_writable(args.out))
    lock = ranks.all_or_none(lambda: lock_folder(args.out) if ranks.is_main else None)
    with lock or contextlib.nullcontext(), contextlib.ExitStack() as stack:
        data = ranks.all_or_none(lambda: open_data(checked.config))
        torch.manual_seed(args.seed)  # nothing draws from it; if ever something does, all ranks and segments agree
        run = new_run(args, checked, data, ranks, clock, make_model)
        if run.is_external and not run.may_compile:  # it may compile its own steps
            stack.enter_context(force_eager())
        if hopper.suits(run.config, ranks.device):
            hopper.import_kernels()  # now, so that the run event embeds them
        run.start = run_event(run, args.config, checked.track, args.seed, data)
        check_same_start(run)
        if run.start["git"] is None and (ROOT / ".git").exists():
            ranks.say("warning: git does not tell the commit of this checkout, so the record has none")
        find_checkpoint = lambda: newest_checkpoint(args.out, run.start, ranks.say)  # noqa: E731
        run.checkpoint = ranks.all_or_none(find_checkpoint) if args.resume else None
        ranks.check_agree(checkpoint_step=run.checkpoint["step"] if run.checkpoint else None)
        run.start["run_id"] = ranks.all_gather_object((run.checkpoint or run.start)["run_id"])[0]
        is_auto = run.config.train.micro_batch == "auto"
        if run.checkpoint and is_auto and run.checkpoint["world_size"] == ranks.world_size:
            try:
                run.plan = plan_batch(run.config, ranks.world_size, run.checkpoint["micro_batch"])  # found before
            except HarnessError as error:
                message = f"--resume: the checkpoint does not fit this run: its {error}; start over in another --out"
                raise HarnessError(Exit.CHECKPOINT, message) from error
        if args.resume and not run.checkpoint:
            ranks.all_or_none(lambda: check_may_begin(args.out, run.start, run.no_resume) if ranks.is_main else None)
            ranks.say(f"resume: no unfinished run with a checkpoint in {args.out}, starting at step 0")
        ranks.say(greeting(run.start))
        clock.charge("setup")
        yield run


def open_data(config: Config) -> RunData:
    data, train = config.data, config.train
    sizes = train.steps, train.batch_tokens, config.eval.tokens, config.model.vocab_size
    try:
        return open_run_data(data.train, data.val, *sizes, data.allow_epochs)
    except ShardError as error:
        raise HarnessError(Exit.DATA, str(error)) from error


def new_run(
    args: argparse.Namespace, checked: Checked, data: RunData, ranks: Ranks, clock: Clock, make_model: MakeModel
) -> Run:
    """The state before the first step. Collective."""
    config = checked.config
    model = make_model(config.model)
    model.init_weights(args.seed, config.projection_init)
    model_edits = None
    if config.train.shard == "fsdp2":
        from aurora.trainer.fsdp import recompute_blocks, split_model

        model_edits = edits(model)
        if config.train.recompute:
            recompute_blocks(model)
        if ranks.world_size > 1:
            ranks.check_agree(weights=digest(model.state_dict()))
            split_model(model, config, ranks)  # each block goes to the device by itself
    model.to(ranks.device)
    optimizers = build_optimizers(config, model.roles())
    fix_polar_dtype(optimizers, ranks)
    loader = TokenLoader(
        data.train_shards,
        config.train.batch_tokens,
        ranks.rank,
        ranks.world_size,
        prepare=lambda window: stage(window, ranks.device),  # by the loader's thread, while a step runs
        allow_epochs=config.data.allow_epochs,
    )
    run = Run(config, checked.plan, ranks, clock, model, optimizers, loader, data.val_tokens, args.out)
    run.model_edits = model_edits
    run.no_resume = run.guard.no_resume = checked.no_resume
    return run


def resume(run: Run, validation_steps: Iterable[int]) -> None:
    """Take over the checkpoint that open_run() found, if any. Collective. validation_steps: of the whole run."""
    if run.checkpoint:
        checkpoint, run.checkpoint = run.checkpoint, None
        run.progress = run.ranks.all_or_none(lambda: take_over(checkpoint, run, validation_steps))
        run.ranks.say(
            f"resume: from step {run.progress.step} of {run.start['run_id']}, segment {run.progress.segments}"
        )
