"""Our models as lm-evaluation-harness sees a model: its own requests in, log-probabilities out.

How a context and a continuation become tokens is the harness's own code (`TemplateLM`); what is here says
how tokens are scored. As with its `hf` model and a tokenizer that adds `<s>`, every text begins with `<s>`,
and in rolling log-likelihoods `<s>` itself is scored once per document, after another `<s>`. With a tokenizer
that has no `<s>`, texts begin with nothing, and `</s>` stands before what has no context.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from core.errors import UserError
from core.progress import Activity
from core.sampling import Sampling, pieces
from core.tokenizer import Tokenizer
from eval.batching import Backend, Row, score_rows

GENERATED = 256  # tokens at most where a task does not say
GENERATED_AT_ONCE = 32  # prompts


class Interrupted(Exception):
    """Someone asked for the end while a task was being scored."""


class HarnessModel(TemplateLM):
    """An `lm_eval.api.model.LM` of a backend and its tokenizer."""

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, interrupted: Callable[[], bool] = lambda: False
    ):
        """interrupted: asked after every batch, True raises `Interrupted`."""
        super().__init__()
        self._interrupted = interrupted
        self.backend_model = backend
        self.mtlm_tokenizer = tokenizer
        self.task = ""
        """What is being evaluated, for the progress line."""
        self.n_truncated = 0
        """Requests, since this was last set, that were longer than the context and lost their beginning."""
        self.bos_nats = 0.0
        """What scoring `<s>` itself cost in the last rolling log-likelihoods, of each document; 0 without."""

    @property
    def eot_token_id(self) -> int:
        """`</s>`."""
        return self.mtlm_tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """`<s>`, which stands before a continuation without a context; `</s>` where there is none."""
        return self.mtlm_tokenizer.prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once."""
        return self.backend_model.context

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls its cached requests after."""
        return self.mtlm_tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The ids of a text, `<s>` before them unless there is none or `add_special_tokens` is False."""
        bos = self.mtlm_tokenizer.bos
        opening = [] if add_special_tokens is False or bos is None else [bos]
        return opening + self.mtlm_tokenizer.encode(string).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the likeliest) of each continuation after its context."""
        if not all(any(request.args) for request in requests):  # the harness's code fails at it
            self._refuse_empty()
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        total, greedy = self._score([self._row(context, targets) for _, context, targets in requests])
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _row(self, context: list[int], targets: list[int]) -> Row:
        """A request as a row; what does not fit loses its beginning, as in the harness, and is counted."""
        if not targets:
            self._refuse_empty()
        if len(targets) > self.max_length:
            raise UserError(
                f"{self.task} has a continuation of {len(targets)} tokens, longer than the model's context "
                f"of {self.max_length}: it cannot be scored"
            )
        whole = (context or [self.prefix_token_id]) + targets
        self.n_truncated += len(whole) > self.max_length + 1
        return Row(whole[-(self.max_length + 1) :][:-1], targets)

    def _refuse_empty(self) -> NoReturn:
        raise UserError(f"{self.task} has a request with an empty continuation: it cannot be scored")

    def _score(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        tokens = sum(len(row.inputs) for row in rows)
        with Activity(f"scoring {self.task}", tokens, "tokens") as progress:

            def report(tokens: int) -> None:
                progress.advance(tokens)
                if self._interrupted():
                    raise Interrupted

            return score_rows(self.backend_model, rows, report)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole documents, each token once, in windows of the context side by side.

        As in the harness, the last window, which scores fewer tokens, sees as many before them as fit.
        """
        rows: list[Row] = []
        document: list[int] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, targets in map(make_disjoint_window, windows):
                rows.append(Row((context + targets)[:-1], targets))
                document.append(index)
        logprobs, _ = self._score(rows)
        totals = np.zeros(len(requests))
        np.add.at(totals, document, logprobs)
        bos = self.mtlm_tokenizer.bos
        self.bos_nats = 0.0
        if bos is not None:
            self.bos_nats = -float(score_rows(self.backend_model, [Row([bos], [bos])])[0][0])
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts after the contexts, up to a stop text, `</s>` or a number of tokens."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with Activity(f"asking {self.task}", len(requests), "texts") as progress:
            for indices in groups.values():
                settings = dict(requests[indices[0]].args[1])
                indices.sort(key=lambda i: -len(requests[i].args[0]))
                for start in range(0, len(indices), GENERATED_AT_ONCE):
                    part = indices[start : start + GENERATED_AT_ONCE]
                    contexts = [requests[i].args[0] for i in part]
                    made = self._generate(contexts, settings)
                    for index, text in zip(part, made, strict=True):
                        texts[index] = text
                    progress.advance(len(part))
                    if self._interrupted():
                        raise Interrupted
        return texts

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        # The harness's reading of the settings, of which several have more than one name.
        settings = dict(normalize_gen_kwargs(settings, GENERATED))
        until = [stop for stop in settings["until"] if stop]
        sampling = Sampling(
            temperature=settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 1.0),
        )
        n_new = settings["max_gen_toks"]
        room = self.max_length - n_new
        if room < 1:
            raise UserError(
                f"{self.task} asks for {n_new} new tokens, and the model's context is {self.max_length}: it "
                "leaves no room for the question"
            )
        prompts = [self.mtlm_tokenizer.begin(context) for context in contexts]
        self.n_truncated += sum(len(prompt) > room for prompt in prompts)
        prompts = [prompt[-room:] for prompt in prompts]
        steps = self.backend_model.stream(prompts, sampling, n_new, self.eot_token_id)
        texts = [""] * len(prompts)
        # The new tokens are a text of their own: as in the harness, without the space it would begin with.
        for added in pieces(self.mtlm_tokenizer, [[] for _ in prompts], steps):
            texts = [text + piece for text, piece in zip(texts, added, strict=True)]
            if until and all(any(stop in text for stop in until) for text in texts):
                break
        return [postprocess_generated_text(text, until, None) for text in texts]
