"""Figures that others published, each with the protocol it was measured under. Percent, 0-shot.

Sources: EleutherAI/pythia's result files (Pythia, OPT), Mamba-2's and SmolLM2's papers and cards, public runs
of the harness (GPT-2), the original's model card (MTLM1). What a source does not say is not here.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One model's accuracies: task -> (acc, acc_norm), None where not published."""

    model: str
    protocol: str
    scores: dict[str, tuple[float | None, float | None]]
    metric_stated: bool = True
    """Whether the source says which of acc and acc_norm its numbers are; the plot shows only those."""


PUBLISHED_TASKS = ("arc_easy", "arc_challenge", "openbookqa", "hellaswag", "piqa", "truthfulqa_mc2")
HARNESS = "lm-evaluation-harness, 0-shot"
PUBLISHED = (
    Published("GPT-2 124M", HARNESS, {
        "arc_easy": (43.8, 39.5), "arc_challenge": (19.0, 22.7), "openbookqa": (16.4, 27.2),
        "hellaswag": (28.9, 31.1), "piqa": (62.9, 62.5), "truthfulqa_mc2": (40.7, None),
    }),
    Published("OPT-125M", f"{HARNESS} (HellaSwag: 10-shot)", {
        "arc_easy": (43.5, 40.0), "arc_challenge": (18.9, 22.8), "hellaswag": (31.5, None),
        "piqa": (63.0, 62.0), "truthfulqa_mc2": (42.87, None),
    }),
    Published("Pythia-70M", HARNESS, {
        "arc_easy": (37.4, 35.0), "arc_challenge": (18.1, 22.1), "piqa": (59.5, 59.1),
    }),
    Published("Pythia-160M", HARNESS, {
        "arc_easy": (43.5, 39.6), "arc_challenge": (18.8, 23.3), "piqa": (62.7, 61.6),
    }),
    Published("Mamba2-130M", HARNESS, {
        "arc_easy": (47.5, 41.9), "arc_challenge": (20.7, 24.2), "hellaswag": (31.0, 35.3),
        "piqa": (65.0, 64.0),
    }),
    Published("SmolLM2-135M (2T tokens)", "its own evaluation, 0-shot; ARC of the Instruct model", {
        "arc_easy": (54.0, None), "arc_challenge": (None, 28.0), "openbookqa": (None, 34.6),
        "hellaswag": (None, 42.1), "piqa": (68.4, None),
    }),
    Published("MTLM1-200M, the original", "its own claim; which of acc and acc_norm is not stated", {
        "arc_easy": (39.64, None), "arc_challenge": (23.55, None), "openbookqa": (34.20, None),
        "truthfulqa_mc2": (41.42, None),
    }, metric_stated=False),
)  # fmt: skip

# Perplexities of WikiText-2: a number is one of a unit.
PUBLISHED_WIKITEXT = (
    ("GPT-2 124M", "37.37 per word (lm-eval's wikitext)", "0.977 bits per byte, computed from that"),
    ("MTLM2-40M, the original", "54.21, unit not stated", "about 1.5 bits per byte if per Mistral token"),
)

NOTE = (
    "What does not compare: perplexities per token and per word, and those of different tokenizers, are of "
    "different units (bits per byte is the common one). TruthfulQA mc2 falls as models of this size get "
    "better (TinyStories-28M 48.1, OPT-66B 35.4), so it does not measure quality. The original's table "
    "understates its baselines (OPT-125M ARC-Easy 35.0, GPT-2 33.5) and mixes 25-shot with 0-shot values. "
    "One standard error of a full set is about 1.0 point (ARC-Easy), 1.2 (ARC-Challenge), 2.1 (OpenBookQA) "
    "and 1.5 (TruthfulQA)."
)
