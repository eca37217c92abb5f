"""The whole pipeline by papermill at one setting: data, tokenizer, pretraining, fine-tuning, exam, and a short chat.

python dev/demo.py [CONFIG] [--out FOLDER]      CONFIG is a folder of parameter files, default configs/tiny; FOLDER runs/demo

Each step runs a chapter with the parameters of CONFIG/<step>.yaml; a step without such a file is left out. The notebooks
with their outputs, the log of each step, report.json and report.md stay in FOLDER. Nothing is downloaded.
"""
import argparse, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
from book import ROOT, Progress

STEPS = [  # (step: its parameter file and output notebook, chapter it runs)
    ("00_data", "00_data"),
    ("01_tokenizer", "01_tokenizer"),
    ("03_pretrain", "03_pretrain"),
    ("04_mid", "04_sft"),
    ("04_sft", "04_sft"),
    ("07_rl", "07_rl"),
    ("06_eval", "06_eval"),
]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def last_row(base: Path, since: float) -> dict:
    "The newest row of the metrics file written last since a time; {} when there is none."
    files = [p for p in base.glob("*_checkpoints/*/metrics.jsonl") if p.stat().st_mtime >= since]
    if not files: return {}
    lines = max(files, key=lambda p: p.stat().st_mtime).read_text(encoding="utf-8").splitlines()
    for line in reversed(lines):                                    # the last line may be half written
        try: return json.loads(line)
        except ValueError: pass
    return {}

def cells_done(notebook: Path) -> str:
    "How far papermill has come, from the output notebook it saves after each cell."
    try: cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError): return "starting"
    status = [c["metadata"].get("papermill", {}).get("status") for c in cells]
    return f"cell {sum(s == 'completed' for s in status) + 1}/{len(status)}"

def stop(process):
    "End a step with all its children: first as Ctrl-C would, then for good."
    for sig, seconds in ((signal.SIGINT, 10), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try: os.killpg(process.pid, sig)
        except ProcessLookupError: return
        try: process.wait(seconds)
        except subprocess.TimeoutExpired: continue
        return

def run_step(step: str, chapter: str, parameters: Path, out: Path, base: Path, progress: Progress) -> float:
    "Run one chapter by papermill with a live line; seconds it took. Exits with the end of its log if it fails."
    from nanochat_nb.runtime import progress_text
    notebook, log = out/f"{step}.ipynb", out/f"{step}.log"
    command = [sys.executable, "-m", "papermill", f"nbs/{chapter}.ipynb", notebook, "-f", parameters, "--no-progress-bar"]
    start = time.time()
    with open(log, "wb") as f:
        p = subprocess.Popen(command, cwd=ROOT, env=os.environ | OFFLINE | {"NANOCHAT_BASE_DIR": str(base)}, stdin=subprocess.DEVNULL,
                             stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while p.poll() is None:
                row = last_row(base, start)
                progress.show(f"{step}: {cells_done(notebook)}" + (f"  {progress_text(row)}" if row else ""))
                time.sleep(0.5)
        except BaseException:
            stop(p)
            raise
    if p.returncode:
        progress.say(f"{step}: FAILED")
        sys.exit(f"{log.read_text(encoding='utf-8', errors='replace')[-3000:]}\nerror: step {step} failed; its log is {log}, its notebook {notebook}")
    progress.say(f"{step}: {time.time() - start:.0f} s")
    return time.time() - start

def chat(base: Path):
    "Print a short conversation with the newest model in each language; facts and sums are questions of the exam."
    from nanochat_nb.evals import load_engine, world_of
    from nanochat_nb.world import exam
    engine, world = load_engine(base), world_of(base)
    for lang, hello, thanks in (("zh", "你是谁？", "谢谢你！"), ("en", "Who are you?", "Thank you!")):
        fact, sum_ = (exam(world, lang, kind, 1)[0] for kind in ("mcq", "arithmetic"))
        asked = [(hello, ""), (fact["stem"][0]["content"], fact["choices"][fact["label"]]), (sum_["messages"][0]["content"], sum_["answer"]), (thanks, "")]
        messages = []
        for question, right in asked:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": engine.chat(messages, temperature=0.0, max_tokens=64)})
            print(f"[{lang}] > {question}\n[{lang}]   {messages[-1]['content']}" + (f"   (right: {right})" if right else ""))

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("config", nargs="?", default=str(ROOT/"configs"/"tiny"), help="folder of parameter files")
    ap.add_argument("--out", default=str(ROOT/"runs"/"demo"), help="folder for everything the run makes; emptied first")
    a = ap.parse_args()
    config, out = Path(a.config).resolve(), Path(a.out).resolve()
    steps = [(step, chapter, config/f"{step}.yaml") for step, chapter in STEPS if (config/f"{step}.yaml").exists()]
    if not steps: sys.exit(f"error: {config} holds none of {', '.join(f'{s}.yaml' for s, _ in STEPS)}")
    if out.exists() and any(out.iterdir()) and not (out/"base").exists():
        sys.exit(f"error: {out} holds something that is not an earlier run; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    base = out/"base"
    base.mkdir(parents=True)
    progress = Progress(every=15)
    progress.say(f"{len(steps)} steps, {config.name}; notebooks and logs in {out}")
    try: seconds = {step: run_step(step, chapter, parameters, out, base, progress) for step, chapter, parameters in steps}
    except KeyboardInterrupt:
        print("interrupted; checkpoints written so far are whole", file=sys.stderr)
        sys.exit(130)
    for f in (base/"report").glob("report.*"): shutil.copy(f, out/f.name)
    print((out/"report.md").read_text(encoding="utf-8"))
    chat(base)
    progress.say(f"done: {sum(seconds.values()):.0f} s of steps; report in {out/'report.json'}")

if __name__ == "__main__": main()
