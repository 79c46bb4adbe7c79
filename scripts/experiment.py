"""Experiments as files: which runs config/experiments/NAME.py asks for, what they gave, and what each arm's best setting is.

An experiment compares arms on several rungs (recipes) and lengths, each arm tuned alike. Its runs come in three stages:

    tune     the learning rate at each arm's own defaults, then wte_lr_mult x wte_init_rms at the best learning rate, then
             the learning rate once more at the best of these
    recheck  on a larger rung or length: the learning rate once more, around the best
    final    other seeds, other validation windows: all arms at one shared setting, and each at its own best

`plan` names the runs that follow from the losses known so far, so the same call goes on after every stop. A finished
run leaves one small JSON in the experiment's `records`, and with it counts as done on any machine.
"""

import fnmatch
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field
from typing_extensions import Required, TypedDict

import configurator
from data.files import found_below, write_text
from data.records import STRICT, PlainName, Record, read_record, validated
from engine.contract import HASHED, RULES, Member, check_match
from engine.contract import check_record as check_schedule
from engine.errors import RunError
from engine.metrics import Row, read_metrics
from engine.plan import global_batch
from engine.runs import Key, Parameters, read_run
from engine.runs import Run as RunSchema
from model import USUAL_RMS
from scripts.arguments import flags
from scripts.provenance import ROOT

ARMS = ROOT / "config" / "arms"
# Of config.json, what says where a run was made and not what it is.
PLACE = {key for key, rule in RULES.items() if not rule.ranks} - {"dataset"} | {"init_from"}


def once(values: list) -> list:
    """The values, if there are some and no two are equal: a run counted twice would weigh twice."""
    if not values or len(set(values)) < len(values):
        raise ValueError("it should have a value at least, and each once")
    return values


Each = Annotated[list[TypeVar("T")], AfterValidator(once)]
Factor = Annotated[float, Field(gt=0)]
# How the runs of a stage are looked at; what they are follows from rung, length, arm and setting alone.
Look = Literal["eval_tokens", "eval_skip_tokens", "eval_interval", "log_interval", "ckpt_interval", "keep"]


class Length(TypedDict):
    __pydantic_config__ = STRICT
    max_iters: int


class Shared(TypedDict, total=False):
    __pydantic_config__ = STRICT | {"extra": "forbid"}
    learning_rate: Required[Factor]
    wte_lr_mult: Factor
    wte_init_rms: Factor


class Part(Record):
    """Of an experiment's file, in which no name may be unknown."""

    model_config = STRICT | {"extra": "forbid"}


class Place(Part):
    rung: str
    length: str


class Stage(Place):
    seeds: Each[int]
    keys: dict[Look, int] = {}


class Tuning(Stage):
    learning_rate: Each[Factor]
    wte_lr_mult: dict[str, Each[Factor]]  # by pattern of the arm's name
    wte_init_rms: dict[str, Each[Factor]]
    extend: Annotated[int, Field(ge=0)] = 2
    again: Each[Factor] = []  # factors of the best learning rate; without them it is not tried once more


class Recheck(Stage):
    factors: Each[Factor]
    extend: Annotated[int, Field(ge=0)] = 0


class Final(Place):
    seeds: Each[int]
    settings: Each[Literal["shared", "best"]]
    arms: Each[str] = []  # of the experiment's; empty: all


class Pair(Part):
    arm: str
    over: str


class Experiment(Part):
    """What an experiment file says; see config/experiments/ladder.py for the meaning of each name."""

    name: str
    records: str
    data: str = ""  # what the text is, for the report
    rungs: dict[PlainName, str]
    lengths: dict[PlainName, Length]
    min_lr_ratio: Annotated[float, Field(ge=0)]
    arms: Each[str]
    tuning: Tuning
    recheck: list[Recheck] = []
    shared: Shared
    final_keys: dict[Look, int]
    final: list[Final]
    smallest_difference: float
    held_out: Place | None = None
    gap: Pair
    gflops: Factor = 50.0


class RunRecord(Record):
    """What is kept of a run: its place in the experiment, keys, hashes and provenance, and its curves."""

    experiment: str
    name: str
    state: Literal["finished", "diverged"]
    config: dict[str, Key]
    run: dict
    rows: list[Row]


class MadeRun(RunSchema):
    params: Parameters


@dataclass(frozen=True)
class Run:
    stage: str
    rung: str
    length: str
    arm: str
    setting: tuple[tuple[str, float], ...]  # keys laid over the arm's file, in order of their names
    seed: int

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.rung}_{self.length}/{self.arm}_{setting_name(self.setting)}_s{self.seed}"


SHORT = {"learning_rate": "lr", "wte_lr_mult": "mult", "wte_init_rms": "rms", "head_lr_mult": "head"}


def setting_name(setting) -> str:
    return "_".join(f"{SHORT.get(k, k)}{v:g}" for k, v in setting)


def is_experiment(path: str) -> bool:
    return Path(path).is_file() and "rungs" in configurator.read_file(path)


def read(path: str) -> Experiment:
    """The experiment of a file, with every name in it known; RunError or DataError in one sentence otherwise."""
    given = {"name": Path(path).stem} | configurator.read_file(path)
    exp = validated(given, Experiment, path, "an experiment")
    tuned = [exp.tuning, *exp.recheck]
    for place in (*tuned, *exp.final, *filter(None, [exp.held_out])):
        for what, value, known in (("rung", place.rung, exp.rungs), ("length", place.length, exp.lengths)):
            if value not in known:
                raise RunError(f"{path} names the {what} {value!r}, but it has only {', '.join(known)}")
    for arm in exp.arms:
        if not arm_file(arm).is_file():
            raise RunError(f"{path} names the arm {arm!r}, but there is no config/arms/{arm}.py")
        grids(exp, arm)
    for arm in [exp.gap.arm, exp.gap.over, *(a for f in exp.final for a in f.arms)]:
        if arm not in exp.arms:
            raise RunError(f"{path} names the arm {arm!r}, which is none of its arms: put it into arms")
    places = [(p.rung, p.length) for p in tuned]
    places += [(p.rung, p.length, which) for p in exp.final for which in p.settings]
    if len(set(places)) < len(places) or exp.gap.arm == exp.gap.over:
        cure = "name each rung and length once, and two arms of the gap"
        raise RunError(f"{path} asks for the same twice: {cure}")
    if twice := {seed for p in tuned for seed in p.seeds} & {seed for f in exp.final for seed in f.seeds}:
        raise RunError(f"{path} uses seed {min(twice)} to tune and in final runs")
    end = max(p.keys.get("eval_tokens", math.inf) + p.keys.get("eval_skip_tokens", 0) for p in tuned)
    if exp.final_keys.get("eval_skip_tokens", 0) < end:
        cure = "raise eval_skip_tokens in final_keys"
        raise RunError(f"{path} tunes on validation windows that final runs read: {cure}")
    return exp


def arm_file(arm: str) -> Path:
    return ARMS / f"{arm}.py"


def about(arm: str) -> str:
    """What an arm is: the first line of its file."""
    return arm_file(arm).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


@lru_cache
def own_keys(arm: str) -> dict:
    """What an arm's file says, and the multipliers and the scale that it has without saying so."""
    file = configurator.read_file(str(arm_file(arm)))
    return {"wte_lr_mult": 1.0, "head_lr_mult": 1.0, "wte_init_rms": USUAL_RMS[file["wte"]]} | file


def setting_of(arm: str, keys: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Keys laid over the arm's file, without those that say what the arm has anyway: equal settings, equal names."""
    has = own_keys(arm)
    return tuple(sorted((k, float(v)) for k, v in keys.items() if k not in has or has[k] != v))


def grids(exp: Experiment, arm: str) -> list[list[float]]:
    """Values of wte_lr_mult, and of wte_init_rms, that an arm is tuned over."""
    found = []
    for grid in (exp.tuning.wte_lr_mult, exp.tuning.wte_init_rms):
        match = [values for pattern, values in grid.items() if fnmatch.fnmatch(arm, pattern)]
        if len(match) != 1:
            patterns = f"{len(match)} patterns of {', '.join(grid)}"
            raise RunError(f"{patterns} fit the arm {arm}, but exactly one must")
        found += match
    return found


def tuned_at(exp: Experiment, place: Place) -> Place:
    """Where the best settings of a place were chosen: of the places that were tuned, the last one whose rung comes no
    later in the file and, on its own rung, whose length does not."""

    def size(of: Place) -> tuple[int, int]:
        return list(exp.rungs).index(of.rung), list(exp.lengths).index(of.length)

    tuned = [t for t in (exp.tuning, *exp.recheck) if size(t) <= size(place)]
    return max(tuned, key=size, default=exp.tuning)


# ---- which runs there are


class Unknown(Exception):
    """A loss that a choice hangs on is not known yet."""


@dataclass(frozen=True)
class Line:
    """One line of a search: an arm with some keys fixed, and the values of one key that are tried."""

    arm: str
    fixed: tuple[tuple[str, float], ...]
    values: tuple[float, ...]


def middling(line: Line, value: float) -> float:
    """A made-up loss of one of a line's values, lowest in the middle."""
    return abs(math.log(value / sorted(line.values)[(len(line.values) - 1) // 2]))


class Plan:
    """The runs that follow from the losses known so far, and the choices made from the tuning's losses alone.

    losses: {run name: last validation loss}, infinite for a run that diverged. `runs`: all that are known, in the order
    in which to run them. `best`: {(rung, length, arm): setting}. `edges`: sentences about optima that stand at the edge
    of a grid that was not extended any more. `complete`: whether every choice could be made. pretend: take an unknown optimum
    for the middle of its line, to count the runs of a plan before they are run.
    """

    def __init__(self, exp: Experiment, losses: Mapping[str, float], pretend: bool = False):
        self.exp, self.losses, self.pretend = exp, losses, pretend
        self.runs: list[Run] = []
        self.best: dict[tuple[str, str, str], tuple] = {}
        self.edges: list[str] = []
        self.complete = True
        self.settle(self.tune)
        for final in exp.final:
            place = tuned_at(exp, final)
            if place in exp.recheck and "best" in final.settings:
                for arm in final.arms or exp.arms:
                    self.settle(self.recheck, place, arm)
            runs = [run for which in final.settings for *_, run in self.final_runs(final, which) if run]
            self.runs += sorted(runs, key=lambda run: final.seeds.index(run.seed))
        self.runs, self.edges = list(dict.fromkeys(self.runs)), list(dict.fromkeys(self.edges))

    def settle(self, choose, *what) -> None:
        """Make a choice, or note that it cannot be made yet."""
        try:
            choose(*what)
        except Unknown:
            self.complete = False

    def tune(self) -> None:
        """The learning rate at the arm's own defaults, then the input side's multiplier and scale at the best one, then
        the learning rate once more at those."""
        t, arms = self.exp.tuning, self.exp.arms
        lines = [Line(arm, (), tuple(t.learning_rate)) for arm in arms]
        rates, lines = self.search("tune", t, lines, "learning_rate", 2, t.extend), []
        for arm in arms:
            mults, scales = grids(self.exp, arm)
            lines += [Line(arm, (*rates[arm], ("wte_init_rms", rms)), tuple(mults)) for rms in scales]
        best = self.search("tune", t, lines, "wte_lr_mult", 4, t.extend)
        if not t.again:
            return self.choose(t, best)
        for arm, setting in best.items():
            self.settle(self.once_more, "tune", t, arm, setting, t.again, t.extend)

    def recheck(self, place: Recheck, arm: str) -> None:
        """An arm's learning rate on another rung or length, around the tuning's best."""
        tuned = self.best.get((self.exp.tuning.rung, self.exp.tuning.length, arm))
        if tuned is None:
            raise Unknown
        self.once_more("recheck", place, arm, tuned, place.factors, place.extend)

    def once_more(self, stage: str, place, arm: str, setting: tuple, factors: list, extend: int) -> None:
        """Choose an arm's learning rate among factors of a setting's, whose other keys are kept.

        A grid that is extended grows for this arm alone, so no arm waits for another.
        """
        keys = dict(setting)
        lr = keys.pop("learning_rate")
        line = Line(arm, tuple(keys.items()), tuple(lr * f for f in factors))
        self.choose(place, self.search(stage, place, [line], "learning_rate", 2, extend))

    def choose(self, place: Place, settings: dict[str, tuple]) -> None:
        self.best |= {(place.rung, place.length, arm): setting for arm, setting in settings.items()}

    def search(self, stage: str, place, lines: list[Line], key: str, factor: float, extend: int) -> dict:
        """{arm: its best setting} over all its lines.

        While one arm's best value stands at an edge of its line, every arm's best line grows there by one value, so
        that all arms get the same number of runs; at most `extend` times.
        """
        for extension in range(extend + 1):
            tried = [(self.loss(stage, place, line, key, v), line, v) for line in lines for v in line.values]
            if unknown := {line.arm for loss, line, _ in tried if math.isnan(loss)}:
                if not self.pretend:
                    raise Unknown
                # made-up losses and real ones have no order, so an arm has either
                tried = [(middling(line, v) if line.arm in unknown else x, line, v) for x, line, v in tried]
            best: dict[str, tuple[float, Line, float]] = {}  # arm: (loss, line, value)
            for point in tried:
                best[point[1].arm] = min(best.get(point[1].arm, point), point, key=lambda p: p[0])
            low = [arm for arm, (_, line, v) in best.items() if v == min(line.values)]
            high = [arm for arm, (_, line, v) in best.items() if v == max(line.values)]
            if not low and not high:
                break
            if extension == extend:
                self.edges += [
                    f"{arm}'s best {key} on rung {place.rung} at {place.length} tokens, {best[arm][2]:g}, stands at the "
                    "edge of its grid."
                    for arm in dict.fromkeys([*low, *high])
                ]
                break
            for _, line, _ in best.values():
                below, above = min(line.values) / factor, max(line.values) * factor
                grown = (below,) * bool(low) + line.values + (above,) * bool(high)
                lines[lines.index(line)] = Line(line.arm, line.fixed, grown)
        return {arm: setting_of(arm, dict(line.fixed) | {key: v}) for arm, (_, line, v) in best.items()}

    def loss(self, stage: str, place, line: Line, key: str, value: float) -> float:
        """Mean loss over the stage's seeds, whose runs come into the plan; NaN until all of them are known."""
        setting = setting_of(line.arm, dict(line.fixed) | {key: value})
        runs = [Run(stage, place.rung, place.length, line.arm, setting, seed) for seed in place.seeds]
        self.runs += runs
        return sum(self.losses.get(run.name, math.nan) for run in runs) / len(runs)

    def final_runs(self, final: Final, which: str) -> list[tuple[str, int, Run | None]]:
        """[(arm, seed, run)] that the file asks for, seed by seed; no run while its setting hangs on runs to come."""
        settings, tuned = {}, tuned_at(self.exp, final)
        for arm in final.arms or self.exp.arms:
            shared = which == "shared"
            best = self.best.get((tuned.rung, tuned.length, arm))
            settings[arm] = setting_of(arm, self.exp.shared) if shared else best
        return [
            (arm, seed, None if s is None else Run("final", final.rung, final.length, arm, s, seed))
            for seed in final.seeds
            for arm, s in settings.items()
        ]


# ---- what a run is, as a command and as a record


def command_keys(exp: Experiment, run: Run) -> list[str]:
    """Arguments for train.py: recipe, arm, and --key=value."""
    stages = {"tune": exp.tuning.keys, "final": exp.final_keys}
    stages |= {(place.rung, place.length): place.keys for place in exp.recheck}
    stage = stages[(run.rung, run.length) if run.stage == "recheck" else run.stage]
    keys = exp.lengths[run.length] | stage | dict(run.setting)
    keys |= {"min_lr": keys["learning_rate"] * exp.min_lr_ratio, "seed": run.seed, "arm": run.arm}
    return [str(ROOT / exp.rungs[run.rung]), str(arm_file(run.arm)), *flags(keys)]


def tokens_of(exp: Experiment, place) -> int:
    """Training tokens of the runs at a place of the experiment: anything with a rung and a length."""
    words = [str(ROOT / exp.rungs[place.rung]), *flags(exp.lengths[place.length])]
    config = configurator.load(words, quiet=True)
    return global_batch(config) * config.block_size * config.max_iters


def write_record(exp: Experiment, run: Run, out_dir: Path, state: str) -> None:
    """Keep what a finished (or diverged) run's folder says, on one line, without where on this machine it lay."""
    config, about = read_run(out_dir)
    check_record(exp, run, config, about, out_dir)
    place = PLACE | ({"dataset"} if config.get("data_dir") else set())  # which then names no data of this run
    rows = [row for row in read_metrics(out_dir) if "val/loss" in row or row.get("iter", 0) % 64 == 0]
    record = {
        "experiment": exp.name,
        "name": run.name,
        "state": state,
        "config": {k: v for k, v in config.items() if k not in place},
        "run": {k: v for k, v in about.items() if k not in ("command", "wandb_id")}
        | {"starts": [{k: v for k, v in start.items() if k != "command"} for start in about["starts"]]},
        "rows": [
            {k: float(f"{v:.6g}") if isinstance(v, float) and "loss" not in k else v for k, v in row.items()}
            for row in rows
        ],
    }
    path = record_path(exp, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, allow_nan=False) + "\n")


def record_path(exp: Experiment, run: Run) -> Path:
    return ROOT / exp.records / f"{run.name}.json"


def read_records(exp: Experiment) -> dict[str, RunRecord]:
    """{run name: record} of all that lie in the experiment's folder; RunError where one is another run than it says."""
    found, folder = {}, ROOT / exp.records
    for path in found_below(folder, "*.json"):
        record = read_record(path, RunRecord, "a run's record")
        validated(record.run, MadeRun, f"run in {path}", "a run's record")
        name = path.relative_to(folder).with_suffix("").as_posix()
        if (record.name, record.experiment) != (name, exp.name):
            whose = f"{record.name} of {record.experiment}"
            raise RunError(f"{path} is the record of {whose}: it was moved; restore it")
        if record.state == "finished" and last_row(record).get("iter") != record.config.get("max_iters"):
            raise RunError(f"{path} is of a finished run, but without its last validation loss: restore it")
        found[name] = record
    return found


def last_row(record: RunRecord) -> dict:
    """The row of the last evaluation that gave a loss; {} where there is none."""
    return next((row for row in reversed(record.rows) if row.get("val/loss") is not None), {})


def plan_of(exp: Experiment, records: Mapping[str, RunRecord]) -> Plan:
    """The plan that the records lead to; RunError where one of its runs was made with other keys than the file's, or
    does not match the others of its stage, rung and length: neither chooses a setting nor is compared."""
    plan = Plan(exp, losses_of(records))
    members: dict[tuple, list[Member]] = {}
    for run in plan.runs:
        if record := records.get(run.name):
            check_record(exp, run, record.config, record.run)
            arm = f"{run.arm} {setting_name(run.setting)}"
            member = Member(record.name, arm, run.seed, record.config, record.run)
            members.setdefault((run.stage, run.rung, run.length), []).append(member)
    for of_place in members.values():
        check_match(of_place, swept=("learning_rate", "min_lr"))
    return plan


def losses_of(records: Mapping[str, RunRecord]) -> dict[str, float]:
    """{run name: last validation loss}, infinite where the run diverged."""
    ended = {name: last_row(record) if record.state == "finished" else {} for name, record in records.items()}
    return {name: row.get("val/loss", math.inf) for name, row in ended.items()}


# What train.py fills in where the key is left at its default.
RESOLVED = {"vocab_size", "wte_init_rms", "global_batch_size", "dtype", "compile", "lr_decay_iters", "arm"}


def check_record(exp: Experiment, run: Run, config: dict, about: dict, where: Path | None = None) -> None:
    """RunError where a run's config.json and run.json say another run than the experiment's file; where: its folder."""
    where = where or record_path(exp, run)
    if (about.get("arm"), about.get("seed")) != (run.arm, run.seed):
        what = f"arm {about.get('arm')!r} and seed {about.get('seed')!r}, not {run.arm!r} and {run.seed}"
        raise RunError(f"{where} is of {what}: remove it and run it again")
    wanted = configurator.load(command_keys(exp, run), quiet=True)
    cure = "remove it and run it again, or restore the experiment's file"
    check_keys(where, config, wanted, set(wanted.given) - PLACE, exp.name, cure)
    check_schedule(str(where), config, about)


def check_keys(where, config: dict, wanted, also: Iterable[str], asker: str, cure: str) -> None:
    """RunError where a run's config.json has other keys than are wanted of it, among those that compared runs share, or
    the runs of one arm, and `also` some. What train.py resolved counts only where it was wanted."""
    shared = {key for key, rule in RULES.items() if rule.same}
    for key in (key for key in RULES if key in shared | set(also)):
        asked = getattr(wanted, key)
        if key in RESOLVED and asked == configurator.KEYS[key].default:
            if key != "wte_init_rms":
                continue
            asked = USUAL_RMS[wanted.wte]
        if key not in config and key in set(also) | set(HASHED):
            raise RunError(f"{where} has no {key}: restore it, or remove it and run it again")
        there = config.get(key, asked)  # a key that is younger than the record
        if there != asked:
            raise RunError(f"{where} was made with {key}={there!r}, but {asker} asks for {asked!r}: {cure}")
