"""Stage `preflight`: what would end this run late, or make it long, before anything is downloaded or trained.

Looks at the machine, the disk and the sources, compares the kernels with their reference on this device, and takes the
time and the memory of one step of each kind at the model's own sizes, of random weights. What is wrong ends the run,
one line each with what to do about it. The stages that fetch depend on data/preflight.txt, which holds no measurement:
another timing starts nothing anew. Nor does another k, for which the estimate stands as it is.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.utils import DistributedType
from transformers import AutoConfig, PreTrainedConfig

from dsa import kernels
from dsa.convert import config_of
from dsa.data import sources
from dsa.data.hubs import SourceError, Unreachable
from dsa.families import family
from dsa.kernels import check
from dsa.kernels.cpu import attend, decode, loss, select, warmup
from dsa.machine import supports_bf16
from stages import estimate, params, steps
from stages.common import device_name, home, limit_memory, measured
from stages.cost import DEVICE
from stages.download import PACKAGES, STREAM_ROOM
from stages.files import write_json
from stages.markdown import page
from stages.params import Indexer, Params, load
from stages.training import split_batch, use_all_cores

PASSED = Path("data/preflight.txt")
REPORT = Path("reports/preflight.json")
DRIVER = Path("/proc/driver/nvidia/version")
OK, NOTE, WRONG = "ok", "note", "wrong"
TRAINED = 6  # models that the run keeps, float32
CHECKPOINTS = 3  # two are kept, and the next is written: weights and Adam's two moments


@dataclass(frozen=True)
class Check:
    """says: what was found, and where it is wrong what to do."""

    what: str
    state: str
    says: str


class Checks(list[Check]):
    """Prints what is said, as it is said."""

    def __call__(self, *found: Check) -> None:
        self.extend(found)
        for c in found:
            print(f"{c.state:>5}  {c.what}: {c.says}", flush=True)

    @property
    def wrong(self) -> list[Check]:
        return [c for c in self if c.state == WRONG]


def gpu() -> Check:
    driver = DRIVER.read_text(encoding="utf-8").splitlines()[0] if DRIVER.exists() else "driver unknown"
    if torch.cuda.is_available():
        free, total = (x / 2**30 for x in torch.cuda.mem_get_info())
        says = f"{torch.cuda.device_count()} × {device_name()}, {free:.1f} of {total:.1f} GB free"
        return Check("device", OK, f"{says}, CUDA {torch.version.cuda}, {driver}")
    if DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        says = f"PyTorch {torch.__version__} does not see the GPU of {driver}: update the driver or install a PyTorch"
        return Check("device", WRONG, f"{says} for it; CUDA_VISIBLE_DEVICES= (empty) runs on the CPU")
    free = limit_memory()  # a step that does not fit is then an error, and not the end of the process
    return Check("device", OK, device_name() + (f", {free / 2**30:.1f} GB of memory free" if free else ""))


def precision() -> Check:
    if supports_bf16():
        return Check("precision", OK, "training under bfloat16 autocast")
    says = "float32: this device is not fast in bfloat16"
    if torch.cuda.is_available():
        return Check("precision", NOTE, f"{says}, GPUs from compute capability 8.0 on are")
    return Check("precision", OK, says)


def kernels_of(config: PreTrainedConfig, indexer: Indexer, dtype: torch.dtype) -> Iterator[tuple[str | None, Callable]]:
    """Of each kernel for such tensors at the run's sizes: why it cannot run here, and its comparison."""
    Hq, Hkv = config.num_attention_heads, config.num_key_value_heads
    D, index = getattr(config, "head_dim", None) or config.hidden_size // Hq, (indexer.n_heads, indexer.head_dim)
    if DEVICE == "cuda":
        arguments = torch.device(DEVICE), dtype, D
        yield kernels.obstacle(*arguments), partial(check.verify, *arguments)
        return
    sizes = {attend: (Hq, Hkv, D), decode: (Hq // Hkv, D), loss: (Hq, Hkv, D, *index), select: index}
    for module, shape in (sizes | {warmup: (Hq, Hkv, D, *index)}).items():
        yield module.obstacle(dtype, *shape), partial(check.verify_cpu, module, dtype, *shape)


def agreement(config: PreTrainedConfig, indexer: Indexer) -> Check:
    """Of the kernels with their references, in the types that the run has."""
    if os.environ.get(kernels.VARIABLE) == "gather":
        return Check("kernels", NOTE, f"PyTorch's own operations for all, as {kernels.VARIABLE} asks for: slower")
    obstacles = set()
    try:
        for dtype in [torch.bfloat16, torch.float32] if supports_bf16() else [torch.float32]:
            for obstacle, verify in kernels_of(config, indexer, dtype):
                if obstacle:
                    obstacles.add(obstacle)
                else:
                    verify()
    except RuntimeError as error:
        return Check("kernels", WRONG, str(error))
    if obstacles:
        return Check("kernels", NOTE, f"PyTorch's own operations for some, which is slower: {'; '.join(obstacles)}")
    return Check("kernels", OK, f"{'Triton' if DEVICE == 'cuda' else 'C'}: they agree with the reference")


def processes(p: Params) -> tuple[int | None, list[Check]]:
    """How many `accelerate launch` will start, by its own rule, and whether they can share each batch. None where they
    also share the model."""
    config = load_config_from_file(default_config_file) if Path(default_config_file).is_file() else None
    world, found = max(1, config.num_processes if config else torch.cuda.device_count()), []
    for name in ("dense", "warmup", "sparse", "dpo"):
        size = getattr(p, name).batch_size
        together = split_batch(size)[0] * world
        if size % together:
            says = f"{name}.batch_size: {size} rows cannot be split over {world} processes: make it a multiple of"
            found.append(
                Check("processes", WRONG, f"{says} {together}, or change num_processes in accelerate's config")
            )
    if config and config.distributed_type == DistributedType.FSDP:
        return None, [*found, Check("processes", NOTE, f"{world}, FSDP: memory and time are not estimated")]
    return world, found or [Check("processes", OK, f"{world} for each training stage")]


def published(uri: str) -> tuple[PreTrainedConfig, str | None, int]:
    """A model's config, its commit and the bytes of its files, without its weights. Raises SourceError."""
    repo = sources.parse(uri)
    folder = Path(uri).expanduser() if repo is None else None
    if repo is not None:
        hub = sources.HUBS[repo.hub]()
        try:
            commit, files = hub.files(repo)
            files = [file for file in files if sources.is_model_file(file.name)]
            sources.check_names([file.name for file in files], uri)
            (wanted,) = (file for file in files if file.name == "config.json")
            with hub.read(repo, commit, wanted) as raw:
                return config_from(raw.read(), uri), commit, sum(file.size for file in files)
        except Unreachable:
            if repo.hub != "hf":
                raise
            folder = hub.snapshot(repo, sources.MODEL_FILES, offline=True)
    if not (folder / "config.json").is_file():
        raise SourceError(f"{uri}: no config.json there")
    size = sum(path.stat().st_size for path in folder.iterdir() if sources.is_model_file(path.name))
    return config_from((folder / "config.json").read_bytes(), uri), None, size


def config_from(content: bytes, uri: str) -> PreTrainedConfig:
    """As transformers reads it. Raises SourceError for one that has no DSA."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(content)
        try:
            config = AutoConfig.from_pretrained(folder)
            config_of(config, index_n_heads=0, attention_mode="dense")
        except (OSError, ValueError) as error:
            raise SourceError(f"{uri}: config.json: {str(error).replace(folder, uri)}") from error
    return config


def rows_of(name: str, uris: list[str]) -> Check:
    """Whether the rows are to be had, by the first of them."""
    if PACKAGES in uris:
        return Check(name, OK, "the sources of the installed packages")
    try:
        found = sources.open_dataset(uris)
    except SourceError as error:
        return Check(name, WRONG, str(error))
    size = sum(file.size for file in found.files) / 1e9
    return Check(name, OK, f"{found.uri}, {size:.2f} GB in {len(found.files)} files" + at(found.revision))


def at(revision: str | None) -> str:
    return f", commit {revision}" if revision else ""


def disk(p: Params, parameters: int, model: int) -> Iterator[Check]:
    """What is free where the run writes, against what it will: models in the workspace and in DVC's cache, checkpoints,
    the hub's cache, the heads of the sources. What an earlier run left in the workspace makes room."""
    held = sum(path.stat().st_size for path in Path("models").rglob("*") if path.is_file())
    streams = sum(STREAM_ROOM for source in (p.data.source, p.preference.source) if PACKAGES not in source)
    remote = any("://" in uri for uri in p.model.source)
    scratch = os.environ.get("DSA_SCRATCH") or home() / ".cache/dsa/scratch"
    hub = os.environ.get("HF_HOME") or home() / ".cache/huggingface"
    places = [
        ("the project", Path(), max(0, 2 * (TRAINED * 4 * parameters + model + streams) - held)),
        ("DSA_SCRATCH", Path(scratch), CHECKPOINTS * 12 * parameters),
        ("HF_HOME", Path(hub), model if remote else 0),
    ]
    disks: dict[int, list[tuple[str, int]]] = defaultdict(list)
    free: dict[int, int] = {}
    for name, folder, need in (place for place in places if place[2]):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        device = there.stat().st_dev
        disks[device].append((name, need))
        free[device] = shutil.disk_usage(there).free
    for device, here in disks.items():
        need = sum(need for _, need in here)
        says = f"{need / 1e9:.1f} GB are needed and {free[device] / 1e9:.1f} GB are free"
        says += f" ({', '.join(name for name, _ in here)})"
        remedy = (
            ": free some, set DSA_SCRATCH or HF_HOME elsewhere, or `dvc config cache.type reflink,hardlink,symlink`"
        )
        yield Check("disk", OK, says) if free[device] > need else Check("disk", WRONG, says + remedy)


def means_of(p: Params) -> tuple[int, int]:
    """Tokens of a row and of a preference row on average, as far as the profile knows them."""
    return p.data.mean_tokens or p.data.max_length, p.preference.mean_tokens or p.preference.max_length


def measure(p: Params, make: Callable, say: Checks) -> tuple[dict[str, steps.Cost], dict[str, steps.Cost] | None]:
    """By `stages.steps.KINDS` and by its CHOICES; what does not fit is said and left out."""
    (mean, pair), found = means_of(p), {}
    for kind in steps.KINDS:
        stage = kind.partition("@")[0]
        section = getattr(p, "sparse" if stage == "window" else stage)
        lengths = (pair, p.preference.max_length) if stage == "dpo" else (mean, p.data.max_length)
        if cost := steps.if_it_fits(steps.training, kind, make, section, *lengths):
            found[kind] = cost
            continue
        fitting = steps.settings_that_fit(kind, make, p)
        say(Check(kind, WRONG, f"a row of {lengths[1]} tokens does not fit: {' or '.join(fitting) or 'nothing fits'}"))
    rows = steps.if_it_fits(steps.evaluation, make, mean, p.data.max_length)
    if rows is None:
        say(Check("evaluate", WRONG, f"a row of {p.data.max_length} tokens does not fit: lower data.max_length"))
        return found, None
    return found, rows | {"scoring": steps.scoring(make, pair)}


def look(p: Params, topk: int, say: Checks) -> dict:
    """Says what there is to say, and returns the estimate of each stage where nothing is wrong."""
    world, of_batches = processes(p)
    say(gpu(), precision(), *of_batches)
    say(rows_of("rows", p.data.source), rows_of("preferences", p.preference.source))
    try:
        config, revision, size = sources.first_reachable(p.model.source, published)
    except SourceError as error:
        say(Check("model", WRONG, str(error)))
        return {}
    with torch.device("meta"):
        dense = family(config.model_type)(config_of(config, index_n_heads=0, attention_mode="dense"))
    says = f"{config.model_type}, {dense.num_parameters():,} parameters, {size / 1e9:.2f} GB"
    say(Check("model", OK, says + at(revision)), agreement(config, p.indexer), *disk(p, dense.num_parameters(), size))
    if say.wrong or world is None:
        return {}
    step, rows = measure(p, partial(steps.model_of, config, p.indexer, topk), say)
    return {} if say.wrong else estimate.stages(p, p.indexer, topk, config, step, rows, means_of(p), world)


def main() -> None:
    p, topk = params.load("preflight"), load().topk  # not declared: another k is no reason to look again
    checks, metrics = Checks(), {"topk": topk}
    with measured(metrics):
        use_all_cores()
        metrics["stages"] = look(p, topk, checks)
    write_json(REPORT, {"checks": [asdict(c) for c in checks], **metrics})
    markdown = page(Path(__file__).with_name("preflight.md.jinja"), {"checks": checks, **metrics})
    REPORT.with_suffix(".md").write_text(markdown, encoding="utf-8")
    if checks.wrong:
        raise SystemExit("\n".join(f"{c.what}: {c.says}" for c in checks.wrong))
    print(f"       all stages: {sum(s['seconds'] for s in metrics['stages'].values()) / 60:.0f} minutes")
    PASSED.parent.mkdir(parents=True, exist_ok=True)
    PASSED.write_text("passed\n", encoding="utf-8")


if __name__ == "__main__":
    main()
