"""Runs as the analysis sees them: read from their folders or from wandb, and held to what has to be equal."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import configurator
from data import DataError
from data.console import first_line
from data.files import found_below
from data.records import Record, validated
from engine import contract
from engine.errors import RunError
from engine.metrics import read_metrics
from engine.runs import Run as RunRecord
from engine.runs import read_run
from model import USUAL_RMS
from scripts.experiment import arm_file

KEYS = [key for key in contract.CONTRACT["arm"][1].split() if key != "arm"]
RECIPE = ("pos_dim", "char_dim")  # those of them that come from the recipe


class Config(Record):
    max_iters: int


@dataclass
class Run(contract.Member):
    """One training run, named by its folder or its path on wandb.

    Losses are nats a token; rows rise by iter, and the last one of an iter counts.
    """

    train: list[dict] = field(default_factory=list)  # rows with train/loss
    val: list[dict] = field(default_factory=list)  # rows with val/loss, those before a divergence
    state: str = "finished"

    @property
    def max_iters(self) -> int:
        return int(self.config["max_iters"])

    def series(self, key: str = "val/loss", upto: float = math.inf) -> dict[int, float]:
        """{iter: value} of a metric, rising by iter."""
        rows = sorted(self.train + self.val, key=lambda r: r["iter"])
        return {r["iter"]: r[key] for r in rows if is_number(r.get(key)) and r["iter"] <= upto}

    def last_row(self, it: int) -> dict:
        """All figures of the evaluation at one iter, {} where there was none."""
        return next((r for r in self.val if r["iter"] == it), {})

    def val_at(self, it: int, key: str = "val/loss") -> float | None:
        """A metric of the evaluation at one iter, or None."""
        return self.last_row(it).get(key)


def is_number(value) -> bool:
    """A finite number; null and what is missing are not."""
    return isinstance(value, int | float) and math.isfinite(value)


def shared_iters(curves: list[dict]) -> list[int]:
    """The iters that all the curves {iter: value} have, rising."""
    return sorted(set.intersection(*map(set, curves))) if curves else []


def find_run_folders(paths) -> list[Path]:
    """Every folder at or below the paths that holds a run.json, sorted."""
    found = set()
    for path in map(Path, paths):
        if not path.is_dir():
            raise RunError(f"there is no folder {path}; give a run's folder or one that holds runs")
        found.update(p.parent for p in found_below(path, "run.json"))
    if not found:
        where = ", ".join(map(str, paths))
        raise RunError(f"no run.json at or below {where}; train first (scripts/matched.py)")
    return sorted(found)


def default_out(paths) -> Path:
    """Where results on some runs go: the folder given, be it of one run or of many, or the parent of several runs that
    are given one by one.

    For the weights of others, by a file's or the hub's name: out/NAME. (A folder of the hub's name would hide the hub's.)
    """
    first = Path(paths[0])
    if not first.is_dir():
        return Path("out") / first.stem
    # a look at one run is no new result of those beside it
    return first.parent if len(paths) > 1 and (first / "run.json").exists() else first


def load_folder(path: Path) -> Run:
    """The run of one folder. Raises DataError or RunError, naming the file and what is wrong with it."""
    config, info = read_run(path)
    contract.check_record(str(path), config, info)
    return make_run(str(path), config, info, read_metrics(path))


def make_run(name: str, config: dict, info: dict, rows: list[dict]) -> Run:
    """A Run of its config, run record and metrics, from wherever they came; its state says how it ended."""
    config = validated(config, Config, f"config.json of {name}", "a run's configuration").model_dump()
    info = validated(info, RunRecord, f"run.json of {name}", "a run's record").model_dump()
    train, val = rows_with(rows, "train/loss"), rows_with(rows, "val/loss")
    run = Run(name, info["arm"], info["seed"], config, info, [r for r in train if is_number(r["train/loss"])])
    bad = next((r["iter"] for r in val if not is_number(r["val/loss"])), math.inf)
    run.val = [r for r in val if r["iter"] < bad]
    reached = run.val[-1]["iter"] if run.val else 0
    if bad < math.inf:
        run.state = f"diverged: val/loss is not finite at iter {bad}"
    elif reached < run.max_iters and info["diverged"] is not None:
        run.state = f"diverged: given up at iter {info['diverged']:,}"
    elif reached < run.max_iters and train and not is_number(train[-1]["train/loss"]):
        lost = run.train[-1]["iter"] if run.train else -1
        since = next(r["iter"] for r in train if r["iter"] > lost)
        run.state = f"diverged: train/loss is not finite from iter {since} on"
    elif not run.val:
        run.state = "no evaluation yet"
    elif reached < run.max_iters:
        run.state = f"unfinished: iter {reached:,} of {run.max_iters:,}"
    return run


def rows_with(rows: list[dict], key: str) -> list[dict]:
    """Rows that carry `key`, rising by iter; after a resume the later row of an iter counts."""
    latest = {r["iter"]: r for r in rows if "iter" in r and key in r}
    return [latest[i] for i in sorted(latest)]


def load_wandb(project: str, group: str | None = None) -> list[Run]:
    """Runs of a wandb project (`entity/project`)."""
    if project.count("/") != 1 or not all(project.split("/")):
        raise RunError(f"--wandb wants entity/project, got {project!r}")
    api, runs = wandb_api(), []
    try:
        for w in api.runs(project, filters={"group": group} if group else None):
            config = dict(w.config)
            if info := config.pop("run", None):  # else another run of the project, not made by this one
                rows = [{k: v for k, v in row.items() if v is not None} for row in w.scan_history()]
                rows = [{k: math.nan if v == "NaN" else v for k, v in row.items()} for row in rows]
                runs.append(make_run(f"{project}/{w.name}", config, info, rows))
    except (RunError, DataError):
        raise
    except Exception as e:  # wandb raises its own errors, and requests'
        raise RunError(f"cannot read {project} from wandb: {first_line(e)}") from None
    if not runs:
        of_group = f" in group {group}" if group else ""
        raise RunError(f"{project} on wandb holds no run made by this project{of_group}")
    return sorted(runs, key=lambda r: r.name)


def wandb_api():
    """wandb.Api() of who is logged in; never asks at the terminal, as Api() itself would."""
    try:
        import wandb
    except ImportError:
        raise RunError("reading from wandb needs the package wandb: pip install wandb") from None
    try:
        if wandb.login(prompt=False, verify=False):  # Api() finds out whether the key is good
            return wandb.Api(timeout=30)
    except Exception as e:  # wandb raises its own errors, requests' and ValueError's
        raise RunError(f"wandb refused ({first_line(e)}); log in with `wandb login`") from None
    raise RunError("wandb is not logged in; run `wandb login` or set WANDB_API_KEY")


def arm_keys(config: dict) -> dict:
    """The keys of a run's config, among those that make an arm, that are not at their defaults."""
    found = {}
    for key in KEYS:
        default = configurator.KEYS[key].default
        value = config.get(key, default)
        usual = {default, USUAL_RMS.get(config.get("wte"))} if key == "wte_init_rms" else {default}
        if value not in usual:
            found[key] = value
    return found


def distinguish(runs) -> None:
    """Give runs of one arm's name that differ in an arm's keys names of their own, e.g. `kronecker[wte_rank=16]`.

    The plain name stays with the runs that have the keys of config/arms/NAME.py, or, where there is no such file, with
    the first of them. RECIPE's keys count only where runs of one name differ in them.
    """
    for arm in {run.arm for run in runs}:
        mine = [run for run in runs if run.arm == arm]
        plain, file = arm_keys(mine[0].config), arm_file(arm)
        if file.is_file():
            recipe = {k: plain[k] for k in RECIPE if k in plain}
            plain = arm_keys(configurator.read_file(str(file))) | recipe
        for run in mine:
            keys = arm_keys(run.config)
            other = [k for k in KEYS if k in run.config and keys.get(k) != plain.get(k)]
            if other:
                run.arm += "[" + ", ".join(f"{k}={run.config.get(k)}" for k in other) + "]"


def refuse_twins(runs: list[Run]) -> None:
    """RunError where two runs are of one arm and seed."""
    seen: dict = {}
    for run in runs:
        other = seen.setdefault((run.arm, run.seed), run)
        if other is not run:
            both = f"{other.name} and {run.name} are both arm {run.arm}, seed {run.seed}"
            raise RunError(f"{both}; give only one of them")


def short(value) -> str:
    """The start of a hash, enough to tell two apart."""
    return str(value)[:12]


def machine_notes(runs: list[Run]) -> list[str]:
    """Sentences on machines and versions that differ between runs, or between the starts of one: noted, not refused."""
    notes = []
    for key, what in (("device", "devices"), ("torch", "torch versions"), ("commit", "commits")):
        values = {str(start.get(key)) for r in runs for start in (r.info, *r.info["starts"])}
        if len(values) > 1:
            notes.append(f"The runs come from different {what}: {', '.join(v[:40] for v in sorted(values))}.")
    return notes
