"""Mirroring a run's metrics to Weights & Biases.

wandb lives in a child process that reads events from a pipe. So it takes no time from the trainer's interpreter, and
whatever it does (raise, hang, exit, crash) costs the run one warning. Run as a program, this file is that child.
"""

import json
import os
import signal
import subprocess
import sys
from typing import Any

# wandb tries an unreachable server again for more than an hour; no call gets longer than this. Uploads of a run that
# ends go on for as long, and what is left can be sent with `wandb sync`.
CALL_LIMIT_S = 60
INIT_LIMIT_S = 30
# What a run does not need to be told apart by in wandb, and megabytes of it.
NOT_CONFIG = ("event", "schema", "sources", "param_groups")


class Tracker:
    """Mirrors metrics to wandb on rank 0. A wandb that is missing, broken or unreachable costs one warning."""

    def __init__(self, mode: str, event: dict[str, Any], is_writer: bool):
        """Start wandb and wait until it is ready or has failed, as it must not compete with timed steps.

        mode: online, offline or off.
        event: the run's first event, see aurora/trainer/describe.py.
        """
        self.child: subprocess.Popen | None = None
        if mode == "off" or not is_writer:
            return
        try:
            # -P: this file's folder must not hide modules of the same name. A session of its own: Ctrl-C is the run's.
            command = [sys.executable, "-P", __file__]
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
            config = {key: value for key, value in event.items() if key not in NOT_CONFIG}
            self._send({"mode": mode, "run_id": event["run_id"], "group": event["task_hash"][:12], "config": config})
            if self.child is None:
                return
            assert self.child.stdin and self.child.stdout  # pipes, as asked for
            if not self.child.stdout.readline():
                self._close()
            else:
                # From here a child that does not read must not stop the run.
                os.set_blocking(self.child.stdin.fileno(), False)
        except OSError as error:
            self.child = None
            warn(f"cannot start {command[0]}: {error.strerror}")

    def log(self, *events: dict[str, Any]) -> None:
        """Pass events on; never waits."""
        for event in events:
            self._send(event)

    def finish(self) -> None:
        """Wait for the last uploads, at most CALL_LIMIT_S."""
        self._close()

    def _send(self, value: dict[str, Any]) -> None:
        if self.child is None:
            return
        assert self.child.stdin
        line = (json.dumps(value) + "\n").encode()
        try:
            is_whole = self.child.stdin.write(line) == len(line)
        except OSError:  # the child has ended
            self._close()
            return
        if not is_whole:  # the pipe is full
            self.child.kill()
            self._close()

    def _close(self) -> None:
        if self.child is None:
            return
        child, self.child = self.child, None
        assert child.stdin and child.stdout
        child.stdin.close()
        child.stdout.close()
        exit_code = child.wait()
        if exit_code == 0:  # it has told itself, or all went well
            return
        is_timeout = exit_code == -signal.SIGALRM
        warn(f"a call took more than {CALL_LIMIT_S} s" if is_timeout else f"its process ended with {exit_code}")


def warn(finding: object) -> None:
    print(f"warning: wandb is off from here: {' '.join(str(finding).split())}", file=sys.stderr, flush=True)


def mirror() -> None:
    """The child: the first line says which run it is, every other is an event with a step, the end ends the run."""
    signal.alarm(CALL_LIMIT_S)
    start = json.loads(sys.stdin.buffer.readline())
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "nanogpt-speedrun"),
        group=start["group"],
        name=start["run_id"],
        id=start["run_id"],
        tags=[start["config"]["optimizer"]],
        resume="allow",
        mode=start["mode"],
        config=start["config"],
        settings=wandb.Settings(
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_LIMIT_S)),
            silent=True,
            console="off",
            x_disable_stats=True,  # sampling the GPU would disturb the timing
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    where = run.url if start["mode"] == "online" else f"offline; send it with: wandb sync {os.path.dirname(run.dir)}"
    print(f"wandb: {where}", file=sys.stderr)
    signal.alarm(0)
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        event = json.loads(line)
        values = event | event.get("scheduled", {})
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and key != "step"}
        metrics = {f"{event['event']}/{key}": value for key, value in numbers.items()}
        signal.alarm(CALL_LIMIT_S)
        run.log(metrics | {"step": event["step"]})
        signal.alarm(0)
    signal.alarm(CALL_LIMIT_S)
    run.finish()


if __name__ == "__main__":
    try:
        mirror()
    except ImportError as error:
        warn(f"{error}; pip install -e '.[tracking]'")
    except Exception as error:  # whatever wandb raises, the run is worth more
        warn(error)
    sys.stderr.flush()
    os._exit(0)  # no exit handler of wandb may wait again
