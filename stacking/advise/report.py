"""What is said: the cost before anything is trained, and the answer."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from core.checkpoint.manifest import Json, code_version
from core.checkpoint.steps import list_steps, step_path
from core.cli import command
from core.run.log import read_log
from stacking.advise.arms import COMMAND
from stacking.advise.config import AdviseConfig
from stacking.advise.question import Arm, Question
from stacking.advise.verdict import (
    BOUND,
    COVERS,
    GROW_NOW,
    NO_DIFFERENCE,
    Estimate,
    WindowLosses,
    decide,
    estimate,
)


class Answer(NamedTuple):
    """What was measured at one checkpoint."""

    question: Question
    heldout: str
    data: str
    """Fingerprint of the data."""
    windows: int
    scored: int
    """Tokens of them that were predicted."""
    losses: tuple[Estimate, Estimate]
    """Of the arms, in their order."""
    difference: Estimate
    """Of the grown model less the other, window by window."""

    @property
    def advice(self) -> str:
        """The answer in two words."""
        return decide(self.difference)


def make_answer(question: Question, heldout: str, data: str, scores: list[WindowLosses]) -> Answer:
    """The answer to the losses of both arms on the same windows.

    data: the fingerprint of what holds them out.
    """
    train_on, grow = scores
    tokens = train_on.tokens
    losses = estimate(train_on.nats, tokens), estimate(grow.nats, tokens)
    difference = estimate(grow.nats - train_on.nats, tokens)
    return Answer(question, heldout, data, len(tokens), int(tokens.sum()), losses, difference)


def describe_question(question: Question) -> Iterator[str]:
    """What will be compared, and what it costs."""
    q, plan = question, question.plan
    yield (
        f"{q.run} at step {q.step:,} ({q.manifest.tokens:,} tokens read, learning rate constant at "
        f"{q.lr:.3g}): grow from {plan.n_source} to {plan.n_layers} layers ({plan.name}), or train on?"
    )
    for arm in q.arms:
        warm = f"{arm.rewarm} to warm up again and " if arm is q.grow else ""
        yield (
            f"  {arm.name}: {arm.updates:,} updates ({warm}{arm.decay:,} of decay among them), "
            f"{q.tokens(arm):,} tokens, {q.flops(arm):.4g} FLOPs"
        )


def describe_cost(questions: list[Question]) -> str:
    """What all of it costs."""
    pairs = [(q, arm) for q in questions for arm in q.arms]
    flops, tokens = (sum(of(q, arm) for q, arm in pairs) for of in (Question.flops, Question.tokens))
    seconds = [q.seconds() for q in questions]
    if None in seconds:
        time = "the run's log does not say how fast it was"
    else:
        total = sum(seconds)
        time = f"{total / 60:,.0f} minutes" if total >= 120 else f"{total:,.0f} s"
        time = f"about {time} at the run's own speed, and starting and evaluating"
    return f"cost: {flops:.3g} FLOPs and {tokens:,} tokens in all, {time}"


def describe_answer(answer: Answer) -> Iterator[str]:
    """The table, and the answer in a sentence."""
    q = answer.question
    yield f"{q.run} at step {q.step:,}, {answer.windows:,} held-out windows of {answer.heldout}:"
    yield ""
    yield f"| arm | layers | parameters | updates | tokens | FLOPs | {answer.heldout}, nats per token |"
    yield "|---|---|---|---|---|---|---|"
    for arm, loss in zip(q.arms, answer.losses, strict=True):
        cells = (
            arm.name, arm.model.n_layers, f"{arm.model.n_params:,}", f"{arm.updates:,}",
            f"{q.tokens(arm):,}", f"{q.flops(arm):.4g}", loss,
        )  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"
    difference = answer.difference
    yield f"| grow - train on | | | | | | {difference.mean:+.4f} ± {difference.error:.4f} |"
    yield ""
    yield sentence(answer)
    for arm in q.arms:
        if n := refused(q, arm):
            yield f"note: the guard refused {n} of the {arm.updates} updates of `{arm.name}`"


def sentence(answer: Answer) -> str:
    """The answer, and what it rests on."""
    mean, error = answer.difference
    budget = f"over {answer.question.tokens(answer.question.train_on):,} tokens from here and at equal FLOPs"
    if answer.advice == NO_DIFFERENCE:
        return (
            f"{NO_DIFFERENCE}: {budget} the two differ by {abs(mean):.4f} nats per token, within {BOUND:g} "
            f"standard errors ({BOUND * error:.4f})"
        )
    which = "better" if answer.advice == GROW_NOW else "worse"
    return (
        f"{answer.advice}: {budget} the grown model ends {abs(mean):.4f} nats per token {which}, beyond "
        f"{BOUND:g} standard errors ({BOUND * error:.4f})"
    )


def refused(question: Question, arm: Arm) -> int:
    """Updates of an arm that the guard did not apply."""
    return sum(row["step"] >= question.step for row in read_log(question.out(arm), "skip"))


def next_command(answer: Answer, config: AdviseConfig) -> str:
    """What to type for what was advised; nothing where no difference was measured."""
    q = answer.question
    if answer.advice == NO_DIFFERENCE:
        return ""
    if answer.advice != GROW_NOW:
        return command(COMMAND[q.engine], "--out", q.run)
    there = q.run if q.step in list_steps(q.run / "checkpoints") else q.source
    return command("stacking.grow", step_path(there / "checkpoints", q.step), *config.plan_arguments)


def record(answer: Answer, config: AdviseConfig) -> Json:
    """The answer as it is kept."""
    q = answer.question

    def arm_record(arm: Arm, loss: Estimate) -> dict[str, Any]:
        return {
            "arm": arm.name, "layers": arm.model.n_layers, "parameters": arm.model.n_params,
            "updates": arm.updates, "decay": arm.decay, "tokens": q.tokens(arm), "flops": q.flops(arm),
            "refused": refused(q, arm), "nll": loss.mean, "standard_error": loss.error,
        }  # fmt: skip

    return {
        "advice": answer.advice,
        "sentence": sentence(answer),
        "step": q.step,
        "tokens": q.manifest.tokens,
        "checkpoint": q.checkpoint,
        "plan": q.plan.name,
        "layers": [q.plan.n_source, q.plan.n_layers],
        "sources": list(q.plan.sources),
        "how": list(q.plan.how),
        "budget": config.budget,
        "lr": q.lr,
        "engine": q.engine,
        "heldout": answer.heldout,
        "data": answer.data,
        "windows": answer.windows,
        "scored_tokens": answer.scored,
        "arms": [arm_record(arm, loss) for arm, loss in zip(q.arms, answer.losses, strict=True)],
        "difference": {"nll": answer.difference.mean, "standard_error": answer.difference.error},
        "covers": COVERS,
        "code": code_version(),
    }
