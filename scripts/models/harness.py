"""A run's model as one of EleutherAI's lm-evaluation-harness, whose tasks then run on it. Needs lm_eval.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from aurora.errors import Exit, HarnessError
from aurora.trainer.process import first_line
from scripts.analysis.evaluation import Evaluation
from scripts.models.likelihood import score
from scripts.models.load import Trained
from scripts.models.sampling import Sampling, sample
from scripts.models.vocabulary import Vocabulary


class HarnessModel(TemplateLM):
    """Scores and writes text for the harness."""

    def __init__(self, trained: Trained):
        super().__init__()
        self.trained, self.vocabulary = trained, Vocabulary(trained.config["vocab_size"])

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.document_start

    @property
    def max_length(self) -> int:
        return self.trained.config["seq_len"]

    @property
    def tokenizer_name(self) -> str:
        return "bytes" if self.vocabulary.is_bytes else "gpt2"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.vocabulary.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        start = [self.eot_token_id]  # in the place of a context of spaces alone, which go to what follows
        pairs = [(np.array(context or start), np.array(scored, np.int64)) for _, context, scored in requests]
        return [(float(found.logprobs.sum()), bool(found.is_greedy.all())) for found in score(self.trained, pairs)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        start = np.array([self.vocabulary.document_start])
        pairs = [(start, np.array(self.tok_encode(request.args[0]), np.int64)) for request in requests]
        return [float(found.logprobs.sum()) for found in score(self.trained, pairs)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [self.text_until(*request.args) for request in requests]

    def text_until(self, context: str, options: dict[str, Any]) -> str:
        """What follows the context, up to one of options["until"]."""
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        is_drawn = options.get("do_sample", False)
        sampling = Sampling(
            temperature=float(options.get("temperature", 1.0)) if is_drawn else 0.0,
            top_k=options.get("top_k") if is_drawn else None,
            top_p=options.get("top_p") if is_drawn else None,
            max_tokens=int(options.get("max_gen_toks", 256)),
        )
        content = b""
        for token in sample(self.trained, self.tok_encode(context) or [self.eot_token_id], sampling):
            content += self.vocabulary.bytes_of(token)
            text = content.decode("utf-8", "replace")
            if ends := [text.index(end) for end in until if end in text]:
                return text[: min(ends)]
        return content.decode("utf-8", "replace")


def evaluate_tasks(
    trained: Trained, tasks: list[str], include_path: str | None, num_fewshot: int | None, limit: int | None
) -> list[Evaluation]:
    """Each metric of each task.

    Raises:
        HarnessError: CONFIG, the harness refuses: an unknown task, or one of which the data is not to be had.
    """
    try:
        found = simple_evaluate(
            model=HarnessModel(trained),
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=TaskManager(include_path=include_path),
            bootstrap_iters=0,
            log_samples=True,
        )
    except HarnessError:
        raise
    except Exception as error:  # tasks are code of many people
        message = f"lm_eval cannot run {', '.join(tasks)}: {type(error).__name__}: {first_line(error)[:200]}"
        raise HarnessError(Exit.CONFIG, f"{message}; python -m lm_eval ls tasks") from error
    return [
        evaluation
        for task, samples in sorted(found["samples"].items())
        for evaluation in evaluations_of(task, samples, found["results"][task], str(found["versions"].get(task)))
    ]


def evaluations_of(
    task: str, samples: list[dict[str, Any]], results: dict[str, Any], version: str
) -> Iterator[Evaluation]:
    """Of each metric that the harness gives: by item where each has a number, else its one figure, without interval."""
    for key, value in sorted(results.items()):
        metric, _, kind = key.partition(",")
        if not kind or not isinstance(value, int | float) or metric.endswith("_stderr"):
            continue
        items = sorted((item for item in samples if item["filter"] == kind), key=lambda item: item["doc_id"])
        values: list[Any] = [item.get(metric) for item in items]
        sums, sizes = np.array([value], float), np.ones(1)
        if values and metric == "bits_per_byte":  # of which items have log-likelihood and bytes
            sums, sizes = -np.array([v[0] for v in values]) / np.log(2), np.array([v[1] for v in values], float)
        elif values and all(isinstance(v, int | float | np.number) for v in values):
            sums, sizes = np.array(values, float), np.ones(len(values))
        name = f"{task} {metric}" + (f" ({kind})" if kind != "none" else "")
        yield Evaluation("tasks", name, metric, sums, sizes, {"harness": float(value), "version": version})
