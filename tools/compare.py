"""Two tables over runs: mIoU and IoU of every class, mean and spread over the seeds.

    python tools/compare.py control="runs/control*" BCL="runs/bcl?" --minus control
    python tools/compare.py "AdvEnt=runs/*/stage1" "IntraDA=runs/*/stage3"

You name the rows. A glob matches run folders or log.jsonl files. Quote it, so that the shell does
not expand it. The runs of a row may differ in their seed, and in what follows from the seed: the
ranking, and the checkpoint that a run starts from. Nothing else may differ. Classes that the source
does not have (SYNTHIA lacks three) are left out.
"""

import argparse
import glob
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import UserError


def settings_of(log: Path) -> tuple:
    """Read a log: ({setting: text}, seed, records). What follows from the seed is not a setting
    here. If --init is the checkpoint of a run, the settings of that run replace its path."""
    if log.name != "log.jsonl" or not log.is_file():
        raise UserError(f"no log.jsonl at {log}. Name folders of training runs.")
    records = common.read_log(log)
    starts = [record for record in records if record.get("event") == "start"]
    if not starts or "settings" not in starts[-1]:
        raise UserError(f"{log} is not the log of a training run. Name run folders.")
    start = starts[-1]  # a resumed run has several
    settings = {"stage": start["stage"], "iterations": start["iters"], **start["settings"]}
    seed = settings.pop("seed", None)  # the only setting in which runs of a row may differ
    settings.pop("ranking", None)  # a hash of stage 1's weights, which follow from the seed
    # Runs of a row may start from checkpoints of their own seeds, if these were trained alike.
    init = Path(str(settings.get("init")))
    if (init.parent / "log.jsonl").is_file():
        earlier, _, _ = settings_of(init.parent / "log.jsonl")
        settings["init"] = init.name
        settings.update({f"{name} of --init": value for name, value in earlier.items()})
    return settings, seed, records


def read_run(log: Path) -> tuple:
    """(settings, seed, {"last", "best": mIoU, "iou": {class: IoU or None}}) of a finished run, in
    percent."""
    settings, seed, records = settings_of(log)
    evaluations = common.evaluations(records)
    reached = max(record["iter"] for record in records)
    evaluated = evaluations[-1]["iter"] if evaluations else 0
    iters = settings["iterations"]
    if evaluated < iters:
        what = f"{log} has {reached} of {iters} iterations, the last evaluation is at {evaluated}"
        raise UserError(f"{what}. Resume the run, or leave it out.")
    # SYNTHIA has 16 of the classes: published means are over these.
    names = list(evaluations[-1]["iou"])
    absent = [names[c] for c in common.ABSENT.get(settings.get("source"), ())]
    iou = {name: x for name, x in evaluations[-1]["iou"].items() if name not in absent}
    means = [record[f"miou{len(iou)}"] or 0.0 for record in evaluations]
    return settings, seed, {"last": means[-1], "best": max(means), "iou": iou}


def read_row(name: str, pattern: str) -> dict:
    """{seed: scores} of the runs that a glob matches. UserError if more than the seed differs."""
    runs = {}
    first = None
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        log = path / "log.jsonl" if path.is_dir() else path
        settings, seed, scores = read_run(log)
        first = first or (log, settings)
        different = []
        for key in sorted(settings.keys() | first[1].keys()):
            if settings.get(key) != first[1].get(key):
                different.append(f"{key} is {first[1].get(key)} and {settings.get(key)}")
        if different:
            what = f"{name}: {first[0]} and {log} differ in more than their seed"
            raise UserError(f"{what}: {'; '.join(different)}. Name them as two rows.")
        if seed in runs:
            raise UserError(f"{name}: seed {seed} occurs twice, again in {log}. Leave one run out.")
        runs[seed] = scores
    if not runs:
        raise UserError(f"{name}: {pattern} matches no run. Name folders that hold a log.jsonl.")
    return runs


def spread(values: list) -> str:
    """Text: mean ± sample standard deviation of the values that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):.1f}"
    return text if len(known) == 1 else f"{text} ± {statistics.stdev(known):.1f}"


def difference(row: dict, other: dict) -> str:
    """Text: row minus other, in the last scores at equal seeds: mean ± standard error, and in
    brackets the number of seeds."""
    # Paired: runs of one seed share order and augmentation, so their differences vary less.
    values = [row[seed]["last"] - other[seed]["last"] for seed in row if seed in other]
    if not values:
        return "-"
    text = f"{statistics.fmean(values):+.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"
    return f"{text} ({len(values)})"


def markdown(table: list) -> str:
    """A Markdown table of lists of cells. The first list is the head."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", metavar="NAME=GLOB", help="a row and its runs")
    parser.add_argument("--minus", metavar="NAME", help="also print each row minus this row")
    args = parser.parse_args()

    rows = {}
    for text in args.rows:
        name, sign, pattern = text.partition("=")
        if not (name and sign and pattern) or name in rows:
            raise UserError(f"{text}: write NAME=GLOB, and give each row a different name.")
        rows[name] = read_row(name, pattern)
    if args.minus and args.minus not in rows:
        raise UserError(f"--minus {args.minus} is not a row. Rows are {', '.join(rows)}.")
    # Means over different classes cannot be compared.
    classes = {name: list(next(iter(runs.values()))["iou"]) for name, runs in rows.items()}
    shared = next(iter(classes.values()))
    for name, own in classes.items():
        if own != shared:
            first = next(iter(rows))
            raise UserError(f"{name} and {first} have different classes. Make two tables.")

    print("IoU in percent: mean ± sample standard deviation over seeds.\n")
    head = ["run", "seeds", f"mIoU {len(shared)}, last", "best (oracle)"]
    if args.minus:
        print(f"Minus {args.minus}, at equal seeds: mean ± standard error (number of seeds).\n")
        head.append(f"minus {args.minus}")
    means = [head]
    for name, runs in rows.items():
        last = spread([scores["last"] for scores in runs.values()])
        best = spread([scores["best"] for scores in runs.values()])
        cells = [name, str(len(runs)), last, best]
        if args.minus:
            cells.append(difference(runs, rows[args.minus]))
        means.append(cells)
    print(markdown(means))
    per_class = [["last, IoU of", *rows]]
    for c in shared:
        columns = [spread([scores["iou"][c] for scores in runs.values()]) for runs in rows.values()]
        per_class.append([c, *columns])
    print()
    print(markdown(per_class))


if __name__ == "__main__":
    common.launch(main)
