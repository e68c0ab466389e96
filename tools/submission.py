"""Seeds one after another, and what a record needs of their records: statistics, submission.json, folder.

    python tools/submission.py seeds FOLDER SEED... [--against FILE] -- COMMAND...   `./run.sh RECIPE SEED...`
    python tools/submission.py retest FOLDER -- COMMAND...                           evaluate every seed again
    python tools/submission.py summary FOLDER [--against FILE]                       its figures and table
    python tools/submission.py folder FOLDER OUT_DIR                                 a folder to submit

FOLDER/seed<N> holds the run of seed N: train_seed<N>.txt and .json, its artifact, and eval_seed<N>.* of a
repeated evaluation. --against: a submission.json, or lines `seed val_bpb`, or lines `val_bpb`. With the same
seeds on both sides the test is a paired t-test, else Welch's; both are one-sided: is the improvement above
0.005 nats per token? After the seeds come the folder (FOLDER/submission), the report (FOLDER/report) and the
audit, whose exit code is this one's. Where it finds no fault, `--publish record` writes submission.json and
the README's table at the project's top too, if the runs are a record: of the published text, on eight H100,
with their recipe's settings. `--publish any` writes whatever they are; json and table say why it is none.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "source"), str(ROOT)]  # in a submission source/ has the modules
import verify_submission  # noqa: E402
from env_settings import InputError  # noqa: E402
from host import hold, lasting_console, write_whole  # noqa: E402
from tools.pack_submission import EVALUATION_FILES  # noqa: E402

RULE_NATS, RULE_P = 0.005, 0.01
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
APART = {"seed", "run_id", "artifact_dir", "data_dir", "data_path", "tokenizer_path", "rank", "local_rank",
         "ttt_eval_only", "train_log_every", "recipe"}  # settings in which seeds may differ
SHIPPED = ("lossless_caps.py", "prepare_caseops_data.py", "verify_submission.py", "requirements.txt",
           "requirements-cuda.txt", "run.sh", "recipes", "tokenizers", "docs", "LICENSE",
           "tools/submission.py", "tools/report.py", "tools/pack_submission.py", "tools/diff_recipes.py",
           "tools/download_data.py", "tools/check_data.py", "tools/train_tokenizer.py",
           "tools/demo_corpus.py", "tools/launch.py", "tools/check_machine.py")


def load(path: Path) -> dict:
    """A run record; InputError when it is none."""
    try:
        record = json.loads(path.read_text())
        record["settings"], record["events"], record["results"]
        return record
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run the seed first") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no run record of train_gpt.py; remove it and run the seed again") from None


def event(record: dict, kind: str) -> dict:
    return next((e for e in record["events"] if e["event"] == kind), {})


def seed_folders(folder: Path) -> dict[int, Path]:
    found = {int(path.name[4:]): path for path in folder.glob("seed*") if re.fullmatch(r"seed\d+", path.name)}
    if not found:
        raise InputError(f"{folder}: no folders seed<N> in it; run ./run.sh RECIPE SEED... first")
    return found


def finished(folder: Path) -> dict[int, dict]:
    """The records of all seeds, in the order of the runs; InputError unless finished and of one kind."""
    records = {seed: load(path / f"train_seed{seed}.json") for seed, path in seed_folders(folder).items()}
    for seed, record in records.items():
        scored = {"ttt", "quantized"} & record["results"].keys()
        if record["status"] != "finished" or not scored:
            status = record["status"]
            raise InputError(f"{folder}/seed{seed}: its run is {status}; run it again, or remove the folder")
    (first, one), *others = sorted(records.items(), key=lambda item: item[1]["started"])
    for seed, other in others:
        differing = sorted(name.upper() for name, value in one["settings"].items()
                           if name not in APART and other["settings"].get(name) != value)
        if differing or event(one, "code").get("sha256") != event(other, "code").get("sha256"):
            raise InputError(f"{folder}/seed{seed}: not the settings or code of seed {first} ("
                             f"{', '.join(differing) or 'code'}); run all seeds with the same")
    return dict(sorted(records.items(), key=lambda item: item[1]["started"]))


# --- Runs


def run(command: list[str], **environ: object) -> int:
    """Run the command with these variables, pass SIGTERM on to it, and return its exit code."""
    variables = {name: str(value) for name, value in environ.items()}
    process = subprocess.Popen(command, env=os.environ | variables)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def check_finished(folder: Path, seeds: list[int], ranks: int) -> set[int]:
    """The seeds that are finished; InputError if what lies there does not belong with what is to run now."""
    import train_gpt as g

    settings = g.Settings.from_environment(os.environ)
    for name in ("ttt_eval_only", "quantize_only", "prequant_only"):
        if getattr(settings, name):
            raise InputError(f"{name.upper()}: seeds are whole runs; unset it")
    named = {f"seed{seed}" for seed in seeds}
    others = sorted(path.name for path in folder.glob("seed*") if path.name not in named)
    if others:
        shown = " ".join(map(str, seeds))
        raise InputError(f"{folder}/{others[0]}: not one of the seeds {shown}; name it too, or move it away")
    wanted, done = dataclasses.asdict(settings) | dict(world_size=ranks), set()
    for seed in seeds:
        path = folder / f"seed{seed}" / f"train_seed{seed}.json"
        record = load(path) if path.exists() else dict(status="none")
        if record["status"] == "finished":
            differing = sorted(name.upper() for name, value in wanted.items()
                               if name not in APART and record["settings"].get(name) != value)
            code = hashlib.sha256(g.packed_code()).hexdigest()
            if differing or event(record, "code").get("sha256") != code:
                shown = ", ".join(differing) or "code"
                raise InputError(f"{folder}/seed{seed}: it is finished, with other {shown} than now; remove "
                                 "the folder, or set ARTIFACT_DIR to a new one")
            done.add(seed)
    return done


def run_seeds(folder: Path, seeds: list[int], command: list[str]) -> None:
    """Run every seed that is not finished yet. An earlier attempt's record is kept under another name."""
    nproc = [int(word.partition("=")[2]) for word in command if word.startswith("--nproc_per_node=")]
    done = check_finished(folder, seeds, nproc[0] if nproc else 1)
    for seed in seeds:
        home, name = folder / f"seed{seed}", f"train_seed{seed}"
        if seed in done:
            print(f"seed {seed}: finished before", flush=True)
            continue
        lock = hold(str(home), str(home))  # a run that is under way keeps its record
        attempt = 1 + len(list(home.glob("attempt*.json")))
        for suffix in (".json", ".txt"):
            if (home / (name + suffix)).exists():
                (home / (name + suffix)).rename(home / f"attempt{attempt}_{name}{suffix}")
        os.close(lock)
        print(f"seed {seed}: {home}", flush=True)
        code = run(command, SEED=seed, ARTIFACT_DIR=home.resolve(), RUN_ID=name)
        if code:
            raise SystemExit(code)


def retest(folder: Path, command: list[str]) -> None:
    """Score every seed's artifact again; the scores of an earlier repetition are replaced."""
    for seed, home in seed_folders(folder).items():
        name = f"eval_seed{seed}"
        lock = hold(str(home), str(home))
        for path in home.glob(f"{name}.*"):
            path.unlink()
        os.close(lock)
        code = run(command, SEED=seed, ARTIFACT_DIR=home.resolve(), RUN_ID=name, TTT_EVAL_ONLY=1)
        if code:
            raise SystemExit(code)
        again = load(home / f"{name}.json")["results"]
        before = load(home / f"train_seed{seed}.json")["results"]
        stage = "ttt" if "ttt" in before else "quantized"
        scores = [results[stage]["val_bpb"] for results in (again, before)]
        print(f"seed {seed}: val_bpb {scores[0]:.8f}, {scores[1]:.8f} after training", flush=True)


# --- Statistics


def figures(record: dict) -> dict:
    """One seed's figures for submission.json."""
    results = record["results"]
    final, training, size = results.get("ttt", results["quantized"]), results["training"], results["size"]
    return dict(val_loss=final["val_loss"], val_bpb=final["val_bpb"],
                pre_quant_bpb=results.get("averaged", results["raw"])["val_bpb"],
                quantized_bpb=results["quantized"]["val_bpb"], steps=training["steps"],
                train_seconds=training["clock_seconds"], eval_seconds=final["seconds"],
                artifact_bytes=size["artifact_bytes"], code_bytes=size["code_bytes"],
                total_bytes=size["total_bytes"])


def spread(values: list[float]) -> float | None:
    """Sample standard deviation; one value has none."""
    return round(statistics.stdev(values), 8) if len(values) > 1 else None


def baseline(path: Path) -> dict[str, float]:
    """val_bpb by seed; seeds that are not known are numbered from #1."""
    try:
        text = path.read_text()
    except OSError as error:
        remedy = "give a submission.json or lines `seed val_bpb`"
        raise InputError(f"--against {path}: {error.strerror}; {remedy}") from None
    try:
        results = json.loads(text)["seed_results"]
        values = {str(seed): float(value["val_bpb"]) for seed, value in results.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        values = {}
        for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
            match = re.fullmatch(r"(?:(\d+)[\s,:]+)?(\d+\.\d+)", line)
            if not match:
                wrong = f"line {number} is neither `seed val_bpb` nor `val_bpb`"
                raise InputError(f"--against {path}: {wrong}") from None
            values[match[1] or f"#{number}"] = float(match[2])
    if len(values) < 2:
        raise InputError(f"--against {path}: fewer than two values, which no test can compare with")
    return values


def compare(ours: dict[str, float], theirs: dict[str, float], nats_per_bpb: float) -> dict:
    """One-sided test that ours are lower by more than RULE_NATS per token. val_bpb by seed on both sides."""
    if len(ours) < 2:
        raise InputError("--against: one seed of our own is too few for a test")
    low, high = ([value * nats_per_bpb for value in side.values()] for side in (ours, theirs))
    paired = ours.keys() == theirs.keys()
    if paired:
        high = [theirs[seed] * nats_per_bpb for seed in ours]
    difference = statistics.mean(high) - statistics.mean(low)
    p = verify_submission.t_test(high, low, paired, RULE_NATS)
    test = "paired t-test" if paired else "Welch's t-test"
    return dict(test=test, difference_nats=round(difference, 6), threshold_nats=RULE_NATS, p=round(p, 6),
                required_p=RULE_P, baseline=theirs, new_record=difference > RULE_NATS and p < RULE_P)


def summarize(folder: Path, against: Path | None) -> dict:
    """Write FOLDER/submission.json and FOLDER/results.md from the records; returns what is in the first."""
    records = finished(folder)
    seeds = {str(seed): figures(record) for seed, record in records.items()}
    one = next(iter(records.values()))
    final = one["results"].get("ttt", one["results"]["quantized"])
    machine = one["machine"]
    because = off_track(records)
    column = {name: [s[name] for s in seeds.values()] for name in next(iter(seeds.values()))}
    title = f"{folder.name}: score-first test-time training in one decodable order"
    submission = dict(
        author=os.environ.get("SUBMISSION_AUTHOR", ""), github_id=os.environ.get("SUBMISSION_GITHUB_ID", ""),
        name=os.environ.get("SUBMISSION_NAME", title),
        date=max(record["started"] for record in records.values())[:10],
        track="non_record_16mb" if because else "10min_16mb", record=not because, because=because,
        val_loss=round(statistics.mean(column["val_loss"]), 8),
        val_bpb=round(statistics.mean(column["val_bpb"]), 8),
        val_loss_std=spread(column["val_loss"]), val_bpb_std=spread(column["val_bpb"]),
        seeds=list(map(int, seeds)), seed_results=seeds, bytes_total=max(column["total_bytes"]),
        bytes_code=max(column["code_bytes"]), hardware=f"{machine['devices']} x {machine['device']}",
        torch=machine["torch"])
    if against:
        ours = {seed: value["val_bpb"] for seed, value in seeds.items()}
        nats = math.log(2) * final["bytes"] / final["targets"]
        submission["comparison"] = dict(against=against.name, **compare(ours, baseline(against), nats))
    write(folder / "submission.json", json.dumps(submission, indent=2) + "\n")
    write(folder / "results.md", results_table(submission))
    return submission


def off_track(records: dict[int, dict]) -> str:
    """Why the runs are no record, in their own words; empty if they can be one."""
    tracks = [event(record, "track") for record in records.values()]
    reasons = [track.get("because", "a run does not name its track") for track in tracks
               if track.get("name") != "10min_16mb"]
    return "; ".join(dict.fromkeys(reasons))


def results_table(submission: dict) -> str:
    """The README's table of results."""
    quality = ("pre_quant_bpb", "quantized_bpb", "val_bpb", "val_loss")
    seeds = submission["seed_results"]
    rows = []
    for seed, one in seeds.items():
        rows.append([seed, *(f"{one[name]:.8f}" for name in quality), f"{one['steps']:,}",
                     f"{one['train_seconds']:.1f}", f"{one['eval_seconds']:.1f}", f"{one['total_bytes']:,}"])
    column = {name: [one[name] for one in seeds.values()] for name in next(iter(seeds.values()))}
    mean = {name: statistics.mean(values) for name, values in column.items()}
    rows.append(["mean", *(f"{mean[name]:.8f}" for name in quality), f"{mean['steps']:,.0f}",
                 f"{mean['train_seconds']:.1f}", f"{mean['eval_seconds']:.1f}", ""])
    rows[-1][1 + quality.index("val_bpb")] = f"**{mean['val_bpb']:.8f}**"
    if len(seeds) > 1:
        rows.append(["std", *(f"{spread(column[name]):.8f}" for name in quality), "", "", "", ""])
    head = ["seed", "val_bpb before quantization", "quantized", "final", "val_loss", "steps", "training s",
            "evaluation s", "artifact + code bytes"]
    about = "{name}; {hardware}, torch {torch}, {date}.".format(**submission)
    if submission["because"]:
        about += f" No record: {submission['because']}."
    lines = [about, "", *("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])]
    comparison = submission.get("comparison")
    if comparison:
        verdict = "a new record" if comparison["new_record"] else "not a new record"
        against = "Against {against}: {difference_nats:.6f} nats per token lower; {test}, p = {p:.4g}"
        rule = f"under the rule of {RULE_NATS} nats at p < {RULE_P}."
        chance = f"that the difference is not above {RULE_NATS}: {verdict}"
        lines += ["", f"{against.format(**comparison)} {chance} {rule}"]
    return "\n".join(lines) + "\n"


# --- Files


def write(path: Path, text: str) -> None:
    """All of the text or what was there before."""
    write_whole(str(path), text.encode())


def with_results(readme: str, table: str) -> str:
    """A README with the table between its two marks, or at its end."""
    section = f"{BEGIN}\n{table}{END}\n"
    if BEGIN in readme and END in readme:
        return readme[:readme.index(BEGIN)] + section + readme[readme.index(END) + len(END):].lstrip("\n")
    return f"{readme}\n## Results\n\n{section}"


def build(folder: Path, out: Path) -> None:
    """Write the folder that is the submission, complete or not at all."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: it exists and is not empty; name a new folder")
    records = finished(folder)
    try:
        submission, table = (folder / "submission.json").read_text(), (folder / "results.md").read_text()
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; run ./run.sh RECIPE SEED... first") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".submission") as scratch:
        new = Path(scratch) / "new"
        (new / "tools").mkdir(parents=True)
        (new / "source").mkdir()
        for name in SHIPPED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, new / name)
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, new / name)
        here = ROOT / "source" if (ROOT / "source").is_dir() else ROOT
        for name in EVALUATION_FILES:
            shutil.copy(here / name, new / "source" / name)
        script = new / "train_gpt.py"
        packer = ROOT / "tools" / "pack_submission.py"
        packed = subprocess.run([sys.executable, str(packer), str(script)], capture_output=True, text=True)
        if packed.returncode:
            raise InputError(f"{here / 'train_gpt.py'}: it cannot be packed: {packed.stderr.strip()}")
        ran = event(next(iter(records.values())), "code")
        if hashlib.sha256(script.read_bytes()).hexdigest() != ran["sha256"]:
            sizes = f"{script.stat().st_size:,} bytes that are not the {ran['packed_bytes']:,}"
            raise InputError(f"{here / 'train_gpt.py'}: it packs into {sizes} with which the seeds ran; "
                             "build with that code, or run the seeds again")
        for seed, record in records.items():
            home = folder / f"seed{seed}"
            for kind in ("train", "eval"):
                if (home / f"{kind}_seed{seed}.json").exists():
                    shutil.copy(home / f"{kind}_seed{seed}.txt", new / f"{kind}_seed{seed}.log")
                    shutil.copy(home / f"{kind}_seed{seed}.json", new / f"{kind}_seed{seed}.json")
            manifest = Path(event(record, "data").get("manifest", ""))
            if manifest.is_file():
                shutil.copy(manifest, new / "data_manifest.json")
        (new / "submission.json").write_text(submission)
        readme = ROOT / "README.md"
        (new / "README.md").write_text(with_results(readme.read_text() if readme.exists() else "", table))
        if out.exists():
            out.rmdir()
        new.rename(out)


def conclude(folder: Path, publish: str) -> int:
    """The folder, its report and its audit, whose exit code is returned; without a fault all is published."""
    out = folder / "submission"
    if out.exists():
        shutil.rmtree(out)
    build(folder, out)
    report = ROOT / "tools" / "report.py"
    subprocess.run([sys.executable, str(report), str(folder), "--out", str(folder / "report")])
    code = verify_submission.main([str(out)])
    if publish and not code:
        print(published(folder, publish), flush=True)
    return code


def published(folder: Path, publish: str) -> str:
    """Write the figures at the project's top, if they are what is to be published; says what became of it."""
    text = (folder / "submission.json").read_text()
    because = json.loads(text)["because"]
    if because and publish != "any":
        return f"README.md and submission.json stay as they are without --publish any: no record, {because}"
    readme = ROOT / "README.md"
    try:
        write(readme, with_results(readme.read_text(), (folder / "results.md").read_text()))
        write(ROOT / "submission.json", text)
    except OSError as error:
        return f"README.md and submission.json stay as they are ({error}); {folder} has both"
    return "README.md and submission.json have these results"


@lasting_console()
def main(arguments: list[str]) -> int:
    own, command = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        own, command = arguments[:at], arguments[at + 1:]
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("seeds", "retest", "summary", "folder"):
        action = actions.add_parser(name)
        action.add_argument("folder", type=Path)
        if name == "seeds":
            action.add_argument("seeds", type=int, nargs="+")
        if name in ("seeds", "summary"):
            action.add_argument("--against", type=Path)
            action.add_argument("--publish", choices=("record", "any"), default="")
        if name == "folder":
            action.add_argument("out", type=Path)
    options = parser.parse_args(own)
    lock = None
    try:
        if getattr(options, "against", None):
            baseline(options.against)
        if options.action == "seeds" or options.action == "retest" and options.folder.is_dir():
            # Another line of seeds between two of this one's would spoil both.
            lock = hold(str(options.folder), str(options.folder))
        if options.action == "seeds":
            if len(set(options.seeds)) < len(options.seeds):
                raise InputError(f"{' '.join(map(str, options.seeds))}: a seed is named twice")
            run_seeds(options.folder, options.seeds, command)
        if options.action in ("seeds", "summary"):
            summarize(options.folder, options.against)
            print((options.folder / "results.md").read_text(), end="", flush=True)
        if options.action == "seeds":
            return conclude(options.folder, options.publish)
        if options.action == "retest":
            retest(options.folder, command)
        if options.action == "folder":
            build(options.folder, options.out)
            print(f"{options.out}: python verify_submission.py {options.out} audits it")
    except InputError as error:
        print(f"submission.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if lock is not None:
            os.close(lock)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
