"""Which forward pass a run uses, and the warm-up: everything runs once, is checked, and is undone.

The first of these that works: the fast forward with Triton kernels or with blocked attention, compiled; the model
itself, compiled; the fast forward, eager; the model itself. The fast ones only for the model that they were made for
(aurora/fast/mirror.py).
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aurora.errors import Exit, HarnessError, is_out_of_memory
from aurora.fast import hopper
from aurora.fast.attention import blocked_pays, choose_attention
from aurora.fast.forward import FastForward
from aurora.fast.mirror import edits
from aurora.optim.stacks import gradients_of
from aurora.trainer.attempt import Unusable, WrongNumbers, attempt
from aurora.trainer.batch import BatchPlan, to_device
from aurora.trainer.memory import fit_micro_batch
from aurora.trainer.optimizers import build_optimizers
from aurora.trainer.process import first_line, print_line
from aurora.trainer.ranks import digest
from aurora.trainer.state import Run

if TYPE_CHECKING:
    from train_gpt import GPT

WARMUP_STEPS = 2
Model = Callable[[Tensor, Tensor], Tensor]  # takes inputs and targets (B, T) to the summed loss
ForwardBackward = Callable[[Run, Model, Tensor, Tensor], Tensor]


class Way(NamedTuple):
    """One way of computing the model."""

    how: str  # for the console
    make: Callable[[], Model]
    is_compiled: bool
    is_fast: bool
    has_kernels: bool = False
    attention: str = ""  # other than what choose_attention() had torch use


def prepare(run: Run, forward_backward: ForwardBackward) -> Model:
    """What to call in the place of the model: warmed up, equal to the model, and named in the run event. Collective.

    Raises:
        HarnessError: CONFIG, train.compile = "on" and no compiled way works.
    """
    run.timeline.mark("warm_up", 0)
    changes = edits(run.model) if run.model_edits is None else run.model_edits
    run.start["attention"] = choose_attention(run.config.model, run.ranks.device)
    run.ranks.check_agree(attention=run.start["attention"], model_edits=changes)
    name = f"model edited ({'; '.join(changes[:3])}{', ...' * (len(changes) > 3)})" if changes else "model"
    reason, mode = "", f"train.compile = {run.config.train.compile!r} on {run.ranks.device.type}"
    for way in ways(run, is_edited=bool(changes)):
        try:
            model = warmed_up(way, run, forward_backward)
        except Unusable as error:
            reason = str(error)
            run.ranks.say(f"no {way.how}, for {reason}")
            continue
        how = way.how if way.is_compiled or reason else f"{way.how} ({mode})"
        plan = run.plan
        run.ranks.say(f"{name}: {how}; micro-batch {plan.micro_batch}, {plan.micro_steps} a step")
        found = {
            "compiled": way.is_compiled,
            "forward": "fast" if way.is_fast else "plain",
            "kernels": "triton" if way.has_kernels else "torch",
            "attention": way.attention or run.start["attention"],
            "model_edits": changes,
            "micro_batch": plan.micro_batch,
        }
        run.start |= found
        run.guard.must_stay_unedited = way.is_fast
        run.ranks.check_agree(**found)
        return model
    raise HarnessError(Exit.CONFIG, f"train.compile = 'on', but {reason}; set it to 'off'")


def ways(run: Run, is_edited: bool) -> Iterator[Way]:
    """From the fastest on."""
    device, model = run.ranks.device, run.model
    by_blocks = " block by block" * (run.ranks.world_size > 1)
    # fully_shard gathers weights, and recompute computes blocks again, where modules are called.
    may_be_fast = not is_edited and not run.is_split and not run.config.train.recompute
    attention = "blocked" if may_be_fast and blocks_attention(run) else ""
    if run.may_compile:
        if not is_edited and hopper.suits(run.config, device):
            how = f"compiled{by_blocks}, fast forward with Triton kernels"
            yield Way(how, lambda: compiled_fast(hopper.HopperForward(model), run), True, True, has_kernels=True)
        if attention:
            how = f"compiled{by_blocks}, fast forward"
            yield Way(how, lambda: compiled_fast(FastForward(model, attention), run), True, True, attention=attention)
        yield Way(f"compiled{by_blocks}, plain forward", lambda: compiled_plain(model, run), True, False)
        if run.config.train.compile == "on":
            return
    if may_be_fast:
        if attention:
            yield Way("eager, fast forward", lambda: FastForward(model, attention), False, True, attention=attention)
        yield Way("eager, fast forward", lambda: FastForward(model), False, True)
    yield Way("eager, plain forward", lambda: model, False, False)


def blocks_attention(run: Run) -> bool:
    """Whether attention is blocked, which is measured where the run began: its bits depend on it. Collective."""
    if run.ranks.device.type != "cpu":
        return False
    if run.checkpoint:
        return run.checkpoint.get("attention") == "blocked"
    return run.ranks.all_gather_object(run.ranks.is_main and blocked_pays(run.config.model))[0]


def compiled_plain(model: "GPT", run: Run) -> Model:
    """The model compiled: as one graph, or with several ranks one for each block and one for the loss.

    A graph of the whole model hands its gradients over at its end, all at once. Block by block they arrive early, and
    their sum over ranks can begin.
    """
    if run.ranks.world_size == 1:
        return torch.compile(model, dynamic=False)
    tensors = [*model.parameters(), *model.buffers()]
    try:
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # the model itself stays eager
    except RuntimeError as error:  # it keeps a tensor that is neither
        raise Unusable(f"the model cannot be copied: {first_line(error)}") from error
    for block in getattr(twin, "blocks", []):
        block.compile(dynamic=False)
    if hasattr(twin, "loss"):
        compile_methods(twin, "loss")

    def call(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        if twin.training != model.training:
            twin.train(model.training)
        return twin(inputs_BT, targets_BT)

    return call


def compiled_fast(fast: FastForward, run: Run) -> Model:
    """As compiled_plain()."""
    hopper.shorten_compiler_errors()
    if run.ranks.world_size == 1:
        return torch.compile(fast.__call__, dynamic=False)
    compile_methods(fast, "block", "loss")
    return fast


def compile_methods(of: object, *names: str) -> None:
    for name in names:
        setattr(of, name, torch.compile(getattr(of, name), dynamic=False))


def warmed_up(way: Way, run: Run, forward_backward: ForwardBackward) -> Model:
    """The model made in this way, after all of its shapes ran once and gave the model's own numbers.

    Raises:
        Unusable: this way does not work, on some rank; the run is as it was.
    """
    plan = run.plan
    try:
        model = way.make()
        if run.config.train.micro_batch == "auto":
            keeps_little = way.is_fast or way.is_compiled
            run.plan = fit_micro_batch(run, lambda plan: try_passes(model, plan, run), keeps_little)
        elif way.is_compiled:
            attempt(run.ranks, lambda: try_passes(model, run.plan, run))
        warm_up(model, run, forward_backward, way.is_compiled)
    except Unusable:
        run.plan = plan
        if way.is_compiled:
            torch._dynamo.reset()
        raise
    return model


def made_up_batch(sequences: int, run: Run) -> tuple[Tensor, Tensor]:
    """Inputs and targets of random tokens, always the same."""
    seq_len, generator = run.config.model.seq_len, torch.Generator().manual_seed(0)
    tokens = torch.randint(run.config.model.vocab_size, (sequences * seq_len + 1,), generator=generator)
    return to_device(tokens, seq_len, run.ranks.device)


def try_passes(model: Model, plan: BatchPlan, run: Run) -> None:
    """Passes of every shape on made-up tokens, without a collective: a rank may fail here alone."""
    try:
        for _ in range(min(2, plan.micro_steps)):  # the second meets the gradients of the first
            model(*made_up_batch(plan.micro_batch, run)).backward()
        validation_passes(model, plan, run)
    finally:
        run.model.train()
        run.model.zero_grad()


def validation_passes(model: Model, plan: BatchPlan, run: Run) -> None:
    """A pass of every shape of a validation on made-up tokens; leaves the model in eval mode."""
    run.model.eval()
    with torch.no_grad():
        for sequences in plan.val_batches:
            model(*made_up_batch(sequences, run))


def warm_up(model: Model, run: Run, forward_backward: ForwardBackward, is_compiled: bool = False) -> None:
    """Run every shape once on made-up tokens (compilers, allocators, first collectives), then undo it all."""
    before, plan = copy.deepcopy(run.state_dict(is_whole=False)), run.plan
    device = run.ranks.device
    device_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        if model is not run.model:
            # Compiled code is made for each shape anew; an eager forward pass is the same for all.
            sizes = (plan.micro_batch, plan.val_batches) if is_compiled else (min(2, plan.micro_batch), ())
            attempt(run.ranks, lambda: check_numbers(model, run, *sizes))
        for _ in range(WARMUP_STEPS):
            forward_backward(run, model, *made_up_batch(plan.micro_steps * plan.micro_batch, run))
            run.gradients.finish()
            for optimizer in run.optimizers:
                optimizer.step()
            run.model.zero_grad()
        run.timeline.mark("warm_up", 0)  # compiling for validation may take as long again
        validation_passes(model, plan, run)
    finally:
        run.model.train()
        run.model.zero_grad()
        # What others' optimizers keep outside of their state_dict would stay.
        run.load_state_dict(before, new_optimizers(run) if run.is_external else None)
        if device_rng is not None:
            torch.cuda.set_rng_state(device_rng, device)
    parts = [key for key in before if key != "optimizers" or not run.is_external]
    after = run.state_dict(is_whole=False)
    if any(digest(after[key]) != digest(before[key]) for key in parts):
        raise RuntimeError("warm-up left a trace in weights, optimizer state, RNG or loader")


def new_optimizers(run: Run) -> Callable[[], list[torch.optim.Optimizer]]:
    return lambda: build_optimizers(run.config, run.model.roles())


# By how much, relatively, rounding may make a parameter's two gradients differ, and the two losses; by the activations'
# dtype. In bfloat16 rounding makes some per cent at random weights, and more where these or attention logits are large.
MAX_GRADIENT_ERROR = {"float32": 0.01, "bfloat16": 0.25}
MAX_LOSS_ERROR = {"float32": 1e-4, "bfloat16": 0.01}
# What is added to weights for it. Biases are zero before training, and small ones could be forgotten unnoticed.
RANDOM_STD, RANDOM_STD_OF_VECTORS = 0.01, 0.5


def check_numbers(model: Model, run: Run, micro_batch: int, val_batches: Iterable[int]) -> None:
    """Raise WrongNumbers where what is called for the model gives other losses or gradients than the model.

    torch 2.11's compiler, for one, lost the gradient of queries and keys without a word. Makes all weights random, for
    those that are zero would hide the gradients of others, and leaves them so. The model itself takes a batch in
    eighths, since it keeps more for its backward pass; where even so it runs out of memory, nothing is checked.
    """
    generator = torch.Generator(run.ranks.device).manual_seed(0)
    with torch.no_grad():
        for p in run.model.parameters():
            std = RANDOM_STD if p.ndim > 1 else RANDOM_STD_OF_VECTORS
            p.add_(torch.randn(p.shape, generator=generator, device=p.device), alpha=std)
    is_random = not torch.equal(*(run.model(*made_up_batch(1, run)).detach() for _ in range(2)))
    run.model.train(not is_random)  # dropout, for one, gives other numbers each time
    try:
        compare(model, run, micro_batch, val_batches)
    finally:
        run.model.train()
        run.model.zero_grad()


def compare(model: Model, run: Run, micro_batch: int, val_batches: Iterable[int]) -> None:
    """check_numbers() at the weights that the model has. Leaves gradients behind."""
    params, dtype = dict(run.model.named_parameters()), run.config.model.activation_dtype
    batches = [made_up_batch(micro_batch, run), *(made_up_batch(sequences, run) for sequences in val_batches)]
    loss = model(*batches[0])
    loss.backward()
    with torch.no_grad():
        found = [loss.detach(), *(model(*batch) for batch in batches[1:])]
    for p in params.values():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    norms = torch.stack(torch._foreach_norm(gradients_of(params.values())))
    try:
        expected = [sum_in_parts(run.model, *batch, with_gradients=batch is batches[0]) for batch in batches]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print_line(f"warning: rank {run.ranks.rank} has no memory to check the forward pass against the model itself")
        return
    for one, other in zip(found, expected, strict=True):
        if not (one - other).abs() <= MAX_LOSS_ERROR[dtype] * other.abs():
            raise WrongNumbers(f"it has a loss of {one.item():g}, the model itself of {other.item():g}")
    differences = torch.stack(torch._foreach_norm(gradients_of(params.values())))
    errors = (differences / norms.clamp(min=torch.finfo(norms.dtype).tiny)).nan_to_num(nan=torch.inf)
    worst = int(errors.argmax())
    if not errors[worst] <= MAX_GRADIENT_ERROR[dtype]:
        raise WrongNumbers(f"it gives another gradient of {list(params)[worst]} than the model itself")


def sum_in_parts(model: Model, inputs_BT: Tensor, targets_BT: Tensor, with_gradients: bool) -> Tensor:
    """The loss, an eighth of the batch at a time; its gradients are taken off those that are there."""
    total, part = torch.zeros((), device=inputs_BT.device), max(1, len(inputs_BT) // 8)
    for inputs, targets in zip(inputs_BT.split(part), targets_BT.split(part), strict=True):
        with torch.set_grad_enabled(with_gradients):
            loss = model(inputs, targets)
        if with_gradients:
            (-loss).backward()
        total += loss.detach()
    return total
