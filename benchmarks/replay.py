"""What replaying a log is worth on the pocket pair: a warm start, half of the log, and a log that nobody wrote.

    python benchmarks/replay.py --out DIR                                  all parts; about an hour on two cores
    python benchmarks/replay.py --out DIR --part warm --questions FILE     questions of your own, JSON Lines of `prompt`

warm       a log of `--records` math questions with the target's answers is replayed beside the offline oracle; then `adaptd
           serve` answers other questions over HTTP with the fitted draft, not learning, and its MAL is compared with the
           oracle's and with what replay predicted
budget     the same log, and one of `--mixed` records over four domains, under half of the records, by each way of
           selecting, dry; against all of them
synthetic  the log of four domains against one that the target synthesised without a question being shown to it; both are
           judged on records of the first log that were held out of it

Every step is a command of `adaptd`, printed as it is run. A step whose result is in DIR is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from adaptd.actors.parts import load_pair
from adaptd.app.evaluate import read_prompts
from adaptd.app.state import find_daemon
from adaptd.bench.answers import AnswerPool
from adaptd.config import load
from adaptd.pocket.shipped import pocket_prompts

DOMAINS = ("medical", "math", "tools", "code")
SETTINGS = ("engine.max_length=320",)
TEMPERATURE, MAX_TOKENS = 0.8, 64
START_S = 300.0


class Bench:
    """Commands and their results in one folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)

    def sets(self, state: str) -> list[str]:
        """Options of every command; `state` names the deployment's folder."""
        return [part for s in (*SETTINGS, f"state_dir={self.out / state}") for part in ("--set", s)]

    def adaptd(self, name: str, *args: str, state: str, result: bool = True) -> dict[str, Any]:
        """Run a command unless its result is there."""
        path = self.out / f"{name}.json"
        if not path.exists():
            command = [*args, *self.sets(state), *(["--json", str(path)] if result else [])]
            print("$ adaptd", *command, flush=True)
            subprocess.run([sys.executable, "-m", "adaptd.cli.main", *command], check=True)
            if not result:
                path.write_text("{}\n")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def log(self, name: str, questions: Mapping[str, Sequence[str]], records: int) -> Path:
        """A log in OpenAI's form: the target's answers to `records` of the questions, in random order."""
        path = self.out / f"{name}.jsonl"
        if path.exists():
            return path
        config = load(None, [*SETTINGS, f"state_dir={self.out / 'cache'}"])
        pair = load_pair(config, 0)
        pool = AnswerPool(
            pair,
            questions,
            config.home / "bench",
            temperature=TEMPERATURE,
            max_tokens=MAX_TOKENS,
            k=config.engine.k,
            k_top=config.capture.k_top,
            max_length=config.engine.max_length,
        )
        rows = []
        for domain in questions:
            print(f"the target answers {records // len(questions)} questions of {domain}", flush=True)
            for number, trace in enumerate(pool.get(domain, records // len(questions))):
                ids = trace.response.tolist()
                prompt = pair.tokenizer.decode(trace.tokens[: trace.prompt_len])
                question = prompt.split("<|user|>")[1].split("<|end|>")[0]
                answer = pair.tokenizer.decode(ids, skip_special_tokens=True)
                stopped = ids[-1] == pair.tokenizer.eos_token_id
                rows.append(_row(domain, number, question, answer, "stop" if stopped else "length"))
        random.Random(2).shuffle(rows)
        partial = path.with_suffix(".part")
        partial.write_text("".join(json.dumps(r | {"timestamp": i}) + "\n" for i, r in enumerate(rows)))
        partial.replace(path)
        return path

    @contextmanager
    def served(self, state: str) -> Iterator[str]:
        """A daemon on that folder that does not learn and recalls nothing; its address."""
        still = ["learn.enabled=false", "recall.enabled=false", "server.port=0"]
        command = ["serve", *self.sets(state), *(part for s in still for part in ("--set", s))]
        print("$ adaptd", *command, flush=True)
        with (self.out / "serve.log").open("w") as log:
            process = subprocess.Popen([sys.executable, "-m", "adaptd.cli.main", *command], stdout=log, stderr=log)
            try:
                yield self._address(process, state)
            finally:
                process.terminate()
                process.wait()

    def _address(self, process: subprocess.Popen[bytes], state: str) -> str:
        home = load(None, [f"state_dir={self.out / state}"]).home
        deadline = time.monotonic() + START_S
        while not (home / "daemon.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"adaptd serve did not start; see {self.out / 'serve.log'}")
            time.sleep(0.5)
        return str(find_daemon(home)["url"])


def _row(domain: str, number: int, question: str, answer: str, why: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer}
    return {
        "domain": domain,
        "request": {
            "model": "pocket",
            "messages": [{"role": "user", "content": question}],
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
        },
        "response": {
            "id": f"{domain}-{number}",
            "model": "pocket",
            "choices": [{"index": 0, "message": message, "finish_reason": why}],
        },
    }


def ask(url: str, questions: Sequence[str]) -> list[tuple[int, int]]:
    """Tokens and rounds of each question, answered over HTTP, four at a time."""

    def one(numbered: tuple[int, str]) -> tuple[int, int]:
        seed, question = numbered
        body = {
            "model": "adaptd",
            "messages": [{"role": "user", "content": question}],
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
            "seed": seed,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        answer.raise_for_status()
        about = answer.json()["adaptd"]
        return round(about["mean_acceptance_length"] * about["rounds"]), about["rounds"]

    with ThreadPoolExecutor(4) as clients:
        return list(clients.map(one, enumerate(questions)))


def interval(pairs: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """MAL and its 95 % interval, whole requests resampled."""
    values = np.array(pairs, float)
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    sums = values[picks].sum(1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(values[:, 0].sum() / values[:, 1].sum()), float(low), float(high)


def shown(figure: Mapping[str, float]) -> str:
    """An interval of a result file."""
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def replayed(bench: Bench, log: Path) -> dict[str, Any]:
    """The whole log, with the offline oracle."""
    return bench.adaptd("warm", "replay", str(log), "--oracle", "--report", str(bench.out / "warm"), state="fitted")


def warm(bench: Bench, log: Path, live: Sequence[str]) -> None:
    """Replay, then serve."""
    found = replayed(bench, log)
    path = bench.out / "live.json"
    if not path.exists():
        with bench.served("fitted") as url:
            path.write_text(json.dumps(ask(url, live)))
    mean, low, high = interval(json.loads(path.read_text()))
    predicted, oracle = found["mal_after"], found["oracle"]["mal"]
    print(f"day 0 {shown(found['mal_before'])}; predicted {shown(predicted)}; offline oracle {shown(oracle)}")
    print(
        f"live, {len(live)} requests over HTTP: {mean:.3f} [{low:.3f}, {high:.3f}]; of the oracle's {mean / oracle['mean']:.3f}; "
        f"the prediction lies in the live interval: {'yes' if low <= predicted['mean'] <= high else 'no'}"
    )


def historical(bench: Bench, log: Path) -> dict[str, Any]:
    """The whole log of four domains."""
    args = ("--domain-field", "domain", "--report", str(bench.out / "history"))
    return bench.adaptd("history", "replay", str(log), *args, state="history")


def budget(bench: Bench, log: Path, records: int, whole: Mapping[str, Any]) -> None:
    """Half of a log against all of it, dry."""
    half = records // 2
    print(f"{log.stem}, all: {shown(whole['mal_after'])}, from {shown(whole['mal_before'])}")
    for by in ("shift", "surprise", "random"):
        name = f"half-{log.stem}-{by}"
        args = ("--domain-field", "domain", "--budget", str(half), "--select", by, "--report", str(bench.out / name))
        found = bench.adaptd(name, "replay", str(log), "--dry-run", *args, state=name)
        share = found["mal_after"]["mean"] / whole["mal_after"]["mean"]
        print(f"{log.stem}, {half} by {by}: {shown(found['mal_after'])}, {share:.3f} of all")


def synthetic(bench: Bench, log: Path, records: int) -> None:
    """A log of the target's own questions against a historical one, judged on the historical one's held-out records."""
    history = historical(bench, log)
    made = bench.out / "synthetic.jsonl"
    sampling = ("--temperature", str(TEMPERATURE), "--max-tokens", str(MAX_TOKENS), "--max-query", "160")
    if not made.exists():
        bench.adaptd("made", "synthesize", str(made), "-n", str(records), *sampling, state="synthetic", result=False)
    bench.adaptd("synthetic", "replay", str(made), "--report", str(bench.out / "synthetic"), state="synthetic")
    # Before a dry replay of the first log stands what the second one left: on the very records held out of the first.
    args = ("--domain-field", "domain", "--report", str(bench.out / "judged"))
    judged = bench.adaptd("judged", "replay", str(log), "--dry-run", *args, state="synthetic")
    day0, ours = history["mal_before"]["mean"], judged["mal_before"]["mean"]
    share = (ours - day0) / (history["mal_after"]["mean"] - day0)
    print(f"day 0 {shown(history['mal_before'])}; historical {shown(history['mal_after'])}")
    print(f"synthetic {shown(judged['mal_before'])}: {share:.3f} of the historical gain")


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--part", action="append", choices=("warm", "budget", "synthetic"))
    parser.add_argument("--records", type=int, default=1000, help="of the math log")
    parser.add_argument("--mixed", type=int, default=320, help="records of the log of four domains, and synthetic ones")
    parser.add_argument("--live", type=int, default=100, help="requests served after the replay")
    parser.add_argument("--questions", type=Path, help="JSON Lines of `prompt`; the last ones are asked live")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    bench = Bench(args.out)
    math = [text for _, text in read_prompts(args.questions)] if args.questions else pocket_prompts("math")
    math = [text for text in math if len(text) < 500]
    known, live = math[: -args.live], math[-args.live :]
    mixed = {domain: pocket_prompts(domain) for domain in DOMAINS}
    for part in args.part or ("warm", "budget", "synthetic"):
        print(f"## {part}")
        if part == "warm":
            warm(bench, bench.log("math", {"math": known}, args.records), live)
        elif part == "synthetic":
            synthetic(bench, bench.log("mixed", mixed, args.mixed), args.mixed)
        else:
            log = bench.log("math", {"math": known}, args.records)
            budget(bench, log, args.records, replayed(bench, log))
            log = bench.log("mixed", mixed, args.mixed)
            budget(bench, log, args.mixed, historical(bench, log))


if __name__ == "__main__":
    main()
