"""One process of a run from its start to its exit code."""

import argparse
import os
import signal
import time
from collections.abc import Callable

import torch.distributed as dist

import aurora
from aurora.errors import Exit, HarnessError, is_out_of_memory
from aurora.trainer.clock import Clock
from aurora.trainer.process import die_with_launcher, first_line, print_line, report_exit
from aurora.trainer.ranks import Ranks, is_peer_failure, join_ranks, leave_ranks
from aurora.trainer.stops import stops
from aurora.trainer.watch import Watch

KINDS = {Exit.DONE: "done", Exit.PREEMPTED: "stopped"}  # what is said first of an exit; of all others "error"
IMPORT_NS = time.perf_counter_ns() - aurora.IMPORT_BEGIN_NS  # most of what a run imports


def main_as_rank(train: Callable[[argparse.Namespace, Ranks, Clock], None], args: argparse.Namespace) -> int:
    """Join the ranks, train under the watch, leave; says what went wrong and returns the exit code."""
    with stops.heard():
        return run_rank(train, args)


def run_rank(train: Callable[[argparse.Namespace, Ranks, Clock], None], args: argparse.Namespace) -> int:
    begin_ns, rank, watch = time.perf_counter_ns(), os.environ.get("RANK", "0"), None
    try:
        die_with_launcher()
        ranks = join_ranks(args.timeout_s, stops.begin_s)
        watch = Watch(ranks, args.timeout_s).started()
        stops.must_save = ranks.world_size > 1  # a rank that leaves alone would break the others
        train(args, ranks, Clock(ranks, begin_ns, IMPORT_NS))
        ranks.align()  # a process that leaves early can break a peer's last collective
        leave_ranks()
        return report_exit(0)
    except HarnessError as error:  # raised by all ranks alike once they have joined
        if rank == "0" or not dist.is_initialized():
            print_line(f"{KINDS.get(error.reason, 'error')}: {error}")
        leave_ranks()
        return report_exit(int(error.reason))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (dist.DistError, RuntimeError) as error:
        if is_out_of_memory(error):
            reason, message = Exit.CONFIG, "is out of memory, lower train.micro_batch"
        elif is_peer_failure(error):
            finding = watch.who_is_lost() if watch else ""
            reason, message = Exit.PEER, f"lost a peer: {finding}".rstrip(": ")
        else:
            report_exit(1)
            raise
        print_line(f"error: rank {rank} {message}: {first_line(error)}")
        return report_exit(int(reason))
    except Exception:  # a bug: scripts/launch.sh shall not take it for a lost rank
        report_exit(1)
        raise
    finally:
        if watch:
            watch.stop()
