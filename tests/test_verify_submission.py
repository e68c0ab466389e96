"""verify_submission.py on record folders of both kinds: sound ones, and each way in which one is not."""
import base64
import hashlib
import json
import lzma
import math
import re
import statistics
import subprocess
import sys
import zlib

import brotli
import pytest
import torch

import train_gpt as g
import verify_submission as v
from tests.synthetic import ROOT, tiny

SEEDS = (42, 0, 314)
TARGETS, BYTES = 2_184_448, 6_620_119
NOISE = "".join(hashlib.sha256(bytes([i])).hexdigest() for i in range(40))
PACKED = b"import base64, lzma\nexec(lzma.decompress(base64.b85decode(%a)))\n" % base64.b85encode(
    lzma.compress(f"import helper\nx = '{NOISE}'\n".encode())).decode()
LONG = "".join(hashlib.sha256(bytes([i, 1])).hexdigest() for i in range(200))


def bundled(**texts) -> bytes:
    """A script packed as train_gpt.py packs itself."""
    words = " ".join(re.findall(r".{1,16}", LONG))
    packed = brotli.compress(json.dumps({n.replace("_dot_", "."): f"{t}\nx = '{words}'\n" for n, t in texts.items()}).encode())
    return b"import base64, brotli, json\nfiles = json.loads(brotli.decompress(base64.b85decode(%a)))\n" % base64.b85encode(
        packed).decode()


SCRIPT = b"import json, zlib\nprint(json.dumps('a packed script'))\n"


# ----------------------------------------------------------------------------------------------------------------------
# A folder of ours
# ----------------------------------------------------------------------------------------------------------------------


class Ours:
    """What a folder of ours is written from; a test changes it before or after write()."""

    def __init__(self, folder):
        self.folder, self.script, self.files = folder, SCRIPT, {}
        self.environment = dict(TTT_ENABLED=1, MAX_WALLCLOCK_SECONDS=600)
        self.older = {}  # settings that today's script no longer has
        self.runs = {f"train_seed{seed}": self.run(seed, place) for place, seed in enumerate(SEEDS)}
        self.runs["eval_seed0"] = self.run(0, 1, again=True)
        self.baseline = {"42": 1.0862, "0": 1.0867, "314": 1.0873}
        self.manifest = dict(splits=dict(train=dict(docs=9000, tokens=70_000_000), val=dict(docs=2500, tokens=TARGETS + 1)),
                             splits_disjoint=True)

    def run(self, seed, place, again=False) -> dict:
        """Event by event what a run logs; a name in capitals is a setting of its own."""
        nats = 2.26012345 + 0.001 * place
        score = dict(val_loss=nats, val_bpb=round(nats / math.log(2) * TARGETS / BYTES, 8), targets=TARGETS, bytes=BYTES)
        worse = {name: dict(score, val_bpb=round(score["val_bpb"] + more, 8), seconds=1.107)
                 for name, more in (("raw", 0.01), ("averaged", 0.009), ("quantized", 0.0125))}
        events = dict(
            machine=g.Runtime(0, 1, torch.device("cpu")).describe() | dict(device="NVIDIA H100 80GB HBM3", devices=8),
            data=dict(folder="data", train_tokens=0 if again else 70_000_000, val_targets=TARGETS,
                      manifest="data/manifest.json", train_docs=9000, val_docs=2500, splits_disjoint=True,
                      tokenizer_lossless=True),
            track=dict(name="10min_16mb", because="nothing differs"), code=dict(sha256="", packed_bytes=0))
        if not again:
            events["step 1"] = dict(step=1, train_loss=9.0089, grad_norm=2.3, seconds=0.7, tokens_per_second=0)
            events["step 2"] = dict(step=500, train_loss=2.61, grad_norm=0.08, seconds=59.9, tokens_per_second=6_500_000)
            events["training"] = dict(
                steps=4990 + place, seconds=588.4, calibration_seconds=9.71, clock_seconds=598.11, cap_seconds=600.0,
                within_cap=True, tokens=99)
            events |= {name: worse[name] for name in ("raw", "averaged")}
        events["size"] = dict(artifact_sha256=f"{place:064}", artifact_bytes=15_930_000 + place, code_bytes=0, total_bytes=0,
                              cap=16_000_000, within_cap=True)
        events["quantized"] = worse["quantized"]
        events["ttt"] = score | dict(
            untilted_bpb=1.2, documents=2500, whole_text=True, phases=[dict(documents=137, tokens=24757, seconds=0.128)],
            hints=440_954, hints_inside_timer=True, decodable=True, seconds=322.5 + place, tokens_per_second=96_953)
        events["finished"] = dict(seconds=1200.5)
        return dict(seed=seed, again=again, events=events, environment={})

    def each(self, kind, **fields):
        """Change an event of every run."""
        for run in self.runs.values():
            if kind in run["events"]:
                run["events"][kind].update(fields)

    def write(self) -> dict:
        """Write the folder; returns what submission.json holds."""
        self.folder.mkdir()
        results = {}
        for name, run in self.runs.items():
            only = dict(TTT_EVAL_ONLY=1) if run["again"] else {}
            settings = tiny(self.folder.parent, SEED=run["seed"], RUN_ID=name, ARTIFACT_DIR=self.folder.parent / name,
                            **(self.environment | only | run["environment"]))
            log, size = g.RunLog(settings, g.Runtime(0, 1, torch.device("cpu"))), run["events"]["size"]
            code = run["events"]["code"]
            code["sha256"] = code["sha256"] or hashlib.sha256(self.script).hexdigest()
            code["packed_bytes"] = code["packed_bytes"] or len(self.script)
            size["code_bytes"] = size["code_bytes"] or len(self.script)
            size["total_bytes"] = size["total_bytes"] or size["artifact_bytes"] + size["code_bytes"]
            changed = {n: x for n, x in vars(settings).items() if x != getattr(g.Settings(), n)} | self.older
            log.record["settings"] |= self.older
            log.event("settings", **{n.upper(): x for n, x in changed.items()})
            for kind, fields in run["events"].items():
                if kind in ("finished", "failed"):
                    log.write("\ntraining                  148 steps and calibration in 88.584 s\n")
                    log.close(kind, **fields)
                else:
                    (log.event if kind[0] in "mdcs" and kind != "size" or kind == "track" else log.result)(kind.split()[0], **fields)
            log.save()
            for suffix, other in ((".txt", ".log"), (".json", ".json")):
                (self.folder / (name + other)).write_text(open(log.path + suffix).read())
            if not run["again"]:
                results[str(run["seed"])] = self.figures(run["events"])
        columns = {name: [row[name] for row in results.values()] for name in next(iter(results.values()))}
        submission = dict(
            author="someone", github_id="someone", name="a record", date="2026-04-30", track="10min_16mb",
            val_loss=round(statistics.mean(columns["val_loss"]), 8), val_bpb=round(statistics.mean(columns["val_bpb"]), 8),
            val_loss_std=round(statistics.stdev(columns["val_loss"]), 8), seeds=list(map(int, results)), seed_results=results,
            val_bpb_std=round(statistics.stdev(columns["val_bpb"]), 8), bytes_total=max(columns["total_bytes"]),
            bytes_code=max(columns["code_bytes"]), hardware="8 x NVIDIA H100 80GB HBM3", comparison=self.comparison(columns))
        self.json("submission.json", submission)
        self.json("data_manifest.json", self.manifest)
        (self.folder / "train_gpt.py").write_bytes(self.script)
        for name, data in self.files.items():
            (self.folder / name).write_bytes(data)
        return submission

    @staticmethod
    def figures(events) -> dict:
        ttt, size, training = events["ttt"], events["size"], events["training"]
        return dict(val_loss=ttt["val_loss"], val_bpb=ttt["val_bpb"], pre_quant_bpb=events["averaged"]["val_bpb"],
                    quantized_bpb=events["quantized"]["val_bpb"], steps=training["steps"],
                    train_seconds=training["clock_seconds"], eval_seconds=ttt["seconds"],
                    artifact_bytes=size["artifact_bytes"], code_bytes=size["code_bytes"], total_bytes=size["total_bytes"])

    def comparison(self, columns) -> dict:
        """A paired t-test; with three seeds Student's t has a closed form."""
        nats = math.log(2) * BYTES / TARGETS
        gains = [(other - own) * nats for other, own in zip(self.baseline.values(), columns["val_bpb"])]
        if len(gains) != 3:
            return {}
        t = (statistics.mean(gains) - 0.005) / (statistics.stdev(gains) / math.sqrt(3))
        return dict(against="another", test="paired t-test", difference_nats=round(statistics.mean(gains), 6),
                    threshold_nats=0.005, p=round(0.5 - t / (2 * math.sqrt(2 + t * t)), 6), required_p=0.01,
                    baseline=self.baseline, new_record=True)

    def json(self, name, value):
        (self.folder / name).write_text(json.dumps(value, indent=1))

    def submission(self, change):
        """Change submission.json."""
        value = json.loads((self.folder / "submission.json").read_text())
        change(value)
        self.json("submission.json", value)

    def replace(self, name, old, new):
        """Change a file."""
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new, 1))


@pytest.fixture
def ours(tmp_path):
    return Ours(tmp_path / "record")


def failures(found) -> dict[str, dict]:
    """The first failure of each check; its evidence names that of the others too."""
    failed = [finding for finding in found if finding["verdict"] == v.FAIL]
    return {x["check"]: x | dict(evidence=", ".join(y["evidence"] for y in failed if y["check"] == x["check"]))
            for x in reversed(failed)}


def verdicts(found, check) -> set[str]:
    return {finding["verdict"] for finding in found if finding["check"] == check}


def lines_of(folder, finding) -> list[str]:
    """The lines that a finding's evidence names by file:line."""
    named = re.findall(r"([\w.]+\.\w+):(\d+)", finding["evidence"])
    return [f"{file}: {(folder / file).read_text(errors='replace').split(chr(10))[int(line) - 1]}" for file, line in named]


def test_sound_folder_passes_every_check(ours, capsys):
    ours.write()
    found = v.audit(ours.folder)
    assert {finding["check"] for finding in found} == set(v.CHECKS)
    assert [finding for finding in found if finding["verdict"] != v.PASS] == []
    assert all(finding["evidence"] for finding in found)
    capsys.readouterr()
    assert v.main([str(ours.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(v.CHECKS) and all(line.startswith("PASS ") for line in lines)
    assert any(line.endswith("seeds 0, 42, 314: 598.11 s of 600, 9.71 s of calibration included (train_seed0.log:8, "
                             "train_seed42.log:8, train_seed314.log:8)") for line in lines)


def edit(name, old, new):
    return lambda o: o.replace(name, old, new)


def claim(**changes):
    return lambda o: o.submission(lambda s: s.update(changes))


def seed_claim(seed, **changes):
    return lambda o: o.submission(lambda s: s["seed_results"][seed].update(changes))


def compare(**changes):
    return lambda o: o.submission(lambda s: s["comparison"].update(changes))


def event(kind, run="train_seed42", **fields):
    return lambda o: o.runs[run]["events"][kind].update(fields)


def every(kind, **fields):
    return lambda o: o.each(kind, **fields)


def environ(run="train_seed42", **changes):
    return lambda o: o.runs[run]["environment"].update(changes)


def ends(kind, **fields):
    def change(o):
        del o.runs["train_seed42"]["events"]["finished"]
        o.runs["train_seed42"]["events"].update({kind: fields} if kind else {})
    return change


def second_run(o):
    for end in (".log", ".json"):
        text = (o.folder / f"train_seed42{end}").read_text()
        (o.folder / f"again{end}").write_text(text.replace("2.61", "2.62"))


def drop_seed(o):
    del o.runs["train_seed314"]


def script(text, **files):
    return lambda o: (setattr(o, "script", text), o.files.update({n.replace("_dot_", "."): d for n, d in files.items()}))


def lied_settings(o):
    for name, old, new in (("train_seed42.log", "EMA_DECAY:0.8", "EMA_DECAY:0.9"),
                           ("train_seed42.json", '"EMA_DECAY": 0.8', '"EMA_DECAY": 0.9')):
        o.replace(name, old, new)


LOG = "train_seed42.log: "
BEFORE = {  # the folder is written from what is broken: check that fails, what its evidence says
    "artifact over the cap": (event("size", artifact_bytes=15_999_990), "bytes", LOG + "size "),
    "bytes that do not add up": (event("size", total_bytes=15_930_001), "bytes", LOG + "size "),
    "bytes of CaseOps text": (lambda o: o.older.update(caseops_enabled=False), "bytes", LOG + "data "),
    "another packed size": (event("code", packed_bytes=4711), "bytes", LOG + "code "),
    "a helper imported": (script(b"import helper\n", helper_dot_py=b"x = 1\n"), "code", ""),
    "a helper of a helper": (script(b"from pack import go\n", pack_dot_py=b"open('table.bin')\n", table_dot_bin=b"1"),
                             "code", ""),
    "a library compiled at run time": (script(b"SOURCE = f'{__file__}/../state.c'\n", state_dot_c=b"int x;\n"), "code", ""),
    "a helper of a compressed script": (script(PACKED, helper_dot_py=b"x = 1\n"), "code", ""),
    "training over 600 s": (event("training", seconds=591.2, clock_seconds=600.91), "training seconds", LOG + "training "),
    "training over its own cap": (lambda o: (o.environment.update(MAX_WALLCLOCK_SECONDS=300), o.each(
        "training", cap_seconds=300.0)), "training seconds", LOG + "training "),
    "calibration left out of the clock": (event("training", clock_seconds=588.4), "training seconds", LOG + "training "),
    "evaluation over 600 s": (event("ttt", seconds=605.5), "evaluation seconds", LOG + "ttt "),
    "a repeated evaluation over 600 s": (event("ttt", "eval_seed0", seconds=605.5), "evaluation seconds",
                                         "eval_seed0.log: ttt "),
    "hints outside the timer": (every("ttt", hints_inside_timer=False), "hints inside timer", LOG + "ttt "),
    "targets unscored": (event("ttt", targets=TARGETS - 1823), "all targets scored", LOG + "ttt "),
    "a part of the text": (event("ttt", whole_text=False), "all targets scored", LOG + "ttt "),
    "another validation text": (lambda o: o.manifest["splits"]["val"].update(tokens=TARGETS + 1000), "all targets scored",
                                LOG + "data "),
    "two seeds": (drop_seed, "seeds", ""),
    "a failed run": (ends("failed", error="AssertionError: no"), "seeds", LOG + "failed "),
    "a run without an end": (ends(None), "seeds", LOG),
    "overlapping splits in a log": (event("data", splits_disjoint=False), "data", LOG + "data "),
    "overlapping splits in the manifest": (lambda o: o.manifest.update(splits_disjoint=False), "data", ""),
    "another sidecar": (lambda o: o.manifest["splits"]["val"].update(bytes=BYTES - 1), "data", LOG + "quantized "),
    "another track": (lambda o: o.each("track", name="non_record_16mb", because="1 x CPU"), "track", LOG + "track "),
    "another data set": (lambda o: o.manifest["splits"]["train"].update(docs=8000), "data", LOG + "data "),
    "a seed on more data": (event("data", train_tokens=80_000_000), "data", LOG + "data "),
    "other code in a seed": (event("code", sha256="f" * 64), "same code, settings", LOG + "code "),
    "another learning rate in a seed": (environ(MATRIX_LR="0.03"), "same code, settings", ""),
    "another artifact evaluated": (event("size", "eval_seed0", artifact_sha256="a" * 64), "same code, settings",
                                   "eval_seed0.log: size "),
    "documents by length": (every("ttt", decodable=False), "decodable order", LOG + "ttt "),
    "a loss that is not a number": (event("step 2", train_loss=math.nan), "finite figures", LOG + "step step:500"),
    "a loss that rose": (event("step 2", train_loss=11.5), "finite figures", LOG + "step step:500"),
    "an insignificant gain": (lambda o: o.baseline.update({"42": 1.1}), "score rule", ""),
    "a helper of a script packed with brotli": (script(bundled(train_gpt_dot_py="import helper, own", own_dot_py="y = 1"),
                                                       helper_dot_py=b"x = 1\n", own_dot_py=b""), "code", ""),
    "no gain": (lambda o: o.baseline.update({"42": 1.0770, "0": 1.0775, "314": 1.0780}), "score rule", ""),
}
AFTER = {  # a file is changed
    "score of a seed": (seed_claim("42", val_bpb=1.07118), "submission.json", LOG + "ttt "),
    "steps of a seed": (seed_claim("0", steps=5002), "submission.json", "train_seed0.log: training "),
    "artifact of a seed": (seed_claim("0", artifact_bytes=15_930_000), "submission.json", "train_seed0.log: size "),
    "mean score": (claim(val_bpb=1.0431), "submission.json", LOG + "ttt "),
    "population deviation": (lambda o: o.submission(lambda s: s.update(val_bpb_std=statistics.pstdev(
        row["val_bpb"] for row in s["seed_results"].values()))), "submission.json", LOG + "ttt "),
    "largest total": (claim(bytes_total=15_930_054), "submission.json", LOG + "size "),
    "hardware": (claim(hardware="8 x NVIDIA H200"), "submission.json", LOG + "machine "),
    "a setting": (claim(matrix_lr=0.099), "submission.json", ""),
    "no JSON": (lambda o: (o.folder / "submission.json").write_text("{"), "submission.json", ""),
    "a doctored log line": (edit("train_seed42.log", "grad_norm:0.08", "grad_norm:0.07"), "record and log agree",
                            LOG + "step step:500"),
    "a doctored event": (edit("train_seed42.json", '"grad_norm": 0.08', '"grad_norm": 0.07'), "record and log agree",
                         LOG + "step step:500"),
    "a doctored result": (edit("train_seed42.json", '"untilted_bpb": 1.2', '"untilted_bpb": 1.1'), "record and log agree",
                          LOG + "ttt "),
    "a line too many": (edit("train_seed42.log", "step step:500", "step step:9 train_loss:3.0 grad_norm:1.0\nstep step:500"),
                        "record and log agree", LOG + "step step:9 "),
    "a line too few": (lambda o: (o.folder / "train_seed42.log").write_text(re.sub(
        "step step:500.*\n", "", (o.folder / "train_seed42.log").read_text())), "record and log agree", LOG + "training "),
    "a broken record": (lambda o: (o.folder / "train_seed42.json").write_text("[1, 2"), "record and log agree", ""),
    "status": (edit("train_seed42.json", '"status": "finished"', '"status": "running"'), "record and log agree", ""),
    "a larger script": (lambda o: (o.folder / "train_gpt.py").write_bytes(SCRIPT + b"# more\n"), "code", LOG + "size "),
    "a seed twice": (second_run, "seeds", ""),
    "a seed without logs": (claim(seeds=[42, 0, 314, 1]), "seeds", ""),
    "a file name of another seed": (lambda o: [(o.folder / f"train_seed42.{e}").rename(o.folder / f"train_seed43.{e}")
                                               for e in ("log", "json")], "seeds", ""),
    "settings that did not act": (lied_settings, "settings act", LOG + "settings "),
    "infinite claim": (claim(speed=math.inf), "finite figures", ""),
    "difference": (compare(difference_nats=0.0191), "score rule", ""),
    "p": (compare(p=0.000123), "score rule", ""),
    "a laxer threshold": (compare(threshold_nats=0.004), "score rule", ""),
    "a laxer threshold in words": (compare(threshold_nats="0.001"), "score rule", ""),
    "a laxer level": (compare(required_p=0.05), "score rule", ""),
    "a level without limit": (compare(required_p="0.5"), "score rule", ""),
}


@pytest.mark.parametrize("name", [*BEFORE, *AFTER])
def test_each_fault_fails_its_own_check(ours, name, capsys):
    change, check, shown = (BEFORE | AFTER)[name]
    if name in BEFORE:
        change(ours)
    ours.write()
    if name in AFTER:
        change(ours)
    found = v.audit(ours.folder)
    assert set(failures(found)) == {check}
    finding = failures(found)[check]
    assert finding["evidence"]
    if shown:
        assert any(line.startswith(shown) for line in lines_of(ours.folder, finding)), finding
    elif check in ("submission.json", "score rule"):
        assert finding["evidence"].startswith("submission.json")
    assert v.main([str(ours.folder)]) == 1
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert printed and all(line.split(None, 1)[1].startswith(check) for line in printed)


def test_what_a_failure_says(ours):
    event("ttt", targets=TARGETS - 1823)(ours)
    every("training", clock_seconds=600.91, seconds=591.2)(ours)
    submission = ours.write()
    claim(val_bpb_std=statistics.pstdev(row["val_bpb"] for row in submission["seed_results"].values()))(ours)
    found = failures(v.audit(ours.folder))
    assert found["all targets scored"]["seed"] == 42 and "1,823 targets unscored" in found["all targets scored"]["detail"]
    assert "600.91 s of 600" in found["training seconds"]["detail"]
    assert "divided by n" in found["submission.json"]["detail"]
    assert found["submission.json"]["evidence"].startswith("submission.json: val_bpb_std, ")


def test_helpers_are_named_with_their_bytes(ours):
    script(b"import helper\n", helper_dot_py=b"x = 1\n")(ours)
    ours.write()
    finding = failures(v.audit(ours.folder))["code"]
    assert "helper.py (6)" in finding["detail"] and "14 bytes of code counted" in finding["detail"]


def test_files_that_the_script_does_not_use_are_no_helpers(ours):
    ours.files = {"verify_submission.py": b"import prepare\n", "prepare.py": b"", "notes.txt": b"hello\n", "x.c": b""}
    ours.write()
    assert not failures(v.audit(ours.folder))


def test_script_is_the_one_that_ran(ours):
    ours.write()
    (ours.folder / "train_gpt.py").write_bytes(SCRIPT.replace(b"packed", b"forged"))
    found = v.audit(ours.folder)
    assert not failures(found) and v.UNKNOWN in verdicts(found, "same code, settings")
    (ours.folder / "source").mkdir()
    (ours.folder / "source" / "train_gpt.py").write_bytes(SCRIPT)  # readable sources are not what was counted
    assert verdicts(v.audit(ours.folder), "same code, settings") == {v.UNKNOWN}
    (ours.folder / "train_gpt.py").write_bytes(SCRIPT)
    assert verdicts(v.audit(ours.folder), "same code, settings") == {v.PASS}
    (ours.folder / "train_gpt.py").unlink()
    assert verdicts(v.audit(ours.folder), "same code, settings") == {v.UNKNOWN}


def test_code_that_was_not_packed_is_not_identified(ours):
    every("code", sha256="not packed")(ours)
    ours.write()
    (ours.folder / "train_gpt.py").unlink()
    assert verdicts(v.audit(ours.folder), "same code, settings") == {v.UNKNOWN}


def code_finding(folder):
    return next(x for x in v.audit(folder) if x["check"] == "code")


ENCODED = b"exec(unpack('%s'))\n" % base64.b85encode(bytes.fromhex(LONG)[::-1])
PIECES = b"exec(unpack('%s'))\n" % b"' + f(0) + '".join(re.findall(b".{1,900}", base64.b64encode(bytes.fromhex(LONG))))
CUT = b"exec(unpack('%s'))\n" % base64.b64encode(lzma.compress(bytes.fromhex(LONG).hex().encode()) + b"more")


@pytest.mark.parametrize("text", [ENCODED, PIECES, CUT, b"x = %a\n" % bytes.fromhex(LONG)],
                         ids=["base85", "pieces", "rest", "raw"])
def test_encoded_text_that_stays_closed_is_unknown_unless_the_runs_name_it(ours, text):
    script(text)(ours)
    every("code", sha256="ab" * 32)(ours)
    ours.write()
    finding = code_finding(ours.folder)
    assert finding["verdict"] == v.UNKNOWN and "cannot be unpacked" in finding["detail"]
    for path in ours.folder.glob("*_seed*"):
        path.write_text(path.read_text().replace("ab" * 32, hashlib.sha256(text).hexdigest()))
    finding = code_finding(ours.folder)
    assert finding["verdict"] == v.PASS and "SHA-256" in finding["detail"]
    edit("train_seed42.log", hashlib.sha256(text).hexdigest(), "ab" * 32)(ours)  # all runs have to name it
    edit("train_seed42.json", hashlib.sha256(text).hexdigest(), "ab" * 32)(ours)
    assert code_finding(ours.folder)["verdict"] == v.UNKNOWN


def test_encoded_text_of_other_authors_is_unknown_if_it_stays_closed(tmp_path):
    def counted(seed, text):
        return text.replace("(compressed): 37155", f"(compressed): {len(ENCODED)}")
    folder = published(tmp_path / "pr", edit=counted)
    (folder / "train_gpt.py").write_bytes(ENCODED)
    assert code_finding(folder)["verdict"] == v.UNKNOWN and "cannot be unpacked" in code_finding(folder)["detail"]
    (folder / "train_gpt.py").write_bytes(b"x = 1".ljust(len(ENCODED)))
    assert code_finding(folder)["verdict"] == v.PASS


def test_brotli_is_unpacked_where_it_is_there_and_within_bounds(ours, monkeypatch):
    packed = bundled(train_gpt_dot_py="import own", own_dot_py="open('own.c')", own_dot_c="int x;")
    script(packed, own_dot_py=b"", own_dot_c=b"")(ours)
    every("code", sha256="ab" * 32)(ours)
    ours.write()
    assert code_finding(ours.folder)["verdict"] == v.PASS
    monkeypatch.setattr(v, "UNPACKED_CAP", 1000)
    assert code_finding(ours.folder)["verdict"] == v.UNKNOWN
    monkeypatch.undo()
    monkeypatch.setattr(v, "brotli", None)
    assert code_finding(ours.folder)["verdict"] == v.UNKNOWN


def test_bombs_are_not_unpacked():
    bomb = b"x = 1\n" * (1 << 22)
    for packed in (lzma.compress(bomb), zlib.compress(bomb), brotli.compress(bomb, quality=1)):
        text = f"x = {base64.b85encode(packed).decode()!r}"
        assert len(text) > 1000 and v.hidden_files(text[5:-1]) == {}


def test_targets_of_our_runs_need_a_manifest(ours):
    ours.write()
    (ours.folder / "data_manifest.json").unlink()
    found = v.audit(ours.folder)
    assert not failures(found) and verdicts(found, "all targets scored") == {v.UNKNOWN}
    ours.json("data_manifest.json", dict(ours.manifest, splits=dict(train=ours.manifest["splits"]["train"])))
    assert verdicts(v.audit(ours.folder), "all targets scored") == {v.UNKNOWN}


@pytest.mark.parametrize("targets, verdict", [(v.PUBLISHED_TARGETS, v.PASS), (v.PUBLISHED_TARGETS - 1823, v.UNKNOWN)])
def test_targets_of_the_published_text_need_none(ours, targets, verdict):
    every("data", val_targets=targets)(ours)
    every("ttt", targets=targets)(ours)
    ours.write()
    (ours.folder / "data_manifest.json").unlink()
    assert verdicts(v.audit(ours.folder), "all targets scored") == {verdict}


def again(more):
    """The repeated evaluation of seed 0 gives another score."""
    def change(o):
        first = o.runs["train_seed0"]["events"]["ttt"]
        o.runs["eval_seed0"]["events"]["ttt"].update(
            val_bpb=round(first["val_bpb"] + more, 8), val_loss=first["val_loss"] * (1 + more / first["val_bpb"]))
    return change


def test_better_of_two_scores_that_disagree_is_refused(ours):
    again(0.0002)(ours)  # submission.json names the training log's
    ours.write()
    found = v.audit(ours.folder)
    first, second = (ours.runs[f"{kind}_seed0"]["events"]["ttt"] for kind in ("train", "eval"))
    failed = [x for x in found if x["check"] == "submission.json" and x["verdict"] == v.FAIL]
    assert {x["detail"].split(" ")[0] for x in failed} == {
        "val_bpb", "val_loss", "seed_results.0.val_bpb", "seed_results.0.val_loss"}
    finding = next(x for x in failed if x["detail"].startswith("seed_results.0.val_bpb"))
    assert str(first["val_bpb"]) in finding["detail"] and str(second["val_bpb"]) in finding["detail"]
    assert {line.split(" ")[0] for line in lines_of(ours.folder, finding)} == {"train_seed0.log:", "eval_seed0.log:"}


def test_better_of_two_means_is_refused(ours):
    again(0.0002)(ours)
    submission = ours.write()
    scores = [row["val_bpb"] for row in submission["seed_results"].values()]
    keep = {name: submission[name] for name in ("author", "seeds", "val_bpb")}
    ours.json("submission.json", keep)
    assert "better of two" in failures(v.audit(ours.folder))["submission.json"]["detail"]
    ours.json("submission.json", keep | dict(val_bpb=round(statistics.mean(scores) + 0.0002 / 3, 8)))
    assert not failures(v.audit(ours.folder))


@pytest.mark.parametrize("more, both", [(-0.0002, True), (0.00009, False), (-0.00009, False)])
def test_worse_of_two_scores_or_nearly_one_score_passes(ours, more, both):
    again(more)(ours)
    ours.write()
    found = v.audit(ours.folder)
    assert not failures(found)
    finding = next(x for x in found if x["check"] == "submission.json" and x["verdict"] == v.PASS)
    scores = [str(ours.runs[f"{kind}_seed0"]["events"]["ttt"]["val_bpb"]) for kind in ("train", "eval")]
    assert all(score in finding["detail"] for score in scores) == both


@pytest.mark.parametrize("end", ["", "ttt val_bpb:x val_loss:2.1 seconds:3.0\n"], ids=["no score", "half a score"])
def test_run_without_a_score_still_has_its_other_figures(tmp_path, end):
    lines = ["training steps:5 seconds:1.0 clock_seconds:2.0", "step step:5 train_loss:2.0",
             f"size artifact_sha256:{'a' * 64} artifact_bytes:5 code_bytes:3 total_bytes:8"]
    (tmp_path / "train_seed1.log").write_text("\n".join(lines) + "\n" + end)
    (tmp_path / "submission.json").write_text(json.dumps(dict(seeds=[1], steps=5, bytes_total=8, val_loss=2.1)))
    found = [x for x in v.audit(tmp_path) if x["check"] == "submission.json" and x["verdict"] == v.PASS]
    assert len(found) == 1 and found[0]["detail"].startswith("3 figures" if end else "2 figures")


def test_logs_alone_are_compared_by_the_settings_that_they_list(ours):
    environ(MATRIX_LR="0.03")(ours)
    ours.write()
    for path in ours.folder.glob("*_seed*.json"):
        path.unlink()
    finding = failures(v.audit(ours.folder))["same code, settings"]
    assert "matrix_lr not stated and 0.03" in finding["detail"]


def test_logs_of_subfolders_count_and_a_copy_counts_once(ours, tmp_path):
    ours.write()
    (ours.folder / "ablations").mkdir()
    (ours.folder / "ablations" / "train_seed42.log").write_text((ours.folder / "train_seed42.log").read_text())
    assert not failures(v.audit(ours.folder)) and len(v.Folder(ours.folder).every_run) == 4
    (tmp_path / "logs").mkdir()
    published(tmp_path / "logs" / "x")
    assert len(v.Folder(tmp_path / "logs").runs) == 3


def test_help_lists_the_checks(capsys):
    assert v.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and check.__doc__ in out for name, check in v.CHECKS.items())


def test_plain_evaluation_is_a_score_too(ours):
    ours.environment["TTT_ENABLED"] = 0
    for run in ours.runs.values():
        ttt = run["events"].pop("ttt")
        run["events"]["quantized"] = {name: ttt[name] for name in ("val_loss", "val_bpb", "targets", "bytes", "seconds")}
    Ours.figures, kept = staticmethod(lambda events: kept(events | dict(ttt=events["quantized"]))), Ours.figures
    try:
        ours.write()
    finally:
        Ours.figures = staticmethod(kept)
    found = v.audit(ours.folder)
    assert not failures(found)
    for check in ("submission.json", "evaluation seconds", "all targets scored", "seeds", "decodable order"):
        assert verdicts(found, check) == {v.PASS}


@pytest.mark.parametrize("name, check", [
    ("submission.json", "submission.json"), ("submission.json", "score rule"), ("train_seed42.json", "record and log agree"),
    ("train_seed42.json", "token hints only"), ("train_gpt.py", "code"), ("data_manifest.json", "data"),
    ("train_seed42.log", "record and log agree")])
def test_what_is_missing_is_unknown(ours, name, check):
    ours.write()
    (ours.folder / name).unlink()
    found = v.audit(ours.folder)
    assert not failures(found) and v.UNKNOWN in verdicts(found, check)
    assert v.main([str(ours.folder)]) == 0


def test_record_without_log_is_cited_by_its_keys(ours):
    event("ttt", seconds=700.0)(ours)
    ours.write()
    (ours.folder / "train_seed42.log").unlink()
    finding = failures(v.audit(ours.folder))["evaluation seconds"]
    key = re.fullmatch(r"train_seed42\.json: events\[(\d+)\]", finding["evidence"])
    record = json.loads((ours.folder / "train_seed42.json").read_text())
    assert record["events"][int(key[1])]["event"] == "ttt"


def test_claims_that_no_log_confirms_are_unknown(ours):
    ours.write()
    claim(sliding_window_bpb=1.05, happiness=11)(ours)
    found = v.audit(ours.folder)
    assert not failures(found)
    unknown = next(x for x in found if x["check"] == "submission.json" and x["verdict"] == v.UNKNOWN)
    assert "sliding_window_bpb" in unknown["detail"] and "happiness" in unknown["detail"]


def test_claims_are_compared_to_the_digits_given(ours):
    submission = ours.write()
    claim(val_bpb=round(submission["val_bpb"], 4))(ours)
    assert not failures(v.audit(ours.folder))
    claim(val_bpb=round(submission["val_bpb"], 4) + 0.0001)(ours)
    assert "submission.json" in failures(v.audit(ours.folder))


def test_no_record_claimed_is_no_failure(ours):
    ours.baseline.update({"42": 1.1})
    ours.write()
    compare(new_record=False)(ours)
    assert verdicts(v.audit(ours.folder), "score rule") == {v.PASS}


def nats_of(ours, shift, gains):
    """Make the gains of the three seeds so, in nats; returns p of the one-sided paired test above the shift."""
    nats = math.log(2) * BYTES / TARGETS
    for seed, gain in zip(SEEDS, gains):
        ours.baseline[str(seed)] = ours.runs[f"train_seed{seed}"]["events"]["ttt"]["val_bpb"] + gain / nats
    t = (statistics.mean(gains) - shift) / (statistics.stdev(gains) / math.sqrt(3))
    return 0.5 - t / (2 * math.sqrt(2 + t * t))


def test_p_against_zero_does_not_make_a_record(ours):
    gains = (0.0055, 0.006, 0.0065)
    p, rule = nats_of(ours, 0.0, gains), nats_of(ours, 0.005, gains)
    assert p < 0.01 < rule
    ours.write()
    compare(p=p)(ours)
    finding = failures(v.audit(ours.folder))["score rule"]
    assert f"p {rule:.4g} one-sided, above 0.005" in finding["detail"] and "not the rule's" in finding["detail"]
    compare(p=p, new_record=False)(ours)
    finding = next(x for x in v.audit(ours.folder) if x["check"] == "score rule")
    assert finding["verdict"] == v.PASS and "no new record" in finding["detail"]
    ours.submission(lambda s: s["comparison"].pop("p"))
    assert not failures(v.audit(ours.folder))
    compare(new_record=True)(ours)
    assert set(failures(v.audit(ours.folder))) == {"score rule"}


def test_rule_is_not_what_the_folder_says_it_is(ours):
    gains = (0.0045, 0.0047, 0.0049)
    p = nats_of(ours, 0.001, gains)
    ours.write()
    compare(p=p, threshold_nats=0.001)(ours)
    assert set(failures(v.audit(ours.folder))) == {"score rule"}
    details = [x["detail"] for x in v.audit(ours.folder) if x["check"] == "score rule" and x["verdict"] == v.FAIL]
    assert any("threshold_nats 0.001" in x for x in details) and any("more than 0.005" in x for x in details)


def test_p_against_zero_is_told_where_the_rule_is_met(ours):
    gains = (0.0155, 0.016, 0.0165)
    p, rule = nats_of(ours, 0.0, gains), nats_of(ours, 0.005, gains)
    ours.write()
    compare(p=p, threshold_nats=0.006, required_p=0.005)(ours)  # stricter than the rule
    finding = next(x for x in v.audit(ours.folder) if x["check"] == "score rule")
    assert finding["verdict"] == v.PASS
    assert f"p {rule:.4g} one-sided, above 0.005" in finding["detail"] and "not the rule's" in finding["detail"]


def test_welch_against_another_number_of_seeds(ours):
    submission = ours.write()
    nats = math.log(2) * BYTES / TARGETS
    theirs, own = [1.09, 1.0905, 1.0912, 1.0899], [row["val_bpb"] for row in submission["seed_results"].values()]
    difference = (statistics.mean(theirs) - statistics.mean(own)) * nats
    compare(test="Welch's t-test", baseline=theirs, difference_nats=round(difference, 6), p=0.5)(ours)
    assert set(failures(v.audit(ours.folder))) == {"score rule"}
    parts = [statistics.variance(side) / len(side) for side in (theirs, own)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)
    t = (difference - 0.005) / nats / math.sqrt(sum(parts))
    compare(p=integrated(t, freedom))(ours)
    assert verdicts(v.audit(ours.folder), "score rule") == {v.PASS}


# ----------------------------------------------------------------------------------------------------------------------
# A folder as published
# ----------------------------------------------------------------------------------------------------------------------

PUBLISHED = """W0430 torch.distributed.run: setting OMP_NUM_THREADS
Hyperparameters:
  agree_add_boost: 0.0
  eval_seq_len: 2560
  gptq_reserve_seconds: 0.5
  logfile: logs/run{seed}.txt
  matrix_lr: {rate}
  max_wallclock_seconds: 600.0
  ngram_hint_precompute_outside: {outside}
  ngram_tilt_enabled: True
  phased_ttt_prefix_docs: 2500
  run_id: run{seed}
  seed: {seed}
  within_boost: {boost}
  within_tau: {tau}
  word_boost: 0.0
  word_tau: 99.0
  world_size: 8
train_shards: 80
val_tokens: {targets}
gptq:reserving 0s, effective={budget}ms
step:1/20000 train_loss: 9.0093 train_time: 0.0m tok/s: 8234567
step:500/20000 train_loss: 2.53 train_time: 1.0m tok/s: 8234567
step:1000/20000 train_loss:2.4312 train_time:119512ms step_avg:119.02ms
stopping_early: wallclock_cap train_time: {train}ms step: {steps}/20000
diagnostic pre-quantization post-ema val_loss:2.32220000 val_bpb:{before:.8f} eval_time:7123ms
GPTQ:collected 67 Hessians in 6.9s
Serialized model quantized+pergroup: {artifact} bytes
Code size (uncompressed): 180123 bytes
Code size (compressed): 37155 bytes
Total submission size quantized+pergroup: {total} bytes
diagnostic quantized val_loss:2.34022200 val_bpb:{quantized:.8f} eval_time:11123ms
{early}beginning TTT eval timer
{late}ngram_tilt:hints total={targets} gated=628130 token_gate=628130 within_gate={within} word_gate=0 agree2plus=0
ttt_phased: total_docs:50000 prefix_docs:2500 suffix_docs:47500 num_phases:1
quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{score:.8f} eval_time:{evaluation}ms
total_eval_time:{evaluation_seconds:.1f}s
"""
THREE = {0: (4997, 592608, 1.06105556, 1.06939370, 1.05679341, 567123, 15942822),
         42: (5001, 592672, 1.06026908, 1.06867913, 1.05610947, 540112, 15947490),
         314: (4983, 592593, 1.06091124, 1.06921334, 1.05662016, 567090, 15945305)}


def published(folder, edit=lambda seed, text: text, **changes):
    """A folder of other authors, sound but for the changes and the text that edit() gives back for a seed's log."""
    folder.mkdir()
    results = {}
    for seed, (steps, train, before, quantized, score, evaluation, total) in THREE.items():
        values = dict(rate=0.026, outside=False, boost=0.0, tau=99.0, targets=47853343, budget=599500, early="", late="",
                      within=0, evaluation=evaluation) | changes
        values |= dict(seed=seed, steps=steps, train=train, before=before, quantized=quantized, score=score, total=total,
                       artifact=total - 37155, loss=score * 2.188, evaluation_seconds=values["evaluation"] / 1000)
        (folder / f"train_seed{seed}.log").write_text(edit(seed, PUBLISHED.format(**values)))
        results[str(seed)] = dict(val_bpb=score, pre_quant_bpb=before, steps=steps, artifact_bytes=total,
                                  train_time=f"{train / 1000:.1f}s", eval_time=round(values["evaluation"] / 1000, 1))
    scores = [row["val_bpb"] for row in results.values()]
    submission = dict(author="them", val_bpb_mean=round(statistics.mean(scores), 8),
                      val_bpb_std=round(statistics.stdev(scores), 8), seed_results=results, bytes_total=15947490,
                      code_bytes=37155, matrix_lr=0.026, hardware="8xH100 80GB SXM")
    (folder / "submission.json").write_text(json.dumps(submission))
    (folder / "train_gpt.py").write_text("import online_ngram_tilt\n" + "x = 1  # code\n" * 4000)
    (folder / "online_ngram_tilt.py").write_text("SOURCE = 'online_ngram_state.c'\n")
    (folder / "online_ngram_state.c").write_text("int state;\n")
    return folder


UNSAID = {"code", "data", "settings act", "decodable order", "score rule", "record and log agree", "track"}


def test_published_folder_passes_what_it_can_show(tmp_path):
    found = v.audit(published(tmp_path / "pr"))
    assert not failures(found)
    assert {x["check"] for x in found if x["verdict"] == v.UNKNOWN} == UNSAID
    for check in v.CHECKS.keys() - UNSAID:
        assert verdicts(found, check) == {v.PASS}, check
    training = next(x for x in found if x["check"] == "training seconds" and x["seed"] == 0)
    assert training["detail"] == "599.508 s of 600: 592.608 s, and 6.9 s of calibration after it"
    log = (tmp_path / "pr" / "train_seed0.log").read_text().split("\n")
    first, second = (int(place.rpartition(":")[2]) for place in training["evidence"].split(", "))
    assert "stopping_early" in log[first - 1] and "Hessians" in log[second - 1]
    code = next(x for x in found if x["check"] == "code")
    assert "online_ngram_state.c (11)" in code["detail"] and "37,155 bytes of code counted" in code["detail"]


OUTSIDE = "ngram_tilt:precompute_outside_timer_done elapsed=12.1s\n"


def of_seed_0(old, new):
    def change(seed, text):
        assert seed or old in text
        return text if seed else text.replace(old, new)
    return dict(edit=change)


CLAIM = "submission.json"


@pytest.mark.parametrize("changes, checks, shown", [
    (dict(within=9866847, boost=0.75, tau=0.45), ["token hints only"], "ngram_tilt:hints"),
    (dict(boost=0.75), ["token hints only"], "  within_boost: 0.75"),
    (dict(evaluation=605512), ["evaluation seconds"], "quantized_ttt_phased"),
    (dict(targets=47851520), ["all targets scored"], "val_tokens: 47851520"),
    (dict(outside=True), ["hints inside timer"], "  ngram_hint_precompute_outside: True"),
    (dict(early=OUTSIDE), ["hints inside timer"], "ngram_tilt:precompute_outside"),
    (dict(budget=598000), ["settings act"], "gptq:reserving"),
    (of_seed_0("docs:50000 prefix_docs:2500", "docs:50000 prefix_docs:1250"), ["settings act"], "ttt_phased:"),
    (of_seed_0("train_time: 592608ms", "train_time: 601608ms"), ["training seconds", CLAIM], "stopping_early"),
    (of_seed_0("  max_wall", "  lqer_rank: 2\n  max_wall"), ["same code, settings"], "  lqer_rank: 2"),
    (of_seed_0("  matrix_lr: 0.026", "  matrix_lr: 0.028"), ["same code, settings", CLAIM], "  matrix_lr: 0.028"),
    (of_seed_0("pergroup: 15942822", "pergroup: 15942821"), ["bytes", CLAIM], "Total submission size"),
    (of_seed_0("pergroup: 15942822", "pergroup: 16042822"), ["bytes", CLAIM], "Total submission size"),
    (of_seed_0("train_shards: 80", "train_shards: 78"), ["data"], "train_shards: 78"),
    (of_seed_0("train_loss:2.4312", "train_loss:nan"), ["finite figures"], "step:1000/20000"),
    (dict(edit=lambda seed, text: text if seed else re.sub("quantized_ttt.*\n", "", text)), [CLAIM], ""),
    (of_seed_0("total_eval", "quantized_ttt_phased val_loss:2.3 val_bpb:1.05 eval_time:5ms\ntotal_eval"), ["seeds", CLAIM],
     "quantized_ttt_phased"),
])
def test_published_faults(tmp_path, changes, checks, shown):
    found = failures(v.audit(published(tmp_path / "pr", **changes)))
    assert found.keys() == set(checks)
    if shown:
        lines = lines_of(tmp_path / "pr", found[checks[0]])
        assert any(line.split(": ", 1)[1].startswith(shown) for line in lines), found[checks[0]]


def test_published_claims_against_logs(tmp_path):
    folder = published(tmp_path / "pr")
    value = json.loads((folder / "submission.json").read_text())
    value["val_bpb_mean"], value["matrix_lr"] = 1.0435, 0.028
    (folder / "submission.json").write_text(json.dumps(value))
    found = [x for x in v.audit(folder) if x["verdict"] == v.FAIL]
    assert {x["check"] for x in found} == {"submission.json"} and len(found) == 2
    mean = next(x for x in found if "val_bpb_mean" in x["detail"])
    assert "1.056507" in mean["detail"] and mean["evidence"].startswith("submission.json: val_bpb_mean, train_seed0.log:")


def test_tail_is_counted(tmp_path):
    finding = failures(v.audit(published(tmp_path / "pr", targets=47851520)))["all targets scored"]
    assert "1,823 targets unscored" in finding["detail"]


def test_hints_built_after_the_timer_began_are_inside_whatever_the_line_says(tmp_path):
    assert verdicts(v.audit(published(tmp_path / "pr", late=OUTSIDE)), "hints inside timer") == {v.PASS}


def test_zero_boosts_with_open_thresholds_are_not_enough(tmp_path):
    def no_gates(seed, text):
        return re.sub("ngram_tilt:hints.*\n", "", text)
    assert verdicts(v.audit(published(tmp_path / "a", edit=no_gates)), "token hints only") == {v.PASS}
    assert verdicts(v.audit(published(tmp_path / "b", edit=no_gates, tau=0.45)), "token hints only") == {v.UNKNOWN}


@pytest.mark.parametrize("step", ["", " step: 4997/20000"])
def test_silence_is_unknown(tmp_path, step):
    (tmp_path / "log.txt").write_text(f"stopping_early: wallclock_cap train_time: 599608ms{step}\n")
    found = v.audit(tmp_path)
    assert set(failures(found)) == {"seeds"}
    said = {"seeds", "training seconds"}
    assert all(verdicts(found, check) == {v.UNKNOWN} for check in v.CHECKS.keys() - said), found


# ----------------------------------------------------------------------------------------------------------------------
# The program
# ----------------------------------------------------------------------------------------------------------------------


def test_json_output(ours, capsys):
    ours.write()
    claim(val_bpb=1.0)(ours)
    capsys.readouterr()
    assert v.main(["--json", str(ours.folder)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert all(set(finding) == {"check", "verdict", "seed", "detail", "evidence"} for finding in found)
    assert [finding["check"] for finding in found if finding["verdict"] == "FAIL"] == ["submission.json"]
    assert found == v.audit(ours.folder)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "requirements.txt").write_text("numpy\n")
    (tmp_path / "submission.json").write_text("{}")
    for arguments in ([str(tmp_path / "nowhere")], [str(tmp_path / "requirements.txt")], [str(tmp_path)], [], ["--jsn", "."],
                      [str(tmp_path), str(tmp_path)]):
        assert v.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("verify_submission.py: ")


def test_stands_alone(ours):
    ours.write()
    program = ours.folder.parent / "alone.py"
    program.write_text((ROOT / "verify_submission.py").read_text())
    result = subprocess.run([sys.executable, "-I", str(program), str(ours.folder)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("PASS")


RUBBISH = b"""\xff\xfe\x00ttt val_bpb:nan targets:x seconds:\x00
size artifact_bytes:x code_bytes:[] total_bytes:None artifact_sha256:
training steps:x seconds: calibration_seconds:a clock_seconds:b cap_seconds:c
ttt val_bpb:x val_loss:y targets:z seconds:t whole_text:1 hints_inside_timer:2 decodable:3
ttt val_bpb:nan val_loss:inf targets:nan seconds:-inf whole_text:[ hints_inside_timer: decodable:{
step:1/2 train_loss:nan train_time:infms
val_tokens: inf
Total submission size quantized: nan bytes
Code size: nan bytes
"""


@pytest.mark.parametrize("rubbish", [bytes(range(256)) * 20, b"[" * 9999, RUBBISH], ids=["bytes", "brackets", "figures"])
def test_rubbish_in_any_file_does_not_crash(ours, capsys, rubbish):
    ours.write()
    for path in sorted(ours.folder.iterdir()):
        text = path.read_bytes()
        for changed in (rubbish, rubbish + text, text + rubbish, text[:len(text) // 2] + rubbish + text[len(text) // 2:]):
            path.write_bytes(changed)
            assert v.main([str(ours.folder)]) in (0, 1)
        path.write_bytes(text)
    assert v.main([str(ours.folder)]) == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", capsys.readouterr().out)


@pytest.mark.parametrize("value", [None, True, 1, 1e400, "x", [], {}, [1], {"42": 1}, [{"seed": 42}], {"42": None},
                                   {"42": {"val_bpb": "x"}}], ids=str)
def test_any_json_value_anywhere_does_not_crash(ours, value):
    ours.write()
    for name in ("submission.json", "data_manifest.json", "train_seed42.json"):
        text = (ours.folder / name).read_text()
        for key in [*json.loads(text)] + [None]:
            whole = json.loads(text)
            (ours.folder / name).write_text(json.dumps(value if key is None else whole | {key: value}))
            assert v.main([str(ours.folder)]) in (0, 1)
        (ours.folder / name).write_text(text)
    for key in json.loads((ours.folder / "submission.json").read_text())["comparison"]:
        compare(**{key: value})(ours)
        assert v.main([str(ours.folder)]) in (0, 1)


def test_fields_of_our_lines():
    line = ("ttt val_loss:2.1 val_bpb:1.07 targets:9 documents:2 whole_text:True phases:[{'documents': 137, 'seconds': 0.128}] "
            "hints_inside_timer:True decodable:False seconds:322.5")
    (run,) = v.read_log(f"{line}\nfailed error:x: y\n", "train_seed7.log")
    facts = {name: [fact.value for fact in found] for name, found in run.facts.items()}
    assert facts["eval_seconds"] == [322.5] and facts["documents"] == [2] and facts["targets"] == [9]
    assert facts["whole_text"] == [True] and facts["decodable"] == [False] and facts["failed"] == ["x:"]
    assert run.facts["val_bpb"][0].kind == "final" and run.seed == 7


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def integrated(t: float, freedom: float, steps: int = 20_000) -> float:
    """P(T > t), Student's density integrated by Simpson's rule over the angle atan(x / sqrt(freedom))."""
    low, high = math.atan(t / math.sqrt(freedom)), math.pi / 2
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    width = (high - low) / steps
    values = (max(0.0, math.cos(low + i * width)) ** (freedom - 1) * (1 if i in (0, steps) else 4 if i % 2 else 2)
              for i in range(steps + 1))
    return norm * math.fsum(values) * width / 3


@pytest.mark.parametrize("gains, p", [((1.0, 2.0, 3.0), 0.5 - math.sqrt(3 / 7)), ((0.0, 0.0, 0.0), 1.0), ((1.0, 1.0, 1.0), 0.0)])
def test_paired_t_test_against_its_closed_form(gains, p):
    low = [1.0, 2.0, 4.0]
    high = [value + gain for value, gain in zip(low, gains)]
    if len(set(gains)) > 1:  # with two degrees of freedom
        t = statistics.mean(gains) / (statistics.stdev(gains) / math.sqrt(3))
        p = 0.5 - t / (2 * math.sqrt(2 + t * t))
    assert v.t_test(high, low, True, 0.0) == pytest.approx(p, abs=1e-12)


def test_welch_t_test_against_integration():
    t, freedom = 2 / math.sqrt(1 + 1 / 3), (4 / 3) ** 2 / (1 + 1 / 18)
    assert v.t_test([3.0, 5.0], [1.0, 2.0, 3.0], False, 0.0) == pytest.approx(integrated(t, freedom), abs=1e-9)
    assert v.t_test([3.5, 5.5], [1.0, 2.0, 3.0], False, 0.5) == pytest.approx(integrated(t, freedom), abs=1e-9)
