"""`python -m bench.decode`: a token's time on our kernels, in plain PyTorch and in Hugging Face's generate.

Random weights in bfloat16, greedy, every text of the same length; a row is the time of a whole call, the
prompt's pass too, over its new tokens. What must move for a token is every weight once and the keys and
values so far; the share of the copy's bandwidth says how near that is.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from bench.bars import draw_rates
from bench.gpu import require_gpu
from bench.row_process import exit_code
from bench.stock import stock_model
from bench.torch_row import refuse_fallbacks
from core import checks, cli
from core.config import ModelConfig, preset
from core.console import Table
from core.errors import UserError, run_command
from core.figures import require_json, require_picture, write_json
from core.folders import require_place, write_picture
from core.sampling import Sampling
from kernels_cuda import library
from port_torch.decode import MOST_ROWS, Generator
from port_torch.hf_config import stock_type
from port_torch.model import Decoder
from port_torch.sampling import stream

GREEDY = Sampling(temperature=0)
SAMPLED = Sampling(temperature=0.8, top_k=50, top_p=0.95)
HUGGING_FACE: dict[str, dict[str, str]] = {
    "HF generate": {},
    "HF generate, static cache, compiled": {"cache_implementation": "static"},
}


@dataclasses.dataclass(frozen=True)
class DecodeBenchConfig:
    """Time generation on one GPU."""

    preset: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Default: mtlm1-200m. Transformers' class is timed next to those that have one."""
    batch: Annotated[list[int], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Default: 1 and 64."""
    prompt: int = 32
    new: int = 256
    calls: int = 3
    """Timed calls of every way, after one that compiles and captures; the median counts."""
    peers: bool = True
    """Whether Hugging Face's generate is timed too; compiling it takes a minute."""
    sampled: bool = True
    """Whether ours is also timed with temperature, top-k and top-p."""
    profile: Path | None = None
    """Write the times of our kernels into this folder, by torch.profiler."""
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        checks.counts(**checks.fields(self, "prompt", "new", "calls"))
        for batch in self.batch:
            checks.counts(batch=batch)
            if self.profile is not None and batch > MOST_ROWS:
                raise UserError(
                    f"--profile looks at one step, of at most {MOST_ROWS} rows: --batch {batch} has several"
                )


Call = Callable[[list[list[int]], int], object]


def seconds(call: Call, prompts: list[list[int]], new: int, calls: int) -> list[float]:
    """Of each call, after one that compiles and captures."""
    call(prompts, new)
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(prompts, new)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def random_model(config: ModelConfig) -> Decoder:
    """As a new model is drawn, on the GPU in bfloat16."""
    torch.manual_seed(0)
    model = Decoder(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, config.init_std)
    return model.to("cuda", torch.bfloat16).eval()


def eager(model: Decoder) -> Call:
    """The mirror, as --backend torch runs it."""
    return lambda prompts, new: list(stream(model, prompts, GREEDY, new))


def graphed(model: Decoder) -> Call:
    """Plain PyTorch with the launches taken away: the mirror's step on a whole cache, in a CUDA graph."""
    kept: dict[tuple[int, int], tuple] = {}

    def capture(batch: int, length: int) -> tuple:
        cache = model.empty_cache(batch, length)
        token, position = torch.zeros(2, batch, dtype=torch.int64, device="cuda").unbind()

        def step() -> None:
            hidden = model(token[:, None], position[:, None], cache)
            token.copy_(model.logits(hidden[:, 0]).argmax(-1))
            position.add_(1)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return cache, token, position, graph

    @torch.inference_mode()
    def call(prompts: list[list[int]], new: int) -> None:
        batch, n = len(prompts), len(prompts[0])
        key = batch, n + new
        if key not in kept:
            kept[key] = capture(*key)
        cache, token, position, graph = kept[key]
        ids = torch.tensor(prompts, device="cuda")
        hidden = model(ids, torch.arange(n, device="cuda").expand(batch, -1), cache)
        token.copy_(model.logits(hidden[:, -1]).argmax(-1))
        position.fill_(n)
        for _ in range(new - 1):
            token.tolist()
            graph.replay()
        token.tolist()

    return call


def hugging_face(config: ModelConfig, device: str = "cuda", **how: str) -> Call:
    """Its class of the same shape with its generate; a call gives the texts, prompts included."""
    model = stock_model(config, use_cache=True).to(device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # no text ends early, and nothing looks for its end

    @torch.inference_mode()
    def call(prompts: list[list[int]], new: int) -> torch.Tensor:
        ids = torch.tensor(prompts, device=device)
        mask = torch.ones_like(ids)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **how
        )

    return call


def ours(generator: Generator, sampling: Sampling) -> Call:
    """On the decode kernels, as --backend cuda runs it."""
    return lambda prompts, new: list(generator.stream(prompts, sampling, new))


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy: the median of 20."""
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        y.copy_(x)
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return 2 * x.nbytes / statistics.median(begin.elapsed_time(end) for begin, end in times) * 1e3


def bytes_per_step(config: ModelConfig, batch: int, mean_length: float) -> float:
    """Weights once (of the tables only the head), keys and values of every row."""
    weights = config.n_params - config.n_embedding_params + config.vocab_size * config.d_model
    return 2 * weights + 4 * config.n_layers * config.kv_width * batch * mean_length


def measure(config: DecodeBenchConfig, copy: float) -> list[dict[str, Any]]:
    """All rows; plain PyTorch before the kernels are loaded, which the mirror would use."""
    refuse_fallbacks(cuda=False)
    names, batches = config.preset or ["mtlm1-200m"], config.batch or [1, 64]
    rows: list[dict[str, Any]] = []

    def add(name: str, batch: int, way: str, call: Call) -> None:
        shape = preset(name)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(shape.vocab_size, (batch, config.prompt), generator=generator).tolist()
        times = [t / config.new for t in seconds(call, prompts, config.new, config.calls)]
        step = statistics.median(times)
        moved = bytes_per_step(shape, batch, config.prompt + config.new / 2) / step
        rows.append(
            {
                "model": name,
                "batch": batch,
                "way": way,
                "microseconds": step * 1e6,
                "spread": (max(times) - min(times)) * 1e6,
                "tokens/s": batch / step,
                "bytes/s": moved,
                "of copy": moved / copy,
            }
        )
        print(f"{name}, batch {batch}, {way}: {step * 1e6:.0f} us per step", flush=True)

    for name in names:
        shape = preset(name)
        if config.prompt + config.new > shape.context:
            raise UserError(
                f"{config.prompt} + {config.new} tokens are more than the context of {name}, {shape.context}"
            )
        model = random_model(shape)
        for batch in batches:
            add(name, batch, "plain PyTorch", eager(model))
            add(name, batch, "plain PyTorch, CUDA graph", graphed(model))
            for way, how in HUGGING_FACE.items() if config.peers and stock_type(shape) else ():
                try:
                    add(name, batch, way, hugging_face(shape, **how))
                except Exception as error:  # a peer's affair: the others are measured
                    failed = {"model": name, "batch": batch, "way": way, "failed": f"{error!r}"[:300]}
                    rows.append(failed)
                    print(f"{way} failed: {failed['failed']}", file=sys.stderr)
                torch._dynamo.reset()
                torch.cuda.empty_cache()
    library.load("cuda")
    for name in names:
        generator = Generator(random_model(preset(name)))
        for batch in batches:
            add(name, batch, "ours", ours(generator, GREEDY))
            if config.sampled:
                add(name, batch, "ours, sampled", ours(generator, SAMPLED))
            if config.profile:
                profile(generator, batch, config.prompt, config.new, config.profile / f"{name}-{batch}.txt")
    order = {(name, batch): i for i, (name, batch) in enumerate((n, b) for n in names for b in batches)}
    return sorted(rows, key=lambda row: order[row["model"], row["batch"]])


@torch.inference_mode()
def profile(generator: Generator, batch: int, prompt: int, new: int, path: Path) -> None:
    """The prompts' pass; the greedy step, at the middle of a text; and its kernels' mean times in the graph.

    These overlap: a kernel's time holds its wait for the one before.
    """
    (step,) = (step for (_, rows), step in generator.steps.items() if rows == batch)
    step.set_sampling(GREEDY, 0)
    texts = [[1] * prompt] * batch
    generator.read_prompts(texts, step)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        generator.read_prompts(texts, step)
    torch.cuda.synchronize()
    of_prompts = (time.perf_counter() - start) / 10 * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(times: int) -> float:
        step.position.fill_(max(0, prompt + new // 2 - times // 2))
        begin.record()
        for _ in range(times):
            step.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times * 1e3

    lines = [f"{of_prompts:9.1f} us  the prompts' pass, of {batch} x {prompt} tokens"]
    lines.append(f"{run(100):9.1f} us  per step, replayed 100 times")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(20)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:12]:
        mean = event.self_device_time_total / max(event.count, 1)
        lines.append(f"{mean:9.2f} us  {event.count / 20:6.1f} per step  {event.key[:110]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def print_table(rows: list[dict[str, Any]]) -> None:
    """One row per way; "ours" is how many times as long as ours it takes."""
    table = Table(
        ("model", "way"),
        ("batch", "us per step", "spread", "tokens/s", "TB/s", "of copy", "ours"),
    )
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], row["way"], str(row["batch"]), "failed")
            continue
        of_ours = [
            r for r in rows if r["way"] == "ours" and (r["model"], r["batch"]) == (row["model"], row["batch"])
        ]
        table.add_row(
            row["model"], row["way"], str(row["batch"]), f"{row['microseconds']:.0f}", f"{row['spread']:.0f}",
            f"{row['tokens/s']:,.0f}", f"{row['bytes/s'] / 1e12:.2f}", f"{row['of copy']:.0%}",
            f"{row['microseconds'] / of_ours[0]['microseconds']:.2f}x",
        )  # fmt: skip
    table.print()


def plot(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Bars: tokens/s of each way, one panel per model and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 2.2 * len(panels)), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        of_panel = [row for row in rows if (row["model"], row["batch"]) == panel and "failed" not in row]
        ways, rates = ([row[name] for row in of_panel] for name in ("way", "tokens/s"))
        draw_rates(axis, ways, rates, f"{panel[0]}, batch {panel[1]}: tokens/s, {device}")
    write_picture(figure, path, dpi=120)


def main() -> int | None:
    """The command."""
    config = cli.parse(DecodeBenchConfig, prog="python -m bench.decode")
    require_json(config.json)
    require_picture(config.plot)
    if config.profile is not None:
        require_place(config.profile)
    require_gpu("bench.decode")
    copy = copy_bandwidth()
    device = torch.cuda.get_device_name()
    facts = f"{device}, PyTorch {torch.__version__}, copy {copy / 1e12:.2f} TB/s"
    print(f"{facts}; prompts of {config.prompt} tokens and {config.new} new ones, bfloat16")
    rows = measure(config, copy)
    print_table(rows)
    asked = {"prompt": config.prompt, "new": config.new, "calls": config.calls}
    write_json(config.json, {"facts": facts, **asked, "rows": rows})
    if config.plot:
        plot(rows, config.plot, device)
    return exit_code(rows)


if __name__ == "__main__":
    run_command(main)
